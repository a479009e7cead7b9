"""anatomy(): what part of the model each op is (attention, mlp, experts, norm, ...), and why; in which layer.

Found from the structure, without names: `levels.py` is what is asked of it, `parts.py` tells the contractions, `others.py` the rest,
`layers.py` numbers the layers and finds those that are alike.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from partition.anatomy.layers import Layers, Marked, layers
from partition.anatomy.levels import Kind, Level, Weights
from partition.anatomy.others import others
from partition.anatomy.parts import MIXERS, Parts, contractions, leftover
from partition.graph import Graph, Op, Role, entries, uncollected
from partition.loops import feedback, written

if TYPE_CHECKING:
    from partition.phases import Phases

__all__ = ["Anatomy", "Kind", "anatomy"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Anatomy:
    """The part of each op by id, why, and how sure that is; the layers.

    why: op id -> (reason, confidence): 0.9 the structure that only this part has; 0.6 what is left, or what goes with a neighbour.
    layer: op id -> the number of its layer, None outside of any and in a scan over layers; `layers.of` has the layers of each.
    """

    kind: Mapping[int, Kind] = dataclasses.field(repr=False)
    why: Mapping[int, tuple[str, float]] = dataclasses.field(repr=False)
    layers: Layers

    @functools.cached_property
    def layer(self) -> dict[int, int | None]:
        """Op id -> the only layer that it computes, None where that is none or several."""
        return {op: found[0] if len(found) == 1 else None for op, found in self.layers.of.items()}

    def __str__(self) -> str:
        lines = [f"{name}: {count} layers, alike: {'; '.join(map(_span, self.layers.classes[name])) or 'none'}" for name, count in self.layers.counts.items()]
        for kind in Kind:
            ops = [op for op, k in self.kind.items() if k is kind]
            if ops:
                best = max(ops, key=lambda op: self.why[op][1])
                lines.append(f"{kind}: {len(ops)} ops; op {best}: {self.why[best][0]} (confidence {self.why[best][1]:g}, least {min(self.why[op][1] for op in ops):g})")
        return "\n".join(lines)


def _span(numbers: Sequence[int]) -> str:
    return f"{numbers[0]}-{numbers[-1]}" if len(numbers) > 2 and numbers[-1] - numbers[0] == len(numbers) - 1 else ", ".join(map(str, numbers))


@uncollected()
def anatomy(phases: Phases) -> Anatomy:
    """Find the parts and the layers of a tagged program."""
    graph, loop = phases.program.graph, phases.token_loop
    weights = Weights(graph, _states(graph, loop))
    parts = Parts(weights, _handed(loop))
    regions: dict[str, tuple[Graph, tuple[int, ...]]] = {"top": (graph, () if loop is None else (loop.id,))}
    if loop is not None and loop.loop is not None:
        regions["body"] = loop.loop.body, ()
    levels = [g for level, skip in reversed(regions.values()) for g in contractions(Level(level, weights, skip), parts)]
    leftover(graph, parts)
    for g in levels:
        others(g, parts)
    for op in graph.walk():
        parts.say(op.id, Kind.OTHER, "no contraction is near", 0.6)
    marked = Marked(mixers={op for op, k in parts.items() if k in MIXERS}, residuals=parts.residuals, lent=parts.lent,
                    recurrent={op for op, k in parts.items() if k is Kind.RECURRENT}, experts={op for op, k in parts.items() if k is Kind.EXPERTS},
                    outside={op for op, k in parts.items() if k in (Kind.HEAD, Kind.EMBEDDING, Kind.SAMPLING) and parts.why[op][1] > 0.6})  # fmt: skip
    return Anatomy(kind=dict(parts), why=parts.why, layers=layers(graph, regions, weights, marked))


def _states(graph: Graph, token_loop: Op | None) -> set[int]:
    """Tensors of any level that are, or become, a state of floats which is made anew for every token, not written in place."""
    tensors, found = graph.tensors, set[int]()

    def down(level: Graph, t: int) -> None:
        while t not in found:
            found.add(t)
            op = level.producer.get(t)
            if op is None or op.loop is None:
                return
            slot, level = op.outputs.index(t), op.loop.body
            if slot < op.loop.carry:
                found.add(level.inputs[op.loop.consts + slot])
            t = level.outputs[slot]

    if token_loop is None or token_loop.loop is None:
        given = {(tensors[t].shape, tensors[t].dtype) for t in graph.inputs if tensors[t].role is Role.INPUT and tensors[t].shape and "float" in tensors[t].dtype}
        for t in graph.outputs:
            if (tensors[t].shape, tensors[t].dtype) in given and not any(written(graph, t, i) for i in graph.inputs):
                down(graph, t)
        return found
    loop = token_loop.loop
    fed, _ = feedback(loop.body, range(loop.consts, loop.consts + loop.carry))
    for n in range(loop.carry):
        into, out = loop.body.inputs[loop.consts + n], loop.body.outputs[n]
        if n not in fed and into != out and "float" in tensors[into].dtype and not written(loop.body, out, into):
            found.add(into)
            down(loop.body, out)
            down(graph, token_loop.inputs[loop.cond_consts + loop.consts + n])
    return found


def _handed(token_loop: Op | None) -> dict[int, list[int]]:
    """Tensor that the token loop is given -> what it is called in the body."""
    found: dict[int, list[int]] = {}
    for inner, outer in entries(token_loop) if token_loop is not None else ():
        found.setdefault(outer, []).append(inner)
    return found
