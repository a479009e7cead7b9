"""The planner's own form of a program: tensors, ops in program order, loops as ops with a body. Plain values, no JAX.

Ids of tensors and ops are unique in the whole program, bodies included, so that one number names one thing wherever it stands.
Program order is a topological order; passes walk it and never sort. `Graph.nx` is the NetworkX view of one level.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import functools
import gc
import math
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from partition.errors import GraphError

if TYPE_CHECKING:
    import networkx as nx

Span = tuple[int, int] | None
"""An iteration range [start, stop) of a scan; None is all of it."""

Value = tuple[int, Span]
"""What passes between stages: a tensor; rows [start, stop) of a stacked one; or (b, b): a scan's carry after b iterations."""

@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Pause Python's cyclic collector: a large graph is many values and no cycles, which it would walk again and again."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


OPAQUE = frozenset({"shard_map", "pallas_call", "ffi_call", "pure_callback", "custom_partitioning", "run_state", "custom_linear_solve"})
"""Primitives that are never looked into to be cut."""

_BITS = {"bool": 8, "int2": 2, "uint2": 2, "int4": 4, "uint4": 4, "float4_e2m1fn": 4, "bfloat16": 16, "float0": 0}


@functools.cache
def itemsize(dtype: str) -> float:
    """Bytes of one element of a dtype by name; a PRNG key counts the 8 bytes of its two words."""
    if dtype in _BITS:
        return _BITS[dtype] / 8
    if dtype.startswith("key<"):
        return 8.0
    if dtype.startswith("float8"):
        return 1.0
    return int("".join(c for c in dtype if c.isdigit())) / 8


