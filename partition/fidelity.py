"""validate(): the predictions against what was published, point by point, with the errors, the bad ones too.

The points stand in `device_profiles/measurements/*.toml`, each file with its source, its subject (a device or a link) and what its columns
mean. A point that a number of the subject was fitted to says nothing about other points; it is counted apart.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.resources
import math
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from partition import profiles, units
from partition.anatomy import Kind as Part
from partition.collectives import transfer
from partition.costs import costs
from partition.errors import NameUnknownError, ProfileError
from partition.graph import Graph
from partition.hardware import Cluster, Edge, Kind, Mesh, Quantity
from partition.phases import Phases, is_weight, tag
from partition.program import trace
from partition.sharding import layout
from partition.tables import table
from partition.work import work


class _Measurements(BaseModel):
    model_config = ConfigDict(extra="forbid")

    title: Annotated[str, Field(pattern=r"\S")]
    source: Annotated[str, Field(pattern=r"\S")]
    kind: Kind
    subject: str
    metric: Literal["transfer", "tpot", "ttft"]
    unit: str
    columns: list[str]
    points: list[list[float | str]] = Field(min_length=1)
    models: str = ""
    without_head: bool = False
    fitted: bool | list[str] = False


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One published value and what is predicted for it, in seconds. low, high: the prediction at the ends of the subject's bands.

    what: the columns of the point as text. fitted: whether a number of the subject was fitted to it.
    """

    subject: str
    metric: str
    kind: Kind
    source: str
    what: str
    fitted: bool
    published: float
    predicted: float
    low: float
    high: float

    @property
    def error(self) -> float:
        """(predicted - published) / published."""
        return (self.predicted - self.published) / self.published

    @property
    def inside(self) -> bool:
        """Whether the published value lies in the predicted band."""
        return self.low <= self.published <= self.high


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """The errors of the points of one subject and metric, fitted ones and others apart. Shares, not percent.

    score: the mean interval score of the band at 90%, over the published value: its width, and 20 times what lies outside; less is better.
    """

    subject: str
    metric: str
    fitted: bool
    points: int
    mean: float
    median: float
    bias: float
    worst: Point
    inside: float
    width: float
    score: float


def measurements(folder: str | Path | None = None) -> list[tuple[Path, Any]]:
    """Read every file of measurements of a folder, by default those that come with the package. Raises ProfileError."""
    where = Path(folder) if folder is not None else Path(str(importlib.resources.files("device_profiles"))) / "measurements"
    files = sorted(where.glob("*.toml"))
    if not files:
        raise ProfileError("there are no measurements", where=str(where), mend="name a folder of .toml files; docs: device_profiles/README.md")
    return [(path, _read(path)) for path in files]


def _read(path: Path) -> _Measurements:
    try:
        raw = tomllib.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ProfileError(f"the measurements cannot be read: {error}", where=str(path), mend="mend the file") from None
    try:
        made = _Measurements.model_validate(raw.get("measurements"))
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, f['loc'])) or '[measurements]'}: {f['msg']}" for f in error.errors())
        raise ProfileError(f"the measurements have faults: {faults}", where=str(path), mend="docs: device_profiles/README.md") from None
    if "value" not in made.columns:
        raise ProfileError("no column is called 'value'", where=f"{path}: columns", mend="name the column of what was measured 'value'")
    for n, point in enumerate(made.points):
        value = dict(zip(made.columns, point, strict=False)).get("value")
        if len(point) != len(made.columns) or not isinstance(value, float | int) or not math.isfinite(value) or value <= 0:
            raise ProfileError(f"point {n} has no positive value, or not one entry for each column", where=f"{path}: points", mend=f"give {', '.join(made.columns)}")
    return made


def validate(folder: str | Path | None = None, progress: Callable[[str], None] | None = None) -> tuple[Point, ...]:
    """Predict every point of the measurements. Raises ProfileError, NameUnknownError."""
    found = []
    for path, m in measurements(folder):
        for point in m.points:
            given = dict(zip(m.columns, point, strict=True))
            what = ", ".join(f"{k} {v}" for k, v in given.items() if k != "value")
            if progress is not None:
                progress(f"{m.subject} {m.metric}: {what}")
            amount = float(given["prompt"]) if m.metric == "ttft" and m.unit == "tokens/s" else 1.0
            published = _seconds(float(given["value"]), m.unit, amount, path)
            predicted, low, high = _transfer(m, given) if m.metric == "transfer" else _phase(m, given, path)
            fitted = m.fitted if isinstance(m.fitted, bool) else given.get("model") in m.fitted
            found.append(Point(subject=m.subject, metric=m.metric, kind=m.kind, source=m.source, what=what, fitted=fitted,
                               published=published, predicted=predicted, low=min(low, high), high=max(low, high)))  # fmt: skip
    return tuple(found)


def _seconds(value: float, unit: str, amount: float, path: Path) -> float:
    if unit == "tokens/s":
        return amount / value
    if unit not in units.UNITS["time"]:
        raise ProfileError(f"measurements are in {', '.join(units.UNITS['time'])} or tokens/s, not in {unit!r}", where=f"{path}: unit", mend="use one of these")
    return value * units.UNITS["time"][unit]


