"""sweep(): one plan after another over a grid of inputs, in parallel, as a table; and the picture of which placement wins where.

Inputs are sizes of the request (batch, prompt, new_tokens) and numbers of the cluster by the names that `Cluster.replace` knows. A program is traced
once for each size; its problem is priced anew for each cell and placed anew. joblib runs the cells: on local processes, or where `joblib.parallel_config(backend="dask")` and Ray's `register_ray()` send them, with the same rows.
"""

from __future__ import annotations

import difflib
import itertools
import numbers
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from partition import outputs
from partition.arguments import checked
from partition.errors import InfeasibleError, NameUnknownError, PlacementError
from partition.evaluation import evaluate
from partition.parallel import each
from partition.phases import Phase
from partition.pipeline import place, policy
from partition.problem import Placement, Problem, on, pose
from partition.workload import USUAL

if TYPE_CHECKING:
    import pandas as pd

    from partition.hardware import Cluster
    from partition.policies import Policy

SIZES = tuple(USUAL)
GIVES = ("ttft", "tpot", "e2e", "throughput", "usd_per_mtok", "joules_per_token")


@checked
def sweep(
    model: str | Callable[..., Any], over: Mapping[str, Sequence[Any]], *, cluster: str | Cluster, how: str | Policy = "portfolio", objective: str = "e2e", jobs: int = 1,
    limits: Mapping[str, float] | None = None, progress: Callable[[str], None] | None = None, **sizes: int,
) -> pd.DataFrame:  # fmt: skip
    """A row for each cell of the grid: its inputs, the objectives [SI units, $, J], `wins` (which machines serve which phase) and `why_not`.

    model: a name, or sizes -> (fn, args). over: input -> its values. sizes: those that stay. jobs: processes; a policy that runs in them must be importable.
    The rows are the same for any number of jobs. Raises NameUnknownError for an input that nothing has, PlacementError for an empty grid.
    """
    import pandas as pd

    from partition.profiles import cluster as find_cluster

    machines = find_cluster(cluster) if isinstance(cluster, str) else cluster
    for name, values in over.items():
        if isinstance(values, str) or not hasattr(values, "__len__") or not hasattr(values, "__iter__"):
            raise PlacementError(f"{name} has {values!r} where its values are wanted", where=f"sweep(over={{{name!r}: ...}})", mend=f"write {{{name!r}: [{values!r}]}}")
        if name in SIZES and (wrong := [v for v in values if isinstance(v, bool) or not isinstance(v, numbers.Integral) or v < 1]):
            raise PlacementError(f"{name} cannot be {wrong[0]!r}", where=f"sweep(over={{{name!r}: ...}})", mend="give whole numbers from 1")
    if not over or not all(len(values) for values in over.values()):
        raise PlacementError("a sweep without values has no cells", where="sweep(over=...)", mend="give each input the values it takes")
    if wrong := sorted(set(sizes) - set(SIZES)):
        raise NameUnknownError.among("size", wrong[0], SIZES)
    if bad := [name for name, n in sizes.items() if isinstance(n, bool) or not isinstance(n, numbers.Integral) or n < 1]:
        raise PlacementError(f"{bad[0]} cannot be {sizes[bad[0]]!r}", where=f"sweep({bad[0]}=...)", mend="give a whole number from 1")
    quantities = [name for name in over if name not in SIZES]
    for name in quantities:
        try:
            for value in over[name]:
                machines.replace({name: value})  # what is wrong is said before anything runs
        except NameUnknownError as error:
            near = difflib.get_close_matches(name, SIZES, n=1)
            raise NameUnknownError(error.what, where=error.where, mend=f"did you mean the size {near[0]!r}?" if near else f"sizes are {', '.join(SIZES)}; {error.mend}") from None
    policy(how)
    grid = [dict(zip([n for n in over if n in SIZES], cell, strict=True)) for cell in itertools.product(*(over[n] for n in over if n in SIZES))]
    cells = [dict(zip(quantities, cell, strict=True)) for cell in itertools.product(*(over[n] for n in quantities))]
    parts = max(1, -(-(os.cpu_count() or 1 if jobs < 0 else jobs) // len(grid)))  # cells of one size are shared out only where there are more processes than sizes
    tasks = [(sizes | size, cells[i::parts]) for size in grid for i in range(parts) if cells[i::parts]]
    done = each(_cells, [(model, size, some, machines, how, objective, limits) for size, some in tasks], jobs)
    rows: list[dict[str, Any]] = []
    for i, part in enumerate(done):
        rows += part
        if progress is not None:
            progress(f"{i + 1} of {len(tasks)} parts")
    place_of = {name: {value: i for i, value in enumerate(values)} for name, values in over.items()}
    return pd.DataFrame(sorted(rows, key=lambda row: [place_of[name][row[name]] for name in over]))


def _cells(model: str | Callable[..., Any], size: dict[str, int], cells: Sequence[Mapping[str, Any]], machines: Cluster, how: str | Policy, objective: str,
           limits: Mapping[str, float] | None) -> list[dict[str, Any]]:  # fmt: skip
    """The rows of the cells of one size."""
    from partition.phases import tag
    from partition.pipeline import request, sized
    from partition.program import trace

    whole = sized(model, size, USUAL) if isinstance(model, str) else USUAL | size
    fn, args = request(model, **whole) if isinstance(model, str) else model(**whole)
    base = pose(tag(trace(fn, *args)), machines, objective=objective, limits=limits)
    rows = []
    for cell in cells:
        problem = on(base, machines.replace(dict(cell))) if cell else base
        row: dict[str, Any] = {**whole, **cell}
        try:
            placement = place(problem, how)
        except InfeasibleError as error:
            rows.append(row | dict.fromkeys(GIVES, float("nan")) | {"wins": "", "why_not": error.what})
            continue
        estimate = evaluate(problem, placement)
        rows.append(row | {name: float(getattr(estimate, name)) for name in GIVES} | {"wins": wins(problem, placement), "why_not": ""})
    return rows


def wins(problem: Problem, placement: Placement) -> str:
    """Which machines serve which phase: "prefill trn2, decode cs3"; "all on cs3" where one kind serves all."""
    by = {str(phase): "+".join(sorted({problem.kinds[placement.mesh[n]] for n in problem.nodes(phase)})) for phase in (Phase.PREFILL, Phase.DECODE) if problem.nodes(phase)}
    kinds = set(by.values())
    return f"all on {kinds.pop()}" if len(kinds) == 1 else ", ".join(f"{phase} {kind}" for phase, kind in by.items())


@checked
def picture(frame: pd.DataFrame, x: str, y: str, path: str | Path) -> Path:
    """Draw which placement wins where: a cell for each pair of two inputs, in the colour of its `wins`. Raises NameUnknownError, OutputError."""
    import matplotlib.pyplot as plt
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    inputs = [name for name in frame if name not in (*GIVES, "wins", "why_not")]
    for name in (x, y):
        if name not in inputs:
            raise NameUnknownError.among("input", str(name), inputs, where="picture(frame, x, y, path)")
    if not len(frame):
        raise PlacementError("there are no cells to draw", where="picture(frame, x, y, path)", mend="give the rows that sweep() gave")
    if x == y:
        raise PlacementError(f"a map has two inputs, both are {x!r}", where="picture(frame, x, y, path)", mend=f"name two of {', '.join(inputs)}")
    table = frame.pivot_table(index=y, columns=x, values="wins", aggfunc=lambda values: values.iloc[0] or "nothing fits", sort=False)
    names = sorted(set(table.to_numpy().ravel()))
    colours = [plt.get_cmap("tab10")(i % 10) for i in range(len(names))]
    figure, axes = plt.subplots(figsize=(6.5, 4.2), layout="constrained")
    axes.imshow(table.apply(lambda column: column.map(names.index)).to_numpy(float), cmap=ListedColormap(colours), vmin=-0.5, vmax=len(names) - 0.5, origin="lower", aspect="auto")
    axes.set_xticks(range(len(table.columns)), [f"{v:g}" if isinstance(v, float | int) else str(v) for v in table.columns], rotation=45, ha="right")
    axes.set_yticks(range(len(table.index)), [f"{v:g}" if isinstance(v, float | int) else str(v) for v in table.index])
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    figure.legend(handles=[Patch(color=c, label=n) for c, n in zip(colours, names, strict=True)], loc="outside upper center", ncols=min(3, len(names)), frameon=False)
    return outputs.drawn(figure, path)
