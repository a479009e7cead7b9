"""How ops are split inside a mesh of equal devices, and which collectives that takes.

`layout` searches over the factors of every contraction (`search.py`, over `factors.py` and `pieces.py`): columns or rows of weights (tensor
parallel), tokens or sequences (sequence and data parallel), experts, or nothing, whichever is fastest with the collectives and resharding
that it takes, and fits. Key and value heads that are fewer than the devices are held by several of them. The layout that stages run under
is the same one, `narrowed` to the host devices that stand for the mesh.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Mapping

from partition.graph import Graph, bodies, held, weights
from partition.sharding.factors import factors
from partition.sharding.pieces import Pieces, Split
from partition.sharding.search import Collective, Search, Terms

__all__ = ["Layout", "Split", "layout", "narrowed", "parallelism"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """tensors: tensor id -> its split (absent: whole on each device). ways: op id -> over how many devices its work is spread.

    along: op id -> the factors along which it is split (see `factors.py`). collectives: op id -> (kind, bytes of the whole tensor,
    devices) of what it waits for. exact: whether the search dropped no state; it still takes each loop by itself, and a whole
    tensor to be cut for nothing.
    """

    degree: int
    tensors: Mapping[int, Split]
    ways: Mapping[int, float]
    along: Mapping[int, tuple[int, ...]]
    collectives: Mapping[int, tuple[Collective, ...]]
    exact: bool = True

    def copies(self, tensor: int) -> float:
        """How much of a tensor's bytes lies in the memories of the mesh together, the fullest device's share on each: degree / ways."""
        split = self.tensors.get(tensor)
        return self.degree / Pieces(self.degree).spread(split[1]) if split else float(self.degree)


def layout(
    graph: Graph, degree: int, seconds: Mapping[int, float] | None = None, collective: Callable[[str, float, int], float] | None = None, *,
    capacity: float = math.inf, tensor: bool = False,
) -> Layout:  # fmt: skip
    """Choose how a whole program is split over `degree` devices.

    seconds: of each op on one device, by op id, and of a collective (kind, bytes, devices); by default those of bytes and operations at
    1 TB/s and 100 TFLOP/s, and of collectives at 10 us and 100 GB/s. capacity [B]: of one device, for the weights. tensor:
    contractions with weights are split along the weights wherever they can be, and never along tokens, as tensor-parallel servers do.
    """
    if degree == 1:
        return Layout(degree=1, tensors={}, ways={}, along={}, collectives={})
    seconds = _plain(graph) if seconds is None else seconds
    collective = _plain_collective if collective is None else collective
    weight, loops = _LIGHT, sum(1 for op in graph.ops if op.loop is not None)
    while True:
        tried = []
        for latest in (False, True)[: max(loops, 1)]:  # what one loop settles, the others take as given: the order matters
            search = Search(graph, Pieces(degree), Terms(seconds, collective, weight, tensor, latest))
            tried.append((search.level(graph, {}), search.found))
        found = min(tried, key=lambda t: t[0])[1]
        made = Layout(degree=degree, tensors={t: w for t, w in found.tensors.items() if w is not None}, ways={i: w for i, w in found.ways.items() if w > 1},
                      along=found.along, collectives={i: c for i, c in found.comm.items() if c}, exact=found.exact)  # fmt: skip
        nbytes = sum(graph.tensors[t].nbytes * made.copies(t) / degree for t in weights(graph))  # that each device holds
        if nbytes <= capacity or weight > _HEAVY:
            return made
        weight *= 100  # the weights do not fit as they lie: a byte held costs more


_LIGHT, _HEAVY = 1e-13, 1e-8
"""Seconds that the search pays for a byte held: enough to choose between what is equally fast; and where it gives up."""


def _plain(graph: Graph) -> dict[int, float]:
    found = {}
    for op in graph.walk():
        if op.loop is None and not op.bodies:
            rule, operands = factors(op, graph.tensors), (*op.inputs, *op.outputs)
            moved = sum(graph.tensors[t].nbytes for t in operands) if rule.summed else 0.0
            found[op.id] = max(2.0 * math.prod(rule.sizes) / 1e14 if op.primitive == "dot_general" else 0.0, moved / 1e12)
    return found


def _plain_collective(kind: str, nbytes: float, devices: int) -> float:
    return 1e-5 + (2 if kind == "all_reduce" else 1) * (devices - 1) / devices * nbytes / 1e11


def narrowed(wide: Layout, graph: Graph, degree: int) -> Layout:
    """The same splits over fewer devices, in as many pieces as divide what is split: how stand-ins hold what the mesh would."""
    tensors = {}
    for t, (dims, pieces) in wide.tensors.items():
        left, over, made = math.gcd(degree, pieces) if pieces < wide.degree else degree, list[int](), 1
        for d in dims:
            n = math.gcd(graph.tensors[t].shape[d], left)
            if n > 1:
                over.append(d)
                made *= n
                left //= n
            if n < graph.tensors[t].shape[d]:
                break  # the next dimension would be split across pieces of this one
        if made > 1:
            tensors[t] = (tuple(over), made)
    return Layout(degree=degree, tensors=tensors, ways={}, along={}, collectives={})


def parallelism(made: Layout, graph: Graph) -> Counter[str]:
    """How many contractions with weights are split along columns or rows ("tensor"), tokens ("sequence"), experts ("expert"), or not ("none")."""
    within, kinds = held(graph), Counter[str]()
    for op in graph.walk():
        if op.primitive in ("dot_general", "ragged_dot_general") and not bodies(op):
            sides = [i for i, t in enumerate(op.inputs[:2]) if t in within]
            if len(sides) != 1:
                continue
            along, rule = made.along.get(op.id, ()), factors(op, graph.tensors)
            own = {f for dims in rule.ins[sides[0]] for f in dims}
            kinds["none" if not along else "sequence" if along[0] not in own else "expert" if op.primitive == "ragged_dot_general" and along == (0,) else "tensor"] += 1
    return kinds
