"""What a run brings its stages is what the program says, whatever the program; and a walk that brings another value, or makes other trips, is told from one that does not."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_random
from mutants import patched, stale

import partition as pt
from partition import dispatch, execution, ties
from partition.references import References
from partition.wiring import Wiring

Context = Callable[[], contextlib.AbstractContextManager[None]]


def held(runner: Any, args: Any) -> str | None:
    """Empty where every link of a run holds, and no choice was tipped; None where one does not."""
    loaded = runner.load(*args)
    result, record = runner.run(loaded, keep=2)
    return ties.tipped(runner, loaded, References(runner, loaded, runner.stages.problem.workload.trips), result, record)[0]


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 3, 5))])
def test_every_link_of_a_random_program_holds(seed: int) -> None:
    stages, args, _ = test_random.drawn(seed)
    runner = pt.prepare(stages)
    assert held(runner, args) is not None
    assert ties.op_by_op(runner, runner.load(*args)) is not None


def scanned(w: Any, x: Any) -> Any:
    """A scan from the last row to the first, whose carries change places, with stacked results."""
    def body(c: Any, row: Any) -> Any:
        a, b, n = c
        h = jnp.tanh(a @ w) + row
        return (jnp.sin(b), h, n + 1), (h.sum(-1), n)

    (a, b, n), (sums, numbers) = jax.lax.scan(body, (x[0], x[1], 0), x, reverse=True)
    return jnp.cos(a) + b, sums * 2, numbers, n


def stopped(w: Any, x: Any) -> Any:
    """A loop that its condition ends."""
    n, h = jax.lax.while_loop(lambda c: (c[0] < 7) & (jnp.abs(c[1]).max() > 0.1), lambda c: (c[0] + 1, jnp.tanh(jnp.sin(c[1]) @ w)), (0, x[0]))
    return jnp.cos(h), n


MODELS = {"scan": scanned, "while": stopped}
ARGS = np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32) / 4, np.random.default_rng(1).normal(size=(5, 8)).astype(np.float32)


@functools.cache
def stages(name: str) -> Any:
    program = pt.trace(MODELS[name], *ARGS)
    loop = next(op.id for op in program.graph.ops if op.loop is not None)
    problem = pt.pose(pt.tag(program, loop=loop), pt.cluster("trn2_efa_4cs3"), level="op", trips=5)
    return pt.cut(program, problem.placement([1 + n % 2 for n in range(len(problem))]))


def changed(name: str, how: Callable[..., Any]) -> Context:
    """A walk one of whose methods does something else: how(the good one, self, *args)."""
    good = getattr(dispatch.Walk, name)
    return lambda: patched(dispatch.Walk, name, lambda self, *args, **options: how(good, self, *args, **options))


def later(good: Any, self: Any, plan: Any, trip: int) -> bool:
    """The condition is asked, but one more trip is made."""
    return bool(good(self, plan, trip)) or self.__dict__.setdefault("more", trip) == trip


def swapped(good: Any, self: Any, needed: Any, carry: Any, inside: Any) -> None:
    """Two carries of one shape exchanged."""
    good(self, needed, carry, inside)
    alike = [(v, m) for v, m in needed if self.tensors[v[0]].shape == (8,)]
    if len(alike) > 1:
        (a, m), (b, _) = alike[0], next(x for x in alike if x[0] != alike[0][0])
        one, other = self.env[a][m], self.fetch(b, m)
        self.put(a, m, other)
        self.put(b, m, one)


OF_BOTH: dict[str, Context] = {"a carry left": lambda: stale(1)}
OF_SCANS: dict[str, Context] = {
    "carries exchanged": changed("rebind", swapped),
    "results of the trips exchanged": changed("finish", lambda good, self, plan, stacks, *rest, **options: good(self, plan, {t: s[::-1] for t, s in stacks.items()}, *rest, **options)),
    "the rows of another trip": lambda: patched(execution.HostArrays, "row", lambda self, array, index: array[max(index - 1, 0)]),
}  # fmt: skip
OF_CONDITIONS: dict[str, Context] = {
    "a trip too few": changed("goes_on", lambda good, self, plan, trip: trip < 2 and good(self, plan, trip)),
    "a trip too many": changed("goes_on", later),
}  # fmt: skip


@pytest.mark.parametrize(("name", "faults"), [("scan", OF_BOTH | OF_SCANS), ("while", OF_BOTH | OF_CONDITIONS)])
def test_no_fault_of_a_walk_is_held_for_the_program(name: str, faults: dict[str, Context]) -> None:
    runner = pt.prepare(stages(name))
    assert held(runner, ARGS) == ""
    for fault, context in faults.items():
        with context():
            assert held(runner, ARGS) is None, fault


def test_trips_come_one_after_the_other() -> None:
    made = stages("scan")
    phases, row = made.problem.phases, np.zeros((5, 8), np.float32)
    for trips, there in (((0, 1), True), ((1,), False), ((0, 2), False)):
        known = Wiring(made.program, phases.token_loop, 5, lambda value: row)
        inside = phases.token_loop.loop.body
        for trip in trips:
            for t in inside.outputs:
                known.made((t, None), trip, 1, row[0])
        assert (known.read((inside.inputs[-1], None), trips[-1], 1) is not None) == there
