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
from jax.ad_checkpoint import checkpoint_name

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

    def rare(self, pool: Pool, depth: int) -> tuple[Any, bool]:
        """One of the primitives that models seldom use. What jumps (rounding, comparing, bits) is applied to arguments alone."""
        x, n = self.pick(pool)
        smooth = self.r.random() < 0.5
        name = self.r.choice(sorted(SMOOTH if smooth else JUMPING))
        made = SMOOTH[name](x) if smooth else JUMPING[name](self.table[:ROWS], (self.table[:ROWS] * 8).astype(jnp.int32), self.key)
        return jnp.tanh(jnp.nan_to_num(jnp.asarray(made, jnp.float32), posinf=1.0, neginf=-1.0).reshape(ROWS, COLS)) + 0.5 * x, n

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


def _barred(x: Any) -> Any:
    return jax.lax.optimization_barrier(x) * 2


def _grouped(x: Any) -> Any:
    return jax.lax.ragged_dot(x, jnp.stack([x.T @ x, 0.5 * x.T @ x]), jnp.array([1, 3], jnp.int32))


def _windows(how: Any, unit: Any) -> Callable[[Any], Any]:
    return lambda x: jax.lax.reduce_window(x, unit, how, (1, 3), (1, 1), "SAME")


def _scattered(how: Any) -> Callable[[Any], Any]:
    numbers = jax.lax.ScatterDimensionNumbers(update_window_dims=(1,), inserted_window_dims=(0,), scatter_dims_to_operand_dims=(0,))
    return lambda x: how(x, jnp.array([[2], [0]], jnp.int32), 0.5 * x[:2] + 1, numbers)


def _spread(x: Any) -> Any:
    return jax.grad(lambda v: jax.lax.reduce_window(v, -jnp.inf, jax.lax.max, (1, 2), (1, 2), "VALID").sum())(x)


SMOOTH: dict[str, Callable[[Any], Any]] = {
    "acos": lambda x: jnp.arccos(0.9 * jnp.tanh(x)), "acosh": lambda x: jnp.arccosh(1.5 + x * x), "asin": lambda x: jnp.arcsin(0.9 * jnp.tanh(x)), "asinh": jnp.arcsinh, "atan": jnp.arctan,
    "atan2": lambda x: jnp.arctan2(x, 1 + x * x), "atanh": lambda x: jnp.arctanh(0.9 * jnp.tanh(x)), "cbrt": lambda x: jnp.cbrt(1 + x * x), "cosh": jnp.cosh, "sinh": jnp.sinh,
    "tan": lambda x: jnp.tan(0.5 * jnp.tanh(x)), "erf": jax.lax.erf, "erfc": jax.lax.erfc, "erf_inv": lambda x: jax.lax.erf_inv(0.9 * jnp.tanh(x)), "exp2": lambda x: jax.lax.exp2(jnp.tanh(x)),
    "expm1": lambda x: jnp.expm1(jnp.tanh(x)), "log1p": lambda x: jnp.log1p(x * x), "log": lambda x: jnp.log(1 + x * x), "log2": lambda x: jnp.log2(1 + x * x), "logistic": jax.nn.sigmoid,
    "lgamma": lambda x: jax.lax.lgamma(1 + x * x), "digamma": lambda x: jax.lax.digamma(1 + x * x), "igamma": lambda x: jax.lax.igamma(1 + x * x, 1 + jnp.abs(x)),
    "igammac": lambda x: jax.lax.igammac(1 + x * x, 1 + jnp.abs(x)), "polygamma": lambda x: jax.lax.polygamma(jnp.ones_like(x), 1 + x * x), "pow": lambda x: jnp.power(1 + x * x, 0.3), "integer_pow": lambda x: jax.lax.integer_pow(x, 3), "square": jax.lax.square,
    "abs": jnp.abs, "neg": lambda x: -x, "min": lambda x: jnp.minimum(x, 0.3), "clamp": lambda x: jax.lax.clamp(-0.5, x, 0.5), "exp": lambda x: jnp.exp(jnp.tanh(x)), "cos": jnp.cos,
    "cumprod": lambda x: jnp.cumprod(1 + 0.1 * jnp.tanh(x), 1), "cummax": lambda x: jax.lax.cummax(x, 1), "cummin": lambda x: jax.lax.cummin(x, 0), "cumlogsumexp": lambda x: jax.lax.cumlogsumexp(x, 1),
    "reduce_prod": lambda x: x * jnp.prod(1 + 0.1 * jnp.tanh(x), 1, keepdims=True), "reduce_min": lambda x: x - x.min(1, keepdims=True), "reduce_precision": lambda x: jax.lax.reduce_precision(x, 8, 23),
    "complex": lambda x: (jax.lax.complex(x, 0.5 * x) * jnp.conj(jax.lax.complex(x, x))).real, "imag": lambda x: jnp.imag(jax.lax.complex(x, 2 * x)), "rev": lambda x: x[:, ::-1], "split": lambda x: jax.lax.split(x, (3, 5), axis=1)[1].sum(1, keepdims=True) + x,
    "stop_gradient": jax.lax.stop_gradient, "optimization_barrier": _barred, "dynamic_slice": lambda x: jax.lax.dynamic_slice(x, (1, 0), (2, COLS)).sum(0) + x, "tile": lambda x: jax.lax.tile(x[:2], (2, 1)),
    "transpose": lambda x: jnp.transpose(x.reshape(2, 2, COLS), (1, 0, 2)), "reduce_window_sum": _windows(jax.lax.add, 0.0), "reduce_window_max": _windows(jax.lax.max, -np.inf), "reduce_window_min": _windows(jax.lax.min, np.inf),
    "reduce_window": lambda x: jax.lax.reduce_window(x, 1.0, lambda a, b: a * b * 1.0, (1, 2), (1, 1), "SAME"), "reduce": lambda x: jax.lax.reduce(x, 0.0, lambda a, b: a + b * 1.0, (1,))[:, None] + x,
    "scatter": _scattered(jax.lax.scatter), "scatter_mul": _scattered(jax.lax.scatter_mul), "scatter_min": _scattered(jax.lax.scatter_min), "scatter_max": _scattered(jax.lax.scatter_max), "scatter-sub": _scattered(jax.lax.scatter_sub),
    "fft": lambda x: 0.3 * jnp.fft.fft(x).real, "zeta": lambda x: jax.scipy.special.zeta(1.5 + x * x, 1 + jnp.abs(x)), "bessel_i0e": jax.lax.bessel_i0e, "bessel_i1e": jax.lax.bessel_i1e,
    "regularized_incomplete_beta": lambda x: jax.scipy.special.betainc(1 + x * x, 2.0 + 0 * x, 0.5 + 0.4 * jnp.tanh(x)), "igamma_grad_a": jax.grad(lambda v: jax.lax.igamma(1 + v * v, 1.5 + 0 * v).sum()),
    "one_minus_square": jax.grad(lambda v: jnp.tanh(v).sum()),
    "select_and_scatter_add": _spread, "ragged_dot_general": _grouped, "add_any": jax.grad(lambda v: (v * jnp.sin(v)).sum()), "stack": lambda x: jnp.stack([x[:2], x[2:]]), "copy": lambda x: jnp.array(x, copy=True),
    "name": lambda x: checkpoint_name(x, "kept"), "squeeze": lambda x: jnp.squeeze(x[None], 0), "expand_dims": lambda x: jnp.expand_dims(x, 0), "is_finite": lambda x: jnp.where(jnp.isfinite(x), x, 0.0),
    "concatenate": lambda x: jnp.concatenate([x[2:], x[:2]]), "unstack": lambda x: jnp.stack(jax.numpy.unstack(x, axis=0)[::-1]),
}  # fmt: skip
"""Primitives on any values."""

