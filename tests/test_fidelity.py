"""Predicted against published: what the errors are made of, the wafer's regions by hand, and measurements that are refused."""

import dataclasses
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from partition import profiles
from partition.cli import app
from partition.costs import cost
from partition.errors import PartitionError
from partition.fidelity import fidelity_text, summaries, validate
from partition.fidelity.fitting import fit, fits_text
from partition.fidelity.kernels import operators, operators_text
from partition.fidelity.measurements import measurements
from partition.hardware import Kind, Mesh, Quantity
from partition.work import Work


@pytest.fixture(scope="module")
def points() -> object:
    return validate()


def test_every_point_has_its_source_and_its_prediction(points: tuple[object, ...]) -> None:
    assert len(points) == sum(len(m.points) for _, m in measurements())
    for p in points:
        assert p.source and p.kind in (Kind.MEASURED, Kind.DERIVED, Kind.PUBLISHED)  # type: ignore[attr-defined]
        assert 0 < p.low <= p.predicted <= p.high and p.published > 0  # type: ignore[attr-defined]


def test_the_errors_are_within_what_is_claimed(points: tuple[object, ...]) -> None:
    found = {(s.subject, s.metric, s.fitted): s for s in summaries(points)}  # type: ignore[arg-type]
    assert found["wse2", "tpot", True].mean < 0.05 and found["rdma_200", "transfer", True].mean < 0.05
    assert found["wse2", "ttft", False].mean < 0.10 and found["cs3", "tpot", True].mean < 0.10
    for chip in ("trn1", "inf2"):
        assert found[chip, "tpot", True].mean < 0.12 and found[chip, "tpot", False].mean < 0.12
    assert found["trn2", "tpot", True].mean < 0.12 and found["h100", "ttft", False].mean < 0.1
    assert sum(s.points for s in found.values()) >= 120
    assert all(s.worst.error == max((p.error for p in points if (p.subject, p.metric, p.fitted) == key), key=abs) for key, s in found.items())  # type: ignore[attr-defined]
    text = fidelity_text(points)  # type: ignore[arg-type]
    assert "not fitted" in text and "worst of wse2 ttft, not fitted" in text and "source of rdma_200 transfer" in text


FIT = '''[measurements]
title = "t"
source = "s"
kind = "measured"
subject = "rdma_200"
metric = "transfer"
unit = "us"
family = "lines"
free = ["fabric.alpha", "own fabric.beta"]
columns = ["model", "bytes", "value"]
points = [["a", 1000, 20.0], ["a", 1_000_000_000, 10_020.0], ["b", 100_000_000, 1020.0], ["b", 1000, 20.01], ["c", 500_000_000, 5020.0], ["c", 10_000, 20.1]]
'''


def test_a_fit_finds_the_numbers_that_the_points_were_made_with(tmp_path: Path) -> None:
    """t = 20 us + bytes / 100 GB/s, without noise: the fit finds both, and errs as little on points that it was not given."""
    (tmp_path / "lines.toml").write_text(FIT)
    (found,) = fit(tmp_path)
    assert found.values["fabric.alpha"][1] == pytest.approx(20e-6, rel=0.05) and found.values["rdma_200 fabric.beta"][1] == pytest.approx(100e9, rel=0.05)
    assert found.after < 0.03 < found.before and found.mean_held_out is not None and found.mean_held_out < 0.1
    assert set(found.held_out or ()) == {"a", "b", "c"} and "held out" in fits_text([found])
    (tmp_path / "lines.toml").write_text(FIT.replace("fabric.alpha", "fabric.gamma"))
    with pytest.raises(PartitionError, match="could be fitted"):
        fit(tmp_path)


def test_tables_of_operators_are_read_row_by_row(tmp_path: Path) -> None:
    """What a profile predicts, written as if it were measured, has no error; twice of it has a half."""
    import pyarrow
    from pyarrow import parquet

    place = tmp_path / "gemm" / "mine" / "1.0"
    place.mkdir(parents=True)
    rows = {"m": [1, 64, 4096], "n": [4096, 4096, 4096], "k": [4096, 1024, 4096], "gemm_dtype": ["bfloat16"] * 2 + ["int4_wo"], "latency": [1.0, 1.0, 1.0]}
    parquet.write_table(pyarrow.table(rows), place / "gemm_perf.parquet")
    (first,) = operators(tmp_path, profiles.device("h100"))
    assert first.points == 2 and first.left_out == 1 and first.operator == "gemm" and "gemm/mine/1.0" in operators_text([first])
    with pytest.raises(PartitionError, match="no tables"):
        operators(place / "none", profiles.device("h100"))
    parquet.write_table(pyarrow.table({"m": [1]}), place / "gemm_perf.parquet")
    with pytest.raises(PartitionError, match="no column 'n'"):
        operators(tmp_path, profiles.device("h100"))


