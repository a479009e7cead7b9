"""Where the order of a mesh's sums tips a choice at a near tie, a cut is right all the same; and no fault hides behind that."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mutants import CHANGES, RUNS, changed, patched, places, scaled, stale, with_stage

import partition as pt
from partition import dispatch, execution, reporting, ties
from partition.errors import EquivalenceError

WIDTH = 64


def scores(x: Any, head: Any) -> Any:
    return jnp.concatenate([x, x], -1) @ head


def flat(head: Any, table: Any, x: Any) -> Any:
    return jnp.tanh(table[jnp.argmax(scores(x, head), -1)] + x)


def layers(head: Any, table: Any, x: Any) -> Any:
    """A router in each layer of a scan, behind a call."""
    choose = jax.jit(lambda h: jnp.argmax(scores(h, head), -1))
    return jax.lax.scan(lambda h, w: (jnp.tanh(h * 0.5 + table[choose(h)] * w), h.sum()), x, jnp.linspace(0.5, 1, 3))


def steps(head: Any, table: Any, x: Any) -> Any:
    """The same in a loop with a condition and a branch."""
    def body(s: Any) -> Any:
        n, h = s
        h = jnp.tanh(h * 0.5 + table[jnp.argmax(scores(h, head), -1)])
        return n + 1, jax.lax.cond(n < 5, lambda h: h * 1.5, lambda h: h * 2, h)

    return jax.lax.while_loop(lambda s: s[0] < 3, body, (0, x))[1]


MODELS = {"flat": flat, "layers": layers, "steps": steps}


def args(seed: int = 0) -> tuple[np.ndarray, ...]:
    """A head whose two scores are sums of the same terms in another order: which is larger is up to roundings."""
    rng = np.random.default_rng(seed)
    column = rng.normal(size=WIDTH).astype(np.float32)
    head = np.stack([column, np.roll(column, WIDTH // 2)], -1)
    return head, rng.normal(size=(2, WIDTH // 2)).astype(np.float32), rng.normal(size=(16, WIDTH // 2)).astype(np.float32)


@functools.cache
def stages(name: str) -> Any:
    """The model cut so that its sums are on a mesh of two host devices and its last op on another mesh."""
    program = pt.trace(MODELS[name], *args())
    problem = pt.pose(pt.tag(program, loop="none"), pt.cluster("trn2_efa_4cs3"), sharding="tensor", level="op")
    last = len(problem) - 1 if name == "flat" else len(problem)
    return pt.cut(program, problem.placement([0 if n < last else 1 for n in range(len(problem))]))


@functools.cache
def compiled(made: Any) -> Any:
    """Stages compiled once, for the checks of runs that are faulty or not."""
    return pt.prepare(made)


@pytest.mark.parametrize("name", MODELS)
def test_a_choice_that_the_order_of_sums_tips_is_no_fault_and_is_named(name: str) -> None:
    verdict = pt.check(stages(name), *args())
    assert verdict.equal and verdict.tie and not verdict.bitwise and verdict.culprit is None
    assert verdict.word == "up to a choice at a near tie" and str(verdict).startswith(f"EQUAL {verdict.word}")
    assert "bit for bit on one host device" in verdict.cut or "within bounds on one host device" in verdict.cut
    assert "tips a choice" in verdict.sharding and "argmax at" in verdict.sharding.replace("(argmax) in the top scope", "argmax") and "test_ties.py" in verdict.sharding
    assert not all(d.equal for d in verdict.outputs)  # they say what they are
    assert 'failures="0"' in reporting.junit("tie", verdict)


def test_a_tolerance_of_the_users_own_is_held() -> None:
    with pytest.raises(EquivalenceError):
        pt.check(stages("flat"), *args(), tolerance=1e-3)


def with_form(change: Callable[[Any], Any]) -> contextlib.AbstractContextManager[None]:
    """Stages are compiled from other equations than theirs, as a rewriting for several devices would do that is wrong."""
    good = execution.Runner.form

    def form(self: Any, jaxpr: Any, mesh: int) -> Any:
        if self.meshes[mesh].size < 2:
            return good(self, jaxpr, mesh)
        way = next(places(jaxpr, change), None)
        return good(self, jaxpr if way is None else changed(jaxpr, change, way)[0], mesh)

    return patched(execution.Runner, "form", form)


@contextlib.contextmanager
def tampered(by: Callable[[Any], Any], first: bool = False) -> Iterator[None]:
    """What sharded stages make is changed behind them; first: what the first stage makes, sharded or not."""
    good = execution.Runner._build

    def build(self: Any, stage: Any, inner: Any, ins: Any, outs: Any) -> Any:
        compiled = good(self, stage, inner, ins, outs)
        if stage.id != 0 if first else self.meshes[stage.mesh].size < 2:
            return compiled
        return lambda *arrays: [jax.device_put(by(a), a.sharding) if jnp.issubdtype(a.dtype, jnp.floating) else a for a in compiled(*arrays)]

    with patched(execution.Runner, "_build", build):
        yield


FAULTS = {
    **{f"equations: {name}": functools.partial(with_form, change) for name, change in CHANGES.items()},
    "its result doubled": functools.partial(tampered, lambda a: a * 2), "one row of it lost": functools.partial(tampered, lambda a: a.at[..., -1].set(0)),
    "its rows exchanged": functools.partial(tampered, lambda a: jnp.roll(a, 1, 0)),
}  # fmt: skip


@pytest.mark.parametrize("name", ["flat", "layers", pytest.param("steps", marks=pytest.mark.slow)])
@pytest.mark.parametrize("fault", FAULTS)
def test_no_fault_of_a_sharded_stage_hides_behind_a_tie(name: str, fault: str) -> None:
    change = CHANGES.get(fault.removeprefix("equations: "))
    if change is not None and not any(next(places(s.jaxpr, change), None) for s in stages(name).all if s.mesh == 0):
        pytest.skip("no equation that this changes")
    with FAULTS[fault](), pytest.raises(EquivalenceError) as error:
        print(pt.check(stages(name), *args()))
    assert error.value.verdict is not None


@pytest.mark.parametrize("fault", sorted(RUNS))
def test_no_fault_of_a_transfer_hides_behind_a_tie(fault: str) -> None:
    runner = compiled(stages("flat"))
    with RUNS[fault](), pytest.raises(EquivalenceError, match=r"arrives wrong|differ"):
        pt.check(stages("flat"), *args(), runner=runner)


@pytest.mark.parametrize("where", ["of the first run alone", "of the second run alone"])
def test_a_fault_of_one_run_does_not_hide_behind_another(where: str) -> None:
    good, calls = execution._Computer.move, [0]

    def move(self: Any, array: Any, value: Any, src: int, dst: int) -> Any:
        calls[0] += 1
        got = good(self, array, value, src, dst)
        return got * 2 if calls[0] == (1 if where == "of the first run alone" else 3) else got  # the run, then the stages unsharded, then the run again

    with patched(execution._Computer, "move", move), pytest.raises(EquivalenceError):
        print(pt.check(stages("flat"), *args()))
    assert calls[0] >= 3 or where == "of the first run alone"


def quiet(shape: tuple[int, ...], experts: int, dtype: Any, where: Any, by: float) -> tuple[Any, ...]:
    """A router's weights, a row for each expert, and tokens of which some are quiet."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(*shape, WIDTH))
    x[where] *= by
    return (rng.normal(size=(WIDTH, experts)) / 8).astype(dtype), rng.normal(size=(experts, WIDTH)).astype(dtype), x.astype(dtype)


