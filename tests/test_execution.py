"""Compiled stages: several requests as a pipeline, layers that are alike compiled once, arrays placed once."""

from __future__ import annotations

import itertools
import threading
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import posed

import partition as pt
from partition import artifacts
from partition.dispatch import transfers
from partition.execution import prepare, uncut
from partition.policies import POLICIES
from partition.stages import Stages, cut


def made(cluster: str, policy: str, *, streamed: bool = False, **options: Any) -> tuple[Stages, tuple[Any, ...]]:
    problem, args = posed(cluster, **options)
    assert problem.phases is not None
    return cut(problem.phases.program, POLICIES[policy](problem), streamed=streamed), args


def test_a_stream_of_requests_is_a_pipeline_over_the_meshes() -> None:
    """Each request gets its own numbers, and meshes work on several at once."""
    stages, args = made("trn2_efa_4cs3", "equal_split", prompt=16, new_tokens=12)
    runner = prepare(stages)
    rng = np.random.default_rng(0)
    requests = [(args[0], rng.integers(0, 256, np.shape(args[1]), np.int32), *args[2:]) for _ in range(6)]
    spans: list[tuple[int, int, float, float]] = []

    def spied(mesh: int, call: Any) -> Any:
        def timed(*arrays: Any) -> Any:
            start = time.perf_counter()
            out = jax.block_until_ready(call(*arrays))
            spans.append((threading.get_ident(), mesh, start, time.perf_counter()))
            return out

        return timed

    runner.compiled = {s.id: spied(s.mesh, runner.compiled[s.id]) for s in stages.all}
    found = runner.stream(requests)
    whole = uncut(stages.program)
    for got, request in zip(found, requests, strict=True):
        assert np.array_equal(got, whole(*request))
    assert any(a[0] != b[0] and a[1] != b[1] and a[2] < b[3] and b[2] < a[3] for a, b in itertools.combinations(spans, 2))


def test_what_lies_on_a_mesh_is_used_again_only_for_the_same_array() -> None:
    stages, args = made("trn2_efa_cs3", "phase_split")
    runner, placed, whole = prepare(stages), {}, uncut(stages.program)
    other = (args[0], (np.asarray(args[1]) + 1) % 256, *args[2:])
    for given in (args, other, args):
        assert np.array_equal(runner.run(runner.load(*given), placed=placed)[0], whole(*given))


@pytest.mark.parametrize("options", [{}, {"layers": "scanned"}, {"loop": "while", "eos": 5}], ids=str)
@pytest.mark.parametrize("policy", ["phase_split", "random"])
def test_streamed_stages_end_with_layers_and_change_nothing(policy: str, options: dict[str, Any]) -> None:
    whole, args = made("trn2_efa_4cs3", policy, **options)
    stages, _ = made("trn2_efa_4cs3", policy, streamed=True, **options)
    runner = prepare(stages)
    assert len(stages.all) >= len(whole.all)
    if policy == "phase_split" and not options:
        assert len(stages.all) == len(whole.all) + 3 and runner.unique == len(stages.all) - 1  # three layers and the head; two layers are alike
    assert sum(t.nbytes * t.times for t in transfers(stages)) == sum(t.nbytes * t.times for t in transfers(whole))
    assert np.array_equal(runner(*args), uncut(stages.program)(*args))


FOURIER = {
    "two dimensions": lambda w, x: jnp.real(jnp.fft.fft2(x @ w)) @ w,
    "three dimensions": lambda w, x: jnp.real(jnp.fft.ifftn(jnp.fft.fftn((x @ w).reshape(8, 4, 4)) * jnp.fft.fftn(w.reshape(16, 4, 4)[:8]))).reshape(8, 16) @ w,
    "a complex contraction": lambda w, x: jnp.abs(jnp.fft.fft(x @ w) @ w.astype(jnp.complex64)),
}


@pytest.mark.parametrize("form", FOURIER)
@pytest.mark.parametrize("how", ["random", "single"])
def test_fourier_transforms_of_what_is_split(form: str, how: str) -> None:
    """XLA's transform for CPU refuses the layouts that splitting gives it: operands are brought together before."""
    rng = np.random.default_rng(0)
    w, x = rng.standard_normal((16, 16)).astype(np.float32), rng.standard_normal((8, 16)).astype(np.float32)
    program = pt.trace(FOURIER[form], w, x)
    problem = pt.pose(pt.tag(program), "h100_disagg", level="op", sharding="tensor")
    assert pt.check(pt.cut(program, pt.place(problem, how)), w, x).equal


