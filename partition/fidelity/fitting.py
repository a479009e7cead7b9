"""fit(): the free numbers of profiles, fitted anew to the points that state them, and the errors on models that were left out.

Few numbers, each with a meaning and shared by all models of a family, never one a model. Predictions are linearised in the logarithms of
numbers and times, optax minimises the robust error of that, and this is repeated from where it ends.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from partition.arguments import checked
from partition.errors import ProfileError
from partition.fidelity.measurements import measurements, published
from partition.fidelity.subjects import Seconds, subject
from partition.hardware import Cluster
from partition.overrides import quantities
from partition.tables import table


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """What a family of points says its free numbers are. before, after: mean absolute error as shares, with the profiles' numbers and with these.

    held_out: the same on each model with the numbers that the others give, by model; None where a family has one model alone.
    """

    family: str
    points: int
    values: Mapping[str, tuple[float, float]]
    before: float
    after: float
    held_out: Mapping[str, float] | None

    @property
    def mean_held_out(self) -> float | None:
        """Mean over the models that were left out."""
        return float(np.mean(list(self.held_out.values()))) if self.held_out else None


_TURNS = 10
"""How often predictions are linearised anew, at most."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Case:
    model: str
    cluster: Cluster
    seconds: Seconds
    measured: float
    names: Mapping[int, str]  # free number -> its name in this point's cluster


@checked
def fit(folder: str | Path | None = None, progress: Callable[[str], None] | None = None) -> tuple[Fit, ...]:
    """Fit every family of points that states free numbers. Raises ProfileError for a free number that the subject does not have."""
    families: dict[str, tuple[dict[str, int], list[_Case], list[float]]] = {}
    for path, m in measurements(folder):
        if not m.family:
            continue
        numbers, cases, start = families.setdefault(m.family, ({}, [], []))
        for point in m.points:
            given = dict(zip(m.columns, point, strict=True))
            cluster, seconds = subject(m, given, path)
            held = {name: q for name, _, q in quantities(cluster)}
            names = {}
            for free in m.free:
                own, _, field = free.rpartition(" ")
                name = field.replace("device.", f"{m.subject}.").replace("fabric.", f"{m.fabric or m.subject}.")
                if name not in held or float(held[name]) <= 0:
                    raise ProfileError(f"{name} is no number above 0 that could be fitted", where=f"{path}: free", mend="name device.<field> or fabric.<field>, with 'own ' before it for one of this subject alone")
                shared = f"{m.subject} {field}" if own else field
                if shared not in numbers:
                    numbers[shared] = len(numbers)
                    start.append(float(held[name]))
                names[numbers[shared]] = name
            cases.append(_Case(model=str(given.get("model", "")), cluster=cluster, seconds=seconds, measured=published(m, given, path), names=names))
    return tuple(_fitted(family, *found, progress or (lambda _: None)) for family, found in sorted(families.items()))


def _fitted(family: str, numbers: Mapping[str, int], cases: Sequence[_Case], start: Sequence[float], say: Callable[[str], None]) -> Fit:
    first = np.log(np.array(start))
    everyone, found = np.arange(len(cases)), first
    for turn in range(_TURNS):
        say(f"fit {family}: turn {turn + 1}")
        move = _step(cases, everyone, found)
        found = found + move
        if np.abs(move).max() < 0.02:
            break
    models, held_out = sorted({c.model for c in cases}), {}
    for model in models if len(models) > 1 else ():
        say(f"fit {family} without {model}")
        others = np.array([i for i, c in enumerate(cases) if c.model != model])
        left = np.array([i for i, c in enumerate(cases) if c.model == model])
        moved = found + _step(cases, others, found)
        moved = moved + _step(cases, others, moved)
        held_out[model] = float(np.mean(np.abs(np.expm1(_errors(cases, left, moved)))))
    return Fit(
        family=family, points=len(cases), values={name: (float(np.exp(first[i])), float(np.exp(found[i]))) for name, i in numbers.items()},
        before=float(np.mean(np.abs(np.expm1(_errors(cases, everyone, first))))), after=float(np.mean(np.abs(np.expm1(_errors(cases, everyone, found))))),
        held_out=held_out or None,
    )  # fmt: skip


def _errors(cases: Sequence[_Case], chosen: np.ndarray, at: np.ndarray) -> np.ndarray:
    """log(predicted / measured) of some points, with the free numbers given by their logarithms; shares stay at most 1."""
    out = []
    for i in chosen:
        case = cases[i]
        shares = {name for name, dimension, _ in quantities(case.cluster) if dimension == "fraction"}
        values = {name: float(np.exp(at[n])) for n, name in case.names.items()}
        out.append(np.log(case.seconds(case.cluster.replace({n: min(v, 1.0) if n in shares else v for n, v in values.items()})) / case.measured))
    return np.array(out)


def _step(cases: Sequence[_Case], chosen: np.ndarray, at: np.ndarray, width: float = 0.02) -> np.ndarray:
    """How far to move all logarithms: the least robust error of the linearised predictions, by optax."""
    import jax
    import jax.numpy as jnp
    import optax

    base = _errors(cases, chosen, at)
    slopes = np.stack([(_errors(cases, chosen, at + width * unit) - base) / width for unit in np.eye(len(at))], axis=1)

    def loss(d: jax.Array) -> jax.Array:
        return jnp.mean(optax.huber_loss(jnp.asarray(base) + jnp.asarray(slopes) @ d, delta=0.1)) + 1e-4 * jnp.sum(d * d)

    rule = optax.adam(optax.cosine_decay_schedule(0.05, 400))

    @jax.jit
    def update(state: tuple[jax.Array, optax.OptState], _: None) -> tuple[tuple[jax.Array, optax.OptState], None]:
        d, inner = state
        change, inner = rule.update(jax.grad(loss)(d), inner)
        return (jnp.clip(optax.apply_updates(d, change), -0.7, 0.7), inner), None  # a step goes at most to half or twice a number

    zero = jnp.zeros(len(at))
    (moved, _), _ = jax.lax.scan(update, (zero, rule.init(zero)), None, length=400)
    return np.asarray(moved, float)


def fits_text(fits: Sequence[Fit]) -> str:
    """The fits as tables: numbers before and after, errors before, after, and on the models left out."""
    lines = [(f.family, name, f"{before:.4g}", f"{after:.4g}") for f in fits for name, (before, after) in f.values.items()]
    errors = [(f.family, str(f.points), f"{100 * f.before:.1f} %", f"{100 * f.after:.1f} %", "-" if f.mean_held_out is None else f"{100 * f.mean_held_out:.1f} %",
               "one model alone" if f.held_out is None else ", ".join(f"{m} {100 * e:.0f} %" for m, e in f.held_out.items())) for f in fits]  # fmt: skip
    return "\n".join([table("Free numbers (SI units)", ("family", "number", "profile", "fitted"), lines),
                      table("Mean error", ("family", "points", "profile", "fitted", "held out", "by model left out"), errors)])  # fmt: skip
