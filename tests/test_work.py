"""Work: rules against hand arithmetic, loops and branches, a refusal instead of a silent zero, and XLA's own count."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from models import generate, llama
from partition.errors import WorkError
from partition.graph import Graph, Op, Role, Tensor
from partition.phases import is_weight
from partition.program import Program, trace
from partition.work import Work, work


def struct(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


INT = jnp.int32


def works(fn: Any, *args: Any, **keywords: Any) -> tuple[Program, dict[int, Work]]:
    program = trace(fn, *args)
    return program, work(program.graph, weights=is_weight(program), **keywords)


def one(primitive: str, fn: Any, *args: Any) -> tuple[dict[str, float], float, float]:
    """(flops, bytes read, bytes written) of the only op of that primitive."""
    program, found = works(fn, *args)
    (op,) = [o for o in program.graph.walk() if o.primitive == primitive]
    return dict(found[op.id].flops), found[op.id].read, found[op.id].written


def test_dot_general() -> None:
    # [5, 8] x [8, 3]: 2 x 5 x 3 x 8; reads 40 + 24 numbers, writes 15, of 4 bytes
    assert one("dot_general", lambda w, x: x @ w, struct(8, 3), struct(5, 8)) == ({"float32": 240}, 256, 60)


def test_dot_general_of_a_batch_in_sixteen_bits() -> None:
    half = jnp.bfloat16
    fn = lambda w, x: jnp.einsum("bij,bjk->bik", x, w, preferred_element_type=jnp.float32)  # noqa: E731
    # batch 2, [4, 8] x [8, 3]: 2 x 2 x 4 x 3 x 8; reads 64 + 48 numbers of 2 bytes, writes 24 of 4
    assert one("dot_general", fn, struct(2, 8, 3, dtype=half), struct(2, 4, 8, dtype=half)) == ({"bfloat16": 384}, 224, 96)


@pytest.mark.parametrize(("groups", "kernel_in"), [(1, 3), (3, 1)])
def test_conv(groups: int, kernel_in: int) -> None:
    fn = lambda w, x: lax.conv_general_dilated(x, w, (1, 1), "VALID", feature_group_count=groups)  # noqa: E731
    # [2, 3, 10, 10] by 6 kernels of 3 x 3: 2 x 6 x 8 x 8 results of 2 x kernel_in x 9 operations
    flops = 768 * 2 * kernel_in * 9
    assert one("conv_general_dilated", fn, struct(6, kernel_in, 3, 3), struct(2, 3, 10, 10)) == (
        {"float32": flops}, 4 * (600 + 6 * kernel_in * 9), 4 * 768)  # fmt: skip


EXPERTS = (struct(4, 16, 32), struct(64, 16), struct(4, dtype=INT))  # 4 groups of weights, 64 rows, rows of each group


def test_ragged_dot() -> None:
    # each of 64 rows meets one [16, 32]: 2 x 64 x 32 x 16
    flops = {"float32": 65536}
    assert one("ragged_dot_general", lambda w, x, n: lax.ragged_dot(x, w, n), *EXPERTS) == (flops, 4 * (2048 + 1024 + 4), 4 * 2048)


def test_few_rows_read_the_weights_of_few_groups() -> None:
    experts = struct(8, 16, 32)
    for rows, read in ((2, 2 * 16 * 32), (8, 8 * 16 * 32), (100, 8 * 16 * 32)):
        args = (experts, struct(rows, 16), struct(8, dtype=jnp.int32))
        assert one("ragged_dot_general", lambda w, x, n: lax.ragged_dot(x, w, n), *args)[1] == 4 * (rows * 16 + read + 8)


def test_ragged_dot_by_its_weights_is_as_much_work_as_forward() -> None:
    fn = lambda w, x, n: jax.grad(lambda w: lax.ragged_dot(x, w, n).sum())(w)  # noqa: E731
    assert one("ragged_dot_general", fn, *EXPERTS)[0] == {"float32": 65536}  # each row adds one [16] x [32] product


def test_gather_reads_rows_and_not_the_table() -> None:
    # 5 rows of 8 numbers and 5 indices of 4 bytes; the table has 1000 rows
    assert one("gather", lambda w, i: w[i], struct(1000, 8), struct(5, dtype=INT)) == ({}, 160 + 20, 160)


def test_dynamic_update_slice_moves_the_update() -> None:
    fn = lambda w, x, i: lax.dynamic_update_slice(w, x, (i, 0))  # noqa: E731
    assert one("dynamic_update_slice", fn, struct(1000, 8), struct(2, 8), struct(dtype=INT)) == ({}, 64, 64)


def test_scatter_add_reads_what_was_there() -> None:
    # 5 rows of 8: read rows and updates (160 each) and 5 indices (20), add 40 numbers, write 160
    fn = lambda w, x, i: w.at[i].add(x, mode="promise_in_bounds")  # noqa: E731
    assert one("scatter-add", fn, struct(1000, 8), struct(5, 8), struct(5, dtype=INT)) == ({"float32": 40}, 340, 160)


@pytest.mark.parametrize(("axis", "depth"), [(1, 10), (0, 3)])
def test_sort(axis: int, depth: int) -> None:
    # [8, 1024]: 8192 numbers, log2 of the sorted dimension comparisons each; once through memory each way
    assert one("sort", lambda w, x: lax.sort(x, dimension=axis), struct(1), struct(8, 1024)) == ({"float32": 8192 * depth}, 32768, 32768)


@pytest.mark.parametrize("axis", [1, 0])  # fmt: skip
def test_top_k(axis: int) -> None:
    depth = math.log2((8, 1024)[axis])
    flops, read, written = one("top_k", lambda w, x: lax.top_k(x, 2, axis=axis), struct(1), struct(8, 1024))
    assert (flops, read) == ({"float32": 8192 * depth}, 32768)
    assert written == (8192 // (8, 1024)[axis]) * 2 * (4 + 4)  # two numbers and two indices a row


def test_elementwise_ops_count_an_element_and_ride_along() -> None:
    assert one("tanh", lambda w, x: jnp.tanh(x), struct(1), struct(3, 4)) == ({"float32": 12}, 0, 0)
    assert one("add", lambda w, x: x + 1, struct(1), struct(3, 4, dtype=INT)) == ({}, 0, 0)
    assert one("reduce_sum", lambda w, x: x.sum(), struct(1), struct(3, 4)) == ({"float32": 12}, 0, 0)
    assert one("gt", lambda w, x: x > 0, struct(1), struct(3, 4))[1:] == (0, 0)


def test_attention_scores_stay_on_chip_and_weights_do_not() -> None:
    """q, k, v [64, 8]: scores of 64 x 64 are larger than both operands, so neither they nor their softmax see memory."""
    attend = lambda w, q, k, v: jax.nn.softmax(q @ k.T) @ v  # noqa: E731
    program, found = works(attend, struct(1), *[struct(64, 8)] * 3)
    first, second = [found[o.id] for o in program.graph.ops if o.primitive == "dot_general"]
    assert (first.read, first.written) == (2 * 64 * 8 * 4, 0)
    assert (second.read, second.written) == (64 * 8 * 4, 64 * 8 * 4)
    assert first.total_flops == second.total_flops == 2 * 64 * 64 * 8
    assert one("dot_general", lambda w, x: x @ w, struct(8, 64), struct(64, 8))[2] == 64 * 64 * 4  # a projection writes its result


def test_no_op_moves_less_than_nothing() -> None:
    attend = lambda w, q, k, v: jax.nn.softmax(q @ k.T) @ v  # noqa: E731
    _, found = works(attend, struct(1), *[struct(64, 8)] * 3)
    assert min(min(w.read, w.written) for w in found.values()) == 0


@pytest.mark.parametrize("fn", [
    lambda w, q, i: jnp.take_along_axis(q @ q.T, i, 1),
    lambda w, q, i: lax.dynamic_update_slice(q @ q.T, jnp.ones((1, 64)), (0, 0)),
], ids=["gather", "dynamic_update_slice"])  # fmt: skip
def test_no_op_on_a_part_of_an_on_chip_tensor_moves_less_than_nothing(fn: Any) -> None:
    _, found = works(fn, struct(1), struct(64, 8), struct(64, 1, dtype=INT))
    assert min(w.read for w in found.values()) >= 0


def test_scan_counts_its_trips() -> None:
    fn = lambda w, x: lax.scan(lambda c, _: (jnp.tanh(c @ w), None), x, None, length=7)[0]  # noqa: E731
    program, found = works(fn, struct(8, 8), struct(5, 8))
    (scan,) = program.graph.ops
    # one trip: [5, 8] x [8, 8] is 640 operations and 4 x (40 + 64 + 40) bytes, tanh is 40
    assert found[scan.id] == Work(flops={"float32": 7 * 680}, read=7 * 416, written=7 * 160, contractions=7, rows=7 * 5, macs=7 * 320)


@pytest.mark.parametrize("swapped", [False, True])
def test_cond_takes_its_dearest_branch(swapped: bool) -> None:
    branches = [lambda x, w: x @ w @ w, lambda x, w: x @ w][:: -1 if swapped else 1]
    program, found = works(lambda w, x, i: lax.cond(i > 0, *branches, x, w), struct(8, 8), struct(8, 8), struct(dtype=INT))
    (cond,) = [o for o in program.graph.ops if o.primitive == "cond"]
    assert found[cond.id].total_flops == 2 * 2 * 8**3 and found[cond.id].contractions == 2


def test_while_of_known_and_of_unknown_trips() -> None:
    def fn(w: jax.Array, x: jax.Array, start: jax.Array) -> Any:
        return lax.while_loop(lambda c: c[0] < 9, lambda c: (c[0] + 1, c[1] @ w), (start, x))[1]

    args = (struct(8, 8), struct(8, 8))
    program, found = works(lambda w, x: fn(w, x, jnp.int32(2)), *args)
    assert found[next(o.id for o in program.graph.ops if o.loop)].total_flops == 7 * 2 * 8**3
    with pytest.raises(WorkError, match="while loop runs a number of times") as caught:
        works(fn, *args, struct(dtype=INT))
    assert "trips=" in caught.value.mend and "op " in caught.value.where
    program, found = works(fn, *args, struct(dtype=INT), trips=5)
    assert found[next(o.id for o in program.graph.ops if o.loop)].total_flops == 5 * 2 * 8**3


def test_an_unknown_primitive_is_an_error_with_its_mend() -> None:
    table = [Tensor(id=n, shape=(4,), dtype="float32", role=Role.INPUT, name="", nbytes=16) for n in (0, 1)]
    op = Op(id=7, primitive="frobnicate", inputs=(0,), outputs=(1,), params={}, scope="layers.0")
    with pytest.raises(WorkError, match="no work rule knows the primitive 'frobnicate'") as caught:
        work(Graph(ops=(op,), inputs=(0,), outputs=(1,), tensors=table))
    assert caught.value.where == "op 7 in layers.0"
    assert "@partition.rule('frobnicate')" in caught.value.mend and "partition.Work(flops=" in caught.value.mend


numbers = st.builds(
    lambda a, b, r, w, c: Work(flops={"float32": a, "bfloat16": b}, read=r, written=w, contractions=c), *[st.integers(0, 10**12)] * 5
)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(numbers, numbers, st.integers(0, 1000))
def test_work_adds_up(a: Work, b: Work, n: int) -> None:
    assert a + b == b + a and (a + b) * n == a * n + b * n and a + Work() == a
    assert (a + b).total_flops == a.total_flops + b.total_flops and a.bytes == a.read + a.written


@pytest.mark.parametrize(("name", "prompt"), [("tiny", 16), ("tiny", 96), ("smollm2-135m", 64)])
def test_flops_of_a_prefill_agree_with_xla(name: str, prompt: int) -> None:
    cfg = llama.config(name)
    graphdef, state = nnx.split(llama.Llama(cfg, generate.shapes(cfg.dtype)))
    fn = lambda w, t: nnx.merge(graphdef, w).prefill(t, prompt)  # noqa: E731
    args = (state, struct(1, prompt, dtype=INT))
    program, found = works(fn, *args)
    assert not any(o.loop for o in program.graph.ops)
    ours = sum(found[o.id].total_flops for o in program.graph.ops)
    assert ours == pytest.approx(jax.jit(fn).lower(*args).cost_analysis()["flops"], rel=0.005)
