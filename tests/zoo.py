"""Small programs of every kind that a tagger meets, with their authors' labels: scopes "prefill", "decode", "both" and "after".

All are built on one layer of attention with a cache, written as plain JAX. `CASES[name]` is (fn, args).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

V, D, T = 32, 16, 24
_rng = np.random.default_rng(0)
_SHAPES = {"e": (V, D), "q": (D, D), "k": (D, D), "v": (D, D), "o": (D, D), "u": (D, 4 * D), "d": (4 * D, D), "h": (D, V)}


def weights() -> dict[str, np.ndarray]:
    return {k: (_rng.standard_normal(s) * 0.3).astype(np.float32) for k, s in _SHAPES.items()}


W, DRAFT = weights(), weights()
TOKENS = _rng.integers(0, V, (2, 8)).astype(np.int32)
scope = jax.named_scope


def forward(w: Any, tokens: Any, cache: Any, pos: Any) -> Any:
    """tokens [B, S] at positions from `pos`: logits [B, S, V] and the cache, a pair of [B, T, D]."""
    x = w["e"][tokens]
    q, k, v = x @ w["q"], x @ w["k"], x @ w["v"]
    keys, values = (lax.dynamic_update_slice(c, n, (0, pos, 0)) for c, n in zip(cache, (k, v), strict=True))
    seen = jnp.arange(keys.shape[1])[None] <= pos + jnp.arange(x.shape[1])[:, None]
    scores = jnp.where(seen, jnp.einsum("bsd,btd->bst", q, keys), -1e30)
    x = x + jnp.einsum("bst,btd->bsd", jax.nn.softmax(scores), values) @ w["o"]
    return (x + jax.nn.gelu(x @ w["u"]) @ w["d"]) @ w["h"], (keys, values)


def empty(batch: int) -> Any:
    return tuple(jnp.zeros((batch, T, D)) for _ in "kv")


def pick(logits: Any) -> Any:
    return jnp.argmax(logits[:, -1], -1).astype(jnp.int32)


def loop(w: Any, token: Any, cache: Any, pos: Any, n: int) -> Any:
    """A scan of n greedy steps: its tokens."""

    def step(state: Any, _: Any) -> Any:
        token, cache, pos = state
        logits, cache = forward(w, token[:, None], cache, pos)
        token = pick(logits)
        return (token, cache, pos + 1), token

    with scope("decode"):
        return lax.scan(step, (token, cache, pos), None, length=n)[1]


def plain(w: Any, tokens: Any) -> Any:
    with scope("prefill"):
        logits, cache = forward(w, tokens, empty(tokens.shape[0]), 0)
        token = pick(logits)
    return loop(w, token, cache, tokens.shape[1], 6)


def wrapped(w: Any, tokens: Any) -> Any:
    """Calls of every kind around the phases: jit, remat, custom rules, vmap over sequences."""
    f = jax.custom_vjp(lambda x: x * 1.0)
    f.defvjp(lambda x: (f(x), None), lambda _, g: (g,))

    def one(tokens: Any) -> Any:
        with scope("prefill"):
            logits, cache = jax.checkpoint(forward, static_argnums=3)(w, tokens[None], empty(1), 0)
            token = pick(f(logits))
        return loop(w, token, cache, tokens.shape[0], 4)

    return jax.jit(jax.vmap(one, out_axes=1))(tokens)


def chunked(w: Any, tokens: Any) -> Any:
    """The prompt in chunks of 4: a loop that carries a cache and chooses nothing."""

    def chunk(state: Any, ids: Any) -> Any:
        cache, pos = state
        logits, cache = forward(w, ids, cache, pos)
        return (cache, pos + ids.shape[1]), logits[:, -1:]

    with scope("prefill"):
        (cache, pos), logits = lax.scan(chunk, (empty(2), 0), tokens.reshape(2, 2, 4).swapaxes(0, 1))
        token = pick(logits[-1])
    return loop(w, token, cache, pos, 5)


def prefix(w: Any, tokens: Any, cache: Any) -> Any:
    """A prompt after a prefix whose cache is given."""
    with scope("prefill"):
        logits, cache = forward(w, tokens, cache, 4)
        token = pick(logits)
    return loop(w, token, cache, 12, 5)


def unequal(w: Any, tokens: Any, lengths: Any) -> Any:
    """Prompts of unequal length: each sequence chooses at its own last token and writes at its own position."""

    def step(state: Any, _: Any) -> Any:
        token, cache, pos = state
        logits, cache = jax.vmap(lambda t, c, p: jax.tree.map(lambda x: x[0], forward(w, t[None, None], jax.tree.map(lambda x: x[None], c), p)))(token, cache, pos)
        token = pick(logits)
        return (token, cache, pos + 1), token

    with scope("prefill"):
        logits, cache = forward(w, tokens, empty(2), 0)
        token = jnp.argmax(logits[jnp.arange(2), lengths - 1], -1).astype(jnp.int32)
    with scope("decode"):
        return lax.scan(step, (token, cache, lengths), None, length=4)[1]


def beam(w: Any, tokens: Any, k: int = 3) -> Any:
    """Beam search: caches are reordered by the beams that survive."""

    def step(state: Any, _: Any) -> Any:
        token, score, cache, pos = state
        logits, cache = forward(w, token.reshape(-1, 1), cache, pos)
        score, index = lax.top_k((jax.nn.log_softmax(logits[:, -1]).reshape(2, k, V) + score[..., None]).reshape(2, -1), k)
        rows = (jnp.arange(2)[:, None] * k + index // V).reshape(-1)
        return (index % V, score, jax.tree.map(lambda c: c[rows], cache), pos + 1), index % V

    with scope("prefill"):
        logits, cache = forward(w, tokens, empty(2), 0)
        score, token = lax.top_k(jax.nn.log_softmax(logits[:, -1]), k)
        cache = jax.tree.map(lambda c: jnp.repeat(c, k, 0), cache)
    with scope("decode"):
        return lax.scan(step, (token, score, cache, tokens.shape[1]), None, length=4)[1]


def speculative(both: Any, tokens: Any, k: int = 2, n: int = 6) -> Any:
    """A draft proposes k tokens in a loop of its own, the model verifies them at once; the draft has its own prefill."""
    w, draft = both

    def body(state: Any) -> Any:
        token, cache, own, pos, out, i = state

        def propose(inner: Any, _: Any) -> Any:
            token, own, pos = inner
            logits, own = forward(draft, token[:, None], own, pos)
            return (pick(logits), own, pos + 1), pick(logits)

        (_, own, _), proposed = lax.scan(propose, (token, own, pos), None, length=k)
        candidates = jnp.concatenate([token[None], proposed]).T
        logits, cache = forward(w, candidates, cache, pos)
        best = jnp.argmax(logits, -1).astype(jnp.int32)
        agreed = jnp.cumprod((best[:, :-1] == candidates[:, 1:]).astype(jnp.int32), 1).sum(1).min()
        out = lax.dynamic_update_slice(out, best, (0, i))
        return jnp.take(best, agreed, axis=1), cache, own, pos + agreed + 1, out, i + agreed + 1

    with scope("prefill"):
        logits, cache = forward(w, tokens, empty(2), 0)
        _, own = forward(draft, tokens, empty(2), 0)
        token = pick(logits)
    with scope("decode"):
        out = jnp.zeros((2, n + k + 2), jnp.int32)
        return lax.while_loop(lambda s: s[5] < n, body, (token, cache, own, tokens.shape[1], out, 0))[4]


def unrolled(w: Any, tokens: Any, n: int = 3) -> Any:
    """Tokens written one after the other, without a loop."""
    with scope("prefill"):
        logits, cache = forward(w, tokens, empty(2), 0)
        token = pick(logits)
    written = [token]
    for i in range(n):
        with scope("decode"):
            logits, cache = forward(w, token[:, None], cache, tokens.shape[1] + i)
            token = pick(logits)
        written.append(token)
    with scope("after"):
        return jnp.stack(written)


def continuous(w: Any, chunk: Any, cache_p: Any, tokens: Any, cache_d: Any, pos: Any) -> Any:
    """One step of continuous batching: a chunk of one prompt, and one token of each running sequence."""
    with scope("prefill"):
        logits, cache_p = forward(w, chunk, cache_p, 0)
        first = pick(logits)
    with scope("decode"):
        logits, cache_d = forward(w, tokens[:, None], cache_d, pos)
        return first, cache_p, pick(logits), cache_d


def recurrent(w: Any, tokens: Any) -> Any:
    """A linear recurrence: its state is overwritten, not appended to."""

    def cell(w: Any, h: Any, x: Any) -> Any:
        h = h * jax.nn.sigmoid(x @ w["q"]) + x @ w["k"]
        return h, (h @ w["v"]) @ w["h"]

    def step(state: Any, _: Any) -> Any:
        token, h = state
        h, logits = cell(w, h, w["e"][token])
        token = jnp.argmax(logits, -1).astype(jnp.int32)
        return (token, h), token

    with scope("prefill"):
        h, logits = lax.scan(lambda h, x: cell(w, h, x), jnp.zeros((2, D)), w["e"][tokens].swapaxes(0, 1))
        token = jnp.argmax(logits[-1], -1).astype(jnp.int32)
    with scope("decode"):
        return lax.scan(step, (token, h), None, length=5)[1]


def vision(w: Any, image: Any, tokens: Any) -> Any:
    """An image goes through a convolution and stands before the text."""
    with scope("prefill"):
        patches = lax.conv_general_dilated(image, jnp.broadcast_to(w["q"][:4, :4, None, None], (4, 4, 1, D)), (4, 4), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        table = jnp.concatenate([patches.reshape(2, -1, D) @ w["k"], w["e"][tokens]], 1)
        logits, cache = forward({**w, "e": table.reshape(-1, D)}, jnp.arange(2)[:, None] * table.shape[1] + jnp.arange(table.shape[1]), empty(2), 0)
        token = pick(logits)
    return loop(w, token, cache, 12, 4)


def quantised(w: Any, tokens: Any) -> Any:
    """Weights are read as int8 and scaled by both phases: work on weights alone that both need."""
    with scope("both"):
        w = {k: (x[0].astype(jnp.float32) * x[1] if isinstance(x, tuple) else x) for k, x in w.items()}
    return plain(w, tokens)


def prompt_in_loop(w: Any, tokens: Any, n: int = 5) -> Any:
    """The prompt is fed inside the loop, a token at a time: all of it is decode."""

    def step(state: Any, i: Any) -> Any:
        cache, token = state
        logits, cache = forward(w, jnp.where(i < 8, seq[:, i], token)[:, None], cache, i)
        return (cache, pick(logits)), pick(logits)

    with scope("prefill"):
        seq, first = jnp.concatenate([tokens, jnp.zeros((2, n), jnp.int32)], 1), tokens[:, 0]
    with scope("decode"):
        return lax.scan(step, (empty(2), first), jnp.arange(8 + n))[1]


def _cache(batch: int = 2) -> Any:
    return tuple(np.zeros((batch, T, D), np.float32) for _ in "kv")


_INT8 = {k: ((x * 40).astype(np.int8), np.float32(1 / 40)) for k, x in W.items()}
CASES: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "plain": (plain, (W, TOKENS)), "wrapped": (wrapped, (W, TOKENS)), "chunked": (chunked, (W, TOKENS)), "prefix": (prefix, (W, TOKENS, _cache())),
    "unequal": (unequal, (W, TOKENS, np.array([5, 8], np.int32))), "beam": (beam, (W, TOKENS)), "speculative": (speculative, ((W, DRAFT), TOKENS)),
    "unrolled": (unrolled, (W, TOKENS)), "continuous": (continuous, (W, TOKENS, _cache(), TOKENS[:, 0], _cache(), np.int32(5))),
    "recurrent": (recurrent, (W, TOKENS)), "vision": (vision, (W, np.ones((2, 8, 8, 1), np.float32), TOKENS)),
    "quantised": (quantised, (_INT8, TOKENS)), "prompt_in_loop": (prompt_in_loop, (W, TOKENS)),
}  # fmt: skip
