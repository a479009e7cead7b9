"""Meshes in processes of their own give the same tokens and move the bytes of the plan; a process that dies is an error in bounded time, and a retry works."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

pytest.importorskip("zmq", reason="pyzmq is an extra")
pytest.importorskip("flatbuffers", reason="flatbuffers is an extra")

import partition as pt
from models import llama
from partition.errors import ExecutionError, OutputError, PartitionError
from partition.processes import Processes
from partition.transport import TransportError


def exported(folder: Path, cluster: str, policy: str, batch: int = 1, prompt: int = 16, **options: Any) -> tuple[pt.Stages, list[np.ndarray], Path]:
    fn, args = llama.generation("tiny", batch=batch, prompt=prompt, new_tokens=6, seed=0, **options)
    program = pt.trace(fn, *args)
    stages = pt.cut(program, pt.place(pt.pose(pt.tag(program), pt.cluster(cluster)), policy), streamed=True)
    return stages, [np.asarray(x) for x in jax.tree_util.tree_leaves(pt.uncut(program)(*args))], pt.export(stages, folder / "e", *args)


def killed_during(processes: Processes, n: int, sig: signal.Signals, after: float) -> float:
    """Run a request while a process is being killed; gives seconds until the error."""
    when: list[float] = []

    def kill() -> None:
        time.sleep(after)
        when.append(time.monotonic())
        os.kill(processes.running[n].pid, sig)

    thread = threading.Thread(target=kill)
    thread.start()
    with pytest.raises(TransportError, match=r"the process for \w+ (was killed|has given no sign of life|takes nothing)"):
        processes.run()
    thread.join()
    return time.monotonic() - when[0]


def test_the_same_tokens_the_planned_bytes_and_a_retry(tmp_path: Path) -> None:
    stages, want, folder = exported(tmp_path, "trn2_efa_cs3", "phase_split", batch=8, prompt=256)
    per_layer = {v[0] for s in stages.all if s.region == "top" for v in s.outputs}
    assert len(stages.all) >= 4 and len(per_layer) > 4
    with pt.launch(folder, patience=2.0, throttle=2e6) as processes:  # 1.6 MB take 0.8 s
        answer = processes.run()
        assert all(np.array_equal(a, b) for a, b in zip(want, answer.outputs, strict=True))
        assert answer.moved == answer.planned == sum(t.nbytes * t.times for t in pt.transfers(stages)) and answer.attempts == 1
        assert {d.value for d in answer.deliveries} == {t.value for t in pt.transfers(stages)} and answer.planned_overlap > 0.5
        assert killed_during(processes, 1, signal.SIGKILL, 0.4) < 4
        assert killed_during(processes, 0, signal.SIGSTOP, 0.4) < 8  # patience, and once more for the other to say so
        with pytest.raises(ExecutionError, match="takes no 'beauty'"):
            processes.run({"beauty": np.zeros(3)})
        answer = processes.run(retries=1)
        assert all(np.array_equal(a, b) for a, b in zip(want, answer.outputs, strict=True))
    assert not processes.running


@pytest.mark.slow
@pytest.mark.parametrize(("policy", "options"), [("random", {"loop": "while", "eos": 5}), ("random", {"sample": True, "logits": True}), ("equal_split", {"layers": "scanned", "dtype": "bfloat16"})], ids=str)
def test_bodies_cut_over_processes(policy: str, options: dict[str, Any], tmp_path: Path) -> None:
    _, want, folder = exported(tmp_path, "trn2_efa_4cs3", policy, batch=2, **options)
    with pt.launch(folder) as processes:
        answer = processes.run()
    for a, b in zip(want, answer.outputs, strict=True):
        assert np.array_equal(a, b) or np.allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), atol=1e-4)
    ran_all = "while" not in options.values()
    assert answer.moved == answer.planned if ran_all else answer.moved <= answer.planned


def test_a_changed_byte_and_a_folder_of_something_else(tmp_path: Path) -> None:
    _, _, folder = exported(tmp_path, "trn2_efa_cs3", "phase_split")
    artifact = next(folder.glob("stage-*.bin"))
    artifact.write_bytes(artifact.read_bytes()[:-1] + b"!")
    with pt.launch(folder) as processes, pytest.raises(OutputError, match="its checksum differs"):
        processes.run()
    with pytest.raises(ExecutionError, match="the export cannot be read"):
        pt.launch(tmp_path)


@pytest.mark.slow
def test_the_verb_and_a_launcher_that_is_gone(tmp_path: Path) -> None:
    def run(*args: str) -> Any:
        return subprocess.run([sys.executable, "-m", "partition", *args], capture_output=True, text=True, timeout=280)

    assert run("plan", "tiny", "--prompt", "8", "--new-tokens", "4", "--policy", "phase_split", "--out", str(tmp_path / "p")).returncode == 0
    done, whole = run("run", str(tmp_path / "p"), "--processes"), run("run", str(tmp_path / "p"))
    assert done.returncode == whole.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[0]) == json.loads(whole.stdout) and "each checksummed" in done.stdout
    raw = json.loads(run("run", str(tmp_path / "p"), "--processes", "--json").stdout)
    assert raw["outputs"] == json.loads(whole.stdout) and raw["moved"] == raw["planned"]
    _, _, folder = exported(tmp_path, "trn2_efa_cs3", "phase_split")
    code = f"import partition as pt, os\np = pt.launch({str(folder)!r}, patience=1.0); p.run(); print(*[q.pid for q in p.running.values()], flush=True); os._exit(9)"
    pids = [int(x) for x in subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200).stdout.split()]
    assert len(pids) == 2
    until = time.monotonic() + 15
    while (alive := [p for p in pids if _runs(p)]) and time.monotonic() < until:
        time.sleep(0.2)
    assert not alive


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_threads_wait_for_each_other_and_wrong_numbers_are_refused(tmp_path: Path) -> None:
    _, want, folder = exported(tmp_path, "trn2_efa_cs3", "phase_split")
    with pytest.raises(PartitionError, match="patience is of type str"):
        pt.launch(folder, patience="3")  # type: ignore[arg-type]
    with pytest.raises(ExecutionError, match="throttle is 0"):
        pt.launch(folder, throttle=0)
    with pt.launch(folder, patience=3.0) as processes:
        with pytest.raises(ExecutionError, match="cannot be retried -1 times"):
            processes.run(retries=-1)
        with ThreadPoolExecutor(3) as pool:
            answers = list(pool.map(lambda _: processes.run(), range(3)))
    assert all(np.array_equal(answer.outputs[0], want[0]) for answer in answers)


@pytest.mark.slow
def test_a_process_that_is_slow_to_start_does_not_end_the_others(tmp_path: Path) -> None:
    _, want, folder = exported(tmp_path, "trn2_efa_cs3", "phase_split")
    with pt.launch(folder, patience=1.5) as processes:

        def hold() -> None:
            while 0 not in processes.running:
                time.sleep(0.01)
            os.kill(processes.running[0].pid, signal.SIGSTOP)
            time.sleep(9)
            os.kill(processes.running[0].pid, signal.SIGCONT)

        thread = threading.Thread(target=hold)
        thread.start()
        assert np.array_equal(processes.run().outputs[0], want[0])
        thread.join()
