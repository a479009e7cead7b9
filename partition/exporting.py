"""The verbs `export` and `run`: stages as artifacts, and what runs of them, here or in processes of their own."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from partition.cli import AsJson, app, hold_to_host, progress
from partition.errors import PartitionError

if TYPE_CHECKING:
    from partition.stages import Stages


@app.command("export")
def export_command(
    plan_file: Annotated[Path, typer.Argument(help="a plan.json (or its folder) that `partition plan MODEL --out` wrote")],
    out: Annotated[Path, typer.Option("--out", help="the folder to make")] = Path("export"), seed: Annotated[Optional[int], typer.Option("--seed", help="export random weights of this seed, and an example, too", min=0)] = None,  # noqa: UP045
    streamed: Annotated[bool, typer.Option("--streamed", help="let stages end with layers, so that the KV cache can be sent layer by layer")] = False,
) -> None:  # fmt: skip
    """Write each stage of a plan as a portable StableHLO artifact, with a manifest."""
    stages, folder = _exported(plan_file, out, seed, streamed)
    print(f"wrote {folder}: {len(stages.all)} stages, {sum(p.stat().st_size for p in folder.iterdir()):,} B")


def _exported(plan_file: Path, out: Path, seed: int | None, streamed: bool) -> tuple[Stages, Path]:
    """Trace the model of a saved plan again, and export its stages."""
    from partition.artifacts import export
    from partition.pipeline import Plan, again, model_bytes, request
    from partition.stages import cut
    from partition.workload import sizes_in

    with progress() as say:
        say("trace the plan's model again")
        saved = Plan.load(plan_file)
        if seed is not None and (name := str(saved.request.get("model", ":"))) and ":" not in name:
            hold_to_host(name, model_bytes(request(name, **sizes_in(saved.request))[1]))
        made, args = again(saved, seed=seed)
        assert made.problem.phases is not None
        stages = cut(made.problem.phases.program, made.placement, streamed=streamed)
        say("export the stages")
        return stages, export(stages, out, *(args if seed is not None else ()))


@app.command("run")
def run_command(
    folder: Annotated[Path, typer.Argument(help="a folder that `partition export` wrote, with its arguments (--seed); or a plan.json, or its folder")],
    processes: Annotated[bool, typer.Option("--processes", help="each mesh in an operating-system process of its own, the KV cache sent layer by layer")] = False,
    seed: Annotated[Optional[int], typer.Option("--seed", help="of the random weights of a plan's model; 0 unless told", min=0)] = None,  # noqa: UP045
    retries: Annotated[Optional[int], typer.Option("--retries", help="with --processes: how often to run again where a process dies; 0 unless told", min=0)] = None,  # noqa: UP045
    patience: Annotated[Optional[float], typer.Option("--patience", help="with --processes: after so many seconds without a sign of life a process counts as dead; 10 unless told", min=0.5)] = None,  # noqa: UP045
    throttle: Annotated[Optional[str], typer.Option("--throttle", help="with --processes: what a process sends at most, such as '100 MB/s'")] = None,  # noqa: UP045
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Run exported stages, in processes that need none of the model's code; prints the outputs that are whole numbers."""
    import tempfile

    import numpy as np

    from partition.artifacts import load
    from partition.processes import launch
    from partition.units import parse

    alone = [name for name, value in (("--retries", retries), ("--patience", patience), ("--throttle", throttle)) if value is not None]
    if alone and not processes:
        raise PartitionError(f"{alone[0]} is for separate processes", where=alone[0], mend="add --processes, or leave it out")
    folder = folder.parent if folder.name == "manifest.json" else folder
    if seed is not None and (folder / "manifest.json").exists():
        raise PartitionError("an export holds its own weights", where="--seed", mend="export with another seed, or run the plan.json")
    with tempfile.TemporaryDirectory() as scratch:
        if not (folder / "manifest.json").exists() and (folder.is_file() or (folder / "plan.json").exists()):
            _, folder = _exported(folder, Path(scratch) / "export", seed or 0, streamed=processes)
        if not processes:
            print(json.dumps(_whole_numbers([np.asarray(x) for x in load(folder).run()])))
            return
        try:
            most = None if throttle is None else parse(throttle, "bandwidth")
        except ValueError as error:
            raise PartitionError(f"{throttle!r} is no bandwidth: {error}", where="--throttle", mend="write a number with its unit, such as '100 MB/s'") from None
        with progress() as say, launch(folder, patience=patience or 10.0, throttle=most, progress=say) as running:
            say("run the request")
            answer = running.run(retries=retries or 0)
    if as_json:
        raw = dataclasses.asdict(answer) | {"outputs": _whole_numbers(answer.outputs), "moved": answer.moved, "overlap": answer.overlap}
        print(json.dumps(raw))
    else:
        print(json.dumps(_whole_numbers(answer.outputs)), answer, sep="\n")


def _whole_numbers(arrays: Sequence[Any]) -> list[Any]:
    return [x.tolist() for x in arrays if x.dtype.kind in "iu"]
