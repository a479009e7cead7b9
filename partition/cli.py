"""Plan how a model is partitioned across unlike accelerators, and prove the result on CPU. Everything that is done here is one call in Python.

Exit codes: 0 done or equal, 1 not equal, 2 wrong use, 3 infeasible, 4 crash. No verb imports JAX that does not need it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from partition.errors import ExitCode, NameUnknownError, PartitionError, ProfileError
from partition.workload import USUAL

if TYPE_CHECKING:
    from partition.hardware import Cluster
    from partition.pipeline import Plan

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__, rich_markup_mode=None)

Model = Annotated[str, typer.Argument(help="a model's name, or module:callable that gives (fn, args)")]
ClusterName = Annotated[str, typer.Option("--cluster", help="a cluster's name, or a .toml file")]
PolicyName = Annotated[str, typer.Option("--policy", help="a policy's name, or module:attr")]
Objective = Annotated[str, typer.Option("--objective", "--minimise", help="ttft, tpot, e2e, throughput, usd (per million tokens) or joules (per token)")]
Limits = Annotated[Optional[list[str]], typer.Option("--limit", help="what an objective may be at most, throughput at least: ttft=0.5 (s), usd=8 ($ per million tokens), crossings=4 (values from mesh to mesh); may be given again")]  # noqa: UP045
Keep = Annotated[Optional[list[str]], typer.Option("--keep", help="what stays whole: layers, phases (each on one mesh), weights (on one mesh only), order (a run of the nodes for each mesh); may be given again")]  # noqa: UP045
Prompt = Annotated[Optional[int], typer.Option("--prompt", help="prompt length [tokens]; 2048 unless told (check: 16); of module:callable, its parameter of this name", min=1)]  # noqa: UP045
NewTokens = Annotated[Optional[int], typer.Option("--new-tokens", help="tokens to write; 256 unless told (check: 8)", min=2)]  # noqa: UP045
Batch = Annotated[Optional[int], typer.Option("--batch", help="sequences that run together; 1 unless told", min=1)]  # noqa: UP045
Trips = Annotated[Optional[int], typer.Option("--trips", help="how often a loop runs whose structure does not tell", min=0)]  # noqa: UP045
Sets = Annotated[Optional[list[str]], typer.Option("--set", help="another number for the cluster, such as efa_v3.beta='200 GB/s', cs3.price='20 $/h', trn2.count=8")]  # noqa: UP045
Sharding = Annotated[str, typer.Option("--sharding", help="inside a mesh: search for the fastest, or tensor (parallel over all devices)")]
Times = Annotated[Optional[Path], typer.Option("--costs", help="a CSV file of measured times: node, machine, time")]  # noqa: UP045
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """Show what is going on, on stderr: a spinner on a terminal, else a line for each pass."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda what: print(f"... {what}", file=sys.stderr, flush=True)
        return
    with console.status("") as status:
        yield lambda what: status.update(what)


def sizes_of(model: str, usual: Mapping[str, int] = USUAL, **said: int | None) -> dict[str, int]:
    """The sizes that a model is made with. Raises PartitionError for one that the command line says and the model does not take."""
    from partition.pipeline import sized

    return sized(model, {name: n for name, n in said.items() if n is not None}, usual)


