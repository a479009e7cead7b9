"""Blocks: a topological order that loses no op and mixes no phases, cut where little is alive, layers of a scan one by one."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from models import llama
from partition.coarsen import Block, coarsen, late_statics, layer_scan, share, valleys
from partition.graph import Op, bodies
from partition.loops import CONTRACTIONS
from partition.phases import Phase, Phases, is_weight, tag
from partition.program import trace

FORMS = list(itertools.product(("unrolled", "scanned"), ("scan", "while"), ("block", "op")))


def struct(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


@functools.cache
def blocks_of(layers: str, loop: str, level: str) -> tuple[Phases, tuple[Block, ...]]:
    fn, args = llama.generation("tiny", prompt=16, new_tokens=8, layers=layers, loop=loop)  # type: ignore[arg-type]
    phases = tag(trace(fn, *args))
    return phases, coarsen(phases, level=level)  # type: ignore[arg-type]


@pytest.fixture(params=FORMS, ids=lambda f: "-".join(f))
def made(request: pytest.FixtureRequest) -> tuple[Phases, tuple[Block, ...]]:
    return blocks_of(*request.param)


Made = tuple[Phases, tuple[Block, ...]]


def placed(phases: Phases) -> list[tuple[str, Op]]:
    """What must stand in blocks: the top level without the token loop, and the loop's condition and body."""
    loop = phases.token_loop
    assert loop is not None and loop.loop is not None
    out = [("top", op) for op in phases.program.graph.ops if op is not loop] + [("body", op) for op in loop.loop.body.ops]
    return out + ([("cond", op) for op in loop.loop.cond.ops] if loop.loop.cond is not None else [])


def test_every_op_is_in_exactly_one_block(made: Made) -> None:
    phases, blocks = made
    whole = Counter((b.region, op.id) for b in blocks for op, span in b.items if span is None)
    parts: dict[tuple[str, int], list[tuple[int, int]]] = {}
    for b in blocks:
        for op, span in b.items:
            if span is not None:
                parts.setdefault((b.region, op.id), []).append(span)
    expected = placed(phases)
    assert {*whole, *parts} == {(region, op.id) for region, op in expected} and whole.keys().isdisjoint(parts)
    assert set(whole.values()) == {1}
    for (_, i), spans in parts.items():
        assert spans == [(n, n + 1) for n in range(3)], i  # in order, each iteration once
    assert all(b.items for b in blocks)


def test_order_is_topological(made: Made) -> None:
    phases, blocks = made
    loop = phases.token_loop
    assert loop is not None and loop.loop is not None
    graphs = {"top": phases.program.graph, "cond": loop.loop.cond, "body": loop.loop.body}
    for region, graph in graphs.items():
        if graph is None:
            continue
        seen: set[int] = set()
        for b in blocks:
            if b.region != region:
                continue
            for op, _ in b.items:
                makers = {m.id for t in op.inputs if (m := graph.producer.get(t)) is not None and m is not loop}
                assert makers - {op.id} <= seen, (region, op)
                seen.add(op.id)


def test_what_precedes_the_loop_stands_before_it_and_what_follows_after_it(made: Made) -> None:
    import networkx as nx

    phases, blocks = made
    inside = [n for n, b in enumerate(blocks) if b.region != "top"]
    assert inside == list(range(inside[0], inside[-1] + 1))
    follows = nx.descendants(phases.program.graph.nx, phases.loop)
    for n, b in enumerate(blocks):
        if b.region == "top":
            assert {op.id in follows for op, _ in b.items} == {n > inside[-1]}


def test_blocks_are_of_one_phase(made: Made) -> None:
    phases, blocks = made
    for b in blocks:
        assert {phases.of[op.id] for op, _ in b.items} == {b.phase}
    assert {b.phase for b in blocks if b.region != "top"} == {Phase.DECODE}


