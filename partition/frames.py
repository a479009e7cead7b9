"""Results as pandas DataFrames: a plan's stages, a verdict's comparisons, lists of whatever `compare`, `validate`, `bench`, `sweep` or `fit` gave, or their JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from partition.errors import OutputError, told
from partition.origin import made
from partition.pipeline import Plan
from partition.reporting import rows

if TYPE_CHECKING:
    import pandas


def frame(result: Any) -> pandas.DataFrame:
    """A table of a result: of a Plan its stages, of a Verdict its outputs and boundaries, of an iterable of results a row each, of a JSON file (a path) its rows, of a plan's folder its stages.

    `.attrs["made"]` says what made it. Raises OutputError where pandas is not installed, or for what has no rows.
    """
    try:
        import pandas
    except ImportError:
        raise OutputError("tables need pandas, which is not installed", where="frame(result)", mend="pip install 'partition-planner[tables]'") from None
    origin: Any = made()
    if isinstance(result, str | Path):
        try:
            file = Path(result) / "plan.json" if Path(result).is_dir() else Path(result)
            found, origin = _read(json.loads(file.read_text()))
        except Exception as error:
            raise OutputError(f"there are no rows in it: {told(error)}", where=str(result), mend="name what a verb of `partition` wrote with --json, or a plan.json or its folder") from None
    elif isinstance(result, Plan):
        found, origin = [dataclasses.asdict(r) for r in rows(result)], made(result.problem.cluster)
    elif hasattr(result, "boundaries"):
        found = [dataclasses.asdict(d) for d in (*result.outputs, *result.boundaries)]
    elif isinstance(result, Iterable):
        found = [_row(r) for r in result]
    else:
        raise OutputError(f"{type(result).__name__} has no rows", where="frame(result)", mend="give a Plan, a Verdict, a list of results, or a path")
    table = pandas.json_normalize(found)
    table.attrs["made"] = origin
    return table


def _read(raw: Mapping[str, Any]) -> tuple[list[Any], Any]:
    """The rows of a file, and what made it: of a plan.json, of a verdict, of what else `--json` writes."""
    if "placement" in raw:
        return raw["stages"], {"versions": raw["versions"], "profiles": raw["profiles"]}
    return raw["outputs"] + raw["boundaries"] if "boundaries" in raw else raw["rows"], raw["made"]


def _row(result: Any) -> Mapping[str, Any]:
    """A result's plain values, an estimate's under their own names; what only programs read is left out."""
    if isinstance(result, Mapping):
        return result
    if not dataclasses.is_dataclass(result):
        raise OutputError(f"{type(result).__name__} has no rows", where="frame(result)", mend="give a Plan, a Verdict, a list of results, or a path")
    found = {f.name: getattr(result, f.name) for f in dataclasses.fields(result)}
    estimate = found.pop("estimate", None)
    if estimate is not None:
        found |= {k: v for k, v in dataclasses.asdict(estimate).items() if isinstance(v, int | float)}
    return {k: v for k, v in found.items() if v is None or isinstance(v, str | int | float | bool)}
