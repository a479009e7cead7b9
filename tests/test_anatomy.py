"""The parts of the models against the scopes that their authors gave them, in both phases and all forms; layers; a long repeat."""

import importlib
import re
from typing import Any

import pytest

from partition.anatomy import Kind, repeats
from partition.loops import CONTRACTIONS
from partition.phases import Phase, Phases, tag
from partition.program import trace

PARTS = {"attn": Kind.ATTENTION, "cross": Kind.ATTENTION, "mixer": Kind.RECURRENT, "router": Kind.ROUTER, "experts": Kind.EXPERTS, "shared": Kind.MLP,
         "mlp": Kind.MLP, "head": Kind.HEAD}  # fmt: skip
LAYERS = {"llama": 3, "mixtral": 2, "gemma": 4, "mamba": 3, "gpt2": 3, "t5": 3, "deepseek": 2}
"""Of the token loop's body; of DeepSeek, whose first layer is dense, those that repeat."""


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
    assert found.kind.keys() == phases.of.keys() == found.layer.keys()
    if name != "gemma" or layers == "unrolled":  # a scan over pairs of layers has half as many trips
        assert found.layers["body"] == LAYERS[name]


@pytest.mark.parametrize("name", ["llama", "gemma", "gpt2", "mixtral"])
def test_prefill_has_the_same_parts(name: str) -> None:
    phases = tagged(name, "unrolled")
    kinds = {p: sorted(str(phases.anatomy.kind[o.id]) for o in phases.ops(p) if o.primitive in CONTRACTIONS) for p in (Phase.PREFILL, Phase.DECODE)}
    assert kinds[Phase.PREFILL] == kinds[Phase.DECODE]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_layers_are_those_of_the_scopes(name: str) -> None:
    phases = tagged(name, "unrolled")
    for op in phases.program.graph.walk():
        said = re.search(r"layers\.(\d+)", op.scope)
        if op.primitive in CONTRACTIONS and phases.of[op.id] in (Phase.PREFILL, Phase.DECODE):
            assert phases.anatomy.layer[op.id] == (int(said[1]) if said else None), op.scope


def test_what_is_no_contraction_has_its_part_too() -> None:
    phases = tagged("llama", "unrolled")
    kinds = phases.anatomy.kind
    of = {p: {kinds[o.id] for o in phases.program.graph.walk() if o.primitive == p} for p in ("argmax", "rsqrt", "dynamic_update_slice", "gather", "logistic", "exp")}
    assert of["argmax"] == {Kind.SAMPLING} and of["rsqrt"] == {Kind.NORM} and of["logistic"] == {Kind.MLP} and of["exp"] == {Kind.ATTENTION}
    assert Kind.STATE in of["dynamic_update_slice"] and Kind.EMBEDDING in of["gather"]


def test_repeats() -> None:
    assert repeats("abcabcabcx") == (0, 3, 3) and repeats("xyababab") == (2, 2, 3) and repeats("abcd") == (0, 1, 1) and repeats("") == (0, 1, 0)
    assert repeats("h" + "qkvo" * 126 + "z") == (1, 4, 126)


@pytest.mark.parametrize("layers", ["unrolled", "scanned"])
def test_what_crosses_is_known_by_layer(layers: str) -> None:
    phases = tagged("llama", layers)
    cache = 2 * 2 * (12 + 4) * 2 * 16 * 4  # keys and values of 2 sequences, 16 places, 2 heads of 16, 4 bytes
    assert {n: b for n, b in phases.handoff_by_layer.items() if n is not None} == {0: cache, 1: cache, 2: cache}
    assert sum(phases.handoff_by_layer.values()) == phases.handoff_bytes
