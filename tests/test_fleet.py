"""Machines under a load: queues against textbook values and a simulated one, costs by hand."""

import dataclasses
import heapq
import math

import numpy as np
import pytest
from conftest import posed

from partition.errors import PlacementError
from partition.evaluation import evaluate
from partition.fleet import fleet, wait
from partition.pipeline import place


def test_waits_of_one_server_are_those_of_pollaczek_and_khinchine() -> None:
    for load in (0.1, 0.5, 0.9):
        assert wait(load / 2.0, 2.0, 1) == pytest.approx(load * 2.0 / (2 * (1 - load)))  # rho s / 2 (1 - rho)
    assert wait(1.0, 2.0, 2) == math.inf


@pytest.mark.parametrize(("servers", "load"), [(2, 0.8), (5, 0.7), (10, 0.9)])
def test_waits_of_several_servers_are_near_simulated_ones(servers: int, load: float) -> None:
    rng, free, waited, now = np.random.default_rng(0), [0.0] * servers, [], 0.0
    for gap in rng.exponential(1.0 / (load * servers), size=200_000):
        now += gap
        start = max(now, heapq.heappop(free))
        waited.append(start - now)
        heapq.heappush(free, start + 1.0)
    assert wait(load * servers, 1.0, servers) == pytest.approx(np.mean(waited), rel=0.12)


def test_a_fleet_by_hand() -> None:
    problem, _ = posed("trn2_efa_cs3", objective="usd_per_mtok")
    placement = place(problem, "phase_split")
    e = evaluate(problem, placement)
    rate = 1.7 / max(e.occupied)  # 1.7 machines' worth of the busiest
    found = fleet(problem, placement, rate, busiest=0.8)
    m = int(np.argmax(e.occupied))
    assert found.copies[m] == 3 and found.busy[m] == pytest.approx(1.7 / 3) and all(0 < b <= 0.8 for b in found.busy)
    paid = sum(k * p for k, p in zip(found.copies, problem.price, strict=True)) + rate * sum(b * problem.link_price[pair] for pair, b in e.link_bytes.items())
    assert found.usd_per_mtok == pytest.approx(paid / rate / problem.workload.tokens * 1e6) and found.usd_per_mtok > e.usd_per_mtok
    fixed, slope = found.line("cs3")
    assert fixed + slope * float(problem.price[1]) == pytest.approx(found.usd_per_second)
    assert found.ttft > e.ttft and sorted(found.ratio) == sorted(found.copies)
    slower = dataclasses.replace(problem, beta=np.where(np.isfinite(problem.beta), problem.beta / 1e6, problem.beta))
    assert sum(fleet(slower, placement, rate).copies) > sum(found.copies)  # the link is then what is busy


def test_ends_of_the_load() -> None:
    problem, _ = posed("trn2_efa_cs3")
    placement = place(problem, "phase_split")
    assert all(k == (b > 0) for k, b in zip(fleet(problem, placement, 1e-9).copies, evaluate(problem, placement).busy, strict=True))
    assert wait(10_001 * 0.995, 1.0, 10_001) == pytest.approx(wait(9_999 * 0.995, 1.0, 9_999), rel=0.01) and wait(8e8, 1.0, 10**9) == 0.0


def test_what_is_no_load() -> None:
    problem, _ = posed()
    placement = place(problem, "single")
    for rate, busiest in ((0.0, 0.8), (math.nan, 0.8), (1.0, 1.0)):
        with pytest.raises(PlacementError, match="is no load"):
            fleet(problem, placement, rate, busiest=busiest)
