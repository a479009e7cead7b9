"""Sharding: Megatron's layout of Llama comes out, what does not divide is repeated, and memory counts the copies."""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from models import generate, llama
from partition.graph import Op, Role
from partition.phases import tag
from partition.program import Program, trace
from partition.sharding import Layout, layout

PROMPT = 16
ODD = llama.Config(vocab=256, dim=72, layers=2, heads=9, kv_heads=3, head_dim=8, ffn=96, dtype="float32")  # heads as in SmolLM2


@functools.cache
def prefill(name: str, form: str = "unrolled") -> Program:
    cfg = ODD if name == "odd" else llama.config(name)
    graphdef, state = nnx.split(llama.Llama(cfg, generate.shapes(cfg.dtype), scanned=form == "scanned"))
    return trace(lambda w, t: nnx.merge(graphdef, w).prefill(t, PROMPT), state, jax.ShapeDtypeStruct((1, PROMPT), jnp.int32))


def waits(program: Program, split: Layout) -> list[tuple[Op, str, float, int]]:
    return [(program.op[i], *c) for i, cs in split.collectives.items() for c in cs]


def weights(program: Program) -> dict[str, int]:
    tensors = program.graph.tensors
    return {tensors[t].name: t for t in program.graph.inputs if tensors[t].role is Role.PARAM}


def test_the_matrices_of_experts_are_split_like_any() -> None:
    from models import mixtral

    fn, args = mixtral.generation("tiny", prompt=PROMPT, new_tokens=2)
    program = trace(fn, *args)
    split = layout(program.graph, 2)
    ragged = [o for o in program.graph.walk() if o.primitive == "ragged_dot_general"]
    assert ragged and {split.ways[o.id] for o in ragged} == {2}
    kinds = [[kind for kind, *_ in split.collectives.get(o.id, ())] for o in ragged[:3]]  # gate, up, down
    assert kinds == [[], [], ["all_reduce"]]
    assert all(split.tensors[o.inputs[1]][0] in (1, 2) for o in ragged[:3])


def test_one_device_splits_nothing() -> None:
    split = layout(prefill("tiny").graph, 1)
    assert not split.tensors and not split.ways and not split.collectives and split.copies(0) == 1.0


@pytest.mark.parametrize("degree", [2, 4])
def test_two_all_reduces_a_layer_and_no_other_collective_in_it(degree: int) -> None:
    program = prefill("tiny")
    inside = [w for w in waits(program, layout(program.graph, degree)) if w[0].scope.startswith("layers.")]
    assert Counter((op.scope, op.primitive, kind) for op, kind, *_ in inside) == {
        (f"layers.{i}/{part}", "dot_general", "all_reduce"): 1 for i in range(3) for part in ("attn", "mlp")
    }
    # each of the whole residual stream, [1, 16, 64] in float32, over all devices
    assert {(nbytes, n) for *_, nbytes, n in inside} == {(16 * 64 * 4, degree)}


def test_two_all_reduces_in_the_body_of_a_layer_scan() -> None:
    program = prefill("tiny", "scanned")
    (scan,) = [o for o in program.graph.ops if o.loop]
    assert scan.loop is not None
    body = {o.id for o in scan.loop.body.walk()}
    inside = [w for w in waits(program, layout(program.graph, 2)) if w[0].id in body]
    assert [kind for _, kind, *_ in inside] == ["all_reduce"] * 2


@pytest.mark.parametrize("form", ["unrolled", "scanned"])
def test_weights_are_split_by_columns_and_then_by_rows(form: str) -> None:
    program = prefill("tiny", form)
    split, names = layout(program.graph, 2), weights(program)
    first = "blocks.0." if form == "unrolled" else "blocks."
    stacked = form == "scanned"
    for name, dim in {"attn.q": 1, "attn.k": 1, "attn.v": 1, "attn.o": 0, "mlp.gate": 1, "mlp.up": 1, "mlp.down": 0}.items():
        assert split.tensors[names[f"{first}{name}.kernel"]] == (dim + stacked, 2), name
    assert names[f"{first}attn_norm.scale"] not in split.tensors


