"""Where two programs that were written separately part: the first op of the candidate that computes what the reference does not.

Both are traced and run with the results of all their ops kept. Programs of nearly the same ops in the same order are compared op by op, and inside the loop that differs
trip by trip. Of others, a value of the candidate is looked for among all values of the reference, in any shape, and among their blocks, as one device of several
holds them: an op is where they part if its result is not among them and nothing that is computed from it is, which leaves out partial sums and other steps that
only the candidate makes.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from partition import _jax
from partition._jax.bodies import environment, expose, inside
from partition._jax.likeness import unlike_params
from partition.distances import compare, floating
from partition.divergence import OTHERS, Differs, describe, within
from partition.execution import bound_inputs
from partition.graph import Graph, Op, Role
from partition.program import Program

ALIKE = 0.8
"""Share of their ops in the same order from which two programs are compared op by op."""
FEWEST = 8
"""Numbers that a value must have to be known by them."""
TRIPS = 8
"""How often bodies and conditions of loops are looked into."""
CHOICES = ("argmax", "argmin", "top_k")
NOWHERE = "the candidate computes there what the reference does not"


class _Form:
    """The ops of a program, or of a loop's body, as one jaxpr with every result as an output, compiled once."""

    def __init__(self, program: Program, graph: Graph):
        self.program, self.graph, lowered = program, graph, program.entry.lowered
        self.made = [t for op in graph.ops for t in op.outputs]
        consts = dict.fromkeys(t for op in graph.ops for t in op.inputs if graph.tensors[t].role is Role.CONST)
        self.inputs = [*graph.inputs, *(t for t in consts if t not in graph.inputs)]
        self.jaxpr = _jax.write([(op, None) for op in graph.ops], [(t, None) for t in self.inputs], [(t, None) for t in self.made], lowered, name="whole")
        self.exposed, _ = expose(self.jaxpr)
        self.compiled = jax.jit(_jax.as_function(self.exposed))


class _Run:
    """What the ops of a form gave."""

    def __init__(self, form: _Form, given: Mapping[int, Any]):
        self.form, self.program, self.graph, self.ops = form, form.program, form.graph, form.graph.ops
        self.given = {**self.program.entry.lowered.values, **given}
        self.inputs = [self.given[t] for t in form.inputs]
        self.results = dict(zip(form.made, form.compiled(*self.inputs), strict=True))

    def value(self, tensor: int) -> np.ndarray:
        return _jax.to_numpy(self.results[tensor] if tensor in self.results else self.given[tensor])

    def eqn(self, number: int) -> Any:
        return _jax.body_of(self.form.jaxpr).eqns[number]

    def environment(self) -> Callable[[Any], Any]:
        return environment(self.form.exposed, self.inputs, [self.results[t] for t in self.form.made])


def parting(reference: Program, candidate: Program, args: tuple[Any, ...], differs: Differs) -> str | None:
    """The candidate's op where the two part, with its scope and source line; None where none is found."""
    one, other = (_Run(_Form(p, p.graph), bound_inputs(p, args)) for p in (reference, candidate))
    return _parting(one, other, differs)


def _parting(one: _Run, other: _Run, differs: Differs) -> str | None:
    if (said := _other_choice(one, other)) is not None:
        return said
    matcher = difflib.SequenceMatcher(None, [_kind(one, op) for op in one.ops], [_kind(other, op) for op in other.ops], autojunk=False)
    known = [a for value in (*one.results.values(), *one.inputs) if floating(str((a := _jax.to_numpy(value)).dtype))]
    if matcher.ratio() >= ALIKE:
        return _in_step(one, other, {b + k: a + k for a, b, size in matcher.get_matching_blocks() for k in range(size)}, known, differs)
    alone = _unmade_good(other, [n for n, op in enumerate(other.ops) if _is_alone(other, op, known)])
    return None if alone is None else _nowhere(one, other, alone, differs)


