"""Quantities at the border: read "400 Gbit/s", write "1.2 ms". Inside the planner every number is SI (s, B, B/s, FLOP/s, $, W).

A quantity always names its unit, so that a bandwidth in bits and one in bytes cannot be confused.
"""

from __future__ import annotations

import re

_SI = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
_IEC = {f"{p}i": 1024.0 ** (n + 1) for n, p in enumerate("KMGTP")}

UNITS: dict[str, dict[str, float]] = {
    "time": {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9},
    "bytes": {f"{p}B": f for p, f in (_SI | _IEC).items()},
    "bandwidth": {f"{p}B/s": f for p, f in (_SI | _IEC).items()} | {f"{p}bit/s": f / 8 for p, f in _SI.items()},
    "compute": {f"{p}FLOP/s": f for p, f in _SI.items()},
    "price": {"$/h": 1 / 3600},
    "price per byte": {"$/GB": 1e-9},
    "power": {"W": 1.0, "kW": 1e3},
    "fraction": {"": 1.0, "%": 1e-2},
    "frequency": {"Hz": 1.0, "kHz": 1e3, "MHz": 1e6, "GHz": 1e9},
    "number": {"": 1.0},
    "cycles": {"": 1.0},
}
"""Dimension -> unit -> factor to SI. Prices are $/s inside."""

ZERO = ("price per byte", "price", "time", "cycles")
"""Dimensions of which there may be none."""

_QUANTITY = re.compile(r"\s*([0-9][0-9_]*(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)\s*(.*?)\s*")


def pattern(dimension: str) -> str:
    """The regular expression of a quantity of a dimension, as JSON Schema has it."""
    known = "|".join(unit.replace("$", r"\$") for unit in sorted(UNITS[dimension], reverse=True))
    return rf"^\s*[0-9][0-9_]*(\.[0-9]+)?([eE][+-]?[0-9]+)?\s*({known})\s*$"


def parse(text: str, dimension: str) -> float:
    """Read a quantity such as "96 GiB" of a dimension in UNITS; returns SI.

    Raises ValueError with a short reason (the caller adds where it stands).
    """
    units = UNITS[dimension]
    match = _QUANTITY.fullmatch(text) if isinstance(text, str) else None
    example = {"compute": "TFLOP/s", "bytes": "GiB", "bandwidth": "GB/s"}.get(dimension) or next(u for u in units if units[u] != 1.0 or len(units) == 1)
    if match is None:
        raise ValueError(f"expected {dimension} such as '3 {example}', got {text!r}")
    number, unit = match.groups()
    if unit not in units:
        known = ", ".join(u or "(none)" for u in units)
        raise ValueError(f"expected {dimension} such as '3 {example}', got {text!r}: units of {dimension} are {known}")
    return float(number) * units[unit]


def _scaled(value: float, steps: list[tuple[float, str]]) -> str:
    for factor, unit in steps:
        if abs(value) >= factor:
            return f"{value / factor:.3g} {unit}" if abs(value) / factor < 999.5 else f"{value / factor:,.0f} {unit}"
    factor, unit = steps[-1]
    return f"{value / factor:.3g} {unit}"


def seconds(value: float) -> str:
    """Write a time: 0.0012 -> '1.2 ms'."""
    return "0 s" if value == 0 else _scaled(value, [(1.0, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns")])


def size(value: float) -> str:
    """Write bytes in decimal units: 2.7e8 -> '270 MB'."""
    return "0 B" if value == 0 else _scaled(value, [(1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B")])


def rate(value: float) -> str:
    """Write a bandwidth: 4e11 -> '400 GB/s'."""
    return f"{size(value)}/s"


def flops(value: float) -> str:
    """Write a count of floating-point operations: 2.9e14 -> '290 TFLOP'."""
    return "0" if value == 0 else _scaled(value, [(1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP"), (1.0, "FLOP")])


def shown(value: float, dimension: str) -> str:
    """Write a number of a dimension in UNITS: 3.3e9 of "bandwidth" -> '3.3 GB/s'."""
    match dimension:
        case "time":
            return seconds(value)
        case "bytes":
            return size(value)
        case "bandwidth":
            return rate(value)
        case "compute":
            return f"{flops(value)}/s"
        case "price":
            return f"{dollars(value * 3600)}/h"
        case "price per byte":
            return f"{dollars(value * 1e9)}/GB"
        case "power":
            return f"{value:,.4g} W"
        case "frequency":
            return f"{value / 1e9:.4g} GHz"
    return f"{value:.4g}"


def outcome(value: float, objective: str) -> str:
    """Write what a plan gives in one of the objectives: 0.71 of "e2e" -> '710 ms'."""
    match objective:
        case "throughput":
            return f"{value:,.0f} tokens/s"
        case "usd_per_mtok":
            return dollars(value)
        case "joules_per_token":
            return f"{value:.3g} J"
    return seconds(value)


def dollars(value: float) -> str:
    """Write a sum of money: 3.456 -> '$3.46'."""
    return f"${value:,.2f}" if value >= 0.995 else f"${value:.3g}"
