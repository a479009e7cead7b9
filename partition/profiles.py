"""Profiles on disk -> hardware values. A number without unit, kind or source is refused with file, line, field and mend.

A profile is a TOML file with one table: [device], [link] or [cluster]. `cluster(name)` and `device(name)` find the profiles that
come with the package by name, and a user's own by path (anything that ends in ".toml"); a cluster finds what it names beside
itself first.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import importlib.util
import math
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    WithJsonSchema,
    create_model,
)

from partition import units
from partition.arguments import checked
from partition.errors import NameUnknownError, ProfileError
from partition.hardware import (
    FORMATS,
    TOPOLOGIES,
    Cluster,
    Device,
    Edge,
    Kind,
    Link,
    Memory,
    Mesh,
    Precision,
    Quantity,
    Region,
    Streaming,
    Systolic,
)
from partition.shipped import OURS, ROOT

_SAID = {"bytes": "number of bytes"}
"""What a dimension is called after "a", where not by its name."""
_MEND = "write {{ value = \"{example}\", kind = \"published\", source = \"where it stands\" }}"  # fmt: skip
_EXAMPLES = {"time": "15 us", "bytes": "96 GiB", "bandwidth": "400 Gbit/s", "compute": "667 TFLOP/s", "price": "2.24 $/h",
             "price per byte": "0 $/GB", "power": "500 W", "fraction": "0.85", "frequency": "1.1 GHz", "number": "8", "cycles": "554"}  # fmt: skip


def _quantity(dimension: str) -> Any:
    """A field type: a table of value (with unit), kind and source, read as a Quantity of this dimension."""

    def read(raw: Any) -> Quantity:
        mend = _MEND.format(example=_EXAMPLES[dimension])
        if not isinstance(raw, dict):
            raise ValueError(f"expected a number with kind and source, got {raw!r}; {mend}")
        if missing := [key for key in ("value", "kind", "source") if not str(raw.get(key, "")).strip()]:
            raise ValueError(f"the number has no {' and no '.join(missing)}; {mend}")
        if extra := set(raw) - {"value", "low", "high", "kind", "source", "note", "sparse"}:
            raise ValueError(f"unknown key {sorted(extra)[0]!r} beside value, low, high, kind and source")
        if not isinstance(raw["source"], str) or not isinstance(raw.get("note", ""), str):
            raise ValueError(f"source and note are text, got {raw['source']!r}")
        if raw["kind"] not in list(Kind):
            raise ValueError(f"kind {raw['kind']!r} is none of {', '.join(Kind)}")
        value = units.parse(raw["value"], dimension)
        if not math.isfinite(value):
            raise ValueError(f"a {_SAID.get(dimension, dimension)} is a finite number, got {raw['value']!r}")
        if dimension == "fraction" and not 0 < value <= 1:
            raise ValueError(f"a share lies above 0 and at most at 1, got {raw['value']!r}")
        if value == 0 and dimension not in units.ZERO:
            raise ValueError(f"a {_SAID.get(dimension, dimension)} of zero makes nothing run, got {raw['value']!r}")
        if raw.get("sparse", False) is not False:
            raise ValueError("a peak with sparsity is no dense one; state the dense peak, and keep the sparse one in its source")
        if dimension == "compute" and "spars" in raw["source"].lower() and "dense" not in raw["source"].lower():
            raise ValueError("the source speaks of sparsity and not of a dense figure; state the dense peak, and say so in the source")
        low, high = _band(raw, value, dimension)
        return Quantity(value=value, kind=Kind(raw["kind"]), source=raw["source"], low=low, high=high)

    text = {"anyOf": [{"type": "string"}, {"type": "number"}], "examples": [_EXAMPLES[dimension]], "description": f"a {_SAID.get(dimension, dimension)} with its unit, such as {_EXAMPLES[dimension]!r}"}
    shape = {
        "type": "object", "required": ["value", "kind", "source"], "additionalProperties": False,
        "properties": {"value": text, "low": text, "high": text, "kind": {"enum": list(Kind)}, "source": {"type": "string", "minLength": 1, "description": "where the number stands"}, "note": {"type": "string"}, "sparse": {"const": False}},
    }  # fmt: skip
    return Annotated[Quantity, BeforeValidator(read), WithJsonSchema(shape)]


def _band(raw: dict[str, Any], value: float, dimension: str) -> tuple[float | None, float | None]:
    """The band of a number, (None, None) where it has none. Raises ValueError."""
    if not {"low", "high"} & set(raw):
        return None, None
    if missing := {"low", "high"} - set(raw):
        raise ValueError(f"a band has two ends, {missing.pop()} is missing")
    low, high = (units.parse(raw[end], dimension) for end in ("low", "high"))
    if not (math.isfinite(low) and math.isfinite(high)) or low > high:
        raise ValueError(f"the band is reversed or infinite: low {raw['low']!r}, high {raw['high']!r}")
    if not low <= value <= high:
        raise ValueError(f"the value {raw['value']!r} lies outside of its band, {raw['low']!r} to {raw['high']!r}")
    if dimension == "fraction" and high > 1:
        raise ValueError(f"a share is at most 1, its band goes to {raw['high']!r}")
    if low == 0 and dimension not in units.ZERO:
        raise ValueError(f"a {_SAID.get(dimension, dimension)} of zero makes nothing run, the band goes to {raw['low']!r}")
    return low, high


DTYPES = ("float64", "float32", "tfloat32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "float4_e2m1fn", "int32", "int8", "int4")
"""What a peak may be stated for."""

Name = Annotated[str, Field(pattern=r"\S")]
"""Text that is not blank."""


def _known_dtypes(peak: dict[str, Any]) -> dict[str, Any]:
    if unknown := sorted(set(peak) - set(DTYPES)):
        raise ValueError(f"no dtype is called {unknown[0]!r}; known: {', '.join(DTYPES)}")
    return peak


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)


def _schema(of: type[Any]) -> type[_Strict]:
    """The table that a value of `hardware` is read from: its numbers with their dimensions, and tables within."""
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(of):
        needed = field.default is dataclasses.MISSING
        if "dimension" in field.metadata:
            kind = _quantity(field.metadata["dimension"])
            fields[field.name] = (kind, ...) if needed else (kind | None, None)
        elif field.name in _WITHIN:
            fields[field.name] = (_schema(_WITHIN[field.name]), ...) if needed else (_schema(_WITHIN[field.name]) | None, None)
        elif field.name == "peak":
            fields[field.name] = (Annotated[dict[str, _quantity("compute")], BeforeValidator(_known_dtypes), Field(min_length=1)], ...)  # type: ignore[misc]
        elif of is Precision:  # a format that is known, how it is known, and from where
            known = {"kind": Kind, "source": Name}.get(field.name, Annotated[str, AfterValidator(_format)])
            fields[field.name] = (known, ... if field.name in ("kind", "source") else field.default)
        else:
            fields[field.name] = (Name, ...) if needed else (type(field.default), field.default)
    return create_model(f"_{of.__name__}", __base__=_Strict, **fields)


def _format(name: str) -> str:
    if name not in FORMATS:
        raise ValueError(f"no format is called {name!r}; known: {', '.join(FORMATS)}")
    return name


_WITHIN: dict[str, type[Any]] = {"memory": Memory, "region": Region, "systolic": Systolic, "streaming": Streaming, "precision": Precision}
MODELS = ("region", "systolic", "streaming")
"""The tables of a device that say how its contractions cost what they cost; at most one of them stands in a profile."""


def _one_model(made: Any) -> Any:
    if len(given := [m for m in MODELS if getattr(made, m) is not None]) > 1:
        raise ValueError(f"a device computes in one way, this one has {' and '.join(given)}; keep one of the tables")
    return made


def _topology(made: Any) -> Any:
    if made.topology not in TOPOLOGIES:
        raise ValueError(f"no topology is called {made.topology!r}; known: {', '.join(TOPOLOGIES)}")
    if (made.ports is None) != (made.stripe is None) or (made.block is not None and made.block_time is None):
        raise ValueError("ports and stripe stand together or not at all, and a block needs a block_time")
    return made


class _Mesh(_Strict):
    name: Name
    device: Name
    count: int = Field(ge=1)
    stand_in: int = Field(ge=1)
    fabric: str | None = None
    copies: int = Field(default=1, ge=1)


class _Edge(_Strict):
    between: Annotated[list[str], Field(min_length=2, max_length=2)]
    link: str
    ingest: _quantity("bandwidth") | None = None  # type: ignore[valid-type]
    gateway: _quantity("time") | None = None  # type: ignore[valid-type]
    chain: bool = False


class _Cluster(_Strict):
    name: Name
    title: Name
    meshes: list[_Mesh] = Field(min_length=1)
    links: list[_Edge] = []


_TABLES: dict[str, Any] = {"device": Annotated[_schema(Device), AfterValidator(_one_model)], "link": Annotated[_schema(Link), AfterValidator(_topology)], "cluster": _Cluster}
Table = Literal["device", "link", "cluster"]


def schema() -> dict[str, Any]:
    """The JSON Schema of a profile, of whichever table, so that an editor completes and checks it as it is written."""
    defs: dict[str, Any] = {}
    kinds = []
    for table, kind in _TABLES.items():
        made = TypeAdapter(kind).json_schema(ref_template="#/$defs/{model}")
        defs |= made.pop("$defs", {})
        kinds.append({"type": "object", "title": f"a {table}", "properties": {table: made}, "required": [table], "additionalProperties": False})
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "a profile of Partition: a device, a link or a cluster", "oneOf": kinds, "$defs": defs}


def _line(text: str, location: tuple[Any, ...]) -> int:
    """The line of the deepest part of `location` that the TOML text holds, from 1."""
    import tree_sitter
    import tree_sitter_toml

    tree = tree_sitter.Parser(tree_sitter.Language(tree_sitter_toml.language())).parse(text.encode())
    found: dict[tuple[Any, ...], int] = {}
    arrays: dict[tuple[Any, ...], int] = {}

    def keys(node: Any) -> tuple[str, ...]:
        return tuple(part.strip("\"' ") for part in node.text.decode().split("."))

    def pairs(node: Any, prefix: tuple[Any, ...]) -> None:
        for child in node.children:
            if child.type == "pair":
                path = prefix + keys(child.children[0])
                found.setdefault(path, child.start_point[0] + 1)
                if child.children[-1].type == "inline_table":
                    pairs(child.children[-1], path)

    for node in tree.root_node.children:
        if node.type in ("table", "table_array_element"):
            prefix: tuple[Any, ...] = keys(next(c for c in node.children if c.type.endswith("key")))
            if node.type == "table_array_element":
                arrays[prefix] = arrays.get(prefix, -1) + 1
                prefix = (*prefix, arrays[prefix])
            found.setdefault(prefix, node.start_point[0] + 1)
            pairs(node, prefix)
    pairs(tree.root_node, ())
    return next((found[location[:n]] for n in range(len(location), 0, -1) if location[:n] in found), 1)


def _read(path: Path, table: Table) -> Any:
    """Read and validate one profile; every fault of the file is in the one ProfileError."""
    try:
        text = path.read_text("utf-8")
    except OSError as error:
        raise ProfileError(f"the profile cannot be read: {error.strerror}", where=str(path), mend="check the path") from None
    except UnicodeDecodeError as error:
        raise ProfileError(f"the profile is not UTF-8 text: {error.reason}", where=f"{path}, byte {error.start}", mend="save the file as UTF-8") from None
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ProfileError(f"the profile is not TOML: {error}", where=str(path), mend="mend the syntax at that line") from None
    if list(raw) != [table]:
        raise ProfileError(f"expected one table [{table}], found {', '.join(f'[{k}]' for k in raw) or 'none'}",
                           where=f"{path}:1", mend=f"a {table} profile holds [{table}] and nothing beside it")  # fmt: skip
    try:
        return TypeAdapter(_TABLES[table]).validate_python(raw[table])
    except ValidationError as error:
        lines = []
        for fault in error.errors():
            location = (table, *(part for part in fault["loc"] if part != "function-before[read(), is-instance[Quantity]]"))
            reason = fault["msg"].removeprefix("Value error, ")
            lines.append((_line(text, location), ".".join(map(str, location)), reason))
        lines.sort()
        faults = "\n         ".join(f"{path.name}:{line}: {field}: {reason}" for line, field, reason in lines)
        raise ProfileError(f"the profile {path.name} has {len(lines)} fault{'s'[:len(lines) != 1]}", where=faults,
                           mend=f"correct {path} at the lines named; docs: device_profiles/README.md") from None  # fmt: skip


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
    index: dict[str, dict[str, Path]] = {table: {} for table in _TABLES}
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
    raise NameUnknownError.among(table, name, names(table), mend="or name a .toml file of your own")


@checked
def device(name: str, beside: Path | None = None) -> Device:
    """Read a device profile by name or path. Raises ProfileError, NameUnknownError."""
    raw = _read(_find(name, "device", beside), "device")
    fields = {key: getattr(raw, key) for key in type(raw).model_fields}
    return Device(**fields | {key: made(**dict(fields[key])) for key, made in _WITHIN.items() if fields[key] is not None})


def link(name: str, beside: Path | None = None) -> Link:
    """Read a link profile by name or path. Raises ProfileError, NameUnknownError."""
    return Link(**dict(_read(_find(name, "link", beside), "link")))


def _named_by(where: str, read: Callable[[str, Path | None], Any], name: str, beside: Path) -> Any:
    try:
        return read(name, beside)
    except NameUnknownError as error:
        raise ProfileError(error.what, where=where, mend=error.mend) from None


@checked
def cluster(name: str) -> Cluster:
    """Read a cluster profile, its devices and its links, by name or path.

    `copies = 4` of a mesh "cs3" makes meshes cs3.0 .. cs3.3; a link that names "cs3" then stands for one to each of them, and
    `chain = true` for links between neighbours. Raises ProfileError, NameUnknownError.
    """
    path = _find(name, "cluster")
    raw, beside = _read(path, "cluster"), path.parent
    members: dict[str, list[str]] = {}
    meshes: list[Mesh] = []
    text = path.read_text("utf-8")
    for i, m in enumerate(raw.meshes):
        where = f"{path}:{_line(text, ('cluster', 'meshes', i))}: cluster.meshes.{i}"
        if m.name in members:
            raise ProfileError(f"two meshes are called {m.name!r}", where=where, mend="give each mesh a name of its own, or use copies = <n>")
        members[m.name] = [m.name] if m.copies == 1 else [f"{m.name}.{i}" for i in range(m.copies)]
        if m.stand_in > m.count:
            raise ProfileError(f"{m.stand_in} host devices cannot stand for {m.count} of mesh {m.name!r}", where=f"{where}.stand_in",
                               mend="let at most one host device stand for each device")  # fmt: skip
        fabric = _named_by(f"{where}.fabric", link, m.fabric, beside) if m.fabric else None
        made = _named_by(f"{where}.device", device, m.device, beside)
        if fabric is None and (m.count > 1 or made.systolic is not None):
            raise ProfileError(f"mesh {m.name!r} joins {m.count} device{'s' if m.count > 1 else ' of several cores'} by no fabric", where=where,
                               mend="name the link inside the mesh: fabric = \"...\"")  # fmt: skip
        meshes += [Mesh(name=n, device=made, count=m.count, stand_in=m.stand_in, fabric=fabric) for n in members[m.name]]
    edges: dict[tuple[str, str], Edge] = {}
    for i, e in enumerate(raw.links):
        at = f"{path}:{_line(text, ('cluster', 'links', i))}: cluster.links.{i}.between"
        if unknown := [m for m in e.between if m not in members]:
            raise ProfileError(f"a link joins {unknown[0]!r}, which is no mesh of this cluster", where=at,
                               mend=f"use the names under [[cluster.meshes]]: {', '.join(members)}")  # fmt: skip
        if e.between[0] == e.between[1] and len(members[e.between[0]]) == 1:
            raise ProfileError(f"a link joins {e.between[0]!r} with itself", where=at, mend="what joins the devices of one mesh is its fabric")
        made_link = _named_by(at.replace(".between", ".link"), link, e.link, beside)
        a, b = (members[m] for m in e.between)
        pairs = [(x, y) for k, x in enumerate(a) for j, y in enumerate(b) if x != y and (not e.chain or abs(k - j) == 1)]
        if twice := next((pair for pair in pairs if pair in edges), None):
            raise ProfileError(f"two links join {twice[0]!r} and {twice[1]!r}", where=at, mend="keep one of them: a link serves both directions")
        for x, y in pairs:
            edges[x, y] = Edge(src=x, dst=y, link=made_link, ingest=e.ingest, gateway=e.gateway)
            edges[y, x] = Edge(src=y, dst=x, link=made_link, ingest=e.ingest, gateway=e.gateway)
    return Cluster(name=raw.name, title=raw.title, meshes=tuple(meshes), edges=tuple(edges[k] for k in sorted(edges)))
