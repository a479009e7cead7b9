"""validate(): the predictions against what was published, point by point, with the errors, the bad ones too.

`measurements.py` reads the points, `subjects.py` makes of each what can be priced. A point that a number of the subject was fitted to says
nothing about other points; it is counted apart. `kernels.py` does the same for tables of measured operators, `fitting.py` fits numbers anew.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from partition import units
from partition.arguments import checked
from partition.fidelity.measurements import measurements, published
from partition.fidelity.subjects import band, subject
from partition.hardware import Kind
from partition.tables import table


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


@checked
def validate(folder: str | Path | None = None, progress: Callable[[str], None] | None = None) -> tuple[Point, ...]:
    """Predict every point of the measurements. Raises ProfileError, NameUnknownError."""
    found = []
    for path, m in measurements(folder):
        for point in m.points:
            given = dict(zip(m.columns, point, strict=True))
            what = ", ".join(f"{k} {v}" for k, v in given.items() if k != "value")
            if progress is not None:
                progress(f"{m.subject} {m.metric}: {what}")
            measured = published(m, given, path)
            cluster, seconds = subject(m, given, path)
            low, high = band(cluster, seconds)
            fitted = m.fitted if isinstance(m.fitted, bool) else given.get("model") in m.fitted
            found.append(Point(subject=m.subject, metric=m.metric, kind=m.kind, source=m.source, what=what, fitted=fitted,
                               published=measured, predicted=seconds(cluster), low=low, high=high))  # fmt: skip
    return tuple(found)


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
    held = [f"{sum(p.inside for p in group)} of {len(group)} points{word} lie in their band" for word, group in (("", points), (" that nothing was fitted to", [p for p in points if not p.fitted])) if group]
    return "\n".join([table("Predicted against published", heads, lines), "; ".join(held), *worst, *sorted({f"source of {p.subject} {p.metric}: {p.source}" for p in points})])
