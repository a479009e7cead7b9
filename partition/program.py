"""trace(): any JAX callable, with arrays or shapes, into a Program: its jaxpr, its graph, and the names and roles of its leaves.

The jaxpr is what JAX itself would compile; the graph is the planner's view of it. No weights are needed.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp

from partition import _jax, symbols
from partition.arguments import checked
from partition.errors import ExecutionError, TraceError, told, written_at
from partition.graph import Graph, Op, Role
from partition.graph import weights as weights_of
from partition.joint import Call, Joint, join
from partition.loops import written


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """One callable of the program: its jaxpr, its graph with the way back to equations, its argument and result trees."""

    name: str
    jaxpr: Any = dataclasses.field(repr=False)
    lowered: _jax.Lowered = dataclasses.field(repr=False)
    in_tree: Any = dataclasses.field(repr=False)
    out_tree: Any = dataclasses.field(repr=False)
    in_avals: tuple[Any, ...] = dataclasses.field(repr=False)

    @property
    def graph(self) -> Graph:
        """The graph of the whole callable."""
        return self.lowered.graph


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """What was traced. `fn` is kept to run the uncut program; `seconds` is how long JAX took to trace it.

    Of separate prefill and decode callables: `args` are the leaves that the joined request takes, joint is how it was joined.
    sizes: of a program traced with symbols in its shapes, the numbers that stand in for them in its graph; `at` gives it others.
    lost: leaves of arguments that the call writes and does not return, such as the variables of a module: they are not in the graph.
    """

    fn: Callable[..., Any] = dataclasses.field(repr=False)
    entries: tuple[Entry, ...]
    seconds: float
    args: tuple[Any, ...] = dataclasses.field(default=(), repr=False)
    joint: Joint | None = dataclasses.field(default=None, repr=False)
    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    lost: tuple[str, ...] = ()
    again: Callable[[Mapping[str, int]], Program] | None = dataclasses.field(default=None, repr=False)

    def at(self, **sizes: int) -> Program:
        """The program traced anew with a number for every symbol in its shapes. Raises TraceError for one too many, too few or too small."""
        wanted, given = set(self.sizes), set(sizes)
        wrong = sorted(wanted ^ given) or sorted(n for n, s in sizes.items() if not isinstance(s, int) or isinstance(s, bool) or s < 1)
        if wrong:
            raise TraceError(f"the sizes given do not fit the symbols of the program: {', '.join(wrong)}", where=f"{self.entry.name}.at({', '.join(sorted(given))})",
                             mend=f"give a whole number from 1 for each of: {', '.join(sorted(wanted)) or 'none, it has no symbols'}")  # fmt: skip
        return self if self.again is None else self.again(sizes)

    @property
    def entry(self) -> Entry:
        """The only entry of a program of one callable."""
        (entry,) = self.entries
        return entry

    @property
    def graph(self) -> Graph:
        """The graph of the only entry."""
        return self.entry.graph

    @property
    def weight_bytes(self) -> float:
        """Bytes of all weights, each counted once."""
        return float(sum(self.graph.tensors[t].nbytes for t in weights_of(self.graph)))

    def source(self, op: Op | int) -> str:
        """Where the model's author wrote an op: "file:line (function)"."""
        n, lowered = op if isinstance(op, int) else op.id, self.entry.lowered
        return _jax.source(lowered.eqns[n], lowered.callers[n])

    @functools.cached_property
    def op(self) -> dict[int, Op]:
        """Op id -> op, bodies included."""
        return {op.id: op for op in self.graph.walk()}

    def __str__(self) -> str:
        g = self.graph
        return (
            f"{self.entry.name}: {len(g)} ops ({sum(1 for _ in g.walk())} with bodies), {len(g.inputs)} inputs, "
            f"{len(g.outputs)} outputs, {self.weight_bytes / 1e9:.3g} GB of weights, traced in {self.seconds:.2f} s"
        )


def _leaf_name(path: Any, argument: int) -> str:
    text = jax.tree_util.keystr(path[1:], simple=True, separator=".") or f"arg{argument}"
    return text.removesuffix(".value")


@checked
def host_devices(count: int) -> None:
    """Ask JAX for `count` CPU host devices, the stand-ins of the meshes. Does nothing once a JAX backend has started. Raises ExecutionError for a count below 1."""
    if count < 1:
        raise ExecutionError(f"{count} host devices run nothing", where="host_devices(count=...)", mend="give 1 or more")
    if getattr(jax.config, "jax_num_cpu_devices", 0) < count:
        try:
            jax.config.update("jax_num_cpu_devices", count)
        except RuntimeError:
            pass  # too late: what is there is what `run` finds, and it says so


