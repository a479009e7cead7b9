"""gradient: a placement relaxed to shares, made better by its gradient, and rounded: for those who learn placements; not the best way to find one."""

from __future__ import annotations

import numpy as np

from partition.batch import Batch
from partition.errors import InfeasibleError
from partition.phases import Phase
from partition.policies._phased import rates
from partition.problem import Placement, Problem

_SEEDS = 16
_DRAWN = 64
"""Placements that are drawn from each relaxed one, beside its likeliest."""


def gradient(problem: Problem, *, seed: int = 0, steps: int = 600) -> Placement:
    """Draw each node's mesh by the Gumbel-softmax trick, lower the smooth objective by Adam from 16 seeds, and take the best of what is drawn.

    The relaxed objective counts work, what crosses, and memory; which of the drawn is best, the true one says. O(steps x (n m + edges)) on JAX.
    Raises InfeasibleError where none of the drawn fits. Source: Jang, Gu and Poole, 2017; Maddison, Mnih and Teh, 2017.
    """
    shares = _relaxed(problem, seed, steps)
    rng, draws = np.random.default_rng(seed), [shares.argmax(axis=2)]
    for _ in range(_DRAWN):
        noise = rng.gumbel(size=shares.shape)
        draws.append((np.log(shares + 1e-9) + noise).argmax(axis=2))
    mesh = np.concatenate(draws)
    for group in problem.together:
        mesh[:, list(group)] = mesh[:, group[:1]]
    for n, m in problem.pins.items():
        mesh[:, n] = m
    scores = Batch(problem).scores(mesh)
    if not np.isfinite(scores.min()):
        raise InfeasibleError("none of the drawn placements fits", where=f"{len(mesh)} placements", mend="use the policy 'portfolio'")
    return problem.placement(mesh[int(scores.argmin())])


def _relaxed(problem: Problem, seed: int, steps: int) -> np.ndarray:
    """Shares [seed, n, m] of each node on each mesh."""
    import jax
    import jax.numpy as jnp
    import optax

    n, m = len(problem), len(problem.meshes)
    finite = np.where(np.isfinite(problem.seconds), problem.seconds, 10 * np.nanmax(np.where(np.isfinite(problem.seconds), problem.seconds, np.nan)))
    counted = np.ones(n)
    if problem.objective in ("ttft", "tpot"):
        counted[[i for i, p in enumerate(problem.phase) if p is (Phase.DECODE if problem.objective == "ttft" else Phase.PREFILL)]] = 0.0
    work = finite * problem.times[:, None] * counted[:, None] * rates(problem)[None, :]
    scale = float(work.min(axis=1).sum()) or 1.0
    pairs = [(f.src, d, f) for f in problem.flows for d in f.dst if f.kind != "carry"]
    off = ~np.eye(m, dtype=bool) & (problem.beta > 0)
    alpha, rate = (float(problem.alpha[off].mean()), float((1 / problem.beta[off]).mean())) if off.any() else (0.0, 1.0)
    rate = 2 * float(problem.ports.mean()) if problem.ports is not None else rate
    src, dst = np.array([p[0] for p in pairs], np.int32), np.array([p[1] for p in pairs], np.int32)
    cost = jnp.asarray([(alpha + f.nbytes * rate) * f.times * counted[d] / scale for _, d, f in pairs])
    matrix, size = jnp.asarray(work / scale), np.zeros((n, m))
    for r, resident in enumerate(problem.residents):
        for b in resident.blocks:
            size[b] += problem.resident[r] / len(resident.blocks)
    room = jnp.asarray(np.where(np.isfinite(problem.capacity), size / problem.capacity, 0.0))
    longest = problem.objective == "throughput"

    def loss(logits: jax.Array, key: jax.Array, heat: jax.Array) -> jax.Array:
        x = jax.nn.softmax((logits + jax.random.gumbel(key, logits.shape)) / heat, axis=-1)
        apart = cost * (1.0 - jnp.sum(x[src] * x[dst], axis=-1)) if len(pairs) else jnp.zeros(0)
        load = jnp.sum(x * matrix, axis=0)
        over = jnp.sum(jax.nn.relu(jnp.sum(x * room, axis=0) - 0.98))
        if longest:
            moved = jnp.zeros(m)
            if len(pairs):
                half = apart / 2
                moved = jnp.sum(half[:, None] * (x[src] + x[dst]) / 2, axis=0)
            return jax.nn.logsumexp((load + moved) * 50.0) / 50.0 + 10.0 * over
        return jnp.sum(load) + jnp.sum(apart) + 10.0 * over

    rule = optax.adam(0.1)

    def run(key: jax.Array) -> jax.Array:
        first, key = jax.random.split(key)
        logits = 0.1 * jax.random.normal(first, (n, m))

        def update(state: tuple[jax.Array, optax.OptState, jax.Array], i: jax.Array) -> tuple[tuple[jax.Array, optax.OptState, jax.Array], None]:
            logits, inner, key = state
            key, noise = jax.random.split(key)
            change, inner = rule.update(jax.grad(loss)(logits, noise, 2.0 * 0.05 ** (i / steps)), inner)
            return (optax.apply_updates(logits, change), inner, key), None

        (logits, _, _), _ = jax.lax.scan(update, (logits, rule.init(logits), key), jnp.arange(steps))
        return jax.nn.softmax(logits, axis=-1)

    return np.asarray(jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(seed), _SEEDS)), float)
