"""Every public verb says what it was given in the place of what it takes."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

import partition as pt
from partition.arguments import MAKES, checked
from partition.errors import ArgumentError, PartitionError


def verbs() -> list[str]:
    """Public functions and classes whose first argument is one of our values."""
    found = []
    for name in pt.__all__:
        parameters = [p for p in inspect.signature(getattr(pt, name)).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
        if parameters and any(kind in str(parameters[0].annotation).split(" | ") for kind in MAKES):
            found.append(name)
    return found


def test_there_are_many_verbs() -> None:
    assert len(verbs()) >= 20 and {"diff", "evaluate", "draw", "Batch", "cut", "tag", "pose"} <= set(verbs())


@pytest.mark.parametrize("name", verbs())
@pytest.mark.parametrize("given", [3, "a", None, object()], ids=["number", "name", "None", "object"])
def test_another_type_is_said(name: str, given: Any) -> None:
    verb = getattr(pt, name)
    needed = [p for p in inspect.signature(verb).parameters.values() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    keywords = {p.name: "trn2_efa_cs3" for p in inspect.signature(verb).parameters.values() if p.default is p.empty and p.kind is p.KEYWORD_ONLY}
    with pytest.raises(PartitionError) as error:
        verb(*[given] * max(1, len(needed)), **keywords)
    assert "mend:" in str(error.value) and len(str(error.value).splitlines()) == 3


def test_the_error_says_what_makes_the_value() -> None:
    with pytest.raises(ArgumentError, match="a is of type str, not a Plan") as error:
        pt.diff("out/a", "out/b")
    assert error.value.where == "diff(a=...)" and "Plan.load(path)" in error.value.mend and isinstance(error.value, TypeError)


def test_only_what_is_annotated_with_known_words_is_held() -> None:
    @checked
    def verb(a: dict[str, int], b: int | None = None, *rest: Any, c: tuple[int, ...] = ()) -> Any:
        return a, b, rest, c

    assert verb("anything", 2, 3, c=[4]) == ("anything", 2, (3,), [4])
    with pytest.raises(ArgumentError, match="b is of type bool, not a whole number"):
        verb({}, True)
    with pytest.raises(ArgumentError, match=r"verb\(c=\.\.\.\)"):
        verb({}, None, c=3)
