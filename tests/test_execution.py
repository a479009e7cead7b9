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
