"""Any shape from one trace: 100,000 batches and prompts of a 70B plan at once, and that each is what a plan there gives."""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

import partition as pt
from benchmarks import Bar
from models import llama
from models.generate import generate, of_nnx, shapes

POINTS = 100_000


def bars() -> list[Bar]:
    """Seconds for all points, and the worst error at the size of the plan."""
    weights, steps = of_nnx(llama.Llama(llama.config("llama-3.1-70b"), shapes("bfloat16"), scanned=True))
    batch, prompt = export.symbolic_shape("batch, prompt")
    program = pt.trace(lambda w, t: generate(*steps(w), t, 64), weights, jax.ShapeDtypeStruct((batch, prompt), jnp.int32))
    made = pt.curves(program, {"batch": 1, "prompt": 2048}, cluster="trn2_efa_4cs3")
    rng, taken = np.random.default_rng(0), []
    for _ in range(3):
        sizes = {"batch": rng.integers(1, 64, POINTS), "prompt": rng.integers(16, 16_384, POINTS)}
        start = time.perf_counter()
        made.at(**sizes)
        taken.append(time.perf_counter() - start)
    here = made.at()
    error = max(abs(float(getattr(here, f)[0]) / getattr(made.plan.estimate, f) - 1) for f in ("ttft", "tpot", "e2e", "usd_per_mtok"))
    return [Bar.of(f"{POINTS:,} (batch, prompt) points of a 70B plan [s]", taken, "<=", 1.0, note="an absolute time: a guide"),
            Bar.of("error at the plan's own size", [error], "<=", 1e-9)]  # fmt: skip
