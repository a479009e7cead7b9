"""Tables of measured operators against what a device's profile predicts for each, by operator and kernel.

Tables are Parquet files in the layout of aiconfigurator-core: `<family>/<framework>/<version>/<name>_perf.parquet` with latency in ms; those
of matrix products and of attention over a prompt (`context`) or for a token (`generation`) are read. Attention of a prompt is causal.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from partition.arguments import checked
from partition.costs import Contraction, cost
from partition.errors import ProfileError, WorkError
from partition.graph import itemsize
from partition.hardware import Device, Mesh
from partition.tables import table
from partition.work import Work

_COLUMNS = {
    "gemm": ("m", "n", "k", "gemm_dtype", "latency"),
    "context": ("batch_size", "isl", "num_heads", "num_key_value_heads", "head_dim", "attn_dtype", "kv_cache_dtype", "step", "latency"),
    "generation": ("batch_size", "num_heads", "num_key_value_heads", "head_dim", "attn_dtype", "kv_cache_dtype", "step", "latency"),
}
_DTYPES = {"bfloat16": "bfloat16", "float16": "float16", "fp8": "float8_e4m3fn"}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Operators:
    """The errors of one table's rows of one operator and dtype: shares, of predicted over measured less one.

    left_out: rows of other dtypes, of windows, or of layouts that the model does not speak of.
    """

    source: str
    operator: str
    dtype: str
    points: int
    mean: float
    median: float
    bias: float
    tenth: float
    worst: str
    left_out: int


@checked
def operators(folder: str | Path, device: Device, progress: Callable[[str], None] | None = None) -> tuple[Operators, ...]:
    """Predict every row of the tables in a folder. Raises ProfileError where there are none, or where pyarrow is not installed."""
    files = sorted(p for p in Path(folder).rglob("*.parquet") if _operator(p) is not None)
    if not files:
        raise ProfileError("there are no tables of gemm, context_attention or generation_attention", where=str(folder), mend="name a folder that holds <name>_perf.parquet files")
    try:
        from pyarrow import parquet
    except ImportError:
        raise ProfileError("tables in Parquet are read by pyarrow, which is not installed", where=str(folder), mend='pip install "partition-planner[tables]"') from None
    found: list[Operators] = []
    for path in files:
        if progress is not None:
            progress(f"read {path.relative_to(folder)}")
        try:
            columns = parquet.read_table(path).to_pydict()
        except Exception as error:  # whatever a broken file leads to
            raise ProfileError(f"the table cannot be read: {error}", where=str(path), mend="mend the file") from None
        found += _table(path, str(path.parent.relative_to(folder)), columns, device)
    return tuple(found)


def _operator(path: Path) -> str | None:
    return next((kind for name, kind in (("gemm_perf", "gemm"), ("context_attention", "context"), ("generation_attention", "generation")) if path.name.startswith(name)), None)


def _table(path: Path, source: str, columns: Mapping[str, Sequence[Any]], device: Device) -> list[Operators]:
    kind = str(_operator(path))
    if missing := [c for c in _COLUMNS[kind] if c not in columns]:
        raise ProfileError(f"the table has no column {missing[0]!r}", where=str(path), mend=f"it needs {', '.join(_COLUMNS[kind])}")
    data = {name: np.array(values) for name, values in columns.items()}
    said = data["gemm_dtype" if kind == "gemm" else "attn_dtype"]
    able = np.isfinite(data["latency"].astype(float)) & (data["latency"].astype(float) > 0)
    if kind != "gemm":
        able &= data["kv_cache_dtype"] == said
        able &= data["window_size"] == 0 if "window_size" in data else True
        able &= data["step"] == 0 if kind == "context" else True
    out = []
    for name in sorted(set(said[able]) & set(_DTYPES)):
        if _DTYPES[name] not in device.peak:
            continue
        chosen = able & (said == name)
        rows = {k: v[chosen] for k, v in data.items()}
        predicted, measured = _seconds(kind, rows, _DTYPES[name], device), rows["latency"].astype(float) * 1e-3
        error = predicted / measured - 1
        n = int(np.argmax(np.abs(error)))
        shape = ", ".join(f"{k} {rows[k][n]}" for k in _COLUMNS[kind] if k != "latency" and "dtype" not in k)
        out.append(Operators(source=source, operator=kind, dtype=name, points=len(error), mean=float(np.abs(error).mean()), median=float(np.median(np.abs(error))),
                             bias=float(error.mean()), tenth=float(np.quantile(np.abs(error), 0.9)), worst=f"{shape}: {100 * error[n]:+.0f} %",
                             left_out=len(said) - len(error)))  # fmt: skip
    return out


def _seconds(kind: str, rows: Mapping[str, np.ndarray], dtype: str, device: Device) -> np.ndarray:
    """Predicted seconds of every row, on one device."""
    width, n = itemsize(dtype), {k: v.astype(float) for k, v in rows.items() if v.dtype.kind in "iuf"}
    mesh = Mesh(name=device.name, device=device, count=1, stand_in=1)
    if kind == "gemm":
        shape = Contraction(batch=1.0, rows=n["m"], inner=n["k"], columns=n["n"], width=width)
        return np.asarray(_price(shape, dtype, width * (n["m"] * n["k"] + n["k"] * n["n"] + n["m"] * n["n"]), mesh), float)
    tokens = n["isl"] if kind == "context" else np.ones(len(n["step"]))
    keys = tokens if kind == "context" else n["step"] + 1
    heads = n["num_key_value_heads"]
    shape = Contraction(batch=n["batch_size"] * heads, rows=tokens, inner=n["head_dim"], columns=keys, width=width, group=n["num_heads"] / heads,
                        attention=True, masked=kind == "context")  # fmt: skip
    moved = width * n["batch_size"] * n["head_dim"] * (n["num_heads"] * tokens + heads * keys)
    return np.asarray(2 * _price(shape, dtype, moved, mesh), float)  # a half of the attention, twice


def _price(shape: Contraction, dtype: str, moved: Any, mesh: Mesh) -> Any:
    flops = 2.0 * shape.batch * shape.group * shape.rows * shape.inner * shape.columns
    work = Work(flops={dtype: flops}, read=moved, contractions=1, rows=shape.rows, macs=flops / 2)
    try:
        return cost(work, mesh, shape=shape).seconds
    except WorkError as error:
        raise ProfileError(error.what, where=error.where, mend=error.mend) from None


def operators_text(found: Sequence[Operators]) -> str:
    """The errors as a table, with the worst row of each."""
    lines = [(o.source, o.operator, o.dtype, str(o.points), *(f"{100 * x:.1f} %" for x in (o.mean, o.median)), f"{100 * o.bias:+.1f} %", f"{100 * o.tenth:.1f} %", str(o.left_out))
             for o in found]  # fmt: skip
    heads = ("table", "operator", "dtype", "n", "mean error", "median", "bias", "nine of ten within", "left out")
    return "\n".join([table("Measured operators", heads, lines), *(f"worst of {o.source} {o.operator} {o.dtype}: {o.worst}" for o in found)])
