"""Which nodes must share a mesh because the user asks for it: whole layers, whole phases, weights that lie on one mesh only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from partition.coarsen import Block
from partition.errors import NameUnknownError
from partition.phases import Phase

if TYPE_CHECKING:
    from partition.flow import Resident

KEEP = ("layers", "phases", "weights", "order")
"""What may be kept whole: the nodes of a layer in one phase, all nodes of a phase, all nodes that need the same weights (no replicas), each of these on
one mesh; and the order, in which each mesh has a run of the nodes of a phase."""


def kept(keep: Sequence[str], blocks: Sequence[Block], layer: np.ndarray, residents: Sequence[Resident]) -> tuple[tuple[int, ...], ...]:
    """Groups of nodes that must share a mesh, disjoint. layer [n]: of each node, -1 for none. Nodes that both phases need go where they are read,
    and are in none. Raises NameUnknownError."""
    import networkx as nx

    if wrong := [name for name in keep if name not in KEEP]:
        raise NameUnknownError.among("kind of whole", wrong[0], KEEP, where="keep")
    runs: dict[object, list[int]] = {}
    for n, b in enumerate(blocks):
        if "layers" in keep and layer[n] >= 0:
            runs.setdefault((b.phase, int(layer[n])), []).append(n)
        if "phases" in keep and b.phase in (Phase.PREFILL, Phase.DECODE):
            runs.setdefault(b.phase, []).append(n)
    if "weights" in keep:
        runs |= {r.value: list(r.blocks) for r in residents if r.kind == "weights"}
    bound: nx.Graph[int] = nx.Graph()
    for nodes in runs.values():
        nx.add_path(bound, [n for n in nodes if blocks[n].phase is not Phase.BOTH])
    return tuple(sorted(tuple(sorted(group)) for group in nx.connected_components(bound) if len(group) > 1))
