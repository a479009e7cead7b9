"""The house rules that a machine can check: imports run down the floors, JAX enters through its doors, files stay short."""

import ast
import importlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "partition"

FLOORS = {
    "errors": 0, "arguments": 1, "symbols": 0, "units": 0, "tables": 0, "parallel": 1, "outputs": 1, "shipped": 0,
    "hardware": 1, "overrides": 2, "graph": 1, "workload": 1,
    "schemas": 2, "profiles": 3, "_jax": 2,  "work": 2, "collectives": 2, "catalogue": 4, "loops": 2,
    "joint": 3, "passes": 3, "rules": 3, "sharding": 3,
    "anatomy": 4, "phases": 4, "program": 4, "costs": 4, "coarsen": 5, "origin": 3, "measured": 5, "pricing": 6, "flow": 6, "keeping": 6, "shrinking": 6,
    "problem": 7, "chain": 8, "flood": 8, "plain": 8, "records": 8, "instances": 9, "suites": 9, "soundness": 9, "evaluation": 9, "fleet": 10, "ideals": 9, "paths": 9, "cuts": 9, "batch": 10, "bounds": 10, "limits": 10, "moves": 10, "timeline": 10, "drawings": 11,
    "stages": 10, "dispatch": 11, "policies": 11, "execution": 12, "pipeline": 13, "scaling": 14, "distances": 3, "wiring": 11, "precision": 11, "references": 13, "divergence": 14, "counterparts": 15, "verdict": 15, "callables": 16, "ties": 16, "equivalence": 17, "swings": 14, "baselines": 14, "artifacts": 14, "transport": 1, "processes": 15, "numerics": 13, "bench": 14, "ranks": 14, "fronts": 14,  "sweeps": 14,
    "explanation": 14, "fidelity": 14, "reporting": 17, "changes": 17, "frames": 18, "figures": 12, "claims": 17,
    "demo": 18, "pytest_plugin": 18, "__init__": 18, "cli": 19, "checking": 20, "comparing": 20, "exporting": 20, "__main__": 20,
}  # fmt: skip
"""Floor of every spine file; an import at module level goes strictly down (rooms may import their own)."""

DOORS = {"_jax", "joint", "program", "execution", "divergence", "verdict", "callables", "ties", "equivalence", "references", "counterparts", "precision", "numerics", "baselines", "artifacts"}
"""Files that may import jax at module level."""


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def top_imports(path: Path) -> set[str]:
    """Modules imported when the file is imported (not inside functions or under TYPE_CHECKING)."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            if node.module == "partition":
                found |= {f"partition.{a.name}" for a in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
    return found


def test_every_file_has_a_floor() -> None:
    assert {room(p) for p in modules()} == set(FLOORS)


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_down(path: Path) -> None:
    here = room(path)
    for name in top_imports(path):
        parts = name.split(".")
        if parts[0] == "partition" and len(parts) > 1 and parts[1] != here:
            assert FLOORS[parts[1]] < FLOORS[here], f"{here} imports {parts[1]}"
        assert parts[0] not in ("models", "device_profiles"), f"{here} imports {name}"
        if parts[0] == "jax":
            assert here in DOORS, f"{here} imports jax"


def test_private_jax_is_never_used_and_jax_extend_in_one_file() -> None:
    for path in [*modules(), *(ROOT / "models").glob("*.py")]:
        text = path.read_text()
        assert "jax._src" not in text, path
        assert path.parent.name == "_jax" or "jax.extend" not in text.replace("`jax.extend`", ""), path


@pytest.mark.parametrize("path", [*modules(), *sorted((ROOT / "models").glob("*.py"))], ids=lambda p: p.name)
def test_files_stay_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400


def test_public_names_are_sorted_exist_and_load() -> None:
    import partition

    assert partition.__all__ == sorted(partition.__all__)
    for name in partition.__all__:
        assert callable(getattr(partition, name)), name
    assert set(dir(partition)) == set(partition.__all__)
    with pytest.raises(AttributeError):
        _ = partition.no_such_thing


def named(path: Path) -> list[tuple[int, str, str]]:
    """(line, module, name) of each name of the project's own that a file, or the Python in a page, imports: inside functions too."""
    if path.suffix == ".md":
        code = "\n".join(re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL))
    else:
        code = path.read_text()
    nodes = [n for n in ast.walk(ast.parse(code)) if isinstance(n, ast.ImportFrom) and not n.level and n.module and n.module.split(".")[0] in ("partition", "models", "benchmarks")]
    return [(n.lineno, str(n.module), a.name) for n in nodes for a in n.names]


@pytest.mark.parametrize("folder", ["partition", "models", "benchmarks", "tests", "notebooks", "docs", "device_profiles", "."])
def test_what_is_imported_exists(folder: str) -> None:
    """What runs seldom (benchmarks, notebooks, pages) breaks unseen where a name moves."""
    files = [p for pattern in ("*.py", "*.md") for p in ((ROOT / folder).rglob(pattern) if folder != "." else ROOT.glob(pattern))]
    assert files
    lost = []
    for path in files:
        for line, module, name in named(path):
            here = importlib.import_module(module)
            if not hasattr(here, name) and not (hasattr(here, "__path__") and importlib.util.find_spec(f"{module}.{name}")):
                lost.append(f"{path.relative_to(ROOT)}:{line}: {module} has no {name}")
    assert not lost, lost


@pytest.mark.parametrize("verb", ["devices", "policies", "--help"])
def test_verbs_that_need_no_jax_do_not_import_it(verb: str) -> None:
    code = f"import sys; sys.argv = ['partition', {verb!r}]\nfrom partition.cli import main\ntry: main()\nexcept SystemExit as e: assert not e.code\nassert 'jax' not in sys.modules and 'networkx' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
