"""Two programs that were written separately: the candidate's op where they part is named, and what only one of them computes on the way is not."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen
from mutants import CHANGES, changed, places

import partition as pt
from models import llama
from partition import _jax
from partition.errors import EquivalenceError, ExecutionError

KEYS = jax.random.split(jax.random.key(0), 5)
W = {n: jax.random.normal(k, shape) for n, k, shape in zip("abcd", KEYS, ((6, 8), (6, 8), (8, 5), (6, 6)), strict=False)}
X = jax.random.normal(KEYS[4], (3, 6))
TABLE = jnp.arange(8.0)


def gated(w: Any, x: Any) -> Any:
    h = jnp.tanh(x @ w["a"]) * jax.nn.sigmoid(x @ w["b"])
    return jax.nn.softmax(h @ w["c"])


def by_two(w: Any, x: Any) -> Any:
    """The same as two devices compute it."""
    (a, e), (b, f), (c, d) = (jnp.split(w[n], 2, axis=i) for n, i in (("a", 1), ("b", 1), ("c", 0)))
    one, other = jnp.tanh(x @ a) * jax.nn.sigmoid(x @ b), jnp.tanh(x @ e) * jax.nn.sigmoid(x @ f)
    return jax.nn.softmax(one @ c + other @ d)


def stale(w: Any, x: Any) -> Any:
    (a, e), (b, _), (c, d) = (jnp.split(w[n], 2, axis=i) for n, i in (("a", 1), ("b", 1), ("c", 0)))
    one = jnp.tanh(x @ a) * jax.nn.sigmoid(x @ b)
    other = jnp.tanh(x @ e) * jax.nn.sigmoid(x @ b)  # here
    return jax.nn.softmax(one @ c + other @ d)


def rounded(w: Any, x: Any) -> Any:
    gate = x @ w["b"]
    gate = gate.astype(jnp.bfloat16).astype(jnp.float32)  # here
    return jax.nn.softmax((jnp.tanh(x @ w["a"]) * jax.nn.sigmoid(gate)) @ w["c"])


def shifted(w: Any, x: Any) -> Any:
    h = jnp.tanh(x @ w["a"])
    h = h * jax.nn.sigmoid(jnp.roll(x, 1, axis=0) @ w["b"])  # here
    return jax.nn.softmax(h @ w["c"])


def added(w: Any, x: Any) -> Any:
    return x @ w["a"] + TABLE


def added_other(w: Any, x: Any) -> Any:
    return x @ w["a"] + (TABLE + 1e-3)  # here


def looped(w: Any, x: Any) -> Any:
    return jax.lax.fori_loop(0, 5, lambda i, h: jnp.tanh(h @ w["d"]) + h * 0.5, x)


def looped_other(w: Any, x: Any) -> Any:
    def body(i: Any, h: Any) -> Any:
        h = jnp.tanh(h @ w["d"]) + h * 0.51  # here
        return h

    return jax.lax.fori_loop(0, 5, body, x)


def commuted(w: Any, x: Any) -> Any:
    h = jax.nn.sigmoid(x @ w["b"]) * jnp.tanh(x @ w["a"])  # another order, the same numbers
    return jax.nn.softmax((h + 1e-3) @ w["c"])  # here


def two(w: Any, x: Any) -> Any:
    k, v = x @ w["a"], x @ w["b"]
    return jnp.tanh(k), jnp.sin(v)


def two_of_one(w: Any, x: Any) -> Any:
    k, _ = x @ w["a"], x @ w["b"]
    return jnp.tanh(k), jnp.sin(k)  # here


def experts(w: Any, x: Any, count: int = 2) -> Any:
    scores, chosen = jax.lax.top_k(x @ w["d"], count)  # here
    return jnp.einsum("nk,nkf->nf", jax.nn.softmax(scores), w["a"][chosen])


def fewer_experts(w: Any, x: Any) -> Any:
    return experts(w, x, 1)


def scaled(w: Any, x: Any) -> Any:
    return jnp.tanh(x @ w["a"]) * (1 + 6e-6)  # here: within the bound of each number, and of all together too much


def unscaled(w: Any, x: Any) -> Any:
    return jnp.tanh(x @ w["a"])


def line_of(fn: Callable[..., Any]) -> str:
    lines, first = inspect.getsourcelines(fn)
    return f"test_counterparts.py:{first + next(i for i, line in enumerate(lines) if '  # here' in line)}"


@pytest.mark.parametrize(("reference", "candidate"), [(gated, stale), (gated, rounded), (gated, shifted), (added, added_other), (looped, looped_other), (gated, commuted), (two, two_of_one), (unscaled, scaled)], ids=lambda f: f.__name__)
@pytest.mark.parametrize("jit", [False, True])
def test_the_candidates_own_line_is_named(reference: Any, candidate: Any, jit: bool) -> None:
    other = jax.jit(candidate) if jit else candidate
    with pytest.raises(EquivalenceError) as error:
        pt.check(reference, other, (W, X))
    assert line_of(candidate) in error.value.where, error.value
    assert error.value.verdict.culprit in str(error.value.verdict) and "of reference and candidate" in str(error.value.verdict)  # type: ignore[attr-defined]


def test_a_choice_of_fewer_is_named_itself() -> None:
    with pytest.raises(EquivalenceError, match=r"top_k.*op has k = 1, not 2") as error:
        pt.check(experts, fewer_experts, (W, X))
    assert line_of(experts) in error.value.where


def test_a_candidate_that_computes_in_parts_is_equal() -> None:
    verdict = pt.check(gated, by_two, (W, X))
    assert verdict.equal and "is the candidate right?" in str(verdict) and "stage" not in str(verdict)


class Net(linen.Module):
    scale: float = 1.0

    @linen.compact
    def __call__(self, x: Any) -> Any:
        x = linen.Dense(8)(x) * self.scale
        return linen.LayerNorm()(linen.Dense(4)(x))  # here


def test_inside_a_library_the_users_line_comes_first() -> None:
    weights = Net().init(jax.random.key(0), X)
    program = pt.trace(Net().apply, weights, X)
    said = {program.source(op) for op in program.graph.ops if op.primitive == "rsqrt"}
    assert len(said) == 1 and f"{line_of(Net)} (Net.__call__) through flax/linen/normalization.py:" in said.pop()


def model(dtype: str) -> tuple[Any, Any]:
    return llama.generation("tiny", batch=1, prompt=10, new_tokens=4, seed=0, logits=True, dtype=dtype)


@pytest.mark.parametrize("kind", ["sin for cos", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("a cast", "a difference for a sum", "operands exchanged", "a slice moved"))])
def test_the_op_of_a_mutant_of_a_model_is_named(kind: str) -> None:
    """Before the token loop and inside it, in a callable that is no cut of ours."""
    fn, args = model("float32")
    jaxpr = jax.make_jaxpr(fn)(*args)
    tree = jax.tree_util.tree_structure(jax.eval_shape(fn, *args))
    ways = list(places(jaxpr, CHANGES[kind]))
    for deep in {len(w) for w in ways}:
        seen = False
        for way in [w for w in ways if len(w) == deep][-1:-20:-6]:  # some change nothing, such as the sign of a zero
            other, victim = changed(jaxpr, CHANGES[kind], way)
            try:
                pt.check(fn, lambda *a, other=other: jax.tree_util.tree_unflatten(tree, _jax.as_function(other)(*jax.tree_util.tree_leaves(a))), args)
            except EquivalenceError as error:
                seen = True
                assert _jax.source(victim).split(" ")[0] in error.where, (way, error)
                break
        assert seen, deep


@pytest.mark.slow
def test_a_model_in_bfloat16_with_logits_in_float32_is_as_good_as_bfloat16() -> None:
    """Traced, it fuses otherwise than called: its float32 logits are no nearer to float64 for that, and are held against it."""
    fn, args = model("bfloat16")
    verdict = pt.check(fn, jax.jit(fn), args)
    assert verdict.equal
    with pytest.raises(EquivalenceError):
        pt.check(fn, lambda *a: (fn(*a)[0], fn(*a)[1] * 1.1), args)


def grown(w: Any, x: Any) -> Any:
    for _ in range(3):
        x = x + jnp.tanh(x @ w["a"]) @ w["a"].T
    return x


BF16 = X.astype(jnp.bfloat16)


def test_what_stands_behind_all_that_both_compute_is_named() -> None:
    for candidate, op in ((lambda w, x: grown(w, x) * 1.01, "mul"), (lambda w, x: grown(w, x)[::-1], "rev"), (lambda w, x: grown(w, x).astype(jnp.bfloat16).astype(jnp.float32), "convert_element_type")):
        with pytest.raises(EquivalenceError, match=rf"op \d+ \({op}\)"):
            pt.check(grown, candidate, (W, X))


@pytest.mark.parametrize("candidate", [lambda x: (x @ x.T).astype(jnp.float32), lambda x: (x @ x.T)[:2], lambda x: (x @ x.T).astype(jnp.float16)])
def test_another_type_or_shape_is_never_equal(candidate: Any) -> None:
    with pytest.raises(EquivalenceError, match=r"the candidate's is b?float"):
        pt.check(lambda x: x @ x.T, candidate, (BF16,))


def test_a_bias_within_bounds_is_held_against_float64() -> None:
    """1.02 of everything is two roundings of the largest number, and ten of the rms of all."""
    with pytest.raises(EquivalenceError):
        pt.check(lambda x: x @ x.T, lambda x: (x @ x.T) * jnp.bfloat16(1.02), (BF16,))


def test_noise_where_the_truth_is_nothing_is_no_alarm() -> None:
    """The gradient of a key's bias is zero; each way to compute it leaves other noise."""

    def loss(w: Any, x: Any) -> Any:
        q, k = x @ w["a"] + 0.1, x @ w["b"] + w["bias"]
        return (jax.nn.softmax(q @ k.T) @ x).sum() ** 2

    w = {**W, "bias": jnp.ones(8)}
    for dtype in (jnp.float32, jnp.bfloat16):
        narrow = jax.tree_util.tree_map(lambda a, dtype=dtype: a.astype(dtype), w)
        assert pt.check(jax.grad(loss), jax.jit(jax.grad(loss)), (narrow, X.astype(dtype))).equal
    assert pt.check(lambda x: (x + 1) - (1 + x), lambda x: ((x + 1) - 1) - x, (X,)).equal
    with pytest.raises(EquivalenceError):
        pt.check(lambda x: (x + 1) - (1 + x), lambda x: x * 1e-4, (X,))


