"""The plug-in in a repository that is not ours: terminal, JUnit, step summary, annotations, and the same under xdist."""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

MODEL = """
import jax.numpy as jnp
import numpy as np

W = np.random.default_rng(0).standard_normal((8, 8)).astype(np.float32)
X = np.ones((2, 8), np.float32)


def model(w, x):
    return jnp.tanh(x @ w) @ w


def other(w, x):
    return jnp.sin(x @ w) @ w
"""
TESTS = """
import pytest
from model import W, X, model, other


@pytest.mark.partition_equivalence(policy="random", cluster="trn2_efa_4cs3")
def test_split(partition_equivalence):
    verdict = partition_equivalence(model, (W, X))
    assert verdict.bitwise and verdict.stages > 1 and verdict.moved_bytes
    partition_equivalence(model, (W, X), policy="single")


def test_other(partition_equivalence):
    partition_equivalence(model, (W, X), candidate=other)


def test_unknown(partition_equivalence):
    partition_equivalence(model, (W, X), cluster="nope")


def test_nothing():
    pass
"""
WRONG = """
import pytest
from model import W, X, model


def test_option(partition_equivalence):
    partition_equivalence(model, (W, X), polcy="random")


def test_args(partition_equivalence):
    partition_equivalence(model, W)


def test_tolerance(partition_equivalence):
    partition_equivalence(model, (W, X), tolerance={"floot32": 1e-3})
"""


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_strangers_repository(workers: str, tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(MODEL)
    (tmp_path / "test_it.py").write_text(TESTS)
    summary = tmp_path / "summary.md"
    env = os.environ | {"GITHUB_ACTIONS": "true", "GITHUB_STEP_SUMMARY": str(summary), "GITHUB_WORKSPACE": str(tmp_path), "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-n", workers, "--junitxml", "j.xml", "test_it.py"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=200)
    assert "2 failed, 2 passed" in done.stdout, done.stdout + done.stderr
    told = done.stdout.split("numeric equivalence")[1]
    assert told.count("bit for bit    test_it.py::test_split") == 2 and "not equal      test_it.py::test_other: against other" in told
    assert "::error file=model.py,line=14,title=reference and candidate differ::" in told and "op 1 (sin)" in told  # the candidate's own line
    assert "::error file=test_it.py,line=1," in told and "there is no cluster called 'nope'" in told
    assert "Traceback" not in done.stdout
    text = summary.read_text()
    assert "2 of 4 checks equal" in text and text.count("| `test_it.py::") == 4
    cases = {c.get("name"): {p.get("name"): p.get("value") for p in c.iter("property")} for c in ET.parse(tmp_path / "j.xml").iter("testcase")}
    assert cases["test_split"]["partition.verdict"] == "bit for bit" and cases["test_split"]["partition.policy"] == "random" and cases["test_split"]["partition.2.policy"] == "single"
    assert cases["test_other"]["partition.verdict"] == "not equal" and int(cases["test_other"]["partition.max_ulp"]) > 0 and not cases["test_nothing"]


def test_a_run_without_the_fixture_says_nothing_and_starts_no_jax(tmp_path: Path) -> None:
    (tmp_path / "test_plain.py").write_text("import sys\n\n\ndef test_plain():\n    assert 'jax' not in sys.modules and 'networkx' not in sys.modules\n")
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "test_plain.py"], cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert "1 passed" in done.stdout and "numeric equivalence" not in done.stdout, done.stdout
    done = subprocess.run([sys.executable, "-m", "pytest", "--markers"], cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert "partition_equivalence(**options)" in done.stdout


def test_wrong_use_is_said_in_three_lines(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(MODEL)
    (tmp_path / "test_wrong.py").write_text(WRONG)
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "test_wrong.py"], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, timeout=200)
    assert "3 failed" in done.stdout and "Traceback" not in done.stdout, done.stdout
    for said in ("takes no 'polcy'", "args is ndarray, not a tuple", "no tolerance of 'floot32'"):
        assert said in done.stdout, said
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-o", "partition_devices=many", "test_wrong.py"], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, timeout=100)
    assert "partition_devices is 'many'" in done.stdout + done.stderr and "INTERNALERROR" not in done.stdout


def test_a_module_that_starts_jax_as_it_is_imported_has_its_devices(tmp_path: Path) -> None:
    (tmp_path / "test_early.py").write_text(
        "import jax.numpy as jnp\n\nW = jnp.ones((8, 8)) * 0.1\n\n\ndef test_early(partition_equivalence):\n"
        "    assert partition_equivalence(lambda w, x: jnp.tanh(x @ w) @ w, (W, jnp.ones((2, 8))), policy='random', cluster='trn2_efa_4cs3').equal\n"
    )
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "test_early.py"], cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert "1 passed" in done.stdout, done.stdout
