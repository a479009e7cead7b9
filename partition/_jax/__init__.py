"""The only file that touches `jax.extend`. It reads jaxprs into graphs, and writes ops back as jaxprs that JAX can compile.

Everything branches on what a value can do, never on a version: on some JAX versions a closed jaxpr and a jaxpr are one class, and
a scan's arity stands in other parameters.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex
from jax.extend import source_info_util

from partition import symbols
from partition.errors import libraries
from partition.graph import OPAQUE, Graph, Loop, Op, Role, Span, Tensor, Value, itemsize, reads, uncollected, writes

PASSED = (contextlib.__file__, functools.__file__)
"""Files whose lines stand between a user's and a library's."""

_CALLEES = ("jaxpr", "call_jaxpr", "fun_jaxpr")


def body_of(jaxpr: Any) -> Any:
    """The open jaxpr of a closed one."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def consts_of(jaxpr: Any) -> tuple[Any, ...]:
    """The constants that a jaxpr closes over."""
    return tuple(getattr(jaxpr, "consts", ()))


def _scan_arity(params: Mapping[str, Any]) -> tuple[int, int]:
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    groups = params["ft_in"].unpack()
    return len(groups[0]), len(groups[1])


def primitive_of(eqn: Any) -> str:
    """The name of an equation's primitive; of one that some JAX versions wrap, of what is wrapped."""
    wrapped = eqn.params.get("_prim") if eqn.primitive.name == "call_hi_primitive" else None
    return str(eqn.primitive.name) if wrapped is None else type(wrapped).__name__


def _callee(eqn: Any) -> Any:
    """The jaxpr of a call that can be inlined, else None."""
    if eqn.primitive.name in OPAQUE or eqn.primitive.name in ("scan", "while", "cond", "reduce", "reduce_window"):
        return None  # of the last two, the jaxpr is what they do with two elements
    held = [eqn.params[k] for k in _CALLEES if k in eqn.params]
    if len(held) != 1:
        return None
    inner = body_of(held[0])
    fits = len(inner.invars) == len(eqn.invars) and len(inner.outvars) == len(eqn.outvars)
    return held[0] if fits else None


def _join(outer: str, inner: str) -> str:
    return f"{outer}/{inner}" if outer and inner else outer or inner


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lowered:
    """A graph with the handles that lead back: op id -> eqn, tensor id -> aval, const and literal ids -> their values.

    callers: op id -> the call or loop that it stands in, as (eqn, what that stands in); None at the top.
    """

    graph: Graph
    eqns: list[Any]
    callers: list[Any]
    avals: list[Any]
    values: dict[int, Any]


