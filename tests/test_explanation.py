"""Break-even values: at them, both sides cost or take the same."""

import dataclasses

import numpy as np
import pytest
from conftest import posed

from partition.evaluation import evaluate
from partition.explanation import explain


def test_the_answer_flips_where_it_says() -> None:
    problem, _ = posed("trn2_efa_4cs3", name="llama-3.1-70b", prompt=2048, new_tokens=64, seed=None)
    answer = explain(problem)
    assert answer.window is not None and answer.flip_beta is not None and answer.split.placement is not None
    singles = [a.placement for a in answer.alternatives if a.placement is not None and a.name.startswith("all on")]

    def cheapest_at(price: float) -> bool:
        prices = np.array([price / 3600 if k == answer.decode_kind else p for k, p in zip(problem.kinds, problem.price, strict=True)])
        priced = dataclasses.replace(problem, price=prices)
        split = evaluate(priced, answer.split.placement).usd_per_mtok  # type: ignore[arg-type]
        return all(split < evaluate(priced, s).usd_per_mtok for s in singles)

    low, high = answer.window
    assert cheapest_at((low * high) ** 0.5)
    assert not cheapest_at(low * 0.99) and not cheapest_at(high * 1.01) and cheapest_at(low * 1.01) and cheapest_at(high * 0.99)

    across = np.array(problem.kinds)[:, None] != np.array(problem.kinds)[None, :]
    for factor, wins in ((1.01, True), (0.99, False)):
        slower = dataclasses.replace(problem, beta=np.where(across, answer.flip_beta * factor, problem.beta))
        assert (evaluate(slower, answer.split.placement).e2e < answer.best.estimate.e2e) is wins  # type: ignore[union-attr]
    assert "TTFT" in answer.sentence and "cs3-hour" in answer.sentence


def test_prefill_on_wafers_alone_is_slower_to_the_first_token() -> None:
    problem, _ = posed("trn2_efa_4cs3", name="llama-3.1-70b", prompt=2048, new_tokens=16, seed=None)
    by_name = {a.name: a.estimate for a in explain(problem).alternatives}
    assert by_name["all on cs3"].ttft > 2 * by_name["split"].ttft  # type: ignore[union-attr]
    assert by_name["all on trn2"].tpot > 3 * by_name["split"].tpot  # type: ignore[union-attr]
    with pytest.raises(KeyError):
        _ = by_name["all on h100"]
