"""Token loops: opaque and unusual samplers, integers that are no tokens, batches, and how often a while runs."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas

import partition as pt
from partition.phases import Phase
from tests.test_parts import PROMPT, V, attend, caches, forward, generate, greedy, mlp, norm, weights


def argmax_kernel(logits: Any) -> Any:
    def kernel(ref: Any, out: Any) -> None:
        out[...] = jnp.argmax(ref[...], -1).astype(jnp.int32)

    return pallas.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct((logits.shape[0],), jnp.int32), interpret=True)(logits)


def argmax_callback(logits: Any) -> Any:
    return jax.pure_callback(lambda a: np.argmax(a, -1).astype(np.int32), jax.ShapeDtypeStruct(logits.shape[:-1], jnp.int32), logits)


@pytest.mark.parametrize("pick", [argmax_kernel, argmax_callback])
def test_an_opaque_op_that_makes_integers_of_floats_is_taken_to_choose(pick: Any) -> None:
    phases = pt.tag(pt.trace(lambda w, t: generate(w, t, pick=pick), weights(), PROMPT))
    assert phases.token_loop is not None and phases.batch == 2 and len(phases.handoff) == 5


def quantised(w: Any, tokens: Any, cache: Any, pos: Any) -> Any:
    """One layer whose keys are kept as int8 with a scale that is never zero."""
    x = w["e"][tokens]
    k = x @ w["layers"][0]["k"]
    scale = jnp.abs(k).max(-1, keepdims=True) / 127
    scale = jnp.where(scale == 0, 1.0, scale)
    kept = lax.dynamic_update_slice(cache[0], jnp.round(k / scale).astype(jnp.int8), (0, pos, 0))
    scales = lax.dynamic_update_slice(cache[1], scale, (0, pos, 0))
    keys = kept.astype(jnp.float32) * scales
    y = jax.nn.softmax(jnp.einsum("btd,bsd->bts", x @ w["layers"][0]["q"], keys)) @ keys
    return (x + y) @ w["h"], (kept, scales)


def empty() -> Any:
    return jnp.zeros((2, 12, 32), jnp.int8), jnp.ones((2, 12, 1))


def in_chunks(w: Any, tokens: Any) -> Any:
    def chunk(carry: Any, given: Any) -> Any:
        tokens, i = given
        logits, cache = quantised(w, tokens, carry, 3 * i)
        return cache, logits[:, -1]

    return lax.scan(chunk, empty(), (tokens.reshape(2, 2, 3).swapaxes(0, 1), jnp.arange(2)))


def test_integers_that_a_cache_is_kept_in_are_no_tokens() -> None:
    phases = pt.tag(pt.trace(in_chunks, weights(1), PROMPT))
    assert phases.loop is None and set(phases.of.values()) == {Phase.PREFILL}

    def whole(w: Any, tokens: Any) -> Any:
        cache, logits = in_chunks(w, tokens)

        def step(carry: Any, _: Any) -> Any:
            token, cache, pos = carry
            logits, cache = quantised(w, token[:, None], cache, pos)
            return (greedy(logits[:, -1]), cache, pos + 1), token

        return lax.scan(step, (greedy(logits[-1]), cache, jnp.int32(6)), None, length=4)[1]

    phases = pt.tag(pt.trace(whole, weights(1), PROMPT))
    assert phases.token_loop is not None and phases.batch == 2 and phases.token_loop.loop is not None and phases.token_loop.loop.trips == 4


def buffered(w: Any, tokens: Any) -> Any:
    """Prompt and new tokens lie in one buffer, as they usually do."""
    logits, cache = forward(w, tokens, caches(2), 0)
    out = jnp.zeros((2, 12), jnp.int32).at[:, :6].set(tokens).at[:, 6].set(greedy(logits[:, -1]))

    def step(i: Any, carry: Any) -> Any:
        out, cache = carry
        logits, cache = forward(w, lax.dynamic_slice(out, (0, i), (2, 1)), cache, i)
        return out.at[:, i + 1].set(greedy(logits[:, -1])), cache

    return lax.fori_loop(6, 11, step, (out, cache))[0]


def without_cache(w: Any, tokens: Any) -> Any:
    """All tokens are read again for each new one."""
    out = jnp.zeros((2, 12), jnp.int32).at[:, :6].set(tokens)

    def step(i: Any, out: Any) -> Any:
        logits, _ = forward(w, out, caches(2), 0)
        return out.at[:, i].set(greedy(jnp.take(logits, i - 1, axis=1)))

    return lax.fori_loop(6, 12, step, out)


def without_cache_unrolled(w: Any, tokens: Any) -> Any:
    for _ in range(2):
        tokens = jnp.concatenate([tokens, greedy(forward(w, tokens, caches(2), 0)[0][:, -1])[:, None]], 1)
    return tokens


@pytest.mark.parametrize("fn", [generate, buffered, without_cache, without_cache_unrolled])
def test_a_batch_is_the_sequences_that_run_together(fn: Any) -> None:
    assert pt.tag(pt.trace(fn, weights(), PROMPT)).batch == 2


_ZERO = jnp.int32(0)


@pytest.mark.parametrize(
    "start, goes_on",
    [
        (0, lambda i, done: (i < 4) & ~done), (0, lambda i, done: jnp.logical_and(4 > i, ~done)), (_ZERO, lambda i, done: (i < 4) & ~done),
        (np.int32(0), lambda i, done: i <= 3), (0, lambda i, done: ~(done | (i >= 4))), (0, lambda i, done: (i != 4) & ~done), (0, lambda i, done: i < 4),
    ],
)  # fmt: skip
def test_how_often_a_while_runs_is_read_from_its_condition(start: Any, goes_on: Any) -> None:
    def fn(w: Any, tokens: Any) -> Any:
        logits, cache = forward(w, tokens, caches(2), 0)

        def step(carry: Any) -> Any:
            i, token, cache, done = carry
            logits, cache = forward(w, token[:, None], cache, 6 + i)
            token = greedy(logits[:, -1])
            return i + 1, token, cache, done | (token == 3)

        token = greedy(logits[:, -1])
        return lax.while_loop(lambda c: goes_on(c[0], c[3].all()), step, (start, token, cache, token == 3))[1]

    assert pt.pose(pt.tag(pt.trace(fn, weights(), PROMPT)), pt.cluster("trn2_efa_cs3")).workload.trips == 4


def test_a_while_without_a_bound_says_how_to_give_one() -> None:
    def fn(w: Any, tokens: Any) -> Any:
        logits, cache = forward(w, tokens, caches(2), 0)

        def step(carry: Any) -> Any:
            token, cache = carry
            logits, cache = forward(w, token[:, None], cache, 6)
            return greedy(logits[:, -1]), cache

        return lax.while_loop(lambda c: (c[0] != 3).any(), step, (greedy(logits[:, -1]), cache))[0]

    phases = pt.tag(pt.trace(fn, weights(), PROMPT))
    with pytest.raises(pt.PartitionError, match="trips="):
        pt.pose(phases, pt.cluster("trn2_efa_cs3"))
    assert pt.pose(phases, pt.cluster("trn2_efa_cs3"), trips=7).workload.trips == 7


def test_weights_are_found_where_they_are() -> None:
    """As the second argument, or closed over."""
    w = jax.tree.map(jnp.asarray, weights())
    wanted = sum(x.nbytes for x in jax.tree.leaves(w))
    for program in (pt.trace(lambda t, w: generate(w, t), PROMPT, w), pt.trace(lambda t: generate(w, t), PROMPT)):
        phases = pt.tag(program)
        assert program.weight_bytes == wanted and len(phases.handoff) == 5
        assert dict(phases.anatomy.layers.counts) == {"top": 2, "body": 2}
        assert pt.plan(program, cluster="trn2_efa_cs3").estimate.ttft > 0


def test_a_cache_among_the_variables_is_state() -> None:
    from flax import linen, nnx

    class Tiny(linen.Module):
        @linen.compact
        def __call__(self, tokens: Any) -> Any:
            x = linen.Embed(V, 32)(tokens)
            x = x + linen.MultiHeadDotProductAttention(num_heads=4, decode=True)(linen.LayerNorm()(x))
            return linen.Dense(V)(x)

    model = Tiny()
    variables = model.init(jax.random.key(0), jnp.zeros((2, 12), jnp.int32))
    token = PROMPT[:, :1]

    class Other(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.embed, self.head = nnx.Embed(V, 32, rngs=rngs), nnx.Linear(32, V, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(4, 32, decode=True, rngs=rngs)

        def __call__(self, tokens: Any) -> Any:
            return self.head(self.attention(self.embed(tokens)))

    other = Other(nnx.Rngs(0))
    other.attention.init_cache((2, 12, 32))
    graph, state = nnx.split(other)

    def step(state: Any, tokens: Any) -> Any:
        module = nnx.merge(graph, state)
        return module(tokens), nnx.state(module, nnx.Cache)

    for program, own in (
        (pt.trace(lambda v, t: model.apply(v, t, mutable=["cache"]), variables, token), variables["params"]),
        (pt.trace(step, state, token), nnx.state(other, nnx.Param)),
    ):
        assert program.weight_bytes == sum(x.nbytes for x in jax.tree.leaves(own))
        phases = pt.tag(program)
        assert {phases.of[o.id] for o in program.graph.ops if o.primitive == "dot_general"} == {Phase.DECODE}
        assert pt.plan(program, cluster="trn2_efa_cs3").how[0].startswith("one phase")


def test_a_prompt_read_in_a_loop_over_scanned_layers_is_prefill() -> None:
    """Linen's own cache counts where it is; inside of the layers' scan a mask compares that count, which chooses nothing."""
    from flax import linen

    class Layer(linen.Module):
        @linen.compact
        def __call__(self, x: Any, _: Any) -> Any:
            x = x + linen.MultiHeadDotProductAttention(4, decode=True)(linen.RMSNorm()(x))
            return x + linen.Dense(32)(linen.gelu(linen.Dense(48)(linen.RMSNorm()(x)))), None

    class Model(linen.Module):
        @linen.compact
        def __call__(self, tokens: Any) -> Any:
            stack = linen.scan(Layer, variable_axes={"params": 0, "cache": 0}, split_rngs={"params": True}, length=3)
            return linen.Dense(V)(stack()(linen.Embed(V, 32)(tokens), None)[0])

    model = Model()
    variables = model.init(jax.random.key(0), jnp.zeros((2, 12), jnp.int32))

    def read(params: Any, cache: Any, token: Any) -> Any:
        logits, new = model.apply({"params": params, "cache": cache}, token[:, None], mutable=["cache"])
        return new["cache"], logits[:, -1]

    def prefill(params: Any, cache: Any, tokens: Any) -> Any:
        return lax.scan(lambda c, t: read(params, c, t), cache, tokens.T)

    def whole(params: Any, cache: Any, tokens: Any) -> Any:
        cache, logits = prefill(params, cache, tokens)

        def step(carry: Any, _: Any) -> Any:
            cache, logits = read(params, carry[1], carry[0])
            return (greedy(logits), cache), carry[0]

        return lax.scan(step, (greedy(logits[-1]), cache), None, length=4)[1]

    args = variables["params"], variables["cache"], PROMPT
    assert set(pt.tag(pt.trace(prefill, *args)).of.values()) == {Phase.PREFILL}
    program = pt.trace(whole, *args)
    phases = pt.tag(program)
    assert [phases.of[o.id] for o in program.graph.ops if o.loop is not None] == [Phase.PREFILL, Phase.DECODE]
    assert phases.batch == 2 and sum(c.kind == "cache" for c in phases.handoff) == 2
    assert pt.plan(program, cluster="trn2_efa_cs3").estimate.ttft > 0


def test_layers_that_stop_early_are_no_token_loop() -> None:
    """Sequences that are sure enough leave the stack of layers: a truth value for each comes back through a contraction and a comparison."""
    w = weights(3)
    stack = jax.tree.map(lambda *x: np.stack(x), *w["layers"])

    def early(w: Any, tokens: Any, cache: Any, pos: Any) -> Any:
        def one(carry: Any, given: Any) -> Any:
            (x, done), (layer, state) = carry, given
            y, state = attend(layer, norm(x), state, pos)
            y = jnp.where(done[:, None, None], x, x + y + mlp(layer, norm(x + y)))
            return (y, done | (jax.nn.softmax((norm(y) @ w["h"])[:, -1]).max(-1) > 0.9)), state

        (x, _), new = lax.scan(one, (w["e"][tokens], jnp.zeros(2, bool)), (w["stack"], cache))
        return norm(x) @ w["h"], new

    given = {"e": w["e"], "h": w["h"], "stack": stack}
    fn = functools.partial(generate, forward=early, state=lambda batch: tuple(jnp.zeros((3, batch, 12, 4, 8)) for _ in "kv"))
    program = pt.trace(fn, given, PROMPT)
    phases = pt.tag(program)
    assert [phases.of[o.id] for o in program.graph.ops if o.loop is not None] == [Phase.PREFILL, Phase.DECODE]
    assert sum(c.kind == "cache" for c in phases.handoff) == 2


def paged(w: Any, token: Any, table: Any, pool: Any, pos: Any) -> Any:
    """One step over a cache of pages: `table` [B, pages] says where those of each sequence lie."""
    x, rows = w["e"][token][:, None], jnp.arange(2)
    k = x @ w["layers"][0]["k"]
    pool = pool.at[table[rows, pos // 4], pos % 4].set(k[:, 0])
    keys = pool[table].reshape(2, -1, 32)
    scores = jnp.where(jnp.arange(keys.shape[1]) <= pos[:, None, None], jnp.einsum("btd,bsd->bts", x @ w["layers"][0]["q"], keys), -1e9)
    return (x + jax.nn.softmax(scores) @ keys) @ w["h"], pool


def masked(w: Any, token: Any, mask: Any, cache: Any, pos: Any) -> Any:
    """One step with a mask of integers [B, T] over the cache."""
    logits, cache = forward(w, token[:, None], cache, pos)
    return logits + mask.sum(), cache


def test_a_decode_step_with_other_integers_than_its_tokens_is_decode() -> None:
    token, page = np.ones(2, np.int32), np.arange(6, dtype=np.int32).reshape(2, 3)
    for fn, args in (
        (paged, (weights(1), token, page, np.zeros((6, 4, 32), np.float32), np.array([3, 5], np.int32))),
        (masked, (weights(), token, np.ones((2, 12), np.int32), jax.tree.map(np.asarray, caches(2)), np.int32(3))),
    ):
        phases = pt.tag(pt.trace(fn, *args))
        assert set(phases.of.values()) <= {Phase.DECODE, Phase.NONE} and phases.batch == 2


def test_what_two_models_of_one_program_hand_on_is_all_told() -> None:
    def both(w: Any, tokens: Any) -> Any:
        return generate(w[0], tokens), generate(w[1], tokens)

    phases = pt.tag(pt.trace(both, (weights(), weights()), PROMPT))
    assert sum(c.kind == "cache" for c in phases.handoff) == 8
    assert "router" not in phases.anatomy.kind.values()
