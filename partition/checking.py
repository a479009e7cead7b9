"""The verb `check`: a plan's stages run on CPU and held against the uncut model, and against a recorded run."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from partition.cli import (
    AsJson,
    Batch,
    Model,
    NewTokens,
    Objective,
    PolicyName,
    Prompt,
    Sets,
    Sharding,
    Trips,
    app,
    make_plan,
    progress,
    sizes_of,
)
from partition.errors import EquivalenceError, ExitCode, InfeasibleError, PartitionError
from partition.workload import USUAL

if TYPE_CHECKING:
    from partition.execution import Runner
    from partition.pipeline import Plan
    from partition.verdict import Verdict


@app.command("check")
def check_command(
    model: Model, cluster: Annotated[Optional[str], typer.Option("--cluster", help="a cluster's name, or a .toml file; unless told, trn2_efa_cs3 or, for what that does not hold, trn2_efa_4cs3")] = None,  # noqa: UP045
    policy: PolicyName = "phase_split", objective: Objective = "e2e",
    prompt: Prompt = None, new_tokens: NewTokens = None, batch: Batch = None, seed: Annotated[int, typer.Option("--seed", help="of the random weights", min=0)] = 0,
    trips: Trips = None, as_json: AsJson = False, default_options: Annotated[bool, typer.Option("--default-options", help="compile with XLA's defaults instead of the strict ones")] = False,
    json_file: Annotated[Optional[Path], typer.Option("--json-file", help="write the verdict as JSON")] = None,  # noqa: UP045
    junit: Annotated[Optional[Path], typer.Option("--junit", help="write the verdict as JUnit XML")] = None,  # noqa: UP045
    sharding: Sharding = "search", sets: Sets = None, oracle: Annotated[bool, typer.Option("--oracle", help="hold both against float64, too")] = False,
    target: Annotated[bool, typer.Option("--target", help="what would the arithmetic of the devices do?")] = False,
    shrink: Annotated[bool, typer.Option("--shrink", help="check a sibling with small widths, cut at the same places as the whole model's plan")] = False,
    wire: Annotated[Optional[list[str]], typer.Option("--wire", help="with --target: formats in which values may cross; bfloat16 and the 8 bits of the device that sends unless told")] = None,  # noqa: UP045
    against: Annotated[Optional[Path], typer.Option("--against", help="a recorded run that the outputs may not drift from")] = None,  # noqa: UP045
    accept: Annotated[Optional[str], typer.Option("--accept", help="with --against: record this run anew, for this reason")] = None,  # noqa: UP045
    budget: Annotated[Optional[float], typer.Option("--budget", help="with --against: how far floats may move, as a share of their rms", min=0)] = None,  # noqa: UP045
) -> None:  # fmt: skip
    """Run a plan's stages on CPU and hold their numbers against the uncut model. Ends with 0 equal, 1 not equal."""
    from partition import equivalence, execution, numerics, origin, reporting
    from partition.outputs import writable, write
    from partition.pipeline import sibling
    from partition.program import compile_cache

    compile_cache()
    if against is None and (accept is not None or budget is not None):
        raise PartitionError("there is no recorded run to hold this one against", where="--accept" if accept is not None else "--budget", mend="name its file: --against baseline.json")
    if accept is not None and not accept.strip():
        raise PartitionError("a run is not recorded without a reason", where="--accept", mend="say why it is right: --accept 'new jaxlib, checked by hand'")
    for file in (json_file, junit):
        if file is not None and file.is_dir():
            raise PartitionError("that is a folder", where=str(file), mend="name a file in it")
    writable(*(file.parent for file in (json_file, junit) if file is not None))
    sizes = sizes_of(model, USUAL | {"prompt": 16, "new_tokens": 8}, prompt=prompt, new_tokens=new_tokens, batch=batch)
    made, args = on_first_that_holds(lambda c: make_plan(model, c, policy, objective, sizes, trips, seed=None if shrink else seed, sets=sets, sharding=sharding, logits=bool(target or wire) and not shrink), (cluster,) if cluster else ("trn2_efa_cs3", "trn2_efa_4cs3"))
    with progress() as say:
        unlike: tuple[str, ...] = ()
        if shrink:
            say("carry the plan over to a sibling with small widths")
            made, args, unlike = sibling(made, model, seed=seed)
        say("cut")
        runner = execution.prepare(made.stages, strict=not default_options, progress=say)
        say("run cut and uncut, compare")
        try:
            verdict, code = equivalence.check(made.stages, *args, strict=not default_options, oracle=oracle or against is not None, runner=runner), ExitCode.OK
        except EquivalenceError as error:
            verdict, code = error.verdict, ExitCode.MISMATCH  # type: ignore[assignment]
        found = numerics.effects(made.stages, *args, wires=wire, progress=say) if target or wire else ()
    verdict = dataclasses.replace(verdict, not_shown=(*verdict.not_shown, *unlike))
    if found:
        verdict = dataclasses.replace(verdict, target=numerics.summary(found))
    drifted = _drift(f"{made.title} on {made.cluster} by {made.policy}, seed {seed}", runner, args, verdict, against, accept, budget) if against is not None and code is ExitCode.OK else []
    code = ExitCode.MISMATCH if drifted else code
    if accept is not None and code is not ExitCode.OK:
        print(f"nothing is recorded in {against}: the run is not equal", file=sys.stderr)
    if ":" not in model:  # by its name alone
        verdict = dataclasses.replace(verdict, not_shown=(*verdict.not_shown, f"the weights are random numbers (seed {seed}): what the answers say of tokens is of them"))
    raw = json.dumps({"model": made.title, "cluster": made.cluster, "policy": made.policy, "made": origin.made(made.problem.cluster, seed=seed), "effects": [dataclasses.asdict(e) for e in found], "drift": drifted} | dataclasses.asdict(verdict), indent=1, default=str)
    print(raw if as_json else f"{made.title}, on {made.cluster} by {made.policy}\n{verdict}")
    if found and not as_json:
        print(numerics.effects_text(found))
    if json_file is not None:
        write(json_file.parent, {json_file.name: raw})
    if drifted and not as_json:
        print("\n".join(drifted))
    if junit is not None:
        write(junit.parent, {junit.name: reporting.junit(made.title, verdict)})
    raise typer.Exit(code)


