"""Phases: the token loop is found in every form of a request, nothing else is taken for one, and what crosses is known to the byte.

The truth is stated from how models/llama.py is written, not from how phases.py decides: prefill's matmuls are decode's matmuls,
and the loop is the one loop of seven rounds.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import networkx as nx
import pytest
from jax import lax

from models import generate, llama
from partition.errors import PartitionError, PhaseError
from partition.graph import Op, bodies
from partition.loops import CONTRACTIONS
from partition.phases import Phase, Phases, tag
from partition.program import Program, trace

PROMPT, NEW, LAYERS = 16, 8, 3  # "tiny" has 3 layers, 2 key/value heads of 16, float32
CACHE = (PROMPT + NEW) * 2 * 16 * 4  # bytes of one layer's keys, or values
MATMULS = 4 + 2 + 3  # of a layer: q, k, v, o; scores and their use; gate, up, down
FORMS = [(*f, False) for f in itertools.product(("unrolled", "scanned"), ("scan", "while"), (False, True))]
FORMS += [(layers, "scan", False, True) for layers in ("unrolled", "scanned")]


@functools.cache
def tagged(layers: str, loop: str, sample: bool, logits: bool) -> tuple[Program, Phases]:
    fn, args = llama.generation("tiny", prompt=PROMPT, new_tokens=NEW, layers=layers, loop=loop, sample=sample, logits=logits)  # type: ignore[arg-type]
    program = trace(fn, *args)
    return program, tag(program)


def inside(op: Op) -> Iterator[Op]:
    for body in bodies(op):
        yield from body.walk()


def matmuls(ops: Iterable[Op]) -> int:
    """Contractions as they stand in the program: one of a layer scan counts once."""
    return sum(o.primitive in CONTRACTIONS for op in ops for o in (op, *inside(op)))


def struct(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.fixture(params=FORMS, ids=lambda f: "-".join(map(str, f)))
def form(request: pytest.FixtureRequest) -> tuple[str, str, bool, bool]:
    return request.param


Form = tuple[str, str, bool, bool]


def test_phases_of_llama(form: Form) -> None:
    program, phases = tagged(*form)
    unrolled, scan = form[0] == "unrolled", form[1] == "scan"
    (loop,) = [o for o in program.graph.ops if o.loop and (o.loop.trips == NEW - 1 if scan else o.loop.kind == "while")]
    assert phases.loop == loop.id and phases.token_loop is loop
    assert {phases.of[o.id] for o in (loop, *inside(loop))} == {Phase.DECODE}
    place = program.graph.ops.index(loop)
    before, after = program.graph.ops[:place], program.graph.ops[place + 1 :]
    named = [o for o in before if o.scope.startswith("prefill/") and o.scope.split("/")[1].split(".")[0] in ("embed", "layers", "head")]
    assert matmuls(named) == matmuls(before) == (LAYERS * MATMULS if unrolled else MATMULS) + 1
    assert {phases.of[o.id] for op in named for o in (op, *inside(op))} == {Phase.PREFILL}
    follows = nx.descendants(program.graph.nx, loop.id)  # putting the tokens together: no weights, so no phase
    assert {o.id: phases.of[o.id] for o in after} == {o.id: Phase.NONE if o.id in follows else Phase.PREFILL for o in after}
    assert bool(follows) == scan
    assert phases.of.keys() == {o.id for o in program.graph.walk()}
    assert phases.batch == 1


def test_both_phases_run_the_same_matmuls(form: Form) -> None:
    _, phases = tagged(*form)
    count = (LAYERS * MATMULS if form[0] == "unrolled" else MATMULS) + 1
    assert matmuls(phases.ops("prefill")) == matmuls(phases.ops("decode")) == count
    assert matmuls(phases.ops("both")) == matmuls(phases.ops("none")) == 0


def test_handoff_is_the_cache_and_small_values(form: Form) -> None:
    layers, loop, sample, _ = form
    program, phases = tagged(*form)
    caches = sorted(c.nbytes for c in phases.handoff if c.kind == "cache")
    out = [NEW * 4] if loop == "while" else []  # the tokens written so far, in place as well
    assert caches == out + ([CACHE] * 2 * LAYERS if layers == "unrolled" else [CACHE * LAYERS] * 2)
    values = sorted(c.nbytes for c in phases.handoff if c.kind == "value")
    assert values == [4, 8][: 1 + sample]  # the first token, and the key
    assert phases.handoff_bytes == sum(out) + 2 * LAYERS * CACHE + sum(values)
    assert all(phases.of[program.graph.producer[c.tensor].id] is Phase.PREFILL for c in phases.handoff)


def test_a_phase_is_a_graph_without_cycles_or_outsiders() -> None:
    program, phases = tagged("unrolled", "scan", False, False)
    for phase in ("prefill", "decode"):
        g = phases.nx(phase)
        assert nx.is_directed_acyclic_graph(g) and set(g) == {o.id for o in phases.ops(phase)}
        assert all(e["bytes"] == sum(program.graph.tensors[t].nbytes for t in e["tensors"]) for *_, e in g.edges(data=True))


def test_batch() -> None:
    fn, args = llama.generation("tiny", batch=3, prompt=PROMPT, new_tokens=NEW, layers="scanned")
    assert tag(trace(fn, *args)).batch == 3


# other loops that feed tokens back ------------------------------------------------------------------------------------

TABLE = struct(16, 8)  # vocabulary x width


def next_token(table: jax.Array, token: jax.Array) -> jax.Array:
    return jnp.argmax(jnp.tanh(table[token]) @ table.T, -1).astype(jnp.int32)


def tokens(table: jax.Array, token: jax.Array, length: int) -> tuple[jax.Array, jax.Array]:
    return lax.scan(lambda t, _: (next_token(table, t),) * 2, token, None, length=length)


def carried_logits(table: jax.Array, token: jax.Array) -> jax.Array:
    def step(logits: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        token = jnp.argmax(logits, -1)
        return jnp.tanh(table[token]) @ table.T, token

    return lax.scan(step, table[token] @ table.T, None, length=4)[1]


def test_logits_in_the_carry_are_feedback_too() -> None:
    phases = tag(trace(carried_logits, TABLE, struct(dtype=jnp.int32)))
    assert phases.token_loop is not None and phases.token_loop.loop is not None and phases.token_loop.loop.trips == 4
    assert [(c.kind, c.nbytes) for c in phases.handoff] == [("value", 16 * 4)]


def test_batch_of_logits_in_the_carry() -> None:
    assert tag(trace(carried_logits, TABLE, struct(2, dtype=jnp.int32))).batch == 2


HEADED = {"table": TABLE, "head": struct(8, 16)}


def test_weights_that_both_phases_prepare_are_both() -> None:
    def fn(table: jax.Array, token: jax.Array) -> jax.Array:
        ready, late = jnp.exp(table), jnp.sin(table)  # read before and inside the loop; inside alone
        first = next_token(ready, token)
        return lax.scan(lambda t, _: (next_token(ready, t) + next_token(late, t),) * 2, first, None, length=4)[1]

    program = trace(fn, TABLE, struct(dtype=jnp.int32))
    phases = tag(program)
    of = {o.primitive: phases.of[o.id] for o in program.graph.ops}
    assert (of["exp"], of["sin"], of["argmax"]) == (Phase.BOTH, Phase.DECODE, Phase.PREFILL)


def test_what_follows_the_loop_is_decode_while_weights_are_still_read() -> None:
    def fn(w: dict[str, jax.Array], token: jax.Array) -> jax.Array:
        last = tokens(w["table"], token, 4)[0]
        return jnp.sin(jnp.cos(w["table"][last]) @ w["head"])

    program = trace(fn, HEADED, struct(dtype=jnp.int32))
    phases = tag(program)
    of = {o.primitive: phases.of[o.id] for o in program.graph.ops}
    assert (of["cos"], of["dot_general"], of["sin"]) == (Phase.DECODE, Phase.DECODE, Phase.NONE)


@pytest.mark.parametrize("ready", [lambda w: w.astype(jnp.bfloat16), lambda w: w.reshape(16, 8).T], ids=["cast", "reshape"])
def test_what_follows_the_loop_is_decode_while_weights_in_another_form_are_read(ready: Any) -> None:
    def fn(w: dict[str, jax.Array], token: jax.Array) -> jax.Array:
        last = tokens(w["table"], token, 4)[0]
        return jnp.dot(last * jnp.ones(8, ready(w["head"]).dtype), ready(w["head"]))

    program = trace(fn, HEADED, struct(dtype=jnp.int32))
    phases = tag(program)
    assert {o.primitive: phases.of[o.id] for o in program.graph.ops}["dot_general"] is Phase.DECODE


def test_two_token_loops_are_both_decode_and_the_last_is_cut_unless_the_caller_says() -> None:
    def fn(table: jax.Array, token: jax.Array) -> jax.Array:
        return tokens(table, tokens(table, token, 4)[0], 5)[1]

    program = trace(fn, TABLE, struct(dtype=jnp.int32))
    first, second = [o for o in program.graph.ops if o.loop]
    phases = tag(program)
    assert phases.loop == second.id and phases.of[first.id] is Phase.DECODE
    assert f"op {first.id} (scan) is decode too" in phases.how[1]
    phases = tag(program, loop=first.id)
    assert phases.loop == first.id and phases.of[second.id] is Phase.DECODE and "caller says so" in phases.how[0]


def test_a_token_loop_inside_a_loop_is_refused() -> None:
    def fn(table: jax.Array, token: jax.Array) -> jax.Array:
        return lax.scan(lambda n, _: (n + tokens(table, token, 4)[1].sum(), None), jnp.int32(0), None, length=2)[0]

    program = trace(fn, TABLE, struct(dtype=jnp.int32))
    with pytest.raises(PhaseError, match="inside another loop") as caught:
        tag(program)
    assert "top level" in caught.value.mend and "loop='none'" in caught.value.mend
    phases = tag(program, loop="none")
    assert phases.loop is None and phases.handoff == () and phases.how[0] == "no token loop: the caller says so (confidence 1)"


# loops and programs that are none -------------------------------------------------------------------------------------


def forward(form: str) -> tuple[Any, tuple[Any, ...]]:
    from flax import nnx

    cfg = llama.config("tiny")
    graphdef, state = nnx.split(llama.Llama(cfg, generate.shapes(cfg.dtype), scanned=form == "scanned"))
    return (lambda w, t: nnx.merge(graphdef, w).prefill(t, PROMPT)[0]), (state, struct(1, PROMPT, dtype=jnp.int32))


def plain() -> tuple[Any, tuple[Any, ...]]:
    return forward("scanned")


def training_step() -> tuple[Any, tuple[Any, ...]]:
    fn, args = forward("scanned")

    def step(w: Any, t: jax.Array) -> Any:
        loss = lambda w: -jax.nn.log_softmax(fn(w, t))[0, t[0, 0]]  # noqa: E731
        return jax.tree.map(lambda p, g: p - 0.1 * g, w, jax.grad(loss)(w))

    return step, args


def training_loop() -> tuple[Any, tuple[Any, ...]]:
    """Many steps in a scan, with clipping, a count of steps and accuracy: it chooses, and feeds no choice back."""

    def fn(w: jax.Array, batches: jax.Array) -> Any:
        def step(carry: Any, x: jax.Array) -> Any:
            w, n = carry
            g = jax.grad(lambda w: ((jnp.tanh(x @ w) - 1) ** 2).mean())(w)
            g = jnp.where((g * g).sum() > 1.0, g / 2, g)
            return (w - 0.1 * g, n + 1), (jnp.argmax(x @ w, -1) == 0).sum()

        return lax.scan(step, (w, jnp.int32(0)), batches)

    return fn, (struct(8, 8), struct(3, 5, 8))


def router() -> tuple[Any, tuple[Any, ...]]:
    """Layers in a scan, experts chosen by top_k in each, tokens per expert counted in the carry."""

    def fn(w: Any, x: jax.Array) -> Any:
        def layer(carry: Any, ws: Any) -> Any:
            (x, count), (route, experts) = carry, ws
            gate, chosen = lax.top_k(jax.nn.softmax(x @ route), 2)
            hot = jax.nn.one_hot(chosen, 4)
            return (x + jnp.einsum("td,edf,te->tf", x, experts, (hot * gate[..., None]).sum(1)),
                    count + hot.astype(jnp.int32).sum((0, 1))), None  # fmt: skip

        return lax.scan(layer, (x, jnp.zeros(4, jnp.int32)), w)[0]

    return fn, ((struct(3, 8, 4), struct(3, 4, 8, 8)), struct(5, 8))


def chunked_prefill() -> tuple[Any, tuple[Any, ...]]:
    """A prompt of 12 in chunks of 4: the cache and the position go round, the last token is chosen and not fed back."""

    def fn(table: jax.Array, prompt: jax.Array) -> Any:
        def chunk(carry: Any, ids: jax.Array) -> Any:
            cache, pos, _ = carry
            x = table[ids]
            cache = lax.dynamic_update_slice(cache, x, (pos, 0))
            seen = jnp.arange(12)[None] <= pos + jnp.arange(4)[:, None]
            y = jax.nn.softmax(jnp.where(seen, x @ cache.T, -jnp.inf)) @ cache
            return (cache, pos + 4, jnp.argmax(y[-1] @ table.T).astype(jnp.int32)), None

        return lax.scan(chunk, (jnp.zeros((12, 8)), jnp.int32(0), jnp.int32(0)), prompt.reshape(3, 4))[0]

    return fn, (TABLE, struct(12, dtype=jnp.int32))


def float_feedback() -> tuple[Any, tuple[Any, ...]]:
    return (lambda w, x: lax.scan(lambda h, _: (jnp.tanh(h @ w), h), x, None, length=4)[1]), (struct(8, 8), struct(8))


def quantised_layers() -> tuple[Any, tuple[Any, ...]]:
    """Layers that hand int8 activations on: integers through contractions, rounded and not chosen."""
    layer = lambda x, w: (jnp.clip(jnp.round(x.astype(jnp.float32) @ w), -127, 127).astype(jnp.int8), None)  # noqa: E731
    return (lambda w, x: lax.scan(layer, x, w)[0]), (struct(3, 8, 8), struct(5, 8, dtype=jnp.int8))


def until_converged() -> tuple[Any, tuple[Any, ...]]:
    """A fixed point: a comparison ends the loop, and its flag is no token."""

    def fn(w: jax.Array, x: jax.Array) -> Any:
        def step(c: Any) -> Any:
            h, _, n = c
            new = jnp.tanh(h @ w)
            return new, jnp.abs(new - h).sum() < 1e-3, n + 1

        return lax.while_loop(lambda c: ~c[1] & (c[2] < 9), step, (x, jnp.array(False), jnp.int32(0)))

    return fn, (struct(8, 8), struct(8))


QUANTISED = quantised_layers


@pytest.mark.parametrize("case", [plain, training_step, training_loop, router, chunked_prefill, float_feedback, until_converged, QUANTISED])
def test_not_a_token_loop(case: Any) -> None:
    fn, args = case()
    program = trace(fn, *args)
    assert any(o.loop for o in program.graph.ops)  # there is a loop to be mistaken
    phases = tag(program)
    assert phases.loop is None and phases.token_loop is None and phases.handoff == ()
    training = case in (training_step, training_loop)
    assert set(phases.of.values()) - {Phase.NONE} == (set() if training else {Phase.PREFILL}) and phases.of.keys() == {o.id for o in program.graph.walk()}
    assert phases.how[0].startswith("no phase of inference" if training else "one phase")


def test_a_hint_wins_over_the_structure_and_must_name_a_loop() -> None:
    fn, args = float_feedback()
    program = trace(fn, *args)
    (loop,) = program.graph.ops
    phases = tag(program, loop=loop.id)
    assert phases.loop == loop.id and {phases.of[o.id] for o in program.graph.walk()} == {Phase.DECODE}
    (inner, *_) = inside(loop)
    with pytest.raises(PhaseError, match="is no loop of the top level") as caught:
        tag(program, loop=inner.id)
    assert f"{loop.id} (scan)" in caught.value.mend


def test_wrong_hints_are_told() -> None:
    fn, args = llama.generation("tiny", prompt=PROMPT, new_tokens=NEW, layers="scanned")
    program = trace(fn, *args)
    layers, tokens = [op for op in program.graph.ops if op.loop]
    assert "no token that it chooses comes back" in tag(program, loop=layers.id).how[0]
    phases = tag(program, phases={tokens.id: "prefill"})
    assert phases.loop is None and phases.handoff == () and not phases.ops(Phase.DECODE) and "the caller says so" in phases.how[0]
    with pytest.raises(PartitionError, match="phases is of type list, not a mapping"):
        tag(program, phases=["prefill"])  # type: ignore[arg-type]
    with pytest.raises(PartitionError, match="no phase called 'prefil'"):
        phases.ops("prefil")
    with pytest.raises(PartitionError, match="program is of type function, not a Program"):
        tag(fn)  # type: ignore[arg-type]
    with pytest.raises(PartitionError, match="did you mean 'prefill'"):
        tag(program, phases={tokens.id: "prefil"})
