"""The verbs that hold placements against each other: compare, bench, front, explain, claims."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from partition.cli import (
    SHORT,
    AsJson,
    Batch,
    ClusterName,
    Keep,
    Limits,
    Model,
    NewTokens,
    Objective,
    PolicyName,
    Prompt,
    Sets,
    Sharding,
    Trips,
    app,
    as_rows,
    limited,
    progress,
    replaced,
    sizes_of,
)
from partition.errors import ExitCode, NameUnknownError, PartitionError

if TYPE_CHECKING:
    from partition.bench import Result
    from partition.problem import Problem
    from partition.ranks import Ranks


Jobs = Annotated[int, typer.Option("--jobs", help="processes that run at once, -1 for one a core; then policies slow each other down")]


def _posed(model: str, cluster: str, objective: str, sizes: Mapping[str, int], say: Callable[[str], None], *, sets: Sequence[str] | None, **options: Any) -> Problem:
    """The problem of one request of a model."""
    from partition.phases import tag
    from partition.pipeline import request
    from partition.problem import pose
    from partition.profiles import cluster as find_cluster
    from partition.program import trace

    machines = replaced(find_cluster(cluster), sets)
    say(f"trace {model}")
    fn, args = request(model, **sizes)
    program = trace(fn, *args)
    say("pose")
    return pose(tag(program), machines, objective=SHORT.get(objective, objective), **options)


@app.command("compare")
def compare_command(
    model: Model, cluster: ClusterName = "trn2_efa_cs3",
    policy: Annotated[Optional[list[str]], typer.Option("--policy", help="a policy (may be given again); all for all built-in ones, which is the default")] = None,  # noqa: UP045
    objective: Objective = "e2e", prompt: Prompt = None, new_tokens: NewTokens = None, batch: Batch = None, trips: Trips = None, as_json: AsJson = False,
    limits: Limits = None, keep: Keep = None, sharding: Sharding = "search", sets: Sets = None,
    bands: Annotated[bool, typer.Option("--bands", help="how sure is the order, with every number of the cluster drawn within its band?")] = False,
    draws: Annotated[int, typer.Option("--draws", help="how many times numbers are drawn", min=1)] = 1000,
    jobs: Jobs = 1, seconds_each: Annotated[Optional[float], typer.Option("--seconds", help="how long a policy may take [s]; the best that it has evaluated counts")] = None,  # noqa: UP045
) -> None:  # fmt: skip
    """Compare policies on one problem. Ends with 3 where none of them finds a placement; one that fails beside others is a row with its reason."""
    from partition.bench import compare
    from partition.pipeline import policy as find_policy
    from partition.policies import POLICIES
    from partition.ranks import rank

    names = [name for said in policy or ["all"] for name in (sorted(POLICIES) if said == "all" else [said])]
    _ = [find_policy(n) for n in names]
    with progress() as say:
        sizes = sizes_of(model, prompt=prompt, new_tokens=new_tokens, batch=batch)
        problem = _posed(model, cluster, objective, sizes, say, trips=trips, limits=limited(limits), keep=keep or (), sharding=sharding, sets=sets)
        results = compare({model: problem}, names, seconds=seconds_each, jobs=jobs, progress=say)
        order = rank(problem, {r.policy: r.placement for r in results if r.placement is not None}, draws=draws, progress=say) if bands else None
    if as_json:  # a policy that fails is a row with its reason
        print(as_rows([{"policy": r.policy, "seconds": r.seconds, "gap": r.gap, "proof": r.proof, "why_not": r.why_not, "where": r.where, "mend": r.mend,
                           "estimate": None if r.estimate is None else {k: getattr(r.estimate, k) for k in ("ttft", "tpot", "e2e", "throughput", "usd_per_mtok", "joules_per_token")}}
                          for r in results], problem.cluster))  # fmt: skip
    else:
        _print_compared(f"{model} on {cluster}, objective {objective}", results, order)
    if all(r.estimate is None for r in results):
        raise typer.Exit(ExitCode.INFEASIBLE)


def _print_compared(title: str, results: Sequence[Result], order: Ranks | None) -> None:
    from partition.tables import table
    from partition.units import dollars, seconds

    lines = []
    for r in results:
        e = r.estimate
        cells = ["-"] * 6 if e is None else [
            seconds(e.ttft), seconds(e.tpot), seconds(e.e2e), f"{e.throughput:,.0f}", dollars(e.usd_per_mtok), f"{100 * (r.gap or 0):.1f} %"]  # fmt: skip
        lines.append([r.policy, seconds(r.seconds), *cells])
    print(table(title, ("policy", "placed in", "TTFT", "TPOT", "end to end", "tokens/s", "$ per Mtok", "gap at most"), lines))
    print("gap at most: the share of a policy's own score by which something better may exist, (score - bound) / score")
    for r in results:
        if r.estimate is None:
            print(f"{r.policy}: {r.why_not}", *([f"\n  where: {r.where}\n  mend:  {r.mend}"] if r.where else []), sep="")
    if order is not None:
        print(order)


@app.command("bench")
def bench_command(
    files: Annotated[Optional[list[Path]], typer.Argument(help="problem.json or plan.json of ours, JSON of msr-fiddle/dnn-partitioning, .lp of Helix")] = None,  # noqa: UP045
    suite: Annotated[Optional[str], typer.Option("--suite", help="a suite of made problems that never changes, such as v1")] = None,  # noqa: UP045
    policy: Annotated[Optional[list[str]], typer.Option("--policy", help="a policy (may be given again); portfolio by default")] = None,  # noqa: UP045
    objective: Annotated[Optional[str], typer.Option("--objective", help="throughput (the longest load), or e2e (one request); a problem's own, unless told")] = None,  # noqa: UP045
    contiguous: Annotated[bool, typer.Option("--contiguous", help="meshes must be stages in an order")] = False,
    seconds: Annotated[Optional[float], typer.Option("--seconds", help="how long a policy may take for a problem [s]; the best that it has evaluated counts")] = None,  # noqa: UP045
    jobs: Jobs = 1, picture: Annotated[Optional[Path], typer.Option("--picture", help="draw the performance profiles: a .png, .svg or .pdf")] = None,  # noqa: UP045
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Compare policies on problems from files and suites."""
    from partition import instances, suites
    from partition.bench import compare, drawn, profile
    from partition.problem import OBJECTIVES
    from partition.tables import table
    from partition.units import seconds as spoken

    if objective is not None and (objective := SHORT.get(objective, objective)) not in OBJECTIVES:
        raise NameUnknownError.among("objective", objective, OBJECTIVES)
    stems = [f.stem for f in files or []]
    short = {path: path.stem if stems.count(path.stem) == 1 else f"{path.parent.name}/{path.stem}" for path in files or []}
    problems = {name if list(short.values()).count(name) == 1 else str(path): instances.read(path) for path, name in short.items()}
    problems |= suites.suite(suite) if suite is not None else {}
    if not problems:
        raise typer.BadParameter("name instance files, or --suite v1")
    problems = {name: dataclasses.replace(p, objective=objective or p.objective, contiguous=contiguous or p.contiguous) for name, p in problems.items()}
    with progress() as say:
        results = compare(problems, policy or ["portfolio"], seconds=seconds, jobs=jobs, progress=say)
    if picture is not None:
        drawn(results, picture)

    def value(r: Result) -> float:
        return -r.score if problems[r.problem].rates is not None else -1 / r.score if r.score < 0 else r.score

    if as_json:
        print(as_rows([{"problem": r.problem, "digest": suites.digest(problems[r.problem]), "policy": r.policy, "seconds": r.seconds, "value": None if r.estimate is None else value(r),
                           "gap": r.gap, "proof": r.proof, "why_not": r.why_not} for r in results]))  # fmt: skip
        return
    lines = [(r.problem, r.policy, spoken(r.seconds), "-" if r.estimate is None else f"{value(r):.6g}", "-" if r.gap is None else f"{100 * r.gap:.2f} %", r.why_not or r.proof) for r in results]
    asked = sorted({p.objective for p in problems.values()})
    what = ", ".join("the longest load (tokens/s where machines have rates)" if o == "throughput" else o for o in asked)
    print(table(f"{what}, in the problem's own unit", ("problem", "policy", "placed in", "value", "gap at most", "what"), lines))
    if len(problems) > 1 and len({r.policy for r in results}) > 1:
        print(table("Share of the problems on which a policy comes within a factor of the best", ("policy", "1", "1.01", "1.05", "1.2", "2"),
                    [(name, *(f"{100 * x:.0f} %" for x in shares)) for name, shares in profile(results).items()]))  # fmt: skip


