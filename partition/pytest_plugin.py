"""A pytest plug-in: the fixture `partition_equivalence` checks that a model cut over a cluster gives the numbers of the uncut one.

    def test_split(partition_equivalence):
        partition_equivalence(fn, args, cluster="trn2_efa_cs3", policy="phase_split")

The marker of the same name gives defaults to a test, a class or a module. Checks are told in a section of the terminal, as JUnit properties, and, on
GitHub Actions, in the step's summary and as annotations at the source line where a model diverges. All of it works under xdist. JAX is imported by the fixture, not before.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

NAME, STORED = "partition_equivalence", "partition.check"
OPTIONS = ("cluster", "policy", "objective", "sharding", "trips", "level", "candidate", "tolerance", "oracle", "strict")
"""What the fixture and the marker take."""
_ROWS = pytest.StashKey[list[dict[str, Any]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addini("partition_devices", "how many CPU host devices stand for the devices of clusters (32 unless told)", default="32")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", f"{NAME}(**options): defaults for the fixture {NAME}, such as cluster, policy, tolerance")
    config.stash[_ROWS] = []
    config.pluginmanager.register(_Collector(config), "partition-collector")


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> None:
    """Host devices can only be asked for before JAX starts, and a module may start it as it is imported: ask before a file that speaks of the fixture is."""
    if file_path.suffix == ".py" and NAME in file_path.read_text("utf-8", errors="replace"):
        _ask_for_devices(parent.config)


def pytest_collection_finish(session: pytest.Session) -> None:
    """For tests that get the fixture from elsewhere, such as a mark in a conftest."""
    if any(NAME in getattr(item, "fixturenames", ()) for item in session.items):
        _ask_for_devices(session.config)


def _ask_for_devices(config: pytest.Config) -> None:
    from partition.program import host_devices

    said = str(config.getini("partition_devices"))
    if not said.isdigit() or not int(said):
        raise pytest.UsageError(f"partition_devices is {said!r}: give a whole number from 1, such as 32")
    host_devices(int(said))


def row(nodeid: str, options: Mapping[str, Any], verdict: Any, error: Exception | None) -> dict[str, Any]:
    """What is told of one check, as JSON can say it."""
    found: dict[str, Any] = {"test": nodeid, **{k: str(v) for k, v in options.items()}, "verdict": "error" if verdict is None else verdict.word}
    if verdict is not None:
        floats = [d for d in verdict.outputs if "float" in d.dtype]
        found |= {
            "outputs": len(verdict.outputs), "boundaries": len(verdict.boundaries), "stages": verdict.stages, "moved_bytes": verdict.moved_bytes, "seconds": round(verdict.seconds, 4),
            "max_ulp": max((d.max_ulp for d in floats), default=0), "relative": max((d.relative for d in verdict.outputs), default=0.0), "cut": verdict.cut, "culprit": verdict.culprit or "",
        }  # fmt: skip
    if error is not None:
        found["error"] = str(error)
        if at := re.findall(r"at (\S+\.py):(\d+)", str(found.get("culprit") or error)):
            found |= {"file": at[-1][0], "line": int(at[-1][1])}  # the innermost
    return found


@pytest.fixture
def partition_equivalence(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """A callable (fn, args, *, cluster, policy, objective, sharding, level, candidate, tolerance, oracle) -> Verdict; a test fails where the numbers are not the same.

    level: what is placed, "block" or "op"; blocks unless the function has next to none.

    With `candidate`, another callable, that is held against `fn` instead of a cut made here.
    """
    marks = [mark.kwargs for mark in request.node.iter_markers(NAME)]  # the closest first
    defaults = {k: v for kwargs in reversed(marks) for k, v in kwargs.items()}

    def run(fn: Callable[..., Any], args: Any = None, **options: Any) -> Any:
        __tracebackhide__ = True
        if unknown := sorted((set(options) | set(defaults)) - set(OPTIONS)):
            pytest.fail(f"{NAME} takes no {unknown[0]!r}\n  where: {request.node.nodeid}\n  mend:  known: {', '.join(OPTIONS)}", pytrace=False)
        if not isinstance(args, tuple | list):
            pytest.fail(f"args is {type(args).__name__}, not a tuple of the model's arguments\n  where: {request.node.nodeid}\n  mend:  write {NAME}(fn, (weights, tokens))", pytrace=False)
        asked = {"cluster": "trn2_efa_cs3", "policy": "phase_split", **defaults, **options}
        verdict, error = None, None
        try:
            verdict = _check(fn, tuple(args), **asked)
        except Exception as raised:
            verdict, error = getattr(raised, "verdict", None), raised
        shown = {k: getattr(v, "__name__", v) for k, v in asked.items() if k != "candidate"} if "candidate" not in asked else {"candidate": getattr(asked["candidate"], "__name__", "callable")}
        told = row(request.node.nodeid, shown, verdict, error)
        kept = request.node.user_properties
        number = sum(name == STORED for name, _ in kept)
        prefix = f"partition.{number + 1}" if number else "partition"
        kept.append((STORED, json.dumps(told)))
        kept += [(f"{prefix}.{key}", str(value)) for key, value in told.items() if key not in ("test", "error")]  # for those who read JUnit
        if error is not None:
            from partition.errors import PartitionError

            if isinstance(error, PartitionError):
                pytest.fail(f"{error}" + (f"\n\n{verdict}" if verdict is not None else ""), pytrace=False)
            raise error
        return verdict

    return run


def _check(
    fn: Any, args: tuple[Any, ...], *, candidate: Any = None, cluster: Any, policy: Any, objective: str = "e2e", sharding: Any = "tensor", trips: int | None = None, level: Any = None, **options: Any,
) -> Any:  # fmt: skip
    import partition as pt

    pt.compile_cache()
    if candidate is not None:
        return pt.check(fn, candidate, args, **options)
    program = pt.trace(fn, *args)
    machines, phases = pt.cluster(cluster) if isinstance(cluster, str) else cluster, pt.tag(program)
    problem = pt.pose(phases, machines, objective=objective, sharding=sharding, trips=trips, level=level or "block")
    if level is None and len(problem) < 2 * len(problem.meshes):  # a function so small is one block: there would be nothing to cut
        problem = pt.pose(phases, machines, objective=objective, sharding=sharding, trips=trips, level="op")
    return pt.check(pt.cut(program, pt.place(problem, policy)), *args, **options)


class _Collector:
    """Gathers what checks said, on the process that reports: under xdist that is the controller, to which properties travel with each report."""

    def __init__(self, config: pytest.Config):
        self.config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and not hasattr(self.config, "workerinput"):
            self.config.stash[_ROWS] += [json.loads(str(value)) for name, value in report.user_properties if name == STORED]

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        rows = self.config.stash[_ROWS]
        if not rows:
            return
        terminalreporter.section("numeric equivalence")
        for r in rows:
            terminalreporter.write_line(f"{r['verdict']:<14} {r['test']}: {told(r)}")
        if os.environ.get("GITHUB_ACTIONS") == "true":
            for r in rows:
                if "error" in r:
                    terminalreporter.write_line(annotation(r, self.config.rootpath))
        if summary := os.environ.get("GITHUB_STEP_SUMMARY"):
            with open(summary, "a", encoding="utf-8") as file:
                file.write(markdown(rows))


def told(r: Mapping[str, Any]) -> str:
    """One check in a line."""
    what = f"against {r['candidate']}" if "candidate" in r else f"{r.get('policy')} on {r.get('cluster')}, {r.get('stages', 0)} stages, {r.get('moved_bytes', 0):,} B moved"
    far = f", max {r['max_ulp']} ULP, {r['relative']:.2g} of scale" if r["verdict"] not in ("bit for bit", "error") else ""
    return what + far + (f"; {r.get('culprit') or r['error'].splitlines()[0]}" if "error" in r else "")


def annotation(r: Mapping[str, Any], root: Path) -> str:
    """An error that GitHub shows at a line of the source: where the model diverges, else the test's file."""
    at = Path(r["file"]) if "file" in r else root / r["test"].split("::")[0]
    top = Path(os.environ.get("GITHUB_WORKSPACE", root))
    shown = os.path.relpath(at, top) if at.is_absolute() else str(at)
    message = f"{r['test']}: {told(r)}".replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
    return f"::error file={shown},line={r.get('line', 1)},title={'reference and candidate' if 'candidate' in r else 'cut and uncut model'} differ::{message}"


def markdown(rows: list[dict[str, Any]]) -> str:
    """The step's summary: a table of all checks."""
    good = sum("error" not in r for r in rows)
    lines = [f"### Numeric equivalence: {good} of {len(rows)} checks equal", "", "| test | verdict | what | max ULP | of scale |", "|---|---|---|---|---|"]
    lines += [f"| `{r['test'].replace('|', '/')}` | {'' if 'error' not in r else '**'}{r['verdict']}{'' if 'error' not in r else '**'} | {told(r).replace('|', '/')} | {r.get('max_ulp', '')} | {r.get('relative', 0):.2g} |" for r in rows]
    return "\n".join([*lines, "", ""])
