"""What greedy policies share: what is left on each mesh while nodes are placed one by one, and when the inputs of a node are there."""

from __future__ import annotations

import numpy as np

from partition.problem import Problem


class Room:
    """Bytes held on each mesh: every resident once a mesh, and the largest activation. Nodes that must share a mesh come with the first of them."""

    def __init__(self, problem: Problem):
        self.problem = problem
        self.held = np.zeros(len(problem.meshes))
        self.activation = np.zeros(len(problem.meshes))
        self.there = np.zeros((len(problem.residents), len(problem.meshes)), bool)
        self.group = {n: group for group in problem.together for n in group}
        self.fixed = {n: problem.pins[p] for group in problem.together for p in group if p in problem.pins for n in group} | dict(problem.pins)

    def meshes(self, node: int) -> list[int]:
        """Where a node may go: to its pin or its group's mesh, else anywhere that runs all of its group."""
        if node in self.fixed:
            return [self.fixed[node]]
        able = np.isfinite(self.problem.seconds[list(self.group.get(node, (node,)))]).all(axis=0)
        return np.nonzero(able)[0].tolist()

    def added(self, node: int, mesh: int) -> float:
        """Bytes that a node and its group would add to the residents of a mesh."""
        fresh = self.problem.incidence[:, list(self.group.get(node, (node,)))].any(axis=1) & ~self.there[:, mesh]
        return float(self.problem.resident[fresh, mesh].sum())

    def fits(self, node: int, mesh: int) -> bool:
        """Whether a mesh has room for a node and its group."""
        peak = max(self.activation[mesh], *(self.problem.activation[n, mesh] for n in self.group.get(node, (node,))))
        return bool(self.held[mesh] + self.added(node, mesh) + peak <= self.problem.capacity[mesh])

    def take(self, node: int, mesh: int) -> None:
        """Place a node, and bind its group."""
        nodes = self.group.get(node, (node,))
        self.held[mesh] += self.added(node, mesh)
        self.there[:, mesh] |= self.problem.incidence[:, list(nodes)].any(axis=1)
        self.activation[mesh] = max(self.activation[mesh], *(self.problem.activation[n, mesh] for n in nodes))
        self.fixed |= dict.fromkeys(nodes, mesh)


def arrivals(problem: Problem, v: int, mesh: np.ndarray, end: np.ndarray) -> np.ndarray:
    """When the inputs of a node are there, on each mesh [m]; `mesh` and `end` of the nodes before it."""
    there = np.zeros(len(problem.meshes))
    for i in problem.incoming[v]:
        f = problem.flows[i]
        if f.kind == "carry":
            continue
        src, moved = int(mesh[f.src]), f.nbytes * f.times
        if problem.ports is not None:
            pause = moved * (problem.ports + problem.ports[src])
        else:
            with np.errstate(divide="ignore", invalid="ignore"):
                pause = problem.alpha[src] * f.times + np.where(problem.beta[src] > 0, moved / problem.beta[src], np.inf)
        pause[src] = 0.0
        there = np.maximum(there, end[f.src] + pause)
    return there
