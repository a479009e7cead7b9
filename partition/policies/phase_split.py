"""phase_split: the announced split. Prefill on one kind of machine, decode on another, the kinds chosen so that both together are fastest."""

from __future__ import annotations

import itertools

from partition.errors import PlacementError
from partition.phases import Phase
from partition.policies._layers import finish, lay, of_kind
from partition.policies.single import single
from partition.problem import Placement, Problem


def phase_split(problem: Problem) -> Placement:
    """Place PREFILL and DECODE on different kinds of machine.

    With one kind only, on different meshes; a program of one phase as `single` does. Each phase is laid over as few meshes as hold it.

    Source: the inference disaggregation that AWS and Cerebras announced in March 2026; Splitwise (ISCA'24), DistServe (OSDI'24).
    O(n m) time. Raises PlacementError where there is but one mesh, InfeasibleError where a phase does not fit on its kind.
    """
    kinds = of_kind(problem)
    prefill, decode = problem.nodes(Phase.PREFILL), problem.nodes(Phase.DECODE)
    decode = [n for n in decode if problem.region[n] == "body"] or decode
    if not decode or (not prefill and "body" not in problem.region):
        return single(problem)
    if len(problem.meshes) < 2:
        raise PlacementError("phase_split needs two meshes, the cluster has one", where="policy phase_split",
                             mend="use the policy 'single', or a cluster of two kinds of machine")  # fmt: skip

    def total(nodes: list[int], m: int) -> float:
        return float((problem.seconds[nodes, m] * problem.times[nodes]).sum())

    if len(kinds) > 1:
        pairs = itertools.permutations(sorted(kinds), 2)
        first, second = min(pairs, key=lambda p: (total(prefill, kinds[p[0]][0]) + total(decode, kinds[p[1]][0]), p))
        here, there = kinds[first], kinds[second]
    else:
        here, there = [0], list(range(1, len(problem.meshes)))
    placed = lay(problem, prefill, here) | lay(problem, decode, there)
    return problem.placement(finish(problem, placed, placed[decode[-1]]))
