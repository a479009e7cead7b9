"""Which layer of a model each op belongs to, and which layers are alike, from the structure alone.

The contractions with weights of a level are put in an order that does not depend on how the program was written: back from the end, depth
first, each after what it is made of. A layer is what repeats in it. Where one repeat holds several mixers (attention or a recurrence)
with something else between them, each begins a layer (hybrids, experts in every second layer); what lies outside of all repeats is a layer
where it holds a mixer (a first layer unlike the others). A scan over stacked weights runs what its body holds once a trip.

A layer is known by its weights: the same weights, used by another phase, chunk or token, are the same layer.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from typing import Any

from partition.anatomy.levels import Weights
from partition.graph import Graph, Op, Tensor, bodies, components, entries
from partition.loops import CONTRACTIONS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layers:
    """of: op id -> the layers that it computes: one; several of an op in a scan over layers; none outside of any.

    counts: how many layers each region has.
    """

    of: Mapping[int, tuple[int, ...]] = dataclasses.field(repr=False)
    counts: Mapping[str, int]
    alike: Callable[[], Mapping[str, tuple[tuple[int, ...], ...]]] = dataclasses.field(repr=False, compare=False)

    @functools.cached_property
    def classes(self) -> Mapping[str, tuple[tuple[int, ...], ...]]:
        """Of each region, the groups of layers that compute the same but for their weights; found when first asked for."""
        return self.alike()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Marked:
    """What `layers` needs to know, as ids of ops: those that mix positions, the recurrent ones of these; experts; ops in no layer; residuals.

    lent: ops that make what layers of the token loop take -> what it is called there: they belong to those layers.
    """

    mixers: Collection[int]
    recurrent: Collection[int]
    experts: Collection[int]
    outside: Collection[int]
    residuals: Collection[int]
    lent: Mapping[int, Collection[int]]


def layers(graph: Graph, regions: Mapping[str, tuple[Graph, Collection[int]]], weights: Weights, marked: Marked) -> Layers:
    """Number the layers of each region: a level and the ids of ops that it leaves to another region."""
    walk = _Numbering(graph, weights, marked)
    counts = {}
    for name, (level, skip) in regions.items():
        ops = [op for op in level.ops if op.id not in skip]
        walk.region = name
        walk.level(ops)
        walk.spread(ops)
        found = {n for op in _all(ops) for n in walk.layers_of(op)}
        counts[name] = len(found)
    walk.lend()

    def alike() -> dict[str, tuple[tuple[int, ...], ...]]:
        return {name: _alike(graph, [op for op in level.ops if op.id not in skip], walk) for name, (level, skip) in regions.items()}

    return Layers(of={op.id: walk.layers_of(op) for op in graph.walk()}, counts=counts, alike=alike)


def _all(ops: Sequence[Op]) -> Iterator[Op]:
    for op in ops:
        yield op
        for body in bodies(op):
            yield from body.walk()


class _Numbering:
    """Numbers layers level by level. number: op id -> its layer; reach: layer -> all layers that it stands for in a scan."""

    def __init__(self, graph: Graph, weights: Weights, marked: Marked):
        self.graph = graph
        self.tensors, self.weights, self.marked, self.lent = graph.tensors, weights, marked, marked.lent
        self.number: dict[int, int] = {}
        self.known: dict[Hashable, tuple[int, str]] = {}
        self.aside: set[int] = set()
        self.region = ""
        self.streams = False
        self.reach: dict[int, tuple[int, ...]] = {}
        self.depth: dict[int, tuple[int, int]] = {}
        self.next = 0

    def layers_of(self, op: Op) -> tuple[int, ...]:
        return self.reach.get(n, (n,)) if (n := self.number.get(op.id)) is not None else ()

    def level(self, ops: Sequence[Op]) -> None:
        """Number the contractions of a level and of what it holds."""
        for group in components(ops, apart=self.weights):
            self.streams = any(op.id in self.marked.residuals for op in _all(group))
            order = self.ordered(group)
            last = {self.keys(op): op for op in sorted(order, key=lambda op: self.depth[op.id])}
            plain: list[Op] = []
            for op in order:
                if not bodies(op):
                    plain += [op] if last[self.keys(op)] is op else []  # of several uses of a weight, the last one tells
                    continue
                self.units(plain)
                plain = []
                self.inner(op)
            self.units(plain)
            self.number.update((op.id, n) for op in order if (n := self.number.get(last[self.keys(op)].id)) is not None and not bodies(op))

    def keys(self, op: Op) -> Hashable:
        """What tells a contraction from others: its weights; a loop is itself."""
        return op.id if bodies(op) else tuple(self.weights.key(t) for t in self.weights.of(op))

    def inner(self, op: Op) -> None:
        """Number what a scan over stacked weights holds: its body's layers, once a trip."""
        assert op.loop is not None and op.loop.trips is not None
        first, body = self.next, op.loop.body
        self.level(body.ops)
        marks = [o for o in body.walk() if self.is_mark(o)]
        if not any(o.id in self.number for o in marks):  # no mixer tells it, but a scan over weights is one
            self.take(marks)
        count = self.next - first
        for n in range(first, self.next):
            self.reach[n] = tuple(x + count * i for i in range(op.loop.trips) for x in self.reach.get(n, (n,)))
        self.next = first + count * op.loop.trips

    def is_mark(self, op: Op) -> bool:
        return op.primitive in CONTRACTIONS and op.id not in self.marked.outside and op.id not in self.lent and any(t in self.weights for t in op.inputs)

    def ordered(self, ops: Sequence[Op]) -> list[Op]:
        """The contractions with weights that lead to the deepest result of a level, and the scans over layers, each after those that it
        is made of, chain by chain. What another loop or a branch holds stands where that does; what only leads aside is noted as such.
        """
        maker = {t: op for op in ops for t in op.outputs}
        makers: dict[int, list[Op]] = {}
        held: dict[int, list[Op]] = {}
        signs: dict[int, str] = {}
        depth, none = self.depth, (0, 0)
        for op in ops:
            before = [maker[t] for t in op.inputs if t in maker]
            h = r = 0
            for m in before:
                deep = depth[m.id]
                h, r = max(h, deep[0]), max(r, deep[1])
            if (op.primitive in CONTRACTIONS or op.loop is not None or op.bodies) and (own := self.held(op)):
                held[op.id], signs[op.id] = own, str([self.sign(i) for i in own])
                for inner in own:
                    x, y = depth.get(inner.id, none)
                    depth[inner.id] = (h + 1, r) if inner is op else (h + x, r + y)
                h, r = (max([now, *(depth[i.id][n] for i in own)]) for n, now in enumerate((h, r)))
            depth[op.id] = h, r + (op.id in self.marked.residuals)
            makers[op.id] = sorted(before, key=lambda m: (depth[m.id], signs.get(m.id, ""))) if len(before) > 1 else before
        read = {m.id for before in makers.values() for m in before}
        found: list[Op] = []
        done = set[int]()
        stack = sorted((op for op in ops if op.id not in read), key=lambda op: self.depth[op.id])[-1:]
        while stack:  # depth first, the deepest maker first
            op = stack[-1]
            if op.id not in done and (wanted := [m for m in makers[op.id] if m.id not in done]):
                stack += wanted
                continue
            stack.pop()
            if op.id not in done:
                found += held.get(op.id, ())
            done.add(op.id)
        self.aside.update(i.id for op in ops if op.id not in done for i in held.get(op.id, ()))
        return found

    def held(self, op: Op) -> list[Op]:
        """What an op has for the order: itself, where it is a contraction or a scan over layers; else what its bodies have."""
        if self.is_mark(op):
            return [op]
        marks = [o for body in bodies(op) for o in body.walk() if self.is_mark(o)]
        if not marks or all(o.id in self.marked.experts for o in marks):  # a loop over experts is inside of a layer
            return []
        if self.weights.stacked(op):
            return [op]
        return [o for body in bodies(op) for o in self.ordered(body.ops)]

    def sign(self, op: Op) -> Hashable:
        return (op.primitive, op.id in self.marked.mixers, *(self.tensors[t].shape for t in op.inputs if t in self.weights))

    def units(self, marks: Sequence[Op]) -> None:
        """Number a run of contractions: the best repeat in it, then what lies before and after."""
        if not marks:
            return
        depth = [self.depth[op.id] for op in marks]
        mixes = [op.id in self.marked.mixers for op in marks]
        streams = self.streams  # with a residual stream, a layer ends at an addition to it
        may_end = [a[0] < b[0] and (a[1] < b[1] or not streams) for a, b in itertools.pairwise(depth)]
        steps = [tuple((x > y) - (x < y) for x, y in zip(a, b, strict=True)) for a, b in itertools.pairwise(depth)]
        first, period, count = repeats([self.sign(op) for op in marks], may_end, mixes, steps)
        attends = all(mixes[first : first + period]) and all(op.id not in self.marked.recurrent for op in marks[first : first + period])
        if count < 2 or 2 * count * period < len(marks) or (attends and not all(mixes)):  # attention to itself and to an encoder are one layer, with what follows
            self.mixing(marks)
            return
        self.units(marks[:first])
        for i in range(count):
            unit = marks[first + i * period : first + (i + 1) * period]
            if len(self.begins(unit)) > 1:
                self.units(unit)
            else:
                self.take(unit)
        self.units(marks[first + count * period :])

    def begins(self, marks: Sequence[Op]) -> list[int]:
        """Where a layer begins in a run of contractions: with mixers, and where these turn from one kind to the other behind a residual."""
        found = set(_runs([op.id in self.marked.mixers for op in marks]))
        for n, (a, b) in enumerate(itertools.pairwise(marks), 1):
            both = a.id in self.marked.mixers and b.id in self.marked.mixers
            if both and (a.id in self.marked.recurrent) != (b.id in self.marked.recurrent) and self.depth[a.id][1] < self.depth[b.id][1]:
                found.add(n)
        return sorted(found)

    def mixing(self, marks: Sequence[Op]) -> None:
        """A layer from each place where one begins to the next."""
        for begin, end in itertools.pairwise([*self.begins(marks), len(marks)]):
            self.take(marks[begin:end])

    def take(self, marks: Sequence[Op]) -> None:
        """One layer: known by its weights, or a new one."""
        keys = [self.weights.key(t) for op in marks for t in self.weights.of(op)]
        found = {self.known[k] for k in keys if k in self.known}
        number, region = found.pop() if len(found) == 1 else (None, "")
        if number is None or (region == self.region and not all(k in self.known for k in keys)):
            number, self.next = self.next, self.next + 1
        self.known.update((k, (number, self.region)) for k in keys if k not in self.known)
        self.number.update((op.id, number) for op in marks)

    def spread(self, ops: Sequence[Op]) -> None:
        """Give the ops between contractions a layer: of what they are made of up to the next residual, else of all that read them."""
        for body in (b for op in ops for b in bodies(op)):
            self.spread(body.ops)
        level = {t: op for op in ops for t in op.outputs}
        readers: dict[int, set[int | None]] = {}
        for op in ops:
            for t in op.inputs:
                readers.setdefault(t, set()).add(self.number.get(op.id))
        for op in (o for o in ops if o.id in self.aside):  # it lies with those that read what it reads
            found = {n for t in op.inputs if t in level for n in readers[t] if n is not None}
            if len(found) == 1 and op.id not in self.lent:
                self.number[op.id] = found.pop()
        outside, residuals = self.marked.outside, self.marked.residuals
        for op in ops:
            if op.id not in self.number and op.id not in outside:
                updates = {"dynamic_update_slice": op.inputs[1:2]}.get(op.primitive, op.inputs[2:] if op.primitive.startswith("scatter") else op.inputs)
                makers = [level[t] for t in updates if t in level]
                own = {self.number[m.id] for m in makers if m.id in self.number and m.id not in residuals}
                if len(own) == 1 or (own and op.primitive in CONTRACTIONS):
                    self.number[op.id] = max(own)
        readers = {}
        stream = {t for op in ops if op.id in residuals for t in op.inputs}
        for op in reversed(ops):
            if op.id not in self.number and op.id not in outside and stream.isdisjoint(op.outputs):
                wanted = set().union(*(readers.get(t, set()) for t in op.outputs)) if op.outputs else set()
                if len(wanted) == 1 and (number := wanted.pop()) is not None:
                    self.number[op.id] = number
            for t in op.inputs:
                readers.setdefault(t, set()).add(self.number.get(op.id))
        for op in ops:  # a loop inside of a layer
            if (number := self.number.get(op.id)) is not None:
                for inner in (o for body in bodies(op) for o in body.walk()):
                    self.number.setdefault(inner.id, number)

    def lend(self) -> None:
        """Number what makes values for layers of the token loop by those layers."""
        readers: dict[int, list[Op]] = {}
        for op in self.graph.walk() if self.lent else ():
            for t in op.inputs:
                readers.setdefault(t, []).append(op)
        for maker, values in self.lent.items():
            queue, seen = list(values), set(values)
            while queue and maker not in self.number:
                for r in readers.get(queue.pop(0), ()):
                    if r.id in self.number:
                        self.number[maker] = self.number[r.id]
                        break
                    onward = [i for i, o in entries(r) if o in seen] or list(r.outputs)
                    queue += [t for t in onward if t not in seen]
                    seen.update(onward)


