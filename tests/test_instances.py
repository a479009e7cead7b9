"""Instance files: what is read, and what is refused with file and entry."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from partition import instances
from partition.errors import InstanceError
from partition.evaluation import evaluate

GOOD: dict[str, Any] = {
    "maxSizePerFPGA": 10.0, "maxFPGAs": 2, "maxCPUs": 1,
    "nodes": [{"id": 7, "supportedOnFpga": 1, "cpuLatency": 10.0, "fpgaLatency": 1.0, "isBackwardNode": 0, "size": 3.0, "name": "b", "colorClass": 1},
              {"id": 3, "supportedOnFpga": 0, "cpuLatency": 2.0, "fpgaLatency": 1.0, "isBackwardNode": 0, "size": 0.0, "name": "a"},
              {"id": 9, "supportedOnFpga": 1, "cpuLatency": 10.0, "fpgaLatency": 2.0, "isBackwardNode": 0, "size": 3.0, "name": "c", "colorClass": 1}],
    "edges": [{"sourceId": 3, "destId": 7, "cost": 0.5}, {"sourceId": 3, "destId": 9, "cost": 0.5}, {"sourceId": 7, "destId": 9, "cost": 0.25}],
}  # fmt: skip


def read(tmp_path: Path, raw: Any) -> Any:
    path = tmp_path / "x.json"
    path.write_text(raw if isinstance(raw, str) else json.dumps(raw))
    return instances.read(path)


def test_what_is_read(tmp_path: Path) -> None:
    p = read(tmp_path, GOOD)
    assert p.names == ("a", "b", "c") and p.kinds == ("accelerator", "accelerator", "host") and p.together == ((1, 2),)
    assert np.isinf(p.seconds[0, 0]) and p.seconds[0, 2] == 2.0 and p.capacity.tolist() == [10.0, 10.0, np.inf]
    # a on the host (2 s; hosts wait for nothing), b and c on an accelerator that takes a's value in once: 1 + 2 + 0.5
    e = evaluate(p, p.placement([2, 0, 0]))
    assert e.occupied == (3.5, 0.0, 2.0) and e.e2e == 2.0 + 3.5 and e.throughput == pytest.approx(1 / 3.5)
    # b and c apart: b gives out its value, c takes both in
    e = evaluate(p, p.placement([2, 0, 1]))
    assert e.occupied == (1 + 0.5 + 0.25, 2 + 0.5 + 0.25, 2.0) and e.e2e == 2 + 1.75 + 2.75


def change(**at: Any) -> dict[str, Any]:
    return json.loads(json.dumps(GOOD)) | at


@pytest.mark.parametrize(("raw", "says"), [
    ("{", "is no JSON"), ([1], "no instance of a format"), (change(edges=3), "lists of objects"), (change(nodes=[]), "nothing to place"), (change(maxFPGAs=-1), "maxFPGAs is -1"),
    (change(edges=[{"sourceId": 3, "destId": 8, "cost": 1}]), "destId 8 is no node"), (change(edges=[{"sourceId": 3, "destId": 7, "cost": "x"}]), "cost is 'x'"),
    (change(edges=[{"sourceId": 3, "destId": 7, "cost": float("nan")}]), "cost is nan"), (change(nodes=[*GOOD["nodes"], GOOD["nodes"][0]]), "id 7 is given twice"),
    (change(edges=[*GOOD["edges"], {"sourceId": 9, "destId": 3, "cost": 0}]), "wait for each other"), (change(nodes=[GOOD["nodes"][0] | {"size": -1}]), "size is -1"),
    (change(nodes=[GOOD["nodes"][0] | {"cpuLatency": None}]), "cpuLatency is None"),
])  # fmt: skip
def test_what_is_refused(tmp_path: Path, raw: Any, says: str) -> None:
    with pytest.raises(InstanceError, match=says) as caught:
        read(tmp_path, raw)
    assert "x.json" in caught.value.where and caught.value.mend


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InstanceError, match="cannot be read"):
        instances.read(tmp_path / "none.json")


@pytest.mark.parametrize("raw", [change(nodes=[GOOD["nodes"][0] | {"id": [1]}]), change(nodes=[GOOD["nodes"][0] | {"colorClass": [1]}]), change(maxFPGAs=0.5),
                                 change(edges=[{"sourceId": {}, "destId": 7, "cost": 1}]), "[" * 100_000, change(nodes=[GOOD["nodes"][0] | {"fpgaLatency": 10**400}])])  # fmt: skip
def test_what_is_no_number_and_no_word(tmp_path: Path, raw: Any) -> None:
    with pytest.raises(InstanceError):
        read(tmp_path, raw)


def test_an_error_comes_back_from_another_process_as_it_is() -> None:
    import pickle

    error = pickle.loads(pickle.dumps(InstanceError("a", where="b", mend="c")))
    assert (type(error), error.what, error.where, error.mend) == (InstanceError, "a", "b", "c")
