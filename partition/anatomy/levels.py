"""What the tellers of parts and layers ask of a program: its weights, and who makes and reads a tensor of one of its levels."""

from __future__ import annotations

import enum
import functools
from collections import deque
from collections.abc import Collection, Hashable, Iterator

from partition.graph import Graph, Op, Role, bodies, operands, roots, weights
from partition.loops import CONTRACTIONS, holds


class Kind(enum.StrEnum):
    """What part of a model an op is."""

    ATTENTION = "attention"
    MLP = "mlp"
    ROUTER = "router"
    EXPERTS = "experts"
    RECURRENT = "recurrent"
    NORM = "norm"
    EMBEDDING = "embedding"
    HEAD = "head"
    SAMPLING = "sampling"
    STATE = "state write"
    OTHER = "other"


class Weights:
    """The tensors of every level that are weights, or made of weights and constants alone; and `states`, which a token hands to the next."""

    def __init__(self, graph: Graph, states: Collection[int]):
        self.tensors, self.root, self.states = graph.tensors, roots(graph), frozenset(states)
        self.maker = {t: op for op in graph.walk() for t in op.outputs}
        params = weights(graph)
        self.all = params | {inner for inner, outer in self.root.items() if outer in params}
        self.taken: set[int] = set()
        self.counted: set[int] = set()  # loops that take a weight by the number of the trip
        self._enter(graph, set())

    def _enter(self, level: Graph, counters: set[int]) -> None:
        """counters: integers that say which trip it is, or are made of such."""
        plain: set[int] = set()  # made of literals and constants alone
        for op in level.ops:
            fixed = [t in counters or t in plain or level.tensors[t].role in (Role.CONST, Role.LITERAL) for t in op.inputs]
            if all(fixed) and counters.isdisjoint(op.inputs):
                plain.update(op.outputs)
            if not counters.isdisjoint(op.inputs) and all(fixed) and level.tensors[op.outputs[0]].dtype.startswith(("int", "uint", "bool")):
                counters.update(op.outputs)
            if op.primitive in ("dynamic_slice", "gather") and op.inputs[0] in self.all and not counters.isdisjoint(op.inputs) and all(fixed[1:]):
                self.all.update(op.outputs)
                self.taken.update(op.outputs)
            steady = all(t in self.all or level.tensors[t].role in (Role.CONST, Role.LITERAL) for t in op.inputs)
            if steady and not self.all.isdisjoint(op.inputs) and (op.loop is None or not op.loop.carry):
                self.all.update(op.outputs)
            self.all.update(inner for inner, outer in operands(op) if outer in self.all)
            for body in bodies(op):
                inside = {t for t in body.inputs if "int" in level.tensors[t].dtype and not level.tensors[t].shape} if op.loop is not None else set[int]()
                inside |= {inner for inner, outer in operands(op) if outer in counters}
                before = len(self.taken)
                self._enter(body, inside)
                if op.loop is not None and op.loop.trips and len(self.taken) > before:
                    self.counted.add(op.id)

    def __contains__(self, t: object) -> bool:
        return t in self.all

    def of(self, op: Op) -> list[int]:
        """The weights that an op reads."""
        return [t for t in op.inputs if t in self.all]

    def key(self, t: int) -> Hashable:
        """A weight, by the argument that holds it and the slices that were taken of it."""
        chain: list[Hashable] = []
        while True:
            t = self.root.get(t, t)
            op = self.maker.get(t)
            if op is None or not op.inputs or op.loop is not None or op.bodies:
                return (t, *chain)
            if op.primitive in ("slice", "dynamic_slice", "gather"):
                chain.append((op.primitive, str(op.params.get("start_indices")), *(self.tensors[i].name for i in op.inputs[1:])))
            t = op.inputs[0]

    def stacked(self, op: Op) -> bool:
        """Whether an op is a loop over weights, a slice of them a trip."""
        loop = op.loop
        if op.id in self.counted:
            return True
        return loop is not None and loop.kind == "scan" and bool(loop.trips) and any(t in self.all for t in op.inputs[loop.consts + loop.carry :])


def recurs(op: Op) -> bool:
    """Whether an op is a scan that carries an array of floats from step to step without a contraction: a recurrence along a sequence."""
    loop = op.loop
    if loop is None or loop.kind != "scan" or len(op.inputs) == loop.consts + loop.carry or holds(op, CONTRACTIONS):
        return False
    carry = zip(loop.body.inputs[loop.consts : loop.consts + loop.carry], loop.body.outputs, strict=False)
    return any(i != o and loop.body.tensors[i].shape and "float" in loop.body.tensors[i].dtype for i, o in carry)


