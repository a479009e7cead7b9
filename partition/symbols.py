"""Shapes whose sizes are named, not known: expressions of symbols such as "2*b*p + 3", and their value once the symbols have one.

A program may be traced with symbols in its shapes. Its structure, and so its phases, does not depend on their values; its bytes,
flops and trips do. A value may be a number, or an array of numbers: the expression is then evaluated at all of them at once.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

_CALLS = {"floordiv": np.floor_divide, "mod": np.mod, "max": np.maximum, "min": np.minimum}
_PRIMES = (101, 103, 107, 109, 113, 127, 131, 137, 139, 149, 151, 157)


@functools.lru_cache(maxsize=65536)
def _compiled(expression: str) -> tuple[Any, frozenset[str]]:
    tree = ast.parse(expression.replace("^", "**"), mode="eval")
    names = frozenset(n.id for n in ast.walk(tree) if isinstance(n, ast.Name)) - _CALLS.keys()
    return compile(tree, "<shape>", "eval"), names


def symbols(expression: object) -> frozenset[str]:
    """The names in an expression."""
    return _compiled(str(expression))[1]


def value(expression: object, sizes: Mapping[str, Any]) -> Any:
    """The value of an expression: an int, or an int64 array where a size is one. Raises KeyError for a symbol without a size."""
    code, names = _compiled(str(expression))
    found = eval(code, {"__builtins__": {}}, {**_CALLS, **{n: sizes[n] for n in names}})
    return found if isinstance(found, np.ndarray) and found.ndim else int(found)


def first(value: Any) -> Any:
    """A number, or the first of an array of numbers: what decides where sizes are many at once."""
    return value.flat[0] if isinstance(value, np.ndarray) and value.ndim else value


def stand_ins(expressions: Iterable[object]) -> dict[str, int]:
    """A number for every symbol of some expressions, by name: unlike primes, so that no two sizes are equal by chance, and large enough
    that every expression is positive."""
    expressions = list(expressions)
    names = sorted(set[str]().union(*map(symbols, expressions)))
    sizes = {n: _PRIMES[i % len(_PRIMES)] + 1000 * (i // len(_PRIMES)) for i, n in enumerate(names)}
    for _ in range(8):
        if all(value(e, sizes) > 0 for e in expressions):
            break
        sizes = {n: 4 * s + 1 for n, s in sizes.items()}
    return sizes