def _flag(w: Any, x: Any, go: Any) -> Any:
    """A condition that is a carry as it is."""
    return jax.lax.while_loop(lambda c: c[0], lambda c: (c[1] < 2, c[1] + 1, jnp.tanh(jnp.sin(c[2] @ w))), (True, 0, x))[1:]


def _given(w: Any, x: Any, go: Any) -> Any:
    """A condition from outside, which says no."""
    asked = (x.sum() > 1e9) | go
    return jax.lax.while_loop(lambda c: asked, lambda c: (c[0] + 1, jnp.tanh(jnp.sin(c[1] @ w))), (0, x))


def _unread(w: Any, x: Any, go: Any) -> Any:
    """Carries that change places, of which one is read afterwards."""
    return jax.lax.while_loop(lambda c: c[0] < 5, lambda c: (c[0] + 1, c[2], jnp.tanh(jnp.sin(c[1] @ w))), (0, x, x[::-1]))[1]


def _three(w: Any, x: Any, go: Any) -> Any:
    """Three carries that move on by one place, in a scan."""
    return jax.lax.scan(lambda c, _: ((c[1], c[2], jnp.tanh(jnp.sin(c[0] @ w))), None), (x, x[::-1], -x), None, length=4)[0][0]


@pytest.mark.parametrize("fn", [_flag, _given, _unread, _three])
def test_loops_of_rare_forms_run_cut_and_exported(fn: Any, tmp_path: Any) -> None:
    args = np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32), np.random.default_rng(1).normal(size=(5, 8)).astype(np.float32), False
    program = pt.trace(fn, *args)
    loop = next(op.id for op in program.graph.ops if op.loop is not None)
    problem = pt.pose(pt.tag(program, loop=loop), pt.cluster("trn2_efa_4cs3"), level="op", trips=4)
    stages = cut(program, problem.placement([1 + n % 2 for n in range(len(problem))]))
    assert any(s.region == "body" for s in stages.all)
    runner = prepare(stages)
    verdict = pt.check(stages, *args, runner=runner)
    assert verdict.bitwise and verdict.moved_bytes <= verdict.planned_bytes
    made = jax.tree_util.tree_leaves(runner(*args))
    artifacts.export(stages, tmp_path / "out", *args)
    for a, b in zip(made, artifacts.load(tmp_path / "out").run(), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-6)


def _scans(k: float) -> Any:
    w = jnp.asarray(np.eye(4, dtype=np.float32) * k)
    inner = jax.jit(lambda x: x @ w)  # a layer that closes over its weights
    return lambda x: jax.lax.scan(lambda c, _: (inner(c), None), x, None, length=2)[0]


def _whiles(k: float) -> Any:
    w = jnp.asarray(np.eye(4, dtype=np.float32) * k)
    inner = jax.jit(lambda x: x @ w)
    return lambda x: jax.lax.fori_loop(0, 2, lambda _, c: inner(c), x)


def _conds(k: float) -> Any:
    w = jnp.asarray(np.eye(4, dtype=np.float32) * k)
    return lambda x: jax.lax.cond(x.sum() > 0, jax.jit(lambda x: x @ w), lambda x: x, x)


def _calls(k: float) -> Any:
    return lambda x: jax.pure_callback(lambda v: (np.asarray(v) * k).astype(np.float32), jax.ShapeDtypeStruct((2, 4), np.float32), x)


@pytest.mark.parametrize("made_of", [_scans, _whiles, _conds, _calls])
def test_stages_that_print_alike_are_compiled_and_exported_apart(made_of: Any, tmp_path: Any) -> None:
    first, second, third = made_of(0.5), made_of(3), made_of(3)
    x = np.ones((2, 4), np.float32)
    problem = pt.pose(pt.tag(pt.trace(lambda x: third(jnp.sin(second(jnp.sin(first(x))))), x)), pt.cluster("trn2_efa_cs3"), level="op", trips=2)
    stages = cut(problem.phases.program, problem.placement([int(all(op.primitive == "sin" for op, _ in block.items)) for block in problem.blocks]))  # type: ignore[union-attr]
    runner = prepare(stages)
    assert len(stages.all) == 5 and runner.unique == 3 + (made_of is _calls)  # the sines are one, the last two loops are; two functions never are
    assert pt.check(stages, x, runner=runner).bitwise
    if made_of is not _calls:  # which only this process can run
        assert np.array_equal(artifacts.load(artifacts.export(stages, tmp_path / "e", x)).run()[0], uncut(stages.program)(x))