QUIET = {
    "rows": ((64,), 8, jnp.bfloat16, np.s_[60:], 2e-3), "rows of few": ((64,), 4, jnp.bfloat16, np.s_[60:], 2e-3),
    "a row of rows": ((16, 16), 32, jnp.bfloat16, np.s_[3, 5], 2e-3), "a row of rows in float32": ((16, 16), 32, np.float32, np.s_[3, 5], 5e-6),
}  # fmt: skip


@pytest.mark.parametrize("mesh", [0, 1], ids=["sharded", "whole"])
@pytest.mark.parametrize("name", QUIET)
def test_rows_that_are_destroyed_beside_loud_ones_are_no_tie(name: str, mesh: int) -> None:
    given, at = quiet(*QUIET[name]), QUIET[name][3]
    program = pt.trace(lambda head, table, x: jnp.tanh(table[jnp.argmax(x @ head, -1)] + x), *given)
    problem = pt.pose(pt.tag(program, loop="none"), pt.cluster("trn2_efa_4cs3"), sharding="tensor", level="op")
    made = pt.cut(program, problem.placement([mesh] + [mesh + 1] * (len(problem) - 1)))
    assert pt.check(made, *given).equal
    for fault in (lambda a: a.at[at].set(0), lambda a: a.at[at].set(jnp.roll(a[at], 1, -1))):
        with tampered(fault, first=mesh > 0), pytest.raises(EquivalenceError, match=f"stage 0 on {made.problem.meshes[mesh]}"):
            print(pt.check(made, *given))


