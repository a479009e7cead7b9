"""The cut program is the uncut one, for every policy and form; and a planted fault is found and named."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import POLICIES, posed, tagged

from partition import profiles
from partition.distances import compare, ulps
from partition.equivalence import check
from partition.errors import EquivalenceError, ExecutionError
from partition.execution import Runner, prepare, run, uncut
from partition.phases import tag
from partition.problem import pose
from partition.program import trace
from partition.stages import cut


@pytest.mark.parametrize(("cluster", "policy", "options"), [
    ("trn2_efa_cs3", "phase_split", {"logits": True}),
    pytest.param("trn2_efa_4cs3", "alternating", {"logits": True, "sample": True}, marks=pytest.mark.slow),
    ("trn2_efa_4cs3", "alternating", {"loop": "while", "eos": 5}),
    ("trn2_efa_4cs3", "alternating", {"layers": "scanned", "logits": True}),
    ("trn2_efa_4cs3", "random", {"layers": "scanned", "loop": "while", "sample": True}),
    ("cs3_only", "phase_split", {"dtype": "bfloat16"}),
], ids=str)  # fmt: skip
def test_cut_equals_uncut_and_bytes_are_as_planned(cluster: str, policy: str, options: dict[str, object]) -> None:
    problem, args = posed(cluster, **options)
    placement = POLICIES[policy](problem)
    stages = cut(problem.phases.program, placement)  # type: ignore[union-attr]
    runner = prepare(stages)
    verdict = check(stages, *args, runner=runner)
    assert verdict.equal and verdict.culprit is None and verdict.boundaries
    tokens = np.asarray(jax.tree_util.tree_leaves(uncut(stages.program)(*args))[0])
    out, record = runner.run(runner.load(*args))
    assert np.array_equal(np.asarray(jax.tree_util.tree_leaves(out)[0]), tokens)
    from partition.evaluation import evaluate

    moved: dict[tuple[int, int], int] = {}
    for m in record.moved:
        moved[m.src, m.dst] = moved.get((m.src, m.dst), 0) + m.nbytes
    assert moved == evaluate(problem, placement).link_bytes


def test_layer_cuts_on_equal_devices_are_bit_equal_in_float32_and_bfloat16() -> None:
    from models import llama

    cluster = profiles.cluster("trn2_efa_4cs3")
    cluster = dataclasses.replace(cluster, meshes=tuple(dataclasses.replace(m, stand_in=1) for m in cluster.meshes))
    for dtype in ("float32", "bfloat16"):
        fn, args = llama.generation("tiny", prompt=12, new_tokens=6, seed=0, logits=True, dtype=dtype)
        problem = pose(tag(trace(fn, *args)), cluster, sharding="tensor")
        layer = [next((int(part[7:8]) for part in name.split("/") if part.startswith("layers.")), 2) for name in problem.names]
        mesh = [0 if str(p) == "prefill" else 1 + x for p, x in zip(problem.phase, layer, strict=True)]
        stages = cut(problem.phases.program, problem.placement(mesh))  # type: ignore[union-attr]
        assert check(stages, *args).bitwise, dtype


def small_function(x, w):  # type: ignore[no-untyped-def]
    h = jnp.tanh(x @ w)
    with jax.named_scope("second"):
        y = jnp.sin(h) + 1.0
    return y @ w


def test_a_program_without_a_token_loop_runs_and_a_planted_fault_is_named() -> None:
    w, x = np.eye(8, dtype=np.float32) * 2, np.arange(16, dtype=np.float32).reshape(2, 8) / 16
    program = trace(small_function, x, w, weights=(1,))
    problem = pose(tag(program), profiles.cluster("cs3_only"), level="op")
    stages = cut(program, POLICIES["alternating"](problem))
    assert check(stages, x, w).equal
    victim = next(s for s in stages.all for op, _ in s.items if op.primitive == "sin")
    wrong = next(s for s in stages.all for op, _ in s.items if op.primitive == "tanh")
    mutated = dataclasses.replace(victim, jaxpr=wrong.jaxpr)  # tanh where sin should be
    broken = dataclasses.replace(stages, steps=tuple(mutated if s is victim else s for s in stages.steps))
    with pytest.raises(EquivalenceError, match="second") as error:
        check(broken, x, w)
    assert "(sin)" in error.value.where and "test_equivalence.py" in error.value.where
    assert not error.value.verdict.equal  # type: ignore[attr-defined]


def test_a_stale_value_is_named_as_arriving_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, args = posed("trn2_efa_cs3", logits=True)
    stages = cut(problem.phases.program, POLICIES["phase_split"](problem))  # type: ignore[union-attr]
    from partition import execution

    good = execution._Computer.move

    def stale(self, array, value, src, dst):  # type: ignore[no-untyped-def]
        moved = good(self, array, value, src, dst)
        return moved * 0 if moved.ndim == 4 else moved

    monkeypatch.setattr(execution._Computer, "move", stale)
    with pytest.raises(EquivalenceError, match="arrives wrong"):
        check(stages, *args)


def test_narrow_contractions_over_several_devices_are_summed_wide() -> None:
    from jax.extend import core as jex

    from partition import _jax
    from partition._jax.rewriting import wide_sums

    def fn(x, w):  # type: ignore[no-untyped-def]
        h = jax.jit(lambda a: a @ w)(x)
        h = jax.lax.scan(lambda c, _: (jnp.tanh(c @ w), None), h, None, length=3)[0]
        return jax.lax.cond(h.sum() > 0, lambda a: a @ w, lambda a: a * 2, h), (h.astype(jnp.float32) @ w.astype(jnp.float32))

    args = [(np.linspace(-1, 1, 64).reshape(8, 8) * s).astype(jnp.bfloat16) for s in (1, -0.5)]
    jaxpr = jax.make_jaxpr(fn)(*args)
    wide = wide_sums(jaxpr)
    _jax.check(wide)
    assert str(wide).count("preferred_element_type=float32") == 4 and "preferred_element_type=bfloat16" not in str(wide)
    assert str(wide).count("new_dtype=float32") >= 6  # XLA's form for CPU does not have every contraction of bfloat16 into float32
    for a, b in zip(jex.jaxpr_as_fun(jaxpr)(*args), jex.jaxpr_as_fun(wide)(*args), strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=2e-2, atol=2e-2)


def test_a_scatter_in_a_branch_of_a_branch_runs_sharded() -> None:
    def fn(rows, x, w):  # type: ignore[no-untyped-def]
        def put(h):  # type: ignore[no-untyped-def]
            numbers = jax.lax.ScatterDimensionNumbers((1,), (0,), (0,))
            return jax.lax.scatter(h, rows, h[:2] * 0.5 + 1, numbers, mode="drop")

        once = jax.lax.cond(x.sum() > 0, lambda h: jax.lax.cond(jnp.argmax(h[0]) % 2 > 0, put, lambda h: h * 2, h), lambda h: h * 3, x)
        return once @ w

    args = (np.array([[1], [3]], np.int32), np.linspace(-1, 2, 32, dtype=np.float32).reshape(4, 8), np.ones((8, 8), np.float32))
    problem = pose(tag(trace(fn, *args)), "trn2_efa_4cs3", sharding="tensor")
    assert problem.phases is not None
    assert check(cut(problem.phases.program, problem.placement([0] * len(problem))), *args).equal


@pytest.mark.slow
def test_a_model_of_narrow_experts_runs_sharded() -> None:
    from models import deepseek

    fn, args = deepseek.generation("tiny", seed=0, batch=2, prompt=10, new_tokens=5, dtype="bfloat16")
    problem = pose(tag(trace(fn, *args)), "trn2_efa_4cs3", sharding="tensor")
    assert problem.phases is not None
    assert check(cut(problem.phases.program, POLICIES["phase_split"](problem)), *args).equal


def test_a_loop_that_stops_early_is_said_to() -> None:
    problem, args = posed("trn2_efa_4cs3", loop="while", eos=5)
    tokens = np.asarray(uncut(problem.phases.program)(*args))  # type: ignore[union-attr]
    problem, args = posed("trn2_efa_4cs3", loop="while", eos=int(tokens[0, 1]))
    stages = cut(problem.phases.program, POLICIES["alternating"](problem))  # type: ignore[union-attr]
    verdict = check(stages, *args)
    assert verdict.trips == 1 < verdict.planned_trips and verdict.moved_bytes < verdict.planned_bytes
    assert f"ended by itself after 1 of {verdict.planned_trips} trips" in str(verdict)


def test_comparison_sees_nan_infinity_shape_and_one_ulp() -> None:
    a = np.array([1.0, np.nan, np.inf, 0.0], np.float32)
    assert compare("x", a, a.copy()).bitwise
    for bad in ([1.0, 1.0, np.inf, 0.0], [1.0, np.nan, -np.inf, 0.0], [1.0, np.nan, np.nan, 0.0]):
        d = compare("x", a, np.array(bad, np.float32))
        assert not d.equal and d.invalid == 1
    assert not compare("x", np.full((32, 256), 1.0, np.float32), np.full((32, 256), np.nan, np.float32)).equal
    up = np.nextafter(np.float32(1), np.float32(2))
    d = compare("x", np.array([1.0], np.float32), np.array([up]))
    assert d.max_ulp == 1 and d.equal and not d.bitwise
    assert ulps(np.array([-0.0], np.float32), np.array([0.0], np.float32)).tolist() == [0]
    assert ulps(np.array([1.0], jnp.bfloat16), np.array([1.0078125], jnp.bfloat16)).tolist() == [1]
    assert not compare("x", a, a.astype(np.float64)).equal
    assert not compare("x", np.array([1, 2]), np.array([1, 3])).equal


def test_arguments_that_do_not_match_are_refused() -> None:
    problem, args = posed()
    stages = cut(problem.phases.program, POLICIES["single"](problem))  # type: ignore[union-attr]
    with pytest.raises(ExecutionError, match="structure"):
        run(stages, args[0])
    with pytest.raises(ExecutionError, match="the trace has int32"):
        run(stages, args[0], np.zeros((1, 99), np.int32))
    _phases, shapes = tagged(seed=None)
    with pytest.raises(ExecutionError, match="without numbers"):
        run(stages, *shapes)


def test_too_few_host_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, _ = posed("trn2_efa_cs3")
    stages = cut(problem.phases.program, POLICIES["phase_split"](problem))  # type: ignore[union-attr]
    only = jax.devices("cpu")[:2]
    monkeypatch.setattr(jax, "devices", lambda *_: only)
    with pytest.raises(ExecutionError, match="need 3 CPU host devices, JAX shows 2") as error:
        Runner(stages)
    assert "host_devices(3)" in error.value.mend


def test_two_callables_of_ones_own() -> None:
    x = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)

    def reference(x: Any) -> Any:
        return {"a": jnp.tanh(x) @ x.T}

    verdict = check(reference, lambda x: {"a": jnp.tanh(x) @ x.T * 1.0}, (x,), oracle=True)
    assert verdict.equal and verdict.outputs[0].oracle is not None and verdict.outputs[0].oracle[0] < 1e-6
    with pytest.raises(EquivalenceError, match=r"op 0 \(sin\) .*test_equivalence.py"):
        check(reference, lambda x: {"a": jnp.sin(x) @ x.T}, (x,))
    with pytest.raises(EquivalenceError, match="other structures"):
        check(reference, lambda x: jnp.tanh(x) @ x.T, (x,))
    with pytest.raises(ExecutionError, match="two callables"):
        check(reference, x)  # type: ignore[arg-type]


def made(fn: Any, *args: Any) -> Any:
    program = trace(fn, *args)
    problem = pose(tag(program), profiles.cluster("cs3_only"), level="op")
    return cut(program, POLICIES["alternating"](problem))


def test_nan_everywhere_shows_nothing() -> None:
    w, x = np.full((4, 4), np.nan, np.float32), np.ones((2, 4), np.float32)
    with pytest.raises(EquivalenceError, match="is NaN, so nothing is shown") as caught:
        check(made(lambda w, x: x @ w, w, x), w, x)
    assert not caught.value.verdict.equal and "NaN" in str(caught.value.verdict)  # type: ignore[attr-defined]


def test_a_model_that_is_not_the_same_twice() -> None:
    count = [0]

    def noise(x: Any) -> Any:
        count[0] += 1
        return np.asarray(x) + np.float32(count[0])

    def fn(w: Any, x: Any) -> Any:
        return jax.pure_callback(noise, jax.ShapeDtypeStruct((2, 4), jnp.float32), jnp.tanh(x @ w))

    w, x = np.eye(4, dtype=np.float32), np.ones((2, 4), np.float32)
    for given in ((made(fn, w, x), w, x), (fn, fn, (w, x))):
        with pytest.raises(EquivalenceError, match=r"(?s)not give the same numbers twice.*pure_callback at .*test_equivalence.py") as error:
            check(*given)
        assert error.value.verdict.cut.startswith("not told: the ") and "pure_callback at" in str(error.value.verdict)


def test_no_tolerance_at_all_is_said_to_be_missed() -> None:
    w, x = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32), np.ones((2, 64), np.float32)
    stages = made(lambda w, x: jnp.tanh(x @ w) @ w, w, x)
    assert check(stages, w, x, tolerance={"float32": 0.0}).bitwise  # a cut that changes no bit meets it
    with pytest.raises(EquivalenceError, match="bound 0 of scale: BEYOND"):
        check(lambda x: x @ w, lambda x: (x.astype(jnp.float32) @ (w * 3)) / 3, (x,), tolerance={"float32": 0.0})


def test_outputs_that_are_infinite_on_both_sides_are_said_to_show_nothing() -> None:
    def far(w: Any, x: Any) -> Any:
        return {"far": jnp.exp(1e3 * (x @ w)), "near": x @ w}

    w, x = np.eye(4, dtype=np.float32), np.ones((2, 4), np.float32)
    for given in ((made(far, w, x), w, x), (far, far, (w, x))):
        verdict = check(*given)
        assert verdict.equal and [n for n in verdict.not_shown if "finite" in n] == ["no number of output ['far'] is finite"]


def test_wrong_arguments_of_a_check() -> None:
    w, x = np.eye(4, dtype=np.float32), np.ones((2, 4), np.float32)
    stages, other = (made(lambda w, x: jnp.tanh(x @ w), w, x) for _ in range(2))
    with pytest.raises(ExecutionError, match="prepared from other stages"):
        check(stages, w, x, runner=prepare(other))
    with pytest.raises(ExecutionError, match="the candidate raised ZeroDivisionError"):
        check(jnp.tanh, lambda x: 1 / 0, (x,))
    assert check(lambda x: x, lambda x: x * 1.01, (x,), tolerance=0.1).equal
    with pytest.raises(ExecutionError, match=r"^-1.0 is no tolerance\n"):
        check(stages, w, x, tolerance=-1)
    with pytest.raises(ExecutionError, match=r"^True is no tolerance of 'float32'\n"):
        check(stages, w, x, tolerance={"float32": True})
    with pytest.raises(ExecutionError, match="-1 trips cannot be compared"):
        check(stages, w, x, trips=-1)
    assert not check(stages, w, x, runner=prepare(stages, strict=False)).options  # as the runner was prepared
    calls = [0]

    def other_each_time(x: Any) -> Any:
        calls[0] += 1
        return x + calls[0]

    with pytest.raises(EquivalenceError, match="the candidate does not give the same numbers twice"):
        check(lambda x: x, other_each_time, (x,))


def test_a_second_check_with_a_runner_compiles_nothing_and_still_finds_a_fault() -> None:
    problem, args = posed("trn2_efa_4cs3", layers="scanned", logits=True)
    stages = cut(problem.phases.program, POLICIES["random"](problem))  # type: ignore[union-attr]
    runner, compiled = prepare(stages), list[str]()

    def heard(event: str, seconds: float, **_: Any) -> None:
        compiled.extend([event] if event.endswith("backend_compile_duration") else [])

    jax.monitoring.register_event_duration_secs_listener(heard)
    check(stages, *args, runner=runner, oracle=True)
    assert compiled  # else it is not heard
    weights = jax.tree_util.tree_map(lambda w: w[..., ::-1], args[0])
    compiled.clear()
    assert check(stages, weights, *args[1:], runner=runner, oracle=True).equal
    assert not compiled
    stage = max((s for s in stages.all if s.outputs), key=lambda s: len(s.items))
    good = runner.compiled[stage.id]
    runner.compiled[stage.id] = lambda *arrays: [a + 1 if "float" in str(a.dtype) else a for a in good(*arrays)]
    with pytest.raises(EquivalenceError):
        check(stages, *args, runner=runner)


@pytest.mark.parametrize("name", ["xor", "and", "custom", "subtract"])
def test_reductions_that_no_collective_computes_run_sharded(name: str) -> None:
    lax = jax.lax
    reduce = {
        "xor": lambda x: lax.reduce(x.astype(jnp.int32), np.int32(0), lax.bitwise_xor, (1,)), "and": lambda x: lax.reduce(x.astype(jnp.int32), np.int32(-1), lax.bitwise_and, (1,)),
        "custom": lambda x: lax.reduce(x, np.float32(0), lambda a, b: a + b + a * b * 1e-3, (1,)), "subtract": lambda x: jnp.zeros((3, 8)).at[jnp.arange(8) % 3].subtract(x),
    }[name]  # fmt: skip
    args = (np.eye(8, dtype=np.float32) + 0.1, np.arange(64, dtype=np.float32).reshape(8, 8) / 10)
    program = trace(lambda w, x: reduce(x @ w), *args)
    problem = pose(tag(program, loop="none"), "trn2_efa_4cs3", sharding="tensor")
    assert check(cut(program, problem.placement([0] * len(problem))), *args).equal


def test_what_a_call_writes_into_its_arguments_is_compared_or_told() -> None:
    from flax import nnx

    class Cached(nnx.Module):
        def __init__(self, scale: float):
            self.scale, self.cache = scale, nnx.Cache(jnp.zeros((2, 4)))

        def __call__(self, x: Any) -> Any:
            y = x + self.cache[...]
            self.cache[...] = self.scale * jnp.tanh(y)
            return y

    x = np.ones((2, 4), np.float32)
    model = Cached(1.0)
    assert check(lambda m, x: m(x), lambda m, x: m(x), (model, x)).bitwise

    def forgets(m: Any, x: Any) -> Any:
        return x + m.cache[...]

    with pytest.raises(EquivalenceError, match=r"written into argument \[0\].cache.*8 of 8 elements differ"):
        check(lambda m, x: m(x), forgets, (model, x))
    assert trace(lambda m, x: (m(x), m), model, x).lost == ()
    stages = made(lambda m, x: m(x), model, x)
    assert stages.program.lost == ("cache",) and any(n.startswith("what the call writes into cache") for n in check(stages, model, x).not_shown)


def test_labels_in_int64_and_complex_numbers_have_an_oracle() -> None:
    """Where float64 is on, a caller's int64 is no int32, and a complex number has parts of 64 bits."""
    w, x, labels = np.eye(4, dtype=np.float32), np.ones((2, 4), np.float32), np.array([1, 3])

    def loss(w: Any, x: Any, labels: Any) -> Any:
        z = jax.lax.complex(x @ w, x) * jnp.exp(1j * jnp.arange(4))
        return -jnp.take_along_axis(jax.nn.log_softmax(z.real), labels[:, None], 1).mean()

    stages = made(loss, w, x, labels)
    verdict = check(stages, w, x, labels, oracle=True)
    assert labels.dtype == np.int64 and verdict.outputs[0].oracle is not None and 0 < verdict.outputs[0].oracle[0] < 1e-6


def test_memory_that_was_given_away_is_told() -> None:
    x = jnp.ones((2, 4))
    stages = made(lambda x: x * 2, x)
    jax.jit(lambda x: x + 1, donate_argnums=0)(x)
    for given in ((stages, x), (jnp.tanh, jnp.tanh, (x,))):
        with pytest.raises(ExecutionError, match=r"argument .* was donated to another call"):
            check(*given)