def test_work_is_split_where_the_weights_are() -> None:
    program = prefill("tiny")
    split = layout(program.graph, 2)
    layers = [o for o in program.graph.ops if o.primitive == "dot_general" and o.scope.startswith("layers.")]
    assert len(layers) == 27 and {split.ways[o.id] for o in layers} == {2}


def test_heads_that_do_not_divide_are_replicated_and_the_rest_is_split() -> None:
    """9 heads and 3 key/value heads on 2 devices: attention one way, the MLP two; still two all-reduces a layer."""
    program = prefill("odd")
    split, names = layout(program.graph, 2), weights(program)
    for name in ("q", "k", "v"):
        assert split.copies(names[f"blocks.0.attn.{name}.kernel"]) == 2.0
    for name in ("gate", "up", "down"):
        assert split.copies(names[f"blocks.0.mlp.{name}.kernel"]) == 1.0
    scores = [o for o in program.graph.ops if o.primitive == "dot_general" and len(program.graph.tensors[o.outputs[0]].shape) == 5]
    assert len(scores) == 2 * 2 and all(split.ways.get(o.id, 1) == 1 for o in scores)
    inside = [w for w in waits(program, split) if w[0].scope.startswith("layers.")]
    assert Counter(kind for _, kind, *_ in inside) == {"all_reduce": 2 * 2}


def test_heads_that_divide_in_part_are_split_that_far() -> None:
    """3 key/value heads on 6 devices: three ways, so that every weight of q, k, v lies in the mesh twice."""
    program = prefill("odd")
    split, names = layout(program.graph, 6), weights(program)
    for name in ("q", "k", "v"):
        assert split.tensors[names[f"blocks.0.attn.{name}.kernel"]] == (1, 3)
        assert split.copies(names[f"blocks.0.attn.{name}.kernel"]) == 2.0
    assert split.copies(names["blocks.0.mlp.up.kernel"]) == 1.0


@pytest.mark.parametrize(("degree", "copies"), [(2, 1.0), (4, 2.0), (8, 4.0)])
def test_the_cache_has_as_many_copies_as_devices_share_a_head(degree: int, copies: float) -> None:
    fn, args = llama.generation("tiny", prompt=PROMPT, new_tokens=8)  # 2 key/value heads
    phases = tag(trace(fn, *args))
    split = layout(phases.program.graph, degree)
    caches = [c.tensor for c in phases.handoff if c.kind == "cache"]
    assert len(caches) == 6 and {split.copies(t) for t in caches} == {copies}
    assert {split.copies(c.tensor) for c in phases.handoff if c.kind == "value"} == {float(degree)}


@pytest.mark.parametrize("degree", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("name", ["tiny", "odd"])
def test_splits_divide_their_dimension_and_the_mesh(name: str, degree: int) -> None:
    program = prefill(name)
    split, tensors = layout(program.graph, degree), program.graph.tensors
    for t, (dim, ways) in split.tensors.items():
        assert tensors[t].shape[dim] % ways == 0 and degree % ways == 0 and ways > 1
    assert all(degree % n == 0 for n in split.ways.values())
    assert all(n > 1 and degree % n == 0 and nbytes > 0 for *_, nbytes, n in waits(program, split))
    held = sum(tensors[t].nbytes * split.copies(t) for t in weights(program).values())
    assert program.weight_bytes <= held <= degree * program.weight_bytes


def test_a_contraction_over_a_split_dimension_is_an_all_reduce_of_its_result() -> None:
    big: Any = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    program = trace(lambda w, x: (x @ w["up"]) @ w["down"], {"up": big, "down": big}, jax.ShapeDtypeStruct((4, 64), jnp.float32))
    split = layout(program.graph, 4)
    up, down = program.graph.ops
    assert split.tensors[up.outputs[0]] == (1, 4) and down.outputs[0] not in split.tensors
    assert dict(split.collectives) == {down.id: (("all_reduce", 4 * 64 * 4, 4),)}
