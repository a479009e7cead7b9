"""The request that a plan is for: how many sequences run together and how many tokens each of them writes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

USUAL = {"batch": 1, "prompt": 2048, "new_tokens": 256}
"""The sizes of a request, unless told (assumed)."""


def sizes_in(request: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes among what a plan was asked with."""
    return {name: n for name, n in request.items() if name in USUAL}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """batch: sequences that run together. trips: how often the token loop runs. The first token comes from prefill."""

    batch: int
    trips: int

    @property
    def tokens(self) -> int:
        """Tokens that the whole batch writes."""
        return self.batch * (self.trips + 1)
