"""How far two arrays lie apart: bit for bit, in value, in units in the last place, as directions; NaN and infinity first.

Of a token distribution it is also how far the distributions are, and whether they choose alike. Everything is computed in NumPy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from partition import _jax

TOLERANCE = {"float64": 1e-12, "float32": 1e-5, "float16": 1e-3, "bfloat16": 4e-3, "complex64": 1e-5, "complex128": 1e-12,
             "float8_e4m3fn": 0.13, "float8_e4m3": 0.13, "float8_e5m2": 0.25}  # fmt: skip
"""How far a float may be off, as a share of the scale of its tensor: a few roundings of the narrow types, a hundred of the wide ones; the rms of all may be off by a quarter
of that, as a share of their rms. What is further is held against float64. Integers, truth values and keys must be equal."""
FAR = 1e3
"""Values so many times as large as all that differ say nothing of their scale: what a mask or padding holds."""

OWN, MOST, FEW, SOME = 4.0, 100.0, 8, 0.25
"""A value beyond its tolerance may be OWN times as far from float64 as the uncut program's own (another order of the same sums), where that is itself no further
than MOST tolerances: what is further is no rounding, but another model. FEW: elements that an index must have for its own noise to be known; SOME: the share of its scale that a row of fewer may be off."""
NARROW, SAME = 1e-3, 1e-6
"""From which bound on floats are narrow; and how far, as a share of scale, one function may be from itself in float64, whose constants a program holds in float32."""
EPS = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7, "complex64": 2.0**-23, "complex128": 2.0**-52}
"""One rounding, as a share of a number."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """One tensor of the cut program against the uncut one.

    bitwise: every bit equal. invalid: places where one is NaN or infinite and the other is not the same. max_abs, max_ulp: largest
    distance, in value and in units in the last place. relative: max_abs over the scale, the largest magnitude of the reference that is not FAR beyond all that differs. wrong: elements
    that differ. equal: within the stated bound. rms: of the differences; biased: it is a quarter of the bound and more. cosine: of the two as directions (1 where both are 0).
    other: type and shape of the candidate, where those are not the reference's. steps: how many elements lie 0, 1, 2, up to 4, 16, 256, and more units in the last place apart. first: index of the first element that differs. oracle: rms errors of the
    uncut and of the cut against float64, where that was asked for. rounding: beyond the bound, but no further from float64 than the uncut program's
    own rounding explains (OWN). apart: how far reference and candidate are from each other in float64, as a share of scale, where that was looked at.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    bitwise: bool
    invalid: int
    max_abs: float
    relative: float
    max_ulp: int
    wrong: int
    bound: float
    equal: bool
    rms: float = 0.0
    biased: bool = False
    cosine: float = 1.0
    steps: tuple[int, ...] = ()
    first: tuple[int, ...] | None = None
    other: str = ""
    oracle: tuple[float, float] | None = None
    rounding: bool = False
    apart: float = 0.0

    def __str__(self) -> str:
        if self.bitwise:
            own = f", both with an rms error against float64 of {self.oracle[0]:.3g}" if self.oracle is not None else ""
            return f"{self.name} {self.dtype}{list(self.shape)}: equal bit for bit{own}"
        if self.other:
            return f"{self.name} {self.dtype}{list(self.shape)}: the candidate's is {self.other}"
        many = f"{self.wrong} of {int(np.prod(self.shape))} elements differ"
        if not floating(self.dtype):
            return f"{self.name} {self.dtype}{list(self.shape)}: {many}, max abs {self.max_abs:.3g}, first at {list(self.first or ())}; they must be equal"
        what = f"{many}, max abs {self.max_abs:.3g} ({self.relative:.2g} of scale), max {self.max_ulp} ULP" + (f", rms {self.rms:.3g}, more than roundings make" if self.biased else "")
        bad = f", {self.invalid} NaN or infinite on one side only" if self.invalid else ""
        near = f", rms error against float64 {self.oracle[1]:.3g}, the uncut program's own {self.oracle[0]:.3g}" if self.oracle is not None else ""
        near += f", {self.apart:.2g} of scale apart in float64, which no rounding explains" if self.apart and not self.equal else ""
        word = "beyond, but as near to float64 as the uncut program is" if self.rounding else "within" if self.equal else "BEYOND"
        return f"{self.name} {self.dtype}{list(self.shape)}: {what}{bad}{near}; bound {self.bound:g} of scale: {word}"


