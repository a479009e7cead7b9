"""A user's own times take the place of the model's, and say so; what is no node, machine or time is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import partition as pt
from models import llama
from partition import profiles
from partition.cli import app
from partition.errors import NameUnknownError, ProfileError
from partition.measured import read
from partition.problem import on
from tests.conftest import tagged


def test_a_measured_time_stands_where_it_was_measured_and_nowhere_else() -> None:
    phases, _ = tagged()
    cluster = profiles.cluster("trn2_efa_cs3")
    plain, own = pt.pose(phases, cluster), pt.pose(phases, cluster, costs={"decode/head": {"cs3": "3 ms"}, "prefill/*": {"trn2": 0.25}})
    head = plain.names.index("decode/head")
    assert own.seconds[head, 1] == 3e-3 and own.costs[head][1].limit == "measured"
    early = [n for n, name in enumerate(plain.names) if name.startswith("prefill/")]
    assert early and all(own.seconds[n, 0] == 0.25 for n in early)
    assert own.measured == {(head, 1), *((n, 0) for n in early)} and not plain.measured
    rest = np.ones(plain.seconds.shape, bool)
    rest[tuple(zip(*own.measured, strict=True))] = False
    np.testing.assert_array_equal(own.seconds[rest], plain.seconds[rest])


def test_measured_times_stay_on_another_cluster() -> None:
    phases, _ = tagged()
    own = pt.pose(phases, profiles.cluster("trn2_efa_cs3"), costs={"decode/head": {"cs3": "3 ms"}})
    slower = on(own, profiles.cluster("trn2_efa_cs3").at(worse=True))
    assert slower.seconds[own.names.index("decode/head"), 1] == 3e-3 and slower.measured == own.measured


@pytest.mark.parametrize(
    ("costs", "error", "says"),
    [
        ({"decode/hat": {"cs3": 1.0}}, NameUnknownError, "did you mean 'decode/head'"), ({"decode/head": {"cs4": 1.0}}, NameUnknownError, "mesh or device"),
        ({"decode/head": {"cs3": "3 miles"}}, ProfileError, "units of time"), ({"decode/head": {"cs3": -1.0}}, ProfileError, "no time"),
        ({"decode/head": {"cs3": float("nan")}}, ProfileError, "no time"), ({"decode/head": {"cs3": True}}, ProfileError, "no number"),
        ({"*": 5}, ProfileError, "no table"), ([1], ProfileError, "no table"),
    ],
)  # fmt: skip
def test_wrong_tables_are_refused(costs: object, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        pt.pose(tagged()[0], profiles.cluster("trn2_efa_cs3"), costs=costs)  # type: ignore[arg-type]


def test_a_table_is_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "times.csv"
    path.write_text("node,machine,time\ndecode/head,cs3,3 ms\nprefill/*,trn2,0.25\nprefill/*,cs3,1e-3\n")
    assert read(path) == {"decode/head": {"cs3": "3 ms"}, "prefill/*": {"trn2": 0.25, "cs3": 1e-3}}
    shown = CliRunner().invoke(app, ["plan", "tiny", "--prompt", "16", "--new-tokens", "4", "--costs", str(path)])
    assert shown.exit_code == 0 and "measured" in shown.output
    path.write_text("\ufeffNode, Machine, Time\ndecode/head, cs3, 1E-3\n", encoding="utf-8")
    assert read(path) == {"decode/head": {"cs3": 1e-3}}
    for text, says in (("node,machine,time\na,b,1\na,b,2\n", "two times"), ("node,machine\na,b\n", "lacks"), ("node,machine,time\n", "no times"), ("node,machine,time\na,,1\n", "times.csv:2")):
        path.write_text(text)
        with pytest.raises(ProfileError) as caught:
            read(path)
        assert says in f"{caught.value.what} {caught.value.where}"
    with pytest.raises(ProfileError, match="cannot be read"):
        read(tmp_path / "none.csv")


def test_energy_is_the_power_of_the_machines_while_they_are_busy() -> None:
    fn, args = llama.generation("tiny", prompt=16, new_tokens=8)
    plan = pt.plan(fn, args, cluster="trn2_efa_cs3", objective="joules_per_token", policy="phase_split")
    watts = [16 * 500.0, 23e3]
    assert plan.estimate.joules_per_token == pytest.approx(sum(b * w for b, w in zip(plan.estimate.occupied, watts, strict=True)) / 8)
    assert 0 <= plan.gap < 1 and "J per token" in str(plan)
    doubled = pt.plan(fn, args, cluster=profiles.cluster("trn2_efa_cs3").replace({"cs3.power": "46 kW", "trn2.power": "1 kW"}), policy="phase_split")
    assert doubled.estimate.joules_per_token == pytest.approx(2 * plan.estimate.joules_per_token)
