"""Drift: what moved since a run was recorded is seen, within a budget, with what of the environment is another."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

from partition import baselines
from partition.errors import OutputError

RESULT = {"tokens": jnp.arange(10), "logits": jnp.linspace(-1, 1, 300).reshape(3, 100)}


def test_the_same_run_does_not_drift(tmp_path: Path) -> None:
    path = baselines.save(baselines.recorded("a model", RESULT, reason="the first"), tmp_path / "b.json")
    old = baselines.load(path)
    said = json.loads(path.read_text())
    for damage in ({"errors": {"stage 1": 0.5}}, {"environment": 3}, {"outputs": said["outputs"][:1]}, {"digest": ""}):
        (tmp_path / "damaged.json").write_text(json.dumps(said | damage))
        with pytest.raises(OutputError, match="its checksum differs"):
            baselines.load(tmp_path / "damaged.json")
    assert baselines.drift(old, RESULT) == ([], []) and old["reason"] == "the first" and old["environment"]["jax"]


@pytest.mark.parametrize(("change", "says"), [
    ({"tokens": RESULT["tokens"].at[7].set(3)}, "tokens.*are others, first 3 in the place of 7"), ({"logits": RESULT["logits"] * 1.01}, "logits.*moved by"),
    ({"logits": RESULT["logits"].at[0, 0].set(jnp.nan)}, "logits.*: 1 NaN, 0 inf, 0 -inf; there were 0 NaN"), ({"logits": RESULT["logits"][:2]}, "other names, shapes or types"),
])  # fmt: skip
def test_what_moved_is_said(change: dict[str, Any], says: str) -> None:
    import re

    moved, _ = baselines.drift(baselines.recorded("a model", RESULT, reason="x"), RESULT | change)
    assert moved and re.search(says, " ".join(moved)), moved


def test_a_budget_and_another_environment() -> None:
    old = json.loads(json.dumps(baselines.recorded("a model", RESULT, reason="x")))
    little = RESULT | {"logits": RESULT["logits"] * 1.0001}
    assert baselines.drift(old, little)[0] and not baselines.drift(old, little, {"float32": 1e-3})[0]
    old["environment"]["jax"] = "0.1"
    assert any(c.startswith("jax: 0.1 -> ") for c in baselines.drift(old, RESULT)[1])


def test_what_is_no_baseline(tmp_path: Path) -> None:
    (tmp_path / "b.json").write_text("{}")
    for name in ("b.json", "none.json"):
        with pytest.raises(OutputError, match="cannot be read"):
            baselines.load(tmp_path / name)


def test_errors_against_float64_may_not_grow() -> None:
    from conftest import posed

    import partition as pt
    from partition.policies import POLICIES

    problem, args = posed("trn2_efa_cs3", logits=True)
    stages = pt.cut(problem.phases.program, POLICIES["phase_split"](problem))  # type: ignore[union-attr]
    verdict, result = pt.check(stages, *args, oracle=True), pt.run(stages, *args)
    found = baselines.errors(verdict)
    assert any(name.startswith("stage") for name in found) and any(name.startswith("output") for name in found)
    old = json.loads(json.dumps(baselines.recorded("a model", result, reason="x", verdict=verdict)))
    assert not baselines.drift(old, result, verdict=verdict)[0]
    name = max(found, key=lambda n: found[n])
    old["errors"][name] = found[name] / 3
    moved, _ = baselines.drift(old, result, verdict=verdict)
    assert len(moved) == 1 and moved[0].startswith(f"{name}: its rms error against float64 is")


@pytest.mark.parametrize(("loop", "change"), [("scan", {"norm_eps": 1e-3}), pytest.param("while", {"rope_theta": 4e5}, marks=pytest.mark.slow)])
def test_what_moves_cut_and_uncut_together_is_seen_where_no_token_moves(loop: str, change: dict[str, float]) -> None:
    import dataclasses

    import partition as pt
    from models import llama
    from partition.execution import bound_inputs, prepare
    from partition.references import chosen_from

    def ran(config: Any) -> tuple[Any, Any]:
        fn, args = llama.generation(config, batch=1, prompt=16, new_tokens=4, seed=0, loop=loop)
        problem = pt.pose(pt.tag(pt.trace(fn, *args)), pt.cluster("trn2_efa_cs3"), trips=3)
        runner = prepare(pt.cut(problem.phases.program, pt.place(problem, "phase_split")))  # type: ignore[union-attr]
        return runner(*args), chosen_from(runner, bound_inputs(runner.program, args))

    result, beside = ran(llama.CONFIGS["tiny"])
    assert list(beside) == ["what tokens of the top level are chosen from", *(f"what tokens of the token loop are chosen from, trip {n}" for n in (0, 1, 2))]
    old = json.loads(json.dumps(baselines.recorded("tiny", result, reason="x", beside=beside)))
    assert baselines.drift(old, result, beside=beside) == ([], [])
    other, moved = ran(dataclasses.replace(llama.CONFIGS["tiny"], **change))  # type: ignore[arg-type]
    assert (other == result).all(), "a token moved: the change says nothing of what is recorded beside"
    said, _ = baselines.drift(old, other, beside=moved)
    assert len(said) == 4 and all("are chosen from" in line and "of the rms, the budget is 1e-05" in line for line in said)
