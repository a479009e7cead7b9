"""Profiles on disk -> hardware values, found by name or by path.

A profile is a TOML file with one table: [device], [link] or [cluster] (see `schemas.py`). `cluster(name)` and `device(name)` find the profiles that
come with the package by name, and a user's own by path (anything that ends in ".toml"); a cluster finds what it names beside
itself first.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from partition.arguments import checked
from partition.errors import NameUnknownError, ProfileError
from partition.hardware import Cluster, Device, Edge, Link, Mesh
from partition.schemas import TABLES, WITHIN, Table, line_of, read
from partition.shipped import OURS, ROOT


@functools.cache
def folders() -> dict[Path, str]:
    """Folders of profiles -> the package that each comes from: ours, then those of entry points in the group "partition.profiles", which name a package."""
    found = {ROOT / "device_profiles": OURS}
    for point in importlib.metadata.entry_points(group="partition.profiles"):
        spec = importlib.util.find_spec(point.module)
        if spec is None or not spec.submodule_search_locations:
            raise ProfileError(f"the entry point {point.name!r} names no package", where=f"{point.value}, of {point.dist.name if point.dist else 'a package'}", mend="let it name a package that holds profiles, or uninstall it")
        found[Path(next(iter(spec.submodule_search_locations)))] = point.dist.name if point.dist is not None else point.module
    return found


def _index(folder: Path) -> dict[str, dict[str, Path]]:
    """Table -> name -> file, for every profile of a folder."""
    index: dict[str, dict[str, Path]] = {table: {} for table in TABLES}
    for path in sorted(folder.glob("*.toml")):
        if not path.is_file():
            continue
        for line in path.read_text("utf-8", errors="replace").splitlines():
            table = line.strip().strip("[]")
            if line.startswith("[") and table in index:
                index[table][path.stem] = path
                break
    return index


_kept = functools.cache(_index)
"""The profiles of a folder that does not change, as those of packages do not."""


def names(table: Table) -> list[str]:
    """The names of the profiles that come with the package, and with plug-ins."""
    return sorted({name for folder in folders() for name in _kept(folder)[table]})


def package(name: str, table: Table) -> str:
    """The package that a profile comes from."""
    return next(found for folder, found in folders().items() if name in _kept(folder)[table])


def _find(name: str, table: Table, beside: Path | None = None) -> Path:
    if name.endswith(".toml"):
        return (beside / name) if beside is not None else Path(name)
    for index in (*([_index(beside)] if beside is not None and beside not in folders() else []), *map(_kept, folders())):
        if name in index[table]:
            return index[table][name]
    near = _index(beside) if beside is not None and beside not in folders() else {}
    if beside is not None and (file := beside / f"{name}.toml").exists():
        raise NameUnknownError(f"{file.name} holds no [{table}]", where=str(file), mend=f"let a line of it be [{table}]")
    if Path(f"{name}.toml").exists():
        raise NameUnknownError(f"there is no {table} called {name!r}", where=f"{table} {name!r}", mend=f"did you mean the file {name}.toml?")
    raise NameUnknownError.among(table, name, {*names(table), *near.get(table, {})}, mend="or name a .toml file of your own")


@checked
def device(name: str, beside: Path | None = None) -> Device:
    """Read a device profile by name or path. Raises ProfileError, NameUnknownError."""
    raw = read(_find(name, "device", beside), "device")
    fields = {key: getattr(raw, key) for key in type(raw).model_fields}
    return Device(**fields | {key: made(**dict(fields[key])) for key, made in WITHIN.items() if fields[key] is not None})


def link(name: str, beside: Path | None = None) -> Link:
    """Read a link profile by name or path. Raises ProfileError, NameUnknownError."""
    return Link(**dict(read(_find(name, "link", beside), "link")))


def _named_by(where: Callable[[], str], read: Callable[[str, Path | None], Any], name: str, beside: Path) -> Any:
    try:
        return read(name, beside)
    except NameUnknownError as error:
        raise ProfileError(error.what, where=where(), mend=error.mend) from None


@checked
def cluster(name: str) -> Cluster:
    """Read a cluster profile, its devices and its links, by name or path.

    `copies = 4` of a mesh "cs3" makes meshes cs3.0 .. cs3.3; a link that names "cs3" then stands for one to each of them, and
    `chain = true` for links between neighbours. Raises ProfileError, NameUnknownError.
    """
    path = _find(name, "cluster")
    raw, beside = read(path, "cluster"), path.parent
    members: dict[str, list[str]] = {}
    meshes: list[Mesh] = []

    def at(table: str, i: int, field: str = "") -> str:
        return f"{path}:{line_of(path.read_text('utf-8'), ('cluster', table, i))}: cluster.{table}.{i}{field}"

    for i, m in enumerate(raw.meshes):
        if m.name in members:
            raise ProfileError(f"two meshes are called {m.name!r}", where=at("meshes", i), mend="give each mesh a name of its own, or use copies = <n>")
        members[m.name] = [m.name] if m.copies == 1 else [f"{m.name}.{i}" for i in range(m.copies)]
        if m.stand_in > m.count:
            raise ProfileError(f"{m.stand_in} host devices cannot stand for {m.count} of mesh {m.name!r}", where=at("meshes", i, ".stand_in"),
                               mend="let at most one host device stand for each device")  # fmt: skip
        fabric = _named_by(functools.partial(at, "meshes", i, ".fabric"), link, m.fabric, beside) if m.fabric else None
        made = _named_by(functools.partial(at, "meshes", i, ".device"), device, m.device, beside)
        if fabric is None and (m.count > 1 or made.systolic is not None):
            raise ProfileError(f"mesh {m.name!r} joins {m.count} device{'s' if m.count > 1 else ' of several cores'} by no fabric", where=at("meshes", i),
                               mend="name the link inside the mesh: fabric = \"...\"")  # fmt: skip
        meshes += [Mesh(name=n, device=made, count=m.count, stand_in=m.stand_in, fabric=fabric) for n in members[m.name]]
    edges: dict[tuple[str, str], Edge] = {}
    for i, e in enumerate(raw.links):
        if unknown := [m for m in e.between if m not in members]:
            raise ProfileError(f"a link joins {unknown[0]!r}, which is no mesh of this cluster", where=at("links", i, ".between"),
                               mend=f"use the names under [[cluster.meshes]]: {', '.join(members)}")  # fmt: skip
        if e.between[0] == e.between[1] and len(members[e.between[0]]) == 1:
            raise ProfileError(f"a link joins {e.between[0]!r} with itself", where=at("links", i, ".between"), mend="what joins the devices of one mesh is its fabric; a link among copies needs copies = 2 or more")
        made_link = _named_by(functools.partial(at, "links", i, ".link"), link, e.link, beside)
        a, b = (members[m] for m in e.between)
        pairs = [(x, y) for k, x in enumerate(a) for j, y in enumerate(b) if x != y and (not e.chain or abs(k - j) == 1)]
        if twice := next((pair for pair in pairs if pair in edges), None):
            raise ProfileError(f"two links join {twice[0]!r} and {twice[1]!r}", where=at("links", i, ".between"), mend="keep one of them: a link serves both directions")
        for x, y in pairs:
            edges[x, y] = Edge(src=x, dst=y, link=made_link, ingest=e.ingest, gateway=e.gateway)
            edges[y, x] = Edge(src=y, dst=x, link=made_link, ingest=e.ingest, gateway=e.gateway)
    return Cluster(name=raw.name, title=raw.title, meshes=tuple(meshes), edges=tuple(edges[k] for k in sorted(edges)))
