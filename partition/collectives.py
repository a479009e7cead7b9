"""Time of collectives inside a mesh and of one transfer between meshes, alpha-beta: t = alpha + traffic / beta.

alpha [s] is that of one small collective, beta [B/s] the bus bandwidth: the rate at which each device sends (as NCCL and nccom
define it). Traffic is what each device sends on a ring: 2 (n-1)/n of the bytes for an all-reduce, (n-1)/n for the other kinds.
"""

from __future__ import annotations

from partition.hardware import Edge, Link

_ROUNDS = {"all_reduce": 2.0, "all_gather": 1.0, "reduce_scatter": 1.0, "all_to_all": 1.0}


def collective(kind: str, nbytes: float, devices: int, fabric: Link | None) -> float:
    """Seconds of one collective over `devices`; nbytes is the full (gathered or reduced) tensor. Zero on one device."""
    if devices == 1 or fabric is None:
        return 0.0
    return float(fabric.alpha) + _ROUNDS[kind] * (devices - 1) / devices * nbytes / float(fabric.beta)


def transfer(nbytes: float, edge: Edge) -> float:
    """Seconds from the start of one transfer on an idle link until its last byte has arrived."""
    return float(edge.link.alpha) + nbytes / edge.beta
