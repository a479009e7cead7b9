"""curves(): what a plan gives at any batch, prompt and context, from one trace, at many sizes at once.

Every size in the program is an expression of named symbols. A program that was traced with `jax.export.symbolic_shape` has them; of any other
maker, exact polynomials are found from a few traces and held against two more. The graph is then read with arrays in the place of numbers, and
costed and evaluated as one plan is. How the program is placed and split stays as the plan has it, and so does what its sizes decide.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from partition.arguments import checked
from partition.errors import TraceError, told, user_line
from partition.evaluation import Estimate, evaluate
from partition.graph import Graph, Op, Tensor, bodies, itemsize
from partition.phases import is_weight
from partition.pipeline import Plan, plan
from partition.problem import at_sizes
from partition.program import Program, sized, trace
from partition.work import work

if TYPE_CHECKING:
    from partition.hardware import Cluster
    from partition.policies import Policy

_CHUNK = 25_000
"""Points that are evaluated at once, to bound the memory taken."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curves:
    """A plan at some sizes, and what it gives at others: `curves.at(batch=..., prompt=...)`. how: what its expressions come from."""

    plan: Plan
    names: tuple[str, ...]
    how: str
    read: Callable[[Mapping[str, Any]], Graph] = dataclasses.field(repr=False)
    alike: Mapping[int, object] = dataclasses.field(repr=False)
    sizes: Mapping[str, int]

    def at(self, **sizes: Any) -> Estimate:
        """The estimate at sizes that are numbers or arrays of one length: every number of it is an array.

        A size that is not named stays as the plan has it. Activations are held at the plan's own size. Raises TraceError for a name that
        is none of the symbols, for sizes below 1 and for arrays of several lengths.
        """
        if wrong := sorted(set(sizes) - set(self.names)):
            raise TraceError(f"no size is called {wrong[0]!r}", where="curves.at(...)", mend=f"give some of {', '.join(self.names)}")
        arrays = {n: np.atleast_1d(np.asarray(v)) for n, v in sizes.items()}
        lengths = {len(a) for a in arrays.values() if a.ndim == 1 and len(a) != 1} or {1}
        if len(lengths) > 1 or any(a.ndim != 1 or (a < 1).any() or (a != np.floor(a)).any() for a in arrays.values()):
            raise TraceError("sizes are whole numbers from 1, in arrays of one length", where=", ".join(sorted(sizes)), mend="give a number, or as many numbers for each")
        count = lengths.pop()
        whole = {n: np.broadcast_to(arrays.get(n, np.array([self.sizes[n]])), (count,)).astype(np.int64) for n in self.names}
        return _joined([self._some({n: a[i : i + _CHUNK] for n, a in whole.items()}) for i in range(0, count, _CHUNK)], count)

    def _some(self, sizes: Mapping[str, np.ndarray]) -> Estimate:
        """The estimate at arrays of sizes, before which the plan's own size stands, which decides."""
        graph = self.read({n: np.concatenate([[self.sizes[n]], a]) for n, a in sizes.items()})
        posed = self.plan.problem
        assert posed.phases is not None
        problem = at_sizes(posed, graph, work(graph, weights=is_weight(posed.phases.program), trips=posed.trips), self.alike)
        return evaluate(problem, dataclasses.replace(self.plan.placement, problem=problem))


def _joined(parts: Sequence[Estimate], count: int) -> Estimate:
    """The estimates of all points, without the plan's own that stands first in each part."""

    def join(values: Sequence[Any]) -> Any:
        if isinstance(values[0], Mapping):
            return {k: join([v[k] for v in values]) for k in values[0]}
        if isinstance(values[0], tuple):
            return tuple(join(v) for v in zip(*values, strict=True))
        arrays = [v[1:] if isinstance(v, np.ndarray) and v.ndim else None for v in values]
        return np.full(count, values[0]) if arrays[0] is None else np.concatenate([a for a in arrays if a is not None])

    return Estimate(**{f.name: join([getattr(p, f.name) for p in parts]) for f in dataclasses.fields(Estimate)})


@checked
def curves(
    of: Program | Callable[..., tuple[Any, tuple[Any, ...]]], sizes: Mapping[str, int], *, cluster: str | Cluster, policy: str | Policy = "portfolio", **options: Any,
) -> Curves:  # fmt: skip
    """Plan at some sizes, ready to be evaluated at others.

    of: a Program with symbols in its shapes, or a maker: sizes by name -> (fn, args). sizes: where the plan is made. options: of `plan`.
    Raises TraceError where the maker's programs differ by more than their sizes, or no polynomial gives them.
    """
    if isinstance(of, Program):
        made = plan(sized(of, sizes), cluster=cluster, policy=policy, **options)
        shapes = [tuple(map(str, getattr(aval, "shape", ()))) for aval in of.entry.lowered.avals]
        return Curves(plan=made, names=tuple(sorted(sizes)), how="the symbols of its shapes", read=lambda s: sized(of, s).graph, alike=_alike(made, shapes), sizes=dict(sizes))
    names = tuple(sorted(sizes))
    program, points, found = _polynomials(of, names, sizes)
    made = plan(program, cluster=cluster, policy=policy, **options)
    return Curves(plan=made, names=names, how=f"exact polynomials from {points} traces", read=lambda s: _filled(program.graph, found, s), alike=_alike(made, found), sizes=dict(sizes))