def make_plan(model: str, cluster: str, policy: str, objective: str, sizes: Mapping[str, int], trips: int | None,
              seed: int | None = None, dump: Path | None = None, sets: Sequence[str] | None = None, sharding: Any = "search", costs: Path | None = None, limits: dict[str, float] | None = None,
              keep: Sequence[str] | None = None, logits: bool = False) -> tuple[Plan, tuple[Any, ...]]:  # fmt: skip
    """Plan one request of a model by name; gives the plan and the arguments. logits: let it give what it chooses tokens from, too."""
    from partition import measured, profiles
    from partition.pipeline import model_bytes, plan, request
    from partition.pipeline import policy as find_policy
    from partition.program import DEFAULT_HOST_DEVICES, host_devices

    machines = replaced(profiles.cluster(cluster), sets)  # wrong names are said before the model is built
    find_policy(policy)
    with progress() as say:
        say(f"build {model}")
        host_devices(DEFAULT_HOST_DEVICES)  # before a model of the user's starts JAX
        if seed is not None and ":" not in model:
            hold_to_host(model, model_bytes(request(model, **sizes)[1]))
        fn, args = request(model, **sizes, seed=seed, **({"logits": True} if logits else {}))
        title = ", ".join([model, *(f"{name.replace('_', ' ')} {n}" for name, n in sizes.items())]) if ":" in model else f"{model}, batch {sizes['batch']}, prompt {sizes['prompt']} + {sizes['new_tokens']} tokens"
        made = plan(fn, args, cluster=machines, policy=policy, objective=SHORT.get(objective, objective), limits=limits, trips=trips, title=title, progress=say, dump=dump, sharding=sharding, keep=keep or (), costs=None if costs is None else measured.read(costs))
        return dataclasses.replace(made, request={"model": model, **sizes, "trips": trips, "sharding": sharding}), args


def as_rows(rows: Sequence[Any], cluster: Cluster | None = None) -> str:
    """Rows of a result as JSON, with what made them."""
    from partition.origin import made

    return json.dumps({"made": made(cluster), "rows": rows})


SHORT = {"usd": "usd_per_mtok", "joules": "joules_per_token"}


def limited(said: Sequence[str] | None, **short: str | None) -> dict[str, float]:
    """Objective -> what it may be at most, as the command line says. Raises NameUnknownError, PlacementError."""
    from partition.errors import PlacementError
    from partition.problem import LIMITS, hold_limits

    found = {}
    for text in [*(said or ()), *(f"{name}={value}" for name, value in short.items() if value is not None)]:
        name, _, value = text.partition("=")
        name = SHORT.get(name.strip(), name.strip())
        if name not in LIMITS:
            raise NameUnknownError.among("limit", name, LIMITS, where="--limit")
        found[name] = _number(value.strip(), time=name in ("ttft", "tpot", "e2e"))
        if math.isnan(found[name]):
            raise PlacementError(f"{value!r} is no limit of {name}", where=f"--limit {text}", mend="write a number above 0, such as --limit ttft=0.5 or --limit tpot='20 ms'")
        hold_limits({name: found[name]}, where=f"--limit {text}")
    return found


def _number(text: str, *, time: bool) -> float:
    """A number, or a time with its unit; NaN where it is neither."""
    from partition.units import parse

    with contextlib.suppress(ValueError):
        return float(text)
    with contextlib.suppress(ValueError):
        return parse(text, "time") if time else float("nan")
    return float("nan")


def replaced(cluster: Cluster, sets: Sequence[str] | None) -> Cluster:
    """A cluster with the numbers that the command line sets. Raises ProfileError."""
    values = {}
    for said in sets or ():
        name, found, value = said.partition("=")
        if not found:
            raise ProfileError(f"{said!r} sets nothing", where="--set", mend="write --set <name>=<value>, such as --set efa_v3.beta='200 GB/s'")
        values[name.strip()] = value.strip()
    return cluster.replace(values)


def hold_to_host(model: str, nbytes: float) -> None:
    """Refuse to run a model that this host cannot hold: its weights lie once for the uncut program, once for the stages, once as made."""
    from partition.units import size

    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if 3 * nbytes > host:
        raise PartitionError(f"{model} has {size(nbytes)} of weights, and running it takes three times that", where=f"this host has {size(host)} of memory",
                             mend="check a sibling of it with small widths (check NAME --shrink) or a smaller model of the family (smollm2-135m, tiny), or only plan this one")  # fmt: skip


