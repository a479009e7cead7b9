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
PAGES = [ROOT / "README.md", PACKAGE / "README.md", PACKAGE / "policies" / "README.md"]
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