class _Reader:
    """Reads one jaxpr, bodies included, into one table of tensors. Calls are inlined and keep their caller's scope."""

    def __init__(self, sizes: Mapping[str, Any]) -> None:
        self.sizes = sizes
        self.tensors: list[Tensor] = []
        self.avals: list[Any] = []
        self.eqns: list[Any] = []
        self.callers: list[Any] = []
        self.caller: Any = None
        self.values: dict[int, Any] = {}
        self._value = functools.cache(lambda expression: symbols.value(expression, sizes))
        self._bytes: dict[tuple[str, ...], Any] = {}  # by shape and dtype: sizes may be long arrays
        self._consts: dict[int, int] = {}
        self._literals: dict[Any, int] = {}
        self._scopes: dict[Any, str] = {}

    def tensor(self, aval: Any, role: Role, name: str = "") -> int:
        shape, dtype = tuple(getattr(aval, "shape", ())), str(getattr(aval, "dtype", "float0"))
        if self.sizes:
            shape = tuple(self.number(n) for n in shape)
        key = *map(str, getattr(aval, "shape", ())), dtype
        if key not in self._bytes:
            self._bytes[key] = math.prod(shape) * itemsize(dtype)
        made = Tensor(id=len(self.tensors), shape=shape, dtype=dtype, role=role, name=name, nbytes=self._bytes[key])
        self.tensors.append(made)
        self.avals.append(aval)
        return made.id

    def number(self, n: Any) -> Any:
        """A dimension as a number: of a symbolic one, its value."""
        return n if isinstance(n, int) else self._value(str(n))

    def const(self, var: Any, value: Any) -> int:
        if id(value) not in self._consts:
            number = getattr(value, "shape", None) == () and not is_key(var.aval)
            self._consts[id(value)] = self.tensor(var.aval, Role.CONST, str(np.asarray(value).item()) if number else f"const{len(self._consts)}")
            self.values[self._consts[id(value)]] = value
        return self._consts[id(value)]

    def literal(self, atom: Any) -> int:
        key = (str(np.asarray(atom.val).item() if np.ndim(atom.val) == 0 else atom.val), str(atom.aval))
        if key not in self._literals:
            self._literals[key] = self.tensor(atom.aval, Role.LITERAL, key[0])
            self.values[self._literals[key]] = atom.val
        return self._literals[key]

    def scope(self, outer: str, eqn: Any) -> str:
        stack = eqn.source_info.name_stack
        if stack not in self._scopes:
            self._scopes[stack] = str(stack)
        return _join(outer, self._scopes[stack])

    def graph(self, jaxpr: Any, roles: Sequence[tuple[Role, str]] | None, scope: str = "") -> Graph:
        inner = body_of(jaxpr)
        env: dict[Any, int] = {}
        env.update((v, self.const(v, c)) for v, c in zip(inner.constvars, consts_of(jaxpr), strict=True))
        for n, v in enumerate(inner.invars):
            env[v] = self.tensor(v.aval, *(roles[n] if roles is not None else (Role.ACTIVATION, "")))
        ops: list[Op] = []
        self.equations(inner, env, ops, scope)
        outputs = tuple(self.atom(env, v) for v in inner.outvars)
        return Graph(ops=live(ops, outputs), inputs=tuple(env[v] for v in inner.invars), outputs=outputs, tensors=self.tensors)

    def atom(self, env: dict[Any, int], atom: Any) -> int:
        return self.literal(atom) if isinstance(atom, jex.Literal) else env[atom]

    def equations(self, inner: Any, env: dict[Any, int], ops: list[Op], scope: str) -> None:
        for eqn in inner.eqns:
            inputs = tuple([self.atom(env, a) for a in eqn.invars])
            if eqn.primitive.name == "sharding_constraint":  # how a mesh of the author's was to hold it: the planner decides that
                env[eqn.outvars[0]] = inputs[0]
                continue
            here = self.scope(scope, eqn)
            if (callee := _callee(eqn)) is not None:
                called = body_of(callee)
                bound = dict(zip(called.invars, inputs, strict=True))
                bound.update((v, self.const(v, c)) for v, c in zip(called.constvars, consts_of(callee), strict=True))
                self.caller = (eqn, self.caller)
                self.equations(called, bound, ops, here)
                self.caller = self.caller[1]
                env.update((v, self.atom(bound, a)) for v, a in zip(eqn.outvars, called.outvars, strict=True))
                continue
            number = len(self.eqns)
            self.eqns.append(eqn)
            self.callers.append(self.caller)
            self.caller = (eqn, self.caller)
            name, params = primitive_of(eqn), eqn.params
            loop: Loop | None = None
            inside: tuple[Graph, ...] = ()
            if name in ("scan", "while"):
                loop = self.loop(name, params, here)
            elif name == "cond":
                inside = tuple(self.graph(b, None, here) for b in params["branches"])
            elif name == "shard_map":
                inside = (self.graph(params["jaxpr"], None, here),)
            self.caller = self.caller[1]
            outputs = tuple([self.tensor(v.aval, Role.ACTIVATION) for v in eqn.outvars])
            env.update(zip(eqn.outvars, outputs, strict=True))
            ops.append(Op(id=number, primitive=name, inputs=inputs, outputs=outputs, params=params, scope=here, loop=loop, bodies=inside))  # fmt: skip

    def loop(self, name: str, params: Mapping[str, Any], scope: str) -> Loop:
        if name == "scan":
            consts, carry = _scan_arity(params)
            body = self.graph(params["jaxpr"], None, scope)
            return Loop(kind=name, trips=self.number(params["length"]), cond_consts=0, consts=consts, carry=carry, body=body,
                        reverse=params["reverse"])  # fmt: skip
        body, cond = self.graph(params["body_jaxpr"], None, scope), self.graph(params["cond_jaxpr"], None, scope)
        consts = params["body_nconsts"]
        return Loop(kind=name, trips=None, cond_consts=params["cond_nconsts"], consts=consts,
                    carry=len(body.inputs) - consts, body=body, cond=cond)  # fmt: skip


def live(ops: Sequence[Op], outputs: Iterable[int]) -> tuple[Op, ...]:
    """The ops that some output needs, in order: tracing leaves dead equations behind, which no compiler runs."""
    needed, kept = set(outputs), []
    for op in reversed(ops):
        if not needed.isdisjoint(op.outputs):
            kept.append(op)
            needed.update(op.inputs)
    return tuple(reversed(kept))


def effects(jaxpr: Any) -> list[tuple[str, str]]:
    """(primitive, where it stands) of every equation with a side effect, bodies and calls included; prints that keep no order left out."""
    found = []
    for eqn in (e for e in body_of(jaxpr).eqns if e.effects):  # what a kernel or a shard_map does within itself does not show outside
        inner = [j for j in jex.jaxprs_in_params(eqn.params) if body_of(j).effects]
        free = eqn.primitive.name in ("debug_print", "debug_callback") and not eqn.params.get("ordered", False)
        if inner:
            found += [effect for j in inner for effect in effects(j)]
        elif not free:
            found.append((eqn.primitive.name, source(eqn)))
    return found


@uncollected()
def read(jaxpr: Any, roles: Sequence[tuple[Role, str]], sizes: Mapping[str, Any]) -> Lowered:
    """Read a closed jaxpr into a graph. `roles` gives role and name of each of its inputs, `sizes` a number for every symbol in shapes."""
    reader = _Reader(sizes)
    graph = reader.graph(jaxpr, roles)
    return Lowered(graph=graph, eqns=reader.eqns, callers=reader.callers, avals=reader.avals, values=reader.values)


