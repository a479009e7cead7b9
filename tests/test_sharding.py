"""Sharding: Megatron's layout of Llama comes out, what does not divide is repeated, and memory counts the copies."""

from __future__ import annotations

import dataclasses
import functools
import math
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
from partition.sharding import Layout, layout, narrowed, parallelism

PROMPT = 16
ODD = llama.Config(vocab=256, dim=72, layers=2, heads=9, kv_heads=3, head_dim=8, ffn=96, dtype="float32")  # heads as in SmolLM2


@functools.cache
def prefill(name: str, form: str = "unrolled") -> Program:
    cfg = ODD if name == "odd" else llama.config(name)
    graphdef, state = nnx.split(llama.Llama(cfg, generate.shapes(cfg.dtype), scanned=form == "scanned"))
    return trace(lambda w, t: nnx.merge(graphdef, w).prefill(t, PROMPT), state, jax.ShapeDtypeStruct((1, PROMPT), jnp.int32))


def tensor(program: Program, degree: int) -> Layout:
    """Split along the weights."""
    return layout(program.graph, degree, tensor=True)


def waits(program: Program, split: Layout) -> list[tuple[Op, str, float, int]]:
    return [(program.op[i], *c) for i, cs in split.collectives.items() for c in cs]


def weights(program: Program) -> dict[str, int]:
    tensors = program.graph.tensors
    return {tensors[t].name: t for t in program.graph.inputs if tensors[t].role is Role.PARAM}


def test_the_matrices_of_experts_are_split_like_any() -> None:
    from models import mixtral

    fn, args = mixtral.generation("tiny", prompt=PROMPT, new_tokens=2)
    program = trace(fn, *args)
    split = tensor(program, 2)
    ragged = [o for o in program.graph.walk() if o.primitive == "ragged_dot_general"]
    assert ragged and {split.ways[o.id] for o in ragged} == {2}
    kinds = [[kind for kind, *_ in split.collectives.get(o.id, ())] for o in ragged[:3]]  # gate, up, down
    assert kinds == [[], [], ["all_reduce"]]
    assert all(split.tensors[o.inputs[1]][0] in ((1,), (2,)) for o in ragged[:3])


def test_one_device_splits_nothing() -> None:
    split = layout(prefill("tiny").graph, 1)
    assert not split.tensors and not split.ways and not split.collectives and split.copies(0) == 1.0


@pytest.mark.parametrize("degree", [2, 4])
def test_two_all_reduces_a_layer_and_no_other_collective_in_it(degree: int) -> None:
    program = prefill("tiny")
    inside = [w for w in waits(program, tensor(program, degree)) if w[0].scope.startswith("layers.")]
    assert Counter((op.scope, op.primitive, kind) for op, kind, *_ in inside) == {
        (f"layers.{i}/{part}", "dot_general", "all_reduce"): 1 for i in range(3) for part in ("attn", "mlp")
    }
    # each of the whole residual stream, [1, 16, 64] in float32, over all devices
    assert {nbytes for *_, nbytes, _ in inside} == {16 * 64 * 4} and degree in {n for *_, n in inside}


def test_two_all_reduces_in_the_body_of_a_layer_scan() -> None:
    program = prefill("tiny", "scanned")
    (scan,) = [o for o in program.graph.ops if o.loop]
    assert scan.loop is not None
    body = {o.id for o in scan.loop.body.walk()}
    inside = [w for w in waits(program, tensor(program, 2)) if w[0].id in body]
    assert [kind for _, kind, *_ in inside] == ["all_reduce"] * 2


@pytest.mark.parametrize("form", ["unrolled", "scanned"])
def test_weights_are_split_by_columns_and_then_by_rows(form: str) -> None:
    program = prefill("tiny", form)
    split, names = tensor(program, 2), weights(program)
    first = "blocks.0." if form == "unrolled" else "blocks."
    stacked = form == "scanned"
    for name, dim in {"attn.q": 1, "attn.k": 1, "attn.v": 1, "attn.o": 0, "mlp.gate": 1, "mlp.up": 1, "mlp.down": 0}.items():
        assert split.tensors[names[f"{first}{name}.kernel"]] == ((dim + stacked,), 2), name
    assert names[f"{first}attn_norm.scale"] not in split.tensors


def test_work_is_split_where_the_weights_are() -> None:
    program = prefill("tiny")
    split = tensor(program, 2)
    layers = [o for o in program.graph.ops if o.primitive == "dot_general" and o.scope.startswith("layers.")]
    assert len(layers) == 27 and {split.ways[o.id] for o in layers} == {2}


