"""check(reference, candidate, args): do two callables compute the same? For those who partition by their own means."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from partition import _jax
from partition._jax.lifting import float64
from partition.counterparts import parting
from partition.distances import NARROW, Difference, alike, apart, floating, held_wide, judged
from partition.divergence import fickle
from partition.errors import EquivalenceError, ExecutionError, told, written_at
from partition.program import trace
from partition.verdict import Verdict, beside, changing, compared, hold_numbers, largest, numberless, refused, roughest, rules


def two(reference: Any, candidate: Any = None, args: Any = (), *extra: Any, tolerance: Mapping[str, float] | None, oracle: bool) -> Verdict:
    """Two callables on the same arguments."""
    if not callable(reference) or not callable(candidate) or not isinstance(args, tuple | list) or extra:
        raise ExecutionError("check takes stages and the arguments of the model, or two callables and a tuple of arguments", where="check(...)", mend="write check(stages, *args) or check(reference, candidate, args)")
    start = time.perf_counter()
    plain, (want, got) = _both(reference, candidate, args)
    one, other = jax.tree_util.tree_structure(want), jax.tree_util.tree_structure(got)
    if str(one) != str(other):
        raise EquivalenceError("the two give results of other structures", where=f"{str(one)[:80]} and {str(other)[:80]}", mend="let both give the same tree of arrays")
    outputs, culprit = compared(want, got, tolerance), None
    beyond = tolerance is None and not all(d.equal for d in outputs)
    traced = functools.cache(lambda: trace(reference, *args))
    unheld = tuple[str, ...]()
    if oracle or beyond:
        exact = _wide(reference, args, len(outputs))
        truth = [None] * len(outputs) if exact is None else exact
        unheld = ("a comparison with float64: JAX cannot compute the reference in it",) if oracle and exact is None else ()
        rows = (jax.tree_util.tree_leaves(want), jax.tree_util.tree_leaves(got))
        outputs = beside(outputs, truth, *rows) if oracle else outputs
        if beyond:
            rough, size = 0.0, largest((args, want))
            with contextlib.suppress(Exception):  # what JAX cannot trace has no float64 either
                rough = roughest(traced())
            outputs = tuple(d if t is None else judged(d, t, a, b, rough, size) for d, t, a, b in zip(outputs, truth, *rows, strict=True))
            if rough >= NARROW and any(d.rounding for d in outputs) and (wide := _wide(candidate, args, len(outputs))) is not None:
                outputs = tuple(held_wide(d, t, u, rough) for d, t, u in zip(outputs, truth, wide, strict=True))
    equal = all(d.equal for d in outputs)
    if not equal:
        with contextlib.suppress(Exception):  # what JAX cannot trace is held by its numbers alone
            both = traced(), trace(candidate, *args)
            culprit = next(filter(None, (parting(*both, tuple(args), differs) for differs in rules(tolerance))), None)
    bitwise = equal and all(d.bitwise for d in outputs)
    verdict = Verdict(
        equal=equal, bitwise=bitwise, outputs=outputs, boundaries=(), culprit=culprit, cut="yes, bit for bit" if bitwise else "yes, within bounds" if equal else "NO", not_shown=(*unheld, *_tokens_alone(outputs), *numberless(outputs, want), *apart(outputs)), stages=0, moved_bytes=0, planned_bytes=0,
        trips=None, planned_trips=0, seconds=time.perf_counter() - start, options={},
    )  # fmt: skip
    hold_numbers(verdict, want, args)
    for name, fn, before in (("reference", reference, plain[0]), ("candidate", candidate, plain[1])):
        if not equal and not all(d.bitwise for d in compared(before, _called(name, fn, args)[0], None)):
            raise changing(verdict, f"the {name}", _fickle(fn, args) or str(getattr(fn, "__qualname__", name)))
    if not equal:
        raise refused(verdict, "reference and candidate differ", where="; ".join([*([culprit] if culprit else []), *(str(d) for d in outputs if not d.equal)]), mend="look at the op named" if culprit else "no op is found where they part: give more of what is inside as outputs")
    return verdict


def _fickle(fn: Callable[..., Any], args: Any) -> str | None:
    """The op of a callable that gives other numbers when it is run again; None where JAX cannot trace it."""
    with contextlib.suppress(Exception):
        return fickle(trace(fn, *args), jax.tree_util.tree_leaves(args))
    return None


def _tokens_alone(outputs: Sequence[Difference]) -> tuple[str, ...]:
    """What is not shown where no output is a float."""
    if not sum(int(np.prod(d.shape)) for d in outputs):
        return ("no output holds a number",)
    return () if any(floating(d.dtype) for d in outputs) else ("whole numbers alone were compared: what changes no token is not seen; give logits as an output too",)


def _both(reference: Callable[..., Any], candidate: Callable[..., Any], args: Any) -> tuple[list[Any], list[Any]]:
    """(what two callables give, the same with what they write into their arguments, such as a module's cache, where one of them does)."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(args):
        if isinstance(leaf, jax.Array) and leaf.is_deleted():
            raise ExecutionError(f"argument {jax.tree_util.keystr(path)} was donated to another call, its memory is gone", where="check(reference, candidate, args)", mend="give a copy to that call, or to this one")
    (want, first, wrote), (got, second, too) = (_called(name, fn, args) for name, fn in (("reference", reference), ("candidate", candidate)))
    if not wrote | too:
        return [want, got], [want, got]
    return [want, got], [{"result": result, **{f"written into argument {name}": end[name] for name in wrote | too if name in end}} for result, end in ((want, first), (got, second))]


def _leaves(args: Any) -> dict[str, Any]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(args)}


