"""Break-even values: at them, both sides cost or take the same."""

import dataclasses

import numpy as np
import pytest
from conftest import posed

from partition.errors import InfeasibleError
from partition.evaluation import evaluate
from partition.explanation import explain
from partition.fleet import fleet
from partition.policies.single import single
from partition.problem import pose
from partition.profiles import cluster


def test_the_answer_flips_where_it_says() -> None:
    problem, _ = posed("trn2_efa_4cs3", name="llama-3.1-70b", prompt=2048, new_tokens=256, seed=None)
    answer = explain(problem, load=2.0)
    assert answer.window is not None and answer.ingest is not None and answer.flip_beta is not None and answer.split.placement is not None
    singles = [a.placement for a in answer.alternatives if a.placement is not None and a.name.startswith("all on")]

    def cheapest_at(price: float) -> bool:
        prices = np.array([price / 3600 if k == answer.decode_kind else p for k, p in zip(problem.kinds, problem.price, strict=True)])
        priced = dataclasses.replace(problem, price=prices)
        split = fleet(priced, answer.split.placement, 2.0).usd_per_mtok  # type: ignore[arg-type]
        return all(split < fleet(priced, s, 2.0).usd_per_mtok for s in singles)

    low, high = answer.window
    assert cheapest_at((low * high) ** 0.5)
    assert not cheapest_at(low * 0.99) and not cheapest_at(high * 1.01) and cheapest_at(low * 1.01) and cheapest_at(high * 0.99)

    across = np.array(problem.kinds)[:, None] != np.array(problem.kinds)[None, :]
    fastest = min(evaluate(problem, s).e2e for s in singles)
    for factor, wins in ((1.01, True), (0.99, False)):
        slower = dataclasses.replace(problem, beta=np.where(across & (problem.beta > 0), answer.flip_beta * factor, problem.beta))
        assert (evaluate(slower, answer.split.placement).e2e < fastest) is wins
        slower = dataclasses.replace(problem, beta=np.where(across & (problem.beta > 0), answer.ingest * factor, problem.beta))
        assert (fleet(slower, answer.split.placement, 2.0).usd_per_mtok < answer.best.fleet.usd_per_mtok) is wins  # type: ignore[union-attr]
    assert all(word in answer.sentence for word in ("At 2 requests/s", "TTFT", "cs3-hour", "of ingest", "busy at most", "saturated", "idle"))


def test_gpus_are_alternatives_too_and_load_decides() -> None:
    problem, _ = posed("trn2_efa_4cs3", name="llama-3.1-70b", prompt=2048, new_tokens=64, seed=None)
    assert problem.phases is not None
    gpus = [pose(problem.phases, cluster(name), objective="usd_per_mtok") for name in ("h100_only", "h100_disagg")]
    found = {load: explain(problem, load=load, others=gpus) for load in (0.01, 3.0)}
    names = [a.name for a in found[3.0].alternatives]
    assert names == ["all on cs3", "all on trn2", "split", "best found", "all on h100", "split over h100_disagg"]
    quiet, busy = ({a.name: a.fleet for a in found[load].alternatives} for load in (0.01, 3.0))
    assert all(quiet[name].usd_per_mtok > busy[name].usd_per_mtok for name in names)  # type: ignore[union-attr]
    assert all(f is not None and max(f.busy) <= 0.8 for f in busy.values())
    assert all(a.binds.startswith("prefill compute") for a in found[3.0].alternatives)
    assert found[0.01].best.name == min((n for n in names if n not in ("split", "best found")), key=lambda n: quiet[n].usd_per_mtok)  # type: ignore[union-attr]


def test_prefill_on_wafers_alone_is_slower_to_the_first_token() -> None:
    problem, _ = posed("trn2_efa_4cs3", name="llama-3.1-70b", prompt=2048, new_tokens=16, seed=None)
    by_name = {a.name: a.estimate for a in explain(problem).alternatives}
    assert by_name["all on cs3"].ttft > 2 * by_name["split"].ttft  # type: ignore[union-attr]
    assert by_name["all on trn2"].tpot > 3 * by_name["split"].tpot  # type: ignore[union-attr]
    with pytest.raises(KeyError):
        _ = by_name["all on h100"]


def test_what_does_not_fit_is_said() -> None:
    problem, _ = posed("trn2_efa_cs3", name="llama-3.1-70b", prompt=2048, new_tokens=16, seed=None)
    with pytest.raises(InfeasibleError, match=r"^split: "):
        explain(problem)


def test_idle_wafers_change_no_plan() -> None:
    """A model that one wafer holds is as fast on it, whether three more stand beside it or not."""
    found = []
    for name in ("trn2_efa_cs3", "trn2_efa_4cs3"):
        problem, _ = posed(name)
        found.append(evaluate(problem, single(problem, kind="cs3")))
    assert found[0].ttft == found[1].ttft and found[0].tpot == found[1].tpot and found[0].throughput == found[1].throughput
