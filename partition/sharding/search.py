"""The search: for every op of a level the strategy that makes the level as fast as it can be, collectives and resharding included.

Alpa's intra-operator problem by dynamic programming instead of an integer program: ops in program order, a state for every way in which
the tensors that are still needed can lie, the cheapest way to each. A tensor that ops share lies one way; who needs it otherwise waits for
the collective that brings it there. Contractions and look-ups try every factor that they have; other ops follow an operand. Weights and
inputs lie as their first reader likes.

Layers that repeat cost nothing again: what a step does to a set of states depends on the op and on the states' relative costs alone, and
is remembered. A loop's body is solved on its own, the loops with the most work first; later levels take what they settled as given.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence

from partition.graph import Graph, Op, Role, Tensor, held, weights
from partition.sharding.factors import Factors, factors
from partition.sharding.pieces import Pieces, Split

Collective = tuple[str, float, int]
"""(kind, bytes of the whole tensor, devices)."""

Where = Split | None
State = tuple[Where, ...]

_BRANCHING = frozenset({"dot_general", "ragged_dot_general", "conv_general_dilated", "gather"})
_MOST = 120
"""States that a step keeps, the cheapest first; where it drops some, the level is no longer exact."""


@dataclasses.dataclass(frozen=True, slots=True)
class Terms:
    """What the search minimises: seconds of each op on one device, and of a collective. weight [s/B]: what a byte that each device holds costs.

    tensor: contractions with weights are split along these wherever they can be, and never along tokens. latest: solve the loops with the least work first.
    """

    seconds: Mapping[int, float]
    collective: Callable[[str, float, int], float]
    weight: float = 0.0
    tensor: bool = False
    latest: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Option:
    """One way to run an op, from operands that lie in some way: seconds [fs], how results and free operands lie, devices that share the work."""

    cost: int
    outs: tuple[Where, ...]
    frees: tuple[Where, ...]
    ways: float
    split: tuple[int, ...]
    comm: tuple[Collective, ...]
    kept: tuple[Where, ...]


@dataclasses.dataclass(kw_only=True)
class Found:
    """What the search settled: how tensors lie, over how many devices the work of each op is split and along which factors, what it waits for."""

    exact: bool = True
    tensors: dict[int, Where] = dataclasses.field(default_factory=dict)
    ways: dict[int, float] = dataclasses.field(default_factory=dict)
    along: dict[int, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    comm: dict[int, tuple[Collective, ...]] = dataclasses.field(default_factory=dict)


class Search:
    """One search over a program; `level` is its whole."""

    def __init__(self, graph: Graph, pieces: Pieces, terms: Terms):
        self.tensors, self.pieces, self.terms = graph.tensors, pieces, terms
        self.found = Found()
        self.active = _active(graph)
        self.held = held(graph)
        self.rule = {op.id: factors(op, graph.tensors) for op in graph.walk() if op.loop is None and not op.bodies}
        self.units = self._units(graph)
        self.memo: dict[tuple[object, ...], tuple[list[State], list[int], list[tuple[int, Option]]]] = {}

    def _units(self, graph: Graph) -> tuple[int, ...]:
        """Pieces that heads and groups of experts come in, which the columns of their weights are split by as well."""
        found = set()
        for op in graph.walk():
            if op.primitive in ("dot_general", "ragged_dot_general") and op.id in self.rule:
                r = self.rule[op.id]
                shared = [r.sizes[f] for f in r.batch] + ([r.sizes[0]] if op.primitive == "ragged_dot_general" else [])
                rows = [r.sizes[f] for i in (0, 1) for f in r.own(i)]
                found |= {self.pieces.of(n * m) for n in shared if n > 1 for m in (1, *(m for m in rows if m * n <= 1024))}
        return tuple(sorted(p for p in found if p > 1))

    def reshard(self, have: Where, want: Where, nbytes: float) -> tuple[int, tuple[Collective, ...]]:
        """What it costs to bring a tensor from one split to another [fs]. A whole tensor is cut without a word."""
        if have == want or have is None:
            return 0, ()
        devices = min(have[1], self.pieces.degree)
        if want is not None and want[0] == have[0] and have[1] % want[1] == 0 and self.pieces.degree % have[1] == 0:
            devices = have[1] // want[1]  # a coarser split of the same dimension: neighbours gather
            comm: Collective = ("all_gather", nbytes / want[1], devices)
        else:
            comm = ("all_gather" if want is None else "all_to_all", nbytes, devices)
        return _fs(self.terms.collective(*comm)), (comm,)

    def level(self, graph: Graph, fixed: dict[int, Where], carries: Sequence[tuple[int, int]] = ()) -> float:
        """Settle a level and the loops in it; returns its seconds. `fixed` holds tensors that lie as they do, and is added to.

        carries: (result, input) of a loop's body that must lie alike.
        """
        inner, required = self._loops(graph, fixed)
        run = _Run(self, graph, fixed, required, dict(carries))
        for op in graph.ops:
            run.step(op)
        return inner + run.finish()

    def _loops(self, graph: Graph, fixed: dict[int, Where]) -> tuple[float, dict[int, list[Where]]]:
        """Solve the bodies of a level's loops, dearest first. Returns their seconds, and how they need tensors that the level makes."""
        loops = [op for op in graph.ops if op.loop is not None]
        made, total, required = set(graph.producer), 0.0, dict[int, list[Where]]()
        for op in sorted(loops, key=lambda o: self._work(o) * (1 if self.terms.latest else -1)):
            loop = op.loop
            assert loop is not None
            own, body, after = op.inputs[loop.cond_consts :], loop.body, loop.consts + loop.carry
            inside = {i: _shift(fixed[o], -1 if n >= after else 0) for n, (i, o) in enumerate(zip(body.inputs, own, strict=True))
                      if o in fixed and not loop.consts <= n < after}  # fmt: skip
            inside |= {i: fixed[o] for i, o in list(zip(body.inputs, own, strict=True))[loop.consts : after] if o in fixed and i in self.active}
            pairs = list(zip(body.outputs[: loop.carry], body.inputs[loop.consts : after], strict=True))
            total += self.level(body, inside, pairs) * (loop.trips or 1)
            for n, (i, o) in enumerate(zip(body.inputs, own, strict=True)):
                if i in inside and i in self.active:
                    lies = _shift(inside[i], 1 if n >= after else 0)
                    if o in made:
                        required.setdefault(o, []).append(lies)
                    else:
                        fixed.setdefault(o, lies)
                    self.found.tensors.setdefault(o, lies)
            for n, (t, i) in enumerate(zip(op.outputs, body.outputs, strict=True)):
                i = body.inputs[loop.consts + n] if n < loop.carry and body.inputs[loop.consts + n] in inside else i
                fixed[t] = _shift(self.found.tensors.get(i), 0 if n < loop.carry else 1)
                self.found.tensors[t] = fixed[t]
        return total, required

    def _work(self, op: Op) -> float:
        assert op.loop is not None
        inside = sum(self._work(o) if o.loop is not None else self.terms.seconds.get(o.id, 0.0) for o in op.loop.body.ops)
        return inside * (op.loop.trips or 1)

    def options(self, op: Op, rule: Factors, have: Sequence[Where], kinds: Sequence[str], branches: bool) -> list[Option]:
        """All ways to run an op whose operands lie as they `have`; a "free" operand lies as is wanted, a "whole" one everywhere.

        branches: whether it is the first of several ops to read an operand, where it may pay to gather it for all of them.
        """
        ways: dict[tuple[tuple[int, ...], int], None] = {}
        for i, lies in enumerate(have):
            if lies is not None and i < len(rule.ins) and (led := self.pieces.leading(rule.ins[i], rule.sizes, lies)):
                ways[led, lies[1]] = None
        if op.primitive in _BRANCHING or (not ways and "free" in kinds):
            for f, size in enumerate(rule.sizes):
                for n in dict.fromkeys((self.pieces.of(size), *self.units)):
                    if n > 1 and self.pieces.fits([size], n):
                        ways[(f,), n] = None
        found = [o for (led, n) in ways for o in self._option(op, rule, have, kinds, led, n)]
        if found and not branches and op.primitive not in _BRANCHING and "free" not in kinds and not any(o.comm for o in found):
            return found  # it goes on as its operands lie; whoever needs them otherwise pays then
        forced = self.terms.tensor and "dot" in op.primitive and sum(t in self.held for t in op.inputs[:2]) == 1
        return found if found and forced else [*self._option(op, rule, have, kinds, (), 1), *found]

    def _option(self, op: Op, rule: Factors, have: Sequence[Where], kinds: Sequence[str], led: tuple[int, ...], n: int) -> Iterable[Option]:
        tensors, comm, cost = self.tensors, list[Collective](), 0
        summed = rule.summed.intersection(led)
        own = [rule.ins[i] for i, t in enumerate(op.inputs[:2]) if t in self.held] if self.terms.tensor and op.primitive in _BRANCHING and led else []
        if (summed and len(led) > 1) or (len(own) == 1 and not any(led[0] in fs for fs in own[0])):
            return
        lies = [self.pieces.place(d, rule.sizes, led, n) for d in rule.outs] if led else [None] * len(op.outputs)
        if led and not summed and any(w is None or w[1] != n for w in lies):
            return
        frees, kept = [], []
        for i, (t, kind, h) in enumerate(zip(op.inputs, kinds, have, strict=True)):
            want = self.pieces.place(rule.ins[i], rule.sizes, led, n) if led and i < len(rule.ins) else None
            if kind == "free":
                frees.append(want)
                cost += _fs(self.terms.weight * tensors[t].nbytes / self.pieces.spread(want[1] if want else 1))
            elif kind != "whole":
                c, waits = self.reshard(h, want, tensors[t].nbytes)
                cost += c
                comm += waits
                kept.append(None if waits and want is None else h)
        ways = self.pieces.spread(n)
        cost += _fs(self.terms.seconds.get(op.id, 0.0) / ways)
        if not summed:
            yield Option(cost, tuple(lies), tuple(frees), ways, led, tuple(comm), tuple(kept))
            return
        devices, nbytes = min(n, self.pieces.degree), sum(tensors[t].nbytes for t in op.outputs)
        whole = Option(cost + _fs(self.terms.collective("all_reduce", nbytes, devices)), (None,) * len(op.outputs), tuple(frees), ways, led,
                       (*comm, ("all_reduce", nbytes, devices)), tuple(kept))  # fmt: skip
        yield whole
        if op.primitive in _BRANCHING and not self.terms.tensor:  # the sum may be left split along a factor of the result: sequence parallelism, and its like
            scattered = (*comm, ("reduce_scatter", nbytes, devices))
            for f in {fs[0] for fs in rule.outs[0] if fs}:
                if self.pieces.of(rule.sizes[f]) == n and (w := self.pieces.place(rule.outs[0], rule.sizes, (f,), n)) is not None:
                    yield dataclasses.replace(whole, cost=cost + _fs(self.terms.collective("reduce_scatter", nbytes, devices)), outs=(w,), comm=scattered)


