"""join(): separate prefill and decode callables into one request, the form that everything after `trace` knows.

The request reads the prompt, then runs a scan of decode steps. What a step takes is found leaf by leaf:

- a leaf that stands at the same place in what prefill returns, with the same shape and dtype, is state: each step hands it on;
- a leaf that stands at the same place in what prefill takes is a weight or another input of both;
- a PRNG key that nobody returns is an input of its own;
- of the integer leaves that are left, the one that is looked up in the largest table is the token: the likeliest by the logits, the
  only floats that nobody takes;
- the other is the position: what the caller gave for it, if that is more than 0; else the number of places that prefill writes in the
  state that decode writes one of a step, or the prompt's length; then one more a step.

Where this does not hold, `feed(out, i)` says what step i takes after the weights. A Flax NNX module among the arguments is split into
its variables, and what the call changed in them is state.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from partition import _jax, symbols
from partition.errors import TraceError, told, written_at
from partition.graph import Graph, Role
from partition.loops import looked_up, places

Call = tuple[Callable[..., Any], tuple[Any, ...]]
"""A callable and its arguments: pytrees of arrays or shapes, or NNX modules."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Joint:
    """The request as one function of flat leaves.

    args: its leaves. paths and weights: the path of each among its call's arguments, and whether it is a weight. trips: how often decode
    runs. how: what was joined to what.
    """

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    paths: tuple[Any, ...]
    weights: tuple[bool, ...]
    trips: int
    how: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Leaf:
    """Something that a call takes or returns: its path, and its `place`, the path without the first key (the argument's, the result's)."""

    path: Any
    aval: Any

    @functools.cached_property
    def keys(self) -> tuple[str, ...]:
        return tuple(jax.tree_util.keystr((key,)) for key in self.path)

    @property
    def name(self) -> str:
        return "".join(self.keys)

    @property
    def place(self) -> tuple[str, ...]:
        return self.keys[1:]

    @property
    def integral(self) -> bool:
        return bool(jnp.issubdtype(self.aval.dtype, jnp.integer))

    def like(self, other: _Leaf) -> bool:
        return bool(self.aval.shape == other.aval.shape and self.aval.dtype == other.aval.dtype)

    def __str__(self) -> str:
        return f"{self.name or 'result'} {self.aval.dtype}{list(self.aval.shape)}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Flat:
    """A call on flat leaves: `fn(leaves)` gives flat results. same: result -> the leaf that it is, where the call hands it back as it was."""

    fn: Callable[[Sequence[Any]], list[Any]]
    leaves: list[Any]
    ins: list[_Leaf]
    outs: list[_Leaf]
    same: Mapping[int, int]
    graph: Graph


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Match:
    """Where decode's leaves come from. carried: (result of prefill, result of decode); steady: result of prefill; shared: leaf of prefill."""

    carried: Mapping[int, tuple[int, int]]
    steady: Mapping[int, int]
    shared: Mapping[int, int]
    own: tuple[int, ...]
    token: int | None
    position: int | None


def join(prefill: Call, decode: Call | Callable[..., Any], *, new_tokens: int, feed: Callable[[Any, Any], tuple[Any, ...]] | None = None) -> Joint:
    """One request of a prefill and a decode callable that share their weights, the first argument.

    Writes `new_tokens`: the first comes from prefill, so decode runs new_tokens - 1 times. With `feed`, decode may be the callable
    alone: its arguments after the weights are what `feed(out, i)` gives, out being what prefill (i = 0) or the last step returned.
    Raises TraceError that names the leaf that nothing feeds.
    """
    if not isinstance(new_tokens, int):
        raise TraceError(f"{new_tokens!r} is no number of tokens", where="trace(new_tokens=...)", mend="give a whole number from 2")
    if new_tokens < 2:
        raise TraceError(f"{new_tokens} new tokens need no decode step", where="trace(new_tokens=...)", mend="ask for 2 or more")
    fn, args = _pair(prefill, "prefill")
    if feed is not None:
        return _fed(fn, args, decode[0] if isinstance(decode, tuple) else decode, new_tokens, feed)
    first, step = _flat(fn, args, "prefill"), _flat(*_pair(decode, "decode"), "decode")
    match = _match(first, step)
    _hold_apart(first, step, match)
    return _request(first, step, match, new_tokens)