@app.command("front")
def front_command(
    model: Model, objectives: Annotated[Optional[list[str]], typer.Option("--objective", help="two or three of them (given again each)")] = None,  # noqa: UP045
    cluster: ClusterName = "trn2_efa_cs3", policy: PolicyName = "portfolio", prompt: Prompt = None, new_tokens: NewTokens = None, batch: Batch = None, trips: Trips = None,
    points: Annotated[int, typer.Option("--points", help="limits that are tried on each further objective", min=1)] = 6,
    limits: Limits = None, keep: Keep = None, sharding: Sharding = "search", sets: Sets = None, as_json: AsJson = False,
) -> None:  # fmt: skip
    """What can be had together: the Pareto front of two or three objectives."""
    from partition.fronts import front
    from partition.pipeline import policy as find_policy
    from partition.tables import table

    wanted = [SHORT.get(o, o) for o in objectives or ["usd", "tpot"]]
    find_policy(policy)
    with progress() as say:
        sizes = sizes_of(model, prompt=prompt, new_tokens=new_tokens, batch=batch)
        problem = _posed(model, cluster, wanted[0], sizes, say, trips=trips, limits=limited(limits), keep=keep or (), sharding=sharding, sets=sets)
        found = front(problem, wanted, policy=policy, points=points, progress=say)
    names = ("ttft", "tpot", "e2e", "throughput", "usd_per_mtok", "joules_per_token")
    if as_json:
        print(as_rows([{"mesh": p.placement.mesh.tolist()} | {k: getattr(p.estimate, k) for k in names} for p in found], problem.cluster))
        return
    lines = [[f"{i + 1}", *(f"{getattr(p.estimate, k):.5g}" for k in names), " ".join(sorted({problem.kinds[m] for m in p.placement.mesh}))] for i, p in enumerate(found)]
    print(table(f"{model} on {cluster}: none of these is better than another in all of {', '.join(wanted)} (SI units, $, J)", ("point", *names, "meshes"), lines))