class Level:
    """One level of a program: who makes and who reads each tensor. `stacked`: it is the body of a scan over weights.

    tokens: how many tokens of a sequence it works on at once, by what is looked up here or (`above`) outside; None where that is not told.
    """

    def __init__(self, level: Graph, weights: Weights, skip: Collection[int], *, stacked: bool = False, above: int | None = None):
        self.graph, self.tensors, self.weights = level, level.tensors, weights
        self.ops = [op for op in level.ops if op.id not in skip]  # the token loop is a level of its own
        self.maker = {t: op for op in self.ops for t in op.outputs}
        self.readers: dict[int, list[Op]] = {}
        for op in self.ops:
            for t in op.inputs:
                self.readers.setdefault(t, []).append(op)
        self.plain = [op for op in self.ops if op.primitive in CONTRACTIONS]
        self.nests = [op for op in self.ops if op.loop is not None or op.bodies]
        self.barriers = {op.id for op in self.plain} | {op.id for op in self.nests if holds(op, CONTRACTIONS) or recurs(op)}
        self.residuals = {op.id for op in self.ops if op.primitive == "add" and self._residual(op)}
        self.lookups = {op.id for op in self.ops if op.primitive == "gather" and self._looks_up(op)}
        indices = [self.tensors[op.inputs[1]].shape for op in self.ops if op.id in self.lookups]
        self.tokens = max((shape[-2] for shape in indices if len(shape) > 2), default=None if indices else above)
        self.whole = not stacked and bool(self.lookups)  # a pass over the model, from tokens to their successors

    def _looks_up(self, op: Op) -> bool:
        """Whether a gather looks rows up in a table of weights: tokens become embeddings, a new pass begins."""
        return op.inputs[0] in self.weights and len(self.tensors[op.inputs[0]].shape) == 2

    def selects(self, op: Op) -> bool:
        """Whether an op takes some of many matrices of weights, and not by the number of a trip: those of the experts that were chosen."""
        many = op.primitive in ("gather", "dynamic_slice") and op.inputs[0] in self.weights and len(self.tensors[op.inputs[0]].shape) > 2
        return many and op.outputs[0] not in self.weights.taken

    def _residual(self, op: Op) -> bool:
        """Whether an addition is of two activations of one shape, one of which is read elsewhere too: a residual stream goes on."""
        if len(op.inputs) != 2 or self.weights.of(op) or not self.weights.states.isdisjoint((*op.inputs, *op.outputs)):
            return False
        a, b = (self.tensors[t].shape for t in op.inputs)
        return a == b and len(a) > 1 and any(map(self._goes_on, op.inputs))

    def _goes_on(self, t: int) -> bool:
        """Whether a tensor, or what it is a multiple of, is read elsewhere too or comes from outside."""
        for _ in range(3):
            if len(self.readers.get(t, ())) > 1 or t not in self.maker:
                return True
            op = self.maker[t]
            moving = [i for i in op.inputs if not self._single(i)]
            if op.primitive not in ("mul", "div", "convert_element_type") or len(moving) != 1:
                return False
            t = moving[0]
        return False

    def _single(self, t: int) -> bool:
        """Whether a tensor is one number, or one that was broadcast."""
        op = self.maker.get(t)
        return self.tensors[t].size == 1 or (op is not None and op.primitive == "broadcast_in_dim" and (not op.inputs or self.tensors[op.inputs[0]].size == 1))

    @functools.cached_property
    def leads(self) -> set[int]:
        """Ops whose results reach a contraction (or floats that a part of the model hands on), before tokens are looked up anew."""
        found: set[int] = set()
        handed = set() if self.whole else {t for t in self.graph.outputs if "float" in self.tensors[t].dtype}
        for op in reversed(self.ops):
            readers = [r for t in op.outputs for r in self.readers.get(t, ()) if r.id not in self.lookups]
            if not handed.isdisjoint(op.outputs) or any(r.id in self.barriers or r.id in found for r in readers):
                found.add(op.id)
        return found

    @functools.cached_property
    def steady(self) -> set[int]:
        """Tensors that are made of literals and constants alone."""
        found = {t.id for t in self.tensors if t.role in (Role.LITERAL, Role.CONST)}
        for op in self.ops:
            if found.issuperset(op.inputs):
                found.update(op.outputs)
        return found

    @functools.cached_property
    def remembered(self) -> set[int]:
        """Ops that a state of this level is made by, back to the contractions."""
        return {op.id for t in self.weights.states if t in self.maker for op in self.behind(t)}

    @functools.cached_property
    def depth(self) -> dict[int, int]:
        """How many contractions lead to each op, itself included."""
        found: dict[int, int] = {}
        for op in self.ops:
            found[op.id] = max((found[self.maker[t].id] for t in op.inputs if t in self.maker), default=0) + (op.id in self.barriers)
        return found

    def reads(self, op: Op) -> list[Op]:
        """The ops that read what an op makes."""
        return [r for t in op.outputs for r in self.readers.get(t, ())]

    @functools.cached_property
    def ends(self) -> set[int]:
        """Ops that a walk ahead does not go beyond: contractions, residuals, and look-ups of tokens."""
        return self.barriers | self.residuals | self.lookups

    def ahead(self, op: Op, residuals: bool = False) -> Iterator[Op]:
        """Ops that read what an op makes, and go on through those that are no contraction (nor, unless asked for, a residual)."""
        return self.onward(*op.outputs, ends=self.barriers | self.lookups if residuals else self.ends)

    def onward(self, *tensors: int, ends: Collection[int] | None = None) -> Iterator[Op]:
        """Ops that read some tensors, breadth first, each once, and go on as `ahead` does."""
        ends = self.ends if ends is None else ends
        seen, queue = set[int](), deque(tensors)
        while queue:
            for op in self.readers.get(queue.popleft(), ()):
                if op.id not in seen:
                    seen.add(op.id)
                    yield op
                    if op.id not in ends:
                        queue.extend(op.outputs)

    def behind(self, *operands: int) -> Iterator[Op]:
        """Ops that make some tensors, breadth first, each once, and go back through those that are no contraction and no residual."""
        seen, queue = set[int](), deque(operands)
        while queue:
            op = self.maker.get(queue.popleft())
            if op is not None and op.id not in seen:
                seen.add(op.id)
                yield op
                if op.id not in self.barriers and op.id not in self.residuals:
                    queue.extend(op.inputs)
