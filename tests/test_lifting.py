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


def turned(x: Any) -> Any:
    """As rotary positions are written with complex numbers, in a loop too, and a transform."""
    z = jax.lax.complex(x[:, ::2], x[:, 1::2])
    z = jax.lax.scan(lambda s, row: (s * jnp.exp(0.5j * row), None), z, jnp.arange(3))[0]
    return jnp.stack([z.real, z.imag], -1).reshape(x.shape) + jnp.fft.fft(x).real - jnp.conj(z).sum(1).imag[:, None]


def calls(x: Any) -> Any:
    return jax.jit(jax.nn.silu)(x) + jax.checkpoint(jnp.tanh)(x) + jax.nn.relu(x)


FORMS: dict[str, Callable[[Any], Any]] = {
    "loops": loops, "turned": turned, "calls": calls, "scatters": lambda x: x.at[jnp.array([2, 0])].add(x[:2]).at[1].min(0.125).at[:, 3].mul(2.0).at[0].max(0.25), "contractions": lambda x: jax.nn.softmax(x @ x.T) @ x,
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


def test_it_takes_the_way_that_the_program_chose() -> None:
    """At a near tie float64 would choose otherwise, and all that follows would be of another text: indices are the program's own, in loops, sorts and top-k too."""
    table = np.array([[1.0, 2.0], [-3.0, 5.0], [7.0, -4.0]], np.float32)

    def fn(x: Any) -> Any:
        def step(h: Any, _: Any) -> tuple[Any, Any]:
            near = jnp.stack([h[0] * 0 + 1, h[0] * 0 + 1 + 2.0**-10, h[1] * 0]).astype(jnp.bfloat16)  # equal in bfloat16, not before it was rounded
            chosen = jnp.argmax(near)
            _, sorted_rows = jax.lax.sort((-near, jnp.asarray(table)[:, 0]), num_keys=1)
            return jnp.asarray(table)[chosen] + h * 0.1, (chosen, jax.lax.top_k(near, 2)[1], sorted_rows)

        return jax.lax.scan(step, x, None, length=3)

    got = float64(jax.make_jaxpr(fn)(X[0, :2]), [X[0, :2]])
    want = jax.tree_util.tree_leaves(jax.jit(fn)(X[0, :2]))
    assert all(np.array_equal(a, b) for a, b in zip(got[1:3], want[1:3], strict=True)) and (got[1] == 0).all()
    assert got[0].dtype == np.float64 and np.allclose(got[0], want[0], atol=1e-6)
    assert np.array_equal(got[3], np.asarray(want[3], np.float64))
