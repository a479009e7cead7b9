"""Policies: any callable `Problem -> Placement`. In the tree, one file and one line; elsewhere, `module:attr` or an entry point."""

from __future__ import annotations

from collections.abc import Callable

from partition.policies.cover import cover
from partition.policies.cpsat import cpsat
from partition.policies.equal_split import equal_split
from partition.policies.exhaustive import exhaustive
from partition.policies.gradient import gradient
from partition.policies.heft import heft
from partition.policies.ideal_dp import ideal_dp
from partition.policies.kind_cut import kind_cut
from partition.policies.local_search import local_search
from partition.policies.m_etf import m_etf
from partition.policies.m_sct import m_sct
from partition.policies.m_topo import m_topo
from partition.policies.milp import milp
from partition.policies.min_cut import min_cut
from partition.policies.order_dp import order_dp
from partition.policies.phase_split import phase_split
from partition.policies.pipedream import pipedream
from partition.policies.portfolio import portfolio
from partition.policies.random import random
from partition.policies.single import single
from partition.problem import Placement, Problem

Policy = Callable[[Problem], Placement]

POLICIES: dict[str, Policy] = {
    "cover": cover,
    "cpsat": cpsat,
    "equal_split": equal_split,
    "exhaustive": exhaustive,
    "gradient": gradient,
    "heft": heft,
    "ideal_dp": ideal_dp,
    "kind_cut": kind_cut,
    "local_search": local_search,
    "m_etf": m_etf,
    "m_sct": m_sct,
    "m_topo": m_topo,
    "milp": milp,
    "min_cut": min_cut,
    "order_dp": order_dp,
    "phase_split": phase_split,
    "pipedream": pipedream,
    "portfolio": portfolio,
    "random": random,
    "single": single,
}
"""The policies that come with the package, by name."""

__all__ = ["POLICIES", "Policy", "cover", "cpsat", "equal_split", "exhaustive", "gradient", "heft", "ideal_dp", "kind_cut", "local_search", "m_etf", "m_sct", "m_topo", "milp", "min_cut", "order_dp", "phase_split", "pipedream", "portfolio", "random", "single"]
