"""A GPU: tiles of results dealt out in waves to its processors, under a smooth roofline (see `hardware.Streaming`).

The library is taken to pick the quickest of two tiles and of some splits of the inner dimension (or of the keys). An attention is one
kernel in which each processor takes a block of query rows through all keys that it sees.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from partition.costs.contraction import Contraction
from partition.costs.cost import Cost, peak
from partition.hardware import Device, Streaming

_TILES = (64, 128)
_STEP = 64
"""Results and inner elements that a processor takes at once."""


def price(c: Contraction, dtype: str, device: Device, gpu: Streaming) -> Cost:
    """Cost of one contraction of which a device has `c`; of a half of an attention, half of it."""
    seconds, compute, memory = attention(c, dtype, device, gpu) if c.attention else matmul(c, dtype, device, gpu)
    launch, share = float(gpu.attention_launch if c.attention else gpu.launch), 0.5 if c.attention else 1.0
    return Cost(compute=compute * share, memory=memory * share, latency=launch * share, busy=(seconds - launch) * share)


def _smooth(a: Any, b: Any, p: float) -> Any:
    high = np.maximum(np.maximum(a, b), 1e-30)
    return high * ((a / high) ** p + (b / high) ** p) ** (1 / p)


def matmul(c: Contraction, dtype: str, device: Device, gpu: Streaming) -> tuple[Any, Any, Any]:
    """Seconds of a matrix product, and what its arithmetic and its memory traffic would take by themselves."""
    m, n, k, many, p = c.rows, c.columns, c.inner, float(gpu.processors), float(gpu.exponent)
    rate, bandwidth = peak(device, dtype) / many, float(device.memory.bandwidth) * float(device.memory_efficiency)
    memory, best = c.width * c.batch * (m * k + n * k + m * n) / bandwidth, np.inf
    for tile in _TILES:
        tiles = c.batch * np.ceil(m / tile) * np.ceil(n / tile)
        step = _smooth(2.0 * tile * tile / rate, 2.0 * c.width * tile / float(gpu.load), p)
        for split in (1, 2, 4, 8, 16):
            waves = np.ceil(tiles * split / many) * (float(gpu.epilogue) * tile * tile / 128**2 + np.ceil(k / split / _STEP) * _STEP * step)
            time = _smooth(waves, memory, p)
            if split > 1:
                time = np.where(k / split >= 128, time + float(gpu.reduction) + 8.0 * c.batch * split * m * n / bandwidth, np.inf)
            best = np.minimum(best, time)
    return best + float(gpu.launch), 2.0 * c.batch * m * n * k / peak(device, dtype), memory


def attention(c: Contraction, dtype: str, device: Device, gpu: Streaming) -> tuple[Any, Any, Any]:
    """Seconds of an attention, and what its arithmetic and its memory traffic would take by themselves."""
    q, keys, width, heads, many, p = c.rows, c.columns, c.inner, c.batch * c.group, float(gpu.processors), float(gpu.attention_exponent)
    rate, bandwidth = peak(device, dtype) / many, float(device.memory.bandwidth) * float(device.memory_efficiency)
    memory = 2 * c.width * width * (heads * q + c.batch * keys) / bandwidth
    written = float(gpu.cache_write) * 4.0 * c.width * width * c.batch * q / bandwidth
    one, causal = q <= 1, np.logical_and(c.masked, q > 1)
    packed, splits = np.logical_or(gpu.packs, one), np.logical_or(gpu.packs, np.logical_and(one, c.group > 1))
    blocks, group = np.where(packed, c.batch, heads), np.where(packed, c.group, 1.0)
    best = np.inf
    for tile in _TILES:
        many_blocks = blocks * np.ceil(q * group / tile)
        step = _smooth(4.0 * tile * width / rate, 2.0 * c.width * width / float(gpu.load), p) + tile / float(gpu.softmax)
        ends = float(gpu.attention_block) + float(gpu.epilogue) * tile * width / 128**2
        seen = np.where(causal, keys - q / 2 + np.minimum(tile / group, q) / 2, keys)
        for split in (1, 2, 4, 8, 16, 32, 64):
            longest = ends + np.ceil(keys / split / _STEP) * _STEP * step
            shared = many_blocks * split / many * (ends + np.maximum(_STEP, seen / split) * step)
            time = _smooth(np.where(causal, _smooth(longest, shared, p), np.ceil(many_blocks * split / many) * longest), memory, p)
            if split > 1:
                joined = time + float(gpu.attention_split) + 8.0 * heads * q * width * split / bandwidth
                time = np.where(np.logical_and(splits, keys / split >= _STEP), joined, np.inf)
            best = np.minimum(best, time)
    return best + float(gpu.attention_launch) + written, 4.0 * heads * q * keys * width / peak(device, dtype), memory
