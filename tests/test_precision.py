"""Formats bit for bit against ml_dtypes and by hand, contractions against NumPy, and what they do to a model by phase."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import partition as pt
from models import llama
from partition import numerics, profiles
from partition.errors import ExecutionError, NameUnknownError
from partition.execution import Target, prepare
from partition.hardware import Kind, Precision
from partition.precision import rounded, scaled, targeted, wire_bytes

NARROW = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float8_e4m3": ml_dtypes.float8_e4m3, "float8_e4m3fn": ml_dtypes.float8_e4m3fn, "float8_e5m2": ml_dtypes.float8_e5m2}


def made(**said: str) -> Precision:
    return Precision(kind=Kind.ASSUMED, source="a test", **said)


@pytest.mark.parametrize("form", sorted(NARROW))
def test_formats_are_those_of_ml_dtypes(form: str) -> None:
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.standard_normal(20_000) * 10.0 ** rng.integers(-12, 12, 20_000), [0, -0.0, np.inf, -np.inf, np.nan, 240, 241, 248, 448, 464, 465, 65504, 65520]]).astype(np.float32)
    with np.errstate(all="ignore"):
        want = x.astype(NARROW[form]).astype(np.float32)
    got = np.asarray(rounded(x, form))
    assert np.array_equal(want, got, equal_nan=True) and np.array_equal(np.signbit(want[~np.isnan(want)]), np.signbit(got[~np.isnan(want)]))


def test_cbfloat16_by_hand() -> None:
    # 1 sign, 6 exponent (bias 31), 9 mantissa: steps of 2^-9 at 1; ties go to even; from 2^-30 down, steps of 2^-39; 2^32 is beyond
    pairs = [(1 + 2**-9, 1 + 2**-9), (1 + 2**-10, 1.0), (1 + 3 * 2**-10, 1 + 2**-8), (2.0**-39, 2.0**-39), (2.0**-40, 0.0), (1.5 * 2.0**-39, 2.0**-38), (-(2.0**-30), -(2.0**-30)),
             ((2 - 2**-9) * 2.0**31, (2 - 2**-9) * 2.0**31), ((2 - 2**-10) * 2.0**31, np.inf), (-(2.0**32), -np.inf), (np.inf, np.inf), (0.0, 0.0)]  # fmt: skip
    x, want = (np.array(column, np.float32) for column in zip(*pairs, strict=True))
    assert np.asarray(rounded(x, "cbfloat16")).tolist() == want.tolist() and np.isnan(rounded(np.float32(np.nan), "cbfloat16"))
    patterns = np.array([(1 + m / 512) * 2.0**e for e in range(-30, 32) for m in range(0, 512, 37)], np.float32)
    assert np.array_equal(np.asarray(rounded(patterns, "cbfloat16")), patterns)  # what the format holds stays


def test_eight_bits_with_a_scale_reach_the_formats_largest() -> None:
    x = np.array([[1000.0, -3.0], [0.5, 0.0]], np.float32)
    for form, most in (("float8_e4m3", 240.0), ("float8_e4m3fn", 448.0)):
        got = np.asarray(scaled(x, form))
        assert np.isclose(got[0, 0], 1000.0) and np.allclose(got, (x * most / 1000).astype(NARROW[form]).astype(np.float32) * 1000 / most)
    assert np.array_equal(np.asarray(scaled(np.zeros((2, 2)), "float8_e4m3")), np.zeros((2, 2)))
    assert wire_bytes(jnp.zeros((3, 5), jnp.float32), "float8_e4m3") == 19 and wire_bytes(jnp.zeros((3, 5), jnp.float32), "bfloat16") == 30 and wire_bytes(jnp.zeros(3, jnp.int32), "bfloat16") == 12
    with pytest.raises(NameUnknownError):
        rounded(x, "float7")


def test_contractions_multiply_and_sum_as_told() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((3, 70)).astype(np.float32), rng.standard_normal((70, 2)).astype(np.float32)
    jaxpr = jax.make_jaxpr(lambda a, b: a @ b)(a, b)
    half_a, half_b = a.astype(np.float16).astype(np.float32), b.astype(np.float16).astype(np.float32)
    got = targeted(jaxpr, made(multiply="float16", result="float16"))(a, b)[0]
    assert np.allclose(np.asarray(got), half_a @ half_b, rtol=1e-5, atol=1e-6) and not np.allclose(np.asarray(got), a @ b, rtol=1e-5, atol=1e-6) and got.dtype == jnp.float32  # the program keeps it in float32, so does the device
    total = np.zeros((3, 2), np.float16)
    for start in range(0, 70, 32):  # sums of 32 products, each added in float16
        total = (total + (half_a[:, start : start + 32] @ half_b[start : start + 32]).astype(np.float16)).astype(np.float16)
    narrow = targeted(jaxpr, made(multiply="float16", accumulate="float16", result="float16"))(a, b)[0]
    assert np.array_equal(np.asarray(narrow), total.astype(np.float32)) and not np.array_equal(np.asarray(narrow), np.asarray(got))


def test_bfloat16_with_sums_in_float32_and_one_cast() -> None:
    rng = np.random.default_rng(2)
    a, b = rng.standard_normal((4, 64)).astype(ml_dtypes.bfloat16), rng.standard_normal((64, 3)).astype(ml_dtypes.bfloat16)
    got = targeted(jax.make_jaxpr(lambda a, b: a @ b)(a, b), made())(a, b)[0]
    assert got.dtype == jnp.bfloat16 and np.array_equal(np.asarray(got), (a.astype(np.float32) @ b.astype(np.float32)).astype(ml_dtypes.bfloat16))


def test_results_of_16_bits_are_kept_in_the_devices_format_and_float32_stays() -> None:
    x = np.array([300.0, 1.0], np.float32).astype(ml_dtypes.bfloat16)  # 300^2 = 90,000, beyond float16's 65,504
    narrow = jax.make_jaxpr(lambda x: x * x - jnp.bfloat16(1.0))(x)
    assert np.isinf(np.asarray(targeted(narrow, made(result="float16"))(x)[0], np.float32))[0] and np.isfinite(np.asarray(targeted(narrow, made())(x)[0], np.float32)).all()
    wide = jax.make_jaxpr(lambda x: jnp.sqrt(jnp.square(x.astype(jnp.float32)).mean()))(x)
    assert np.isclose(targeted(wide, made(result="float16"))(x)[0], np.sqrt(45000.5))
    fine = np.array([1 / 3], np.float32)  # 1/3 with 11 bits of float16, not with the 8 of bfloat16
    jaxpr = jax.make_jaxpr(lambda x: (x.astype(jnp.bfloat16)).astype(jnp.float32))(fine)
    assert np.asarray(targeted(jaxpr, made(result="float16"))(fine)[0]) == fine.astype(np.float16).astype(np.float32)


def staged() -> tuple[Any, Any]:
    fn, args = llama.generation("tiny", batch=2, prompt=12, new_tokens=6, seed=0, logits=True)
    program = pt.trace(fn, *args)
    problem = pt.pose(pt.tag(program), pt.cluster("trn2_efa_4cs3"), sharding="tensor")
    return pt.cut(program, problem.placement([0 if str(p) == "prefill" else 1 for p in problem.phase])), args


def test_effects_by_phase() -> None:
    stages, args = staged()
    found = {e.name: e for e in numerics.effects(stages, *args, wires=("bfloat16", "float8_e4m3"))}
    assert next(iter(found)) == "as the program says" and found["as the program says"].rms == 0.0
    trn, cs3 = found["prefill as trn2 computes"], found["decode as cs3 computes"]
    assert trn.rms == 0.0 and 0 < cs3.rms < 0.01 and cs3.logits is not None and 0 < cs3.logits.kl[0] < 1e-3
    bf16, fp8 = found["what crosses in bfloat16"], found["what crosses in float8_e4m3"]
    assert 0 < bf16.rms < fp8.rms and fp8.crossed < bf16.crossed < trn.crossed
    assert "tokens" in numerics.effects_text(list(found.values())) and "of their size" in numerics.summary(list(found.values()))


def test_what_cannot_be_asked() -> None:
    stages, args = staged()
    with pytest.raises(NameUnknownError):
        numerics.effects(stages, *args, wires=("float7",))
    assert stages.problem.cluster is not None
    meshes = tuple(dataclasses.replace(m, device=dataclasses.replace(m.device, precision=None)) for m in stages.problem.cluster.meshes)
    unsaid = dataclasses.replace(stages, problem=dataclasses.replace(stages.problem, cluster=dataclasses.replace(stages.problem.cluster, meshes=meshes)))
    with pytest.raises(ExecutionError, match="in which arithmetic"):
        numerics.effects(unsaid, *args)


def test_profiles_say_their_arithmetic() -> None:
    assert {n: p.float8 for n in ("trn1", "trn2", "trn3") if (p := profiles.device(n).precision) is not None} == {"trn1": "float8_e4m3", "trn2": "float8_e4m3", "trn3": "float8_e4m3fn"}
    cs3 = profiles.device("cs3").precision
    assert cs3 is not None and (cs3.multiply, cs3.accumulate, cs3.result) == ("float16", "float32", "float16") and cs3.source


@pytest.mark.parametrize(("name", "holds"), [("trn1", False), ("trn2", False), ("trn3", True)])
def test_eight_bits_reach_as_far_as_the_device_has_them(name: str, holds: bool) -> None:
    """E4M3 ends at 240 on Trainium 1 and 2 and at 448 on 3: 300 rounds to 288 where there are such numbers."""
    said = profiles.device(name).precision
    assert said is not None
    x = np.array([1.0, 240.0, 300.0], np.float32)
    made = targeted(jax.make_jaxpr(lambda x: x.astype(jnp.float8_e4m3fn).astype(jnp.float32))(x), said)(x)[0]
    assert np.array_equal(made, [1, 240, 288] if holds else [1, 240, np.inf])


def test_a_target_leaves_other_stages_alone() -> None:
    stages, args = staged()
    plain, same = prepare(stages, alone=True)(*args), prepare(stages, alone=True, target=Target(stages={}))(*args)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree_util.tree_leaves(plain), jax.tree_util.tree_leaves(same), strict=True))
