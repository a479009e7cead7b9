"""What the TOML of a profile may hold: tables of named entries, a number of which has a unit, a kind and a source. Reads them, and tells every fault with its line.

The tables follow from the values of `hardware.py`; their JSON Schema lets an editor complete them as they are written.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import tomllib
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
from partition.errors import ProfileError
from partition.hardware import FORMATS, TOPOLOGIES, Device, Kind, Link, Memory, Precision, Quantity, Region, Streaming, Systolic

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

    text = {"type": "string", "pattern": units.pattern(dimension), "examples": [_EXAMPLES[dimension]], "description": f"a {_SAID.get(dimension, dimension)} with its unit, such as {_EXAMPLES[dimension]!r}"}
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
        elif field.name in WITHIN:
            fields[field.name] = (_schema(WITHIN[field.name]), ...) if needed else (_schema(WITHIN[field.name]) | None, None)
        elif field.name == "peak":
            fields[field.name] = (Annotated[dict[str, _quantity("compute")], Field(min_length=1), BeforeValidator(_known_dtypes)], ...)  # type: ignore[misc]
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


WITHIN: dict[str, type[Any]] = {"memory": Memory, "region": Region, "systolic": Systolic, "streaming": Streaming, "precision": Precision}
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


TABLES: dict[str, Any] = {"device": Annotated[_schema(Device), AfterValidator(_one_model)], "link": Annotated[_schema(Link), AfterValidator(_topology)], "cluster": _Cluster}
Table = Literal["device", "link", "cluster"]


@functools.cache
def _adapter(table: str) -> TypeAdapter[Any]:
    return TypeAdapter(TABLES[table])


def schema() -> dict[str, Any]:
    """The JSON Schema of a profile, of whichever table, so that an editor completes and checks it as it is written."""
    defs: dict[str, Any] = {}
    kinds = []
    for table in TABLES:
        made = _adapter(table).json_schema(ref_template="#/$defs/{model}")
        defs |= made.pop("$defs", {})
        kinds.append({"type": "object", "title": f"a {table}", "properties": {table: made}, "required": [table], "additionalProperties": False})
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "a profile of Partition: a device, a link or a cluster", "oneOf": kinds, "$defs": defs}


def line_of(text: str, location: tuple[Any, ...]) -> int:
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


def read(path: Path, table: Table) -> Any:
    """Read and validate one profile; every fault of the file is in the one ProfileError."""
    try:
        text = path.read_text("utf-8")
    except OSError as error:
        raise ProfileError(f"the profile cannot be read: {error.strerror}", where=str(path), mend="check the path") from None
    except UnicodeDecodeError as error:
        raise ProfileError(f"the profile is not UTF-8 text: {error.reason}", where=f"{path}, byte {error.start}", mend="save the file as UTF-8") from None
    return _parsed(path, text, table)


@functools.lru_cache(maxsize=256)
def _parsed(path: Path, text: str, table: Table) -> Any:
    """A profile from its text; the clusters of a list name the same devices again and again."""
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ProfileError(f"the profile is not TOML: {error}", where=str(path), mend="mend the syntax at that line") from None
    if list(raw) != [table]:
        raise ProfileError(f"expected one table [{table}], found {', '.join(f'[{k}]' for k in raw) or 'none'}",
                           where=f"{path}:1", mend=f"a {table} profile holds [{table}] and nothing beside it")  # fmt: skip
    try:
        return _adapter(table).validate_python(raw[table])
    except ValidationError as error:
        lines = []
        for fault in error.errors():
            location = (table, *(part for part in fault["loc"] if part != "function-before[read(), is-instance[Quantity]]"))
            lines.append((line_of(text, location), ".".join(map(str, location)), _reason(fault, str(location[-1]))))
        lines.sort()
        faults = "\n         ".join(f"{path.name}:{line}: {field}: {reason}" for line, field, reason in lines)
        raise ProfileError(f"the profile {path.name} has {len(lines)} fault{'s'[:len(lines) != 1]}", where=faults,
                           mend=f"correct {path} at the lines named; docs: device_profiles/README.md") from None  # fmt: skip


def _reason(fault: Any, key: str) -> str:
    """What is wrong with an entry of a profile; of a name that is none, the one that it is likely meant to be."""
    if fault["type"] == "missing":
        return "it is missing"
    if fault["type"] != "extra_forbidden":
        return str(fault["msg"]).removeprefix("Value error, ")
    near = difflib.get_close_matches(key, _keys(schema()), n=1)
    return f"nothing is called {key!r} here" + (f", did you mean {near[0]!r}?" if near else "")


def _keys(part: Any) -> set[str]:
    """The names of all properties in a JSON Schema."""
    within = part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
    own = set(part["properties"]) if isinstance(part, dict) and isinstance(part.get("properties"), dict) else set()
    return own.union(*(_keys(value) for value in within))
