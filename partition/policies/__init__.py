"""Policies: any callable `Problem -> Placement`. In the tree, one file and one line here; elsewhere, `module:attr` or an entry point."""

from __future__ import annotations

from collections.abc import Callable

from partition.policies.exhaustive import exhaustive
from partition.policies.heft import heft
from partition.policies.phase_split import phase_split
from partition.policies.random import random
from partition.policies.single import single
from partition.problem import Placement, Problem

Policy = Callable[[Problem], Placement]

__all__ = ["POLICIES", "Policy", "exhaustive", "heft", "phase_split", "random", "single"]

POLICIES: dict[str, Policy] = {
    "exhaustive": exhaustive,
    "heft": heft,
    "phase_split": phase_split,
    "random": random,
    "single": single,
}
"""The policies that come with the package, by name."""
