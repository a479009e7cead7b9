"""checked(): a public verb that was given something else than its annotation says tells so, before anything breaks inside it.

Annotations are read as they are written, so that no module is imported for them; one with a word that is not known here takes anything.
"""

from __future__ import annotations

import functools
import inspect
import numbers
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from partition.errors import ArgumentError

MAKES = {
    "Cluster": 'cluster("trn2_efa_cs3")', "Device": 'device("trn2")', "Program": "trace(fn, *args)", "Phases": "tag(program)", "Problem": "pose(phases, cluster)",
    "Placement": "place(problem, policy) or problem.placement(meshes)", "Plan": "plan(fn, args, cluster=...) or Plan.load(path)", "Stages": "cut(program, placement)",
    "Runner": "prepare(stages)", "pd.DataFrame": "sweep(model, over, cluster=...)",
}  # fmt: skip
"""Value -> what makes one."""

_PLAIN: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "str": ("a name", lambda v: isinstance(v, str)),
    "Path": ("a path", lambda v: isinstance(v, Path)),
    "int": ("a whole number", lambda v: isinstance(v, numbers.Integral) and not isinstance(v, bool)),
    "float": ("a number", lambda v: isinstance(v, numbers.Real) and not isinstance(v, bool)),
    "None": ("None", lambda v: v is None),
    "Mapping": ("a mapping", lambda v: isinstance(v, Mapping)),
    "tuple": ("a tuple", lambda v: isinstance(v, tuple | list)),
    "Sequence": ("a sequence", lambda v: isinstance(v, Sequence) and not isinstance(v, str)),
    "Iterable": ("an iterable", lambda v: isinstance(v, Iterable)),
    "Callable": ("a callable", callable),
    "Policy": ("a policy", callable),
}
P = ParamSpec("P")
R = TypeVar("R")


def checked(verb: Callable[P, R]) -> Callable[P, R]:
    """The verb, which raises ArgumentError for an argument of another type."""
    parameters = list(inspect.signature(verb).parameters.values())
    kinds = {p.name: found for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and (found := _kinds(str(p.annotation)))}
    places = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    name = verb.__qualname__.removesuffix(".__init__")

    @functools.wraps(verb)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        for argument, value in (*zip(places, args, strict=False), *kwargs.items()):
            if argument in kinds and not any(_is(value, kind) for kind in kinds[argument]):
                raise _wrong(name, argument, value, kinds[argument])
        return verb(*args, **kwargs)

    return call


def _kinds(annotation: str) -> tuple[str, ...]:
    """The types that an annotation names; none where one of them is not known."""
    bare = annotation
    while (fewer := re.sub(r"\[[^\[\]]*\]", "", bare)) != bare:
        bare = fewer
    found = tuple(kind.strip() for kind in bare.split("|"))
    return found if all(kind in MAKES or kind in _PLAIN for kind in found) else ()


def _is(value: Any, kind: str) -> bool:
    return _PLAIN[kind][1](value) if kind in _PLAIN else any(c.__name__ == kind.rpartition(".")[2] for c in type(value).__mro__)


def _wrong(verb: str, argument: str, value: Any, kinds: Sequence[str]) -> ArgumentError:
    said = [k for k in kinds if k != "None" and not (k == "str" and "Path" in kinds)]
    told = " or ".join(_PLAIN[k][0] if k in _PLAIN else f"a {k}" for k in said)
    made = [MAKES[k] for k in kinds if k in MAKES]
    return ArgumentError(f"{argument} is {'None' if value is None else f'of type {type(value).__name__}'}, not {told}", where=f"{verb}({argument}=...)",
                         mend=f"give what {' or '.join(made)} gives" if made else f"give {told}")  # fmt: skip