DEFAULT_HOST_DEVICES = 32


@checked
def compile_cache(folder: str | Path | None = None) -> Path | None:
    """Keep compiled stages on disk, by content, so that the next process does not compile them again (JAX's own cache). Gives the folder.

    folder: PARTITION_CACHE unless told, else ~/.cache/partition; PARTITION_CACHE=off keeps nothing. A folder that cannot be written is left out.
    """
    named = str(folder) if folder is not None else os.environ.get("PARTITION_CACHE", str(Path.home() / ".cache" / "partition"))
    if named == "off":
        return None
    path = Path(named)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    if not os.access(path, os.W_OK):
        return None
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return path


def trace(
    fn: Callable[..., Any] | None = None, *args: Any, prefill: Call | None = None, decode: Call | Callable[..., Any] | None = None,
    new_tokens: int = 32, feed: Callable[[Any, Any], tuple[Any, ...]] | None = None, weights: Collection[int] | None = None, name: str | None = None,
) -> Program:  # fmt: skip
    """Trace `fn(*args)` into a Program; or a request of two callables, `prefill=(fn, args), decode=(fn, args)`, or of one at two lengths.

    args are pytrees of arrays or `jax.ShapeDtypeStruct`s, or Flax NNX modules. `weights` are the positions of the arguments that hold
    weights, by default the first that holds floats; the others are inputs, and so is what comes back changed among the weights, a cache
    that lies with them (unless most of them do: that is training). A function that closes over its weights needs none. Two callables
    share their first argument, the weights; how decode's other arguments are found, and what `feed` says instead, is told in
    `partition.joint`. The request then takes `program.args`.
    Shapes may hold the symbols of `jax.export.symbolic_shape`: the program can be tagged as it is, and planned `at` sizes for them.
    Before the first JAX backend starts, CPU host devices are asked for, so that stages can run in this process.
    Raises TraceError, naming the user's line, when a callable cannot be traced, and the leaf that nothing feeds.
    """
    host_devices(DEFAULT_HOST_DEVICES)
    given = (fn, args, prefill, decode)
    symbolic = _jax.symbolic(given)

    def again(sizes: Mapping[str, int]) -> Program:
        fn, args, prefill, decode = _sized(given, sizes)
        return trace(fn, *args, prefill=prefill, decode=decode, new_tokens=new_tokens, feed=feed, weights=weights, name=name)

    joint = None
    if fn is None or prefill is not None or decode is not None:
        if fn is not None or prefill is None or decode is None:
            said = "one function and a pair" if fn is not None else "half of a pair" if prefill is not None or decode is not None else "nothing"
            raise TraceError(f"{said} to trace", where="trace(...)", mend="give one function, or prefill= and decode= together")
        joint = join(prefill, decode, new_tokens=new_tokens, feed=feed)
        fn, args = joint.fn, joint.args
    if not callable(fn):
        raise TraceError(f"a {type(fn).__name__} cannot be traced", where="trace(fn, *args)", mend="give a callable first, its arguments after it")
    called = name or str(getattr(fn, "__name__", "program"))
    leaves, in_tree = jax.tree_util.tree_flatten_with_path(args)
    start = time.perf_counter()
    try:
        jaxpr, out = jax.make_jaxpr(functools.partial(_watched, fn, lost := list[str]()), return_shape=True)(*args)
    except Exception as error:
        raise TraceError(
            f"{called} cannot be traced: {told(error)}", where=written_at(error),
            mend='say which sizes are meant: jax.export.symbolic_shape(..., constraints=["<what was compared>"]); or give numbers'
            if type(error).__name__ == "InconclusiveDimensionOperation"
            else "the function must be traceable by jax.make_jaxpr with these arguments: no Python branches on values, matching shapes",
        ) from error
    seconds = time.perf_counter() - start
    if joint is not None:
        known = list(zip(joint.paths, joint.weights, strict=True))
    else:
        held = _first_floats(args) if weights is None else weights
        known = [(path, path[0].idx in held) for path, _ in leaves]
    roles = [(Role.PARAM if weight else Role.INPUT, _leaf_name(path, path[0].idx)) for path, weight in known]
    if effects := _jax.effects(jaxpr):
        raise TraceError(f"{called} has side effects that no stage can carry: {', '.join(sorted({name for name, _ in effects}))}", where=effects[0][1],
                         mend="remove callbacks with effects and ordered prints before planning; jax.debug.print without order may stay")  # fmt: skip
    sizes = symbols.stand_ins(symbolic)
    lowered = _jax.read(jaxpr, roles, sizes)
    if joint is None:
        _state_among_weights(lowered.graph, [path for path, _ in leaves], [path for path, _ in jax.tree_util.tree_leaves_with_path(out)])
    entry = Entry(
        name=called, jaxpr=jaxpr, lowered=lowered, in_tree=in_tree, out_tree=jax.tree_util.tree_structure(out),
        in_avals=tuple(_jax.body_of(jaxpr).invars[i].aval for i in range(len(leaves))),
    )  # fmt: skip
    return Program(fn=fn, entries=(entry,), seconds=seconds, args=() if joint is None else joint.args, joint=joint, sizes=sizes, lost=tuple(lost), again=again if symbolic else None)