def test_arguments_may_be_donated_or_written_into() -> None:
    given = jax.jit(lambda w, x: (w - x, x), donate_argnums=0)
    assert pt.check(given, given, (X, X + 1)).bitwise

    def inside(a: Any) -> Any:
        a += 1
        return a

    assert pt.check(inside, inside, (np.ones(4),)).bitwise


def test_what_shows_nothing_is_said() -> None:
    def last(x: Any) -> Any:
        return jnp.argmax(x, -1)

    assert "give logits" in pt.check(last, last, (X,)).not_shown[0]
    with pytest.raises(EquivalenceError, match="every number of argument"):
        pt.check(last, last, (X * np.nan,))
    with pytest.raises(ExecutionError, match="is a str"):
        pt.check(lambda x: "text", lambda x: "text", (X,))


def test_what_the_rounding_of_narrow_floats_hides_is_looked_for_in_float64() -> None:
    key = jax.random.split(jax.random.key(1), 2)
    x, w = jax.random.normal(key[0], (4, 6, 16), jnp.bfloat16), jax.random.normal(key[1], (16, 16), jnp.bfloat16) / 4

    def model(factor: float, wide: bool = True) -> Any:
        def fn(w: Any, x: Any) -> Any:
            scores = (x @ w) @ x.swapaxes(1, 2)
            scores = scores.astype(jnp.float32) if wide else scores
            return jax.nn.softmax(scores * factor).astype(x.dtype) @ x

        return fn

    right = pt.check(model(1.0), model(1.0, wide=False), (w, x))
    assert right.equal and not right.bitwise and not any("in float64" in n for n in right.not_shown)
    with pytest.raises(EquivalenceError, match="of scale apart in float64, which no rounding explains"):
        pt.check(model(1.0), model(1.02), (w, x))
    assert any("in float64 the two are" in n for n in pt.check(model(1.0), model(1.002), (w, x)).not_shown)


