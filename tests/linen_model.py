"""A tiny decoder-only language model in Flax Linen, written without a thought of `partition`, which it does not import.

`generation(...)` gives `(fn, args)`: `fn(variables, tokens)` -> tokens int32 [batch, new_tokens], the prefill and the token loop in one
traceable function. Rotary positions, grouped-query attention with its keys and values in Linen's `cache` collection, GELU MLP, and an
output head of its own. `args` are NumPy arrays: parameters are drawn for the shapes that `jax.eval_shape` of `init` gives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

VOCAB, WIDTH, HEADS, KV_HEADS, HEAD, LAYERS = 96, 32, 4, 2, 8, 3


def turn(x: jax.Array, positions: jax.Array) -> jax.Array:
    """Rotary positions on neighbouring pairs: x [B, S, H, D], positions [S]."""
    freq = 10_000.0 ** (-jnp.arange(0, HEAD, 2) / HEAD)
    angle = (positions[:, None] * freq)[:, None, :]
    even, odd = x[..., ::2], x[..., 1::2]
    pairs = [even * jnp.cos(angle) - odd * jnp.sin(angle), even * jnp.sin(angle) + odd * jnp.cos(angle)]
    return jnp.stack(pairs, axis=-1).reshape(x.shape)


class SelfAttention(nn.Module):
    length: int  # of the cache

    @nn.compact
    def __call__(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """x [B, S, E] at `positions` [S], attending to all that the cache holds up to each position."""
        B, S, _ = x.shape
        q = turn(nn.DenseGeneral((HEADS, HEAD), use_bias=False, name="query")(x), positions)
        k = turn(nn.DenseGeneral((KV_HEADS, HEAD), use_bias=False, name="key")(x), positions)
        v = nn.DenseGeneral((KV_HEADS, HEAD), use_bias=False, name="value")(x)
        shape = (B, self.length, KV_HEADS, HEAD)
        keys = self.variable("cache", "keys", jnp.zeros, shape, x.dtype)
        values = self.variable("cache", "values", jnp.zeros, shape, x.dtype)
        keys.value = jax.lax.dynamic_update_slice(keys.value, k, (0, positions[0], 0, 0))
        values.value = jax.lax.dynamic_update_slice(values.value, v, (0, positions[0], 0, 0))
        seen = jnp.arange(self.length)[None, :] <= positions[:, None]
        scores = jnp.einsum("bskgd,btkd->bkgst", q.reshape(B, S, KV_HEADS, -1, HEAD), keys.value) / HEAD**0.5
        weights = nn.softmax(jnp.where(seen, scores, -1e30))
        y = jnp.einsum("bkgst,btkd->bskgd", weights, values.value).reshape(B, S, HEADS * HEAD)
        return nn.Dense(WIDTH, use_bias=False, name="out")(y)


class Layer(nn.Module):
    length: int

    @nn.compact
    def __call__(self, x: jax.Array, positions: jax.Array) -> tuple[jax.Array, None]:
        """x [B, S, E] -> the same, and nothing (the form that nn.scan wants)."""
        x = x + SelfAttention(self.length, name="attention")(nn.LayerNorm(name="ln1")(x), positions)
        h = nn.gelu(nn.Dense(4 * WIDTH, name="up")(nn.LayerNorm(name="ln2")(x)))
        return x + nn.Dense(WIDTH, name="down")(h), None


class Decoder(nn.Module):
    length: int
    scanned: bool

    @nn.compact
    def __call__(self, tokens: jax.Array, start: Any) -> jax.Array:
        """tokens [B, S], the first at position `start` -> logits [B, VOCAB] of the last one."""
        x = nn.Embed(VOCAB, WIDTH, name="embed")(tokens)
        positions = start + jnp.arange(tokens.shape[1])
        if self.scanned:
            stack = nn.scan(
                Layer, variable_axes={"params": 0, "cache": 0}, split_rngs={"params": True}, in_axes=nn.broadcast, length=LAYERS
            )
            x, _ = stack(self.length, name="layers")(x, positions)
        else:
            for i in range(LAYERS):
                x, _ = Layer(self.length, name=f"layer_{i}")(x, positions)
        return nn.Dense(VOCAB, use_bias=False, name="head")(nn.LayerNorm(name="ln_f")(x)[:, -1])


def _drawn(variables: Any, scanned: bool, seed: int) -> Any:
    """NumPy values for the shapes of Linen's `params`; the same ones, stacked, where the layers are scanned."""
    rng = np.random.default_rng(seed)

    def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        spread = {"bias": 0.05, "scale": 0.05, "embedding": 1.0, "kernel": 0.15}[path[-1].key]
        mean = 1.0 if path[-1].key == "scale" else 0.0
        return rng.normal(mean, spread, leaf.shape).astype(leaf.dtype)

    drawn = jax.tree_util.tree_map_with_path(draw, variables["params"])
    if scanned:
        layers = [drawn.pop(f"layer_{i}") for i in range(LAYERS)]
        drawn["layers"] = jax.tree.map(lambda *leaves: np.stack(leaves), *layers)
    return {"params": drawn}


def generation(
    batch: int = 1,
    prompt: int = 8,
    new_tokens: int = 6,
    layers: Literal["unrolled", "scanned"] = "unrolled",
    loop: Literal["scan", "while", "fori"] = "scan",
    seed: int = 0,
) -> tuple[Callable[..., jax.Array], tuple[Any, np.ndarray]]:
    """Greedy generation: `fn(variables, tokens)` with tokens int32 [batch, prompt] -> int32 [batch, new_tokens], new_tokens >= 2."""
    scanned = layers == "scanned"
    model = Decoder(prompt + new_tokens, scanned)

    def fn(variables: Any, tokens: jax.Array) -> jax.Array:
        def read(cache: Any, tokens: jax.Array, start: Any) -> tuple[jax.Array, Any]:
            logits, changed = model.apply({**variables, **cache}, tokens, start, mutable=["cache"])
            return jnp.argmax(logits, axis=-1).astype(jnp.int32), changed

        token, cache = read({}, tokens, 0)
        if loop == "scan":

            def step(carry: Any, position: jax.Array) -> Any:
                token, cache = read(carry[1], carry[0][:, None], position)
                return (token, cache), token

            _, rest = jax.lax.scan(step, (token, cache), prompt + jnp.arange(new_tokens - 1))
            return jnp.concatenate([token[:, None], rest.T], axis=1)

        def write(i: jax.Array, carry: Any) -> Any:
            token, cache, out = carry
            token, cache = read(cache, token[:, None], prompt + i - 1)
            return token, cache, jax.lax.dynamic_update_slice(out, token[:, None], (0, i))

        carry = (token, cache, jnp.zeros((batch, new_tokens), jnp.int32).at[:, 0].set(token))
        if loop == "fori":
            return jax.lax.fori_loop(1, new_tokens, write, carry)[2]
        _, carry = jax.lax.while_loop(lambda c: c[0] < new_tokens, lambda c: (c[0] + 1, write(*c)), (jnp.int32(1), carry))
        return carry[2]

    tokens = np.random.default_rng(seed).integers(0, VOCAB, (batch, prompt), np.int32)
    key = jax.ShapeDtypeStruct((2,), jnp.uint32)
    shapes = jax.eval_shape(lambda key: Decoder(prompt + new_tokens, False).init(key, jnp.zeros((batch, prompt), jnp.int32), 0), key)
    return fn, (_drawn(shapes, scanned, seed), tokens)
