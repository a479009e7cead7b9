"""Where two programs that were written separately part: the first op of the candidate that computes what the reference does not.

Both are traced and run with the results of all their ops kept. Programs of the same ops in the same order are compared op by op, and inside the loop that differs
trip by trip. Of others, a value of the candidate is looked for among all values of the reference, in any shape, and among their blocks, as one device of several
holds them: an op is where they part if its result is not among them and nothing that is computed from it is, which leaves out partial sums and other steps that
only the candidate makes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from partition import _jax
from partition._jax.likeness import unlike
from partition.distances import compare, floating
from partition.divergence import Differs, describe, results, within
from partition.execution import bound_inputs
from partition.graph import Op, Role
from partition.program import Program

FEWEST = 8
"""Numbers that a value must have to be known by them."""


class _Run:
    """A program's ops as one jaxpr with every result as an output, and what they gave."""

    def __init__(self, program: Program, args: tuple[Any, ...]):
        self.program, graph, lowered = program, program.graph, program.entry.lowered
        self.ops = graph.ops
        self.made = [t for op in self.ops for t in op.outputs]
        consts = dict.fromkeys(t for op in self.ops for t in op.inputs if graph.tensors[t].role is Role.CONST)
        given = [*graph.inputs, *consts]
        self.inputs = [{**lowered.values, **bound_inputs(program, args)}[t] for t in given]
        self.jaxpr = _jax.write([(op, None) for op in self.ops], [(t, None) for t in given], [(t, None) for t in self.made], lowered, name="whole")
        self.results = dict(zip(self.made, results(self.jaxpr, self.inputs, None)[0], strict=True))

    def eqn(self, number: int) -> Any:
        return _jax.body_of(self.jaxpr).eqns[number]

    def environment(self) -> Callable[[Any], Any]:
        exposed, _ = _jax.expose(self.jaxpr)
        return _jax.environment(exposed, self.inputs, [self.results[t] for t in self.made])


def parting(reference: Program, candidate: Program, args: tuple[Any, ...], differs: Differs) -> str | None:
    """The candidate's op where the two part, with its scope and source line; None where none is found."""
    one, other = _Run(reference, args), _Run(candidate, args)
    if [op.primitive for op in one.ops] == [op.primitive for op in other.ops]:
        return _in_step(one, other, differs)
    known = [a for value in (*one.results.values(), *one.inputs) if floating(str((a := _jax.to_numpy(value)).dtype))]
    alone = _unmade_good(other, [n for n, op in enumerate(other.ops) if _is_alone(other, op, known)])
    return None if alone is None else f"{describe(candidate, other.ops[alone])}: the candidate computes there what the reference does not"


def _in_step(one: _Run, other: _Run, differs: Differs) -> str | None:
    """Where programs of the same ops part: by their values, or before by an equation that is another and gives other bits."""
    said, n = "", len(one.ops)
    for i, (a, b) in enumerate(zip(one.ops, other.ops, strict=True)):
        said = next((how for t, u in zip(a.outputs, b.outputs, strict=True) if (how := differs(one.results[t], other.results[u]))), "")
        if said:
            n = i
            break
    found = unlike(one.jaxpr, other.jaxpr)
    eqns = list(_jax.body_of(one.jaxpr).eqns)
    if found is not None and found[0] and (k := eqns.index(found[0][0])) <= n and _other_bits(one, other, k):
        return f"{describe(other.program, other.ops[k])}{_inside(found[1], found[0])}: the candidate's {found[2]}"
    if n == len(one.ops):
        return None
    inner = within(one.eqn(n), other.eqn(n), one.environment(), None, differs)
    return f"{describe(other.program, other.ops[n])}{inner and f', inside it {inner}'}: its result {said}"


def _inside(way: Sequence[Any], reference: Sequence[Any]) -> str:
    """The innermost equation of a way into loops and calls, as the candidate has it."""
    if len(way) < 2:
        return ""
    return f", inside it {way[-1].primitive.name} at {_jax.source(way[-1], (way[0], None))}"


def _other_bits(one: _Run, other: _Run, k: int) -> bool:
    pairs = zip(one.ops[k].outputs, other.ops[k].outputs, strict=True)
    return any(_jax.to_numpy(one.results[t]).tobytes() != _jax.to_numpy(other.results[u]).tobytes() for t, u in pairs)


def _telling(run: _Run, op: Op) -> list[np.ndarray]:
    """Results of an op that are known by their numbers: floats, enough of them, not all the same."""
    return [a for t in op.outputs if floating(str((a := _jax.to_numpy(run.results[t])).dtype)) and a.size >= FEWEST and (a != a.ravel()[0]).any()]


def _among(array: np.ndarray, known: Sequence[np.ndarray]) -> bool:
    """Whether a value is one of those known, or a block of one."""
    return any(compare("it", part.astype(array.dtype), array.reshape(part.shape)).equal for other in known for part in _blocks(other, array))


def _blocks(whole: np.ndarray, like: np.ndarray) -> Iterator[np.ndarray]:
    """What of an array is of the size of another: itself, or its equal parts along the one dimension in which it is longer."""
    if whole.size == like.size:
        yield whole
    elif whole.ndim == like.ndim and len(longer := [d for d in range(like.ndim) if whole.shape[d] != like.shape[d]]) == 1:
        d = longer[0]
        if whole.shape[d] % like.shape[d] == 0:
            yield from np.split(whole, whole.shape[d] // like.shape[d], axis=d)


def _is_alone(run: _Run, op: Op, known: Sequence[np.ndarray]) -> bool:
    return any(not _among(a, known) for a in _telling(run, op))


def _unmade_good(run: _Run, alone: Sequence[int]) -> int | None:
    """The first op whose result is not among the reference's, and of what is computed from it nothing is either."""
    good = {n for n, op in enumerate(run.ops) if n not in alone and _telling(run, op)}
    for first in alone:
        reached = set(run.ops[first].outputs)
        for n in range(first + 1, len(run.ops)):
            if reached & set(run.ops[n].inputs):
                if n in good:
                    break
                reached |= set(run.ops[n].outputs)
        else:
            return first
    return None
