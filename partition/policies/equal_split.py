"""equal_split: as many nodes for each mesh, in the program's order; how layers are dealt out by hand."""

from __future__ import annotations

from partition.phases import Phase
from partition.policies._layers import finish
from partition.problem import Placement, Problem


def equal_split(problem: Problem) -> Placement:
    """Cut each phase into runs of as many nodes as there are meshes, run by run. O(n) time; memory is not looked at."""
    placed: dict[int, int] = {}
    for phase in (Phase.PREFILL, Phase.DECODE, Phase.NONE):
        nodes = problem.nodes(phase)
        placed |= {n: i * len(problem.meshes) // len(nodes) for i, n in enumerate(nodes)}
    for group in problem.together:
        placed |= dict.fromkeys(group, placed[group[0]])
    return problem.placement(finish(problem, placed, 0))
