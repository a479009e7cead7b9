"""The parts and layers of the models against the scopes that their authors gave them, in both phases and all forms, and of other models."""

import dataclasses
import importlib
import random
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from partition.anatomy import Kind
from partition.anatomy.layers import repeats
from partition.loops import CONTRACTIONS
from partition.phases import Phase, Phases, tag
from partition.program import trace
from tests.test_labels import reordered

PARTS = {"attn": Kind.ATTENTION, "cross": Kind.ATTENTION, "mixer": Kind.RECURRENT, "router": Kind.ROUTER, "experts": Kind.EXPERTS, "shared": Kind.MLP,
         "mlp": Kind.MLP, "head": Kind.HEAD}  # fmt: skip
LAYERS = {"llama": [(0, 1, 2)], "mixtral": [(0, 1)], "gemma": [(0, 2), (1, 3)], "mamba": [(0, 1, 2)], "gpt2": [(0, 1, 2)], "t5": [(2, 3, 4)], "deepseek": [(0,), (1, 2)]}
"""The layers of the token loop's body, those that are alike together: Gemma's local and global ones, DeepSeek's first one without experts;
T5's encoder has the first two."""


def tagged(name: str, layers: str, loop: str = "scan") -> Phases:
    fn, args = importlib.import_module(f"models.{name}").generation("tiny", batch=2, prompt=12, new_tokens=4, layers=layers, loop=loop)
    return tag(trace(fn, *args))


@pytest.mark.parametrize("layers", ["unrolled", "scanned"])
@pytest.mark.parametrize("name", LAYERS)
def test_every_contraction_is_the_part_that_its_scope_says(name: str, layers: Any) -> None:
    phases = tagged(name, layers)
    found = phases.anatomy
    wrong, seen = [], set()
    for op in phases.program.graph.walk():
        part = next((PARTS[p] for p in reversed(re.split(r"[/.]", op.scope)) if p in PARTS), None)
        if op.primitive in CONTRACTIONS and part is not None and phases.of[op.id] is Phase.DECODE:
            seen.add(part)
            if found.kind[op.id] is not part:
                wrong.append(f"{op.scope} {op.primitive}: {found.kind[op.id]}")
    assert not wrong and Kind.HEAD in seen and len(seen) >= 2
    assert found.kind.keys() == phases.of.keys() == found.layer.keys() == found.why.keys()
    assert list(found.layers.classes["body"]) == LAYERS[name]
    assert found.layers.counts == {"top": 5 if name == "t5" else sum(map(len, LAYERS[name])), "body": sum(map(len, LAYERS[name]))}


@pytest.mark.parametrize("name", ["llama", "gemma", "gpt2", "mixtral"])
def test_prefill_has_the_same_parts(name: str) -> None:
    phases = tagged(name, "unrolled")
    kinds = {p: sorted(str(phases.anatomy.kind[o.id]) for o in phases.ops(p) if o.primitive in CONTRACTIONS) for p in (Phase.PREFILL, Phase.DECODE)}
    assert kinds[Phase.PREFILL] == kinds[Phase.DECODE]


@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_those_of_the_scopes(name: str) -> None:
    phases = tagged(name, "unrolled")
    for op in phases.program.graph.walk():
        said = re.search(r"(\w*)/?(?:layers|blocks)\.(\d+)", op.scope)
        if op.primitive in CONTRACTIONS and phases.of[op.id] in (Phase.PREFILL, Phase.DECODE) and (said or phases.anatomy.kind[op.id] is Kind.HEAD):
            assert phases.anatomy.layer[op.id] == (int(said[2]) + 2 * (said[1] == "decoder") if said else None), op.scope


@pytest.mark.parametrize("name", ["llama", "t5", "deepseek"])
def test_anatomy_does_not_depend_on_the_order_of_equations(name: str) -> None:
    phases = tagged(name, "unrolled")
    for seed in range(3):
        graph = reordered(phases.program.graph, random.Random(seed))
        entry = phases.program.entry
        program = dataclasses.replace(phases.program, entries=(dataclasses.replace(entry, lowered=dataclasses.replace(entry.lowered, graph=graph)),))
        found = tag(program).anatomy
        assert found.layers == phases.anatomy.layers and found.layers.classes == phases.anatomy.layers.classes and found.kind == phases.anatomy.kind


def attention(w: Any, x: Any) -> Any:
    q, k, v = x @ w["q"], x @ w["k"], x @ w["v"]
    return x + jax.nn.softmax(q @ k.T) @ v @ w["o"]


