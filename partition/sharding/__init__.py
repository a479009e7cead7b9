"""How ops are split inside a mesh of equal devices, and which collectives that takes.

One pass in program order carries, for every tensor, the dimension along which it is split and how many ways (`Split`). Weights are
decided where they are first read, as Megatron does: after a replicated activation by columns, after a split one by rows with an
all-reduce. A dimension that the devices do not divide is split as many ways as it can be (9 heads on 2 devices: one way) and the
rest of the devices repeat the work. Where a reshape into heads admits fewer ways than its weight has columns, the weight is laid
out that many ways from the start, instead of gathering its result in every layer.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from partition.graph import Graph, Op, bodies, roots, weights
from partition.sharding import handlers

Split = handlers.Split

@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """tensors: tensor id -> its split (absent: replicated). ways: op id -> over how many devices its work is split.

    collectives: op id -> (kind, bytes of the whole tensor, devices) of what it must wait for.
    """

    degree: int
    tensors: Mapping[int, Split]
    ways: Mapping[int, int]
    collectives: Mapping[int, tuple[tuple[str, float, int], ...]]

    def copies(self, tensor: int) -> float:
        """How often the bytes of a tensor lie in the memories of the mesh together: degree / ways."""
        return self.degree / self.tensors[tensor][1] if tensor in self.tensors else float(self.degree)


def layout(graph: Graph, degree: int) -> Layout:
    """Choose the splits of a whole program over `degree` devices."""
    if degree == 1:
        return Layout(degree=1, tensors={}, ways={}, collectives={})
    caps: dict[int, int] = {}
    about = _About(graph)
    while True:
        run = Pass(graph, degree, caps, about)
        run.level(graph)
        if not run.lowered:
            return Layout(degree=degree, tensors=run.split, ways=run.ways, collectives=run.comm)
        caps.update(run.lowered)


class _About:
    """What every pass asks of a program: roots of weights, who reads a tensor, which primitive makes it."""

    def __init__(self, graph: Graph):
        params = weights(graph)
        self.root = {t: t for t in params} | {inner: r for inner, r in roots(graph).items() if r in params}
        self.users: dict[int, list[Op]] = {}
        self.makers: dict[int, str] = {}
        for op in graph.walk():
            for t in op.inputs:
                self.users.setdefault(t, []).append(op)
            self.makers.update(dict.fromkeys(op.outputs, op.primitive))


class Pass:
    """One walk over the program with the caps found so far."""

    def __init__(self, graph: Graph, degree: int, caps: Mapping[int, int], about: _About):
        self.tensors, self.degree, self.caps = graph.tensors, degree, caps
        self.split: dict[int, Split] = {}
        self.ways: dict[int, int] = {}
        self.comm: dict[int, tuple[tuple[str, float, int], ...]] = {}
        self.lowered: dict[int, int] = {}
        self.columns: dict[int, int] = {}  # tensor -> the weight whose columns split it
        self.decided: dict[int, Split | None] = {}
        self.root, self.users, self.makers = dict(about.root), about.users, about.makers
        self.view: dict[int, tuple[int, ...]] = {}  # weight-derived tensor -> the root's dimension of each of its own

    def dims(self, t: int) -> tuple[int, ...]:
        """Which dimension of its root each dimension of a weight is (a slice of a stacked weight lacks the first)."""
        if t in self.view:
            return self.view[t]
        rank, whole = len(self.tensors[t].shape), len(self.tensors[self.root[t]].shape)
        return tuple(range(whole - rank, whole))

    def decide(self, t: int, dim: int | None) -> None:
        """Settle a weight's split along one of its dimensions (None: replicated)."""
        root = self.root[t]
        if dim is None:
            self.decided[root] = None
            return
        whole = self.dims(t)[dim]
        ways = math.gcd(self.tensors[root].shape[whole], self.caps.get(root, self.degree))
        self.decided[root] = (whole, ways) if ways > 1 else None
        if ways > 1:
            self.split[root] = (whole, ways)

    def undecided(self, t: int) -> bool:
        return t in self.root and self.root[t] not in self.decided

    def of(self, t: int) -> Split | None:
        """The split of a tensor as it stands."""
        if t in self.root:
            settled = self.decided.get(self.root[t])
            if settled is None or settled[0] not in self.dims(t):
                return None
            return self.dims(t).index(settled[0]), settled[1]
        return self.split.get(t)

    def charge(self, op: Op, kind: str, nbytes: float, ways: int) -> None:
        self.comm[op.id] = (*self.comm.get(op.id, ()), (kind, nbytes, ways))

    def gather(self, op: Op, t: int) -> None:
        if (s := self.of(t)) is not None:
            self.charge(op, "all_gather", self.tensors[t].nbytes, s[1])

    def put(self, op: Op, split: Split | None, source: int | None = None) -> None:
        """Give the results of an op their split; `source` is the operand it comes from."""
        for t in op.outputs:
            if split is not None and split[0] < len(self.tensors[t].shape) and split[1] > 1:
                self.split[t] = split
                if source in self.columns:
                    self.columns[t] = self.columns[source]
            else:
                self.split.pop(t, None)
        self.ways[op.id] = max(self.ways.get(op.id, 1), split[1] if split else 1)

    def level(self, graph: Graph) -> None:
        for op in graph.ops:
            if op.loop is not None:
                self.loop(op)
            elif op.bodies:
                for t in op.inputs:
                    self.gather(op, t)
                for body in op.bodies:
                    self.level(body)
                self.put(op, None)
            else:
                handlers.handler(op, self.tensors)(self, op)

    def loop(self, op: Op) -> None:
        loop = op.loop
        assert loop is not None
        own, body = op.inputs[loop.cond_consts :], loop.body
        after = loop.consts + loop.carry
        for n, (inner, outer) in enumerate(zip(body.inputs, own, strict=True)):
            if inner in self.root:
                continue
            s = self.of(outer)
            if n >= after and s is not None:
                s = (s[0] - 1, s[1]) if s[0] > 0 else None
            if s is not None:
                self.split[inner] = s
        while True:
            for inner_op in (o for b in bodies(op) for o in b.walk()):
                self.comm.pop(inner_op.id, None)
                self.ways.pop(inner_op.id, None)
            self.level(body)
            carried = list(zip(body.inputs[loop.consts : after], body.outputs[: loop.carry], strict=True))
            torn = [i for i, o in carried if self.split.get(i) is not None and self.split[i] != self.of(o)]
            if not torn:
                break
            for t in torn:
                del self.split[t]
        for n, (t, inner) in enumerate(zip(op.outputs, body.outputs, strict=True)):
            if n < loop.carry:
                inner = body.inputs[loop.consts + n]
            s = self.of(inner)
            if s is not None:
                self.split[t] = s if n < loop.carry else (s[0] + 1, s[1])