def _request(first: _Flat, step: _Flat, match: _Match, new_tokens: int) -> Joint:
    """The request that a match describes, as a function of prefill's leaves and of those that decode alone takes."""
    joined = ({a for a, _ in match.carried.values()} | set(match.steady.values()), {b for _, b in match.carried.values()} | set(step.same))
    logits = (-1, -1) if match.token is None else (_logits(first, joined[0]), _logits(step, joined[1]))
    start, counted = (0, "") if match.position is None else _start(first, step, match)

    words = {n: looked_up(step.graph, step.graph.inputs[n]) for n in match.carried if step.ins[n].integral}
    chosen = max(words, key=lambda n: words[n], default=None)

    def rest(call: _Flat, out: Sequence[Any], which: int) -> list[Any]:
        return [x for n, x in enumerate(out) if n not in joined[which] and n not in call.same]

    def request(*leaves: Any) -> Any:
        given, own = leaves[: len(first.ins)], dict(zip(match.own, leaves[len(first.ins) :], strict=True))
        out = first.fn(given)
        fixed = own | {n: given[i] for n, i in match.shared.items()} | {n: out[i] for n, i in match.steady.items()}

        def choose(out: Sequence[Any], which: int) -> Any:
            return None if match.token is None else _choose(out[logits[which]], step.ins[match.token].aval)

        def body(carry: Any, i: Any) -> tuple[Any, Any]:
            state, token = carry
            moving = fixed | state
            if match.token is not None:
                moving[match.token] = token
            if match.position is not None:
                aval = step.ins[match.position].aval
                moving[match.position] = jnp.broadcast_to(jnp.asarray(start + i, aval.dtype), aval.shape)
            out = step.fn([moving[n] for n in range(len(step.ins))])
            token = choose(out, 1)
            state = {n: out[b] for n, (_, b) in match.carried.items()}
            return (state, token), (spoken(state, token), rest(step, out, 1))

        def spoken(state: Mapping[int, Any], token: Any) -> Any:
            return token if token is not None or chosen is None else state[chosen]

        state, token = {n: out[a] for n, (a, _) in match.carried.items()}, choose(out, 0)
        _, (tokens, later) = jax.lax.scan(body, (state, token), jnp.arange(new_tokens - 1))
        return {"tokens": (spoken(state, token), tokens), "prefill": rest(first, out, 0), "decode": later}

    replaced = {step.ins[n].name for n in (*match.carried, *match.steady)}  # an argument of both that prefill's result takes over
    weights = [leaf.keys[0] == "[0]" and leaf.name not in replaced for leaf in first.ins]
    how = _told("is", {n: a for n, (a, _) in match.carried.items()}, first, step) + _told("stays", match.steady, first, step)
    how += [f"decode's {step.ins[match.token]} is chosen by {first.outs[logits[0]]}"] if match.token is not None else []
    how += [f"decode's {step.ins[match.position]} counts on from {np.array2string(np.asarray(start)) if isinstance(start, np.ndarray) else start}, {counted}"] if match.position is not None else []
    return Joint(fn=request, args=(*first.leaves, *(step.leaves[i] for i in match.own)), trips=new_tokens - 1, how=tuple(how),
                 paths=(*(leaf.path for leaf in first.ins), *(step.ins[i].path for i in match.own)),
                 weights=(*weights, *(step.ins[i].keys[0] == "[0]" for i in match.own)))  # fmt: skip


def _told(verb: str, joined: Mapping[int, int], first: _Flat, step: _Flat) -> list[str]:
    """What was joined, a line for each argument of decode: its first leaf, and how many follow."""
    lines: dict[str, list[str]] = {}
    for n, a in joined.items():
        lines.setdefault(step.ins[n].keys[0], []).append(f"decode's {step.ins[n]} {verb} prefill's result {first.outs[a].name}")
    return [found[0] + (f", and so on for {len(found) - 1} more leaves of that argument" if len(found) > 1 else "") for found in lines.values()]


def _pair(call: Any, what: str) -> Call:
    match call:
        case (fn, tuple() | list() as args) if callable(fn):
            return fn, tuple(args)
    raise TraceError(f"{what} is no pair of a callable and its arguments", where=f"trace({what}=...)", mend=f"give {what}=(callable, (weights, ...))")