def _nowhere(one: _Run, other: _Run, n: int, differs: Differs) -> str:
    """What is said of an op that the reference has not; of a loop, where its body parts from that of the reference's loop in its place."""
    op = other.ops[n]
    loops, rivals = ([k for k, o in enumerate(run.ops) if o.loop is not None and op.loop is not None and o.loop.kind == op.loop.kind] for run in (other, one))
    inner = _inside(one, rivals[loops.index(n)], other, n, differs) if n in loops and len(loops) == len(rivals) else ""
    return f"{describe(other.program, op)}" + (f", inside it {inner}" if inner else f": {NOWHERE}")


def _inside(one: _Run, m: int, other: _Run, n: int, differs: Differs) -> str:
    """Where the bodies of two loops part, trip by trip, each with the state that it made itself; empty where they do not."""
    (a, b), (want, got) = (one.ops[m].loop, other.ops[n].loop), (one.eqn(m), other.eqn(n))
    if a is None or b is None or a.kind != b.kind:
        return ""
    steps = zip((a.cond, a.body), (b.cond, b.body), strict=True)
    forms = itertools.cycle([(_Form(one.program, first), _Form(other.program, second)) for first, second in steps if first is not None and second is not None])
    trips = zip(inside(want, want, one.environment()), inside(got, got, other.environment()), forms, strict=False)
    for (_, _, mine), (_, _, theirs), (first, second) in itertools.islice(trips, TRIPS):
        alone, rival = (_Run(form, dict(zip(form.graph.inputs, given, strict=True))) for form, given in ((first, mine), (second, theirs)))
        if (said := _parting(alone, rival, differs)) is not None:
            return said
    return ""


def _reads_another(one: _Run, a: Op, other: _Run, b: Op, differs: Differs) -> str:
    """What an op reads that is not what its counterpart reads, though no op computed it wrongly: a value in another one's place, or a stale one; empty where there is none."""
    for t, u in zip(a.inputs, b.inputs, strict=False):
        if one.graph.tensors[t].role is not Role.LITERAL and other.graph.tensors[u].role is not Role.LITERAL and (how := differs(one.value(t), other.value(u))):
            want, got = (next((describe(run.program, op) for op in run.ops if tensor in op.outputs), _entered(run, tensor)) for run, tensor in ((one, t), (other, u)))
            return f": it reads {got} in place of the reference's {want}, {how}"
    return ""


def _entered(run: _Run, tensor: int) -> str:
    """A value that no op here makes: an argument by its name, or what enters a body by its place."""
    name = run.graph.tensors[tensor].name
    return name or (f"input {run.graph.inputs.index(tensor)} of the body" if tensor in run.graph.inputs else "constant")


def _other_choice(one: _Run, other: _Run) -> str | None:
    """A choice that the candidate makes from the same numbers in another way only, such as of more of them or along another axis."""
    for n, op in enumerate(other.ops):
        if op.primitive in CHOICES:
            from_same = [k for k, rival in enumerate(one.ops) if rival.primitive == op.primitive and compare("it", one.value(rival.inputs[0]), other.value(op.inputs[0])).equal]
            how = [unlike_params(one.eqn(k), other.eqn(n)) for k in from_same]
            if how and all(found is not None for found in how):
                return f"{describe(other.program, op)}: the candidate's {next(found[2] for found in how if found is not None)}"
    return None


def _stands_for_another(run: _Run, op: Op, known: Sequence[np.ndarray]) -> bool:
    """Whether an op is right and was only paired with another one's: the reference has its results, and no other op of the candidate gives them."""
    mine = _telling(run, op)
    rest = [a for other in run.ops if other is not op for a in _telling(run, other)]
    return bool(mine) and all(_among(a, known) and not any(a.shape == b.shape and compare("it", a, b).equal for b in rest) for a in mine)


def _kind(run: _Run, op: Op) -> tuple[Any, ...]:
    """What an op of the other program must be to stand for this one."""
    tensors = run.program.graph.tensors
    return op.primitive, tuple((tensors[t].shape, tensors[t].dtype) for t in op.outputs)


