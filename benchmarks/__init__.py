"""The bars that this package sets itself, each measured by one module here: `python -m benchmarks [names] [--json FILE]`.

A module has `bars()`, which gives its rows. Whatever must be cold or needs its own JAX settings runs in a process of its own: `child()`
starts `python -m benchmarks.<name> <arguments>`, whose last line of output is JSON.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("planning", "counts", "sizes", "placement", "decode", "checking", "exactness", "numerics", "startup", "transport")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bar:
    """One row: what is held to `target`, the median and the spread (least and most) of the samples. met is None for what is only told."""

    name: str
    target: str
    median: float
    low: float
    high: float
    samples: int
    met: bool | None
    note: str = ""

    @staticmethod
    def of(name: str, values: Sequence[float], sense: Literal["<=", "<", ">=", "=="] | None, limit: float = 0.0, note: str = "") -> Bar:
        """A bar whose median is held to a limit; sense None: nothing is held, the numbers are told."""
        m = statistics.median(values)
        met = {"<=": m <= limit, "<": m < limit, ">=": m >= limit, "==": m == limit}[sense] if sense else None
        return Bar(name=name, target=f"{sense} {limit:g}" if sense else "told", median=m, low=min(values), high=max(values),
                   samples=len(values), met=met, note=note)  # fmt: skip

    def __str__(self) -> str:
        word = {True: "met", False: "**not met**", None: "-"}[self.met]
        return f"| {self.name} | {self.target} | {self.median:.4g} | {self.low:.4g} .. {self.high:.4g} ({self.samples}) | {word} | {self.note} |"


def child(name: str, *arguments: object, timeout: float = 300) -> Any:
    """Run a benchmark's measuring part in a fresh process and give the JSON of its last line. Raises RuntimeError with its stderr."""
    done = subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    if done.returncode:
        raise RuntimeError(f"benchmarks.{name} {' '.join(map(str, arguments))} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])
