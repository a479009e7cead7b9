"""The command line: exit codes, JSON, files written whole, errors with a mend."""

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from partition.pipeline import Plan


def run(*args: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "partition", *args], capture_output=True, text=True, cwd=cwd, timeout=300)


def test_plan_writes_a_folder_that_loads_whole(tmp_path: Path) -> None:
    done = run("plan", "tiny", "--prompt", "16", "--new-tokens", "8", "--out", str(tmp_path / "o"), "--dump", str(tmp_path / "d"))
    assert done.returncode == 0, done.stderr
    assert "bound by" in done.stdout and "Memory" in done.stdout
    assert sorted(os.listdir(tmp_path / "o")) == ["explorer.json", "explorer_meshes.json", "explorer_seconds.json", "plan.json", "report.html", "trace.json"]
    assert len(os.listdir(tmp_path / "d")) == 9
    loaded = Plan.load(tmp_path / "o")
    loaded.save(tmp_path / "again")
    for name in ("plan.json", "trace.json"):
        assert (tmp_path / "o" / name).read_text() == (tmp_path / "again" / name).read_text(), name
    raw = json.loads((tmp_path / "o" / "plan.json").read_text())
    assert loaded.estimate.e2e == pytest.approx(raw["estimate"]["e2e"], rel=1e-12)
    assert loaded.problem.names == tuple(raw["problem"]["names"]) and "TTFT" in str(loaded)
    html = (tmp_path / "o" / "report.html").read_text()
    assert "http://" not in html and "https://" not in html and "<script" not in html
    events = json.loads((tmp_path / "o" / "trace.json").read_text())["traceEvents"]
    slices = [e for e in events if e["ph"] == "X"]
    assert slices and all(e["tid"] != e["pid"] and e["tid"] > 0 for e in slices)
    ends: dict[int, int] = {}
    for e in sorted(slices, key=lambda e: (e["tid"], e["ts"])):  # a viewer that counts nanoseconds sees no two slices of a track overlap
        start, length = round(e["ts"] * 1e3), round(e["dur"] * 1e3)
        assert start >= ends.get(e["tid"], 0) and length >= 1
        ends[e["tid"]] = start + length


def test_check_writes_json_and_junit_and_ends_with_zero(tmp_path: Path) -> None:
    done = run("check", "tiny", "--prompt", "8", "--new-tokens", "4", "--json-file", str(tmp_path / "v.json"), "--junit", str(tmp_path / "v.xml"))
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "v.json").read_text())["equal"] is True
    suite = ET.parse(tmp_path / "v.xml").getroot()[0]
    assert suite.get("failures") == "0" and int(suite.get("tests", "0")) >= 2


@pytest.mark.parametrize(("args", "code", "says"), [
    (["plan", "lama-3.1-8b"], 2, "did you mean 'llama-3.1-8b'"),
    (["plan", "tiny", "--cluster", "trn2_efa_cs33"], 2, "did you mean 'trn2_efa_cs3'"),
    (["plan", "tiny", "--policy", "phasesplit"], 2, "did you mean 'phase_split'"),
    (["plan", "tiny", "--objective", "speed"], 2, "there is no objective"),
    (["plan", "tiny", "--promt", "3"], 2, "--prompt"),
    (["plan", "llama-3.1-70b", "--policy", "phase_split", "--cluster", "trn2_efa_cs3", "--prompt", "64", "--new-tokens", "4"], 3, "too much"),
    (["plan", "tiny", "--cluster", "nowhere.toml"], 2, "cannot be read"),
    (["plan", "tiny", "--prompt", "8", "--new-tokens", "4", "--out", "/proc/no"], 2, "folder that you may write"),
    (["plan", "os:getcwd"], 2, "not (fn, args)"),
], ids=lambda x: str(x)[:40])  # fmt: skip
def test_wrong_use_is_said_with_its_mend(args: list[str], code: int, says: str, tmp_path: Path) -> None:
    done = run(*args, cwd=tmp_path)
    assert done.returncode == code, (done.returncode, done.stderr)
    assert says in done.stderr and not done.stdout
    assert "Traceback" not in done.stderr


def test_compare_lists_every_policy_and_speaks_json() -> None:
    done = run("compare", "tiny", "--prompt", "16", "--new-tokens", "8", "--policy", "single", "--policy", "random", "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert {r["policy"] for r in rows} == {"single", "random"} and rows[0]["estimate"]["e2e"] <= rows[1]["estimate"]["e2e"]
    done = run("compare", "tiny", "--prompt", "16", "--new-tokens", "8", "--policy", "single", "--limit", "ttft=1ns", "--json")
    assert done.returncode == 3 and json.loads(done.stdout)["rows"][0]["why_not"], done.stderr


def test_devices_speak_json_with_sources() -> None:
    raw = json.loads(run("devices", "--json").stdout)
    assert {d["name"] for d in raw["devices"]} >= {"trn2", "cs3", "h100"}
    assert all(d["price"]["source"] for d in raw["devices"])


def test_a_fault_of_our_own_is_called_one() -> None:
    code = "import partition.pipeline as p, sys; p.plan = lambda *a, **k: 1 / 0; sys.argv = ['partition', 'plan', 'tiny']; from partition.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 4 and "crash: ZeroDivisionError" in done.stderr and "mend:" in done.stderr