def test_the_command_fits_and_reads_tables(tmp_path: Path) -> None:
    (tmp_path / "lines.toml").write_text(FIT)
    shown = CliRunner().invoke(app, ["validate", str(tmp_path), "--fit"])
    assert shown.exit_code == 0 and "held out" in shown.output
    for wrong, says in ((["--device", "h100"], "no folder"), ([str(tmp_path), "--device", "h100"], "no tables"), ([str(tmp_path), "--fit", "--device", "h100"], "not fitted here")):
        refused = CliRunner().invoke(app, ["validate", *wrong])
        assert isinstance(refused.exception, PartitionError) and says in refused.exception.what


def test_more_cores_can_be_slower() -> None:
    """A decode contraction of 4096 x 4096 on g x g cores: 566 + 1.703 g + 3.56 x 4096^2 / (4 g^2) cycles, for one row."""
    device, seconds = profiles.device("wse2"), {}
    work = Work(flops={"float16": 2 * 4096**2}, contractions=1, rows=1, macs=4096**2)
    for side in (60, 300, 800):
        region = dataclasses.replace(device.region, side=Quantity(value=float(side), kind=Kind.ASSUMED, source="the test"))  # type: ignore[type-var]
        mesh = Mesh(name="wse2", device=dataclasses.replace(device, region=region), count=1, stand_in=1)
        seconds[side] = cost(work, mesh).seconds
        cycles = (532 + 1.62 * side) + (34 + 0.083 * side) + 3.56 * 4096**2 / (4 * side**2)
        assert seconds[side] == pytest.approx(cycles / 1.1e9)
    assert seconds[300] < seconds[60] and seconds[300] < seconds[800]


def test_layers_side_by_side_share_the_cores() -> None:
    mesh = profiles.cluster("wse2_only").mesh("wse2")
    work = Work(flops={"float16": 2e9}, contractions=1, rows=1, macs=1e9)
    assert cost(work, mesh, layers=32).compute == pytest.approx(32 * cost(work, mesh).compute)


GOOD = '[measurements]\ntitle = "t"\nsource = "s"\nkind = "measured"\nsubject = "rdma_200"\nmetric = "transfer"\nunit = "ms"\ncolumns = ["bytes", "value"]\npoints = [[1000, 1.0]]\n'


@pytest.mark.parametrize(
    "old, new, says",
    [
        ('source = "s"\n', "", "source: Field required"), ('source = "s"', 'source = " "', "source: String should match"), ("1.0]", "-1.0]", "no positive value"),
        ('"measured"', '"heard"', "kind"), ("[[1000, 1.0]]", "[[1000]]", "one entry for each column"), ('"ms"', '"miles"', "tokens/s, not in 'miles'"),
        ('"value"]', '"bytes2"]', "no column is called 'value'"), ('"rdma_200"', '"rdma_20"', "did you mean 'rdma_200'"), ("[measurements]", "[measures]", "faults"),
        ("[[1000, 1.0]]", "[]", "at least 1"), ("title", "title =", "cannot be read"),
    ],
)  # fmt: skip
def test_measurements_with_faults_are_refused(old: str, new: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "good.toml").write_text(GOOD)
    assert len(validate(tmp_path)) == 1
    (tmp_path / "good.toml").write_text(GOOD.replace(old, new))
    with pytest.raises(PartitionError, match=says):
        validate(tmp_path)


def test_a_folder_without_measurements_is_said(tmp_path: Path) -> None:
    with pytest.raises(PartitionError, match="there are no measurements"):
        validate(tmp_path)


def test_the_command_prints_points_and_json(tmp_path: Path) -> None:
    (tmp_path / "one.toml").write_text(GOOD)
    shown = CliRunner().invoke(app, ["validate", str(tmp_path), "--points"])
    assert shown.exit_code == 0 and "bytes 1000" in shown.output and "mean error" in shown.output
    raw = json.loads(CliRunner().invoke(app, ["validate", str(tmp_path), "--json"]).stdout)["rows"]
    assert raw[0]["subject"] == "rdma_200" and raw[0]["error"] == pytest.approx((0.394e-3 + 1000 / 146e9) / 1e-3 - 1)