@app.command("plan")
def plan_command(
    model: Model, cluster: ClusterName = "trn2_efa_cs3", policy: PolicyName = "portfolio", objective: Objective = "e2e",
    prompt: Prompt = None, new_tokens: NewTokens = None, batch: Batch = None, trips: Trips = None, as_json: AsJson = False,
    out: Annotated[Optional[Path], typer.Option("--out", help="folder for plan.json, report.html, trace.json and graphs for Model Explorer")] = None,  # noqa: UP045
    dump: Annotated[Optional[Path], typer.Option("--dump", help="folder for numbered files of every intermediate value")] = None,  # noqa: UP045
    drawn_in: Annotated[Optional[Path], typer.Option("--figures", help="folder for figures at column width, as SVG, PNG and CSV")] = None,  # noqa: UP045
    limits: Limits = None, keep: Keep = None, ttft: Annotated[Optional[str], typer.Option("--ttft", help="short for --limit ttft=...")] = None,  # noqa: UP045
    tpot: Annotated[Optional[str], typer.Option("--tpot", help="short for --limit tpot=...")] = None,  # noqa: UP045
    sharding: Sharding = "search", costs: Times = None, sets: Sets = None, sensitive: Annotated[bool, typer.Option("--sensitivity", help="vary every number within its band: what does the outcome rest on?")] = False,
) -> None:  # fmt: skip
    """Plan a model on a cluster."""
    from partition.outputs import writable
    from partition.pipeline import to_json

    writable(out, dump, drawn_in)
    most = limited(limits, ttft=ttft, tpot=tpot)
    made, _ = make_plan(model, cluster, policy, objective, sizes_of(model, prompt=prompt, new_tokens=new_tokens, batch=batch), trips, dump=dump, sets=sets, sharding=sharding, costs=costs, limits=most, keep=keep)
    swings = None
    if sensitive:
        from partition.pipeline import policy as find_policy
        from partition.swings import sensitivity, sensitivity_text

        with progress() as say:
            swings = sensitivity(made, find_policy(policy), progress=say)
    if out is not None:
        made.save(out, swings=swings or ())
    if drawn_in is not None:
        from partition.figures import draw

        draw(made, drawn_in)
    if as_json:
        print(json.dumps(to_json(made) | ({} if swings is None else {"sensitivity": [dataclasses.asdict(s) for s in swings]})))
    else:
        print(made, *([] if swings is None else [sensitivity_text(made, swings)]), sep="\n\n")
    for folder in (out, dump, drawn_in):
        if folder is not None and not as_json:
            print(f"\nwrote {folder}: {', '.join(sorted(os.listdir(folder)))}")