@pytest.mark.parametrize("loop", ["scan", "while"])
def test_level_op_makes_every_op_a_block(loop: str) -> None:
    phases, blocks = blocks_of("unrolled", loop, "op")
    blocks = tuple(b for b in blocks if b.region != "cond")  # a condition is decided in one place
    assert {len(b.items) for b in blocks} == {1} and len(blocks) == sum(region != "cond" for region, _ in placed(phases))


@pytest.mark.parametrize("loop", ["scan", "while"])
def test_an_unrolled_llama_is_cut_between_attention_and_mlp(loop: str) -> None:
    _, blocks = blocks_of("unrolled", loop, "block")
    parts = [f"layers.{i}/{part}" for i in range(3) for part in ("attn", "mlp")] + ["head"]
    for region, phase in (("top", Phase.PREFILL), ("body", Phase.DECODE)):
        mine = [b for b in blocks if b.region == region and b.phase is phase]
        assert [b.scope for b in mine if any(op.primitive in CONTRACTIONS for op, _ in b.items)] == [f"{phase}/{part}" for part in parts]


@pytest.mark.parametrize("loop", ["scan", "while"])
def test_scanned_layers_are_one_block_an_iteration(loop: str) -> None:
    phases, blocks = blocks_of("scanned", loop, "block")
    for region, phase in (("top", "prefill"), ("body", "decode")):
        spans = [(len(b.items), b.items[0][1], b.scope) for b in blocks if b.region == region and b.items[0][1] is not None]
        assert spans == [(1, (i, i + 1), f"{phase}/layers[{i}:{i + 1}]") for i in range(3)]
    scans = [op for _, op in placed(phases) if op.loop is not None]
    assert len(scans) == 2 and all(layer_scan(op, is_weight(phases.program)) for op in scans)


@pytest.mark.parametrize("layers", ["unrolled", "scanned"])
def test_shares_of_the_blocks_add_up_to_every_op(layers: str) -> None:
    phases, blocks = blocks_of(layers, "scan", "block")
    value = lambda op: float(op.id + 1)  # noqa: E731
    assert sum(value(op) * share(op, span) for b in blocks for op, span in b.items) == pytest.approx(sum(value(op) for _, op in placed(phases)))


def test_a_scan_that_slices_no_weights_is_not_cut() -> None:
    def fn(w: jax.Array, x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda c, row: (jnp.tanh(c @ w) + row, None), x[0], x)[0]

    phases = tag(trace(fn, struct(8, 8), struct(4, 8)))
    (scan,) = [op for op in phases.program.graph.ops if op.loop]
    assert not layer_scan(scan, is_weight(phases.program))
    assert {span for b in coarsen(phases) for _, span in b.items} == {None}


def test_statics_stand_just_before_their_first_reader() -> None:
    """All weights are made ready first, and read one by one later: in the order, each waits for its reader."""

    def fn(w: list[jax.Array], x: jax.Array) -> jax.Array:
        ready = [jnp.exp(jnp.sin(v)) for v in w]
        for v in ready:
            x = jnp.tanh(x @ v)
        return x + jnp.cos(ready[0])[0]  # cos is static too

    graph = trace(fn, [struct(8, 8)] * 3, struct(4, 8)).graph
    moving = {graph.inputs[-1]}
    order = late_statics(graph.ops, moving)
    assert [o.primitive for o in order if o.primitive in ("exp", "sin", "dot_general", "tanh", "cos")] == [
        *["sin", "exp", "dot_general", "tanh"] * 3, "cos"]  # fmt: skip
    assert Counter(o.id for o in order) == Counter(o.id for o in graph.ops)
    moves = set(moving)
    for op in graph.ops:
        moves.update(op.outputs if not moves.isdisjoint(op.inputs) else ())
    place = {op.id: n for n, op in enumerate(order)}
    for op in order:
        if moves.isdisjoint(op.outputs):
            first = min(place[r.id] for r in order if set(op.outputs) & set(r.inputs))
            assert place[op.id] < first
            assert all(moves.isdisjoint(o.outputs) for o in order[place[op.id] : first])  # nothing but statics between