def _watched(fn: Callable[..., Any], lost: list[str], *args: Any) -> Any:
    """A call that notes which leaves of its arguments it writes and does not return, as a module's call may in its variables."""
    before = jax.tree_util.tree_leaves(args)  # held, so that their ids stay theirs
    out = fn(*args)
    kept = {id(leaf) for leaf in (*before, *jax.tree_util.tree_leaves(out))}
    lost[:] = [_leaf_name(path, path[0].idx) for path, leaf in jax.tree_util.tree_leaves_with_path(args) if id(leaf) not in kept]
    return out


def sized(program: Program, sizes: Mapping[str, Any]) -> Program:
    """The same trace read with numbers, or arrays of numbers, for the symbols in its shapes: the same ops. Raises TraceError."""
    if set(sizes) != set(program.sizes):
        raise TraceError(f"the sizes given do not fit the symbols of the program: {', '.join(sorted(set(sizes) ^ set(program.sizes)))}", where=program.entry.name,
                         mend=f"give a number for each of: {', '.join(sorted(program.sizes)) or 'none, it has no symbols'}")  # fmt: skip
    entry, tensors = program.entry, program.graph.tensors
    lowered = _jax.read(entry.jaxpr, [(tensors[t].role, tensors[t].name) for t in program.graph.inputs], sizes)
    return dataclasses.replace(program, entries=(dataclasses.replace(entry, lowered=lowered),), sizes={}, again=None)


def _first_floats(args: tuple[Any, ...]) -> tuple[int, ...]:
    """The position of the first argument that holds floats."""

    def floats(leaf: Any) -> bool:
        return jnp.issubdtype(getattr(leaf, "dtype", None) or jnp.result_type(leaf), jnp.floating)

    return next(((n,) for n, arg in enumerate(args) if any(map(floats, jax.tree_util.tree_leaves(arg)))), ())


def _state_among_weights(graph: Graph, given: Sequence[Any], returned: Sequence[Any]) -> None:
    """Make inputs of the weights that come back changed at the same place: a cache among the variables of a module."""
    tensors: Any = graph.tensors
    back: dict[int, bool] = {}  # such a weight -> whether it is written in place
    params = {t for t in graph.inputs if tensors[t].role is Role.PARAM}
    ends: dict[str, list[tuple[tuple[str, ...], int]]] = {}
    for out, path in zip(graph.outputs, returned, strict=True):
        end = tuple(jax.tree_util.keystr((k,)) for k in path)
        if end and out in graph.producer:
            ends.setdefault(end[-1], []).append((end, out))
    for t, path in zip(graph.inputs, given, strict=True):
        place = tuple(jax.tree_util.keystr((k,)) for k in path[1:])
        for end, out in ends.get(place[-1], ()) if t in params and place else ():
            same = (tensors[t].shape, tensors[t].dtype) == (tensors[out].shape, tensors[out].dtype)
            if same and (end[-len(place) :] == place or (len(end) > 1 and place[-len(end) + 1 :] == end[1:])):
                back[t] = written(graph, out, t)
    few = len(back) < len(params) / 2
    for t in (t for t, in_place in back.items() if in_place or few):
        tensors[t] = dataclasses.replace(tensors[t], role=Role.INPUT)


def _sized(given: Any, sizes: Mapping[str, int]) -> Any:
    """The same, with a number in the place of every symbolic dimension."""

    def leaf(x: Any) -> Any:
        shape = tuple(symbols.value(n, sizes) if jax.export.is_symbolic_dim(n) else n for n in getattr(x, "shape", ()))
        return jax.ShapeDtypeStruct(shape, x.dtype) if _jax.symbolic(x) else x

    return jax.tree_util.tree_map(leaf, given)

