"""Tags against the word of the models' authors: scopes "prefill", "decode" and "after" in one build, none at all in the build that is tagged.

The labels are written where the model is; the tagger sees a build in which every scope is gone, and must agree on every op.
"""

import contextlib
import dataclasses
import importlib
import random
import re
from collections import Counter
from typing import Any

import jax
import pytest
import zoo

from partition.equivalence import check
from partition.errors import NameUnknownError, PhaseError
from partition.graph import Graph
from partition.loops import CONTRACTIONS
from partition.phases import Phase, Phases, tag
from partition.pipeline import plan
from partition.program import trace

LABELS = {"prefill": Phase.PREFILL, "decode": Phase.DECODE, "both": Phase.BOTH, "after": Phase.NONE}
FORMS = [(layers, loop) for layers in ("unrolled", "scanned") for loop in ("scan", "while", "fori")]
MODELS = ("llama", "mixtral", "gemma", "deepseek", "mamba", "gpt2", "t5")


def labels(graph: Graph) -> dict[int, str]:
    """Op id -> the innermost label around it."""
    return {op.id: next((part for part in reversed(re.split(r"[/()]", op.scope)) if part in LABELS), "") for op in graph.walk()}


def agree(fn: Any, args: Any, monkeypatch: pytest.MonkeyPatch, fresh: Any = None) -> Phases:
    """Tag a build without scopes and hold every op to the label of the build with them. `fresh` builds it anew."""
    said = labels(trace(fn, *args).graph)
    with monkeypatch.context() as patch:
        patch.setattr(jax, "named_scope", lambda *a, **k: contextlib.nullcontext())
        patch.setattr(zoo, "scope", lambda *a, **k: contextlib.nullcontext())
        jax.clear_caches()
        fn, args = fresh() if fresh else (fn, args)
        program = trace(lambda *a: fn(*a), *args)
    phases = tag(program)
    assert phases.of.keys() == said.keys()
    assert not any(part in LABELS for op in program.graph.walk() for part in op.scope.split("/"))
    wrong = [f"op {o.id} {o.primitive}: {phases.of[o.id]}, its author says {said[o.id] or 'nothing'} ({program.source(o)})" for o in program.graph.walk()
             if not said[o.id] or phases.of[o.id] is not LABELS[said[o.id]]]  # fmt: skip
    assert not wrong, "\n".join(wrong[:10])
    return phases


