"""How each kind of machine costs a contraction: rows of an array, scores of a head, waves of tiles, and what traced programs give them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from partition import profiles
from partition.costs import Contraction, cost
from partition.costs.contraction import attentions, contraction, derived, scores
from partition.costs.streaming import attention, matmul
from partition.hardware import Mesh
from partition.program import trace
from partition.work import Work

GPU, CHIP = profiles.device("h100"), profiles.device("trn1")
assert GPU.streaming is not None and CHIP.systolic is not None


def on(name: str, shape: Contraction, read: float) -> Any:
    flops = 2.0 * shape.batch * shape.group * shape.rows * shape.inner * shape.columns
    mesh = Mesh(name="m", device=profiles.device(name), count=1, stand_in=1)
    return cost(Work(flops={"bfloat16": flops}, read=read, contractions=1, rows=shape.rows, macs=flops / 2), mesh, shape=shape)


def test_few_rows_take_as_long_as_64_on_a_systolic_array() -> None:
    few, full, more = (on("trn1", Contraction(batch=1, rows=r, inner=4096, columns=4096, width=2.0), 0.0).compute for r in (1, 64, 128))
    assert few == full == more / 2
    assert full == pytest.approx(2 * 64 * 4096**2 / (190e12 * 0.35) * 2)  # one of two cores


def test_a_core_takes_the_scores_of_its_heads_one_after_the_other() -> None:
    shape = Contraction(batch=1, rows=1, inner=128, columns=8192, width=2.0, group=1, attention=True)
    one, four = on("trn1", shape, 0.0).busy, on("trn1", dataclasses.replace(shape, group=4), 0.0).busy
    assert four == pytest.approx(4 * one) and one == pytest.approx(0.5 * 8192 * (2.05e-9 + 12e-9 / 128))


def test_the_last_wave_of_tiles_is_paid_for_whole() -> None:
    """132 tiles of 128 x 128 fill an H100 once; one more takes a wave of its own, or a split does better, never less than the first."""
    wave = [float(matmul(Contraction(batch=1, rows=128, inner=8192, columns=128 * n, width=2.0), "bfloat16", GPU, GPU.streaming)[0]) for n in (66, 132, 133)]  # type: ignore[arg-type]
    assert wave[0] <= wave[1] < wave[2] < 2.2 * wave[1]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8192), st.integers(64, 16384), st.integers(64, 16384), st.floats(1.0, 4.0))
def test_a_matrix_product_never_beats_its_roofline_and_more_of_it_takes_longer(m: int, n: int, k: int, more: float) -> None:
    shape = Contraction(batch=1.0, rows=float(m), inner=float(k), columns=float(n), width=2.0)
    seconds, compute, memory = matmul(shape, "bfloat16", GPU, GPU.streaming)  # type: ignore[arg-type]
    assert seconds >= max(compute, memory) and seconds > float(GPU.streaming.launch)  # type: ignore[union-attr]
    assert matmul(dataclasses.replace(shape, inner=k * more), "bfloat16", GPU, GPU.streaming)[0] >= seconds * 0.999  # type: ignore[arg-type]


def test_prices_of_many_shapes_at_once_are_those_of_each() -> None:
    rows = np.array([1.0, 7.0, 512.0])
    many = matmul(Contraction(batch=1.0, rows=rows, inner=4096.0, columns=1024.0, width=2.0), "bfloat16", GPU, GPU.streaming)[0]  # type: ignore[arg-type]
    each = [matmul(Contraction(batch=1.0, rows=r, inner=4096.0, columns=1024.0, width=2.0), "bfloat16", GPU, GPU.streaming)[0] for r in rows]  # type: ignore[arg-type]
    np.testing.assert_allclose(many, np.array(each).ravel())


def test_a_causal_attention_sees_half_of_the_keys() -> None:
    shape = Contraction(batch=8.0, rows=8192.0, inner=128.0, columns=8192.0, width=2.0, group=4.0, attention=True, masked=True)
    half, whole = (attention(dataclasses.replace(shape, masked=m), "bfloat16", GPU, GPU.streaming)[0] for m in (True, False))  # type: ignore[arg-type]
    assert 0.45 < half / whole < 0.75


B, T, K, G, D = 2, 512, 4, 3, 16


def attend(w: Any, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    s = jnp.einsum("btkgd,bskd->bkgts", q, k)
    s = jnp.where(jnp.arange(s.shape[-1]) <= jnp.arange(s.shape[-2])[:, None], s, -jnp.inf) if s.shape[-2] > 1 else s
    return jnp.einsum("bkgts,bskd->btkgd", jax.nn.softmax(s, -1), v).reshape(*q.shape[:2], -1) @ w


FORMS = {  # einsum of queries with keys, of scores with values, the order of a query's dimensions
    "plain": ("btkgd,bskd->bkgts", "bkgts,bskd->btkgd"), "keys first": ("bskd,btkgd->bkgst", "bkgst,bskd->btkgd"), "heads first": ("bkgtd,bksd->bkgts", "bkgts,bksd->bkgtd"),
    "many queries": ("btkgd,bskd->bkgts", "bkgts,bskd->btkgd"),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("tokens", "keys", "group"), [(256, 1025, 4), (256, 4096, 4), (1, 64, 128), (1, 512, 128), (1024, 128, 2), (4, 16, 4), (16, 64, 4)])
def test_tokens_group_and_keys_are_told_apart(form: str, tokens: int, keys: int, group: int) -> None:
    spec = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)  # noqa: E731
    score, value = FORMS[form]
    axes = dict(b=2, t=tokens, s=keys, k=3, g=group, d=8)
    terms, seconds = score.split("->")[0].split(","), value.split("->")[0].split(",")

    def fn(w: Any, x: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        order = next(t for t in terms if "t" in t)
        q = (x @ w).reshape(2, tokens, 3, group, 8)
        q = jnp.transpose(q, ["btkgd".index(a) for a in order])
        s = jnp.einsum(score, *((q, k) if "t" in terms[0] else (k, q)))
        return jnp.einsum(value, jax.nn.softmax(s, -1 if "ts" in score.split("->")[1] else -2), v)

    cache = [spec(*(axes[a] for a in next(t for t in (terms if n == 0 else seconds) if "t" not in t))) for n in (0, 1)]
    program = trace(fn, spec(16, 3 * group * 8), spec(2, tokens, 16), *cache)
    weights = {program.graph.inputs[0]}
    pairs = attentions(program.graph, derived(program.graph, weights))
    (begin,) = {p.first for p in pairs.values()}
    found = scores(program.op[begin], program.graph.tensors, weights, (), 1, pairs[begin])
    assert (found.batch, found.rows, found.group, found.columns, found.masked) == (6, tokens, group, keys, False)


def test_a_learned_bias_is_no_mask_and_a_reshaped_weight_is_a_weight() -> None:
    spec = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)  # noqa: E731

    def fn(w: Any, x: jax.Array) -> jax.Array:
        q, k = x @ w["q"], x @ w["k"].reshape(16, 16)
        s = jnp.einsum("btd,bsd->bts", q, k)
        return jnp.einsum("bts,bsd->btd", jax.nn.softmax(s + w["bias"], -1), k)

    def hidden(w: Any, x: jax.Array) -> jax.Array:
        q, k = x @ w["q"], x @ w["k"].reshape(16, 16)
        s = jnp.einsum("btd,bsd->bts", q, k)
        return jnp.einsum("bts,bsd->btd", jax.nn.softmax(s + jnp.where(jnp.arange(64) <= jnp.arange(64)[:, None], 0.0, -1e9), -1), k)

    for call, masked in ((fn, False), (hidden, True)):
        program = trace(call, {"q": spec(16, 16), "k": spec(256), "bias": spec(64, 64)}, spec(2, 64, 16))
        pairs = attentions(program.graph, derived(program.graph, set(program.graph.inputs[:-1])))
        assert len(pairs) == 2 and {p.masked for p in pairs.values()} == {masked}


@pytest.mark.parametrize(("tokens", "keys"), [(T, T), (1, T), (1, 2 * T)])
def test_an_attention_is_found_in_the_traced_program(tokens: int, keys: int) -> None:
    spec = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)  # noqa: E731
    program = trace(attend, spec(K * G * D, 32), spec(B, tokens, K, G, D), spec(B, keys, K, D), spec(B, keys, K, D))
    graph, weights = program.graph, {program.graph.inputs[0]}
    dots = [op for op in graph.walk() if op.primitive == "dot_general"]
    pairs = attentions(graph, weights)
    assert set(pairs) == {d.id for d in dots[:2]} and {p.first for p in pairs.values()} == {dots[0].id}
    found = scores(dots[0], graph.tensors, weights, (), 1, pairs[dots[0].id])
    assert (found.batch, found.group, found.rows, found.columns, found.inner) == (B * K, G, tokens, keys, D)
    assert found.masked == (tokens > 1) and found.attention
    last = contraction(dots[2], graph.tensors, weights, (), 1)
    assert (last.rows, last.inner, last.columns, last.attention) == (B * tokens, K * G * D, 32, False)


def test_splitting_takes_from_the_factor_that_is_split() -> None:
    spec = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)  # noqa: E731
    program = trace(lambda w, x: x @ w, spec(64, 96), spec(8, 64))
    (dot,) = program.graph.ops
    weights = {program.graph.inputs[0]}
    by_rows, by_columns, by_sum = (contraction(dot, program.graph.tensors, weights, (f,), 4) for f in range(3))
    assert (by_rows.rows, by_columns.columns, by_sum.inner) == (2, 24, 16)
    assert by_rows.columns == 96 and by_columns.inner == 64 and by_sum.rows == 8


def test_a_server_adds_its_time_to_a_request_and_to_a_step() -> None:
    import partition as pt
    from models import llama

    fn, args = llama.generation("tiny", prompt=16, new_tokens=8)
    cluster = profiles.cluster("trn1_only")
    base = pt.plan(fn, args, cluster=cluster, policy="single").estimate
    later = pt.plan(fn, args, cluster=cluster.replace({"trn1.systolic.start": "1 s", "trn1.systolic.step": "0.1 s"}), policy="single").estimate
    start = float(profiles.device("trn1").systolic.start)  # type: ignore[union-attr]
    assert later.ttft == pytest.approx(base.ttft + 1.0 - start) and later.tpot == pytest.approx(base.tpot + 0.1)


def test_prompts_that_prefill_takes_one_by_one_take_as_often() -> None:
    import partition as pt
    from models import llama

    times = {}
    for batch in (1, 4):
        fn, args = llama.generation("llama-2-7b", batch=batch, prompt=512, new_tokens=4, layers="scanned")
        for at_once in (1, 4):
            cluster = profiles.cluster("trn1_only").replace({"trn1.systolic.prefill_batch": at_once, "trn1.systolic.start": "0 s"})
            times[batch, at_once] = pt.plan(fn, args, cluster=cluster, policy="single", sharding="tensor").estimate.ttft
    assert times[1, 1] == times[1, 4]
    assert times[4, 1] == pytest.approx(4 * times[1, 1], rel=0.05) and times[4, 4] < times[4, 1]


def test_two_ways_of_computing_in_one_profile_are_refused(tmp_path: Any) -> None:
    from importlib import resources

    from partition.errors import ProfileError

    texts = [resources.files("device_profiles").joinpath(f"{n}.toml").read_text() for n in ("trn1", "cs3")]
    (tmp_path / "both.toml").write_text(texts[0] + "\n" + texts[1][texts[1].index("[device.region]") : texts[1].index("[device.precision]")])
    with pytest.raises(ProfileError, match="region and systolic"):
        profiles.device(str(tmp_path / "both.toml"))


def cached(capacity: int) -> Any:
    """Prefill writes 64 positions into a cache of some capacity; 32 tokens are decoded over it."""

    def fn(w: Any, tokens: jax.Array) -> jax.Array:
        x = w["embed"][tokens]
        q, k = (x @ w["q"])[:, None], x @ w["k"]
        cache = jax.lax.dynamic_update_slice(jnp.zeros((1, capacity, 64)), k, (0, 0, 0))
        s = jax.nn.softmax(jnp.einsum("bhtd,bsd->bhts", q, k), -1)
        first = jnp.argmax(jnp.einsum("bhts,bsd->bhtd", s, k)[:, 0, -1] @ w["head"], -1)

        def step(carry: Any, _: Any) -> Any:
            token, place, cache = carry
            y = w["embed"][token][:, None]
            cache = jax.lax.dynamic_update_slice(cache, y @ w["k"], (0, place, 0))
            s = jnp.einsum("bhtd,bsd->bhts", (y @ w["q"])[:, None], cache)
            s = jax.nn.softmax(jnp.where(jnp.arange(capacity) <= place, s, -jnp.inf), -1)
            out = jnp.einsum("bhts,bsd->bhtd", s, cache)[:, 0, -1]
            token = jnp.argmax(out @ w["head"], -1)
            return (token, place + 1, cache), token

        return jax.lax.scan(step, (first, 64, cache), None, length=32)[1]

    spec = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)  # noqa: E731
    weights = {"embed": spec(128, 64), "q": spec(64, 64), "k": spec(64, 64), "head": spec(64, 128)}
    return fn, (weights, jax.ShapeDtypeStruct((1, 64), jnp.int32))


def test_attention_pays_for_the_positions_in_use_not_for_the_array() -> None:
    import partition as pt

    def steps(cluster: str, capacity: int) -> float:
        fn, args = cached(capacity)
        return float(pt.plan(fn, args, cluster=cluster, policy="single").estimate.tpot)

    for cluster in ("h100_only", "cs3_only"):
        assert steps(cluster, 4096) == pytest.approx(steps(cluster, 96), rel=0.02)
    long = profiles.cluster("trn1_only").mesh("trn1").device
    assert long.systolic is not None
    from partition.costs.request import bucket

    assert [bucket(n, long.systolic) for n in (1, 128, 129, 5000)] == [128, 128, 256, 8192]
    assert steps("trn1_only", 4096) == pytest.approx(steps("trn1_only", 128), rel=0.02)
