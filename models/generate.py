"""What every model here shares: prefill and the token loop as one traceable function, its arguments, and the walk through the layers.

`generate(prefill, decode_step, tokens, ...)` is the request; the scopes "prefill", "decode" and "after" say what the author means each
part to be. `requested(cfg, build, ...)` makes it of a model, with weights that are shapes only, random numbers, or a checkpoint's.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from .checkpoint import Make, ModelError

Loop = Literal["scan", "while", "fori"]


def choose(logits: jax.Array, key: jax.Array | None, temperature: float) -> tuple[jax.Array, jax.Array | None]:
    """The next token [B] of logits [B, vocab]: the likeliest, or a sample where there is a key (which is then split)."""
    if key is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), None
    key, use = jax.random.split(key)
    return jax.random.categorical(use, logits / temperature, axis=-1).astype(jnp.int32), key


def generate(
    prefill: Callable[[jax.Array, int], tuple[jax.Array, Any]], decode_step: Callable[[jax.Array, Any, Any], tuple[jax.Array, Any]],
    tokens: jax.Array, new_tokens: int, *, start: int | None = None, key: jax.Array | None = None, temperature: float = 1.0,
    eos: int | None = None, loop: Loop = "scan", logits: bool = False, text: np.ndarray | None = None,
) -> Any:  # fmt: skip
    """Read `tokens` [B, S], then decode until `new_tokens` [B, new_tokens] are written; with `logits`, those of every step as well.

    prefill(tokens, length) gives logits float32 [B, vocab] of the last position and a state with room for `length` positions;
    decode_step(token [B], state, position) gives the same one position on. `start` is the position of the first new token (S).
    `loop="while"` stops early once every sequence has written `eos` (None: never); later places then hold `eos` or 0.
    `text` int32 [B, new_tokens] is what is read in place of what is chosen, where it is not negative: logits are then those of a given text.
    """
    B, S = tokens.shape
    first = S if start is None else start

    def read(chosen: jax.Array, i: Any) -> jax.Array:
        if text is None:
            return chosen
        given = jax.lax.dynamic_index_in_dim(jnp.asarray(text, jnp.int32), i, 1, keepdims=False)
        return jnp.where(given >= 0, given, chosen)

    def step(token: jax.Array, position: Any, state: Any, key: Any) -> tuple[Any, ...]:
        step_logits, state = decode_step(token, state, position)
        token, key = choose(step_logits, key, temperature)
        token = read(token, position + 1 - first)
        return token, position + 1, state, key, step_logits

    with jax.named_scope("prefill"):
        first_logits, state = prefill(tokens, first + new_tokens)
        token, key = choose(first_logits, key, temperature)
        token = read(token, 0)
    if loop == "scan":

        def scanned(carry: Any, _: None) -> tuple[Any, Any]:
            *carry, step_logits = step(*carry)
            return tuple(carry), (carry[0], step_logits if logits else None)

        with jax.named_scope("prefill"):
            token_column, logits_row = token[:, None], first_logits[None] if logits else None
        with jax.named_scope("decode"):
            _, (rest, rest_logits) = jax.lax.scan(scanned, (token, jnp.int32(first), state, key), None, length=new_tokens - 1)
        with jax.named_scope("after"):
            out = jnp.concatenate([token_column, rest.T], axis=1)
            return (out, jnp.concatenate([logits_row, rest_logits]).swapaxes(0, 1)) if logits else out

    def advance(i: Any, carry: Any) -> Any:
        token, done, out, state, key = carry
        token, _, state, key, _ = step(token, first + i - 1, state, key)
        token = token if eos is None else jnp.where(done, eos, token)
        out = jax.lax.dynamic_update_slice(out, token[:, None], (0, i))
        return token, done if eos is None else done | (token == eos), out, state, key

    with jax.named_scope("prefill"):
        out = jnp.zeros((B, new_tokens), jnp.int32) if eos is None else jnp.full((B, new_tokens), eos, jnp.int32)
        out = jax.lax.dynamic_update_slice(out, token[:, None], (0, 0))
        done = None if eos is None else token == eos
    with jax.named_scope("decode"):
        done = jnp.zeros(B, bool) if done is None else done
        carry = (token, done, out, state, key)
        if loop == "fori":
            return jax.lax.fori_loop(1, new_tokens, advance, carry)[2]
        return jax.lax.while_loop(lambda c: (c[0] < new_tokens) & ~jnp.all(c[1][1]), lambda c: (c[0] + 1, advance(*c)), (jnp.int32(1), carry))[1][2]


def shapes(dtype: str) -> Make:
    """Make every parameter as a shape without numbers."""
    return lambda name, shape: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


def numbers(dtype: str, seed: int) -> Make:
    """Make every parameter as a NumPy array: ones for norms, else normal with standard deviation 1/sqrt(fan-in)."""
    rng = np.random.default_rng(seed)

    def make(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if "norm" in name:
            return np.ones(shape, jnp.dtype(dtype))
        fan_in = shape[-1] if "embed" in name or len(shape) < 2 else shape[-2]
        return (rng.standard_normal(shape, np.float32) / math.sqrt(fan_in)).astype(jnp.dtype(dtype))

    return make


def through(blocks: Any, run: Callable[[Any, jax.Array, Any], tuple[jax.Array, Any]], x: jax.Array, state: Any) -> tuple[jax.Array, Any]:
    """x through a model's layers, and their states: `run(block, x, its state)` for each of an nnx.List, or along the stacked axis of one block.

    `state` holds one for each layer, or is stacked like the block; None gives every layer None.
    """
    if isinstance(blocks, nnx.List):
        states = []
        for i, block in enumerate(blocks):
            with jax.named_scope(f"layers.{i}"):
                x, new = run(block, x, None if state is None else state[i])
            states.append(new)
        return x, states
    graphdef, stacked = nnx.split(blocks)
    with jax.named_scope("layers"):
        return jax.lax.scan(lambda x, xs: run(nnx.merge(graphdef, xs[0]), x, xs[1]), x, (stacked, state))


Steps = tuple[Callable[..., Any], Callable[..., Any]]
"""prefill and decode_step, as `generate` takes them."""


def of_nnx(model: Any) -> tuple[Any, Callable[[Any], Steps]]:
    """The weights of an NNX model, and its prefill and decode_step under any such weights."""
    graphdef, state = nnx.split(model)

    def steps(weights: Any) -> Steps:
        bound = nnx.merge(graphdef, weights)
        return bound.prefill, bound.decode_step

    return state, steps


def parameters(model: Any, make: Make, stacked: Mapping[str, int], scanned: bool) -> dict[str, Any]:
    """Linen's variables {"params": ...} of a model whose layers are scanned, every leaf made by its dotted name and its shape.

    `stacked` says how many layers lie in each stack: "layers.mlp.up.kernel" is made whole as "layers.*.mlp.up.kernel" where `scanned`,
    else as "layers.0.mlp.up.kernel" and so on, each in a subtree "layers.0" of its own. The bias of a LayerNorm "mlp_norm" is asked
    for as "mlp_shift", for what is called a norm is made of ones.
    """
    tokens, key = jax.ShapeDtypeStruct((1, 2), jnp.int32), jax.ShapeDtypeStruct((2,), jnp.uint32)
    tree = jax.eval_shape(lambda key, tokens: model.init(key, tokens, None), key, tokens)["params"]

    def fill(tree: Mapping[str, Any], path: str, cut: int) -> dict[str, Any]:
        """The leaves below `path`; the first `cut` dimensions, of a stack, belong to one layer each and fall away."""
        made: dict[str, Any] = {}
        for name, sub in tree.items():
            where = path + name
            if not isinstance(sub, Mapping):
                made[name] = make(where.replace("norm.bias", "shift"), sub.shape[cut:])
            elif where not in stacked:
                made[name] = fill(sub, f"{where}.", cut)
            elif scanned:
                made[name] = fill(sub, f"{where}.*.", 0)
            else:
                made |= {f"{name}.{i}": fill(sub, f"{where}.{i}.", 1) for i in range(stacked[where])}
        return made

    return {"params": fill(tree, "", 0)}


def named(name: Any, configs: Mapping[str, Any], family: str, module: str) -> Any:
    """Look a configuration up by name, a Config is itself; raises ModelError with the names there are."""
    if not isinstance(name, str):
        return name
    if name not in configs:
        raise ModelError(f"no {family} configuration is called {name!r}", where=f"models.{module}.CONFIGS", mend="use one of " + ", ".join(configs))
    return configs[name]


WIDTHS = {"vocab": 256, "dim": 64, "ffn": 64, "moe_ffn": 32, "inner": 128, "head_dim": 8, "rank": 4, "q_rank": 16, "kv_rank": 16, "nope_dim": 8, "rope_dim": 8, "v_dim": 8}
"""Fields of a Config that are widths, and how wide a sibling's are at most."""