def _called(name: str, fn: Callable[..., Any], args: Any) -> tuple[Any, dict[str, Any], set[str]]:
    """(what a callable of the user's gives, its arguments afterwards, those that it wrote). Raises ExecutionError for one that raises."""
    given = _copied(args)  # it may donate its arguments, or write into them
    start, own = _leaves(given), _leaves(args)
    try:
        result = fn(*given)
    except Exception as error:
        try:  # some only run traced, such as those that index NumPy weights by traced tokens
            given, start, result = args, own, jax.jit(fn)(*_copied(args))
        except Exception:
            raise ExecutionError(f"the {name} raised {told(error)}", where=written_at(error), mend="make it run by itself first") from error
    result = jax.tree_util.tree_map(lambda leaf: jnp.asarray(leaf) if isinstance(leaf, int | float | complex) else leaf, result)
    for path, leaf in jax.tree_util.tree_flatten_with_path(result)[0]:
        if np.asarray(_jax.to_numpy(leaf)).dtype.kind in "OUSMm":
            raise ExecutionError(f"output {jax.tree_util.keystr(path) or 'result'} of the {name} is a {type(leaf).__name__}", where=getattr(fn, "__qualname__", name), mend="give arrays and numbers")
    end = _leaves(given)
    return result, end, {name for name, leaf in end.items() if leaf is not start.get(name) or (isinstance(leaf, np.ndarray) and not alike(leaf, own[name]))}


def _copied(args: Any) -> Any:
    """The same arguments in memory of their own."""
    return jax.tree_util.tree_map(lambda leaf: jax.random.clone(leaf) if hasattr(leaf, "dtype") and _jax.is_key(leaf) else leaf.copy() if isinstance(leaf, np.ndarray | jax.Array) else leaf, args)


def _wide(reference: Callable[..., Any], args: Any, many: int) -> list[Any] | None:
    """What a callable gives in float64, of `many` outputs with what it writes into its arguments behind them; None where JAX cannot trace it."""
    try:
        made = list[Any](float64(jax.make_jaxpr(reference)(*args), jax.tree_util.tree_leaves(args)))
        return [*made, *[None] * (many - len(made))]
    except Exception:  # it is no JAX program: held to its bounds alone
        return None