def symbolic(tree: Any) -> list[Any]:
    """The symbolic dimensions of all leaves of a pytree."""
    return [n for leaf in jax.tree_util.tree_leaves(tree) for n in getattr(leaf, "shape", ()) if jax.export.is_symbolic_dim(n)]


def source(eqn: Any, caller: Any = None) -> str:
    """Where the user wrote an equation: "file:line (function)", and through which line of a library; of one inside a library's call, where the user wrote that call."""
    found = str(source_info_util.summarize(eqn.source_info))
    while not found and caller is not None:
        eqn, caller = caller
        found = str(source_info_util.summarize(eqn.source_info))
    library = next((folder for folder in libraries() if found.startswith(folder)), None)
    frames = getattr(eqn.source_info.traceback, "frames", ()) if library is not None else ()
    own = next((f for f in frames if f.file_name not in PASSED and not f.file_name.startswith(libraries())), None)
    return found if own is None or library is None else f"{own.file_name}:{own.line_num} ({own.function_name}) through {found.removeprefix(os.path.dirname(library) + os.sep)}"


def slice_aval(aval: Any, span: Span) -> Any:
    """The aval of a stacked tensor's rows [start, stop); the whole one for a carry between ranges."""
    if span is None or span[0] == span[1]:
        return aval
    return jax.core.ShapedArray((span[1] - span[0], *aval.shape[1:]), aval.dtype)


def _with_span(eqn: Any, span: Span) -> Mapping[str, Any]:
    return eqn.params if span is None else {**eqn.params, "length": span[1] - span[0]}


def write(
    ops: Iterable[tuple[Op, Span]], inputs: Sequence[Value], outputs: Sequence[Value], lowered: Lowered, *, name: str
) -> Any:
    """The closed jaxpr of some ops: `inputs` and `outputs` in this order; literals stay literals, constants are inputs.

    An op with a span is a scan over that range alone: its stacked operands and results are values with the same span.
    """
    env: dict[Value, Any] = {}

    def var(value: Value) -> Any:
        if value not in env:
            env[value] = jex.Var(slice_aval(lowered.avals[value[0]], value[1]))
        return env[value]

    def atom(value: Value) -> Any:
        if lowered.graph.tensors[value[0]].role is Role.LITERAL:
            return jex.Literal(lowered.values[value[0]], lowered.avals[value[0]])
        return var(value)

    invars = [var(v) for v in inputs]
    eqns, effects = [], set()
    for op, span in ops:
        eqn = lowered.eqns[op.id]
        eqns.append(eqn.replace(
            invars=[atom(v) for v in reads(op, span)],
            outvars=[var(v) for v in writes(op, span)],
            params=_with_span(eqn, span),
        ))  # fmt: skip
        effects |= set(eqn.effects)
    outvars = [atom(v) for v in outputs]
    debug = jex.DebugInfo("jit", name, tuple(f"x{i}" for i in range(len(invars))), tuple(f"y{i}" for i in range(len(outvars))))
    inner = jex.Jaxpr(constvars=(), invars=invars, outvars=outvars, eqns=eqns, effects=frozenset(effects) or jex.no_effects, debug_info=debug)  # fmt: skip
    return jex.ClosedJaxpr(inner, ())


def as_function(jaxpr: Any) -> Callable[..., list[Any]]:
    """A closed jaxpr as a function of its inputs."""
    fn: Callable[..., list[Any]] = jex.jaxpr_as_fun(jaxpr)
    return fn


def check(jaxpr: Any) -> None:
    """Raise where a jaxpr is malformed."""
    jex.check_jaxpr(body_of(jaxpr))


def is_key(aval: Any) -> bool:
    """Whether an aval is a typed PRNG key."""
    return bool(jnp.issubdtype(aval.dtype, jax.dtypes.prng_key))


_KEYS = {"key<fry>": "threefry2x32", "key<rbg>": "rbg", "key<urbg>": "unsafe_rbg"}


def from_numpy(value: Any, aval: Any) -> Any:
    """What `to_numpy` gave of a value of this aval, as a value: words become a typed PRNG key again."""
    if not is_key(aval) or jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        return value
    return from_words(value, str(aval.dtype))


def from_words(words: Any, dtype: str) -> Any:
    """A typed PRNG key of a type such as "key<fry>" from its words."""
    return jax.random.wrap_key_data(jnp.asarray(words), impl=_KEYS[dtype])


def to_numpy(value: Any) -> np.ndarray:
    """A value as NumPy sees it; a typed PRNG key as its words."""
    if hasattr(value, "dtype") and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        value = jax.random.key_data(value)
    return np.asarray(value)


def on_host(leaf: Any) -> Any:
    """A leaf on the first host device: what lies on another, or is spread over several, would take a computation there."""
    first = jax.devices("cpu")[0]
    return jax.device_put(leaf, first) if isinstance(leaf, jax.Array) and leaf.devices() != {first} else leaf