def _transfer(m: _Measurements, given: Mapping[str, Any]) -> tuple[float, float, float]:
    link = profiles.link(m.subject)
    mesh = Mesh(name="a", device=profiles.device("h100"), count=1, stand_in=1)
    cluster = Cluster(name="two", title="two machines", meshes=(mesh, dataclasses.replace(mesh, name="b")), edges=(Edge(src="a", dst="b", link=link),))
    ends = [transfer(float(given["bytes"]), c.edges[0]) for c in (cluster, cluster.at(worse=False), cluster.at(worse=True))]
    return ends[0], ends[1], ends[2]


def _phase(m: _Measurements, given: Mapping[str, Any], path: Path) -> tuple[float, float, float]:
    """Seconds of one decode step, or of prefill, on one mesh of the subject."""
    phases = _tagged(m.models, str(given["model"]), int(given.get("prompt", given.get("context", 0))), int(given.get("batch", 1)), str(path))
    device = profiles.device(m.subject)
    if "side" in given:
        if device.region is None:
            raise ProfileError(f"{m.subject} has no regions, a side says nothing", where=f"{path}: columns", mend="leave the column out")
        side = Quantity(value=float(given["side"]), kind=m.kind, source=m.source)
        device = dataclasses.replace(device, region=dataclasses.replace(device.region, side=side))
    mesh = Mesh(name=m.subject, device=device, count=1, stand_in=1)
    cluster = Cluster(name=m.subject, title=m.title, meshes=(mesh,), edges=())
    ends = [_time(phases, c, m.metric, m.without_head) for c in (cluster, cluster.at(worse=False), cluster.at(worse=True))]
    return ends[0], ends[1], ends[2]


@functools.lru_cache(maxsize=32)
def _tagged(models: str, model: str, prompt: int, batch: int, where: str) -> Phases:
    module, _, attribute = models.partition(":")
    try:
        generation = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError):
        raise NameUnknownError(f"there is no model maker {models!r}", where=f"{where}: models", mend="write module:callable, as models.llama:generation") from None
    fn, args = generation(model, batch=batch, prompt=prompt, new_tokens=2, layers="scanned")
    return tag(trace(fn, *args))


def _time(phases: Phases, cluster: Cluster, metric: str, without_head: bool) -> float:
    graph, loop, (mesh,) = phases.program.graph, phases.token_loop, cluster.meshes
    assert loop is not None and loop.loop is not None
    works = work(graph, weights=is_weight(phases.program))
    table = costs(graph, works, layout(graph, mesh.count), mesh, layers=float(max(phases.anatomy.layers.counts.values())))
    level: Graph = loop.loop.body if metric == "tpot" else graph
    left_out = {Part.HEAD, Part.SAMPLING} if without_head else set[Part]()
    return sum(table[op.id].seconds for op in level.ops if op is not loop and phases.anatomy.kind[op.id] not in left_out)


def summaries(points: Iterable[Point]) -> tuple[Summary, ...]:
    """The errors by subject and metric, fitted points apart."""
    groups: dict[tuple[str, str, bool], list[Point]] = {}
    for p in points:
        groups.setdefault((p.subject, p.metric, p.fitted), []).append(p)
    return tuple(_summary(*key, found) for key, found in sorted(groups.items()))


def _summary(subject: str, metric: str, fitted: bool, points: Sequence[Point]) -> Summary:
    errors = np.array([p.error for p in points])
    outside = [max(p.low - p.published, p.published - p.high, 0.0) for p in points]
    widths = np.array([(p.high - p.low) / p.published for p in points])
    return Summary(
        subject=subject, metric=metric, fitted=fitted, points=len(points), mean=float(np.abs(errors).mean()), median=float(np.median(np.abs(errors))),
        bias=float(errors.mean()), worst=max(points, key=lambda p: abs(p.error)), inside=float(np.mean([p.inside for p in points])), width=float(widths.mean()),
        score=float(np.mean([w + 20 * o / p.published for w, o, p in zip(widths, outside, points, strict=True)])),
    )  # fmt: skip


def fidelity_text(points: Sequence[Point]) -> str:
    """The summaries as a table, with the worst point of each."""
    found = summaries(points)

    def percent(x: float) -> str:
        return f"{100 * x:.1f} %"

    lines = [(s.subject, s.metric, "fitted" if s.fitted else "not fitted", str(s.points), percent(s.mean), percent(s.median), f"{100 * s.bias:+.1f} %",
              f"{100 * s.worst.error:+.1f} %", percent(s.inside), percent(s.width), f"{s.score:.2f}") for s in found]  # fmt: skip
    heads = ("subject", "metric", "points", "n", "mean error", "median", "bias", "worst", "in the band", "band's width", "interval score")
    worst = [f"worst of {s.subject} {s.metric}, {'fitted' if s.fitted else 'not fitted'}: {s.worst.what}: published {units.seconds(s.worst.published)}, "
             f"predicted {units.seconds(s.worst.predicted)}" for s in found]  # fmt: skip
    return "\n".join([table("Predicted against published", heads, lines), *worst, *sorted({f"source of {p.subject} {p.metric}: {p.source}" for p in points})])