def mlp(w: Any, x: Any) -> Any:
    return x + jax.nn.relu(x @ w["u"]) @ w["d"]


def recurrence(w: Any, x: Any) -> Any:
    """A linear recurrence as two activations that meet: x (q k^T, decayed) v."""
    return x + (jnp.tril((x @ w["q"]) @ (x @ w["k"]).T) @ (x @ w["v"])) @ w["o"]


def stacked(*kinds: Any, head: bool = True) -> Any:
    """A model of these parts, all of the same width: [S] tokens -> [S, V]."""
    rng = np.random.default_rng(0)
    shapes = {"q": (16, 16), "k": (16, 16), "v": (16, 16), "o": (16, 16), "u": (16, 32), "d": (32, 16)}
    weights = [{n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()} for _ in kinds]

    def model(w: Any, tokens: Any) -> Any:
        x = w["e"][tokens]
        for n, kind in enumerate(kinds):
            with jax.named_scope(f"part.{n}"):
                x = kind(w["parts"][n], x)
        return x @ w["e"].T if head else x

    return tag(trace(model, {"e": rng.standard_normal((32, 16)).astype(np.float32), "parts": weights}, np.arange(6)))


@pytest.mark.parametrize(
    "kinds, classes",
    [
        ((attention, mlp), [(0,)]),
        ((attention, mlp) * 3, [(0, 1, 2)]),
        ((recurrence, mlp, recurrence, mlp, attention, mlp) * 2, [(0, 1, 3, 4), (2, 5)]),
        ((recurrence,) * 4, [(0, 1, 2, 3)]),
        ((attention,) * 4, [(0, 1, 2, 3)]),
        ((mlp,) * 3, [(0, 1, 2)]),
        ((mlp, attention, mlp, attention, mlp), [(0, 1)]),
        ((attention, attention, mlp) * 2, [(0, 1)]),  # to itself and to another sequence, as decoders have it
    ],
)  # fmt: skip
def test_layers_of_many_kinds_of_models(kinds: Any, classes: Any) -> None:
    assert list(stacked(*kinds).anatomy.layers.classes["top"]) == classes


def test_every_part_has_its_reason() -> None:
    found = tagged("mixtral", "unrolled").anatomy
    assert all(reason and confidence in (0.6, 0.9) for reason, confidence in found.why.values())
    text = str(found)
    assert "body: 2 layers, alike: 0, 1" in text and "router: " in text and "chooses among the results" in text


def test_what_is_no_contraction_has_its_part_too() -> None:
    phases = tagged("llama", "unrolled")
    kinds = phases.anatomy.kind
    of = {p: {kinds[o.id] for o in phases.program.graph.walk() if o.primitive == p} for p in ("argmax", "rsqrt", "dynamic_update_slice", "gather", "logistic", "exp")}
    assert of["argmax"] == {Kind.SAMPLING} and of["rsqrt"] == {Kind.NORM} and of["logistic"] == {Kind.MLP} and of["exp"] == {Kind.ATTENTION}
    assert Kind.STATE in of["dynamic_update_slice"] and Kind.EMBEDDING in of["gather"]


def test_repeats() -> None:
    def found(signs: str, ends: str = "", mixers: str = "") -> tuple[int, int, int]:
        """Layers may end after any of `ends`, or everywhere."""
        return repeats(signs, [not ends or s in ends for s in signs[:-1]], [s in mixers for s in signs])

    assert found("abcabcabcx") == (0, 3, 3) and found("xyababab") == (2, 2, 3) and found("abcd") == (0, 1, 1) and found("") == (0, 1, 0)
    assert found("h" + "qkvo" * 126 + "z") == (1, 4, 126)
    assert found("aaaa", ends="b") == (0, 1, 1) and found("babababc", ends="b") == (1, 2, 3) and found("dqdqdqd", mixers="q") == (1, 2, 3)


@pytest.mark.parametrize("layers", ["unrolled", "scanned"])
def test_what_crosses_is_known_by_layer(layers: str) -> None:
    phases = tagged("llama", layers)
    cache = 2 * 2 * (12 + 4) * 2 * 16 * 4  # keys and values of 2 sequences, 16 places, 2 heads of 16, 4 bytes
    assert {n: b for n, b in phases.handoff_by_layer.items() if n is not None} == {0: cache, 1: cache, 2: cache}
    assert sum(phases.handoff_by_layer.values()) == phases.handoff_bytes
