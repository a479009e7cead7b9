"""What a check says: every comparison, the answers to its questions, the first thing that differs; and how two results are laid beside each other for it."""

from __future__ import annotations

import dataclasses
import functools
import html
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from partition import _jax
from partition.distances import TOLERANCE, Choices, Difference, against, compare, floating, parts
from partition.divergence import Differs
from partition.errors import EquivalenceError
from partition.program import Program

SHOWN = 5
"""How many of many differences are printed, the largest first."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """outputs and boundaries: every comparison. culprit: the first op or transfer that diverges, where something does.

    cut, sharding, target: the answers to the three questions. tokens: distributions that choose tokens, where stages compute them and they are not
    bit for bit. not_shown: what a run on these stand-ins cannot tell. moved_bytes and planned_bytes: what really crossed between meshes, and what
    the plan says crosses; they differ where a token loop that may stop early ran `trips` times and not as often as planned. tie: values differ, and roundings alone make them: the order of a
    sharded mesh's sums, or of a part compiled for itself, tips a choice at a near tie (see `ties.py`), which `sharding` or `cut` names.
    """

    equal: bool
    bitwise: bool
    outputs: tuple[Difference, ...]
    boundaries: tuple[Difference, ...]
    culprit: str | None
    not_shown: tuple[str, ...]
    stages: int
    moved_bytes: int
    planned_bytes: int
    trips: int | None
    planned_trips: int
    seconds: float
    options: Mapping[str, Any]
    cut: str = ""
    sharding: str = ""
    target: str = ""
    tokens: tuple[Choices, ...] = ()
    tie: bool = False

    @property
    def word(self) -> str:
        """The verdict in a few words."""
        return "not equal" if not self.equal else "bit for bit" if self.bitwise else "up to a choice at a near tie" if self.tie else "within bounds"

    def __str__(self) -> str:
        word = "NOT EQUAL" if not self.equal else "outputs EQUAL BIT FOR BIT" if self.bitwise else f"EQUAL {self.word}"
        exact = sum(d.bitwise for d in self.boundaries)
        cut = bool(self.planned_trips or self.stages)  # else two callables were compared
        lines = [f"{word}: {len(self.outputs)} outputs" + (f", {len(self.boundaries)} values at stage boundaries ({exact} bit for bit), {self.stages} stages" if cut else " of reference and candidate")]
        asked = (("is the cut right?" if cut else "is the candidate right?", self.cut), ("does sharding matter?", self.sharding), ("what would the target do?", self.target))
        lines += [f"  {question:<26}{answer}" for question, answer in asked if answer]
        lines += [f"  first divergence: {self.culprit}"] if self.culprit else []
        for d in self.outputs:
            lines += [f"  {d}", *([f"    {spread(d)}"] if sum(d.steps[1:]) else [])]
        far = sorted(self.tokens, key=lambda c: -c.kl[1])
        lines += [f"  {c}" for c in far[:SHOWN]] + ([f"  ... and {len(far) - SHOWN} more distributions that are nearer"] if len(far) > SHOWN else [])
        ordered = sorted((d for d in self.boundaries if not d.bitwise), key=lambda d: (d.equal, -d.relative))
        worst = list({re.split(" made by | read by ", d.name)[0]: d for d in ordered[::-1]}.values())[::-1]  # of a value that several read, the farthest
        lines += [f"  boundary {d}" for d in worst[:SHOWN]] + ([f"  ... and {len(worst) - SHOWN} more values at boundaries that are not bit for bit"] if len(worst) > SHOWN else [])
        lines += [f"  against float64, the worst boundary: {max(held, key=lambda d: d.oracle or (0, 0))}"] if (held := [d for d in self.boundaries if d.oracle is not None]) else []
        lines += [f"  moved {self.moved_bytes:,} B between meshes, planned {self.planned_bytes:,} B{self._stopped()}"] if cut else []
        return "\n".join([*lines, *(f"  not shown: {n}" for n in self.not_shown)])

    def _repr_html_(self) -> str:
        """A verdict in a notebook: its word in colour, the rest as it prints."""
        first, *rest = html.escape(str(self)).splitlines()
        colour = "#1e8449" if self.bitwise else "#2e86c1" if self.equal else "#c0392b"
        return f"<p style='color:{colour};font-weight:bold'>{first}</p><pre>{chr(10).join(rest)}</pre>"

    def _stopped(self) -> str:
        early = self.trips is not None and self.trips < self.planned_trips
        return f": the token loop ended by itself after {self.trips} of {self.planned_trips} trips" if early else ""


def spread(d: Difference) -> str:
    """How far the elements of an output are apart, in units in the last place, and the two as directions."""
    names = ("0", "1", "2", "3 to 4", "5 to 16", "17 to 256", "more")
    shares = [f"{name}: {100 * n / sum(d.steps):.3g} %" for name, n in zip(names, d.steps, strict=True) if n]
    return f"cosine {d.cosine:.9g}; elements by ULP apart: {', '.join(shares)}"


def refused(verdict: Verdict, what: str, *, where: str, mend: str) -> EquivalenceError:
    """The error to raise for a verdict, which it carries."""
    error = EquivalenceError(what, where=where, mend=mend)
    error.verdict = verdict
    return error


def changing(verdict: Verdict, who: str, where: str) -> EquivalenceError:
    """The error to raise where a model gives other numbers when it is run again: of the cut, or of the candidate, nothing is shown then."""
    what = f"{who} does not give the same numbers twice"
    said = dataclasses.replace(verdict, cut=f"not told: {what}", sharding="", culprit=f"{what}: {where}")
    return refused(said, what, where=where, mend="give it keys as arguments, or take out what changes from run to run")


def hold_numbers(verdict: Verdict, reference: Any, args: Any) -> None:
    """Raises EquivalenceError for an output or an argument without a number: NaN that equals NaN shows nothing."""
    given = ((f"argument {jax.tree_util.keystr(path)}", leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(args)[0])
    for name, leaf in (*((f"output {d.name}", leaf) for d, leaf in zip(verdict.outputs, jax.tree_util.tree_leaves(reference), strict=True)), *given):
        if floating(str(getattr(leaf, "dtype", ""))) and leaf.size and _is_nan(_jax.to_numpy(leaf).ravel()):
            what = f"every number of {name} is NaN, so nothing is shown"
            empty = dataclasses.replace(verdict, equal=False, bitwise=False, culprit=what, cut="not told: there are no numbers", sharding="")
            raise refused(empty, what, where=f"{leaf.dtype}{list(leaf.shape)}", mend="look for the first NaN: jax.config.update('jax_debug_nans', True)")


def numberless(outputs: Sequence[Difference], reference: Any) -> tuple[str, ...]:
    """What is not shown of outputs that hold no finite number, such as infinities on both sides."""
    rows = zip(outputs, jax.tree_util.tree_leaves(reference), strict=True)
    return tuple(f"no number of output {d.name} is finite" for d, leaf in rows if floating(d.dtype) and 0 not in d.shape and not np.isfinite(_jax.to_numpy(leaf)).any())


def _is_nan(flat: np.ndarray) -> bool:
    """Whether every number is NaN; of most arrays the first one tells."""
    return all(bool(np.isnan(parts(part).astype(np.float64)).all()) for part in (flat[:1], flat))


def rules(tolerance: Mapping[str, float] | None) -> Iterator[Differs]:
    """What to look for, in turn: values beyond their bounds, and where nothing is, those whose differences are too many for roundings."""
    def how(held: Mapping[str, float] | None, reference: Any, candidate: Any) -> str:
        return "" if (d := compare("", reference, candidate, held)).equal else str(d).strip()

    yield from (functools.partial(how, held) for held in ((TOLERANCE, None) if tolerance is None else (tolerance,)))


def compared(reference: Any, result: Any, tolerance: Mapping[str, float] | None) -> tuple[Difference, ...]:
    """Every leaf of a result against that of the reference."""
    paths = [jax.tree_util.keystr(path) or "result" for path, _ in jax.tree_util.tree_flatten_with_path(reference)[0]]
    pairs = zip(paths, jax.tree_util.tree_leaves(reference), jax.tree_util.tree_leaves(result), strict=True)
    return tuple(compare(name, a, b, tolerance) for name, a, b in pairs)


def beside(differences: Sequence[Difference], truth: Sequence[Any], reference: Sequence[Any], candidate: Sequence[Any]) -> tuple[Difference, ...]:
    """Differences with the errors of both sides against float64, where there is such a value."""
    rows = zip(differences, truth, reference, candidate, strict=True)
    return tuple(d if t is None else against(d, t, a, b) for d, t, a, b in rows)


def largest(values: Any) -> float:
    """The largest finite number among all floats of a tree."""
    arrays = [parts(_jax.to_numpy(leaf)).astype(np.float64) for leaf in jax.tree_util.tree_leaves(values) if floating(str(getattr(leaf, "dtype", "")))]
    return max((float(np.abs(a[np.isfinite(a)]).max(initial=0.0)) for a in arrays), default=0.0)


def roughest(program: Program) -> float:
    """The bound of the narrowest floats of a program."""
    return max((TOLERANCE.get(t.dtype, 0.0) for t in program.graph.tensors), default=0.0)
