"""Costs against hand arithmetic on a made-up mesh, the limit that is hit, monotony, and a refusal of unknown arithmetic."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

import partition as pt
from partition.costs import Cost, cost, costs, peak
from partition.errors import WorkError
from partition.hardware import Device, Kind, Link, Memory, Mesh, Quantity
from partition.program import trace
from partition.sharding import layout
from partition.work import Work, work

quick = settings(max_examples=60, deadline=None, derandomize=True)


def q(value: float) -> Quantity:
    return Quantity(value=value, kind=Kind.ASSUMED, source="test")


def mesh(*, peak: float = 100e12, bandwidth: float = 1e12, beta: float = 100e9, count: int = 4, latency: float = 1e-6) -> Mesh:
    device = Device(
        name="d", title="Device D", peak={"float32": q(peak), "bfloat16": q(2 * peak)},
        memory=Memory(capacity=q(1e9), bandwidth=q(bandwidth), usable=q(0.9)), compute_efficiency=q(0.5), memory_efficiency=q(0.8),
        contraction_latency=q(latency), price=q(1e-3), power=q(500.0),
    )  # fmt: skip
    return Mesh(name="m", device=device, count=count, stand_in=1,
                fabric=Link(name="f", title="F", alpha=q(10e-6), beta=q(beta), price=q(0.0)) if count > 1 else None)  # fmt: skip


def test_mesh_adds_up_its_devices() -> None:
    assert mesh().capacity == pytest.approx(4 * 1e9 * 0.9) and mesh().price == pytest.approx(4e-3)


def test_formula() -> None:
    job = Work(flops={"float32": 4e9, "bfloat16": 8e9}, read=6e8, written=2e8, contractions=3)
    c = cost(job, mesh(), ways=4, collectives=[("all_reduce", 1e6, 4), ("all_gather", 1e6, 4)])
    assert c.compute == pytest.approx((4e9 / 50e12 + 8e9 / 100e12) / 4)  # 40 us: half of the peak, four ways
    assert c.memory == pytest.approx(8e8 / 0.8e12 / 4)  # 250 us
    assert c.link == pytest.approx(25e-6 + 17.5e-6)  # alpha + 3/4 of 10 us, twice for the all-reduce
    assert c.latency == pytest.approx(3e-6)
    assert c.busy == max(c.compute, c.memory) and c.seconds == pytest.approx(250e-6 + 42.5e-6 + 3e-6)
    assert c.limit == "memory"


@pytest.mark.parametrize(
    ("job", "collectives", "limit"),
    [
        (Work(flops={"float32": 1e12}, read=1e6, contractions=1), [], "compute"),
        (Work(flops={"float32": 1e6}, read=1e9, contractions=1), [], "memory"),
        (Work(flops={"float32": 1e6}, read=1e3, contractions=1), [("all_reduce", 1e9, 4)], "link"),
        (Work(flops={"float32": 1e6}, read=1e3, contractions=1), [], "latency"),
    ],
)
def test_limit(job: Work, collectives: Any, limit: str) -> None:
    assert cost(job, mesh(), collectives=collectives).limit == limit


def test_no_work_takes_no_time() -> None:
    assert cost(Work(), mesh()) == Cost() and Cost().seconds == 0.0


def test_a_dtype_that_the_profile_lacks() -> None:
    assert peak(mesh().device, "bfloat16") == 100e12
    with pytest.raises(WorkError, match="Device D has no float64 arithmetic") as caught:
        cost(Work(flops={"float64": 1}), mesh())
    assert "[device.peak]" in caught.value.where and "float32, bfloat16" in caught.value.mend


jobs = st.builds(lambda f, r, w, c: Work(flops={"float32": f}, read=r, written=w, contractions=c),
                 *[st.floats(0, 1e13)] * 3, st.integers(0, 9))  # fmt: skip


@quick
@given(jobs, st.floats(1, 100), st.integers(1, 4))
def test_more_is_never_slower(job: Work, more: float, ways: int) -> None:
    comm = [("all_reduce", job.written, 4)]
    base = cost(job, mesh(), ways=ways, collectives=comm).seconds
    for better in (mesh(bandwidth=1e12 * more), mesh(peak=100e12 * more), mesh(beta=100e9 * more), mesh(latency=1e-6 / more)):
        assert cost(job, better, ways=ways, collectives=comm).seconds <= base
    assert cost(job, mesh(), ways=ways + 1, collectives=comm).seconds <= base
    assert cost(job + job, mesh(), ways=ways, collectives=comm).seconds >= base


@quick
@given(jobs, jobs, st.integers(0, 50))
def test_costs_add_up(a: Work, b: Work, n: int) -> None:
    x, y = cost(a, mesh()), cost(b, mesh())
    assert (x + y).seconds == pytest.approx(x.seconds + y.seconds)
    assert ((x + y) * n).seconds == pytest.approx(n * (x.seconds + y.seconds))


# whole graphs ---------------------------------------------------------------------------------------------------------

W = jax.ShapeDtypeStruct((8, 8), jnp.float32)


def priced(fn: Any, *args: Any, where: Mesh | None = None, trips: int | None = None) -> tuple[dict[str, Cost], float]:
    """Cost of each op of the top level by primitive, and their sum in seconds."""
    where = where or mesh(count=1)
    program = trace(fn, *args)
    works = work(program.graph, trips=trips)
    found = costs(program.graph, works, layout(program.graph, where.count), where, trips)
    assert found.keys() == {o.id for o in program.graph.walk()}
    return {o.primitive: found[o.id] for o in program.graph.ops}, sum(found[o.id].seconds for o in program.graph.ops)


def test_a_loop_counts_its_trips_and_a_cond_its_dearest_branch() -> None:
    once = priced(lambda w, x: x @ w, W, W)[0]["dot_general"]
    # 2 x 8^3 operations at 50 TFLOP/s, 3 x 256 bytes at 0.8 TB/s, one contraction
    assert (once.compute, once.memory, once.latency) == pytest.approx((1024 / 50e12, 768 / 0.8e12, 1e-6))
    scan = priced(lambda w, x: lax.scan(lambda c, _: (c @ w, None), x, None, length=7)[0], W, W)[0]["scan"]
    assert scan.seconds == pytest.approx(7 * once.seconds)
    index = jax.ShapeDtypeStruct((), jnp.int32)
    for branches in ([lambda x, w: x @ w @ w, lambda x, w: x @ w], [lambda x, w: x @ w, lambda x, w: x @ w @ w]):
        cond = priced(lambda w, x, i, b=branches: lax.cond(i > 0, *b, x, w), W, W, index)[0]["cond"]
        assert cond.seconds == pytest.approx(2 * once.seconds)


def test_a_loop_of_unknown_trips_takes_the_callers_word() -> None:
    def fn(w: jax.Array, x: jax.Array, n: jax.Array) -> jax.Array:
        return lax.while_loop(lambda c: c[0] < n, lambda c: (c[0] + 1, c[1] @ w), (jnp.int32(0), x))[1]

    args = (W, W, jax.ShapeDtypeStruct((), jnp.int32))
    three, six = (priced(fn, *args, trips=n)[1] for n in (3, 6))
    assert six == pytest.approx(2 * three) and three > 0
    with pytest.raises(WorkError, match="the graph does not tell"):
        priced(fn, *args)


def test_a_mesh_pays_its_layouts_collectives_and_gains_its_ways() -> None:
    up, down, x = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1024, 4096), (4096, 1024), (1, 1024)))
    program = trace(lambda w, x: x + jnp.tanh(x @ w["up"]) @ w["down"], {"up": up, "down": down}, x)
    works, four_ways = work(program.graph), layout(program.graph, 4, tensor=True)
    alone, four = costs(program.graph, works, layout(program.graph, 1), mesh(count=1)), costs(program.graph, works, four_ways, mesh(count=4))
    up, down = [o.id for o in program.graph.ops if o.primitive == "dot_general"]
    assert four[up].compute == pytest.approx(alone[up].compute / 4) and four[up].link == 0
    assert four[down].compute == pytest.approx(alone[down].compute / 4)
    assert four[down].link == pytest.approx(10e-6 + 2 * 3 / 4 * 4096 / 100e9)  # one all-reduce of 4 KiB, by rows
    slow = dataclasses.replace(mesh(count=4), fabric=mesh(beta=50e9).fabric)
    assert costs(program.graph, works, four_ways, slow)[down].link > four[down].link


def test_what_a_server_adds_is_paid_once_a_step_and_escaped_by_no_block() -> None:
    """A phase on one mesh pays it all, once; a block that is moved takes its share along; what stands before the loop pays nothing a token."""
    fn, args = pt.model("tiny")(prompt=16, new_tokens=8)
    phases = pt.tag(pt.trace(fn, *args))
    base = pt.cluster("trn2_efa_cs3")
    with_fees, without = (pt.pose(phases, base.replace({"trn2.systolic.start": start, "trn2.systolic.step": step}), sharding="tensor") for start, step in (("10 ms", "1 ms"), ("0 s", "0 s")))
    more = with_fees.seconds[:, 0] - without.seconds[:, 0]
    for phase, fee in ((pt.Phase.PREFILL, 10e-3), (pt.Phase.DECODE, 1e-3)):
        nodes = with_fees.nodes(phase)
        assert more[nodes].sum() == pytest.approx(fee) and more[nodes].max() <= 1.01 * fee / sum(more[n] > 0 for n in nodes)
    assert all(more[n] == 0 for n in range(len(with_fees)) if with_fees.phase[n] == pt.Phase.DECODE and with_fees.region[n] != "body")