class Role(enum.StrEnum):
    """What a tensor is to the program."""

    PARAM = "param"
    INPUT = "input"
    CONST = "const"
    LITERAL = "literal"
    ACTIVATION = "activation"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Tensor:
    """nbytes [B] is size x itemsize; name is the leaf's path for params and inputs."""

    id: int
    shape: tuple[Any, ...]
    dtype: str
    role: Role
    name: str
    nbytes: float

    @property
    def size(self) -> Any:
        """Number of elements."""
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Loop:
    """How the operands of a loop op map to its body: first the constants, then the carry, then (scan) the slices xs.

    trips is how often the body runs, None where the structure does not tell. A while has its condition's own constants first.
    """

    kind: str  # "scan" or "while"
    trips: int | None
    cond_consts: int
    consts: int
    carry: int
    body: Graph
    cond: Graph | None = None
    reverse: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Op:
    """One equation. inputs and outputs are tensor ids in the equation's order; params are the primitive's own.

    scope is the path of named scopes, joined over inlined calls and loop bodies. bodies are the graphs of other higher-order ops
    (the branches of a cond); a loop's are in `loop`.
    """

    id: int
    primitive: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    params: Mapping[str, Any]
    scope: str
    loop: Loop | None = None
    bodies: tuple[Graph, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Graph:
    """Ops in program order between `inputs` and `outputs` (tensor ids). `tensors` is the whole program's table, by id."""

    ops: tuple[Op, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    tensors: Sequence[Tensor] = dataclasses.field(repr=False)

    def __len__(self) -> int:
        return len(self.ops)

    def walk(self) -> Iterator[Op]:
        """Every op, bodies included, outer before inner."""
        for op in self.ops:
            yield op
            for body in bodies(op):
                yield from body.walk()

    @functools.cached_property
    def producer(self) -> dict[int, Op]:
        """Tensor id -> the op of this level that makes it."""
        return {t: op for op in self.ops for t in op.outputs}

    @functools.cached_property
    def nx(self) -> nx.DiGraph[int]:
        """This level as a DiGraph: op ids as nodes (primitive, scope, op), edges with the tensors that pass and their bytes."""
        return to_nx(self.ops, self.tensors, name="graph")


Item = tuple[Op, Span]
"""An op, and the iteration range of it that is meant (None: all)."""


def bodies(op: Op) -> tuple[Graph, ...]:
    """The graphs inside an op: condition and body of a loop, branches of a cond."""
    if op.loop is None:
        return op.bodies
    return (op.loop.body,) if op.loop.cond is None else (op.loop.cond, op.loop.body)


def reads(op: Op, span: Span) -> list[Value]:
    """The values that an op reads, operand by operand; a range of a scan reads its rows, and the carry where it begins."""
    if span is None or op.loop is None:
        return [(t, None) for t in op.inputs]
    first, after = op.loop.consts, op.loop.consts + op.loop.carry
    out: list[Value] = [(t, None) for t in op.inputs[:first]]
    for n, t in enumerate(op.inputs[first:after]):
        out.append((t, None) if span[0] == 0 else (op.outputs[n], (span[0], span[0])))
    return out + [(t, span) for t in op.inputs[after:]]


def writes(op: Op, span: Span) -> list[Value]:
    """The values that an op makes, result by result; a range of a scan makes its rows, and the carry where it ends."""
    if span is None or op.loop is None:
        return [(t, None) for t in op.outputs]
    carry, last = op.loop.carry, span[1] == op.loop.trips
    out: list[Value] = [(t, None) if last else (t, (span[1], span[1])) for t in op.outputs[:carry]]
    return out + [(t, span) for t in op.outputs[carry:]]


def value_bytes(value: Value, tensors: Sequence[Tensor]) -> float:
    """Bytes of a value: all of its tensor, or its rows."""
    t, span = tensors[value[0]], value[1]
    return t.nbytes if span is None or span[0] == span[1] else t.nbytes * (span[1] - span[0]) / t.shape[0]


def operands(op: Op) -> Iterator[tuple[int, int]]:
    """(tensor inside, tensor outside) for every operand that a loop hands unchanged or slice by slice to its body or condition."""
    if (loop := op.loop) is None:
        if op.primitive == "cond":
            for branch in op.bodies:
                yield from zip(branch.inputs, op.inputs[1:], strict=True)
        return
    own = op.inputs[loop.cond_consts :]
    yield from zip(loop.body.inputs[: loop.consts], own, strict=False)
    after = loop.consts + loop.carry
    yield from zip(loop.body.inputs[after:], own[after:], strict=True)
    if loop.cond is not None:
        yield from zip(loop.cond.inputs[: loop.cond_consts], op.inputs, strict=False)


def weights(graph: Graph) -> set[int]:
    """The inputs that are weights; where no floats are among them, the float arrays that the program closes over."""
    given = {t for t in graph.inputs if graph.tensors[t].role is Role.PARAM}
    if any("float" in graph.tensors[t].dtype for t in given):
        return given
    return {t.id for t in graph.tensors if t.role is Role.CONST and t.shape and "float" in t.dtype}


def held(graph: Graph) -> set[int]:
    """The weights of a program, and the tensors inside bodies that are one of them or a slice of one."""
    top = weights(graph)
    return top | {inner for inner, root in roots(graph).items() if root in top}


def entries(op: Op) -> Iterator[tuple[int, int]]:
    """(tensor inside, tensor outside) for every operand of an op with bodies, what a carry starts from included."""
    yield from operands(op)
    if (loop := op.loop) is not None:
        first = loop.cond_consts + loop.consts
        for body, at in ((loop.body, loop.consts), (loop.cond, loop.cond_consts)):
            if body is not None:
                yield from zip(body.inputs[at : at + loop.carry], op.inputs[first : first + loop.carry], strict=True)
    elif op.primitive != "cond":
        for body in op.bodies:
            yield from zip(body.inputs, op.inputs, strict=False)


def roots(graph: Graph) -> dict[int, int]:
    """Tensor inside a body -> the tensor of the top level that it is, or is a slice of (loop constants and scanned operands)."""
    found: dict[int, int] = {}

    def enter(g: Graph) -> None:
        for op in g.ops:
            inside = bodies(op)
            if inside:
                found.update((inner, found.get(outer, outer)) for inner, outer in operands(op))
            for body in inside:
                enter(body)

    enter(graph)
    return found


def trips_of(op: Op, outer: Mapping[int, Any]) -> int | None:
    """How often a loop op runs at most: a scan's length, or the bound of a while that counts up to it by one.

    The condition must demand that an integer carry, which the body raises by exactly one, is below (at most, unlike) a bound that
    does not change. `outer` gives the values of literals and constants by tensor id. None where the structure does not tell.
    """
    loop = op.loop
    if loop is None or loop.cond is None:
        return None if loop is None else loop.trips
    cond, body = loop.cond, loop.body
    counters = cond.inputs[loop.cond_consts :]
    given = dict(zip(cond.inputs, op.inputs[: loop.cond_consts] + op.inputs[loop.cond_consts + loop.consts :], strict=True))
    steady = set(cond.inputs[: loop.cond_consts])
    steady |= {t for t, i, o in zip(counters, body.inputs[loop.consts :], body.outputs, strict=True) if i == o}
    bounds = []
    for counter, relation, bound in _demanded(cond, counters):
        n = counters.index(counter)
        step = body.producer.get(body.outputs[n])
        by_one = step is not None and step.primitive == "add" and {outer.get(t, t) for t in step.inputs} == {body.inputs[loop.consts + n], 1.0}
        stop = outer.get(bound, outer.get(given[bound]) if bound in steady else None)
        start = outer.get(given[counter])
        if by_one and start is not None and stop is not None and "int" in cond.tensors[counter].dtype:
            bounds.append(max(0, math.ceil(float(stop) - float(start)) + (relation == "le")))
    return min(bounds, default=None)


_MIRRORED = {"lt": "gt", "gt": "lt", "le": "ge", "ge": "le", "ne": "ne", "eq": "eq"}
_DENIED = {"lt": "ge", "ge": "lt", "le": "gt", "gt": "le", "ne": "eq", "eq": "ne"}


def _demanded(cond: Graph, counters: Sequence[int]) -> list[tuple[int, str, int]]:
    """(counter, "lt", "le" or "ne", bound) of all that a condition demands, through `and`, `not` and a denied `or`."""
    found = []
    queue = [(cond.outputs[0], False)]
    while queue:
        t, denied = queue.pop()
        op = cond.producer.get(t)
        if op is None:
            continue
        if op.primitive == ("or" if denied else "and"):
            queue += [(i, denied) for i in op.inputs]
        elif op.primitive in ("not", "convert_element_type", "copy"):
            queue.append((op.inputs[0], denied ^ (op.primitive == "not")))
        elif op.primitive in _MIRRORED:
            a, b = op.inputs
            relation = _DENIED[op.primitive] if denied else op.primitive
            for counter, bound, said in ((a, b, relation), (b, a, _MIRRORED[relation])):
                if counter in counters and said in ("lt", "le", "ne"):
                    found.append((counter, said, bound))
    return found


def components(ops: Iterable[Op], apart: Container[int] = ()) -> list[list[Op]]:
    """Groups of ops that tensors join, but for those `apart`, in program order."""
    group: dict[int, int] = {}
    maker: dict[int, int] = {}

    def root(i: int) -> int:
        while group[i] != i:
            group[i] = group[group[i]]
            i = group[i]
        return i

    listed = list(ops)
    for op in listed:
        group[op.id] = op.id
        for t in op.inputs:
            if t in maker and t not in apart:
                a, b = root(maker[t]), root(op.id)
                group[max(a, b)] = min(a, b)
        maker.update(dict.fromkeys(op.outputs, op.id))
    found: dict[int, list[Op]] = {}
    for op in listed:
        found.setdefault(root(op.id), []).append(op)
    return list(found.values())


def to_nx(ops: Sequence[Op], tensors: Sequence[Tensor], **attributes: Any) -> nx.DiGraph[int]:
    """Ops as nodes, tensors on the edges (`tensors`: ids, `bytes`: their sum)."""
    import networkx as nx

    graph: nx.DiGraph[int] = nx.DiGraph(**attributes)
    producer: dict[int, int] = {}
    for op in ops:
        graph.add_node(op.id, primitive=op.primitive, scope=op.scope, op=op)
        for t in dict.fromkeys(op.inputs):
            if (src := producer.get(t)) is None:
                continue
            if graph.has_edge(src, op.id):
                edge = graph.edges[src, op.id]
                edge["tensors"] += (t,)
                edge["bytes"] += tensors[t].nbytes
            else:
                graph.add_edge(src, op.id, tensors=(t,), bytes=tensors[t].nbytes)
        producer.update(dict.fromkeys(op.outputs, op.id))
    return graph


def verify(graph: Graph, outer: frozenset[int] = frozenset()) -> None:
    """Hold a graph to its grammar: every tensor is made once, before its use, by an input or an op. Raises GraphError."""
    known = set(graph.inputs) | {t.id for t in graph.tensors if t.role in (Role.CONST, Role.LITERAL)} | set(outer)
    for op in graph.ops:
        where = f"op {op.id} ({op.primitive}) in {op.scope or 'the top scope'}"
        if missing := [t for t in op.inputs if t not in known]:
            raise GraphError(f"tensor {missing[0]} is used before it is made", where=where, mend="keep ops in program order")
        if again := [t for t in op.outputs if t in known]:
            raise GraphError(f"tensor {again[0]} is made twice", where=where, mend="give every output a tensor of its own")
        known.update(op.outputs)
        for body in bodies(op):
            verify(body)
    if missing := [t for t in graph.outputs if t not in known]:
        raise GraphError(f"output tensor {missing[0]} is made by nobody", where="the graph's outputs", mend="add the op that makes it")
