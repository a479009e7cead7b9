"""The request that a plan is for: how many sequences run together and how many tokens each of them writes."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """batch: sequences that run together. trips: how often the token loop runs. The first token comes from prefill."""

    batch: int
    trips: int

    @property
    def tokens(self) -> int:
        """Tokens that the whole batch writes."""
        return self.batch * (self.trips + 1)
