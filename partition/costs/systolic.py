"""A Neuron chip: rows through a systolic array, weights through memory, scores on the vector engines of each core (see `hardware.Systolic`)."""

from __future__ import annotations

import numpy as np

from partition.costs.contraction import Contraction
from partition.costs.cost import Cost, peak
from partition.hardware import Device, Systolic
from partition.work import Work


def price(work: Work, c: Contraction, device: Device, chip: Systolic, ways: float) -> Cost:
    """Cost of one contraction of which a core has `c`; of a half of an attention, half of it.

    The array takes `rows` rows for any number up to that. A core has the scores of its heads one after the other: a key position costs
    `score`, and `score_rows` more for a full tile of query rows.
    """
    (dtype,), cores = work.flops, float(chip.cores)
    padded = 2.0 * c.batch * c.group * np.maximum(c.rows, float(chip.rows) if not c.attention else 1.0) * c.inner * c.columns
    compute = padded / peak(device, dtype) * cores
    memory = work.bytes / (float(device.memory.bandwidth) * float(device.memory_efficiency)) / ways * cores
    latency = work.contractions * float(device.contraction_latency)
    if c.attention:
        vector = 0.5 * c.batch * c.group * c.columns * (float(chip.score) + float(chip.score_rows) * c.rows / float(chip.tile))
        compute = np.maximum(compute, vector)
    return Cost(compute=compute, memory=memory, latency=latency, busy=np.maximum(compute, memory))
