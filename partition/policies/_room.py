"""What is left on each mesh while a policy places nodes one by one."""

from __future__ import annotations

import numpy as np

from partition.problem import Problem


class Room:
    """Bytes held on each mesh: every resident once a mesh, and the largest activation."""

    def __init__(self, problem: Problem):
        self.problem = problem
        self.held = np.zeros(len(problem.meshes))
        self.activation = np.zeros(len(problem.meshes))
        self.there = np.zeros((len(problem.residents), len(problem.meshes)), bool)

    def added(self, node: int, mesh: int) -> float:
        """Bytes that a node would add to the residents of a mesh."""
        fresh = self.problem.incidence[:, node] & ~self.there[:, mesh]
        return float(self.problem.resident[fresh, mesh].sum())

    def fits(self, node: int, mesh: int) -> bool:
        """Whether a mesh has room for a node."""
        peak = max(self.activation[mesh], self.problem.activation[node, mesh])
        return bool(self.held[mesh] + self.added(node, mesh) + peak <= self.problem.capacity[mesh])

    def take(self, node: int, mesh: int) -> None:
        """Place a node."""
        self.held[mesh] += self.added(node, mesh)
        self.there[:, mesh] |= self.problem.incidence[:, node]
        self.activation[mesh] = max(self.activation[mesh], self.problem.activation[node, mesh])