def on_first_that_holds(make: Callable[[str], tuple[Plan, tuple[Any, ...]]], clusters: Sequence[str]) -> tuple[Plan, tuple[Any, ...]]:
    """The plan on the first of some clusters that is large enough for it."""
    for name in clusters[:-1]:
        with contextlib.suppress(InfeasibleError):
            return make(name)
        print(f"... {name} does not hold it, try the next", file=sys.stderr)
    return make(clusters[-1])


def _drift(title: str, runner: Runner, args: tuple[Any, ...], verdict: Verdict, against: Path, accept: str | None, budget: float | None) -> list[str]:
    """How a run drifted from a recorded one; empty where it did not, or was recorded anew."""
    from partition import baselines
    from partition.distances import TOLERANCE
    from partition.execution import bound_inputs
    from partition.references import chosen_from

    if accept is None and not against.exists():
        raise PartitionError("there is no recorded run yet", where=str(against), mend="record this one: --accept 'why it is right'")
    result, beside = runner(*args), chosen_from(runner, bound_inputs(runner.program, args))
    if accept is not None:
        baselines.save(baselines.recorded(title, result, reason=accept, verdict=verdict, beside=beside), against)
        print(f"recorded {against}: {accept}", file=sys.stderr)
        return []
    old = baselines.load(against)
    if old["title"] != title:
        raise PartitionError(f"the recorded run is of {old['title']}", where=f"{against}; this one is of {title}", mend="run the same again, or record this one: --accept 'why it is right'")
    moved, changed = baselines.drift(old, result, None if budget is None else dict.fromkeys(TOLERANCE, budget), verdict=verdict, beside=beside)
    if moved:
        return [f"DRIFTED from {against} ({old['title']}; taken as right because: {old['reason']})", *(f"  {m}" for m in moved), *(f"  since then {c}" for c in changed)]
    held, floats = sum(name in old["errors"] for name in baselines.errors(verdict)), sum("rms" in o for o in old["outputs"])
    print(f"no drift from {against} ({old['reason']}): {len(old['outputs'])} values within the budget, {held} errors against float64 at most {baselines.GROWTH:g} times the recorded"
          + ("" if floats else "; whole numbers alone are recorded, what moves none of them is not seen"), file=sys.stderr)  # fmt: skip
    return []