def attention(fault: str) -> Callable[..., Any]:
    """One head with a cache: a prompt, then tokens in a loop; what the loop keeps is faulty where a fault is named."""

    def step(w: Any, x: Any, keys: Any, values: Any, at: Any) -> tuple[Any, Any, Any]:
        k, v, q = x @ w["d"], jnp.tanh(x) @ w["d"], jnp.sin(x)
        keys = jax.lax.dynamic_update_slice(keys, k, (at, 0))
        new = jax.lax.dynamic_update_slice(values, v, (at, 0))
        scores = q @ keys.T
        if fault != "no scale":
            scores = scores * 0.4
        if fault == "no mask":
            open_ = jnp.ones((), bool)
        else:
            open_ = jnp.arange(8) <= at + len(x)
        y = jax.nn.softmax(jnp.where(open_, scores, -1e9)) @ new  # the mask
        return (y, new, keys) if fault == "swapped" else (y, keys, values if fault == "stale" and len(x) == 1 else new)

    def fn(w: Any, x: Any) -> Any:
        y, keys, values = step(w, x, jnp.zeros((8, 6)), jnp.zeros((8, 6)), 0)

        def body(s: Any, _: Any) -> Any:
            x, keys, values, at = s
            y, keys, values = step(w, x, keys, values, at)
            return (y, keys, values, at + 1), y

        return jax.lax.scan(body, (y[-1:], keys, values, len(x)), None, length=4)[1]

    return fn


@pytest.mark.parametrize(("fault", "named"), [
    ("swapped", r"op \d+ \(scan\).*: it reads .* in place of "), ("stale", r"inside it op \d+ \(dynamic_update_slice\).*: it reads input \d of the body in place of the reference.s input \d"),
    ("no scale", r"it reads op \d+ \(dot_general\).*in place of the reference.s op \d+ \(mul\)"), ("no mask", r"select_n.*# the mask|test_counterparts"),
])  # fmt: skip
def test_a_value_in_the_place_of_another_is_named_with_what_should_be_there(fault: str, named: str) -> None:
    with pytest.raises(EquivalenceError) as error:
        pt.check(attention(""), attention(fault), (W, X))
    assert error.value.verdict is not None and re.search(named, str(error.value.verdict.culprit)), error.value.verdict.culprit
