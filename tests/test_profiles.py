"""Profiles: what ships is whole and sourced; every planted fault is refused with its file, line, field and mend."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import device_profiles
from partition import profiles, schemas
from partition.errors import NameUnknownError, ProfileError
from partition.hardware import Cluster, Device, Kind, Link, Quantity

SHIPPED = Path(str(device_profiles.__path__[0]))
LOADERS = {"device": profiles.device, "link": profiles.link, "cluster": profiles.cluster}
ALL = [(table, name) for table in LOADERS for name in profiles.names(table)]  # type: ignore[arg-type]


def quantities(value: object) -> Iterator[Quantity]:
    if isinstance(value, Quantity):
        yield value
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from quantities(getattr(value, field.name))
    elif isinstance(value, (tuple, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from quantities(part)


def test_every_shipped_file_has_a_name() -> None:
    assert sorted(name for _, name in ALL) == sorted(p.stem for p in SHIPPED.glob("*.toml"))


@pytest.mark.parametrize(("table", "name"), ALL)
def test_shipped_profile(table: str, name: str) -> None:
    made = LOADERS[table](name)
    assert made.name == name
    numbers = list(quantities(made))
    # a device: at least one peak, three of the memory, five more; a link: three; a cluster: at least one device
    assert len(numbers) >= {"device": 9, "link": 3, "cluster": 9}[table]
    assert all(q.kind in list(Kind) and len(q.source) > 3 and q.value >= 0 for q in numbers)


def test_cluster_nx_edges_carry_alpha_beta_ingest_and_price() -> None:
    c = profiles.cluster("trn2_efa_cs3")
    assert set(c.nx.nodes) == {"trn2", "cs3"} and set(c.nx.edges) == {("trn2", "cs3"), ("cs3", "trn2")}
    edge = c.nx.edges["trn2", "cs3"]
    assert edge["link"] == "efa_v3"
    assert edge["alpha"] == pytest.approx(15e-6)
    assert (edge["bandwidth"], edge["ingest"], edge["beta"]) == pytest.approx((347e9, 150e9, 150e9))  # the ingest is narrower
    assert edge["price"] == 0.0
    assert c.nx.nodes["trn2"]["count"] == 16
    assert c.nx.nodes["trn2"]["capacity"] == pytest.approx(16 * 96 * 2**30 * 0.90)
    assert c.nx.nodes["trn2"]["price"] == pytest.approx(16 * 2.235 / 3600)


def test_a_new_beta_is_what_really_passes() -> None:
    c = profiles.cluster("trn2_efa_cs3").replace(beta={"efa_v3": 500e9}, price={"cs3": 2.0})
    assert c.nx.edges["trn2", "cs3"]["beta"] == 500e9 and c.nx.nodes["cs3"]["price"] == 2.0
    assert c.edges[0].link.beta.kind is Kind.ASSUMED


# a user's own files ---------------------------------------------------------------------------------------------------

Q = 'kind = "published", source = "datasheet"'
DEVICE = f"""\
[device]
name = "mine"
title = "Mine"

[device.peak]
float32 = {{ value = "1 TFLOP/s", {Q} }}

[device.memory]
capacity = {{ value = "10 GB", {Q} }}
bandwidth = {{ value = "1 TB/s", {Q} }}
usable = {{ value = "90 %", {Q} }}

[device.compute_efficiency]
value = "50 %"
kind = "assumed"
source = "guess"

[device.memory_efficiency]
value = "80 %"
kind = "assumed"
source = "guess"

[device.contraction_latency]
value = "1 us"
kind = "assumed"
source = "guess"

[device.price]
value = "1 $/h"
kind = "assumed"
source = "guess"

[device.power]
value = "500 W"
kind = "assumed"
source = "guess"
"""
CLUSTER = f"""\
[cluster]
name = "ours"
title = "Ours"

[[cluster.meshes]]
name = "a"
device = "mine"
count = 1
stand_in = 1

[[cluster.meshes]]
name = "b"
device = "mine"
count = 1
stand_in = 1
copies = 3

