"""How exact a cut is. A Llama of 4 layers, dim 256, unrolled; prompt 16, prefill and 32 decode steps; the logits of every step.

- cut: prefill on trn2, decode by layers over three wafers, one host device a mesh: bit for bit the uncut program's logits?
- tensor-parallel: two host devices a mesh: the logits' rms error against a float64 oracle, as a multiple of the uncut program's own.

The oracle (oracle.py, in a process of its own with x64) reads the prompt and then the very tokens that the program wrote, so that a
near-tie, decided otherwise, does not count as an error of what follows.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
from typing import Any

from benchmarks import Bar, child

PROMPT, NEW, TIMES = 16, 33, 1.05  # 33 tokens: prefill's and those of 32 decode steps
DTYPES, SEEDS = ("float32", "bfloat16"), range(5)


def bars() -> list[Bar]:
    """Bit-equality by dtype and options; then errors of tensor-parallel stages under strict options."""
    rows = []
    for strict in (True, False):
        for dtype in DTYPES:
            got = [child("exactness", "run", dtype, seed, int(strict), 1, "") for seed in SEEDS]
            how = f"{got[0]['stages']} stages on {got[0]['meshes']} meshes; most {max(g['ulp'] for g in got)} ULP apart, max abs {max(g['gap'] for g in got):.2g}"
            rows.append(Bar.of(f"cut by layers: logits that differ, {dtype}, {'strict' if strict else 'default'} options",
                               [g["wrong"] for g in got], "==" if strict else None, 0, how))  # fmt: skip
            if strict:
                worst = max(g["wrong"] for g in got)
                rows[-1] = dataclasses.replace(rows[-1], met=worst == 0)
    for strict in (True, False):
        for dtype in DTYPES:
            got = [_against_oracle(dtype, seed, strict) for seed in SEEDS]
            where = f"{dtype}, {'strict' if strict else 'default'} options"
            sense: Any = "<=" if strict else None
            how = f"rms error of uncut {min(g['uncut'] for g in got):.2g}..{max(g['uncut'] for g in got):.2g}; degree {got[0]['degree']}"
            rows.append(Bar.of(f"tensor-parallel: rms error / uncut's own, {where}", [g["cut"] / g["uncut"] for g in got], sense, TIMES, how))
            clear, places = sum(g["clear"] for g in got), sum(g["places"] for g in got)
            rows.append(Bar.of(f"tensor-parallel: tokens other than the oracle's, {where}", [g["wrong"] for g in got], "==" if strict else None, 0,
                               f"where top1 - top2 > 2 x uncut's max error: {clear} of {places} places"))  # fmt: skip
    return rows


def _against_oracle(dtype: str, seed: int, strict: bool) -> dict[str, Any]:
    import numpy as np

    with tempfile.NamedTemporaryFile(suffix=".npz") as file:
        degree = child("exactness", "run", dtype, seed, int(strict), 2, file.name)["degree"]
        child("exactness", "oracle", dtype, seed, file.name)
        a = np.load(file.name)
    errors = {who: a[f"{who}_logits"].astype(np.float64) - a[f"{who}_oracle"] for who in ("uncut", "cut")}
    top = np.sort(a["cut_oracle"], axis=-1)
    clear = top[..., -1] - top[..., -2] > 2 * np.abs(errors["uncut"]).max()
    wrong = (a["cut_oracle"].argmax(-1) != a["cut_tokens"]) & clear
    rms = {who: float(np.sqrt((e**2).mean())) for who, e in errors.items()}
    return {**rms, "wrong": int(wrong.sum()), "clear": int(clear.sum()), "places": clear.size, "degree": degree}


def request(dtype: str, seed: int) -> tuple[Any, Any, tuple[Any, ...]]:
    """The model's configuration, the program and its arguments."""
    from models.llama import Config, generation

    cfg = Config(vocab=512, dim=256, layers=4, heads=8, kv_heads=4, head_dim=32, ffn=704, dtype=dtype)
    return cfg, *generation(cfg, prompt=PROMPT, new_tokens=NEW, seed=seed, logits=True)


def run(dtype: str, seed: int, strict: bool, degree: int, file: str) -> dict[str, Any]:
    """Cut and uncut: compare the logits, and save them where there is a file."""
    import numpy as np

    import partition as pt
    from partition.equivalence import compare

    _, fn, args = request(dtype, seed)
    machines = pt.cluster("trn2_efa_4cs3")
    machines = dataclasses.replace(machines, meshes=tuple(dataclasses.replace(m, stand_in=degree) for m in machines.meshes))
    program = pt.trace(fn, *args)
    problem = pt.pose(pt.tag(program), machines)
    wafer = {"layers.0": 1, "layers.1": 1, "layers.2": 2, "layers.3": 3}  # prefill stays on mesh 0, the head goes with the last layer
    placement = problem.placement([0 if region == "top" else wafer.get(name.split("/")[0], 3)
                                   for name, region in zip(problem.names, problem.region, strict=True)])  # fmt: skip
    stages = pt.cut(program, placement)
    cut, uncut = pt.prepare(stages, strict=strict)(*args), pt.uncut(program, strict=strict)(*args)
    if file:
        np.savez(file, cut_tokens=cut[0], cut_logits=cut[1], uncut_tokens=uncut[0], uncut_logits=uncut[1])
    logits, tokens = compare("logits", uncut[1], cut[1]), compare("tokens", uncut[0], cut[0])
    assert np.isfinite(np.asarray(uncut[1])).all()
    return {"wrong": logits.wrong, "tokens": tokens.wrong, "ulp": logits.max_ulp, "gap": logits.max_abs, "stages": len(stages.all),
            "meshes": len({s.mesh for s in stages.all}), "degree": degree}  # fmt: skip


def oracle(dtype: str, seed: int, file: str) -> None:
    """Add to a file the logits in float64 of the token sequences in it."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from benchmarks.oracle import float64
    from models.llama import Llama, numbers

    cfg, _, (weights, prompt) = request(dtype, seed)
    graphdef, _ = nnx.split(Llama(cfg, numbers(dtype, seed)))

    def forced(weights: Any, prompt: Any, tokens: Any) -> Any:
        model = nnx.merge(graphdef, weights)
        first, cache = model.prefill(prompt, PROMPT + NEW)

        def step(carry: Any, token: Any) -> Any:
            pos, cache = carry
            logits, cache = model.decode_step(token, cache, pos)
            return (pos + 1, cache), logits

        _, rest = jax.lax.scan(step, (jnp.int32(PROMPT), cache), tokens[:, :-1].T)
        return jnp.concatenate([first[None], rest]).swapaxes(0, 1)

    found = dict(np.load(file))
    found["cut_oracle"] = float64(forced, weights, prompt, found["cut_tokens"])
    same = np.array_equal(found["cut_tokens"], found["uncut_tokens"])
    found["uncut_oracle"] = found["cut_oracle"] if same else float64(forced, weights, prompt, found["uncut_tokens"])
    assert found["cut_oracle"].dtype == np.float64
    np.savez(file, **found)


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    if what == "run":
        print(json.dumps(run(rest[0], int(rest[1]), bool(int(rest[2])), int(rest[3]), rest[4])))
    else:
        print(json.dumps(oracle(rest[0], int(rest[1]), rest[2])))
