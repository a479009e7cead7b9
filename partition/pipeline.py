"""plan(): the whole chain on one page, from a callable to a Plan; finding policies, models and clusters by name.

A Plan is saved as plan.json and loaded whole: the problem as numbers, the placement, the estimate, the bound. What cannot be saved
(the traced program) is traced again from the model's name.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.metadata
import inspect
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pydantic

from partition import profiles, records
from partition.arguments import checked
from partition.bounds import Bound, lower_bound
from partition.errors import NameUnknownError, OutputError, PartitionError, PlacementError, told, user_line
from partition.evaluation import Estimate, evaluate, verify
from partition.hardware import Cluster
from partition.limits import within
from partition.origin import hashes, versions
from partition.outputs import write
from partition.policies import POLICIES, Policy
from partition.problem import Placement, Problem
from partition.shipped import OURS, shipped
from partition.soundness import hold_sound
from partition.work import Work
from partition.workload import sizes_in

if TYPE_CHECKING:
    from partition.program import Program
    from partition.stages import Stages
    from partition.swings import Swing

FORMAT = 4


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """A placement with all that led to it. `timings` [s] by pass; `how` says how the phases were found; `versions` of what made it.

    request: what made the program (model, prompt, new_tokens, batch, and the like), to trace it again; empty where a callable did.
    table, saved_ends, saved_splits: the stage table, the ends of the band and how meshes are split of a plan that was loaded, which has no ops to make them from.
    """

    title: str
    cluster: str
    policy: str
    problem: Problem = dataclasses.field(repr=False)
    placement: Placement = dataclasses.field(repr=False)
    estimate: Estimate
    bound: Bound
    request: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    how: tuple[str, ...] = ()
    timings: Mapping[str, float] = dataclasses.field(default_factory=dict)
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    table: tuple[Mapping[str, Any], ...] = dataclasses.field(default=(), repr=False)
    saved_ends: tuple[Mapping[str, float], ...] = dataclasses.field(default=(), repr=False)
    saved_splits: str = dataclasses.field(default="", repr=False)

    @property
    def gap(self) -> float:
        """How far the score may be from the best possible, as a share of it."""
        return self.bound.gap(self.estimate.score(self.problem.objective))

    @functools.cached_property
    def band(self) -> tuple[Estimate, Estimate] | None:
        """The same placement with every number of the cluster at the better and at the worse end of its band; None for a loaded plan.

        Capacities stay. All ends at once are wider than what is likely.
        """
        from partition.problem import on

        machines = self.problem.cluster
        if self.problem.phases is None or machines is None:
            return None
        better, worse = (on(self.problem, machines.at(worse=worse)) for worse in (False, True))
        return tuple(evaluate(p, dataclasses.replace(self.placement, problem=p)) for p in (better, worse))  # type: ignore[return-value]

    @property
    def ends(self) -> tuple[Mapping[str, float], ...]:
        """What the plan gives at the better and at the worse end of all bands, by name of the objective; empty where that is not known."""
        return self.saved_ends if self.band is None else tuple({k: getattr(end, k) for k in _ENDS} for end in self.band)

    @functools.cached_property
    def stages(self) -> Stages:
        """The program cut by the placement. Raises PlacementError for a plan that was loaded from a file."""
        from partition.stages import cut

        if self.problem.phases is None:
            raise PlacementError("a loaded plan has no program to cut", where=self.title, mend="plan the model again, with this placement's policy")
        return cut(self.problem.phases.program, self.placement)

    def __str__(self) -> str:
        from partition.reporting import text

        return text(self)

    def _repr_html_(self) -> str:
        """A plan in a notebook: its headline and its stages."""
        from partition.reporting import notebook

        return notebook(self)

    @checked
    def save(self, folder: str | Path, *, swings: Sequence[Swing] = ()) -> Path:
        """Write plan.json, report.html, trace.json and explorer.json into a folder, all of them or none. swings: what `sensitivity` found, for the report. Raises OutputError."""
        from partition.drawings import explorer, overlays
        from partition.reporting import html, trace_events

        graphs = {name: json.dumps(value) for name, value in {"explorer.json": explorer(self), **overlays(self)}.items()}
        return write(folder, graphs | {"plan.json": json.dumps(to_json(self), indent=1), "report.html": html(self, swings), "trace.json": json.dumps(trace_events(self))})

    @staticmethod
    @checked
    def load(path: str | Path) -> Plan:
        """Read a plan.json (or the folder that holds it). Raises OutputError."""
        path = Path(path)
        path = path / "plan.json" if path.is_dir() else path
        try:
            return from_json(json.loads(path.read_text()))
        except OutputError as error:
            raise OutputError(error.what, where=str(path), mend=error.mend) from None
        except PartitionError:
            raise
        except Exception as error:  # whatever a file of another form leads to
            raise OutputError(f"the plan cannot be read: {told(error)}", where=str(path), mend="name a plan.json that `partition plan` wrote") from None


def again(saved: Plan, *, seed: int | None = None) -> tuple[Plan, tuple[Any, ...]]:
    """A loaded plan with its program, traced again from its request, and the program's arguments (with weights, where there is a seed).

    Raises PlacementError where the plan was made of a callable, or the program or its sizes are no longer those that were planned.
    """
    from partition import phases, problem, program

    if not saved.request or saved.problem.cluster is None:
        raise PlacementError("the plan does not say what made its program (it was made in Python)", where=saved.title, mend="plan a model by name on the command line, or use the plan that you have in Python: export(plan.stages, folder, *args)")
    said = dict(saved.request)
    fn, args = request(said.pop("model"), **sizes_in(said), seed=seed)
    posed = problem.pose(phases.tag(program.trace(fn, *args)), saved.problem.cluster, objective=saved.problem.objective, trips=said.get("trips"), sharding=said.get("sharding", "search"))
    if posed.names != saved.problem.names:
        raise PlacementError("the model gives another program than the one that was planned", where=f"{len(posed)} nodes, the plan has {len(saved.problem)}", mend="plan it again with this version")
    if other := [name for name in ("workload", "meshes", "kinds", "flows", "residents") if getattr(posed, name) != getattr(saved.problem, name)]:
        raise PlacementError(f"the plan's request and machines give other {other[0]} than its problem has", where=f"{saved.title}: {other[0]}", mend="plan that request, with this version")
    placement = verify(posed, dataclasses.replace(saved.placement, problem=posed, bound=None))
    return dataclasses.replace(saved, problem=posed, placement=placement), args


def sibling(whole: Plan, model: str, *, seed: int = 0) -> tuple[Plan, tuple[Any, ...], tuple[str, ...]]:
    """A plan carried over to its model's sibling with small widths: (the plan, the arguments with weights, what it cannot show).

    Raises PlacementError where the sibling is not of the same structure, PartitionError where the model has none.
    """
    from partition import phases, problem, program
    from partition.shrinking import split_alike, undivided

    if ":" in model:
        raise PartitionError("only models that are known by name can be shrunk", where=model, mend="give your callable small widths itself, and check that")
    full, own = whole.problem, {k: whole.request[k] for k in ("prompt", "new_tokens") if k in whole.request}
    assert full.cluster is not None
    lengths = [{"prompt": 16, "new_tokens": 4}, *([own] if own else [])]  # the structure of some models hangs on the prompt's length
    for i, short in enumerate(lengths):
        fn, args = request(model, batch=min(full.workload.batch, 2), seed=seed, shrink=True, **short)
        try:
            small = problem.pose(phases.tag(program.trace(fn, *args)), full.cluster, objective=full.objective, like=full)
            break
        except PlacementError:
            if i + 1 == len(lengths):
                raise
    small = dataclasses.replace(small, layouts=split_alike(full, small))
    told = (f"a sibling with small widths was run, prompt {short['prompt']} + {short['new_tokens']} tokens: the plan's cuts, not its numbers or its memory", *undivided(full, small))
    placement = small.placement(whole.placement.mesh)
    return dataclasses.replace(whole, title=f"{whole.title}, shrunk", problem=small, placement=placement, estimate=evaluate(small, placement)), args, told


def model_bytes(args: Any) -> float:
    """Bytes of all leaves of a request's arguments."""
    import jax

    return float(sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree_util.tree_leaves(args) if hasattr(leaf, "size")))