@app.command("explain")
def explain_command(
    model: Annotated[str, typer.Argument(help="a model's name, module:callable, or a plan.json or its folder")], cluster: ClusterName = "trn2_efa_4cs3", objective: Objective = "usd_per_mtok",
    prompt: Prompt = None, new_tokens: NewTokens = None, batch: Batch = None, trips: Trips = None, limits: Limits = None, keep: Keep = None, sharding: Sharding = "search", sets: Sets = None,
    load: Annotated[float, typer.Option("--load", help="requests/s, of whole batches, that the machines are to serve")] = 1.0,
    busiest: Annotated[float, typer.Option("--busiest", help="share of the time that a machine may be busy")] = 0.8,
    gpus: Annotated[Optional[list[str]], typer.Option("--gpus", help="further clusters to hold against it; h100_only and h100_disagg unless told, none for none")] = None,  # noqa: UP045
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Why a plan is what it is: each alternative under a load, what binds it, and where the answer flips."""
    from partition.explanation import explain
    from partition.pipeline import Plan
    from partition.problem import pose
    from partition.profiles import cluster as find_cluster
    from partition.tables import table
    from partition.units import dollars, seconds

    with progress() as say:
        if model.endswith(".json") or os.sep in model or Path(model).is_dir():
            said = {"--prompt": prompt, "--new-tokens": new_tokens, "--batch": batch, "--trips": trips, "--limit": limits, "--keep": keep, "--set": sets}
            if wrong := [name for name, value in said.items() if value]:
                raise PartitionError(f"{wrong[0]} is for a model that is planned anew", where=f"explain {model}", mend="leave it out, or name the model: the plan has its own")
            plan = Plan.load(model)
            problem, others, title = plan.problem, [], plan.title
        else:
            rivals = [find_cluster(name) for name in gpus or ("h100_only", "h100_disagg") if name != "none"]
            sizes = sizes_of(model, prompt=prompt, new_tokens=new_tokens, batch=batch)
            problem = _posed(model, cluster, objective, sizes, say, trips=trips, limits=limited(limits), keep=keep or (), sharding=sharding, sets=sets)
            assert problem.phases is not None
            others, title = [pose(problem.phases, rival, objective=problem.objective, trips=trips) for rival in rivals], f"{model} on {cluster}"
        say("place the alternatives")
        answer = explain(problem, load=load, busiest=busiest, others=others)
    if as_json:
        from partition.origin import made

        told = [{"name": a.name, "why_not": a.why_not} | ({} if a.estimate is None or a.fleet is None else
                 {k: getattr(a.estimate, k) for k in ("ttft", "tpot", "e2e", "usd_per_mtok", "usd_reserved")} | {"binds": a.binds, "meshes": a.fleet.problem.meshes}
                 | {f"load_{k}": getattr(a.fleet, k) for k in ("copies", "busy", "ttft", "usd_per_mtok", "ratio")}) for a in answer.alternatives]  # fmt: skip
        print(json.dumps({"made": made(problem.cluster), "sentence": answer.sentence, "load": answer.rate, "window": answer.window, "ingest": answer.ingest, "flip_beta": answer.flip_beta, "alternatives": told}))
        return
    lines = []
    for a in answer.alternatives:
        e, f = a.estimate, a.fleet
        lines.append((a.name, *("-",) * 6, a.why_not) if e is None or f is None else (
            a.name, seconds(e.ttft), seconds(f.ttft), seconds(e.tpot), f.machines, dollars(f.usd_per_mtok), f"{dollars(e.usd_per_mtok)} .. {dollars(e.usd_reserved)}", a.binds))  # fmt: skip
    print(answer.sentence)
    print(table(f"{title} at {answer.rate:g} request{'s' * (answer.rate != 1)}/s", ("alternative", "TTFT alone", "under load", "TPOT", "machines", "$ per Mtok", "saturated .. idle", "binds"), lines))
    if any(a.name == "best found" for a in answer.alternatives):
        print(f"best found: what the solver finds for {problem.objective} of one plan, whose machines are all in use; under a load another may be cheaper")


@app.command("claims")
def claims_command(
    model: Model = "llama-3.1-70b", cluster: ClusterName = "trn2_efa_4cs3", gpus: Annotated[str, typer.Option("--gpus", help="a cluster of GPUs")] = "h100_only",
    prompt: Prompt = None, new_tokens: NewTokens = None, batch: Batch = None, as_json: AsJson = False,
) -> None:  # fmt: skip
    """The sentences of the announcement, held against the model one by one."""
    from partition.claims import claims_text, examine
    from partition.pipeline import request

    sizes = sizes_of(model, prompt=prompt, new_tokens=new_tokens, batch=batch)
    with progress() as say:
        found = examine(lambda: request(model, **sizes), split=cluster, gpus=gpus, progress=say)
    print(as_rows([dataclasses.asdict(c) for c in found]) if as_json else claims_text(found))


@app.command("diff")
def diff_command(
    first: Annotated[Path, typer.Argument(help="a plan.json, or its folder")], second: Annotated[Path, typer.Argument(help="another")],
    quick: Annotated[bool, typer.Option("--quick", help="do not make the first plan again with each input that differs")] = False, as_json: AsJson = False,
) -> None:  # fmt: skip
    """How two plans differ, and which input caused it."""
    from partition.changes import diff, load_both
    from partition.origin import made

    a, b = load_both(first, second)
    with progress() as say:
        found = diff(a, b, again=not quick, progress=say)
    if as_json:
        print(json.dumps({"made": made()} | dataclasses.asdict(found) | {"moved": [[*k, n] for k, n in found.moved.items()]}, default=str))
    else:
        print(found)
