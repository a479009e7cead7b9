"""trace(): names, roles, constants and source lines of what was traced, calls inlined, and refusals that name the user's line."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import io_callback

from partition.errors import TraceError
from partition.graph import Role, verify
from partition.program import compile_cache, trace

HERE = Path(__file__).name
LINES = Path(__file__).read_text().splitlines()


def line_of(mark: str) -> int:
    return next(n for n, line in enumerate(LINES, 1) if line.endswith(f"# {mark}"))


def struct(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


W = struct(4, 4)
X = struct(2, 4)


def test_roles_and_names_of_leaves() -> None:
    def fn(weights: Any, tokens: Any, key: Any) -> Any:
        return tokens["x"] @ weights["a"]["k"] + weights["b"][1] + key

    args = ({"a": {"k": W}, "b": [struct(3), struct(4)]}, {"x": X}, struct())
    program = trace(fn, *args)
    leaves = [(t.role, t.name) for t in (program.graph.tensors[i] for i in program.graph.inputs)]
    assert leaves == [
        (Role.PARAM, "a.k"), (Role.PARAM, "b.0"), (Role.PARAM, "b.1"), (Role.INPUT, "x"), (Role.INPUT, "arg2"),
    ]  # fmt: skip
    assert program.weight_bytes == 4 * (16 + 3 + 4)
    assert program.entry.name == "fn" and program.op.keys() == {o.id for o in program.graph.walk()}


def test_the_caller_says_which_arguments_are_weights() -> None:
    g = trace(lambda x, w: x @ w, X, W, weights=(1,)).graph
    assert [g.tensors[t].role for t in g.inputs] == [Role.INPUT, Role.PARAM]
    assert trace(lambda x, w: x @ w, X, W, weights=(), name="plain").weight_bytes == 0


def test_source_is_the_authors_line() -> None:
    def fn(w: jax.Array, x: jax.Array) -> jax.Array:
        y = x @ w  # the contraction

        def step(c: jax.Array, _: None) -> tuple[jax.Array, None]:
            return jnp.sin(c), None  # the body

        return jax.lax.scan(step, y, None, length=2)[0]

    program = trace(fn, W, X)
    source = {o.primitive: program.source(o) for o in program.graph.walk()}
    assert f"{HERE}:{line_of('the contraction')}" in source["dot_general"] and "fn" in source["dot_general"]
    assert f"{HERE}:{line_of('the body')}" in source["sin"]


def test_closures_become_constants_with_their_values() -> None:
    table, scale = np.arange(8, dtype=np.float32).reshape(4, 2), jnp.full((2,), 3.0)

    def fn(w: jax.Array, x: jax.Array) -> jax.Array:
        y = x @ table

        def step(c: jax.Array, _: None) -> tuple[jax.Array, None]:
            return c * scale, None

        return jax.lax.scan(step, y, None, length=2)[0]

    program = trace(fn, W, X)
    verify(program.graph)
    lowered = program.entry.lowered
    consts = [t for t in program.graph.tensors if t.role is Role.CONST]
    assert sorted(t.shape for t in consts) == [(2,), (4, 2)]
    for t in consts:
        np.testing.assert_array_equal(lowered.values[t.id], table if t.shape == (4, 2) else scale)
    assert program.weight_bytes == 64  # constants are no weights


def test_custom_rules_remat_and_nested_jit_are_inlined() -> None:
    @jax.custom_jvp
    def sine(x: jax.Array) -> jax.Array:
        return jnp.sin(x)

    sine.defjvp(lambda p, t: (sine(p[0]), t[0]))

    @jax.custom_vjp
    def cosine(x: jax.Array) -> jax.Array:
        return jnp.cos(x)

    cosine.defvjp(lambda x: (jnp.cos(x), x), lambda r, g: (g,))

    def fn(w: jax.Array, x: jax.Array) -> jax.Array:
        x = jax.jit(lambda v: jax.jit(jnp.tanh)(v) @ w)(x)
        return jax.checkpoint(jnp.exp)(cosine(sine(x)))

    program = trace(fn, W, X)
    verify(program.graph)
    assert [o.primitive for o in program.graph.ops] == ["tanh", "dot_general", "sin", "cos", "exp"]


def test_a_branch_on_a_value_gives_the_users_line() -> None:
    def inner(x: jax.Array) -> jax.Array:
        return x if x.sum() > 0 else -x  # the branch

    with pytest.raises(TraceError, match="TracerBoolConversionError") as caught:
        trace(lambda w, x: jax.jit(inner)(x), W, X)
    assert f"{HERE}:{line_of('the branch')} (inner)" in caught.value.where
    assert "no Python branches" in caught.value.mend


def test_shapes_that_do_not_match_give_the_users_line() -> None:
    def fn(w: jax.Array, x: jax.Array) -> jax.Array:
        return w @ x  # [4, 4] x [2, 4]

    with pytest.raises(TraceError, match="fn cannot be traced") as caught:
        trace(fn, W, X)
    assert f"{HERE}:{line_of('[4, 4] x [2, 4]')} (fn)" in caught.value.where


def test_the_users_line_in_a_folder_called_jax(tmp_path: Path) -> None:
    (tmp_path / "jax").mkdir()
    path = tmp_path / "jax" / "mine.py"
    path.write_text("def fn(w, x):\n    return w @ x\n")
    spec = importlib.util.spec_from_file_location("mine", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(TraceError) as caught:
        trace(module.fn, W, X)
    assert f"{path}:2 (fn)" in caught.value.where


def printing(w: jax.Array, x: jax.Array) -> jax.Array:
    jax.debug.print("{}", x)
    return x


def printing_inside(w: jax.Array, x: jax.Array) -> jax.Array:
    return jax.lax.scan(lambda c, _: (printing(w, c), None), x, None, length=2)[0]


def calling_in_order(w: jax.Array, x: jax.Array) -> jax.Array:
    io_callback(lambda v: None, None, x, ordered=True)
    return x


def printing_in_order(w: jax.Array, x: jax.Array) -> jax.Array:
    jax.debug.print("{}", x, ordered=True)
    return x


@pytest.mark.parametrize(("fn", "named"), [(printing_in_order, "debug_print|debug_callback"), (calling_in_order, "io_callback")])
def test_side_effects_are_refused_by_name_and_line(fn: Any, named: str) -> None:
    with pytest.raises(TraceError, match=f"{fn.__name__} has side effects that no stage can carry: ({named})") as caught:
        trace(fn, W, X)
    assert "test_program.py" in caught.value.where and "may stay" in caught.value.mend


@pytest.mark.parametrize("fn", [printing, printing_inside])
def test_prints_without_order_may_stay(fn: Any) -> None:
    from partition.equivalence import check
    from partition.pipeline import plan

    program = trace(fn, W, X)
    assert check(plan(program, cluster="trn2_only", policy="single").stages, np.zeros(W.shape, W.dtype), np.ones(X.shape, X.dtype)).equal


def test_unordered_side_effects_are_refused() -> None:
    def fn(w: jax.Array, x: jax.Array) -> jax.Array:
        io_callback(lambda v: None, None, x, ordered=False)
        return x * 2

    with pytest.raises(TraceError):
        trace(fn, W, X)


def test_what_was_compiled_is_kept_by_content(tmp_path: Path) -> None:
    code = """
import sys, time
import partition as pt
from models import llama
assert pt.compile_cache() is not None
fn, args = llama.generation("tiny", batch=1, prompt=8, new_tokens=4, seed=0)
stages = pt.plan(fn, args, cluster="trn2_efa_cs3", policy="phase_split").stages
print(pt.check(stages, *args).bitwise)
"""
    told = []
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200, env=os.environ | {"PARTITION_CACHE": str(tmp_path / "c")})
        assert done.stdout.strip() == "True", done.stderr[-2000:]
        told.append({p.name for p in (tmp_path / "c").iterdir() if not p.name.endswith("atime")})
    assert told[0] and told[0] == told[1]  # nothing was compiled the second time
    off = subprocess.run([sys.executable, "-c", "import partition as pt; print(pt.compile_cache())"], capture_output=True, text=True, timeout=60, env=os.environ | {"PARTITION_CACHE": "off"})
    assert off.stdout.strip() == "None"
    file = tmp_path / "file"
    file.write_text("")
    assert compile_cache(file / "no") is None
