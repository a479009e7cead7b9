"""Policies: any callable `Problem -> Placement`. In the tree, one file and one line here; elsewhere, `module:attr` or an entry point."""

from __future__ import annotations

from collections.abc import Callable

from partition.policies.exhaustive import exhaustive
from partition.policies.heft import heft
from partition.policies.ideal_dp import ideal_dp
from partition.policies.local_search import local_search
from partition.policies.order_dp import order_dp
from partition.policies.phase_split import phase_split
from partition.policies.random import random
from partition.policies.single import single
from partition.problem import Placement, Problem

Policy = Callable[[Problem], Placement]

__all__ = ["POLICIES", "Policy", "exhaustive", "heft", "ideal_dp", "local_search", "order_dp", "phase_split", "random", "single"]

POLICIES: dict[str, Policy] = {
    "exhaustive": exhaustive,
    "heft": heft,
    "ideal_dp": ideal_dp,
    "local_search": local_search,
    "order_dp": order_dp,
    "phase_split": phase_split,
    "random": random,
    "single": single,
}
"""The policies that come with the package, by name."""
