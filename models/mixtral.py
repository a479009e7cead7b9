"""Mixtral (8x7B, 8x22B) in Flax NNX: Llama's attention with a sparse mixture of experts in place of the MLP.

The router gives each token its `top_k` experts. `ragged_experts` sorts these assignments by expert and multiplies each run of rows with
its expert's matrices (`jax.lax.ragged_dot`), so that the work grows with `top_k`, not with the number of experts, and no token is
dropped. `capacity_experts` (where the Config has a `capacity`) gives each expert a fixed number of places and drops what exceeds them.
All else is models/llama.py.

Shapes: B batch, S prompt length, T cache length, H query heads, K key/value heads, D head size, E width; N tokens (B * S), X experts, F their width.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from .checkpoint import (
    Make,
    ModelError,
    absent,
    hold_to_known,
    hold_to_layers,
    hold_to_numbers,
    kernels,
    open_safetensors,
    reading,
    rotary_part,
    stacks,
)
from .generate import named, of_nnx, requested
from .llama import Linear, Llama, RopeScaling, hold_to_shape


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
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    tied: bool = False
    qk_norm: bool = False
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        hold_to_shape(self)
        hold_to_numbers(self, ("experts", "top_k"))
        if self.top_k > self.experts:
            raise ModelError(f"a token cannot go to {self.top_k} of {self.experts} experts", where="the configuration", mend="give top_k <= experts")
        if self.capacity is not None and not 0 < self.capacity < math.inf:
            raise ModelError(f"experts cannot have a capacity factor of {self.capacity!r}", where="the configuration",
                             mend="give a number above 0 (usually 1 to 2), or None to drop no token")  # fmt: skip


CONFIGS: dict[str, Config] = {
    "tiny": Config(vocab=256, dim=64, layers=2, heads=4, kv_heads=2, head_dim=16, ffn=96, experts=4, dtype="float32"),
    "mixtral-8x7b": Config(vocab=32_000, dim=4096, layers=32, heads=32, kv_heads=8, head_dim=128, ffn=14_336),
    "mixtral-8x22b": Config(vocab=32_000, dim=6144, layers=56, heads=48, kv_heads=8, head_dim=128, ffn=16_384),
}


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


def _read_config(meta: Mapping[str, Any], where: str, dtype: str) -> Config:
    """The Config of a config.json; raises ModelError for what this family does not compute and for missing keys."""
    rope, kind = rotary_part(meta, where)
    hold_to_known(
        "mixtral", where, "use an unquantised Mixtral checkpoint with plain rotary positions, full attention and its own head",
        ("model_type", meta.get("model_type"), ("mixtral",)), ("hidden_act", meta.get("hidden_act", "silu"), ("silu",)),
        ("rope_type", kind, ("default",)), *absent(meta, "sliding_window", "tie_word_embeddings", "quantization_config"),
    )  # fmt: skip
    with reading(where):
        dim, heads = meta["hidden_size"], meta["num_attention_heads"]
        return Config(vocab=meta["vocab_size"], dim=dim, layers=meta["num_hidden_layers"], heads=heads, ffn=meta["intermediate_size"],
                      kv_heads=meta.get("num_key_value_heads") or heads, head_dim=meta.get("head_dim") or dim // heads,
                      experts=meta["num_local_experts"], top_k=meta["num_experts_per_tok"],
                      rope_theta=rope.get("rope_theta", meta.get("rope_theta", 1e6)), norm_eps=meta["rms_norm_eps"], dtype=dtype)  # fmt: skip


def load(path: str | Path, *, dtype: str = "float32") -> tuple[Config, Make]:
    """Open a Hugging Face folder for `generation(cfg, weights=make)`: its Config, and a Make of NumPy arrays in `dtype`.

    Raises ModelError for damaged files and models outside this family; the Make, for a tensor that is missing or of another shape.
    """
    file = open_safetensors(path)
    cfg = _read_config(file.meta, str(path), dtype)
    hold_to_layers(file, "model.layers.", cfg.layers)
    return cfg, stacks(kernels(file, dtype))


def experts(layer: str, cfg: Config, make: Make) -> nnx.Module:
    """What stands in the place of Llama's MLP."""
    return MoE(f"{layer}.block_sparse_moe", cfg, make)


def generation(name: str | Config, **options: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """One request as a traceable function and its arguments; the options are those of `models.generate.requested`."""
    cfg = named(name, CONFIGS, "Mixtral", "mixtral")
    return requested(cfg, lambda cfg, make, scanned, *_: of_nnx(Llama(cfg, make, scanned=scanned, mlp=experts)), **options)
