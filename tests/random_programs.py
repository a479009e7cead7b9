"""Random JAX programs: straight ops, calls, loops, branches, keys, several dtypes, aliased and unused values, and a token loop or none.

`draw(seed)` gives (fn, args, exact): `fn` draws the same ops whenever it is traced. Values stay small, so that a difference of one
rounding stays one; nothing is chosen (argmax, sort) from what narrow floats touched, so that a tie cannot turn a rounding into
another answer. `exact` says whether no narrow floats occur at all.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

ROWS, COLS = 4, 8
Pool = list[tuple[Any, bool]]
"""Values float32 [ROWS, COLS], and whether narrow floats touched them."""


@jax.custom_jvp
def _cubed(x: Any) -> Any:
    return x * x * x


_cubed.defjvp(lambda primals, tangents: (_cubed(*primals), 3 * primals[0] ** 2 * tangents[0]))


@jax.custom_vjp
def _softsign(x: Any) -> Any:
    return x / (1 + jnp.abs(x))


_softsign.defvjp(lambda x: (_softsign(x), x), lambda x, g: (g / (1 + jnp.abs(x)) ** 2,))


class Drawer:
    """Draws one program; `r` decides, `pool` holds what may be read, `w` are weights [3, COLS, COLS], `key` a typed key."""

    def __init__(self, seed: int, w: Any, table: Any, key: Any):
        self.r, self.w, self.table, self.key = random.Random(seed), w, table, key
        self.exact = True

    def pick(self, pool: Pool) -> tuple[Any, bool]:
        return self.r.choice(pool)

    def clean(self, pool: Pool) -> Any:
        """A value that no narrow float touched: the first always is one."""
        return self.r.choice([x for x, narrow in pool if not narrow] or [pool[0][0]])

    def steps(self, pool: Pool, count: int, depth: int = 0) -> Pool:
        for _ in range(count):
            name = self.r.choice(LEAVES if depth >= 2 else LEAVES + INNER)
            value, narrow = getattr(self, name)(pool, depth)
            pool = [*pool, (value, narrow)]
        return pool

    # --- straight ops
    def matmul(self, pool: Pool, depth: int) -> tuple[Any, bool]:
        x, n = self.pick(pool)
        return jnp.tanh(x @ self.w[self.r.randrange(3)] + self.pick([(x, n)])[0]), n

    def attend(self, pool: Pool, depth: int) -> tuple[Any, bool]:
        (q, a), (k, b) = self.pick(pool), self.pick(pool)
        s = jnp.einsum("ihd,jhd->hij", q.reshape(ROWS, 2, COLS // 2), k.reshape(ROWS, 2, COLS // 2))
        return jnp.einsum("hij,jhd->ihd", jax.nn.softmax(s, axis=-1), k.reshape(ROWS, 2, COLS // 2)).reshape(ROWS, COLS), a or b

    def elementwise(self, pool: Pool, depth: int) -> tuple[Any, bool]:
        (x, a), (y, b) = self.pick(pool), self.pick(pool)
        made = self.r.choice([lambda: x + y, lambda: jnp.sin(x) * y, lambda: jnp.maximum(x, -y), lambda: jnp.where(x > 0, x, y),
                              lambda: x / (2 + jnp.abs(y)), lambda: jnp.clip(x, -1, 1) - y, lambda: jnp.sqrt(jnp.abs(x)) + y])()  # fmt: skip
        clean = self.clean(pool)
        return jnp.tanh(made if not (a or b) else made + 0 * clean), a or b

    def reduce(self, pool: Pool, depth: int) -> tuple[Any, bool]:
        x, n = self.pick(pool)
        axis = self.r.randrange(2)
        return self.r.choice([lambda: x - x.mean(axis, keepdims=True), lambda: x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1),
                              lambda: x - x.max(axis, keepdims=True) * 0.5, lambda: jnp.cumsum(x, axis) * 0.2,
                              lambda: jax.nn.log_softmax(x, axis=-1) * 0.1])(), n  # fmt: skip

    def look_up(self, pool: Pool, depth: int) -> tuple[Any, bool]:
        return self.table[jnp.argmax(self.clean(pool), axis=-1)], False

    def sort(self, pool: Pool, depth: int) -> tuple[Any, bool]:
        x = self.clean(pool)
        if self.r.random() < 0.5:
            return jnp.sort(x, axis=self.r.randrange(2)), False
        values, at = jax.lax.top_k(x, 2)
        return x.at[jnp.arange(ROWS)[:, None], at].add(-0.5 * values), False

    def update(self, pool: Pool, depth: int) -> tuple[Any, bool]:
        (x, a), (y, b) = self.pick(pool), self.pick(pool)
        row = self.r.randrange(ROWS)
        return self.r.choice([lambda: jax.lax.dynamic_update_slice(x, y[row : row + 1] * 0.5, (jnp.int32(row), 0)),
                              lambda: x.at[row].set(y[0]), lambda: x.at[:, row].add(y[:, 0]),
                              lambda: jnp.concatenate([x[row:], y[:row]])])(), a or b  # fmt: skip

    def shuffle(self, pool: Pool, depth: int) -> tuple[Any, bool]:
        x, n = self.pick(pool)
        return self.r.choice([lambda: x.T.reshape(ROWS, COLS), lambda: jnp.flip(x, 0), lambda: jnp.pad(x, ((1, 0), (0, 0)))[:ROWS],
                              lambda: jnp.broadcast_to(x[:1], (ROWS, COLS)) + 0.1 * x, lambda: jnp.roll(x, 1, axis=1),
                              lambda: x * (jnp.arange(COLS) < 5)])(), n  # fmt: skip

    def narrow(self, pool: Pool, depth: int) -> tuple[Any, bool]:
        self.exact = False
        x, dtype = self.pick(pool)[0], self.r.choice([jnp.bfloat16, jnp.float16])
        return jnp.tanh((x.astype(dtype) @ self.w[0].astype(dtype)).astype(jnp.float32)), True

    def noise(self, pool: Pool, depth: int) -> tuple[Any, bool]:
        x, n = self.pick(pool)
        return x + 0.1 * jax.random.uniform(jax.random.fold_in(self.key, self.r.randrange(99)), (ROWS, COLS)), n

    def convolve(self, pool: Pool, depth: int) -> tuple[Any, bool]:
        x, n = self.pick(pool)
        kernel = self.w[1][:3, :1][None].transpose(0, 2, 1) * jnp.ones((COLS, 1, 1))
        made = jax.lax.conv_general_dilated(x.T[None], kernel, (1,), "SAME", feature_group_count=COLS)
        return jnp.tanh(made[0].T), n

    # --- what holds other programs
    def call(self, pool: Pool, depth: int) -> tuple[Any, bool]:
        x, n = self.pick(pool)
        wrap = self.r.choice([jax.jit, jax.checkpoint, lambda f: f])
        inner = self.r.choice([_cubed, _softsign, jax.nn.relu, lambda v: self.steps([(v, n)], 2, depth + 1)[-1][0]])
        if wrap is jax.jit:  # an inner jit is cached by its function: a new one each time
            return jax.jit(lambda v: inner(v))(x), True
        return wrap(inner)(x), True

    def layers(self, pool: Pool, depth: int) -> tuple[Any, bool]:
        x, n = self.pick(pool)
        salt, reverse = self.r.randrange(10**6), self.r.random() < 0.3

        def layer(h: Any, w: Any) -> tuple[Any, Any]:
            inner = Drawer(salt, jnp.stack([w, w, w]), self.table, self.key)
            h = inner.steps([(jnp.tanh(h @ w) + h * 0.5, n)], 1, depth + 1)[-1][0]
            self.exact &= inner.exact
            return h, h.sum(-1)

        h, ys = jax.lax.scan(layer, x, self.w, reverse=reverse, unroll=self.r.choice([1, 1, 2]))
        return h + 0.01 * ys.sum(0)[:, None], True

    def repeat(self, pool: Pool, depth: int) -> tuple[Any, bool]:
        x, n = self.pick(pool)
        salt, times = self.r.randrange(10**6), self.r.randrange(0, 4)

        def step(i: Any, h: Any) -> Any:
            inner = Drawer(salt, self.w, self.table, self.key)
            h = inner.steps([(h + 0.1 * i, n)], 1, depth + 1)[-1][0]
            self.exact &= inner.exact
            return h

        if self.r.random() < 0.5:
            return jax.lax.fori_loop(0, times, step, x), True
        return jax.lax.while_loop(lambda s: s[0] < times, lambda s: (s[0] + 1, step(s[0], s[1])), (jnp.int32(0), x))[1], True

    def branch(self, pool: Pool, depth: int) -> tuple[Any, bool]:
        x, _ = self.pick(pool)
        salt = self.r.randrange(10**6)

        def arm(k: int) -> Callable[[Any], Any]:
            def run(v: Any) -> Any:
                inner = Drawer(salt + k, self.w, self.table, self.key)
                out = inner.steps([(v, True)], 1, depth + 1)[-1][0]
                self.exact &= inner.exact
                return out

            return run

        which = jnp.argmax(self.clean(pool)[0]) % 2
        return jax.lax.switch(which, [arm(0), arm(1)], x), True


LEAVES = ["matmul", "attend", "elementwise", "reduce", "look_up", "sort", "update", "shuffle", "narrow", "noise", "convolve"]
INNER = ["call", "layers", "repeat", "branch"]
LOOPS = ["none", "none", "scan", "scan xs", "scan reverse", "while", "while stop", "fori"]


def draw(seed: int) -> tuple[Callable[..., Any], tuple[Any, ...], bool]:
    """A random program and its arguments; whether it is free of narrow floats."""
    rng = np.random.default_rng(seed)
    w = (rng.standard_normal((3, COLS, COLS)) * 0.5).astype(np.float32)
    table = rng.standard_normal((COLS, COLS)).astype(np.float32)
    x = rng.standard_normal((ROWS, COLS)).astype(np.float32)
    tokens = rng.integers(0, COLS, ROWS).astype(np.int32)
    exact = [True]

    def fn(weights: Any, x: Any, tokens: Any, key: Any, unused: Any) -> Any:
        w, table = weights["w"], weights["table"]
        d = Drawer(seed, w, table, key)
        pool: Pool = d.steps([(x + table[tokens], False)], d.r.randrange(3, 9))
        loop, length = d.r.choice(LOOPS), d.r.choice([0, 1, 2, 3, 5])
        results: list[Any] = []
        if loop != "none":
            made = _token_loop(d, loop, length, pool, tokens)
            results += jax.tree_util.tree_leaves(made)
        for _ in range(d.r.randrange(1, 4)):
            results.append(d.pick(pool)[0])
        exact[0] = d.exact
        extra = d.r.choice([(), (results[0],), (x,), (jnp.int32(seed),)])
        return (*results, *extra)

    args = ({"w": w, "table": table}, x, tokens, jax.random.key(seed), np.zeros((2, 3), np.float32))
    jax.eval_shape(fn, *args)
    return fn, args, exact[0]


def _token_loop(d: Drawer, loop: str, length: int, pool: Pool, tokens: Any) -> Any:
    start = pool[-1][0]
    salt, kinds = d.r.randrange(10**6), d.r.randrange(4)
    xs = jnp.arange(length * COLS, dtype=jnp.float32).reshape(length, COLS) * 0.01 if loop != "scan" else None

    def step(state: Any, x: Any) -> tuple[Any, Any]:
        token, cache, key, i, steady = state
        inner = Drawer(salt, d.w, d.table, key)
        h = inner.steps([(d.table[token] + 0.3 * steady + (0.0 if x is None else x), False)], 1 + salt % 4, 1)
        narrow = h[-1][0]
        score = jnp.tanh(h[0][0] @ d.w[0]) @ d.w[1] + 0.1 * cache.mean((0,))
        new = jnp.argmax(score, -1).astype(jnp.int32)
        cache = jax.lax.dynamic_update_slice(cache, jnp.tanh(score)[None], (i % 6, 0, 0))
        d.exact &= inner.exact
        key = jax.random.split(key)[0] if kinds % 2 else key
        return (new, cache, key, i + 1, steady), (new, narrow)

    cache = jnp.zeros((6, ROWS, COLS)).at[0].set(jnp.tanh(d.clean(pool)))
    state = (jnp.argmax(d.clean(pool) @ d.w[2], -1).astype(jnp.int32) if kinds >= 2 else tokens, cache, d.key, jnp.int32(0), start * 0 + 0.1)
    if loop.startswith("scan"):
        return jax.lax.scan(step, state, xs, length=length, reverse=loop == "scan reverse"), state[0]
    if loop == "fori":
        return jax.lax.fori_loop(0, length, lambda i, s: step(s, None)[0], state)[:2]
    ends = (lambda s: (s[3] < length) & (s[0][0] != 3)) if loop == "while stop" else (lambda s: s[3] < length)
    return jax.lax.while_loop(ends, lambda s: step(s, None)[0], state)[:2]
