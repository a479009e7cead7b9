"""Two callables that were written separately: what is right is no alarm, whatever the rounding, and what is wrong is one."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from partition.equivalence import check
from partition.errors import EquivalenceError


def test_rounding_that_cancellation_lays_bare_is_no_alarm_and_a_fault_of_its_size_is_one() -> None:
    rng = np.random.default_rng(0)
    a = (rng.standard_normal((64, 512)) * 30).astype(np.float32)
    b = np.concatenate([a, -a], axis=1) + rng.standard_normal((64, 1024)).astype(np.float32) * 1e-2  # sums of thousands that leave little

    def forwards(x: Any) -> Any:
        return jnp.cumsum(x, axis=1)[:, -1]

    def backwards(x: Any) -> Any:
        return jnp.cumsum(x[:, ::-1], axis=1)[:, -1]

    verdict = check(forwards, backwards, (b,))
    assert verdict.equal and verdict.outputs[0].rounding and verdict.outputs[0].relative > verdict.outputs[0].bound
    assert "as near to float64" in str(verdict)
    with pytest.raises(EquivalenceError, match="BEYOND"):
        check(forwards, backwards, (b,), tolerance={"float32": 1e-5})  # a bound of one's own is kept to
    with pytest.raises(EquivalenceError, match="BEYOND"):
        check(forwards, lambda x: backwards(x) * 1.01, (b,))


RNG = np.random.default_rng(0)
A, B = RNG.standard_normal((8, 64)).astype(np.float32), RNG.standard_normal((64, 64)).astype(np.float32)
MASK = np.arange(64) >= 60


def noisy(x: Any) -> Any:
    return (x + 3e3) - 3e3


def six(x: Any, w: Any, scale: float = 1.0) -> Any:
    x, w = jnp.asarray(x), jnp.asarray(w)
    for i in range(6):
        x = jnp.tanh(x @ w) * (scale if i == 3 else 1)
    return x


FAULTS: dict[str, tuple[Any, Any, tuple[Any, ...]]] = {
    "beside a mask": (lambda x, w: jnp.where(MASK, -1e9, x @ w), lambda x, w: jnp.where(MASK, -1e9, 0 * (x @ w)), (A, B)),
    "beside the least float": (lambda x, w: jnp.where(MASK, jnp.finfo(jnp.float32).min, x @ w), lambda x, w: jnp.where(MASK, jnp.finfo(jnp.float32).min, 1.001 * (x @ w)), (A, B)),
    "beside a noisy column": (lambda x: jnp.concatenate([noisy(x)[:, :1], jnp.tanh(x[:, 1:])], 1), lambda x: jnp.concatenate([noisy(x)[:, :1], jnp.tanh(x[:, 1:]) * (1 + 2e-4)], 1), (A,)),
    "in bfloat16": (six, lambda x, w: six(x, w, 1.05), (A.astype(jnp.bfloat16), (B / 8).astype(jnp.bfloat16))),
    "of complex numbers": (jnp.fft.fft, lambda x: jnp.fft.fft(x * 1.001), (A,)),
    "that JAX cannot trace": (jnp.tanh, lambda x: np.tanh(np.asarray(x)) * np.float32(1.001), (A,)),
}
CLEAN: dict[str, tuple[Any, Any, tuple[Any, ...]]] = {
    "another order beside a mask": (lambda x, w: jnp.where(MASK, -1e9, x @ w), lambda x, w: jnp.where(MASK, -1e9, x[:, ::-1] @ w[::-1]), (A, B)),
    "bfloat16 with wider sums": (six, lambda x, w: six(jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32)).astype(jnp.bfloat16), (A.astype(jnp.bfloat16), (B / 8).astype(jnp.bfloat16))),
    "complex numbers": (jnp.fft.fft, lambda x: jnp.fft.fft(x * 1.0000001), (A,)),
    "NumPy": (jnp.tanh, lambda x: np.tanh(np.asarray(x)), (A,)),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found(name: str) -> None:
    reference, candidate, args = FAULTS[name]
    with pytest.raises(EquivalenceError, match="BEYOND"):
        check(reference, candidate, args)


@pytest.mark.parametrize("name", CLEAN)
def test_what_is_right_is_no_fault(name: str) -> None:
    reference, candidate, args = CLEAN[name]
    assert check(reference, candidate, args).equal


def test_a_key_is_no_array_of_its_words() -> None:
    with pytest.raises(EquivalenceError, match="the candidate's is uint32"):
        check(lambda k: jax.random.split(k), lambda k: jax.random.key_data(jax.random.split(k)), (jax.random.key(0),))