def _alike(made: Plan, shapes: Sequence[tuple[Any, ...]]) -> dict[int, object]:
    """What decides the cost of every op at all sizes: its primitive, the shapes of its tensors as expressions, how it is split, and on what it ends."""
    problem = made.problem
    assert problem.phases is not None
    graph = problem.phases.program.graph
    return {
        op.id: (op.primitive, tuple((shapes[t], graph.tensors[t].dtype) for t in (*op.inputs, *op.outputs)), str(op.params.get("dimension_numbers")), problem.phases.of.get(op.id), problem.op_works[op.id].contractions,
                tuple((s.along.get(op.id), s.collectives.get(op.id)) for s in problem.layouts), problem.op_works[op.id].read, problem.op_works[op.id].written)
        for op in graph.walk() if op.loop is None and not op.bodies
    }  # fmt: skip


def _polynomials(of: Callable[..., Any], names: Sequence[str], sizes: Mapping[str, int]) -> tuple[Program, int, list[tuple[Any, ...]]]:
    """(program at the sizes, number of traces, for each tensor and dimension its coefficients over the products of sizes)."""
    # near the plan's own sizes, so that programs which choose by size choose alike
    corners = [{n: sizes[n] + bit * (3 + 2 * i) for i, (n, bit) in enumerate(zip(names, bits, strict=True))} for bits in itertools.product((0, 1), repeat=len(names))]
    checks = [{n: 2 * sizes[n] + 1 + i for i, n in enumerate(names)}, dict(sizes)]
    programs = []
    for at in [*corners, *checks]:
        try:
            fn, args = of(**at)
        except Exception as error:
            raise TraceError(f"the maker raised {told(error)}", where=f"{getattr(of, '__name__', 'maker')}({', '.join(f'{n}={v}' for n, v in at.items())}), {user_line(error)}", mend="give a callable: sizes by name -> (fn, args)") from error
        programs.append(trace(fn, *args))
    said = [[(op.primitive, op.inputs, op.outputs) for op in p.graph.walk()] for p in programs]
    for at, ops in zip([*corners, *checks], said, strict=True):
        if ops != said[-1]:
            k = next((i for i, (a, b) in enumerate(zip(ops, said[-1], strict=False)) if a != b), min(len(ops), len(said[-1])))
            one, other = (o[k][0] if k < len(o) else "nothing" for o in (ops, said[-1]))
            raise TraceError(f"the programs differ by more than their sizes: op {k} is {one} and {other}", where=f"at {at} and {dict(sizes)}",
                             mend="make a program whose ops do not depend on the sizes")  # fmt: skip
    basis = np.array([_products(names, at) for at in corners], float)
    found: list[tuple[Any, ...]] = []
    for t, tensor in enumerate(programs[-1].graph.tensors):
        shapes = [p.graph.tensors[t].shape for p in programs]
        dims = []
        for d, n in enumerate(tensor.shape):
            values = [s[d] for s in shapes]
            if len(set(values)) == 1:
                dims.append(n)
                continue
            terms = np.round(np.linalg.solve(basis, np.array(values[: len(corners)], float)), 6)
            if any(abs(float(np.dot(terms, _products(names, at))) - v) > 1e-6 * v for at, v in zip(checks, values[len(corners) :], strict=True)):
                raise TraceError("a size is no polynomial of the others", where=f"tensor {t} of {programs[-1].entry.name}, dimension {d}", mend="trace it with jax.export.symbolic_shape")
            dims.append(tuple(terms.tolist()))
        found.append(tuple(dims))
    return programs[-1], len(programs), found


def _products(names: Sequence[str], at: Mapping[str, Any]) -> list[Any]:
    """The product of every subset of the sizes."""
    out: list[Any] = [1]
    for n in names:
        out += [p * at[n] for p in out]
    return out


def _filled(graph: Graph, found: Sequence[tuple[Any, ...]], sizes: Mapping[str, Any]) -> Graph:
    """A graph with arrays in the place of the dimensions that are polynomials."""
    products = _products(sorted(sizes), sizes)
    known: dict[Any, Any] = {}

    def dim(d: Any) -> Any:
        if isinstance(d, tuple) and d not in known:
            known[d] = sum(c * p for c, p in zip(d, products, strict=True))
        return known[d] if isinstance(d, tuple) else d

    tensors: list[Tensor] = []
    for t, dims in zip(graph.tensors, found, strict=True):
        shape = tuple(map(dim, dims))
        tensors.append(dataclasses.replace(t, shape=shape, nbytes=math.prod(shape) * itemsize(t.dtype)))

    def again(g: Graph) -> Graph:
        return Graph(ops=tuple(inside(op) for op in g.ops), inputs=g.inputs, outputs=g.outputs, tensors=tensors)

    def inside(op: Op) -> Op:
        if op.loop is not None:
            return dataclasses.replace(op, loop=dataclasses.replace(op.loop, body=again(op.loop.body), cond=None if op.loop.cond is None else again(op.loop.cond)))
        return dataclasses.replace(op, bodies=tuple(map(again, op.bodies))) if bodies(op) else op

    return again(graph)