def test_heads_that_do_not_divide_are_dealt_out_whole() -> None:
    """9 heads and 3 key/value heads on 2 devices: 5 and 4, 2 and 1, so the fullest does 5 of 9; still two all-reduces a layer."""
    program = prefill("odd")
    split, names = tensor(program, 2), weights(program)
    assert split.copies(names["blocks.0.attn.q.kernel"]) == pytest.approx(2 / (9 / 5)) or split.copies(names["blocks.0.attn.q.kernel"]) == pytest.approx(2 / (3 / 2))
    assert split.copies(names["blocks.0.attn.k.kernel"]) == pytest.approx(2 / (3 / 2))
    for name in ("gate", "up", "down"):
        assert split.copies(names[f"blocks.0.mlp.{name}.kernel"]) == 1.0
    scores = [o for o in program.graph.ops if o.primitive == "dot_general" and len(program.graph.tensors[o.outputs[0]].shape) == 5]
    assert len(scores) == 2 * 2 and all(1 < split.ways[o.id] < 2 for o in scores)
    inside = [w for w in waits(program, split) if w[0].scope.startswith("layers.")]
    assert Counter(kind for _, kind, *_ in inside) == {"all_reduce": 2 * 2}


def test_heads_that_are_fewer_than_the_devices_are_held_by_several() -> None:
    """3 key/value heads on 6 devices: three pieces, so that the weights of k and v lie in the mesh twice."""
    program = prefill("odd")
    split, names = tensor(program, 6), weights(program)
    for name in ("k", "v"):
        assert split.tensors[names[f"blocks.0.attn.{name}.kernel"]] == ((1,), 3)
        assert split.copies(names[f"blocks.0.attn.{name}.kernel"]) == 2.0
    assert split.copies(names["blocks.0.attn.q.kernel"]) in (pytest.approx(6 / (9 / 2)), 2.0)
    assert split.copies(names["blocks.0.mlp.up.kernel"]) == 1.0


@pytest.mark.parametrize(("degree", "copies"), [(2, 1.0), (4, 2.0), (8, 4.0)])
def test_the_cache_has_as_many_copies_as_devices_share_a_head(degree: int, copies: float) -> None:
    fn, args = llama.generation("tiny", prompt=PROMPT, new_tokens=8)  # 2 key/value heads
    phases = tag(trace(fn, *args))
    split = tensor(phases.program, degree)
    caches = [c.tensor for c in phases.handoff if c.kind == "cache"]
    assert len(caches) == 6 and {split.copies(t) for t in caches} == {copies}
    assert {split.copies(c.tensor) for c in phases.handoff if c.kind == "value"} == {float(degree)}


