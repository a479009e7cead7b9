"""check() over time: a recorded run that today's is held against, so that a new jaxlib or a change that moves cut and uncut together is seen.

A baseline holds no arrays: of each output, and of what tokens are chosen from, its statistics, a digest of what is whole, a sample of the floats; the errors against float64 of the outputs
and of each stage, where a check told them; and the environment that made it.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from partition._jax import to_numpy
from partition.distances import TOLERANCE, floating, parts
from partition.errors import OutputError, told
from partition.origin import versions
from partition.outputs import write

FORMAT = "partition baseline 3"
_SAMPLE = 64
"""Elements of each output that are recorded, evenly spread."""
GROWTH = 2.0
"""How many times as far from float64 as it was a run may be."""


def fingerprint() -> dict[str, str]:
    """What may move numbers: versions, the processor, how many of it there are, the compiler's flags."""
    own = {"machine": platform.machine(), "processor": _processor(), "processors": str(os.cpu_count()), "devices": str(len(jax.devices("cpu"))), "XLA_FLAGS": os.environ.get("XLA_FLAGS", "")}
    return dict(versions()) | own


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def errors(verdict: Any) -> dict[str, float]:
    """Output or stage -> the largest rms error of the cut program against float64, of a verdict that was asked for it (`oracle=True`)."""
    found: dict[str, float] = {}
    for d in (*verdict.outputs, *verdict.boundaries):
        at = re.search(r"stage (\d+)", d.name)
        name = f"stage {at[1]}" if at is not None else f"output {d.name}"
        if d.oracle is not None:
            found[name] = max(found.get(name, 0.0), d.oracle[1])
    return found


def recorded(title: str, result: Any, *, reason: str, verdict: Any = None, beside: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A result as a baseline; reason: why it is taken as right. verdict: of the check of the run, whose errors are kept. beside: values that are no outputs, by name, such as
    `references.chosen_from` gives: tokens alone stay the same through much that moves all else."""
    leaves = [(jax.tree_util.keystr(path) or "result", leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(result)[0]]
    return {"format": FORMAT, "title": title, "reason": reason, "environment": fingerprint(), "errors": {} if verdict is None else errors(verdict), "outputs": [_output(name, to_numpy(leaf)) for name, leaf in (*leaves, *(beside or {}).items())]}


def _output(name: str, a: np.ndarray) -> dict[str, Any]:
    whole = not floating(str(a.dtype))
    flat = a.ravel() if whole else parts(a).astype(np.float64).ravel()
    sample = flat[np.unique(np.linspace(0, max(flat.size - 1, 0), min(_SAMPLE, flat.size)).astype(int))]
    made: dict[str, Any] = {"name": name, "shape": list(a.shape), "dtype": str(a.dtype)}
    if whole:
        return made | {"sha256": hashlib.sha256(np.ascontiguousarray(a).tobytes()).hexdigest(), "sample": [int(x) for x in sample]}
    finite = flat[np.isfinite(flat)]
    return made | {"invalid": {"NaN": int(np.isnan(flat).sum()), "inf": int((flat == np.inf).sum()), "-inf": int((flat == -np.inf).sum())}, "mean": float(finite.mean()) if finite.size else 0.0,
                   "rms": float(np.sqrt((finite**2).mean())) if finite.size else 0.0, "most": float(np.abs(finite).max(initial=0.0)), "sample": [float(x) if np.isfinite(x) else str(x) for x in sample]}  # fmt: skip


def drift(baseline: Mapping[str, Any], result: Any, budget: Mapping[str, float] | None = None, *, verdict: Any = None, beside: Mapping[str, Any] | None = None) -> tuple[list[str], list[str]]:
    """(how a result moved beyond the budget, what of the environment is another) against a baseline; budget: dtype -> share of the rms, the tolerances of `distances` unless told. verdict: of today's check; its errors against float64 may be GROWTH times the recorded ones. beside: as for `recorded`."""
    today = recorded(str(baseline["title"]), result, reason="", beside=beside)
    moved, allowed = [], {**TOLERANCE, **(budget or {})}
    then, now = baseline["outputs"], today["outputs"]
    if [(o["name"], o["shape"], o["dtype"]) for o in then] != [(o["name"], o["shape"], o["dtype"]) for o in now]:
        return ["its outputs have other names, shapes or types"], _changed(baseline, today)
    for old, new in zip(then, now, strict=True):
        if "sha256" in old:
            if old["sha256"] != new["sha256"]:
                first = next(((a, b) for a, b in zip(old["sample"], new["sample"], strict=True) if a != b), None)
                moved.append(f"{old['name']}: whole numbers (tokens) are others, " + ("though all that were sampled agree" if first is None else f"first {first[1]} in the place of {first[0]}"))
            continue
        most, unit = allowed.get(old["dtype"], 0.0), max(old["rms"], 1e-300)
        pairs = list(zip(old["sample"], new["sample"], strict=True))
        ways = {"an element": max((abs(a - b) for a, b in pairs if not isinstance(a, str) and not isinstance(b, str)), default=0.0), "its mean": abs(old["mean"] - new["mean"]), "its rms": abs(old["rms"] - new["rms"])}
        name = max(ways, key=lambda way: ways[way])
        if ways[name] > most * unit:
            moved.append(f"{old['name']}: {name} moved by {ways[name] / unit:.2g} of the rms, the budget is {most:g}")
        if old["invalid"] != new["invalid"] or any(a != b for a, b in pairs if isinstance(a, str) or isinstance(b, str)):
            now_are, were = (", ".join(f"{n} {kind}" for kind, n in o["invalid"].items()) for o in (new, old))
            moved.append(f"{old['name']}: {now_are}" + (f"; there were {were}" if now_are != were else ", in other places than before"))
    for name, error in (errors(verdict) if verdict is not None else {}).items():
        if name in baseline.get("errors", {}) and error > GROWTH * (before := baseline["errors"][name]) + 1e-12:
            moved.append(f"{name}: its rms error against float64 is {error:.3g}, it was {before:.3g}")
    return moved, _changed(baseline, today)


def _changed(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    a, b = then["environment"], now["environment"]
    return [f"{k}: {a.get(k, 'unknown')} -> {b.get(k, 'unknown')}" for k in sorted({*a, *b}) if a.get(k) != b.get(k)]


def load(path: str | Path) -> dict[str, Any]:
    """Read a baseline. Raises OutputError."""
    try:
        raw: dict[str, Any] = json.loads(Path(path).read_text())
        if raw["format"] != FORMAT:
            raise ValueError(f"its format is {raw['format']!r}, not {FORMAT!r}")
        if raw.pop("digest", None) != _digest(raw):
            raise ValueError("it is not what was recorded, its checksum differs")
        return raw
    except Exception as error:  # whatever a file of another form leads to
        raise OutputError(f"the baseline cannot be read: {told(error)}", where=str(path), mend="record one: partition check ... --against FILE --accept 'why it is right'") from None


def save(baseline: Mapping[str, Any], path: str | Path) -> Path:
    """Write a baseline, whole or not at all. Raises OutputError."""
    path = Path(path)
    return write(path.parent, {path.name: json.dumps({**baseline, "digest": _digest(baseline)}, indent=1)}) / path.name


def _digest(baseline: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(baseline, sort_keys=True).encode()).hexdigest()
