"""The search for what diverges: inside a compiled loop, inside a layer scan in it, and in late trips."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import partition as pt
from models import llama
from partition import divergence, execution
from partition.errors import EquivalenceError
from partition.stages import LoopPlan, Stages

W = np.linspace(-1, 1, 64, dtype=np.float32).reshape(8, 8)
TOKENS = np.array([1, 2], np.int32)


def request(op: Any = jnp.sin, late: int = -1, layers: bool = False, loop: str = "scan") -> Any:
    """A greedy request; `op` works in its decode body, in a scan of layers there, or from step `late` on."""

    def layer(h: Any, w: Any) -> Any:
        h = h @ w
        with jax.named_scope("suspect"):
            return op(h), None

    def fn(w: Any, tokens: Any) -> Any:
        def step(carry: Any, i: Any) -> Any:
            token, h, n = carry
            h = h + w[token]
            if layers:
                h = jax.lax.scan(layer, h, jnp.stack([w, w]))[0]
            elif late >= 0:
                h = jnp.where(n >= late, op(h), h)
            else:
                h = layer(h, w)[0]
            token = jnp.argmax(h @ w, -1).astype(jnp.int32)
            return (token, h, n + 1), h

        start = (tokens, jnp.tanh(w[tokens] @ w), jnp.int32(0))
        if loop == "while":
            return jax.lax.while_loop(lambda c: c[2] < 5, lambda c: step(c, None)[0], start)[1]
        return jax.lax.scan(step, start, jnp.arange(5))[1]

    return fn


def planted(policy: Any, **form: Any) -> str:
    """Where a check says that a program diverges whose stages compute cos where they should compute sin."""
    right, wrong = (pt.trace(request(op, **form), W, TOKENS) for op in (jnp.sin, jnp.cos))
    made = [pt.plan(p, cluster="trn2_efa_4cs3", policy=policy).stages for p in (right, wrong)]
    swap = {a.id: dataclasses.replace(a, jaxpr=b.jaxpr) for a, b in zip(made[0].all, made[1].all, strict=True)}

    def changed(step: Any) -> Any:
        if hasattr(step, "body"):
            return dataclasses.replace(step, body=tuple(swap[s.id] for s in step.body))
        return swap[step.id]

    with pytest.raises(EquivalenceError) as error, pytest.MonkeyPatch.context() as patch:
        patch.setattr(divergence, "misread", lambda stages: None)  # the numbers alone must tell
        pt.check(dataclasses.replace(made[0], steps=tuple(map(changed, made[0].steps))), W, TOKENS)
    return error.value.where


@pytest.mark.parametrize("form", [{}, {"layers": True}, {"loop": "while"}, {"late": 3}], ids=str)
def test_the_op_inside_a_compiled_loop_is_named(form: dict[str, Any]) -> None:
    where = planted("phase_split", **form)
    assert "inside it sin at" in where and "test_divergence.py" in where


def cut_body(problem: pt.Problem) -> pt.Placement:
    inside = [n for n, r in enumerate(problem.region) if r == "body"]
    return problem.placement([0 if r == "top" else 1 + (n > inside[len(inside) // 2]) for n, r in enumerate(problem.region)])


def test_a_late_trip_of_a_cut_loop_is_searched_too() -> None:
    fn = request(jnp.sin, late=3)
    program = pt.trace(fn, W, TOKENS)
    problem = pt.pose(pt.tag(program), pt.cluster("trn2_efa_4cs3"), level="op", sharding="tensor")
    stages = pt.cut(program, cut_body(problem))
    verdict = pt.check(stages, W, TOKENS)
    assert verdict.equal and any("first 2 of 5 trips and the last" in n for n in verdict.not_shown)
    other = pt.trace(request(jnp.cos, late=3), W, TOKENS)
    theirs = pt.cut(other, cut_body(pt.pose(pt.tag(other), pt.cluster("trn2_efa_4cs3"), level="op", sharding="tensor")))
    swap = {a.id: dataclasses.replace(a, jaxpr=b.jaxpr) for a, b in zip(stages.all, theirs.all, strict=True)}
    steps = tuple(dataclasses.replace(s, body=tuple(swap[x.id] for x in s.body)) if hasattr(s, "body") else s for s in stages.steps)
    broken = dataclasses.replace(stages, steps=steps)
    with pytest.raises(EquivalenceError, match=r"\(sin\).* op is cos"):
        pt.check(broken, W, TOKENS)
    with pytest.raises(EquivalenceError, match=r"\(sin\)") as error, pytest.MonkeyPatch.context() as patch:
        patch.setattr(divergence, "misread", lambda stages: None)
        pt.check(broken, W, TOKENS)
    assert "trip 3" in error.value.where


def test_a_fault_in_the_planners_own_reading_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    from partition import _jax

    good = _jax._Reader.literal
    monkeypatch.setattr(_jax._Reader, "literal", lambda self, atom: next(iter(self._literals.values())) if self._literals else good(self, atom))
    program = pt.trace(lambda w, x: (x * 2 + 3) @ w, W, np.ones((2, 8), np.float32))
    stages = pt.plan(program, cluster="trn2_only", policy="single").stages
    with pytest.raises(EquivalenceError):
        pt.check(stages, W, np.ones((2, 8), np.float32))


def test_a_source_line_is_the_callers_where_a_library_has_none() -> None:
    program = pt.trace(lambda w, x: jax.nn.silu(x @ w), W, np.ones((2, 8), np.float32))
    assert all("test_divergence.py" in program.source(op) for op in program.graph.ops)


def test_a_fault_within_bounds_that_grows_is_traced_to_the_stage_that_made_it() -> None:
    """The largest score of each row is off by a hundred-thousandth: within bounds there, beyond them behind the exponential of a difference."""
    w = np.random.default_rng(1).standard_normal((32, 32)).astype(np.float32)

    def fn(w, x):  # type: ignore[no-untyped-def]
        scores = (x @ w) * 4
        return jnp.exp(scores - scores.max(axis=-1, keepdims=True)) @ w

    x = np.random.default_rng(2).standard_normal((4, 32)).astype(np.float32)
    program = pt.trace(fn, w, x)
    problem = pt.pose(pt.tag(program), pt.cluster("trn2_efa_4cs3"), level="op", sharding="tensor")
    stages = pt.cut(program, problem.placement([min(4, n) for n in range(len(problem))]))
    runner = pt.prepare(stages)
    first = next(s for s in stages.all if any(op.primitive == "dot_general" for op, _ in s.items))
    good = runner.compiled[first.id]

    def off(*arrays):  # type: ignore[no-untyped-def]
        return [jnp.where(a == a.max(axis=-1, keepdims=True), a * (1 + 9e-6), a) for a in good(*arrays)]

    runner.compiled[first.id] = off
    with pytest.raises(EquivalenceError) as error:
        pt.check(stages, w, x, runner=runner)
    assert error.value.where.startswith(f"stage {first.id} on "), error.value.where


def steps_with(stages: Stages, what: str) -> Stages:
    """Stages whose steps are not those of their placement."""
    at = next(i for i, s in enumerate(stages.steps) if isinstance(s, LoopPlan))
    loop = stages.steps[at]
    assert isinstance(loop, LoopPlan)
    carry, second = loop.carry, loop.body[1]
    body = {"inputs": {"inputs": second.inputs[::-1]}, "donated": {"donated": tuple(range(len(second.inputs)))}, "mesh": {"mesh": loop.body[0].mesh}}
    changes: dict[str, Any] = {
        "trips": {"trips": loop.trips + 1}, "carry": {"carry": tuple((t, init, init if i == 2 else new) for i, (t, init, new) in enumerate(carry))},
        "xs": {"carry": tuple((t, carry[5 - i][1] if i in (2, 3) else init, new) for i, (t, init, new) in enumerate(carry))}, "results": {"results": loop.results[:-1]},
        "order": {"body": loop.body[::-1]}, "last": {"body": loop.body[:-1]},
    }  # fmt: skip
    new = dataclasses.replace(loop, **changes[what]) if what in changes else dataclasses.replace(loop, body=(loop.body[0], dataclasses.replace(second, **body[what]), *loop.body[2:]))
    return dataclasses.replace(stages, steps=(*stages.steps[:at], new, *stages.steps[at + 1 :]))


@pytest.mark.parametrize("what", ["trips", "carry", "xs", "results", "order", "last", "inputs", "donated", "mesh"])
def test_steps_that_are_not_the_placements_are_named_before_they_run(what: str) -> None:
    """A carry that is stale, one trip more, a buffer that is given away: some would give other tokens, some would end the process."""
    fn, args = llama.generation("tiny", batch=1, prompt=12, new_tokens=6, seed=0)
    program = pt.trace(fn, *args)
    stages = pt.cut(program, pt.place(pt.pose(pt.tag(program), "trn2_efa_4cs3", sharding="tensor"), "equal_split"))
    with pytest.raises(EquivalenceError, match="not those of the placement") as error:
        pt.check(steps_with(stages, what), *args)
    assert ({"xs": "carry", "order": "mesh", "last": "steps"}.get(what, what) in error.value.where and "token loop" in error.value.where) or "stage" in error.value.where or what == "last"
    assert "NOT EQUAL" in str(error.value.verdict)


def toy(loop: str, trips: int | None = None) -> tuple[Any, tuple[Any, ...]]:
    """(the stages of a loop that writes five tokens from a small table, alternating between two meshes, its arguments)."""
    table = np.random.default_rng(0).standard_normal((16, 16)).astype(np.float32)

    def fn(w: Any, x: Any) -> Any:
        def step(state: Any) -> Any:
            i, h, token = state
            h = jnp.tanh(h @ w["w"]) + w["w"][token]
            return i + 1, h, jnp.argmax(h).astype(jnp.int32)

        if loop == "while":
            return jax.lax.while_loop(lambda s: s[0] < 5, step, (0, x, 0))[2]
        return jax.lax.scan(lambda s, _: (step(s), None), (0, x, 0), None, length=5)[0][2]

    args = {"w": table}, table[0]
    program = pt.trace(fn, *args)
    phases = pt.tag(program, loop=next(op.id for op in program.graph.ops if op.loop is not None))
    problem = pt.pose(phases, pt.cluster("trn2_efa_cs3"), level="op", trips=trips)
    return pt.cut(program, problem.placement(np.arange(len(problem)) % 2)), args


@pytest.mark.parametrize("loop", ["scan", "while"])
def test_the_last_trip_is_compared_wherever_the_loop_ends(loop: str) -> None:
    """Planned for eleven trips, a while loop makes five: a fault of the fifth alone, which moves no token, is seen."""
    stages, args = toy(loop, 11 if loop == "while" else None)
    runner = pt.prepare(stages)
    verdict = pt.check(stages, *args, runner=runner)
    assert verdict.equal and any("the first 2 of 5 trips and the last" in n for n in verdict.not_shown), verdict
    good = execution._Computer.compute

    def compute(self: Any, stage: Any, arrays: Any, trip: int) -> Any:
        return [jax.device_put(a * 1.001, a.sharding) if trip == 4 and jnp.issubdtype(a.dtype, jnp.floating) else a for a in good(self, stage, arrays, trip)]

    with pytest.MonkeyPatch.context() as patch, pytest.raises(EquivalenceError, match="trip 4"):
        patch.setattr(execution._Computer, "compute", compute)
        pt.check(stages, *args, runner=runner)


@pytest.mark.parametrize("fault", ["in bfloat16", "transposed", "another's"])
def test_a_weight_that_arrives_wrong_is_named(fault: str) -> None:
    stages, args = toy("scan")
    good = execution._Computer.given
    how = {"in bfloat16": lambda a: a.astype(jnp.bfloat16).astype(a.dtype), "transposed": lambda a: a.T, "another's": lambda a: jnp.roll(a, 1, 0)}[fault]

    def given(self: Any, value: Any, mesh: int) -> Any:
        array = good(self, value, mesh)
        return jax.device_put(how(array), array.sharding) if array.ndim == 2 and mesh == 1 else array

    with pytest.MonkeyPatch.context() as patch, pytest.raises(EquivalenceError, match="param w arrives wrong on cs3"):
        patch.setattr(execution._Computer, "given", given)
        pt.check(stages, *args)