def _flat(fn: Callable[..., Any], args: tuple[Any, ...], what: str) -> _Flat:
    """A call on flat leaves, with NNX modules split into their variables, which the call also returns."""
    nnx: Any = sys.modules.get("flax.nnx")
    modules = {n: nnx.split(a) for n, a in enumerate(args) if nnx is not None and isinstance(a, nnx.Module)}
    plain = tuple(modules[n][1] if n in modules else a for n, a in enumerate(args))
    paths, tree = jax.tree_util.tree_flatten_with_path(plain)

    def call(*flat: Any) -> list[Any]:
        given = list(jax.tree_util.tree_unflatten(tree, flat))
        for n, (graphdef, _) in modules.items():
            given[n] = nnx.merge(graphdef, given[n])
        out = fn(*given)
        results = jax.tree_util.tree_flatten_with_path(out)[0]
        for n in modules:
            results += [((jax.tree_util.SequenceKey(n), *path), x) for path, x in jax.tree_util.tree_flatten_with_path(nnx.split(given[n])[1])[0]]
        found.clear()
        found.extend(path for path, _ in results)
        return [x for _, x in results]

    found: list[Any] = []
    try:
        jaxpr = jax.make_jaxpr(call)(*(leaf for _, leaf in paths))
    except Exception as error:
        raise TraceError(f"{what} cannot be traced: {told(error)}", where=f"trace({what}=...), {written_at(error)}",
                         mend="it must be traceable by jax.make_jaxpr with these arguments") from error  # fmt: skip
    sizes = symbols.stand_ins(_jax.symbolic([leaf for _, leaf in paths]))
    graph = _jax.read(jaxpr, [(Role.INPUT, "")] * len(paths), sizes).graph
    same = {o: graph.inputs.index(t) for o, t in enumerate(graph.outputs) if t in graph.inputs}
    return _Flat(fn=lambda given: call(*given), leaves=[leaf for _, leaf in paths], ins=[_leaf(path, leaf) for path, leaf in paths],
                 outs=[_leaf(path, leaf) for path, leaf in zip(found, [v.aval for v in _jax.body_of(jaxpr).outvars], strict=True)], same=same,
                 graph=graph)  # fmt: skip


def _leaf(path: Any, leaf: Any) -> _Leaf:
    aval = leaf if hasattr(leaf, "shape") and hasattr(leaf, "dtype") else jax.ShapeDtypeStruct(np.shape(leaf), jax.dtypes.result_type(leaf))
    return _Leaf(path=tuple(path), aval=aval)


def _is_key(leaf: _Leaf) -> bool:
    return bool(jnp.issubdtype(leaf.aval.dtype, jax.dtypes.prng_key)) or (leaf.aval.dtype == jnp.uint32 and leaf.aval.shape[-1:] == (2,))


def _match(first: _Flat, step: _Flat) -> _Match:
    """Find where each of decode's leaves comes from. Raises TraceError for one that comes from nowhere."""
    carried: dict[int, tuple[int, int]] = {}
    steady: dict[int, int] = {}
    shared: dict[int, int] = {}
    own: list[int] = []
    left: list[int] = []
    for n, leaf in enumerate(step.ins):
        a = _at(leaf, first.outs, {*steady.values(), *(x for x, _ in carried.values())})
        b = _at(leaf, step.outs, {x for _, x in carried.values()})
        twin = next((i for i, other in enumerate(first.ins) if other.name == leaf.name and other.like(leaf)), None)
        kept = a is None or first.same.get(a) is not None
        if twin is not None and kept and (leaf.place or not leaf.integral) and (b is None or step.same.get(b) == n):
            shared[n] = twin
        elif a is not None and b is not None and step.same.get(b) != n:
            carried[n] = (a, b)
        elif a is not None and (leaf.place or not leaf.integral or b is not None):
            steady[n] = a
        elif _is_key(leaf) or leaf.keys[0] == "[0]":
            own.append(n)
        else:
            left.append(n)
    rows = {n: looked_up(step.graph, step.graph.inputs[n]) for n in left if step.ins[n].integral}
    tokens = sorted(rows, key=lambda n: (-rows[n], step.ins[n].aval.shape == ()))  # beside a batch, a scalar is the position
    for n in left:
        if n not in tokens[:2]:
            raise _unfed(step.ins[n], first, step)
    fed = max((looked_up(step.graph, step.graph.inputs[n]) for n in carried if step.ins[n].integral), default=0)
    if fed and all(rows[n] < fed for n in tokens):  # the token is among the state: decode returns what it chose
        tokens = [-1, *tokens]
    token, position = (*tokens, None, None)[:2]
    token = None if token == -1 else token
    return _Match(carried=carried, steady=steady, shared=shared, own=tuple(own), token=token, position=position)


def _start(first: _Flat, step: _Flat, match: _Match) -> tuple[Any, str]:
    """The position of the first token that decode reads, and where it is known from."""
    assert match.position is not None
    given = step.leaves[match.position]
    if (not isinstance(given, jax.ShapeDtypeStruct | jax.core.Tracer) and not hasattr(given, "aval")) or isinstance(given, jax.Array):
        value = np.asarray(given)
        if value.size and (value > 0).all():
            return (int(value.flat[0]) if (value == value.flat[0]).all() else value), "as the caller gave it"
    for n, (a, b) in match.carried.items():
        into, out = step.graph.inputs[n], step.graph.outputs[b]
        for axis in (x for x, size in enumerate(step.ins[n].aval.shape) if places(step.graph, out, x, into) == 1 and size != 1):
            if (written := places(first.graph, first.graph.outputs[a], axis)) is not None and written > 1:
                return written, f"the places that prefill writes in {first.outs[a].name}"
    rows = {i: looked_up(first.graph, first.graph.inputs[i]) for i, leaf in enumerate(first.ins) if leaf.integral and leaf.aval.shape}
    prompt = max(rows, key=lambda i: (rows[i], -i), default=None)
    return (0, "there is no prompt") if prompt is None else (first.ins[prompt].aval.shape[-1], f"the length of prefill's {first.ins[prompt].name}")


