"""Mixtral (8x7B, 8x22B) in Flax NNX: Llama's attention with a sparse mixture of experts in place of the MLP.

The router gives each token its `top_k` experts. `ragged_experts` sorts these assignments by expert and multiplies each run of rows with
its expert's matrices (`jax.lax.ragged_dot`), so that the work grows with `top_k`, not with the number of experts, and no token is
dropped. `capacity_experts` (where the Config has a `capacity`) gives each expert a fixed number of places and drops what exceeds them.
Names, arguments and results are those of models/llama.py.

Shapes: B batch, S prompt length, T cache length, H query heads, K key/value heads, D head size, E width; N tokens (B * S), X experts, F their width.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.checkpoint import Checkpoint, ModelError, hold_to_layers, hold_to_numbers, open_safetensors
from models.generate import Loop, Make, generate, maker, request
from models.llama import Linear, RMSNorm, attend, rotate


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Shape of one member of the family. `capacity` is the capacity factor: each expert serves at most capacity * N * top_k / X tokens."""

    vocab: int
    dim: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    experts: int = 8
    top_k: int = 2
    capacity: float | None = None
    rope_theta: float = 1e6
    norm_eps: float = 1e-5
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        hold_to_numbers(vars(self) | {"rope_scaling": None})
        sizes = all(isinstance(n, int | np.integer) and not isinstance(n, bool) for n in (self.experts, self.top_k))
        if not (sizes and 1 <= self.top_k <= self.experts):
            raise ModelError(f"a token cannot go to {self.top_k!r} of {self.experts!r} experts", where="the configuration",
                             mend="give whole numbers with 1 <= top_k <= experts")  # fmt: skip
        if self.capacity is not None and not 0 < self.capacity < math.inf:
            raise ModelError(f"experts cannot have a capacity factor of {self.capacity!r}", where="the configuration",
                             mend="give a number above 0 (usually 1 to 2), or None to drop no token")  # fmt: skip


CONFIGS: dict[str, Config] = {
    "tiny": Config(vocab=256, dim=64, layers=2, heads=4, kv_heads=2, head_dim=16, ffn=96, experts=4, dtype="float32"),
    "mixtral-8x7b": Config(vocab=32_000, dim=4096, layers=32, heads=32, kv_heads=8, head_dim=128, ffn=14_336),
    "mixtral-8x22b": Config(vocab=32_000, dim=6144, layers=56, heads=48, kv_heads=8, head_dim=128, ffn=16_384),
}


class Attention(nnx.Module):
    def __init__(self, name: str, cfg: Config, make: Make):
        H, K, D = cfg.heads, cfg.kv_heads, cfg.head_dim
        self.q = Linear(f"{name}.q_proj", cfg.dim, H * D, make)
        self.k = Linear(f"{name}.k_proj", cfg.dim, K * D, make)
        self.v = Linear(f"{name}.v_proj", cfg.dim, K * D, make)
        self.o = Linear(f"{name}.o_proj", H * D, cfg.dim, make)
        self.cfg = cfg

    def __call__(self, x: jax.Array, cos: jax.Array, sin: jax.Array, cache: Any, pos: Any) -> tuple[jax.Array, Any]:
        """x [B, S, E], cache (k, v) each [B, T, K, D]; pos is None in prefill, else the position of the one new token."""
        cfg = self.cfg
        B, S, _ = x.shape
        q = rotate(self.q(x).reshape(B, S, cfg.heads, cfg.head_dim), cos, sin)
        k = rotate(self.k(x).reshape(B, S, cfg.kv_heads, cfg.head_dim), cos, sin)
        v = self.v(x).reshape(B, S, cfg.kv_heads, cfg.head_dim)
        start = (0, 0 if pos is None else pos, 0, 0)
        cache = tuple(jax.lax.dynamic_update_slice(c, n, start) for c, n in zip(cache, (k, v), strict=True))
        if pos is None:
            y = attend(q, k, v, jnp.tril(jnp.ones((S, S), bool)))
        else:
            y = attend(q, *cache, jnp.arange(cache[0].shape[1])[None, :] <= pos)
        return self.o(y), cache


Weights = tuple[jax.Array, jax.Array, jax.Array]  # of all experts: gate and up [X, E, F], down [X, F, E]


