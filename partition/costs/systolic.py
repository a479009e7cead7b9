"""A Neuron chip: rows through a systolic array, weights through memory, scores on the vector engines of each core (see `hardware.Systolic`)."""

from __future__ import annotations

import numpy as np

from partition.costs.contraction import Contraction
from partition.costs.cost import Cost, peak
from partition.hardware import Device, Systolic
from partition.work import Work


def price(work: Work, c: Contraction, device: Device, chip: Systolic, ways: float) -> Cost:
    """Cost of one contraction of which a device has `c`; of a half of an attention, half of it.

    The array takes `rows` rows for any number up to that. A core has the scores of its heads, one after the other: a key position costs
    `score`, and `score_rows` more for a full tile of query rows.
    """
    (dtype,) = work.flops
    padded = 2.0 * c.batch * c.group * np.maximum(c.rows, float(chip.rows) if not c.attention else 1.0) * c.inner * c.columns
    compute = padded / peak(device, dtype)
    memory = work.bytes / (float(device.memory.bandwidth) * float(device.memory_efficiency)) / ways
    latency = work.contractions * float(device.contraction_latency)
    if not c.attention:
        return Cost(compute=compute, memory=memory, latency=latency, busy=np.maximum(compute, memory))
    on_core = c.batch * c.group / np.maximum(c.heads, 1.0) * np.ceil(np.maximum(c.heads, 1.0) / float(chip.cores))
    vector = 0.5 * on_core * c.columns * (float(chip.score) + float(chip.score_rows) * c.rows / float(chip.tile))
    return Cost(compute=np.maximum(compute, vector), memory=memory, latency=latency, busy=np.maximum(np.maximum(compute, vector), memory))
