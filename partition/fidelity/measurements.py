"""Published points as files: `device_profiles/measurements/*.toml`, each with its source, its subject and what its columns mean."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from partition import units
from partition.errors import ProfileError
from partition.hardware import Kind
from partition.shipped import ROOT

COLUMNS = ("model", "weights", "dtype", "chips", "batch", "prompt", "context", "side", "bytes", "tokens", "value")
"""What a point may say: the model and, where they are not the model's own, dtypes of its weights and of all; devices; sequences at once;
tokens of the prompt; positions of the cache; cores a side of a region; bytes that cross."""


class Measurements(BaseModel):
    """One file of points that have a source, a subject and a metric in common.

    fitted: whether numbers of the subject were fitted to the points (or the models to which). family, free: the points that are fitted
    together, and the numbers that they say: "device.<field>", "fabric.<field>", with "own " before it where it is this subject's alone.
    """

    model_config = ConfigDict(extra="forbid")

    title: Annotated[str, Field(pattern=r"\S")]
    source: Annotated[str, Field(pattern=r"\S")]
    kind: Kind
    subject: str
    fabric: str | None = None
    metric: Literal["transfer", "tpot", "ttft"]
    unit: str
    columns: list[str]
    points: list[list[float | str]] = Field(min_length=1)
    models: str = ""
    without_head: bool = False
    fitted: bool | list[str] = False
    family: str = ""
    free: list[str] = []


def measurements(folder: str | Path | None = None) -> list[tuple[Path, Measurements]]:
    """Read every file of measurements of a folder, by default those that come with the package. Raises ProfileError."""
    where = Path(folder) if folder is not None else ROOT / "device_profiles" / "measurements"
    files = sorted(where.glob("*.toml"))
    if not files:
        raise ProfileError("there are no measurements", where=str(where), mend="name a folder of .toml files; docs: device_profiles/README.md")
    return [(path, _read(path)) for path in files]


def _read(path: Path) -> Measurements:
    try:
        raw = tomllib.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ProfileError(f"the measurements cannot be read: {error}", where=str(path), mend="mend the file") from None
    try:
        made = Measurements.model_validate(raw.get("measurements"))
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, f['loc'])) or '[measurements]'}: {f['msg']}" for f in error.errors())
        raise ProfileError(f"the measurements have faults: {faults}", where=str(path), mend="docs: device_profiles/README.md") from None
    if "value" not in made.columns:
        raise ProfileError("no column is called 'value'", where=f"{path}: columns", mend="name the column of what was measured 'value'")
    if unknown := [c for c in made.columns if c not in COLUMNS]:
        raise ProfileError(f"no column is called {unknown[0]!r}", where=f"{path}: columns", mend=f"use some of {', '.join(COLUMNS)}")
    for n, point in enumerate(made.points):
        value = dict(zip(made.columns, point, strict=False)).get("value")
        if len(point) != len(made.columns) or not isinstance(value, float | int) or not math.isfinite(value) or value <= 0:
            raise ProfileError(f"point {n} has no positive value, or not one entry for each column", where=f"{path}: points", mend=f"give {', '.join(made.columns)}")
    return made


def published(m: Measurements, given: Mapping[str, Any], path: Path) -> float:
    """What was published of a point, in seconds: a rate is of the prompt in prefill, and of a token else. Raises ProfileError."""
    value = float(given["value"])
    if m.unit == "tokens/s":
        return (float(given["prompt"]) if m.metric == "ttft" else 1.0) / value
    if m.unit not in units.UNITS["time"]:
        raise ProfileError(f"measurements are in {', '.join(units.UNITS['time'])} or tokens/s, not in {m.unit!r}", where=f"{path}: unit", mend="use one of these")
    return value * units.UNITS["time"][m.unit]
