"""What a plan gives over the bands of its numbers, and which of them it rests on."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from conftest import posed
from jax import lax

import partition as pt
from models import llama
from partition import profiles
from partition.errors import PlacementError
from partition.problem import Problem, on
from partition.swings import sensitivity, sensitivity_text


def made(cluster: object = "trn2_efa_cs3", **options: object) -> pt.Plan:
    fn, args = llama.generation("tiny", prompt=12, new_tokens=6)
    return pt.plan(fn, args, cluster=cluster, **options)  # type: ignore[arg-type]


def test_the_band_holds_the_estimate_and_its_ends_are_other_clusters() -> None:
    plan = made()
    assert plan.band is not None
    better, worse = plan.band
    for field in ("ttft", "tpot", "e2e", "usd_per_mtok"):
        assert getattr(better, field) <= getattr(plan.estimate, field) <= getattr(worse, field)
    assert better.e2e < worse.e2e and "at the better or the worse end of their bands" in str(plan)
    again = pt.evaluate(pt.pose(plan.problem.phases, profiles.cluster("trn2_efa_cs3").at(worse=True)), plan.placement)  # type: ignore[arg-type]
    assert again.e2e <= worse.e2e * 1.001  # the band keeps how meshes are split; posed anew, they may be split better for the worse numbers


def test_a_problem_on_another_cluster_is_what_posing_there_gives() -> None:
    problem, _ = posed("trn2_efa_cs3")
    cluster = profiles.cluster("trn2_efa_cs3").replace({"cs3.price": "10 $/h", "efa_v3.beta": "50 GB/s", "trn2.compute_efficiency": 0.2})
    other, wanted = on(problem, cluster), pt.pose(problem.phases, cluster, sharding="tensor")  # type: ignore[arg-type]
    for field in dataclasses.fields(Problem):
        if isinstance(value := getattr(wanted, field.name), np.ndarray):
            np.testing.assert_allclose(getattr(other, field.name), value, err_msg=field.name)
    with pytest.raises(PlacementError, match="other meshes"):
        on(problem, profiles.cluster("trn2_efa_4cs3"))


def test_a_plan_of_a_loop_that_does_not_tell_its_trips_has_a_band() -> None:
    """The caller's word on trips is kept, also where there is no token loop whose trips it could be taken for."""

    def fn(w: Any, x: Any) -> Any:
        return lax.while_loop(lambda x: x.sum() < 100.0, lambda x: x @ w, x)

    plan = pt.plan(fn, (np.ones((8, 8), np.float32), np.ones((2, 8), np.float32)), cluster="trn2_efa_cs3", policy="single", trips=5)
    assert plan.problem.workload.trips == 0 and plan.band is not None and str(plan)
    again = on(plan.problem, profiles.cluster("trn2_efa_cs3"))
    np.testing.assert_array_equal(again.seconds, plan.problem.seconds)


def test_the_numbers_that_a_plan_rests_on() -> None:
    def by_price(problem: Problem) -> pt.Placement:
        """All on the cheaper kind of machine."""
        return problem.placement([int(np.argmin(problem.price))] * len(problem))

    cluster = profiles.cluster("trn2_efa_cs3")
    plan = made(cluster, policy=by_price, objective="usd_per_mtok")
    swings = sensitivity(plan, by_price)
    by_name = {s.name: s for s in swings}
    assert [s.decides for s in swings] == sorted((s.decides for s in swings), reverse=True)
    assert by_name["cs3.price"].decides  # 16 chips cost less than one wafer, but for the low end of its band
    assert not by_name["efa_v3.beta"].decides and by_name["efa_v3.beta"].width == 0
    text = sensitivity_text(plan, swings)
    assert "The placement changes within the band of cs3.price (assumed)" in text
    steady = sensitivity(made(policy="single"), "single")
    assert all(len(s.kept) == 2 and s.moved[0] is not None for s in steady)


def test_a_loaded_plan_keeps_what_its_band_gave(tmp_path: object) -> None:
    plan = made()
    loaded = pt.Plan.load(plan.save(tmp_path))  # type: ignore[arg-type]
    assert loaded.band is None and loaded.ends == plan.ends and str(loaded) == str(plan)
    with pytest.raises(PlacementError, match="loaded plan"):
        sensitivity(loaded)
