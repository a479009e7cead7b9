"""Exported stages run to the same tokens in a process without the model's code, and a changed byte is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

pytest.importorskip("flatbuffers", reason="flatbuffers is an extra")

import partition as pt
from models import llama
from partition.artifacts import export, load
from partition.errors import ExecutionError, OutputError

FORMS: list[tuple[str, str, dict[str, Any]]] = [
    ("trn2_efa_4cs3", "phase_split", {}), ("trn2_efa_4cs3", "random", {"sample": True, "logits": True}), ("trn2_efa_4cs3", "random", {"loop": "while", "eos": 5}),
    ("trn2_efa_4cs3", "random", {"layers": "scanned", "dtype": "bfloat16"}),
]  # fmt: skip


def staged(cluster: str, policy: str, options: dict[str, Any]) -> tuple[Any, Any]:
    fn, args = llama.generation("tiny", batch=2, prompt=8, new_tokens=5, seed=0, **options)
    program = pt.trace(fn, *args)
    problem = pt.pose(pt.tag(program), pt.cluster(cluster), sharding="tensor")
    return pt.cut(program, pt.place(problem, policy)), args


@pytest.mark.parametrize(("cluster", "policy", "options"), FORMS, ids=str)
def test_what_is_loaded_gives_the_same(cluster: str, policy: str, options: dict[str, Any], tmp_path: Path) -> None:
    stages, args = staged(cluster, policy, options)
    loaded = load(export(stages, tmp_path / "e", *args))
    want = jax.tree_util.tree_leaves(pt.uncut(stages.program)(*args))
    for a, b in zip(want, loaded.run(), strict=True):
        assert np.array_equal(np.asarray(a), np.asarray(b)) or np.allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), atol=1e-4)
    manifest = json.loads((tmp_path / "e" / "manifest.json").read_text())
    assert {m["name"] for m in manifest["meshes"]} == set(stages.problem.meshes) and manifest["weights"] and manifest["crosses"] is not None
    assert len(manifest["stages"]) == len(stages.all) and {s["artifact"] for s in manifest["stages"]} <= set(manifest["sha256"])


def test_a_fresh_process_without_the_models(tmp_path: Path) -> None:
    stages, args = staged("trn2_efa_4cs3", "phase_split", {})
    export(stages, tmp_path / "e", *args)
    code = f"""
import sys
sys.modules["models"] = None
from partition.artifacts import load
import numpy as np
print(np.asarray(load({str(tmp_path / "e")!r}).run()[0]).tolist())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert json.loads(done.stdout) == np.asarray(pt.uncut(stages.program)(*args)).tolist(), done.stderr[-2000:]


def test_a_changed_byte_a_missing_file_and_another_format_are_refused(tmp_path: Path) -> None:
    stages, args = staged("cs3_only", "single", {})
    folder = export(stages, tmp_path / "e", *args)
    with pytest.raises(OutputError, match="exists already"):
        export(stages, folder)
    manifest = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(manifest.replace('"trips": ', '"trips": 1', 1))
    with pytest.raises(OutputError, match=r"manifest.json is not what was exported"):
        load(folder)
    (folder / "manifest.json").write_text(manifest)
    artifact = next(folder.glob("stage-*.bin"))
    good = artifact.read_bytes()
    artifact.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(OutputError, match=r"its checksum differs") as caught:
        load(folder)
    assert artifact.name in str(caught.value)
    artifact.unlink()
    with pytest.raises(OutputError, match="cannot be read"):
        load(folder)
    (folder / "manifest.json").write_text(json.dumps({"format": "partition export 0", "sha256": {}}))
    with pytest.raises(OutputError, match="not 'partition export 2'"):
        load(folder)


def test_inputs_by_name(tmp_path: Path) -> None:
    stages, args = staged("cs3_only", "single", {})
    bare = load(export(stages, tmp_path / "bare"))
    with pytest.raises(ExecutionError, match="inputs are missing"):
        bare.run()
    leaves = jax.tree_util.tree_leaves(args)
    names = [stages.program.graph.tensors[t].name for t in stages.program.graph.inputs]
    given = dict(zip(names, leaves, strict=True))
    assert np.array_equal(bare.run(given)[0], pt.uncut(stages.program)(*args))
    with pytest.raises(ExecutionError, match="takes no 'beauty'"):
        bare.run({"beauty": 1})
    with pytest.raises(ExecutionError, match="the program takes"):
        bare.run(given | {names[0]: np.zeros(3)})


def test_inputs_that_lie_on_other_devices_and_keys_among_them(tmp_path: Path) -> None:
    def fn(key: Any, w: Any, x: Any) -> Any:
        return jnp.tanh(x @ w) + jax.random.normal(key, (4, 8)) @ w

    devices = jax.devices()
    spread = NamedSharding(Mesh(np.array(devices[:4]), ("a",)), PartitionSpec("a"))
    w, x = np.eye(8, dtype=np.float32), np.ones((4, 8), np.float32)
    args = jax.device_put(jax.random.key(3), devices[2]), jax.device_put(w, spread), jax.device_put(x, devices[3])
    problem = pt.pose(pt.tag(pt.trace(fn, *args)), pt.cluster("trn2_efa_cs3"), level="op", sharding="tensor")
    stages = pt.cut(problem.phases.program, pt.place(problem, "random"))
    assert pt.check(stages, *args).equal
    names = [stages.program.graph.tensors[t].name for t in stages.program.graph.inputs]
    bare = load(export(stages, tmp_path / "bare"))
    assert np.array_equal(bare.run(dict(zip(names, args, strict=True)))[0], pt.uncut(stages.program)(*args))
    with pytest.raises(ExecutionError, match=r"is key<rbg>\[\], the program takes key<fry>\[\]"):
        bare.run(dict(zip(names, (jax.random.key(3, impl="rbg"), w, x), strict=True)))


def test_the_verbs(tmp_path: Path) -> None:
    def run(*args: str) -> Any:
        return subprocess.run([sys.executable, "-m", "partition", *args], capture_output=True, text=True, timeout=280)

    assert run("plan", "tiny", "--prompt", "8", "--new-tokens", "4", "--out", str(tmp_path / "p")).returncode == 0
    done = run("export", str(tmp_path / "p" / "plan.json"), "--out", str(tmp_path / "e"), "--seed", "0")
    assert done.returncode == 0 and "stages" in done.stdout, done.stderr
    done = run("run", str(tmp_path / "e"))
    fn, args = llama.generation("tiny", batch=1, prompt=8, new_tokens=4, seed=0)
    assert json.loads(done.stdout) == [np.asarray(jax.jit(fn)(*args)).tolist()], done.stderr
    done = run("export", str(tmp_path / "p"), "--out", str(tmp_path / "e"))
    assert done.returncode == 2 and "exists already" in done.stderr + done.stdout