JUMPING: dict[str, Callable[[Any, Any, Any], Any]] = {
    "floor": lambda t, i, k: jnp.floor(4 * t), "ceil": lambda t, i, k: jnp.ceil(4 * t), "round": lambda t, i, k: jax.lax.round(4 * t), "sign": lambda t, i, k: jnp.sign(t), "rem": lambda t, i, k: jax.lax.rem(t, 0.3 + 0 * t),
    "nextafter": lambda t, i, k: jnp.nextafter(t, t + 1), "eq": lambda t, i, k: i == 3, "ne": lambda t, i, k: i != 3, "ge": lambda t, i, k: t >= 0.2, "le": lambda t, i, k: t <= 0.2, "gt": lambda t, i, k: t > 0.1, "lt": lambda t, i, k: t < 0.1,
    "and": lambda t, i, k: (i & 5) * 0.1, "or": lambda t, i, k: (i | 5) * 0.1, "xor": lambda t, i, k: (i ^ 5) * 0.1, "not": lambda t, i, k: (~i) * 0.1, "shift_left": lambda t, i, k: (i << 1) * 0.1,
    "shift_right_arithmetic": lambda t, i, k: (i >> 1) * 0.1, "shift_right_logical": lambda t, i, k: jax.lax.shift_right_logical(i, jnp.full_like(i, 28)) * 0.1, "population_count": lambda t, i, k: jax.lax.population_count(i) * 0.1,
    "clz": lambda t, i, k: jax.lax.clz(i) * 0.1, "bitcast_convert_type": lambda t, i, k: (jax.lax.bitcast_convert_type(t, jnp.int32) & 255) * 0.01, "argmin": lambda t, i, k: jnp.argmin(t, 1)[:, None] + t,
    "reduce_and": lambda t, i, k: jnp.all(t > -3, 1)[:, None] + t, "reduce_or": lambda t, i, k: jnp.any(t > 1, 1)[:, None] + t, "reduce_xor": lambda t, i, k: jax.lax.reduce_xor(i, axes=(1,))[:, None] * 0.1 + t,
    "approx_top_k": lambda t, i, k: jax.lax.approx_max_k(t, 2)[0].sum(1)[:, None] + t, "searchsorted": lambda t, i, k: jnp.searchsorted(jnp.arange(8) * 0.2, t) * 0.1, "random_bits": lambda t, i, k: (jax.random.bits(k, (ROWS, COLS)) & 255) * 0.01,
    "random_split": lambda t, i, k: jax.random.normal(jax.random.split(k)[1], (ROWS, COLS)), "random_gamma": lambda t, i, k: jax.random.gamma(k, 2.0, (ROWS, COLS)), "random_seed": lambda t, i, k: jax.random.normal(jax.random.key(i[0, 0]), (ROWS, COLS)),
    "random_wrap": lambda t, i, k: jax.random.normal(jax.random.wrap_key_data(jax.random.key_data(k)), (ROWS, COLS)), "random_clone": lambda t, i, k: jax.random.normal(jax.random.clone(k), (ROWS, COLS)),
    "rng_bit_generator": lambda t, i, k: (jax.lax.rng_bit_generator(jnp.arange(4, dtype=jnp.uint32), (ROWS, COLS))[1] & 255) * 0.01, "threefry2x32": lambda t, i, k: (jax.random.key_data(jax.random.fold_in(k, 3))[0] & 255) * 0.01 + t,
    "real": lambda t, i, k: jnp.real(jax.lax.complex(t, 2 * t)), "iota": lambda t, i, k: jax.lax.broadcasted_iota(jnp.float32, (ROWS, COLS), 1) * 0.1,
}  # fmt: skip
"""Primitives on arguments alone: floats, integers, a key."""

