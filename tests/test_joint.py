"""Separate prefill and decode callables become one request: state by argument, by NNX module, by Linen collection; and what does not join."""

from typing import Any

import jax
import jax.numpy as jnp
import linen_model
import numpy as np
import pytest
from flax import nnx

import partition as pt
from models import generate, llama
from partition.errors import TraceError
from partition.graph import Role, bodies
from partition.phases import Phase

TOKENS = np.arange(24).reshape(2, 12).astype(np.int32)
NEW = 6


def spec(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def hold(program: Any, want: np.ndarray, layers: int) -> None:
    """Tags say prefill and decode once each, the state crosses, and the cut request writes the wanted tokens [B, NEW]."""
    phases = pt.tag(program)
    inside = {o.id for body in bodies(phases.token_loop) for o in body.walk()}  # type: ignore[arg-type]
    for op in program.graph.walk():
        if op.primitive == "dot_general":
            assert phases.of[op.id] is (Phase.DECODE if op.id in inside else Phase.PREFILL)
    assert sum(c.kind == "cache" for c in phases.handoff) == 2 * layers and phases.batch == want.shape[0]
    plan = pt.plan(program, cluster="trn2_efa_4cs3", policy="random")
    assert pt.check(plan.stages, *program.args).equal
    out = pt.run(plan.stages, *program.args)
    if "tokens" in out:
        first, rest = map(np.asarray, out["tokens"])
        np.testing.assert_array_equal(np.concatenate([first.reshape(1, -1), rest.reshape(NEW - 1, -1)]).T, want)
    else:
        logits = [np.asarray(x) for x in (out["prefill"][0], out["decode"][0])]
        np.testing.assert_array_equal(np.concatenate([logits[0].argmax(-1)[None], logits[1].argmax(-1)]).T, want)


def llama_parts() -> tuple[Any, Any, Any, Any, np.ndarray]:
    cfg = llama.config("tiny")
    graphdef, state = nnx.split(llama.Llama(cfg, generate.numbers("float32", 0)))
    fn, _ = llama.generation("tiny", seed=0, prompt=TOKENS, new_tokens=NEW)

    def prefill(w: Any, tokens: Any) -> Any:
        return nnx.merge(graphdef, w).prefill(tokens, 12 + NEW)

    def decode(w: Any, token: Any, cache: Any, position: Any) -> Any:
        return nnx.merge(graphdef, w).decode_step(token, cache, position)

    return prefill, decode, state, jax.eval_shape(prefill, state, TOKENS)[1], np.asarray(jax.jit(fn)(state, TOKENS))


def test_state_as_an_argument() -> None:
    prefill, decode, state, cache, want = llama_parts()
    program = pt.trace(prefill=(prefill, (state, TOKENS)), decode=(decode, (state, spec(jnp.int32, 2), cache, spec(jnp.int32))), new_tokens=NEW)
    hold(program, want, 3)
    roles = [program.graph.tensors[t].role for t in program.graph.inputs]
    assert roles.count(Role.INPUT) == 1 and roles.count(Role.PARAM) == len(jax.tree.leaves(state))
    assert "more leaves" in str(pt.tag(program)) and "counts on from 12" in str(pt.tag(program))


def test_the_callers_feed_wins() -> None:
    prefill, decode, state, _, want = llama_parts()
    program = pt.trace(prefill=(prefill, (state, TOKENS)), decode=decode, new_tokens=NEW,
                       feed=lambda out, i: (jnp.argmax(out[0], -1).astype(jnp.int32), out[1], 12 + i))  # fmt: skip
    hold(program, want, 3)


def test_one_forward_function_at_two_lengths() -> None:
    cfg = llama.config("tiny")
    graphdef, state = nnx.split(llama.Llama(cfg, generate.numbers("float32", 0)))

    def forward(w: Any, tokens: Any, cache: Any, position: Any) -> Any:
        model = nnx.merge(graphdef, w)
        return model.forward(tokens, cache, None if tokens.shape[1] > 1 else position)

    cache = [tuple(np.zeros((2, 12 + NEW, 2, 16), np.float32) for _ in "kv") for _ in range(3)]
    args = (state, TOKENS, cache, np.int32(0))
    program = pt.trace(prefill=(forward, args), decode=(forward, (state, TOKENS[:, :1], cache, np.int32(12))), new_tokens=NEW)
    hold(program, llama_parts()[4], 3)


class Cached(nnx.Module):
    """Attention over a cache that lives in the module, as NNX users write it: calls change it in place."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(40, 16, rngs=rngs)
        self.qkv = nnx.Linear(16, 48, rngs=rngs)
        self.out = nnx.Linear(16, 16, rngs=rngs)
        self.k = nnx.Cache(jnp.zeros((2, 12 + NEW, 16)))
        self.v = nnx.Cache(jnp.zeros((2, 12 + NEW, 16)))
        self.index = nnx.Cache(jnp.int32(0))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embed(tokens)
        q, k, v = jnp.split(self.qkv(x), 3, axis=-1)
        at = self.index[...]
        self.k[...] = jax.lax.dynamic_update_slice(self.k[...], k, (0, at, 0))
        self.v[...] = jax.lax.dynamic_update_slice(self.v[...], v, (0, at, 0))
        seen = jnp.arange(12 + NEW)[None] <= at + jnp.arange(tokens.shape[1])[:, None]
        scores = jnp.where(seen, jnp.einsum("bsd,btd->bst", q, self.k[...]), -1e30)
        y = x + self.out(jnp.einsum("bst,btd->bsd", jax.nn.softmax(scores), self.v[...]))
        self.index[...] = at + tokens.shape[1]
        return y @ self.embed.embedding[...].T


@pytest.mark.parametrize("wrap", [lambda f: f, nnx.jit], ids=["plain", "nnx.jit"])
def test_state_in_an_nnx_module(wrap: Any) -> None:
    model = Cached(nnx.Rngs(0))
    call = wrap(lambda m, tokens: m(tokens))
    program = pt.trace(prefill=(call, (model, TOKENS)), decode=(call, (model, TOKENS[:, :1])), new_tokens=NEW)
    tokens = [np.asarray(model(TOKENS))[:, -1].argmax(-1)]
    while len(tokens) < NEW:
        tokens.append(np.asarray(model(tokens[-1][:, None]))[:, -1].argmax(-1))
    hold(program, np.stack(tokens, 1), 1)
    named = {program.graph.tensors[t].name: program.graph.tensors[t].role for t in program.graph.inputs}
    assert [n for n, role in named.items() if role is Role.INPUT and "arg" not in n] and named["qkv.kernel"] is Role.PARAM


def test_state_in_linens_cache_collection() -> None:
    fn, (variables, _) = linen_model.generation(batch=2, prompt=12, new_tokens=NEW)
    module = linen_model.Decoder(12 + NEW, False)

    def prefill(variables: Any, tokens: Any) -> Any:
        return module.apply(variables, tokens, 0, mutable=["cache"])

    def decode(variables: Any, token: Any, position: Any) -> Any:
        return module.apply(variables, token, position, mutable=["cache"])

    cache = jax.eval_shape(prefill, variables, TOKENS)[1]["cache"]
    full = {**variables, "cache": cache}
    program = pt.trace(prefill=(prefill, (variables, TOKENS)), decode=(decode, (full, spec(jnp.int32, 2, 1), spec(jnp.int32))), new_tokens=NEW)
    hold(program, np.asarray(jax.jit(fn)(variables, TOKENS)), 3)


def test_a_constant_of_prefill_is_handed_in_once() -> None:
    w = np.linspace(-1, 1, 64, dtype=np.float32).reshape(8, 8)

    def prefill(w: Any, tokens: Any) -> Any:
        seen = jnp.tanh(w[tokens] @ w)
        return seen[:, -1] @ w, seen  # the encoder's output, which decode only reads

    def decode(w: Any, token: Any, seen: Any) -> Any:
        h = w[token] + jnp.einsum("bsd,bd->bd", seen, w[token])
        return jnp.tanh(h) @ w

    tokens = np.arange(6).reshape(2, 3).astype(np.int32)
    program = pt.trace(prefill=(prefill, (w, tokens)), decode=(decode, (w, spec(jnp.int32, 2), spec(jnp.float32, 2, 3, 8))), new_tokens=4)
    phases = pt.tag(program)
    assert [c.kind for c in phases.handoff if program.graph.tensors[c.tensor].shape == (2, 3, 8)] == ["value"]
    assert pt.check(pt.plan(program, cluster="trn2_efa_cs3").stages, *program.args).equal


def test_a_state_that_does_not_match_is_named_with_both_shapes() -> None:
    prefill, decode, state, cache, _ = llama_parts()
    longer = jax.tree.map(lambda x: spec(x.dtype, 2, 99, 2, 16), cache)
    with pytest.raises(TraceError, match=r"\[2\]\[0\]\[0\] float32\[2, 99, 2, 16\]") as error:
        pt.trace(prefill=(prefill, (state, TOKENS)), decode=(decode, (state, spec(jnp.int32, 2), longer, spec(jnp.int32))))
    assert "prefill returns [1][0][0] float32[2, 18, 2, 16]" in error.value.where and "feed=" in error.value.mend


@pytest.mark.parametrize(("options", "says"), [
    ({}, "to trace"), ({"prefill": (len, ())}, "to trace"), ({"prefill": len, "decode": (len, ())}, "no pair"),
    ({"prefill": (lambda w, t: w[t].sum() > 0 and w, (np.ones(3), np.int32(1))), "decode": (len, ())}, "prefill cannot be traced"),
    ({"prefill": (lambda w, t: w[t], (np.ones(3), np.zeros(2, np.int32))), "decode": (lambda w, t: w[t], (np.ones(3), np.zeros(2, np.int32))),
      "new_tokens": 1}, "no decode step"),
], ids=range(5))  # fmt: skip
def test_wrong_use(options: dict[str, Any], says: str) -> None:
    with pytest.raises(TraceError, match=says):
        pt.trace(**options)


def test_the_token_is_what_is_looked_up_and_not_what_comes_first() -> None:
    prefill, decode, state, cache, want = llama_parts()

    def swapped(w: Any, cache: Any, position: Any, token: Any) -> Any:
        return decode(w, token[:, 0], cache, position[0, 0])

    one = spec(np.int32, 2, 1)
    hold(pt.trace(prefill=(prefill, (state, TOKENS)), decode=(swapped, (state, cache, one, one)), new_tokens=NEW), want, 3)


@pytest.mark.parametrize("given, counts", [(np.int32(0), 12), (spec(np.int32), 12), (np.int32(5), 5), (jnp.int32(3), 3)])
def test_the_position_is_the_callers_or_what_prefill_wrote(given: Any, counts: int) -> None:
    prefill, decode, state, cache, _ = llama_parts()
    program = pt.trace(prefill=(prefill, (state, TOKENS)), decode=(decode, (state, spec(np.int32, 2), cache, given)), new_tokens=NEW)
    assert f"counts on from {counts}, " in "; ".join(pt.tag(program).how)


@pytest.mark.parametrize("scanned", [False, True])
def test_positions_count_on_from_a_prefix_that_is_no_token(scanned: bool) -> None:
    """Four embeddings stand before the tokens, and another integer argument is longer than the prompt."""
    cfg = llama.config("tiny")
    model = llama.Llama(cfg, generate.numbers("float32", 0), scanned=scanned)
    graphdef, state = nnx.split(model)

    def prefill(w: Any, image: Any, tokens: Any, notes: Any) -> Any:
        bound = nnx.merge(graphdef, w)
        ids = jnp.concatenate([jnp.zeros((2, 4), jnp.int32), tokens], 1) + image.astype(jnp.int32).sum() * 0 + notes.sum() * 0
        return bound.prefill(ids, 24)

    def decode(w: Any, token: Any, cache: Any, position: Any) -> Any:
        return nnx.merge(graphdef, w).decode_step(token, cache, position)

    args = (state, np.ones((2, 3), np.float32), TOKENS, np.zeros((2, 30), np.int32))
    cache = jax.eval_shape(prefill, *args)[1]
    program = pt.trace(prefill=(prefill, args), decode=(decode, (state, spec(np.int32, 2), cache, spec(np.int32))), new_tokens=NEW)
    assert "counts on from 16, the places that prefill writes" in "; ".join(pt.tag(program).how)
    assert pt.check(pt.plan(program, cluster="trn2_efa_cs3").stages, *program.args).equal


def test_a_state_that_looks_like_the_logits_is_not_guessed() -> None:
    def prefill(w: Any, tokens: Any) -> Any:
        h = w[tokens].sum(1)
        return h @ w, h

    def decode(w: Any, token: Any, h: Any) -> Any:
        h = jnp.tanh(w[token] + h)
        return h @ w, h

    w = np.ones((32, 32), np.float32)
    pair = {"prefill": (prefill, (w, TOKENS)), "decode": (decode, (w, spec(np.int32, 2), spec(np.float32, 2, 32)))}
    with pytest.raises(TraceError, match=r"may be prefill's result \[0\] or \[1\]"):
        pt.trace(**pair, new_tokens=NEW)
    program = pt.trace(**pair, new_tokens=NEW, feed=lambda out, i: (jnp.argmax(out[0], -1).astype(jnp.int32), out[1]))
    assert pt.tag(program).loop is not None


@pytest.mark.parametrize("inside", [False, True])
def test_callables_that_choose_the_token_themselves(inside: bool) -> None:
    """Both return the token where decode takes it; the position is an argument of its own, or part of the state."""
    prefill, decode, state, cache, want = llama_parts()

    def first(w: Any, tokens: Any) -> Any:
        logits, cache = prefill(w, tokens)
        return jnp.argmax(logits, -1).astype(jnp.int32), (cache, jnp.int32(12)) if inside else cache

    def step(w: Any, token: Any, held: Any, *position: Any) -> Any:
        cache, at = held if inside else (held, *position)
        logits, cache = decode(w, token, cache, at)
        return jnp.argmax(logits, -1).astype(jnp.int32), (cache, at + 1) if inside else cache

    held = (cache, spec(np.int32)) if inside else cache
    args = (state, spec(np.int32, 2), held) + (() if inside else (spec(np.int32),))
    hold(pt.trace(prefill=(first, (state, TOKENS)), decode=(step, args), new_tokens=NEW), want, 3)
