"""The float64 oracle against JAX's own float64: the same function, traced with wide inputs under x64 (numbers written in it are of few bits, for a program holds
them as float32)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from partition._jax.lifting import float64

X = np.linspace(-1, 1, 32, dtype=np.float32).reshape(4, 8)


def loops(x: Any) -> Any:
    h, ys = jax.lax.scan(lambda h, row: (jnp.tanh(h + row), h * row), x[0] * 0, x, reverse=True)
    h = jax.lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, jnp.sin(s[1]) + x[1]), (0, h))[1]
    return jax.lax.switch(jnp.argmax(x[0]) % 2, [jnp.cos, jnp.exp], h) + ys.sum(0)


def calls(x: Any) -> Any:
    return jax.jit(jax.nn.silu)(x) + jax.checkpoint(jnp.tanh)(x) + jax.nn.relu(x)


FORMS: dict[str, Callable[[Any], Any]] = {
    "loops": loops, "calls": calls, "scatters": lambda x: x.at[jnp.array([2, 0])].add(x[:2]).at[1].min(0.125).at[:, 3].mul(2.0).at[0].max(0.25), "contractions": lambda x: jax.nn.softmax(x @ x.T) @ x,
    "sorts": lambda x: jnp.sort(x, 1) + jax.lax.top_k(x, 3)[0].sum(1, keepdims=True), "sums": lambda x: jnp.cumsum(x, 1) - x.mean(0) + jax.lax.reduce_precision(x, 8, 23),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(FORMS))
def test_it_is_jaxs_own_float64(name: str) -> None:
    fn = FORMS[name]
    got = float64(jax.make_jaxpr(fn)(X), [X])[0]
    with jax.enable_x64(True):
        want = np.asarray(jax.jit(fn)(jnp.asarray(X, jnp.float64)))
    assert got.dtype == np.float64 and np.allclose(got, want, rtol=1e-13, atol=1e-15)
    assert not np.array_equal(got, np.asarray(jax.jit(fn)(X), np.float64)) or name in ("scatters",)


def test_bits_and_keys_stay_the_programs() -> None:
    def fn(x: Any, key: Any) -> Any:
        return (jax.lax.bitcast_convert_type(x, jnp.int32) & 255, jax.random.uniform(key, (3,)), jax.random.split(key)[0])

    key = jax.random.key(3)
    got, want = float64(jax.make_jaxpr(fn)(X, key), [X, key]), jax.jit(fn)(X, key)
    assert np.array_equal(got[0], want[0]) and np.allclose(got[1], want[1], atol=1e-7) and np.array_equal(got[2], jax.random.key_data(want[2]))
