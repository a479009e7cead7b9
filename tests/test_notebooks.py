"""Every notebook runs from top to bottom, is stored without results, and ends in a picture."""

from pathlib import Path

import jupytext
import nbclient
import nbformat
import pytest

QUICK = ("00",)
"""What `make test` runs; the others take up to a minute and a half each, and run in `make test-all`."""
NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


def test_there_are_notebooks() -> None:
    assert {p.stem[:2] for p in NOTEBOOKS} == {f"{n:02d}" for n in range(7)}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_stored_without_results(path: Path) -> None:
    book = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    nbformat.validate(book)
    assert book.nbformat == 4
    for cell in book.cells:
        assert not cell.get("outputs"), f"a stored output in: {cell.source[:60]}"
        assert cell.get("execution_count") is None, f"a stored execution count in: {cell.source[:60]}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_in_step_with_its_source(path: Path) -> None:
    """The percent-format file beside it has the same cells: `make notebooks` makes the notebook from it."""
    source, book = jupytext.read(path.with_suffix(".py"), fmt="py:percent"), nbformat.read(path, as_version=4)
    assert [(c.cell_type, c.source) for c in source.cells] == [(c.cell_type, c.source) for c in book.cells]


@pytest.mark.parametrize("path", [p if p.stem.startswith(QUICK) else pytest.param(p, marks=pytest.mark.slow) for p in NOTEBOOKS], ids=lambda p: p.stem)
def test_runs(path: Path) -> None:
    book = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(book, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}).execute()
    outputs = [o for cell in book.cells for o in cell.get("outputs", [])]
    said = [o.text for o in outputs if o.output_type == "stream" and o.name == "stderr"]
    said = [s for s in said if "IPKernelApp" not in s]
    assert not said, f"a cell wrote to stderr: {said[0][:300]}"
    last = book.cells[-1].get("outputs", [])
    assert any("image/png" in o.get("data", {}) for o in last), "the last cell draws nothing"
