"""What the READMEs show runs: the python blocks of each, in order and in one namespace. The spine's README names every file."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "partition"
PAGES = [ROOT / "README.md", PACKAGE / "README.md", PACKAGE / "policies" / "README.md", *(ROOT / "docs" / f"{name}.md" for name in ("ci", "extend", "read"))]
RUN = """
import json, sys
space = {"__name__": "__main__"}
for path, code in json.load(sys.stdin):
    exec(compile(code, path, "exec"), space)
"""


def blocks(path: Path) -> list[str]:
    """The ```python blocks of a page, each moved down so that a traceback names the page's own line."""
    text = path.read_text()
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return ["\n" * text.count("\n", 0, m.start(1)) + m[1] for m in found]


@pytest.mark.parametrize("path", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_code_runs(path: Path, tmp_path: Path) -> None:
    if not path.exists():
        pytest.skip("not written yet")
    found = blocks(path)
    assert found, "the page shows no python"
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)}
    done = subprocess.run([sys.executable, "-W", "error", "-c", RUN], input=json.dumps([(str(path), code) for code in found]),
                          capture_output=True, text=True, timeout=280, cwd=tmp_path, env=env)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def test_every_spine_file_has_its_words() -> None:
    text = (PACKAGE / "README.md").read_text()
    files = {p.name for p in PACKAGE.glob("*.py")} | {f"{p.parent.name}/" for p in PACKAGE.glob("*/__init__.py")}
    assert not sorted(name for name in files if f"`{name}`" not in text and f"`partition/{name}`" not in text)


def test_the_api_page_names_every_public_name() -> None:
    import partition

    text = (ROOT / "docs" / "api.md").read_text()
    assert {f"::: partition.{where.partition(':')[0]}.{where.partition(':')[2] or name}" for name, where in partition._WHERE.items()} == {line.strip() for line in text.splitlines() if line.startswith(":::")}


def test_the_job_of_the_ci_page_runs_as_printed(tmp_path: Path) -> None:
    """Its test file, in a repository of a stranger; its steps that are commands, but for the install, which the environment has done."""
    import yaml

    page = (ROOT / "docs" / "ci.md").read_text()
    (tmp_path / "test_split.py").write_text(blocks(ROOT / "docs" / "ci.md")[0].lstrip("\n"))
    job = yaml.safe_load(re.search(r"^```yaml\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)[1])["jobs"]["equivalence"]  # type: ignore[index]
    commands = [step["run"] for step in job["steps"] if "run" in step]
    assert commands[0] == "python -m pip install wheels/*.whl pytest" and len(commands) == 2
    env = os.environ | {"GITHUB_ACTIONS": "true", "GITHUB_STEP_SUMMARY": str(tmp_path / "summary.md"), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(commands[1], shell=True, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and "numeric equivalence" in done.stdout, done.stdout + done.stderr
    assert "1 of 1 checks equal" in (tmp_path / "summary.md").read_text() and (tmp_path / "equivalence.xml").exists()