def test_statics_stand_before_their_first_reader_in_blocks(made: Made) -> None:
    """Ops of the prompt's side that depend on no input (masks, angles) are never behind, nor blocks before, their reader."""
    phases, blocks = made
    graph = phases.program.graph
    moves = {t for t in graph.inputs if graph.tensors[t].role.value == "input"}
    for op in graph.ops:
        moves.update(op.outputs if not moves.isdisjoint(op.inputs) else ())
    order = [op for b in blocks if b.region == "top" for op, span in b.items if span is None or span[0] == 0]
    statics = [n for n, op in enumerate(order) if moves.isdisjoint(op.outputs)]
    assert statics
    for n in statics:
        readers = [m for m, op in enumerate(order) if set(order[n].outputs) & set(op.inputs)]
        assert all(m > n for m in readers)
        if readers and phases.of[order[n].id] is Phase.PREFILL:
            assert all(moves.isdisjoint(op.outputs) for op in order[n : min(readers)])


def test_valleys_are_cut_where_little_is_alive() -> None:
    """[4] -> [64] -> [4] -> [64] -> [4] by four matmuls: 256, 16, 256 bytes alive, so the cut is after the second."""

    def fn(w: Any, x: jax.Array) -> jax.Array:
        return x @ w["up"] @ w["down"] @ w["up"] @ w["down"]

    graph = trace(fn, {"up": struct(4, 64), "down": struct(64, 4)}, struct(4)).graph
    assert [[o.id for o in piece] for piece in valleys(graph.ops, graph.tensors)] == [[0, 1], [2, 3]]


def test_a_program_without_a_token_loop_is_one_region() -> None:
    fn = lambda w, x: jnp.tanh(x @ w)  # noqa: E731
    phases = tag(trace(fn, struct(8, 8), struct(4, 8)))
    blocks = coarsen(phases)
    assert {(b.region, b.phase) for b in blocks} == {("top", Phase.PREFILL)}
    assert [op for b in blocks for op, _ in b.items] == list(phases.program.graph.ops)
    assert not any(bodies(op) for b in blocks for op, _ in b.items)


def test_a_second_turn_of_a_chat_is_prefill_that_follows_decode() -> None:
    """Its prompt reads what the first token loop made: blocks go through the phases twice, and whatever their placement, the cut runs."""
    import numpy as np

    from partition import profiles
    from partition.equivalence import check
    from partition.problem import pose
    from partition.stages import cut

    w = np.random.default_rng(0).standard_normal((8, 8)).astype(np.float32)

    def turn(w: Any, memory: Any, prompt: Any) -> tuple[Any, Any]:
        memory = jnp.tanh(memory @ w + w[prompt].sum(0))  # the prompt

        def step(carry: Any, _: Any) -> Any:
            memory = jnp.tanh(carry[1] @ w + w[carry[0]])
            return (jnp.argmax(memory @ w), memory), None

        return jax.lax.scan(step, (prompt[-1], memory), None, length=3)[0]

    def chat(w: Any, one: Any, other: Any) -> Any:
        first, memory = turn(w, jnp.zeros(8), one)
        return first, *turn(w, memory, other)

    args = w, np.array([1, 2], np.int32), np.array([3, 4, 5], np.int32)
    program = trace(chat, *args)
    phases = tag(program)
    blocks = coarsen(phases)
    assert [p for p, _ in itertools.groupby(b.phase for b in blocks if b.region == "top")] == [Phase.PREFILL, Phase.DECODE, Phase.PREFILL]
    problem = pose(phases, profiles.cluster("trn2_efa_4cs3"), sharding="tensor")
    for seed in range(3):
        meshes = np.random.default_rng(seed).integers(0, len(problem.meshes), len(problem))
        assert check(cut(program, problem.placement(meshes)), *args).equal
    check(cut(program, problem.placement([0] * len(problem))), *args)