@pytest.mark.parametrize(("layers", "loop"), FORMS, ids=lambda x: str(x))
@pytest.mark.parametrize("name", MODELS)
def test_every_op_of_a_model_is_of_the_phase_that_its_author_says(name: str, layers: Any, loop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    generation = importlib.import_module(f"models.{name}").generation
    options = {"batch": 2, "prompt": 12, "new_tokens": 6, "layers": layers, "loop": loop}
    phases = agree(*generation("tiny", **options), monkeypatch, lambda: generation("tiny", **options))
    assert phases.batch == 2 and phases.loop is not None


@pytest.mark.parametrize("name", zoo.CASES)
def test_every_op_of_the_zoo_is_of_the_phase_that_its_author_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    agree(*zoo.CASES[name], monkeypatch)


@pytest.mark.parametrize("name", zoo.CASES)
def test_the_zoo_runs_when_cut(name: str) -> None:
    fn, args = zoo.CASES[name]
    program = trace(fn, *args)
    made = plan(program, cluster="trn2_efa_4cs3", policy="random" if len(name) % 2 else "phase_split", trips=6)
    assert check(made.stages, *args).equal


@pytest.mark.parametrize(("name", "policy", "options"), [
    ("mixtral", "phase_split", {"layers": "scanned"}), pytest.param("gemma", "random", {}, marks=pytest.mark.slow), ("deepseek", "phase_split", {"loop": "while"}),
    ("mamba", "random", {"layers": "scanned"}), pytest.param("gpt2", "random", {}, marks=pytest.mark.slow), ("t5", "phase_split", {}),
    pytest.param("t5", "random", {"loop": "fori", "layers": "scanned"}, marks=pytest.mark.slow),
])  # fmt: skip
def test_models_run_when_cut(name: str, policy: str, options: Any) -> None:
    fn, args = importlib.import_module(f"models.{name}").generation("tiny", batch=2, prompt=8, new_tokens=4, seed=0, **options)
    made = plan(fn, args, cluster="trn2_efa_4cs3", policy=policy)
    assert check(made.stages, *args).equal


def test_a_step_of_continuous_batching_is_two_passes() -> None:
    phases = tag(trace(zoo.CASES["continuous"][0], *zoo.CASES["continuous"][1]))
    assert phases.loop is None and phases.handoff == () and [f.confidence for f in phases.findings] == [0.9, 0.9]


def test_hand_offs_of_the_zoo() -> None:
    kinds = {name: sorted(c.kind for c in tag(trace(fn, *args)).handoff) for name, (fn, args) in zoo.CASES.items()}
    assert kinds["plain"] == kinds["unrolled"] == kinds["beam"][:2] + ["value"] == ["cache", "cache", "value"]
    assert kinds["speculative"] == ["cache"] * 4 + ["value"] and kinds["recurrent"] == ["value", "value"]


def reordered(graph: Graph, rng: random.Random) -> Graph:
    """The same graph, bodies of loops included, with its equations in another order that runs."""
    left, known, order = list(graph.ops), set(graph.inputs), []
    made = {t for op in graph.ops for t in op.outputs}
    while left:
        ready = [op for op in left if all(t in known or t not in made for t in op.inputs)]
        op = rng.choice(ready[:40])
        left.remove(op)
        known.update(op.outputs)
        if op.loop is not None:
            op = dataclasses.replace(op, loop=dataclasses.replace(op.loop, body=reordered(op.loop.body, rng)))
        order.append(op)
    return dataclasses.replace(graph, ops=tuple(order))


@pytest.mark.parametrize("name", ["plain", "chunked", "speculative", "unrolled", "quantised", "continuous", "recurrent"])
def test_another_order_of_equations_changes_no_tag(name: str) -> None:
    fn, args = zoo.CASES[name]
    program = trace(fn, *args)
    (entry,) = program.entries
    for seed in range(3):
        lowered = dataclasses.replace(entry.lowered, graph=reordered(program.graph, random.Random(seed)))
        other = dataclasses.replace(program, entries=(dataclasses.replace(entry, lowered=lowered),))
        assert tag(other).of == tag(program).of and tag(other).loop == tag(program).loop


@pytest.mark.parametrize("name", ["plain", "chunked", "unrolled", "speculative", "continuous"])
def test_calls_outlined_change_no_tag(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fn, args = zoo.CASES[name]
    counts = []
    for wrap in (lambda f: f, jax.jit, jax.checkpoint):
        with monkeypatch.context() as patch:
            patch.setattr(zoo, "forward", wrap(zoo.forward))
            program = trace(lambda *a: fn(*a), *args)
        phases = tag(program)
        counts.append(Counter((op.primitive, phases.of[op.id]) for op in program.graph.walk() if op.primitive in CONTRACTIONS))
    assert counts[0] == counts[1] == counts[2]


def test_the_callers_word_wins() -> None:
    fn, args = zoo.CASES["plain"]
    program = trace(fn, *args)
    first = tag(program)
    head = [o.id for o in program.graph.ops if first.of[o.id] is Phase.PREFILL][-1]
    assert tag(program, phases={head: "decode"}).of[head] is Phase.DECODE
    assert all(p is Phase.NONE for n, p in tag(program, phases={"decode": "none"}).of.items() if n in {o.id for o in program.graph.walk() if o.scope.startswith("decode")})
    with pytest.raises(PhaseError, match="needs what decode op"):
        tag(program, phases={program.graph.ops[3].id: "decode"})
    with pytest.raises(PhaseError, match="no op is called 'nowhere'"):
        tag(program, phases={"nowhere": "decode"})
    with pytest.raises(NameUnknownError, match="no phase called 'prefil'"):
        tag(program, phases={head: "prefil"})