[[cluster.links]]
between = ["a", "b"]
link = "efa_v3"
ingest = {{ value = "10 GB/s", {Q} }}
"""


def line_of(text: str, part: str) -> int:
    return next(n for n, line in enumerate(text.splitlines(), 1) if part in line)


def put(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def load_cluster(folder: Path, text: str) -> Cluster:
    put(folder, "mine.toml", DEVICE)
    return profiles.cluster(put(folder, "ours.toml", text))


def test_own_files_are_found_beside_the_cluster(tmp_path: Path) -> None:
    c = load_cluster(tmp_path, CLUSTER)
    assert [m.name for m in c.meshes] == ["a", "b.0", "b.1", "b.2"]
    assert sorted(c.nx.edges) == sorted([(x, y) for n in range(3) for x, y in (("a", f"b.{n}"), (f"b.{n}", "a"))])
    assert all(isinstance(m.device, Device) and isinstance(e.link, Link) for m in c.meshes for e in c.edges)
    chain = CLUSTER.replace('["a", "b"]', '["b", "b"]') + "chain = true\n"
    (tmp_path / "chain").mkdir()
    assert sorted(load_cluster(tmp_path / "chain", chain).nx.edges) == [("b.0", "b.1"), ("b.1", "b.0"), ("b.1", "b.2"), ("b.2", "b.1")]


FAULTS = [  # (what stands there, what is planted, where it must be found, the field, what the reason says)
    ('"10 GB"', '"10 Gb"', 'capacity = {', "device.memory.capacity", "units of bytes are"),
    ('"1 TB/s"', '"1"', "bandwidth = {", "device.memory.bandwidth", "expected bandwidth such as"),
    (f'"1 TFLOP/s", {Q}', '"1 TFLOP/s", source = "x"', "float32 =", "device.peak.float32", "no kind; write { value ="),
    (f'"90 %", {Q}', '"90 %", kind = "published"', "usable =", "device.memory.usable", "no source; write { value ="),
    (f'{{ value = "10 GB", {Q} }}', '"10 GB"', "capacity =", "device.memory.capacity", "with kind and source"),
    (f'"1 TB/s", {Q}', '"1 TB/s", kind = "rumour", source = "x"', "bandwidth =", "device.memory.bandwidth", "none of published, derived"),
    ('"50 %"', '"150 %"', "[device.compute_efficiency]", "device.compute_efficiency", "above 0 and at most at 1"),
    ('"500 W"', '"0 W"', "[device.power]", "device.power", "of zero"),
    ('title = "Mine"', 'title = "Mine"\ncolour = "red"', "colour", "device.colour", "nothing is called"),
    ('"80 %"\n', '"80 %"\ncolour = "red"\n', "[device.memory_efficiency]", "device.memory_efficiency", "unknown key 'colour'"),
    ('"10 GB"', '"1e999 GB"', "capacity = {", "device.memory.capacity", "a finite number"),
    (f'"90 %", {Q}', '"90 %", kind = "published", source = " "', "usable =", "device.memory.usable", "no source; write"),
    (f'"90 %", {Q}', '"90 %", kind = "published", source = 3', "usable =", "device.memory.usable", "are text"),
    ('title = "Mine"', 'title = " "', "title =", "device.title", "should match pattern"),
    ("float32 =", "float33 =", "[device.peak]", "device.peak", "no dtype is called 'float33'"),
    ('"1 TB/s"', '"1 TB/s", low = "2 TB/s", high = "0.5 TB/s"', "bandwidth =", "device.memory.bandwidth", "the band is reversed"),
    ('"1 TB/s"', '"1 TB/s", low = "2 TB/s", high = "3 TB/s"', "bandwidth =", "device.memory.bandwidth", "lies outside of its band"),
    ('"1 TB/s"', '"1 TB/s", low = "0.5 TB/s"', "bandwidth =", "device.memory.bandwidth", "high is missing"),
    ('"1 TB/s"', '"1 TB/s", low = "0.5 TB/s", high = "3 W"', "bandwidth =", "device.memory.bandwidth", "units of bandwidth are"),
    ('"90 %"', '"90 %", low = "80 %", high = "110 %"', "usable =", "device.memory.usable", "at most 1"),
    (f'"1 TFLOP/s", {Q}', f'"1 TFLOP/s", sparse = true, {Q}', "float32 =", "device.peak.float32", "with sparsity is no dense one"),
    (f'"1 TFLOP/s", {Q}', '"1 TFLOP/s", kind = "published", source = "with 2:4 sparsity"', "float32 =", "device.peak.float32", "not of a dense figure"),
    ("[device.power]", "[device.powre]", "[device.powre]", "device.powre", "nothing is called"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "mark", "field", "reason"), FAULTS)
def test_planted_fault_in_a_device(tmp_path: Path, old: str, new: str, mark: str, field: str, reason: str) -> None:
    assert DEVICE.count(old) == 1
    text = DEVICE.replace(old, new)
    with pytest.raises(ProfileError) as caught:
        profiles.device(put(tmp_path, "mine.toml", text))
    fault = next(line for line in caught.value.where.splitlines() if f": {field}: " in line)
    assert f"mine.toml:{line_of(text, mark)}: " in fault and reason in fault
    assert str(tmp_path / "mine.toml") in caught.value.mend


def test_all_faults_of_a_file_come_at_once_in_order(tmp_path: Path) -> None:
    text = DEVICE.replace('"500 W"', '"500 V"').replace('"10 GB"', '"10 Gb"')
    with pytest.raises(ProfileError, match="2 faults") as caught:
        profiles.device(put(tmp_path, "mine.toml", text))
    assert [line.split(":")[2].strip() for line in caught.value.where.splitlines()] == ["device.memory.capacity", "device.power"]


def test_fault_in_an_array_of_tables_has_the_line_of_its_element(tmp_path: Path) -> None:
    text = CLUSTER.replace("copies = 3", "copies = 0").replace('"10 GB/s"', '"10 Gb/s"')
    with pytest.raises(ProfileError) as caught:
        load_cluster(tmp_path, text)
    assert f"ours.toml:{line_of(text, 'copies')}: cluster.meshes.1.copies: " in caught.value.where
    assert f"ours.toml:{line_of(text, 'ingest')}: cluster.links.0.ingest: " in caught.value.where


def test_malformed_toml_names_file_and_line(tmp_path: Path) -> None:
    text = DEVICE.replace('title = "Mine"', 'title = "Mine')
    with pytest.raises(ProfileError, match=f"line {line_of(text, 'title')}") as caught:
        profiles.device(put(tmp_path, "mine.toml", text))
    assert str(tmp_path / "mine.toml") in caught.value.where


def test_wrong_table_and_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"expected one table \[link\], found \[device\]"):
        profiles.link(put(tmp_path, "mine.toml", DEVICE))
    with pytest.raises(ProfileError, match="cannot be read") as caught:
        profiles.device(str(tmp_path / "nowhere.toml"))
    assert "nowhere.toml" in caught.value.where


def test_unknown_cluster_suggests_a_near_name() -> None:
    with pytest.raises(NameUnknownError, match="did you mean 'trn2_efa_cs3'") as caught:
        profiles.cluster("trn2_efa_cs33")
    assert ".toml" in caught.value.mend


# (old, planted, error, field, part of the mend, where it stands)
JOINS = {
    "unknown device": ('device = "mine"\ncount = 1\nstand_in = 1\n\n', 'device = "trn9"\ncount = 1\nstand_in = 1\n\n',
                       ProfileError, "cluster.meshes.0.device", "did you mean 'trn", 'device = "trn9"'),
    "link to an unknown mesh": ('["a", "b"]', '["a", "c"]', ProfileError, "cluster.links", "a, b", "between"),
    "a link to itself": ('["a", "b"]', '["a", "a"]', ProfileError, "cluster.links.0.between", "its fabric", "between"),
    "two links": ("[[cluster.links]]", '[[cluster.links]]\nbetween = ["b", "a"]\nlink = "efa_v3"\n\n[[cluster.links]]', ProfileError, "cluster.links.1.between",
                  "keep one", 'between = ["a", "b"]'),
    "more stand-ins than devices": ("count = 1\nstand_in = 1\n\n", "count = 1\nstand_in = 2\n\n", ProfileError, "cluster.meshes.0.stand_in",
                                    "at most one", "stand_in = 2"),
    "many devices, no fabric": ("count = 1\nstand_in = 1\n\n", "count = 4\nstand_in = 1\n\n", ProfileError, "cluster.meshes", "fabric =", "count = 4"),
}  # fmt: skip


@pytest.mark.parametrize("case", JOINS)
def test_planted_fault_between_profiles_names_field_and_mend(tmp_path: Path, case: str) -> None:
    old, new, error, field, mend, _ = JOINS[case]
    assert CLUSTER.count(old) == 1
    with pytest.raises(error) as caught:
        load_cluster(tmp_path, CLUSTER.replace(old, new))
    assert field in caught.value.where and mend in caught.value.mend


@pytest.mark.parametrize("case", JOINS)
def test_planted_fault_between_profiles_names_file_and_line(tmp_path: Path, case: str) -> None:
    old, new, error, _, _, mark = JOINS[case]
    text = CLUSTER.replace(old, new)
    table = max(n for n, line in enumerate(text.splitlines(), 1) if line.startswith("[[") and n < line_of(text, mark))
    with pytest.raises(error) as caught:
        load_cluster(tmp_path, text)
    assert any(f"ours.toml:{n}:" in caught.value.where for n in range(table, line_of(text, mark) + 1))


def test_files_that_are_no_text_disturb_only_who_names_them(tmp_path: Path) -> None:
    (tmp_path / "other.toml").write_bytes(b"[device]\nname = \"\xff\"")
    (tmp_path / "folder.toml").mkdir()
    assert load_cluster(tmp_path, CLUSTER).meshes
    with pytest.raises(ProfileError, match="not UTF-8"):
        profiles.device(str(tmp_path / "other.toml"))
    with pytest.raises(ProfileError, match="cannot be read"):
        profiles.device(str(tmp_path / "folder.toml"))


def test_two_meshes_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ProfileError):
        load_cluster(tmp_path, CLUSTER.replace('name = "b"', 'name = "a"').replace("copies = 3\n", "").split("[[cluster.links]]")[0])


def test_a_profile_written_after_the_error_is_found(tmp_path: Path) -> None:
    path = put(tmp_path, "ours.toml", CLUSTER)
    with pytest.raises(ProfileError):
        profiles.cluster(path)
    put(tmp_path, "mine.toml", DEVICE)
    assert profiles.cluster(path).mesh("a").device.name == "mine"


def test_the_schema_is_current_and_says_what_the_reader_says() -> None:
    """An editor that holds a profile to the schema finds what the reader would: names, numbers without a source, unknown tables."""
    jsonschema = pytest.importorskip("jsonschema")
    file = Path(__file__).parents[1] / "device_profiles" / "profile.schema.json"
    schema = json.loads(file.read_text())
    assert schema == json.loads(json.dumps(schemas.schema())), "make it again: partition devices --schema > device_profiles/profile.schema.json"
    checker = jsonschema.Draft202012Validator(schema)
    for path in sorted(file.parent.glob("*.toml")):
        checker.validate(json.loads(json.dumps(tomllib.loads(path.read_text()))))
    good = tomllib.loads((file.parent / "cs3.toml").read_text())
    for change in ({"colour": "blue"}, {"name": ""}, {"price": 3}, {"price": {"value": "3 $/h", "kind": "published"}}, {"price": {"value": "3 $/h", "kind": "guess", "source": "x"}},
                   {"price": {"value": "3", "kind": "assumed", "source": "x"}}, {"price": {"value": 3, "kind": "assumed", "source": "x"}}, {"price": {"value": "3 W", "kind": "assumed", "source": "x"}}, {"peak": {}}):  # fmt: skip
        assert not checker.is_valid({"device": good["device"] | change}), change
