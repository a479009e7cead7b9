"""What every model here shares: prefill and the token loop as one traceable function, and a request's arguments.

`generate(prefill, decode_step, tokens, ...)` is the request; the scopes "prefill", "decode" and "after" say what the author means each
part to be. `Make` says where parameters come from: shapes only, random numbers, or a checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from models.checkpoint import ModelError

Make = Callable[[str, tuple[int, ...]], Any]  # (name, shape) -> an array or a ShapeDtypeStruct
Loop = Literal["scan", "while", "fori"]


def choose(logits: jax.Array, key: jax.Array | None, temperature: float) -> tuple[jax.Array, jax.Array | None]:
    """The next token [B] of logits [B, vocab]: the likeliest, or a sample where there is a key (which is then split)."""
    if key is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), None
    key, use = jax.random.split(key)
    return jax.random.categorical(use, logits / temperature, axis=-1).astype(jnp.int32), key


def generate(
    prefill: Callable[[jax.Array, int], tuple[jax.Array, Any]], decode_step: Callable[[jax.Array, Any, Any], tuple[jax.Array, Any]],
    tokens: jax.Array, new_tokens: int, *, start: int | None = None, key: jax.Array | None = None, temperature: float = 1.0,
    eos: int | None = None, loop: Loop = "scan", logits: bool = False,
) -> Any:  # fmt: skip
    """Read `tokens` [B, S], then decode until `new_tokens` [B, new_tokens] are written; with `logits`, those of every step as well.

    prefill(tokens, length) gives logits float32 [B, vocab] of the last position and a state with room for `length` positions;
    decode_step(token [B], state, position) gives the same one position on. `start` is the position of the first new token (S).
    `loop="while"` stops early once every sequence has written `eos` (None: never); later places then hold `eos` or 0.
    """
    B, S = tokens.shape
    first = S if start is None else start

    def step(token: jax.Array, position: Any, state: Any, key: Any) -> tuple[Any, ...]:
        step_logits, state = decode_step(token, state, position)
        token, key = choose(step_logits, key, temperature)
        return token, position + 1, state, key, step_logits

    with jax.named_scope("prefill"):
        first_logits, state = prefill(tokens, first + new_tokens)
        token, key = choose(first_logits, key, temperature)
    if loop == "scan":

        def scanned(carry: Any, _: None) -> tuple[Any, Any]:
            *carry, step_logits = step(*carry)
            return tuple(carry), (carry[0], step_logits if logits else None)

        with jax.named_scope("prefill"):
            token_column, logits_row = token[:, None], first_logits[None] if logits else None
        with jax.named_scope("decode"):
            _, (rest, rest_logits) = jax.lax.scan(scanned, (token, jnp.int32(first), state, key), None, length=new_tokens - 1)
        with jax.named_scope("after"):
            out = jnp.concatenate([token_column, rest.T], axis=1)
            return (out, jnp.concatenate([logits_row, rest_logits]).swapaxes(0, 1)) if logits else out

    def advance(i: Any, carry: Any) -> Any:
        token, done, out, state, key = carry
        token, _, state, key, _ = step(token, first + i - 1, state, key)
        token = token if eos is None else jnp.where(done, eos, token)
        out = jax.lax.dynamic_update_slice(out, token[:, None], (0, i))
        return token, done if eos is None else done | (token == eos), out, state, key

    with jax.named_scope("prefill"):
        out = jnp.zeros((B, new_tokens), jnp.int32) if eos is None else jnp.full((B, new_tokens), eos, jnp.int32)
        out = jax.lax.dynamic_update_slice(out, token[:, None], (0, 0))
        done = None if eos is None else token == eos
    with jax.named_scope("decode"):
        done = jnp.zeros(B, bool) if done is None else done
        carry = (token, done, out, state, key)
        if loop == "fori":
            return jax.lax.fori_loop(1, new_tokens, advance, carry)[2]
        return jax.lax.while_loop(lambda c: (c[0] < new_tokens) & ~jnp.all(c[1][1]), lambda c: (c[0] + 1, advance(*c)), (jnp.int32(1), carry))[1][2]


def shapes(dtype: str) -> Make:
    """Make every parameter as a shape without numbers."""
    return lambda name, shape: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


def numbers(dtype: str, seed: int) -> Make:
    """Make every parameter as a NumPy array: ones for norms, else normal with standard deviation 1/sqrt(fan-in)."""
    rng = np.random.default_rng(seed)

    def make(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if "norm" in name:
            return np.ones(shape, jnp.dtype(dtype))
        fan_in = shape[-1] if "embed" in name or len(shape) < 2 else shape[-2]
        return (rng.standard_normal(shape, np.float32) / math.sqrt(fan_in)).astype(jnp.dtype(dtype))

    return make


def maker(dtype: str, own_dtype: str | None, seed: int | None, weights: Make | None) -> Make:
    """Where a request's parameters come from: `weights` (cast where the caller asks for a dtype), a seed, or shapes alone."""
    if weights is not None:
        return weights if own_dtype is None else lambda name, shape: weights(name, shape).astype(jnp.dtype(own_dtype))
    return shapes(dtype) if seed is None else numbers(dtype, seed)


def request(
    vocab: int, *, batch: int, prompt: int | np.ndarray, new_tokens: int, seed: int | None, concrete: bool, sample: bool, loop: Loop, logits: bool
) -> tuple[Any, ...]:
    """Tokens int32 [batch, S], and a key uint32 [2] to sample with: arrays where `concrete`, else shapes.

    Raises ModelError for lengths that make no request, and for a loop that does not exist or keeps no logits.
    """
    ids = None if isinstance(prompt, int) else np.asarray(prompt, np.int32)
    batch, length = (batch, prompt) if ids is None else ids.shape
    asked = f"batch {batch}, prompt {length}, {new_tokens} new tokens, loop {loop!r}"
    if batch < 1 or length < 1 or new_tokens < 2:
        raise ModelError("no request can be made of these lengths", where=asked, mend="give batch >= 1, prompt >= 1 and new_tokens >= 2")
    if loop not in ("scan", "while", "fori"):
        raise ModelError(f"there is no token loop of the form {loop!r}", where=asked, mend="use 'scan', 'while' or 'fori'")
    if logits and loop != "scan":
        raise ModelError("logits are kept by the scan loop only", where=asked, mend="pass loop='scan'")
    rng = np.random.default_rng(0 if seed is None else seed)
    if ids is None:
        ids = rng.integers(0, vocab, (batch, length), np.int32) if concrete else jax.ShapeDtypeStruct((batch, length), jnp.int32)
    key = np.array([0, seed or 0], np.uint32) if concrete else jax.ShapeDtypeStruct((2,), jnp.uint32)
    return (ids, key) if sample else (ids,)