def ulps(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Distance of two float arrays in units in the last place, as int64 (or float for float64)."""
    kind = {2: np.int16, 4: np.int32, 8: np.int64}.get(a.dtype.itemsize)
    if kind is None:
        return np.zeros(a.shape, np.int64)

    def ordered(x: np.ndarray) -> np.ndarray:
        bits = np.ascontiguousarray(x).view(kind).astype(object if a.dtype.itemsize == 8 else np.int64)
        low = -(1 << (8 * a.dtype.itemsize - 1))
        return np.where(bits < 0, low - bits, bits)

    distance: np.ndarray = np.abs(ordered(a) - ordered(b))
    return distance


def floating(dtype: str) -> bool:
    """Whether a dtype's name is of floats, or of pairs of them."""
    return "float" in dtype or "complex" in dtype


def parts(array: np.ndarray) -> np.ndarray:
    """Complex numbers as real and imaginary parts under a last dimension; others as they are."""
    return np.stack([array.real, array.imag], axis=-1) if np.iscomplexobj(array) else array


def alike(want: Any, got: Any) -> bool:
    """The same type, shape and bits."""
    a, b = _jax.to_numpy(want), _jax.to_numpy(got)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def compare(name: str, reference: Any, candidate: Any, tolerance: Mapping[str, float] | None = None) -> Difference:
    """Compare two arrays: shapes and dtypes, then NaN and infinity, then values."""
    a, b = _jax.to_numpy(reference), _jax.to_numpy(candidate)
    dtype, shape = str(a.dtype), tuple(a.shape)
    one, other = (str(v.dtype) if hasattr(v, "dtype") and _jax.is_key(v) else str(words.dtype) for v, words in ((reference, a), (candidate, b)))  # a key is no array of its words
    if a.shape != b.shape or one != other:
        return Difference(name=name, other=f"{other}{list(b.shape)}", shape=shape, dtype=one, bitwise=False, invalid=0, max_abs=np.inf,
                          relative=np.inf, max_ulp=0, wrong=max(a.size, 1), bound=0.0, equal=False)  # fmt: skip
    bound = {**TOLERANCE, **(tolerance or {})}.get(dtype, 0.0)
    bitwise = a.tobytes() == b.tobytes()
    a, b = parts(a), parts(b)
    if not floating(dtype):
        wrong = int((a != b).sum())
        gap = float(np.abs(a.astype(np.float64) - b.astype(np.float64)).max()) if wrong and a.dtype != bool else float(bool(wrong))
        return Difference(name=name, shape=shape, dtype=dtype, bitwise=bitwise, invalid=0, max_abs=gap, relative=gap, max_ulp=0,
                          wrong=wrong, bound=0.0, equal=not wrong, first=_first(a != b))  # fmt: skip
    x, y = a.astype(np.float64), b.astype(np.float64)
    finite = np.isfinite(x) & np.isfinite(y)
    same = (np.isnan(x) & np.isnan(y)) | (x == y)
    invalid = int((~finite & ~same).sum())
    gaps = np.where(finite, np.abs(np.where(finite, x, 0) - np.where(finite, y, 0)), 0.0)
    gap = float(gaps.max(initial=0.0))
    size = np.abs(np.where(finite, x, 0.0))
    differing = np.maximum(size, np.abs(np.where(finite, y, 0.0)))[finite & ~same].max(initial=0.0)
    scale = float(size[size <= FAR * differing].max(initial=0.0))
    relative = gap / scale if scale > 0 else (0.0 if gap == 0 else np.inf)
    apart = np.where(finite, ulps(a, b), 0).astype(np.float64) if gap > 0 else np.zeros(a.shape)
    biased = tolerance is None and _rms(gaps) > bound / 4 * _rms(size)
    length = float(np.sqrt((np.where(finite, x, 0) ** 2).sum() * (np.where(finite, y, 0) ** 2).sum()))
    return Difference(
        name=name, shape=shape, dtype=dtype, bitwise=bitwise, invalid=invalid, max_abs=gap, relative=relative, max_ulp=int(apart.max(initial=0)), wrong=int((~same).sum()), bound=bound,
        equal=invalid == 0 and relative <= bound and not biased, rms=_rms(gaps), biased=biased, cosine=float((np.where(finite, x, 0) * np.where(finite, y, 0)).sum()) / length if length > 0 else 1.0,
        steps=tuple(int(n) for n in np.histogram(apart, [-0.5, 0.5, 1.5, 2.5, 4.5, 16.5, 256.5, np.inf])[0]), first=_first(~same),
    )  # fmt: skip


def _first(differs: np.ndarray) -> tuple[int, ...] | None:
    return tuple(int(i) for i in np.argwhere(differs)[0]) if differs.any() else None


def _errors(oracle: Any, reference: Any, candidate: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """(the oracle, errors of the reference, errors of the candidate) as float64; None where their shapes differ. What is not finite counts as no error."""
    truth, a, b = (parts(_jax.to_numpy(v)).astype(np.float64) for v in (oracle, reference, candidate))
    if not truth.shape == a.shape == b.shape:
        return None
    finite = np.isfinite(truth) & np.isfinite(a) & np.isfinite(b)
    return truth, *(np.abs(np.where(finite, x, 0.0) - np.where(finite, truth, 0.0)) for x in (a, b))


def _rms(errors: np.ndarray) -> float:
    return float(np.sqrt((errors**2).mean())) if errors.size else 0.0


def against(difference: Difference, oracle: Any, reference: Any, candidate: Any) -> Difference:
    """A difference with the rms errors of both against an oracle, where floats are compared."""
    found = _errors(oracle, reference, candidate) if floating(difference.dtype) else None
    return difference if found is None else dataclasses.replace(difference, oracle=(_rms(found[1]), _rms(found[2])))


def judged(difference: Difference, oracle: Any, reference: Any, candidate: Any, rough: float = 0.0, size: float = 0.0) -> Difference:
    """A difference beyond its bound, held against float64: it is equal all the same where the candidate errs at most OWN times as much as the reference, by rms, at most, and
    along each index of each dimension, as where large terms cancel and little but rounding is left; and where the reference itself is at most MOST bounds off. rough: the bound of the narrowest floats that the program computes in, where that is wider than the one of what it gives: float32
    logits of a model in bfloat16 are no better than bfloat16. size: the largest number that went in or came out: where the truth is nothing beside a rounding of that, as the
    gradient of what cannot matter, the reference holds noise alone, and the candidate may hold as much."""
    found = None if difference.equal or difference.invalid or difference.other or not floating(difference.dtype) else _errors(oracle, reference, candidate)
    if found is None:
        return difference
    truth, own, other = found
    noise = np.full(own.shape, own.max(initial=0.0))
    for d in range(own.ndim):
        rest = tuple(i for i in range(own.ndim) if i != d)
        if own.size >= FEW * own.shape[d]:  # enough of them to know how noisy an index is
            each = own.max(axis=rest, keepdims=True)  # an index that is right by luck is no quieter than half of them
            noise = np.minimum(noise, np.maximum(each, np.median(each)))
    held = np.abs(truth[np.isfinite(truth)])
    scale = float(held[held <= FAR * np.median(held)].max(initial=0.0)) if held.size else 0.0
    most, least = float(own.max(initial=0.0)), max(EPS.get(difference.dtype, 0.0), rough / 4 if rough > difference.bound else 0.0) * size
    if scale <= OWN * most and scale < least:  # not a digit of the reference is right, nor could it be
        rounding = float(other.max(initial=0.0)) <= OWN * max(most, least)
    else:
        beyond = other > np.maximum(OWN * noise, (difference.bound / 4 if own.size >= FEW else max(difference.bound, rough)) * scale)  # of a few numbers, the reference may be right by luck
        lucky = own.size < FEW and _rms(other) <= rough * scale
        rounding = not beyond.any() and (lucky or _rms(other) <= OWN * _rms(own)) and most <= MOST * max(difference.bound, rough) * max(scale, float(held.max(initial=0.0)) / FAR)
    return dataclasses.replace(difference, oracle=(_rms(own), _rms(other)), equal=rounding, rounding=rounding)


def near(reference: Any, candidate: Any, oracle: Any = None, operands: Sequence[Any] = ()) -> bool:
    """Whether two arrays are one but for roundings, in every index of every dimension and every row along the last: bounds are shares of the scale of each, so that no loud row hides a quiet one. oracle: the same in
    float64; with it, it is enough that the candidate errs OWN times as much as the reference does there, or would at its scale, or by OWN roundings of an operand's element in its place, as where a product
    is not rounded before a sum takes it."""
    d = compare("it", reference, candidate)
    if d.bitwise or not floating(d.dtype) or d.invalid or d.other:
        return d.equal
    a, b = (parts(_jax.to_numpy(x)).astype(np.float64) for x in (reference, candidate))
    finite = np.isfinite(a) & np.isfinite(b)
    a, b = np.where(finite, a, 0.0), np.where(finite, b, 0.0)
    truth = a if oracle is None else np.where(finite, parts(_jax.to_numpy(oracle)).astype(np.float64), 0.0)
    own, other, room, floor = np.abs(a - truth), np.abs(b - truth), np.full(a.shape, np.inf), np.zeros(a.shape)
    for x in operands:
        if floating(str((held := _jax.to_numpy(x)).dtype)) and held.shape == np.shape(reference):
            floor = np.maximum(floor, OWN * EPS.get(d.dtype, 0.0) * np.nan_to_num(np.abs(parts(held).astype(np.float64))))
    rows = tuple(range(a.ndim - 1))
    for axes in {(), *((i,) for i in range(a.ndim) if a.size >= FEW * a.shape[i]), rows}:
        rest = tuple(i for i in range(a.ndim) if i not in axes)
        scale, noise = (np.abs(x).max(axis=rest, keepdims=True, initial=0.0) for x in (truth, own))
        usual = np.median(noise[scale > 0] / scale[scale > 0]) if (scale > 0).any() else 0.0
        bound = d.bound if not axes or axes != rows or a.shape[-1] >= FEW else max(d.bound, min(MOST * d.bound, SOME))  # of a few numbers, all may be small by chance
        room = np.minimum(room, np.maximum(bound * scale, OWN * np.maximum(noise, usual * scale)))
    return bool((other <= np.maximum(room, floor)).all())


def held_wide(difference: Difference, reference: Any, candidate: Any, rough: float) -> Difference:
    """A difference that the rounding of narrow floats excuses, with both sides in float64: there one function agrees with itself in whatever order it computes, up to the constants
    that it rounds. rough: the bound of the narrowest floats; a quarter of it is no constant's rounding."""
    if not difference.rounding:
        return difference
    far = compare("it", reference, candidate).relative
    return dataclasses.replace(difference, apart=far, equal=far <= rough / 4, rounding=far <= rough / 4)


def apart(differences: Sequence[Difference]) -> tuple[str, ...]:
    """What float64 tells of what is equal within the rounding of narrow floats: nothing, or that the two are not quite one function."""
    most = max((d.apart for d in differences if d.equal), default=0.0)
    return (f"in float64 the two are {most:.2g} of scale apart: a constant that is rounded otherwise, or a fault too small for narrow floats",) if most > SAME else ()


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Choices:
    """Two distributions of tokens, of one place in the program. rows: how many. kl: the mean and the largest Kullback-Leibler divergence [nats]; top1, top5: shares of
    rows of which the likeliest, and the five likeliest as sets, are the same."""

    name: str
    rows: int
    kl: tuple[float, float]
    top1: float
    top5: float

    def __str__(self) -> str:
        return f"{self.name}: KL {self.kl[0]:.2g} nats (at most {self.kl[1]:.2g}), the likeliest token agrees in {100 * self.top1:.1f} % of {self.rows} rows, the five likeliest in {100 * self.top5:.1f} %"


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Logarithms of the probabilities of logits [..., vocabulary]."""
    top = logits - logits.max(axis=-1, keepdims=True)
    shifted: np.ndarray = top - np.log(np.exp(top).sum(axis=-1, keepdims=True))
    return shifted


def choices(name: str, reference: Any, candidate: Any) -> Choices:
    """Compare logits [..., vocabulary] as distributions."""
    a, b = (np.asarray(_jax.to_numpy(x), np.float64) for x in (reference, candidate))
    a, b = a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])

    p, q = log_softmax(a), log_softmax(b)
    with np.errstate(invalid="ignore"):
        kl = np.where(np.exp(p) > 0, np.exp(p) * (p - q), 0.0).sum(axis=-1)
    order = [np.argsort(-x, axis=-1, kind="stable")[:, :5] for x in (a, b)]
    same = [set(x) == set(y) for x, y in zip(*(o.tolist() for o in order), strict=True)]
    return Choices(name=name, rows=len(a), kl=(float(kl.mean()), float(kl.max())), top1=float((order[0][:, 0] == order[1][:, 0]).mean()), top5=float(np.mean(same)))