def _runs(mixes: Sequence[bool]) -> list[int]:
    """Where the runs of mixers begin."""
    return [n for n, is_mixer in enumerate(mixes) if is_mixer and (n == 0 or not mixes[n - 1])]


def repeats(signs: Sequence[Hashable], may_end: Sequence[bool], mixes: Sequence[bool], steps: Sequence[Hashable] = ()) -> tuple[int, int, int]:
    """(first, period, count) of the repeat that covers most of a sequence; of equal ones the shortest period. O(n x period).

    may_end: of each neighbouring pair, whether a layer may end between them; steps: what leads from one to the other. mixes: of each item,
    whether it mixes positions; where a repeat may begin in several places, it begins with a mixer, where it has the fewest runs of them.
    """
    best, size = (0, 1, 1 if signs else 0), 0
    for period in range(1, len(signs) // 2 + 1):
        run = 0
        for i in range(len(signs) - period + 1):
            if i < len(signs) - period and signs[i] == signs[i + period]:
                run += 1
                continue
            if run >= period and (run + period) // period * period > size:
                found = _aligned(i - run, i + period, period, may_end, mixes, steps)
                if found is not None and found[1] * found[2] > size:
                    best, size = found, found[1] * found[2]
            run = 0
        if size >= len(signs) - period and size:
            break
    return best


def _aligned(begin: int, end: int, period: int, may_end: Sequence[bool], mixes: Sequence[bool], steps: Sequence[Hashable]) -> tuple[int, int, int] | None:
    """Where in a periodic stretch the repeats begin, and how many follow each other."""
    best: tuple[int, int, bool, int] | None = None
    for first in range(begin, min(begin + period, end - 2 * period + 1)):
        unit, start, count = mixes[first : first + period], first, 1
        for at in range(first + period, end - period + 1, period):
            goes_on = may_end[at - 1] and steps[at : at + period - 1] == steps[at - period : at - 1]
            start, count = (start, count + 1) if goes_on else (at, 1)
            found = (-count, len(_runs(unit)), not unit[0] or unit[-1], start)
            best = found if count > 1 and (best is None or found < best) else best
    return None if best is None else (best[3], period, -best[0])


def _alike(graph: Graph, ops: Sequence[Op], walk: _Numbering) -> tuple[tuple[int, ...], ...]:
    """The layers of a region in groups that compute the same: every op of one has its like in the other, fed by the likes of its makers."""
    shape: dict[int, Hashable] = {}
    parts: dict[int, list[int]] = {}
    for op in _all(ops):
        number = walk.number.get(op.id)
        if number is None:
            continue
        own = []
        for t in op.inputs:
            maker = walk.weights.maker.get(t)
            inner = maker is not None and walk.number.get(maker.id) == number
            own.append(shape[maker.id] if inner and maker is not None and maker.id in shape else _look(graph.tensors[t], t in walk.weights))
        shape[op.id] = hash((op.primitive, _static(op.params), tuple(own), tuple(_look(graph.tensors[t], False) for t in op.outputs)))
        parts.setdefault(number, []).append(hash(shape[op.id]))
    groups: dict[tuple[int, ...], list[int]] = {}
    for number in sorted(parts):
        groups.setdefault(tuple(sorted(parts[number])), []).extend(walk.reach.get(number, (number,)))
    return tuple(tuple(sorted(g)) for g in groups.values())


def _look(t: Tensor, weight: bool) -> Hashable:
    return (t.shape, t.dtype, weight, t.name if t.role == "literal" else "")


_PLAIN = (int, float, str, bool, tuple, type(None))


def _static(params: Mapping[str, Any]) -> Hashable:
    """The parameters of an op that say what it computes, but for the graphs that it holds."""
    return tuple((k, str(v)) for k, v in sorted(params.items()) if isinstance(v, _PLAIN) or k == "dimension_numbers")
