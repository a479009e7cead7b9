"""Other numbers in a cluster: those that a caller sets by name, and all of them at one end of their bands."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

from partition import units
from partition.errors import NameUnknownError, ProfileError
from partition.hardware import Cluster, Device, End, Kind, Link, Quantity

_BETTER_LOW = frozenset({"time", "price", "price per byte", "power", "cycles"})
_EDGE = {"ingest": "bandwidth", "gateway": "time"}
"""Numbers of an edge, named by its link."""


def numbers(value: Any, prefix: str = "") -> Iterator[tuple[str, str, Quantity]]:
    """(field, dimension, number) of every quantity that a device or a link holds, tables within included: "memory.bandwidth"."""
    for field in dataclasses.fields(value):
        held = getattr(value, field.name)
        if isinstance(held, Quantity):
            yield prefix + field.name, field.metadata["dimension"], held
        elif field.name == "peak":
            yield from ((f"peak.{dtype}", "compute", q) for dtype, q in held.items())
        elif dataclasses.is_dataclass(held):
            yield from numbers(held, f"{prefix}{field.name}.")


def _links(cluster: Cluster) -> list[Link]:
    """The fabrics and the links of a cluster, each name once."""
    return list({link.name: link for link in [m.fabric for m in cluster.meshes if m.fabric is not None] + [e.link for e in cluster.edges]}.values())


def quantities(cluster: Cluster) -> Iterator[tuple[str, str, Quantity]]:
    """(name, dimension, number) of everything in a cluster that `Cluster.replace` can set, each once."""
    devices = {m.device.name: m.device for m in cluster.meshes}
    values: list[Device | Link] = [*devices.values(), *_links(cluster)]
    for value in values:
        yield from ((f"{value.name}.{field}", dimension, q) for field, dimension, q in numbers(value))
    for field, dimension in _EDGE.items():
        yield from ((f"{name}.{field}", dimension, q) for name, q in {e.link.name: getattr(e, field) for e in cluster.edges}.items() if q is not None)


def replaced(cluster: Cluster, values: Mapping[str, str | float]) -> Cluster:
    """A cluster with numbers set by name. Raises ProfileError, NameUnknownError."""
    known = {name: dimension for name, dimension, _ in quantities(cluster)}
    known |= {f"{e.link.name}.{field}": dimension for e in cluster.edges for field, dimension in _EDGE.items()} | {f"{m.name}.count": "" for m in cluster.meshes}
    known |= {f"{link.name}.{f.name}": f.metadata["dimension"] for link in _links(cluster) for f in dataclasses.fields(link) if "dimension" in f.metadata}
    for name, said in values.items():
        if name not in known:
            raise NameUnknownError.among("number of this cluster", name, known, where=f"cluster {cluster.name!r}")
        if name.endswith(".count"):
            cluster = _counted(cluster, name.removesuffix(".count"), said)
        else:
            cluster = _put(cluster, name, Quantity(value=_number(cluster, name, said, known[name]), kind=Kind.ASSUMED, source="set by the caller"))
    return cluster


def banded(cluster: Cluster) -> list[tuple[str, str, Quantity]]:
    """Those of the numbers that have a band, but for capacities: a placement that fits goes on to fit."""
    return [(name, dimension, q) for name, dimension, q in quantities(cluster) if q.low is not None and not name.endswith((".memory.capacity", ".memory.usable"))]


def extreme(cluster: Cluster, worse: bool) -> Cluster:
    """A cluster with every number but capacities at the worse or the better end of its band."""
    for name, dimension, q in banded(cluster):
        cluster = _put(cluster, name, q.at(End.HIGH if (dimension in _BETTER_LOW) == worse else End.LOW))
    return cluster


def _number(cluster: Cluster, name: str, said: str | float, dimension: str) -> float:
    where = f"cluster {cluster.name!r}, {name} = {said!r}"
    try:
        value = units.parse(said, dimension) if isinstance(said, str) else float(said)
    except (TypeError, ValueError) as error:
        raise ProfileError(f"the value is no {dimension}: {error}", where=where, mend="write it with its unit; in Python, a number that is no text is in SI units ($/s for a price)") from None
    if math.isnan(value) or value < 0 or (value == 0 and dimension not in units.ZERO) or (dimension == "fraction" and value > 1) or (math.isinf(value) and not name.endswith(".ingest")):
        raise ProfileError(f"{value:g} is no {dimension} that a machine can have", where=where, mend="give a finite number above 0, a share at most 1")
    return value


def _counted(cluster: Cluster, name: str, said: str | float) -> Cluster:
    count = int(said) if str(said).strip().isdigit() else 0
    if count < 1:
        raise ProfileError(f"{said!r} is no number of devices", where=f"cluster {cluster.name!r}, {name}.count", mend="give a whole number from 1")
    mesh = next(m for m in cluster.meshes if m.name == name)
    if count > 1 and mesh.fabric is None:
        raise ProfileError(f"mesh {name!r} has no fabric to join {count} devices by", where=f"cluster {cluster.name!r}", mend="name one in the cluster's profile: fabric = ...")
    new = dataclasses.replace(mesh, count=count, stand_in=min(count, mesh.stand_in))
    return dataclasses.replace(cluster, meshes=tuple(new if m is mesh else m for m in cluster.meshes))


def put(value: Any, field: str, q: Quantity) -> Any:
    """A device or a link with one number set."""
    first, _, rest = field.partition(".")
    held = getattr(value, first)
    if first == "peak":
        return dataclasses.replace(value, peak={**held, rest: q})
    return dataclasses.replace(value, **{first: put(held, rest, q) if rest else q})


def _put(cluster: Cluster, name: str, q: Quantity) -> Cluster:
    owner, _, field = name.partition(".")

    def set_in(value: Any) -> Any:
        return put(value, field, q) if value is not None and value.name == owner and field not in _EDGE else value

    devices = {m.device.name: set_in(m.device) for m in cluster.meshes}
    meshes = tuple(dataclasses.replace(m, device=devices[m.device.name], fabric=set_in(m.fabric)) for m in cluster.meshes)
    own: dict[str, Any] = {field: None if math.isinf(q.value) else q} if field in _EDGE else {}
    edges = tuple(dataclasses.replace(e, link=set_in(e.link), **(own if e.link.name == owner else {})) for e in cluster.edges)
    return dataclasses.replace(cluster, meshes=meshes, edges=edges)