class _Run:
    """One walk over the ops of a level: `frontier` are the tensors that are still needed, `states` how they may lie, `costs` [fs] what the cheapest
    way to each takes more than `base`."""

    def __init__(self, search: Search, graph: Graph, fixed: dict[int, Where], required: Mapping[int, list[Where]], carries: Mapping[int, int]):
        self.s, self.fixed, self.required = search, fixed, required
        self.carries = {o: i for o, i in carries.items() if o in search.active and o != i}
        self.entering = set(self.carries.values())
        self.frontier: list[int] = []
        self.states: list[State] = [()]
        self.costs: list[int] = [0]
        self.base = 0
        self.trail: list[tuple[Op, list[int], list[tuple[int, Option]]]] = []
        self.last: dict[int, int] = {}
        self.first: dict[int, int] = {}
        self.at = {op.id: n for n, op in enumerate(graph.ops)}
        for op in graph.ops:
            if op.loop is None:
                for t in op.inputs:
                    self.first.setdefault(t, self.at[op.id])
                self.last.update(dict.fromkeys(op.inputs, self.at[op.id]))
        for o, i in self.carries.items():
            if o in graph.producer:
                self.last[i] = max(self.last.get(i, -1), self.at[graph.producer[o].id])

    def step(self, op: Op) -> None:
        s, n = self.s, self.at[op.id]
        if op.loop is not None:
            return
        if op.bodies:
            self.fixed.update(dict.fromkeys(op.outputs))
            return
        rule, slots, kinds, known, names = s.rule[op.id], list[int](), list[str](), list[Where](), list[int]()
        for t in op.inputs:
            slot = self.frontier.index(t) if t in self.frontier else -1
            kind = "slot" if slot >= 0 else "known" if t in self.fixed else "free" if t in s.active else "whole"
            slots.append(slot)
            kinds.append(kind)
            known.append(self.fixed.get(t))
            if kind == "free":
                names.append(t)
        outs = [t for t in op.outputs if t in s.active]
        if not outs and all(k == "whole" for k in kinds):
            return
        closes = [(self.frontier.index(self.carries[t]) if self.carries[t] in self.frontier else -1) if t in self.carries else -1 for t in op.outputs]
        needs = tuple(tuple(self.required.get(t, ())) for t in op.outputs)
        stays = tuple(k for k, t in enumerate(self.frontier) if self.last.get(t, -1) > n)
        born = tuple(self.last.get(t, -1) > n and t in s.active for t in op.outputs)
        later = tuple(self.last.get(t, -1) > n for t in names)
        branches = any(k == "slot" and self.first[t] == n < self.last[t] for k, t in zip(kinds, op.inputs, strict=True))
        entered = tuple(t in self.entering for t in self.frontier)
        sizes = tuple(s.tensors[t].nbytes for t in (*op.inputs, *op.outputs))
        key = (op.primitive, rule, tuple(slots), tuple(kinds), tuple(known), stays, born, later, tuple(closes), needs, entered, branches, sizes,
               s.terms.seconds.get(op.id), tuple(self.states), tuple(self.costs))  # fmt: skip
        if key not in s.memo:
            s.memo[key] = self._advance(op, rule, slots, kinds, known, stays, born, later, closes, needs, entered, branches)
        states, costs, back = s.memo[key]
        low = min(costs)
        self.base += low
        self.states, self.costs = states, [c - low for c in costs]
        self.trail.append((op, names, back))
        self.frontier = [self.frontier[k] for k in stays] + [t for t, b in zip(op.outputs, born, strict=True) if b]
        self.frontier += [t for t, h in zip(names, later, strict=True) if h]

    def _advance(
        self, op: Op, rule: Factors, slots: Sequence[int], kinds: Sequence[str], known: Sequence[Where], stays: Sequence[int], born: Sequence[bool],
        later: Sequence[bool], closes: Sequence[int], needs: Sequence[Sequence[Where]], entered: Sequence[bool], branches: bool,
    ) -> tuple[list[State], list[int], list[tuple[int, Option]]]:  # fmt: skip
        s, made, best = self.s, dict[tuple[Where, ...], list[Option]](), dict[State, tuple[int, int, Option]]()
        moving = [k for k in slots if k >= 0]
        for number, (state, cost) in enumerate(zip(self.states, self.costs, strict=True)):
            have = tuple(state[k] if k >= 0 else w for k, w in zip(slots, known, strict=True))
            if have not in made:
                made[have] = s.options(op, rule, have, kinds, branches)
            for o in made[have]:
                extra = 0
                for t, lies, closed, needed in zip(op.outputs, o.outs, closes, needs, strict=True):
                    wants = [*needed, *([state[closed]] if closed >= 0 else [])]
                    extra += sum(s.reshard(lies, want, s.tensors[t].nbytes)[0] for want in wants)
                if len(o.kept) == len(moving):
                    now = dict(zip(moving, o.kept, strict=True))
                    after = [state[k] if entered[k] else now.get(k, state[k]) for k in stays]
                else:
                    after = [state[k] for k in stays]
                new = (*after, *(w for w, b in zip(o.outs, born, strict=True) if b), *(w for w, h in zip(o.frees, later, strict=True) if h))
                if new not in best or cost + o.cost + extra < best[new][0]:
                    best[new] = (cost + o.cost + extra, number, o)
        tensors = [self.frontier[k] for k in stays] + [t for t, b in zip(op.outputs, born, strict=True) if b]
        return self._pruned(best, tensors)

    def _pruned(self, best: Mapping[State, tuple[int, int, Option]], tensors: Sequence[int]) -> tuple[list[State], list[int], list[tuple[int, Option]]]:
        """Without the states that the cheapest one reaches by resharding for no more than they cost."""
        ranked = sorted(best.items(), key=lambda item: item[1][0])
        first, (low, _, _) = ranked[0]
        kept = [ranked[0]]
        for state, entry in ranked[1:]:
            way = sum(self.s.reshard(a, b, self.s.tensors[t].nbytes)[0] for a, b, t in zip(first, state, tensors, strict=False))
            if low + way >= entry[0] or first[len(tensors) :] != state[len(tensors) :]:
                kept.append((state, entry))
        if len(kept) > _MOST:
            self.s.found.exact = False
            kept = kept[:_MOST]
        return [state for state, _ in kept], [e[0] for _, e in kept], [(e[1], e[2]) for _, e in kept]

    def finish(self) -> float:
        """Walk back from the cheapest state; returns seconds."""
        found = self.s.found
        number = min(range(len(self.states)), key=lambda i: self.costs[i])
        seconds = (self.base + self.costs[number]) * 1e-15
        for op, names, back in reversed(self.trail):
            number, o = back[number]
            found.tensors.update(zip(op.outputs, o.outs, strict=True))
            for t, w in zip(names, o.frees, strict=True):
                found.tensors[t] = self.fixed[t] = w
            found.ways[op.id], found.along[op.id], found.comm[op.id] = o.ways, o.split, o.comm
        return seconds