def test_tokens_of_another_type_with_the_same_bits_are_no_tie() -> None:
    good = dispatch.Walk.finish

    def finish(self: Any, *args: Any, **options: Any) -> None:
        good(self, *args, **options)
        for value, held in self.env.items():
            held.update({m: a.view(jnp.float32) for m, a in held.items() if value[0] in self.stages.program.graph.outputs and a is not None and a.dtype == jnp.int32 and a.ndim == 2})

    runner = compiled(cut_loop((1, 2)))
    for seed in range(3):
        with patched(dispatch.Walk, "finish", finish), pytest.raises(EquivalenceError):
            print(pt.check(cut_loop((1, 2)), *args(seed), runner=runner))


def replicated(w: Any, x: Any) -> Any:
    """What both phases need of weights alone is computed on a mesh of each, with its own roundings."""
    table = jnp.tanh(w["table"] @ w["up"]) @ w["down"]
    h = jnp.tanh(x * 0.5 + table[jnp.argmax(scores(x, w["head"]), -1)])
    last, tokens = jax.lax.scan(lambda h, _: (jnp.tanh(h * 0.5 + table[(t := jnp.argmax(scores(h, w["head"]), -1))]), t), h, None, length=4)
    return last, tokens, h


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2))])
def test_what_two_meshes_compute_each_for_itself_is_no_fault(seed: int) -> None:
    (head, table, x), rng = args(seed), np.random.default_rng(seed)
    given = {"head": head, "table": table, "up": rng.normal(size=(WIDTH // 2, 128)).astype(np.float32) / 8, "down": rng.normal(size=(128, WIDTH // 2)).astype(np.float32) / 8}, x
    program = pt.trace(replicated, *given)
    loop = next(op.id for op in program.graph.ops if op.loop is not None)
    problem = pt.pose(pt.tag(program, loop=loop), pt.cluster("trn2_efa_4cs3"), sharding="tensor", level="op")
    for _ in range(2):
        made = pt.cut(program, problem.placement([int(rng.integers(0, 2)) if b.region == "top" else 1 for b in problem.blocks]))
        assert pt.check(made, *given).equal


def condition(head: Any, table: Any, x: Any) -> Any:
    def goes_on(s: Any) -> Any:
        return (scores(s[0], head)[0, 0] >= scores(s[0], head)[0, 1]) & (s[1] < 9.0)

    return jnp.tanh(jax.lax.while_loop(goes_on, lambda s: (jnp.tanh(s[0] * 1.05 + 0.1), s[1] + 1.0), (x, 0.0))[0])


def of_floats(how: Callable[[Any], Any]) -> Callable[..., Any]:
    return lambda head, table, x: jnp.tanh(x * how(scores(x, head)))


FORMS = {
    "a condition": (condition, 5), "a sign": (of_floats(lambda s: jnp.sign(s[:, :1] - s[:, 1:])), None),
    "a floor": (of_floats(lambda s: jnp.floor(s[:, :1] - s[:, 1:])), None), "a comparison": (of_floats(lambda s: jnp.where(s[:, :1] > s[:, 1:], 1.0, -1.0)), None),
    "a sort": (of_floats(lambda s: jax.lax.sort((s, jnp.broadcast_to(jnp.arange(2.0) * 3 - 1, s.shape)), num_keys=1)[1][:, :1]), None),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_choices_of_every_form_are_known(form: str) -> None:
    fn, trips = FORMS[form]
    program = pt.trace(fn, *args())
    problem = pt.pose(pt.tag(program, loop="none"), pt.cluster("trn2_efa_4cs3"), sharding="tensor", level="op", trips=trips)
    verdict = pt.check(pt.cut(program, problem.placement([0] * len(problem))), *args())
    assert verdict.tie and verdict.equal and "tips a choice" in verdict.sharding


def test_a_choice_in_a_range_of_a_scan_is_known() -> None:
    rng, dtype = np.random.default_rng(0), np.float32
    router = rng.normal(size=(6, WIDTH, 4)).astype(dtype)
    router[..., 2:] = router[..., :2] * (1 + np.finfo(dtype).eps * rng.choice([-1, 0, 0, 0, 1], (6, WIDTH, 2)).astype(dtype))  # experts that are twins but for roundings
    weights = {"up": rng.normal(size=(6, WIDTH, 128)).astype(dtype) / 8, "down": rng.normal(size=(6, 128, WIDTH)).astype(dtype) / 11, "router": router, "experts": rng.normal(size=(6, 4, WIDTH)).astype(dtype)}
    x = rng.normal(size=(16, WIDTH)).astype(dtype)

    def layer(h: Any, w: Any) -> Any:
        h = h + jnp.tanh(h @ w["up"]) @ w["down"]
        return jnp.tanh(h + w["experts"][jnp.argmax(h @ w["router"], -1)]), None

    program = pt.trace(lambda w, x: jax.lax.scan(layer, x, w)[0] * 2, weights, x)
    problem = pt.pose(pt.tag(program, loop="none"), pt.cluster("trn2_efa_4cs3"), sharding="tensor")
    verdict = pt.check(pt.cut(program, problem.placement([0, 0, 0, 1, 1, 1, 1])), weights, x)
    assert verdict.equal and verdict.tie and "argmax" in verdict.sharding


def stopping(head: Any, table: Any, x: Any) -> Any:
    """Tokens until a condition at near ties ends it, three at least."""
    def goes_on(c: Any) -> Any:
        s = scores(c[1], head)
        return (c[0] < 3) | (c[0] < 6) & ((s[:, 0] >= s[:, 1]).sum() % 2 == 0)

    def body(c: Any) -> Any:
        n, h, t = c
        token = jnp.argmax(h @ table.T, -1)
        return n + 1, jnp.tanh(h * 1.05 + table[token] * 0.1), t.at[:, n].set(token)

    n, h, t = jax.lax.while_loop(goes_on, body, (0, x, jnp.zeros((16, 6), jnp.int32)))
    return t, h * 2, n


@functools.cache
def cut_loop(meshes: tuple[int, int]) -> Any:
    """Its token loop cut over two meshes: its parts, compiled each for itself, give other bits than the loop does as one."""
    program = pt.trace(stopping, *args())
    loop = next(op.id for op in program.graph.ops if op.primitive == "while")
    problem = pt.pose(pt.tag(program, loop=loop), pt.cluster("trn2_efa_4cs3"), sharding="tensor", level="op", trips=6)
    return pt.cut(program, problem.placement([meshes[2 * n >= len(problem)] for n in range(len(problem))]))


@pytest.mark.parametrize("meshes", [(1, 2), (0, 1)], ids=["none sharded", "one sharded"])
def test_a_choice_that_the_cut_itself_tips_is_no_fault(meshes: tuple[int, int]) -> None:
    stages, tipped = cut_loop(meshes), 0
    runner = compiled(stages)
    for seed in range(8):
        verdict = pt.check(stages, *args(seed), runner=runner)
        assert verdict.equal and verdict.tie == (not all(d.equal for d in verdict.outputs))
        if verdict.tie and verdict.cut.startswith("yes, op by op bit for bit"):
            tipped += 1
            assert "(ge)" in verdict.cut and "test_ties.py" in verdict.cut and "tips a choice" in verdict.cut
            assert verdict.sharding == ("not told: the cut's own roundings tip a choice" if 0 in meshes else "no mesh is sharded: one host device stands for each")
    assert tipped


@pytest.mark.parametrize("fault", [*sorted(RUNS), "stale"])
@pytest.mark.parametrize("seed", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in (0, 2))])
def test_no_fault_hides_behind_a_choice_that_the_cut_tips(fault: str, seed: int) -> None:
    runner = compiled(cut_loop((1, 2)))
    with stale(2) if fault == "stale" else RUNS[fault](), pytest.raises(EquivalenceError):
        print(pt.check(cut_loop((1, 2)), *args(seed), runner=runner))


def test_parts_that_are_not_the_programs_differ_op_by_op() -> None:
    good = cut_loop((1, 2))
    runner = compiled(good)
    for seed in range(3):
        whole = ties.op_by_op(runner, runner.load(*args(seed)))
        assert whole is not None and [a.shape for a in whole] == [(16, 6), (16, WIDTH // 2), ()]
    with stale(2):
        assert ties.op_by_op(runner, runner.load(*args(3))) is None
    wrong = with_stage(good, *next((s.id, changed(s.jaxpr, scaled, way)[0]) for s in good.all for way in places(s.jaxpr, scaled)))
    runner = pt.prepare(wrong)
    assert ties.op_by_op(runner, runner.load(*args(2))) is None