ELSEWHERE = {
    name: "of several devices: tests of shard_map hold it" for name in ("all_gather", "all_gather_invariant", "all_to_all", "axis_index", "mesh_cast", "pbroadcast", "pmax", "pmin", "ppermute", "psum",
                                                                        "psum_invariant", "pvary", "reduce_scatter", "reshard", "sharding_constraint")
} | {
    name: "an opaque call: test_opaque.py" for name in ("custom_partitioning", "ffi_call", "pallas_call", "pure_callback", "tpu_custom_call")
} | {
    name: "no user writes it, or not every JAX that is supported makes it" for name in ("SearchSorted", "copy_p", "create_token", "device_put", "dim_as_value", "empty", "polynomial", "scatter_add", "scatter_min", "scatter_max", "scatter_mul", "random_unwrap", "conj", "split", "stack", "unstack",
                                                                                 "stop_gradient", "searchsorted", "square", "tile", "copy", "expand_dims", "log2", "threefry2x32", "random_gamma_grad",
                                                                                 "eq_to", "le_to", "lt_to", "mulhi", "one_minus_square")
}  # fmt: skip
"""Primitives with a work rule that random programs need not have, and why."""

LEAVES = ["rare", "rare", "matmul", "attend", "elementwise", "reduce", "look_up", "sort", "update", "shuffle", "narrow", "noise", "convolve"]
INNER = ["call", "layers", "repeat", "branch"]
LOOPS = ["none", "none", "scan", "scan xs", "scan reverse", "while", "while stop", "while flag", "fori"]


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
        token, cache, key, i, steady, one, other = state
        inner = Drawer(salt, d.w, d.table, key)
        h = inner.steps([(d.table[token] + 0.3 * steady + (0.0 if x is None else x), False)], 1 + salt % 4, 1)
        narrow = h[-1][0]
        score = jnp.tanh(h[0][0] @ d.w[0]) @ d.w[1] + 0.1 * cache.mean((0,))
        new = jnp.argmax(score, -1).astype(jnp.int32)
        cache = jax.lax.dynamic_update_slice(cache, jnp.tanh(score)[None], (i % 6, 0, 0))
        d.exact &= inner.exact
        key = jax.random.split(key)[0] if kinds % 2 else key
        return (new, cache, key, i + 1, steady, other, jnp.sin(one + 0.1 * score)), (new, narrow, *((token, cache, i, steady) if salt % 3 == 0 else ()))  # the last: as the trip found them

    cache = jnp.zeros((6, ROWS, COLS)).at[0].set(jnp.tanh(d.clean(pool)))
    state = (jnp.argmax(d.clean(pool) @ d.w[2], -1).astype(jnp.int32) if kinds >= 2 else tokens, cache, d.key, jnp.int32(0), start * 0 + 0.1, start * 0 + 0.3, start * 0 + 0.7)
    read = (0, 1, *((5, 6, 5)[salt % 5 : salt % 5 + 2]))  # of two carries that change places: both, either, none
    if loop.startswith("scan"):
        last, rows = jax.lax.scan(step, state, xs, length=length, reverse=loop == "scan reverse")
        return [last[n] for n in (*read, 2, 3, 4)], rows, state[0]
    if loop == "fori":
        last = jax.lax.fori_loop(0, length, lambda i, s: step(s, None)[0], state)
    elif loop == "while flag":  # the condition is a carry as it is
        last = jax.lax.while_loop(lambda s: s[0], lambda s: (s[1][3] + 1 < length, step(s[1], None)[0]), (jnp.int32(0) < length, state))[1]
    else:
        ends = (lambda s: (s[3] < length) & (s[0][0] != 3)) if loop == "while stop" else (lambda s: s[3] < length)
        last = jax.lax.while_loop(ends, lambda s: step(s, None)[0], state)
    return [last[n] for n in read]
