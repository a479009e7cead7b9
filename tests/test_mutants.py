"""Every planted fault is found, and what diverges first is named: equations anywhere in stages, transfers, caches."""

from __future__ import annotations

import functools
import random
from typing import Any

import pytest
from mutants import CHANGES, RUNS, changed, places, stale, with_stage

import partition as pt
from models import llama
from partition import _jax, divergence, execution
from partition.errors import EquivalenceError

FORMS = {
    "decode on one mesh": ("phase_split", {}), "decode cut by layers": ("cs3 by layers", {}), "layers in a scan": ("phase_split", {"layers": "scanned"}),
    "cut anywhere": ("random", {"loop": "while"}),
}  # fmt: skip


@functools.cache
def made(form: str) -> tuple[Any, Any]:
    """(stages, arguments) of the tiny model that writes tokens only, so that a fault may leave its output as it is."""
    how, options = FORMS[form]
    fn, args = llama.generation("tiny", batch=2, prompt=8, new_tokens=5, seed=0, **options)
    program = pt.trace(fn, *args)
    problem = pt.pose(pt.tag(program), pt.cluster("trn2_efa_4cs3"), sharding="tensor")
    if how == "cs3 by layers":
        layer = [next((int(part[7:]) for part in name.split("/") if part.startswith("layers.")), 1) for name in problem.names]
        return pt.cut(program, problem.placement([0 if str(p) == "prefill" else 1 + x for p, x in zip(problem.phase, layer, strict=True)])), args
    return pt.cut(program, pt.place(problem, how)), args


def mutants() -> list[tuple[str, str, int]]:
    """(form, change, seed) of every mutant of an equation: four of each change in each form where it applies."""
    return [(form, change, seed) for form in FORMS for change in CHANGES for seed in range(2)]


@functools.cache
def runner(form: str) -> Any:
    return execution.prepare(made(form)[0])


@pytest.mark.parametrize(("form", "change", "seed"), mutants())
def test_a_changed_equation_is_found_and_named(form: str, change: str, seed: int) -> None:
    stages, _ = made(form)
    ways = [(s, way) for s in stages.all for way in places(s.jaxpr, CHANGES[change])]
    if not ways:
        pytest.skip(f"no equation of this form that {change} applies to")
    stage, way = random.Random(seed).choice(ways)
    jaxpr, victim = changed(stage.jaxpr, CHANGES[change], way)
    broken = with_stage(stages, stage.id, jaxpr)
    where = divergence.misread(broken)
    assert where is not None
    outer = stage.items[way[0]][0]
    assert f"stage {stage.id} on" in where and f"op {outer.id} ({outer.primitive})" in where, where
    if len(way) > 1:
        assert f"inside it {victim.primitive.name} at {_jax.source(victim, (_jax.body_of(stage.jaxpr).eqns[way[0]], None))}" in where, where


@pytest.mark.parametrize(("change", "seed"), [("a cast", 3), ("an offset", 1), ("sin for cos", 0), ("a scale", 2)])
def test_a_check_of_a_mutant_fails_though_its_tokens_may_not(change: str, seed: int) -> None:
    stages, args = made("decode on one mesh")
    ways = [(s, way) for s in stages.all for way in places(s.jaxpr, CHANGES[change]) if len(way) > 1]
    stage, way = random.Random(seed).choice(ways)
    with pytest.raises(EquivalenceError, match="inside it"):
        pt.check(with_stage(stages, stage.id, changed(stage.jaxpr, CHANGES[change], way)[0]), *args)


@pytest.mark.parametrize("form", ["decode cut by layers", pytest.param("cut anywhere", marks=pytest.mark.slow)])
@pytest.mark.parametrize("fault", sorted(RUNS))
def test_a_fault_of_the_run_is_found(form: str, fault: str) -> None:
    stages, args = made(form)
    with RUNS[fault](), pytest.raises(EquivalenceError) as error:
        pt.check(stages, *args, runner=runner(form))
    assert "arrives wrong" in error.value.where


@pytest.mark.parametrize("form", ["decode cut by layers", pytest.param("cut anywhere", marks=pytest.mark.slow)])
def test_a_stale_cache_is_found(form: str) -> None:
    stages, args = made(form)
    with stale(), pytest.raises(EquivalenceError) as error:
        pt.check(stages, *args, runner=runner(form))
    assert "trip 2" in error.value.where and "arrives wrong" in error.value.where


def test_nothing_is_found_where_nothing_is() -> None:
    for form in FORMS:
        stages, args = made(form)
        assert divergence.misread(stages) is None and pt.check(stages, *args, runner=runner(form)).equal