def _in_step(one: _Run, other: _Run, pairs: Mapping[int, int], known: Sequence[np.ndarray], differs: Differs) -> str | None:
    """Where programs part of which most ops stand for each other (`pairs`: of the candidate, of the reference): at the first of those whose values differ, or at
    an op without counterpart that it reads."""
    for n, op in enumerate(other.ops):
        if n not in pairs:
            continue
        said = next((how for t, u in zip(one.ops[pairs[n]].outputs, op.outputs, strict=True) if (how := differs(one.results[t], other.results[u]))), "")
        if not said or _stands_for_another(other, op, known):
            continue
        if before := _unpaired(other, n, pairs):
            return _nowhere(one, other, next((k for k in before if _is_alone(other, other.ops[k], known)), before[-1]), differs)
        if said_so := _reads_another(one, one.ops[pairs[n]], other, op, differs):
            return f"{describe(other.program, op)}{said_so}"
        want, got = one.eqn(pairs[n]), other.eqn(n)
        if other_way := [key for key in ("reverse", "length") if want.params.get(key) != got.params.get(key)]:
            return f"{describe(other.program, op)}: the candidate's op has {other_way[0]} = {got.params.get(other_way[0])}, not {want.params.get(other_way[0])}"
        inner = within(want, got, one.environment(), None, differs, theirs=True)
        if (not inner or inner.startswith(OTHERS)) and (parted := _inside(one, pairs[n], other, n, differs)):
            return f"{describe(other.program, op)}, inside it {parted}"
        if (found := unlike_params(want, got)) is not None and (not inner or inner.startswith(OTHERS)):
            way, how = found[1:]
            inside = f", inside it {way[-1].primitive.name} at {_jax.source(way[-1], (got, None))}" if way else ""
            return f"{describe(other.program, op)}{inside}: the candidate's {how}"
        return f"{describe(other.program, op)}{inner and f', inside it {inner}'}: its result {said}"
    return _last(one, other, pairs, known, differs)


def _last(one: _Run, other: _Run, pairs: Mapping[int, int], known: Sequence[np.ndarray], differs: Differs) -> str | None:
    """Where programs part behind the last op that both have: at what makes the first output that differs. Bodies of which one keeps what does not change as a constant have outputs of
    other places."""
    if len(one.graph.outputs) != len(other.graph.outputs):
        return None
    for t, u in zip(one.graph.outputs, other.graph.outputs, strict=True):
        if t in one.results and u in other.results and differs(one.results[t], other.results[u]):
            n = next(k for k, op in enumerate(other.ops) if u in op.outputs)
            before = [k for k in (*_unpaired(other, n, pairs), n) if k not in pairs]
            at = next((k for k in before if _is_alone(other, other.ops[k], known)), n)
            return _nowhere(one, other, at, differs) if at not in pairs else f"{describe(other.program, other.ops[at])}: another output of the reference is this"
    return None


def _unpaired(run: _Run, n: int, pairs: Mapping[int, int]) -> list[int]:
    """The ops without counterpart that an op reads, or that those read, in order."""
    maker = {t: k for k, op in enumerate(run.ops) for t in op.outputs}
    found, left = set[int](), [n]
    while left:
        for t in run.ops[left.pop()].inputs:
            if (k := maker.get(t)) is not None and k not in pairs and k not in found:
                found.add(k)
                left.append(k)
    return sorted(found)


def _telling(run: _Run, op: Op) -> list[np.ndarray]:
    """Results of an op that are known by their numbers: floats, enough of them, not all the same."""
    return [a for t in op.outputs if floating(str((a := _jax.to_numpy(run.results[t])).dtype)) and a.size >= FEWEST and (a != a.ravel()[0]).any()]


def _among(array: np.ndarray, known: Sequence[np.ndarray]) -> bool:
    """Whether a value is one of those known, or a block of one."""
    alike = (other for other in known if np.iscomplexobj(other) == np.iscomplexobj(array))
    return any(compare("it", part.astype(array.dtype), array.reshape(part.shape)).equal for other in alike for part in _blocks(other, array))


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