def _named(group: str, name: str, known: Mapping[str, Any], kind: str) -> Any:
    """A thing by registered name, by entry point, or as module:attr."""
    if name in known:
        return known[name]
    points = {p.name: p for p in importlib.metadata.entry_points(group=group)}
    if name in points:
        point = points[name]
        return getattr(shipped(point.module), point.attr) if point.dist is not None and point.dist.name == OURS else point.load()
    if ":" in name:
        module, _, attr = name.partition(":")
        sys.path.insert(0, os.getcwd())
        try:
            return functools.reduce(getattr, attr.split("."), importlib.import_module(module))
        except (Exception, SystemExit) as error:
            where = user_line(error)
            own = not where.startswith((os.path.dirname(__file__), "<frozen"))  # else the module itself is not there
            raise NameUnknownError(f"{kind} {name!r} cannot be imported: {told(error)}", where=where if own else name,
                                   mend=f"write {module.removesuffix('.py')}:{attr}, without .py" if module.endswith(".py") else "write module:attribute of something that imports from here") from None  # fmt: skip
        finally:
            sys.path.remove(os.getcwd())
    raise NameUnknownError.among(kind, name, [*known, *points], mend="or name your own as module:attribute")


@checked
def policy(name: str | Policy) -> Policy:
    """A policy by name, entry point or module:attr; a callable is itself. Raises NameUnknownError, PlacementError."""
    found = name if callable(name) else _named("partition.policies", name, POLICIES, "policy")
    if not callable(found):
        raise PlacementError(f"policy {name!r} is {type(found).__name__}, which cannot be called", where=str(name),
                             mend="a policy takes a Problem and returns problem.placement(mesh numbers)")  # fmt: skip
    return found


