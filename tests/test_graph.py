"""The graph: its grammar is held, its NetworkX view carries bytes, and what is read from a jaxpr keeps scopes and drops the dead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from partition.errors import GraphError
from partition.graph import Graph, Loop, Op, Role, Tensor, itemsize, reads, roots, trips_of, value_bytes, verify, writes
from partition.program import Program, trace
from partition.work import loop_trips

VECTOR = jax.ShapeDtypeStruct((4,), jnp.float32)


def tensor(id: int, role: Role = Role.ACTIVATION, shape: tuple[int, ...] = (4,)) -> Tensor:
    size = 4 * (shape[0] if shape else 1)
    return Tensor(id=id, shape=shape, dtype="float32", role=role, name="", nbytes=size)


def op(id: int, inputs: tuple[int, ...], outputs: tuple[int, ...], **more: Any) -> Op:
    return Op(id=id, primitive="add", inputs=inputs, outputs=outputs, params={}, scope="here", **more)


TABLE = [tensor(0, Role.PARAM), tensor(1, Role.INPUT), tensor(2), tensor(3, shape=(8,)), tensor(4), tensor(5)]
FIRST, SECOND, THIRD = op(0, (0, 1), (2, 3)), op(1, (2, 3), (4,)), op(2, (2, 4, 4), (5,))


def graph(*ops: Op, outputs: tuple[int, ...] = (5,)) -> Graph:
    return Graph(ops=ops, inputs=(0, 1), outputs=outputs, tensors=TABLE)


def test_verify_accepts_program_order() -> None:
    verify(graph(FIRST, SECOND, THIRD))


@pytest.mark.parametrize(
    ("broken", "what", "where"),
    [
        (graph(SECOND, FIRST, THIRD), "tensor 2 is used before it is made", r"op 1 \(add\) in here"),
        (graph(FIRST, SECOND, op(2, (4,), (2,)), outputs=(2,)), "tensor 2 is made twice", "op 2"),
        (graph(FIRST, op(1, (2,), (0,)), outputs=(0,)), "tensor 0 is made twice", "op 1"),
        (graph(FIRST, SECOND), "output tensor 5 is made by nobody", "outputs"),
    ],
    ids=["use before make", "made twice", "input made again", "made by nobody"],
)
def test_verify_catches(broken: Graph, what: str, where: str) -> None:
    with pytest.raises(GraphError, match=what) as caught:
        verify(broken)
    caught.match(where)


def test_verify_looks_into_bodies() -> None:
    table = [*TABLE, tensor(6), tensor(7), tensor(8)]
    inner = Graph(ops=(op(10, (7,), (8,)), op(11, (6,), (7,))), inputs=(6,), outputs=(8,), tensors=table)
    loop = Loop(kind="scan", trips=2, cond_consts=0, consts=0, carry=1, body=inner)
    with pytest.raises(GraphError, match="tensor 7 is used before it is made"):
        verify(Graph(ops=(op(0, (1,), (5,), loop=loop),), inputs=(0, 1), outputs=(5,), tensors=table))


def test_nx_edges_carry_tensors_and_bytes() -> None:
    g = graph(FIRST, SECOND, THIRD).nx
    assert dict(g.edges) == {
        (0, 1): {"tensors": (2, 3), "bytes": 16 + 32},  # float32[4] and float32[8]
        (0, 2): {"tensors": (2,), "bytes": 16},
        (1, 2): {"tensors": (4,), "bytes": 16},  # read twice, passes once
    }
    assert g.nodes[1] == {"primitive": "add", "scope": "here", "op": SECOND}


def test_itemsize() -> None:
    sizes = {"float32": 4, "bfloat16": 2, "int4": 0.5, "float8_e4m3fn": 1, "float4_e2m1fn": 0.5, "bool": 1, "key<fry>": 8, "float0": 0}
    assert {name: itemsize(name) for name in sizes} == sizes


def test_ranges_of_a_scan_chain_by_their_carry() -> None:
    inner = Graph(ops=(), inputs=(6, 7, 8), outputs=(7, 8), tensors=TABLE)
    scan = op(0, (0, 1, 3), (4, 5), loop=Loop(kind="scan", trips=8, cond_consts=0, consts=1, carry=1, body=inner))
    assert reads(scan, (0, 3)) == [(0, None), (1, None), (3, (0, 3))]
    assert writes(scan, (0, 3)) == [(4, (3, 3)), (5, (0, 3))]
    assert reads(scan, (3, 8)) == [(0, None), (4, (3, 3)), (3, (3, 8))]
    assert writes(scan, (3, 8)) == [(4, None), (5, (3, 8))]  # the last carry is the result itself
    assert [value_bytes(v, TABLE) for v in reads(scan, (3, 8))] == [16, 16, 32 * 5 / 8]
    assert roots(graph(scan)) == {6: 0, 8: 3}  # constants and slices, not the carry


# what is read from a jaxpr --------------------------------------------------------------------------------------------


def test_inlined_calls_keep_their_callers_scope() -> None:
    @jax.jit
    def inner(x: jax.Array) -> jax.Array:
        with jax.named_scope("inner"):
            return jnp.tanh(x)

    def fn(w: jax.Array, x: jax.Array) -> jax.Array:
        with jax.named_scope("outer"):
            x = jax.jit(lambda v: inner(v) * w)(x)

            def step(c: jax.Array, _: None) -> tuple[jax.Array, None]:
                with jax.named_scope("step"):
                    return jnp.sin(c), None

            return jax.lax.scan(step, x, None, length=2)[0]

    g = trace(fn, VECTOR, VECTOR).graph
    verify(g)
    assert {o.primitive: o.scope for o in g.walk()} == {"tanh": "outer/inner", "mul": "outer", "scan": "outer", "sin": "outer/step"}


def test_the_same_jitted_function_called_twice_is_two_groups_of_ops() -> None:
    g = trace(lambda w, x: jax.jit(jnp.tanh)(jax.jit(jnp.tanh)(x)), VECTOR, VECTOR).graph
    verify(g)
    assert [o.primitive for o in g.ops] == ["tanh", "tanh"] and len({o.id for o in g.ops}) == 2


def test_dead_equations_are_dropped() -> None:
    def fn(w: jax.Array, x: jax.Array) -> jax.Array:
        jnp.exp(jnp.sin(x))  # nobody reads it

        def step(c: jax.Array, _: None) -> tuple[jax.Array, None]:
            jnp.cos(c)  # nor this
            return c * w, None

        return jax.lax.scan(step, x, None, length=3)[0]

    assert [o.primitive for o in trace(fn, VECTOR, VECTOR).graph.walk()] == ["scan", "mul"]


State = tuple[jax.Array, jax.Array]


def loop_of(going: Callable[[Any], Any], step: Callable[[Any], Any], *start: Any) -> tuple[Op, Program]:
    program = trace(lambda w, x: jax.lax.while_loop(going, step, (*start, x)), VECTOR, jax.ShapeDtypeStruct((), jnp.float32))
    return next(o for o in program.graph.ops if o.loop is not None), program


def trips(going: Callable[[Any], Any], step: Callable[[Any], Any], *start: Any) -> int | None:
    made, program = loop_of(going, step, *start)
    numbers = {t: float(v) for t, v in program.entry.lowered.values.items() if jnp.ndim(v) == 0}
    return trips_of(made, numbers)


def test_trips_of_a_scan_and_of_a_counting_while() -> None:
    scan = trace(lambda w, x: jax.lax.scan(lambda c, _: (c * w, None), x, None, length=5)[0], VECTOR, VECTOR).graph.ops[0]
    assert trips_of(scan, {}) == 5
    one = jnp.int32(1)
    assert trips(lambda c: c[0] < 8, lambda c: (c[0] + 1, c[1] * 2), one) == 7  # 1, 2, .. 7
    assert trips(lambda c: (c[0] < 8) & (c[1] < 9.0), lambda c: (c[0] + 1, c[1] * 2), one) == 7  # at most
    assert trips(lambda c: c[0] < 8, lambda c: (c[0] + 1, c[1] * 2), jnp.int32(9)) == 0


def test_trips_that_the_structure_does_not_tell() -> None:
    assert trips(lambda c: c[0] < 9.0, lambda c: (c[0] * 2,)) is None  # starts at an input
    assert trips(lambda c: ~(c[1] > 9.0), lambda c: (c[0] + 1, c[1] * 2), jnp.int32(0)) is None


def test_trips_of_a_while_that_counts_python_ints() -> None:
    made, program = loop_of(lambda c: c[0] < 8, lambda c: (c[0] + 1, c[1] * 2), 0)
    assert loop_trips(made, program.graph) == 8


_BOUND = "graph.trips_of takes any `lt` of the condition for the loop's bound: "


def test_trips_of_a_while_that_counts_floats() -> None:
    assert trips(lambda c: c[0] < 10.0, lambda c: (c[0] + 0.5, c[1] * 2), jnp.float32(0)) in (None, 20)


def test_trips_of_a_while_with_an_alternative() -> None:
    assert trips(lambda c: (c[0] < 10) | (c[1] < 3.0), lambda c: (c[0] + 1, c[1] * 2), jnp.int32(0)) is None


def test_trips_of_a_while_whose_bound_moves() -> None:
    assert trips(lambda c: c[0] < c[1], lambda c: (c[0] + 1, c[1] + c[0] % 2, c[2] * 2), jnp.int32(0), jnp.int32(3)) is None


def test_trips_of_a_while_whose_counter_waits() -> None:
    assert trips(lambda c: c[0] < 10, lambda c: (jnp.where(c[1] > 5, c[0] + 1, c[0]), c[1] * 2), jnp.int32(0)) is None