def _at(leaf: _Leaf, outs: Sequence[_Leaf], used: set[int]) -> int | None:
    """The result that stands at a leaf's place, in a tuple of results or as the only one, and is like it."""
    alike = [(i, out) for i, out in enumerate(outs) if i not in used and out.like(leaf)]
    found = [i for i, out in alike if out.place == leaf.place] + [i for i, out in alike if out.keys == leaf.place]
    return found[0] if found else None


def _hold_apart(first: _Flat, step: _Flat, match: _Match) -> None:
    """Raise TraceError where a result that was taken for a state might as well be the logits: alike, and both without a place of their own."""
    for n, (a, _) in match.carried.items():
        rivals = [out for i, out in enumerate(first.outs) if i not in {x for x, _ in match.carried.values()} and not step.ins[n].place and out.place == () and out.like(first.outs[a])]
        if rivals and match.token is not None and not step.ins[n].integral:
            raise TraceError(f"decode's argument {step.ins[n]} may be prefill's result {first.outs[a].name} or {rivals[0].name}: they look alike", where="trace(prefill=..., decode=...)",
                             mend="say which: trace(..., feed=lambda out, i: (token, state, ...))")  # fmt: skip


def _unfed(leaf: _Leaf, first: _Flat, step: _Flat) -> TraceError:
    near = [f"{who} returns {out}" for who, call in (("prefill", first), ("decode", step)) for out in call.outs if out.place == leaf.place and leaf.place]
    return TraceError(f"nothing feeds decode's argument {leaf}", where="; ".join(near) or "neither prefill nor decode returns such a leaf",
                      mend="let prefill and decode return the state in the form that decode takes it, or say what a step takes: "
                           "trace(..., feed=lambda out, i: (token, state, ...))")  # fmt: skip


def _logits(call: _Flat, joined: set[int]) -> int:
    floats = [n for n, out in enumerate(call.outs) if n not in joined | set(call.same) and jnp.issubdtype(out.aval.dtype, jnp.floating) and out.aval.shape]
    if not floats:
        raise TraceError("no logits are left to choose the next token by", where=", ".join(map(str, call.outs))[:300] or "no results",
                         mend="return the logits, or the chosen token at the place where decode takes it, or pass feed=")  # fmt: skip
    return max(floats, key=lambda n: call.outs[n].aval.shape[-1])


def _choose(logits: Any, aval: Any) -> Any:
    """The likeliest token of the last position, in the shape that decode takes it."""
    best = jnp.argmax(logits, axis=-1)
    while best.size > aval.size:
        best = best[..., -1]
    return best.reshape(aval.shape).astype(aval.dtype)


def _fed(fn: Callable[..., Any], args: tuple[Any, ...], decode: Callable[..., Any], new_tokens: int, feed: Callable[[Any, Any], tuple[Any, ...]]) -> Joint:
    """The request of a caller who says what each step takes."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(args)

    def rest(out: Any, fed: Any) -> list[Any]:
        held = {id(x) for x in jax.tree_util.tree_leaves(fed)}
        return [x for x in jax.tree_util.tree_leaves(out) if id(x) not in held]

    def request(*flat: Any) -> Any:
        given = jax.tree_util.tree_unflatten(tree, list(flat))

        def body(carry: Any, i: Any) -> tuple[Any, Any]:
            out = decode(given[0], *carry)
            fed = tuple(feed(out, i + 1))
            return jax.tree_util.tree_map(lambda new, old: jnp.asarray(new, old.dtype), fed, carry), rest(out, fed)

        out = fn(*given)
        fed = tuple(feed(out, jnp.int32(0)))
        _, later = jax.lax.scan(body, jax.tree_util.tree_map(jnp.asarray, fed), jnp.arange(new_tokens - 1))
        return {"prefill": rest(out, fed), "decode": later}

    return Joint(fn=request, args=tuple(leaf for _, leaf in leaves), paths=tuple(p for p, _ in leaves), weights=tuple(p[0].idx == 0 for p, _ in leaves),
                 trips=new_tokens - 1, how=("each decode step takes what the caller's feed gives",))  # fmt: skip