def shrunken(cfg: Any) -> Any:
    """A Config of the same structure with small widths. Heads whose size is not a field keep a size of 4."""
    own = {f.name for f in dataclasses.fields(cfg)}
    new = {name: min(width, getattr(cfg, name)) for name, width in WIDTHS.items() if name in own and getattr(cfg, name) is not None}
    if "heads" in own and not own & {"head_dim", "nope_dim"}:
        new["dim"] = 4 * cfg.heads
    if "inner" in new:
        new["inner"] = cfg.inner // cfg.dim * new["dim"]
    return dataclasses.replace(cfg, **new)


def requested(
    cfg: Any, build: Callable[..., tuple[Any, Callable[[Any], Steps]]], *, batch: int = 1, prompt: int | np.ndarray = 128, new_tokens: int = 32,
    seed: int | None = None, weights: Make | None = None, dtype: str | None = None, layers: Literal["unrolled", "scanned"] = "unrolled",
    loop: Loop = "scan", sample: bool = False, temperature: float = 1.0, eos: int | None = None, logits: bool = False, start: int | None = None, shrink: bool = False, text: np.ndarray | None = None,
) -> tuple[Callable[..., Any], tuple[Any, ...]]:  # fmt: skip
    """One request as a traceable function and its arguments: `fn(weights, tokens[, key])` -> tokens int32 [batch, new_tokens].

    `prompt` is a length, or token ids [batch, S]. Without `seed` and `weights` (a Make, such as `load` gives) the weights are shapes
    only. `dtype` replaces that of the Config `cfg`; `layers="scanned"` stacks layers and runs them by a scan. `sample` draws from the
    distribution with a key (third argument) instead of taking the likeliest token; `loop`, `temperature` and `eos` are those of
    `generate`; `logits` adds the logits float32 [batch, new_tokens, vocab] to the result (for `loop="scan"`).
    `text` int32 [batch, new_tokens] is read in place of what is chosen. `shrink` makes the model's sibling with small widths: as many layers, heads and experts. The model says how it is built, `build(cfg, make, scanned, prompt, new_tokens)` -> its weights and the steps under them, and at which
    position its new tokens `start`, if not after the prompt. Raises ModelError for what makes no request.
    """
    cfg = cfg if dtype is None else dataclasses.replace(cfg, dtype=dtype)
    cfg = shrunken(cfg) if shrink else cfg
    ids = None if isinstance(prompt, int) else np.asarray(prompt, np.int32)
    batch, length = (batch, prompt) if ids is None else ids.shape
    asked = f"batch {batch}, prompt {length}, {new_tokens} new tokens, loop {loop!r}"
    if batch < 1 or length < 1 or new_tokens < 2:
        raise ModelError("no request can be made of these lengths", where=asked, mend="give batch >= 1, prompt >= 1 and new_tokens >= 2")
    if loop not in ("scan", "while", "fori"):
        raise ModelError(f"there is no token loop of the form {loop!r}", where=asked, mend="use 'scan', 'while' or 'fori'")
    if logits and loop != "scan":
        raise ModelError("logits are kept by the scan loop only", where=asked, mend="pass loop='scan'")
    if weights is not None:
        make = weights if dtype is None else lambda name, shape: weights(name, shape).astype(jnp.dtype(dtype))
    else:
        make = shapes(cfg.dtype) if seed is None else numbers(cfg.dtype, seed)
    state, steps = build(cfg, make, layers == "scanned", length, new_tokens)
    concrete = weights is not None or seed is not None
    if ids is None:
        rng = np.random.default_rng(0 if seed is None else seed)
        ids = rng.integers(0, cfg.vocab, (batch, length), np.int32) if concrete else jax.ShapeDtypeStruct((batch, length), jnp.int32)
    key = np.array([0, seed or 0], np.uint32) if concrete else jax.ShapeDtypeStruct((2,), jnp.uint32)

    def fn(weights: Any, tokens: jax.Array, key: jax.Array | None = None) -> Any:
        return generate(*steps(weights), tokens, new_tokens, start=start, key=key, temperature=temperature, eos=eos, loop=loop, logits=logits, text=text)

    fn.__name__ = fn.__qualname__ = "generate"
    return fn, (state, ids, key) if sample else (state, ids)
