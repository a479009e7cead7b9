"""What the target's arithmetic would do to a model, by phase: which half of a split loses more, and what a narrower wire costs and saves.

The same stages are run as the program says, then with prefill, decode, or both in the arithmetic of the devices they are planned for, and with
what crosses cast on the wire. Tokens run freely: one that differs changes what follows, so the share that agrees falls faster than the numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from partition._jax import to_numpy
from partition.distances import Choices, choices, log_softmax
from partition.errors import ExecutionError, NameUnknownError
from partition.execution import Target, prepare
from partition.phases import Phase
from partition.precision import WIRES
from partition.stages import Stage, Stages
from partition.tables import table


@dataclasses.dataclass(frozen=True, kw_only=True)
class Effect:
    """What one arithmetic does to the outputs. agree: share of integer outputs (tokens) that stay; first: index of the first that does not. rms: of the floats' changes, over
    the rms of the floats, None where no output is one. logits: float outputs as distributions of tokens, where they are wide enough. crossed [B]: between meshes.
    perplexity: of a text that was given, under these logits."""

    name: str
    agree: float
    first: tuple[int, ...] | None
    rms: float | None
    logits: Choices | None
    crossed: int
    perplexity: float | None = None


def effects(stages: Stages, *args: Any, wires: Sequence[str] | None = None, text: np.ndarray | None = None, progress: Callable[[str], None] | None = None) -> tuple[Effect, ...]:
    """Run the stages as the program says, then in the arithmetic of their devices by phase, then with narrower wires.

    The first effect is the program's own. wires: bfloat16 and the 8 bits of the device that sends unless told. text: int [batch, n] that the program was made to read, for outputs that are its logits [batch, n, vocabulary]. Raises NameUnknownError for a wire format, ExecutionError where no device's profile has a precision.
    """
    cluster = stages.problem.cluster
    assert cluster is not None
    if wrong := [w for w in wires or () if w not in WIRES]:
        raise NameUnknownError.among("wire format", wrong[0], WIRES)
    said = {s.id: p for s in stages.all if (p := cluster.meshes[s.mesh].device.precision) is not None}
    if not said:
        raise ExecutionError("no device of this cluster says in which arithmetic it computes", where=f"cluster {cluster.name}", mend="give its profile a [device.precision] table")
    phase = {s.id: _phase(stages, s) for s in stages.all}
    ways: dict[str, Target] = {}
    for name in sorted(set(phase.values())):
        kinds = sorted({cluster.meshes[s.mesh].device.name for s in stages.all if phase[s.id] == name and s.id in said})
        if kinds:
            ways[f"{name} as {' and '.join(kinds)} compute{'s' * (len(kinds) == 1)}"] = Target(stages={i: p for i, p in said.items() if phase[i] == name})
    if len(ways) > 1:
        ways["all of it"] = Target(stages=said)
    if wires is None:
        wires = ("bfloat16", said[min(said)].float8)
    if len({s.mesh for s in stages.all}) > 1:
        ways |= {f"what crosses in {w}": Target(stages={}, wire=w) for w in wires}
    base, crossed = _run(stages, args, None, progress, "as the program says")
    found = [_effect("as the program says", base, base, crossed, text)]
    for name, target in ways.items():
        result, crossed = _run(stages, args, target, progress, name)
        found.append(_effect(name, base, result, crossed, text))
    return tuple(found)


def _phase(stages: Stages, stage: Stage) -> str:
    """The phase of a stage's ops: decode for the token loop and its body, "both phases in one" for a stage that holds both."""
    phases = stages.problem.phases
    assert phases is not None
    found = {phases.of.get(op.id, Phase.NONE) for op, _ in stage.items} - {Phase.NONE, Phase.BOTH}
    if stage.region != "top" or any(op.id == phases.loop for op, _ in stage.items):
        found.add(Phase.DECODE)
    return ("both phases in one" if {Phase.PREFILL, Phase.DECODE} <= found else "".join(map(str, found))) or "the rest"


def _run(stages: Stages, args: tuple[Any, ...], target: Target | None, progress: Callable[[str], None] | None, name: str) -> tuple[list[np.ndarray], int]:
    if progress is not None:
        progress(f"run {name}")
    runner = prepare(stages, alone=True, target=target)
    result, record = runner.run(runner.load(*args))
    return [to_numpy(leaf) for leaf in jax.tree_util.tree_leaves(result)], sum(m.nbytes for m in record.moved)


def perplexity(logits: np.ndarray, text: np.ndarray) -> float:
    """exp of the mean negative log-likelihood of a text [batch, n] under logits [batch, n, vocabulary]."""
    return float(np.exp(-np.take_along_axis(log_softmax(logits.astype(np.float64)), text[..., None].astype(np.int64), axis=-1).mean()))


def _effect(name: str, base: Sequence[np.ndarray], result: Sequence[np.ndarray], crossed: int, text: np.ndarray | None) -> Effect:
    whole = [(a, b) for a, b in zip(base, result, strict=True) if np.issubdtype(a.dtype, np.integer)]
    count = sum(a.size for a, _ in whole)
    first = next((tuple(int(i) for i in np.argwhere(a != b)[0]) for a, b in whole if (a != b).any()), None)
    pairs = [(a.astype(np.float64), b.astype(np.float64)) for a, b in zip(base, result, strict=True) if "float" in str(a.dtype)]
    change, size = sum(float(np.nansum((a - b) ** 2)) for a, b in pairs), sum(float(np.nansum(a**2)) for a, _ in pairs)
    wide = [(a, b) for a, b in pairs if a.ndim >= 2 and a.shape[-1] >= 32]
    return Effect(
        name=name, agree=sum(int((a == b).sum()) for a, b in whole) / count if count else 1.0, first=first, rms=((change / size) ** 0.5 if size > 0 else 0.0) if pairs else None,
        logits=choices("logits", *max(wide, key=lambda pair: pair[0].shape[-1])) if wide else None, crossed=crossed,
        perplexity=next((perplexity(b, text) for _, b in wide if text is not None and b.shape[:-1] == text.shape), None),
    )  # fmt: skip


def effects_text(found: Sequence[Effect]) -> str:
    """The effects as a table."""
    lines = [(e.name, f"{100 * e.agree:.1f} %", "-" if e.first is None else str(list(e.first)), "-" if e.rms is None else f"{e.rms:.2g}", *(("-", "-") if e.logits is None else (f"{e.logits.kl[0]:.2g}", f"{100 * e.logits.top1:.1f} %")),
              "-" if e.perplexity is None else f"{e.perplexity:.4f}", f"{e.crossed:,}") for e in found]  # fmt: skip
    heads = ("arithmetic", "tokens kept", "first other", "change of floats", "KL of logits", "likeliest kept", "perplexity", "B crossed")
    told = [n for n in range(len(heads)) if any(line[n] != "-" for line in lines)]
    return table("What the target's arithmetic would do", [heads[n] for n in told], [[line[n] for n in told] for line in lines])


def summary(found: Sequence[Effect]) -> str:
    """The answer in a line: which part loses most."""
    worst = max((e for e in found[1:] if "crosses" not in e.name), key=lambda e: (1 - e.agree, e.rms or 0.0), default=None)
    if worst is None:
        return "nothing is emulated"
    if worst.agree == 1.0 and not worst.rms:
        return "nothing: every output stays as it is" + (" (tokens alone: give the program its logits as an output to see how near others are)" if worst.rms is None else "")
    return f"{worst.name}: {100 * worst.agree:.1f} % of tokens stay" + (f", floats change by {worst.rms:.2g} of their size" if worst.rms is not None else "")