@app.command("validate")
def validate_command(
    folder: Annotated[Optional[Path], typer.Argument(help="a folder of measurements; those of the package by default")] = None,  # noqa: UP045
    points: Annotated[bool, typer.Option("--points", help="every point, not the summaries alone")] = False,
    fit: Annotated[bool, typer.Option("--fit", help="fit the free numbers anew, and say the errors on models left out")] = False,
    device: Annotated[Optional[str], typer.Option("--device", help="the folder holds tables of operators, measured on this device")] = None,  # noqa: UP045
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Hold the predictions against published measurements: errors by device and metric, the worst points, the bands."""
    from partition.fidelity import fidelity_text, validate
    from partition.tables import table
    from partition.units import seconds

    if fit or device is not None:
        if fit and device is not None:
            raise PartitionError("tables of operators are not fitted here", where="--fit --device", mend="give one of them")
        _print_others(folder, device, as_json)
        return
    with progress() as say:
        found = validate(folder, progress=say)
    if as_json:
        print(as_rows([dataclasses.asdict(p) | {"error": p.error, "inside": p.inside} for p in found]))
        return
    if points:
        lines = [(p.subject, p.metric, p.what, "fitted" if p.fitted else "", seconds(p.published), seconds(p.predicted), f"{100 * p.error:+.1f} %",
                  f"{seconds(p.low)} .. {seconds(p.high)}") for p in found]  # fmt: skip
        print(table("Points", ("subject", "metric", "point", "", "published", "predicted", "error", "band"), lines), end="\n\n")
    print(fidelity_text(found))


def _print_others(folder: Path | None, device: str | None, as_json: bool) -> None:
    """The fits, or the errors of a folder of operators."""
    from partition import profiles
    from partition.fidelity.fitting import fit, fits_text
    from partition.fidelity.kernels import operators, operators_text

    with progress() as say:
        if device is None:
            fits = fit(folder, progress=say)
            shown, raw = fits_text(fits), [dataclasses.asdict(f) for f in fits]
        elif folder is None:
            raise PartitionError("there is no folder to read tables from", where="--device", mend="name one: partition validate FOLDER --device h100")
        else:
            found = operators(folder, profiles.device(device), progress=say)
            shown, raw = operators_text(found), [dataclasses.asdict(o) for o in found]
    print(as_rows(raw) if as_json else shown)


@app.command("devices")
def devices_command(as_json: AsJson = False, schema: Annotated[bool, typer.Option("--schema", help="print the JSON Schema of profiles, for editors")] = False) -> None:
    """List the devices and clusters that are known by name, with the sources of their numbers (--json)."""
    from partition import profiles, schemas
    from partition.catalogue import clusters_text, devices_json, devices_text

    if schema:
        print(json.dumps(schemas.schema(), indent=1))
        return
    devices = [profiles.device(n) for n in profiles.names("device")]
    clusters = [profiles.cluster(n) for n in profiles.names("cluster")]
    if as_json:
        print(json.dumps(devices_json(devices, clusters), indent=1))
        return
    print(devices_text(devices) + "\n\n" + clusters_text(clusters))


@app.command("policies")
def policies_command(as_json: AsJson = False) -> None:
    """List the policies, and the packages that they come from."""
    from partition.catalogue import own_policies, plugins
    from partition.tables import table

    rows = own_policies() + plugins("policies")
    print(as_rows(rows) if as_json else table("Policies", ("policy", "from", "what it does"), [tuple(r.values()) for r in rows]))


@app.command("models")
def models_command(as_json: AsJson = False) -> None:
    """List the models that are known by name, and the packages that they come from."""
    from partition.catalogue import plugins
    from partition.tables import table

    rows = plugins("models")
    print(as_rows(rows) if as_json else table("Models", ("model", "from", "made by"), [tuple(r.values()) for r in rows]))


@app.command("demo")
def demo_command(
    out: Annotated[Path, typer.Option("--out", help="folder for plan, report and trace")] = Path("out/demo"),
    random_init: Annotated[bool, typer.Option("--random-init", help="do not use the real weights")] = False,
) -> None:
    """Plan Llama-3.1-70B; run SmolLM2-135M with its real weights through a Trainium + CS-3 plan on CPU, and prove the numbers."""
    from partition.demo import demo

    with progress() as say:
        printed = demo(out, random_init=random_init, progress=say)
    print(printed)


def main() -> None:
    """Entry point: turns errors into messages and exit codes."""
    gc.set_threshold(50_000)  # loading modules and tracing make many values that stay: to look through them ever again takes a tenth of a short verb
    import partition.checking
    import partition.comparing
    import partition.exporting  # noqa: F401  (their verbs register themselves)

    try:
        code = app(standalone_mode=False)
    except PartitionError as error:
        print(f"error: {error}", file=sys.stderr)
        code = error.exit_code
    except typer._click.exceptions.ClickException as error:
        error.show()
        code = ExitCode.USAGE
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except Exception as error:
        import traceback

        last = traceback.extract_tb(error.__traceback__)[-1]
        print(f"crash: {type(error).__name__}: {error}\n  where: {last.filename}:{last.lineno} ({last.name})\n"
              "  mend:  this is a fault of the planner; run again with PARTITION_DEBUG=1 for the whole traceback and report it", file=sys.stderr)  # fmt: skip
        if os.environ.get("PARTITION_DEBUG"):
            traceback.print_exc()
        code = ExitCode.CRASH
    sys.exit(int(code or 0))
