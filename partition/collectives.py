"""Time of collectives inside a mesh and of one transfer between meshes, alpha-beta: t = alpha + steps x hop + traffic / beta.

alpha [s] is that of one small collective, beta [B/s] the bus bandwidth: the rate at which each device sends (as NCCL and nccom
define it). Traffic is what each device sends on a ring: 2 (n-1)/n of the bytes for an all-reduce, (n-1)/n for the other kinds. Where a link
states a hop, the steps after the first count: one where all send to all, log2 n where halves are exchanged, as many as the topology has on
the way round for large tensors. Which of these a runtime takes depends on the size.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from partition.hardware import Edge, Link

_ROUNDS = {"all_reduce": 2.0, "all_gather": 1.0, "reduce_scatter": 1.0, "all_to_all": 1.0}


def collective(kind: str, nbytes: Any, devices: int, fabric: Link | None) -> Any:
    """Seconds of one collective over `devices`; nbytes is the full (gathered or reduced) tensor. Zero on one device."""
    if devices == 1 or fabric is None:
        return 0.0
    time = float(fabric.alpha) + _ROUNDS[kind] * (devices - 1) / devices * nbytes / float(fabric.beta)
    return time if fabric.hop is None else time + float(fabric.hop) * _ROUNDS[kind] * steps(nbytes, devices, fabric)


def steps(nbytes: Any, devices: int, fabric: Link) -> Any:
    """The steps after the first of a reduce-scatter or an all-gather: by the link's limits of size, 0, log2 n - 1, or those of its topology."""
    around = {"ring": devices - 1.0, "torus": 2 * (math.sqrt(devices) - 1), "tree": math.log2(devices), "all_to_all": 1.0}[fabric.topology] - 1
    halving = max(math.ceil(math.log2(devices)) - 1, 0)
    below = float(fabric.mesh_below) if fabric.mesh_below else 0.0
    above = float(fabric.ring_above) if fabric.ring_above else below
    found = np.where(np.less(nbytes, below), 0.0, np.where(np.less(nbytes, above), halving, max(around, 0.0)))
    return found if np.ndim(nbytes) else float(found)


def transfer(nbytes: float, edge: Edge, *, cold: bool = False) -> float:
    """Seconds from the start of one transfer on an idle link until its last byte has arrived.

    cold: whether it is the first one, which sets up what later ones use.
    """
    link, share = edge.link, 1.0
    if link.ports is not None and link.stripe is not None and nbytes > 0:
        share = min(1.0, math.ceil(nbytes / float(link.stripe)) / float(link.ports))
    rate = min(edge.beta, float(link.beta) * share)
    return edge.alpha + nbytes / rate + (float(link.cold) if cold and link.cold is not None else 0.0)