def _fs(seconds: float) -> int:
    """Whole femtoseconds: sums of integers do not depend on their order, so that equal layers have equal states."""
    return round(seconds * 1e15)


def _shift(lies: Where, by: int) -> Where:
    """How a stacked tensor lies, from how its slices do (by = 1), or the other way (by = -1)."""
    if lies is None:
        return None
    dims = tuple(d + by for d in lies[0])
    return None if min(dims) < 0 else (dims, lies[1])


def _active(graph: Graph) -> set[int]:
    """The tensors that may be split: weights, inputs and what is computed from them; not indices, masks and tables of positions."""
    tensors = graph.tensors
    found = weights(graph) | {t for t in graph.inputs if tensors[t].shape and tensors[t].role is Role.INPUT and "float" in tensors[t].dtype}

    def numbers(t: Tensor) -> bool:
        return bool(t.shape) and ("float" in t.dtype or t.dtype in ("int8", "uint8", "int4", "uint4"))

    def enter(g: Graph) -> None:
        for op in g.ops:
            if (loop := op.loop) is not None:
                own, after = op.inputs[loop.cond_consts :], loop.consts + loop.carry
                for n, (i, o) in enumerate(zip(loop.body.inputs, own, strict=True)):
                    if o in found or (loop.consts <= n < after and numbers(tensors[i])):
                        found.add(i)
                enter(loop.body)
                found.update(t for t, i in zip(op.outputs, loop.body.outputs, strict=True) if i in found)
            elif not op.bodies and any(t in found for t in op.inputs):
                found.update(t for t in op.outputs if numbers(tensors[t]))

    enter(graph)
    return found
