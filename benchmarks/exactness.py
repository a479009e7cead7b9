"""How exact a cut is. A Llama of 4 layers, dim 256, unrolled; prompt 16, prefill and 32 decode steps; the logits of every step.

- cut: prefill on trn2, decode by layers over three wafers, one host device a mesh: bit for bit the uncut program's logits?
- tensor-parallel: two host devices a mesh: the logits' rms error against a float64 oracle, as a multiple of the uncut program's own.

The oracle (every float in float64, in a process of its own) reads the prompt and then the very tokens that the program wrote, so that a
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
DTYPES, SEEDS, OPTIONS = ("float32", "bfloat16"), range(5), ("default options", "strict options")


def bars() -> list[Bar]:
    """Bit-equality by dtype and options; then errors of tensor-parallel stages."""
    cases = [(dtype, strict) for strict in (1, 0) for dtype in DTYPES]
    return [cut_by_layers(*c) for c in cases] + [row for c in cases for row in tensor_parallel(*c)]


def cut_by_layers(dtype: str, strict: int) -> Bar:
    """How many logits differ from the uncut program's. A bar under strict options, for every seed; told under the default ones."""
    got = child("exactness", "run", dtype, strict, 1, "")
    how = f"{got['stages']} stages on {got['meshes']} meshes; max abs {max(got['gap']):.2g} of logits up to {got['scale']:.2g}; tokens that differ: {sum(got['tokens'])}"
    bar = Bar.of(f"cut by layers: logits that differ of {got['size']}, {dtype}, {OPTIONS[strict]}", got["wrong"], "==" if strict else None, 0, how)
    return dataclasses.replace(bar, met=not any(got["wrong"])) if strict else bar


def tensor_parallel(dtype: str, strict: int) -> list[Bar]:
    """Errors against the oracle, by seed: of the logits, relative to the uncut program's own, and of the tokens where they are clear."""
    import numpy as np

    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/logits.npz"
        child("exactness", "run", dtype, strict, 2, file)
        child("exactness", "oracle", dtype, file)
        found = dict(np.load(file))  # everything [seed, batch, token(, vocab)]
    axes = (1, 2, 3)
    error = {who: found[f"{who}_logits"].astype(np.float64) - found[f"{who}_oracle"] for who in ("uncut", "cut")}
    rms = {who: np.sqrt((e**2).mean(axes)) for who, e in error.items()}
    top = np.sort(found["cut_oracle"], axis=-1)
    clear = top[..., -1] - top[..., -2] > 2 * np.abs(error["uncut"]).max(axes)[:, None, None]
    wrong = ((found["cut_oracle"].argmax(-1) != found["cut_tokens"]) & clear).sum((1, 2))
    where = f"{dtype}, {OPTIONS[strict]}"
    return [
        Bar.of(f"tensor-parallel: rms error / uncut's own, {where}", (rms["cut"] / rms["uncut"]).tolist(), "<=" if strict else None, TIMES,
               f"uncut's rms error {np.median(rms['uncut']):.2g}; two host devices a mesh"),
        Bar.of(f"tensor-parallel: tokens other than the oracle's, {where}", wrong.tolist(), "==" if strict else None, 0,
               f"where top1 - top2 > 2 x uncut's largest error: {clear.sum()} of {clear.size} places"),
    ]  # fmt: skip


def request(dtype: str, seed: int) -> tuple[Any, Any, tuple[Any, ...]]:
    """The model's configuration, the program and its arguments."""
    from models.llama import Config, generation

    cfg = Config(vocab=512, dim=256, layers=4, heads=8, kv_heads=4, head_dim=32, ffn=704, dtype=dtype)
    return cfg, *generation(cfg, prompt=PROMPT, new_tokens=NEW, seed=seed, logits=True)


def run(dtype: str, strict: bool, degree: int, file: str) -> dict[str, Any]:
    """Cut and uncut for every seed: compare the logits, and save them where there is a file."""
    import numpy as np

    import partition as pt
    from partition.distances import compare

    requests = [request(dtype, seed) for seed in SEEDS]
    machines = pt.cluster("trn2_efa_4cs3")
    machines = dataclasses.replace(machines, meshes=tuple(dataclasses.replace(m, stand_in=degree) for m in machines.meshes))
    program = pt.trace(requests[0][1], *requests[0][2])
    problem = pt.pose(pt.tag(program), machines, sharding="tensor")
    wafer = {"layers.0": 1, "layers.1": 1, "layers.2": 2}  # prefill stays on mesh 0; the head goes with layer 3
    placement = problem.placement([0 if region == "top" else wafer.get((name + "/").split("/")[1], 3)
                                   for name, region in zip(problem.names, problem.region, strict=True)])  # fmt: skip
    stages = pt.cut(program, placement)
    runner, whole = pt.prepare(stages, strict=strict), pt.uncut(program, strict=strict)
    pairs = [(runner(*args), whole(*args)) for _, _, args in requests]
    got = {f"{who}_{what}": np.stack([np.asarray(p[i][j]) for p in pairs]) for i, who in enumerate(("cut", "uncut")) for j, what in enumerate(("tokens", "logits"))}
    assert np.isfinite(got["uncut_logits"]).all()
    if file:
        np.savez(file, **got)
    logits = [compare("logits", b[1], a[1]) for a, b in pairs]
    tokens = [compare("tokens", b[0], a[0]).wrong for a, b in pairs]
    return {"wrong": [0 if d.bitwise else max(d.wrong, 1) for d in logits], "gap": [d.max_abs for d in logits], "tokens": tokens,
            "size": got["cut_logits"][0].size, "scale": float(np.abs(got["uncut_logits"]).max()), "stages": len(stages.all),
            "meshes": len({s.mesh for s in stages.all})}  # fmt: skip


def oracle(dtype: str, file: str) -> None:
    """Add to a file the logits in float64 of the token sequences in it."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from models.generate import shapes
    from models.llama import Llama
    from partition._jax.lifting import float64

    found = dict(np.load(file))
    for who in ("cut", "uncut"):
        made = []
        for seed in SEEDS:
            cfg, _, (weights, prompt) = request(dtype, seed)
            graphdef, _ = nnx.split(Llama(cfg, shapes(dtype)))

            def forced(weights: Any, prompt: Any, tokens: Any, graphdef: Any = graphdef) -> Any:
                model = nnx.merge(graphdef, weights)
                first, cache = model.prefill(prompt, PROMPT + NEW)

                def step(carry: Any, token: Any) -> Any:
                    logits, cache = model.decode_step(token, carry[1], carry[0])
                    return (carry[0] + 1, cache), logits

                _, rest = jax.lax.scan(step, (jnp.int32(PROMPT), cache), tokens[:, :-1].T)
                return jnp.concatenate([first[None], rest]).swapaxes(0, 1)

            given = (weights, prompt, found[f"{who}_tokens"][seed])
            same = who == "uncut" and np.array_equal(found["cut_tokens"][seed], found["uncut_tokens"][seed])
            made.append(found["cut_oracle"][seed] if same else float64(jax.make_jaxpr(forced)(*given), jax.tree_util.tree_leaves(given))[0])
        found[f"{who}_oracle"] = np.stack(made)
        assert found[f"{who}_oracle"].dtype == np.float64
    np.savez(file, **found)


if __name__ == "__main__":
    what, dtype, *rest = sys.argv[1:]
    print(json.dumps(run(dtype, bool(int(rest[0])), int(rest[1]), rest[2]) if what == "run" else oracle(dtype, rest[0])))