def ragged_experts(x: jax.Array, chosen: jax.Array, shares: jax.Array, weights: Weights) -> jax.Array:
    """Each token x [N, E] through its experts `chosen` int [N, k], summed by `shares` float32 [N, k]; gives [N, E]."""
    (N, k), (gate, up, down) = chosen.shape, weights
    order = jnp.argsort(chosen.reshape(-1))  # assignments (token * k + choice), those of one expert side by side
    sizes = jnp.bincount(chosen.reshape(-1), length=gate.shape[0]).astype(jnp.int32)
    rows = x[order // k]
    hidden = jax.nn.silu(jax.lax.ragged_dot(rows, gate, sizes)) * jax.lax.ragged_dot(rows, up, sizes)
    y = jax.lax.ragged_dot(hidden, down, sizes)[jnp.argsort(order)].reshape(N, k, -1)  # back in the order of the tokens
    return jnp.sum(y * shares[..., None], axis=1).astype(x.dtype)


def capacity_experts(x: jax.Array, chosen: jax.Array, shares: jax.Array, weights: Weights, places: int) -> jax.Array:
    """As `ragged_experts`, but each expert serves `places` tokens: first choices before second ones, then in the order of the tokens."""
    (N, k), (gate, up, down) = chosen.shape, weights
    X = gate.shape[0]
    taken = jax.nn.one_hot(chosen.T.reshape(-1), X, dtype=jnp.int32)  # [k * N, X]
    place = jnp.sum((jnp.cumsum(taken, axis=0) - 1) * taken, axis=1).reshape(k, N).T  # from `places` on: out of bounds, so dropped
    rows = jnp.broadcast_to(x[:, None], (N, k, x.shape[1]))
    inbox = jnp.zeros((X, places, x.shape[1]), x.dtype).at[chosen, place].set(rows, mode="drop")
    hidden = jax.nn.silu(jnp.einsum("xce,xef->xcf", inbox, gate)) * jnp.einsum("xce,xef->xcf", inbox, up)
    y = jnp.einsum("xcf,xfe->xce", hidden, down).at[chosen, place].get(mode="fill", fill_value=0)
    return jnp.sum(y * shares[..., None], axis=1).astype(x.dtype)


class Experts(nnx.Module):
    """X SwiGLU experts; `keys` are the checkpoint's names of the gate, up and down projections."""

    def __init__(self, name: str, experts: int, dim: int, ffn: int, make: Make, keys: tuple[str, str, str] = ("w1", "w3", "w2")):
        gate, up, down = keys
        self.gate = nnx.Param(make(f"{name}.*.{gate}.weight", (experts, dim, ffn)))
        self.up = nnx.Param(make(f"{name}.*.{up}.weight", (experts, dim, ffn)))
        self.down = nnx.Param(make(f"{name}.*.{down}.weight", (experts, ffn, dim)))

    def __call__(self, x: jax.Array, chosen: jax.Array, shares: jax.Array, places: int | None = None) -> jax.Array:
        weights = self.gate[...], self.up[...], self.down[...]
        return ragged_experts(x, chosen, shares, weights) if places is None else capacity_experts(x, chosen, shares, weights, places)


class MoE(nnx.Module):
    def __init__(self, name: str, cfg: Config, make: Make):
        self.router = Linear(f"{name}.gate", cfg.dim, cfg.experts, make)
        self.experts = Experts(f"{name}.experts", cfg.experts, cfg.dim, cfg.ffn, make)
        self.cfg = cfg

    def __call__(self, x: jax.Array) -> jax.Array:
        cfg, tokens = self.cfg, x.reshape(-1, x.shape[-1])
        with jax.named_scope("router"):
            shares, chosen = jax.lax.top_k(jax.nn.softmax(self.router(tokens).astype(jnp.float32), axis=-1), cfg.top_k)
            shares = shares / jnp.sum(shares, axis=-1, keepdims=True)
        with jax.named_scope("experts"):
            N = tokens.shape[0]
            places = None if cfg.capacity is None else min(N, math.ceil(cfg.capacity * N * cfg.top_k / cfg.experts))
            return self.experts(tokens, chosen, shares, places).reshape(x.shape)


class Block(nnx.Module):
    def __init__(self, name: str, cfg: Config, make: Make):
        self.attn_norm = RMSNorm(f"{name}.input_layernorm", cfg.dim, cfg.norm_eps, make)
        self.attn = Attention(f"{name}.self_attn", cfg, make)
        self.moe_norm = RMSNorm(f"{name}.post_attention_layernorm", cfg.dim, cfg.norm_eps, make)
        self.moe = MoE(f"{name}.block_sparse_moe", cfg, make)

    def __call__(self, x: jax.Array, cos: jax.Array, sin: jax.Array, cache: Any, pos: Any) -> tuple[jax.Array, Any]:
        with jax.named_scope("attn"):
            y, cache = self.attn(self.attn_norm(x), cos, sin, cache, pos)
            x = x + y
        with jax.named_scope("mlp"):
            return x + self.moe(self.moe_norm(x)), cache


class Mixtral(nnx.Module):
    """The model. With `scanned` the blocks' weights and caches are stacked on a leading layer axis and run by `lax.scan`."""

    def __init__(self, cfg: Config, make: Make, *, scanned: bool = False):
        self.embed = nnx.Param(make("model.embed_tokens.weight", (cfg.vocab, cfg.dim)))
        if scanned:
            self.blocks = Block("model.layers.*", cfg, lambda name, shape: make(name, (cfg.layers, *shape)))
        else:
            self.blocks = nnx.List([Block(f"model.layers.{i}", cfg, make) for i in range(cfg.layers)])
        self.norm = RMSNorm("model.norm", cfg.dim, cfg.norm_eps, make)
        self.head = Linear("lm_head", cfg.dim, cfg.vocab, make)
        self.cfg, self.scanned = cfg, scanned

    def new_cache(self, batch: int, length: int) -> Any:
        """Zeros for keys and values: a pair of [B, T, K, D] for each layer, or one pair of [layers, B, T, K, D] when scanned."""
        cfg = self.cfg
        shape, dtype = (batch, length, cfg.kv_heads, cfg.head_dim), self.embed[...].dtype
        if self.scanned:
            return tuple(jnp.zeros((cfg.layers, *shape), dtype) for _ in "kv")
        return [tuple(jnp.zeros(shape, dtype) for _ in "kv") for _ in range(cfg.layers)]

    def forward(self, tokens: jax.Array, cache: Any, pos: Any) -> tuple[jax.Array, Any]:
        """tokens int32 [B, S] -> logits float32 [B, vocab] of the last position, and the cache with S more positions."""
        cfg = self.cfg
        positions = jnp.arange(tokens.shape[1]) if pos is None else jnp.full((1,), pos)
        frequencies = cfg.rope_theta ** -(np.arange(0, cfg.head_dim, 2, dtype=np.float64) / cfg.head_dim)
        angles = positions.astype(jnp.float32)[:, None] * jnp.asarray(frequencies.astype(np.float32))
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        with jax.named_scope("embed"):
            x = self.embed[...][tokens]
        if self.scanned:
            graphdef, stacked = nnx.split(self.blocks)

            def layer(x: jax.Array, xs: Any) -> tuple[jax.Array, Any]:
                weights, layer_cache = xs
                return nnx.merge(graphdef, weights)(x, cos, sin, layer_cache, pos)

            with jax.named_scope("layers"):
                x, cache = jax.lax.scan(layer, x, (stacked, cache))
        else:
            caches = []
            for i, block in enumerate(self.blocks):
                with jax.named_scope(f"layers.{i}"):
                    x, layer_cache = block(x, cos, sin, cache[i], pos)
                caches.append(layer_cache)
            cache = caches
        with jax.named_scope("head"):
            return self.head(self.norm(x)[:, -1]).astype(jnp.float32), cache

    def prefill(self, tokens: jax.Array, length: int) -> tuple[jax.Array, Any]:
        """Read the whole prompt, tokens [B, S]: logits [B, vocab] of the last position and a cache of `length` positions."""
        return self.forward(tokens, self.new_cache(tokens.shape[0], length), None)

    def decode_step(self, token: jax.Array, cache: Any, pos: Any) -> tuple[jax.Array, Any]:
        """Read one token [B] at position `pos`: logits [B, vocab] and the cache with that position written."""
        return self.forward(token[:, None], cache, pos)


def _read_config(meta: Mapping[str, Any], where: str, dtype: str) -> Config:
    """The Config of a config.json; raises ModelError for what this family does not compute and for missing keys."""
    rope = meta.get("rope_parameters") or meta.get("rope_scaling") or {}
    wrong = [f"{key}={value!r}" for key, value, known in (
        ("model_type", meta.get("model_type"), ("mixtral",)), ("hidden_act", meta.get("hidden_act", "silu"), ("silu",)),
        ("rope_type", rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else rope, ("default",)),
        *((key, meta.get(key), (None, False)) for key in ("sliding_window", "tie_word_embeddings", "quantization_config")),
    ) if value not in known]  # fmt: skip
    if wrong:
        raise ModelError(f"models.mixtral does not compute {', '.join(wrong)}", where=where,
                         mend="use an unquantised Mixtral checkpoint with plain rotary positions, full attention and its own head")  # fmt: skip
    try:
        dim, heads = meta["hidden_size"], meta["num_attention_heads"]
        return Config(vocab=meta["vocab_size"], dim=dim, layers=meta["num_hidden_layers"], heads=heads, ffn=meta["intermediate_size"],
                      kv_heads=meta.get("num_key_value_heads") or heads, head_dim=meta.get("head_dim") or dim // heads,
                      experts=meta["num_local_experts"], top_k=meta["num_experts_per_tok"],
                      rope_theta=rope.get("rope_theta", meta.get("rope_theta", 1e6)), norm_eps=meta["rms_norm_eps"], dtype=dtype)  # fmt: skip
    except (KeyError, TypeError, ZeroDivisionError, ModelError) as error:
        what = f"the configuration has no key {error}" if isinstance(error, KeyError) else str(error).partition("\n")[0]
        raise ModelError(what, where=where, mend="use the config.json saved with the weights") from None


def tensors(file: Checkpoint, dtype: str, first: int = 0) -> Make:
    """A Make of the arrays in a checkpoint: kernels (in, out), the embedding (vocab, dim), in `dtype` (a routing bias in float32).

    Each `*` of a name stands for a leading axis of its shape, counted from 0 (that of the layers from `first`).
    """

    def make(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if "*" in name:
            start = first if "layers.*" in name else 0
            return np.stack([make(name.replace("*", str(start + i), 1), shape[1:]) for i in range(shape[0])])
        linear = len(shape) == 2 and "embed" not in name
        value = file.tensor(name, shape[::-1] if linear else shape)
        return np.ascontiguousarray(value.T if linear else value, dtype=jnp.dtype("float32" if name.endswith("bias") else dtype))

    return make


def load(path: str | Path, *, dtype: str = "float32") -> tuple[Config, Make]:
    """Open a Hugging Face folder for `generation(cfg, weights=make)`: its Config, and a Make of NumPy arrays in `dtype`.

    Raises ModelError for damaged files and models outside this family; the Make, for a tensor that is missing or of another shape.
    """
    file = open_safetensors(path)
    cfg = _read_config(file.meta, str(path), dtype)
    hold_to_layers(file, "model.layers.", cfg.layers)
    return cfg, tensors(file, dtype)


def generation(
    name: str | Config, *, batch: int = 1, prompt: int | np.ndarray = 128, new_tokens: int = 32, seed: int | None = None,
    weights: Make | None = None, dtype: str | None = None, layers: Literal["unrolled", "scanned"] = "unrolled", loop: Loop = "scan",
    sample: bool = False, temperature: float = 1.0, eos: int | None = None, logits: bool = False,
) -> tuple[Callable[..., Any], tuple[Any, ...]]:  # fmt: skip
    """One request as a traceable function and its arguments; all options are those of `models.llama.generation`."""
    cfg = config(name) if dtype is None else dataclasses.replace(config(name), dtype=dtype)
    concrete = weights is not None or seed is not None
    inputs = request(cfg.vocab, batch=batch, prompt=prompt, new_tokens=new_tokens, seed=seed, concrete=concrete, sample=sample, loop=loop, logits=logits)
    graphdef, state = nnx.split(Mixtral(cfg, maker(cfg.dtype, dtype, seed, weights), scanned=layers == "scanned"))

    def fn(weights: Any, tokens: jax.Array, key: jax.Array | None = None) -> Any:
        model = nnx.merge(graphdef, weights)
        return generate(model.prefill, model.decode_step, tokens, new_tokens, key=key, temperature=temperature, eos=eos, loop=loop, logits=logits)

    fn.__name__ = fn.__qualname__ = "generate"
    return fn, (state, *inputs)


def config(name: str | Config) -> Config:
    """Look a configuration up by name; raises ModelError with the names there are."""
    if isinstance(name, Config):
        return name
    if name not in CONFIGS:
        raise ModelError(f"no Mixtral configuration is called {name!r}", where="models.mixtral.CONFIGS", mend="use one of " + ", ".join(CONFIGS))
    return CONFIGS[name]