@checked
def model(name: str) -> Callable[..., tuple[Callable[..., Any], tuple[Any, ...]]]:
    """A model by name (`model("tiny")(prompt=16, new_tokens=8, seed=0)` -> fn, args) or as module:attr, which is then called itself.

    Raises NameUnknownError.
    """
    made = _named("partition.models", name, {}, "model")
    return made if ":" in name else functools.partial(made, name)


def sized(name: str, said: Mapping[str, int], usual: Mapping[str, int]) -> dict[str, int]:
    """The sizes that a model is made with: those said, and the usual ones; of module:callable, those that it has parameters for.

    Raises PartitionError for a size that was said and that a callable does not take.
    """
    if ":" not in name:
        return {**usual, **said}
    takes = _parameters(model(name))
    if wrong := [size for size in said if size not in takes]:
        raise PartitionError(f"{name} takes no {wrong[0]}", where=f"its parameters: {', '.join(takes) or 'none'}", mend=f"give it a parameter {wrong[0]!r}, or leave that out")
    return {size: n for size, n in {**usual, **said}.items() if size in takes and (size in said or takes[size].default is inspect.Parameter.empty)}


def _parameters(made: Any) -> dict[str, inspect.Parameter]:
    """The named parameters of a callable; none where they cannot be told."""
    try:
        return {n: p for n, p in inspect.signature(made).parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    except (TypeError, ValueError):
        return {}


def request(name: str, **options: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A model's function and arguments, by name with options, or from a module:callable, which is given those that it has parameters for.

    Raises NameUnknownError; PartitionError where the model refuses or gives something else.
    """
    made = model(name)
    mend = "module:callable names a function that gives (fn, args): a callable, and the tuple of its arguments; it may take batch, prompt, new_tokens and seed"
    if not callable(made):
        raise PartitionError(f"model {name!r} is {type(made).__name__}, which cannot be called", where=name, mend=mend)
    try:
        given = made(**{k: v for k, v in options.items() if ":" not in name or (k in _parameters(made) and v is not None)})
    except PartitionError:
        raise
    except (Exception, SystemExit) as error:
        what, where, own = (getattr(error, part, "") for part in ("what", "where", "mend"))
        if what and own:  # the model's own error, in the same three parts
            raise PartitionError(what, where=where, mend=own) from None
        raise PartitionError(f"model {name!r} raised {told(error)}", where=user_line(error), mend=mend) from error
    match given:
        case (fn, tuple() as args) if callable(fn):
            return fn, args
    raise PartitionError(f"model {name!r} gave {type(given).__name__}, not (fn, args)", where=name, mend=mend)


def model_names() -> list[str]:
    """Names of the models that entry points register."""
    return sorted(p.name for p in importlib.metadata.entry_points(group="partition.models"))


@checked
def place(problem: Problem, how: str | Policy, *, seconds: float | None = None, **options: Any) -> Placement:
    """Run a policy, for `seconds` at most where given, and hold its placement to the problem. Raises PlacementError for a policy that fails, InfeasibleError."""
    chosen = policy(how)
    hold_sound(problem)
    try:
        placement = chosen(problem, **options) if seconds is None else within(seconds, chosen, problem, **options)
    except PartitionError:
        raise
    except (Exception, SystemExit) as error:
        raise PlacementError(f"the policy raised {told(error)}", where=f"{getattr(chosen, '__name__', how)} at {user_line(error)}",
                             mend="a policy takes a Problem and returns problem.placement(mesh numbers)") from error  # fmt: skip
    return verify(problem, placement)


@checked
def plan(
    fn: Callable[..., Any] | Program, args: tuple[Any, ...] = (), *, cluster: str | Cluster, policy: str | Policy = "portfolio", objective: str = "e2e",
    level: Literal["block", "op"] = "block", trips: int | None = None, title: str | None = None,
    sharding: Literal["search", "tensor"] = "search", costs: Mapping[str, Mapping[str, float | str]] | None = None, limits: Mapping[str, float] | None = None, keep: Sequence[str] = (),
    progress: Callable[[str], None] | None = None, dump: str | Path | None = None,
) -> Plan:  # fmt: skip
    """Trace, tag, pose, place: a Plan for `fn(*args)`, or for a Program, on a cluster (a name, a .toml path, or a Cluster).

    costs: a user's own times of nodes, limits: what objectives may be at most, keep: what stays whole (see `pose`). progress is told the name of each pass. dump: a folder for numbered files of every intermediate value.
    Raises PartitionError of many kinds, each with its mend.
    """
    from partition import phases, problem, program

    say = progress or (lambda _: None)
    timings: dict[str, float] = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        say(name)
        start = time.perf_counter()
        result = work()
        timings[name] = time.perf_counter() - start
        return result

    machines = profiles.cluster(cluster) if isinstance(cluster, str) else cluster
    traced = fn if isinstance(fn, program.Program) else timed("trace", lambda: program.trace(fn, *args))
    tagged = timed("tag", lambda: phases.tag(traced))
    posed = timed("pose", lambda: problem.pose(tagged, machines, objective=objective, level=level, trips=trips, sharding=sharding, costs=costs, limits=limits, keep=keep))
    placed = timed("place", lambda: place(posed, policy))
    estimate = evaluate(posed, placed)
    made = Plan(
        title=title or traced.entry.name, cluster=machines.name, policy=policy if isinstance(policy, str) else getattr(policy, "__name__", "policy"),
        problem=posed, placement=placed, estimate=estimate, bound=lower_bound(posed).stronger(placed), how=tagged.how, timings=timings, versions=versions(),
    )  # fmt: skip
    if dump is not None:
        from partition.reporting import dumps

        write(dump, dict(dumps(made)))
    return made


_ENDS = ("ttft", "tpot", "e2e", "throughput", "usd_per_mtok", "joules_per_token")


def to_json(made: Plan) -> dict[str, Any]:
    """A plan as plain values."""
    from partition.reporting import rows, sharding_text

    p, e = made.problem, made.estimate
    return {
        "format": FORMAT, "title": made.title, "cluster": made.cluster, "policy": made.policy, "request": dict(made.request), "how": list(made.how),
        "timings": dict(made.timings), "versions": dict(made.versions), "profiles": hashes(p.cluster),
        "placement": {"mesh": made.placement.mesh.tolist(), "also": {str(k): list(v) for k, v in made.placement.also.items()}},
        "estimate": {k: getattr(e, k) for k in ("ttft", "tpot", "e2e", "throughput", "usd_per_mtok", "usd_reserved", "joules_per_token", "exposed", "crossings", "busy", "occupied", "memory")},
        "band": [dict(end) for end in made.ends],
        "links": [{"src": p.meshes[a], "dst": p.meshes[b], "bytes": n, "seconds": e.link_busy[a, b]} for (a, b), n in sorted(e.link_bytes.items())],
        "bound": {"score": made.bound.score, "proof": made.bound.proof}, "gap": made.gap,
        "problem": records.to_values(p),
        "work": [[float(w.total_flops), float(w.bytes)] for w in p.works], "splits": sharding_text(made), "stages": [dataclasses.asdict(row) for row in rows(made)], "machines": None if p.cluster is None else dataclasses.asdict(p.cluster),
    }  # fmt: skip


def from_json(raw: Mapping[str, Any]) -> Plan:
    """A plan from plain values; its estimate is computed again from the problem. Raises OutputError for another format."""
    if raw.get("format") != FORMAT:
        raise OutputError(f"plan format {raw.get('format')!r} is not {FORMAT}", where="plan.json", mend="plan again with this version")
    if not isinstance(raw["request"], dict):
        raise OutputError("the plan's request is not a table of values", where="plan.json", mend="plan again, or name a plan.json that `partition plan` wrote")
    works = tuple(Work(flops={"any": flops}, read=nbytes) for flops, nbytes in raw.get("work", ()))
    problem = dataclasses.replace(records.from_values(raw["problem"]), cluster=pydantic.TypeAdapter(Cluster | None).validate_python(raw["machines"]), works=works)
    also = {int(k): tuple(v) for k, v in raw["placement"]["also"].items()}
    placement = verify(problem, Placement(mesh=np.array(raw["placement"]["mesh"]), also=also, problem=problem))
    return Plan(title=raw["title"], cluster=raw["cluster"], policy=raw["policy"], problem=problem, placement=placement,
                estimate=evaluate(problem, placement), bound=Bound(**raw["bound"]), request=raw["request"], how=tuple(raw["how"]), timings=raw["timings"],
                versions=raw["versions"], table=tuple(raw["stages"]), saved_ends=tuple(raw["band"]), saved_splits=str(raw["splits"]))  # fmt: skip