@pytest.mark.parametrize("degree", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("name", ["tiny", "odd"])
def test_stand_ins_hold_what_divides(name: str, degree: int) -> None:
    program = prefill(name)
    wide, tensors = tensor(program, 2 * degree), program.graph.tensors
    split = narrowed(wide, program.graph, degree)
    assert split.degree == degree and set(split.tensors) <= set(wide.tensors)
    for t, (dims, pieces) in split.tensors.items():
        assert math.prod(tensors[t].shape[d] for d in dims) % pieces == 0 and degree % pieces == 0 and pieces > 1


@pytest.mark.parametrize("degree", [2, 3, 5, 8, 24])
@pytest.mark.parametrize("name", ["tiny", "odd"])
def test_nothing_is_spread_over_more_devices_than_there_are(name: str, degree: int) -> None:
    program = prefill(name)
    for split in (tensor(program, degree), layout(program.graph, degree)):
        assert all(1 < n <= degree for n in split.ways.values())
        assert all(1 < n <= degree and nbytes > 0 for *_, nbytes, n in waits(program, split))
        held = sum(program.graph.tensors[t].nbytes * split.copies(t) for t in weights(program).values())
        assert program.weight_bytes <= held <= degree * program.weight_bytes


def two_matmuls(rows: int = 4) -> Program:
    big: Any = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    return trace(lambda w, x: x + (x @ w["up"]) @ w["down"], {"up": big, "down": big}, jax.ShapeDtypeStruct((rows, 64), jnp.float32))


def test_a_contraction_over_a_split_dimension_waits_once() -> None:
    """Columns, then rows with an all-reduce of the result; or what lies between is gathered, where that is less."""
    program = two_matmuls()
    split = tensor(program, 4)
    up, down, _ = program.graph.ops
    assert split.tensors[up.outputs[0]] == ((1,), 4) and split.ways[up.id] == split.ways[down.id] == 4
    assert dict(split.collectives) in ({down.id: (("all_reduce", 1024, 4),)}, {down.id: (("all_gather", 1024, 4),)})


def test_the_search_finds_what_trying_everything_finds() -> None:
    """Two chained contractions and a residual, by hand: each along rows, columns or the contracted factor, with what it must wait for."""
    program = two_matmuls()
    up, down, add = program.graph.ops
    seconds, alpha, best = {up.id: 3e-5, down.id: 5e-5, add.id: 0.0}, 1e-6, []

    def collective(kind: str, nbytes: float, devices: int) -> float:
        return alpha * {"all_gather": 1, "reduce_scatter": 1, "all_to_all": 1, "all_reduce": 3}[kind]

    for a in ("whole", "rows", "columns", "sum"):
        for b in ("whole", "rows", "columns", "sum", "sum, scattered"):
            first = seconds[up.id] / (1 if a == "whole" else 4) + (3 * alpha if a == "sum" else 0)
            have = {"whole": "whole", "rows": "rows", "columns": "columns", "sum": "whole"}[a]
            want = {"whole": "whole", "rows": "rows", "columns": "whole"}.get(b, "columns")
            between = 0.0 if have in (want, "whole") else alpha
            second = seconds[down.id] / (1 if b == "whole" else 4) + {"sum": 3 * alpha, "sum, scattered": alpha}.get(b, 0.0)
            best.append(first + between + second)  # x is an input and lies as is wanted: the residual costs nothing
    made = layout(program.graph, 4, seconds, collective)
    found = sum(seconds[i] / made.ways.get(i, 1) for i in seconds) + sum(collective(*c) for cs in made.collectives.values() for c in cs)
    assert made.exact and found == pytest.approx(min(best))


def test_layers_that_repeat_are_searched_once() -> None:
    """Twelve layers are split like three: a step that was made from the same states is not made again."""
    split = {}
    for layers in (4, 12):
        cfg = dataclasses.replace(llama.config("tiny"), layers=layers)
        graphdef, state = nnx.split(llama.Llama(cfg, generate.shapes(cfg.dtype)))
        program = trace(lambda w, t, g=graphdef: nnx.merge(g, w).prefill(t, PROMPT), state, jax.ShapeDtypeStruct((1, PROMPT), jnp.int32))
        made = tensor(program, 4)
        split[layers] = {n: made.tensors.get(t) for n, t in weights(program).items()}
    assert all(split[12][n] == w for n, w in split[4].items() if not n.startswith("blocks.3"))


def test_weights_that_do_not_fit_whole_are_split() -> None:
    fn, args = llama.generation("tiny", prompt=PROMPT, new_tokens=8)
    program = trace(fn, *args)
    slow = lambda kind, nbytes, devices: 1e-4  # noqa: E731
    held = {}
    for capacity in (math.inf, program.weight_bytes / 2):
        made = layout(program.graph, 4, None, slow, capacity=capacity)
        held[capacity] = sum(program.graph.tensors[t].nbytes * made.copies(t) / 4 for t in weights(program).values())
    assert held[math.inf] > program.weight_bytes / 2 >= held[program.weight_bytes / 2]


def test_the_parallelism_of_a_layout_has_a_name() -> None:
    program = prefill("tiny")
    assert parallelism(tensor(program, 2), program.graph)["tensor"] == 3 * 7 + 1
    assert parallelism(layout(program.graph, 2, None, lambda *_: 1.0), program.graph)["tensor"] <= 1  # the head alone: who waits for its result?


def test_a_plan_says_how_its_meshes_are_split() -> None:
    import partition as pt

    fn, args = llama.generation("tiny", prompt=PROMPT, new_tokens=8, seed=0, layers="scanned")
    plan = pt.plan(fn, args, cluster="trn2_efa_cs3", sharding="tensor", policy="phase_split")
    assert "trn2 splits 64 ways: " in str(plan) and "contractions with weights tensor" in str(plan)


@pytest.mark.parametrize("way", ["search", "tensor"])
def test_an_op_on_what_is_never_split_is_not_taken_for_one_that_may_be(way: str) -> None:
    from partition.problem import pose

    def fn(w, x):  # type: ignore[no-untyped-def]
        split = jax.lax.scan(lambda c, _: (jnp.tanh(c @ w), None), x, None, length=2)[0]
        whole = jax.lax.cond(x[0, 0] > 0, lambda v: v * 2, lambda v: v * 3, x)  # what branches give lies whole
        first, other = jnp.sin(whole), jnp.sin(split)
        return first * 2, other @ w

    problem = pose(tag(trace(fn, jnp.eye(8), jnp.ones((8, 8))), loop="none"), "trn2_efa_4cs3", sharding=way)
    assert problem.layouts is not None
