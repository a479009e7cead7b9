"""Llama and its kin (SmolLM2, Qwen3) in Flax NNX: prefill, decode_step, and generate as one traceable function.

`generation(name, batch=, prompt=, new_tokens=)` hands on `(fn, args)`: `fn(weights, tokens)` is the whole request, prefill and
the token loop together. Without `seed` or `weights` every leaf is a `jax.ShapeDtypeStruct`, so that 405 billion parameters cost
nothing; with them the leaves are NumPy arrays, so that building a model starts no JAX backend.

Shapes: B batch, S prompt length, T cache length (prompt + new tokens), H query heads, K key/value heads, D head size, E width.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from .checkpoint import (
    Make,
    ModelError,
    absent,
    gguf_config,
    gguf_name,
    hold_to_known,
    hold_to_layers,
    hold_to_numbers,
    kernels,
    open_gguf,
    open_safetensors,
    reading,
    rotary_part,
    stacks,
    unpermute,
)
from .generate import named, of_nnx, requested, through


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """The frequency scaling of Llama 3.1: long wavelengths are divided by `factor`, short ones kept, those between blended."""

    factor: float
    low: float = 1.0
    high: float = 4.0
    original: int = 8192

    def __post_init__(self) -> None:
        hold_to_numbers(self, (), ("factor", "low", "high", "original"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Shape of one member of the family; nothing but numbers, under the names that Hugging Face's config.json means by them."""

    vocab: int
    dim: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    rope_theta: float = 500_000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    tied: bool = False
    qk_norm: bool = False
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        hold_to_shape(self)


def hold_to_shape(cfg: Any) -> None:
    """Raise ModelError where a Config of a Llama, or of its kin with the same attention, makes no model."""
    hold_to_numbers(cfg, ("vocab", "dim", "layers", "heads", "kv_heads", "head_dim", "ffn"), ("rope_theta", "norm_eps"))
    if cfg.heads % cfg.kv_heads or cfg.head_dim % 2:
        raise ModelError(f"{cfg.heads} heads of size {cfg.head_dim} cannot share {cfg.kv_heads} KV heads", where="the configuration",
                         mend="KV heads divide the heads, and a head's size is even (its halves are turned)")  # fmt: skip


def _llama31(**shape: int) -> Config:
    return Config(vocab=128_256, kv_heads=8, head_dim=128, rope_scaling=RopeScaling(factor=8.0), **shape)


CONFIGS: dict[str, Config] = {
    "tiny": Config(vocab=256, dim=64, layers=3, heads=4, kv_heads=2, head_dim=16, ffn=160, dtype="float32"),
    "smollm2-135m": Config(vocab=49_152, dim=576, layers=30, heads=9, kv_heads=3, head_dim=64, ffn=1536, rope_theta=1e5, tied=True),
    "llama-3.2-1b": Config(vocab=128_256, dim=2048, layers=16, heads=32, kv_heads=8, head_dim=64, ffn=8192,
                           rope_scaling=RopeScaling(factor=32.0), tied=True),
    "llama-3.1-8b": _llama31(dim=4096, layers=32, heads=32, ffn=14_336),
    "llama-3.1-70b": _llama31(dim=8192, layers=80, heads=64, ffn=28_672),
    "llama-3.1-405b": _llama31(dim=16_384, layers=126, heads=128, ffn=53_248),
    "llama-2-7b": Config(vocab=32_000, dim=4096, layers=32, heads=32, kv_heads=32, head_dim=128, ffn=11_008, rope_theta=1e4),
    "llama-2-13b": Config(vocab=32_000, dim=5120, layers=40, heads=40, kv_heads=40, head_dim=128, ffn=13_824, rope_theta=1e4),
    "llama-2-70b": Config(vocab=32_000, dim=8192, layers=80, heads=64, kv_heads=8, head_dim=128, ffn=28_672, rope_theta=1e4),
    "llama-3-8b": Config(vocab=128_256, dim=4096, layers=32, heads=32, kv_heads=8, head_dim=128, ffn=14_336),
    "llama-3-8b-mha": Config(vocab=128_256, dim=4096, layers=32, heads=32, kv_heads=32, head_dim=128, ffn=14_336),  # every query head its own keys
    "mistral-7b": Config(vocab=32_000, dim=4096, layers=32, heads=32, kv_heads=8, head_dim=128, ffn=14_336, rope_theta=1e6),
    "codellama-34b": Config(vocab=32_000, dim=8192, layers=48, heads=64, kv_heads=8, head_dim=128, ffn=22_016, rope_theta=1e6),
    "qwen3-0.6b": Config(vocab=151_936, dim=1024, layers=28, heads=16, kv_heads=8, head_dim=128, ffn=3072, rope_theta=1e6,
                         norm_eps=1e-6, qk_norm=True, tied=True),
    "qwen3-8b": Config(vocab=151_936, dim=4096, layers=36, heads=32, kv_heads=8, head_dim=128, ffn=12_288, rope_theta=1e6,
                       norm_eps=1e-6, qk_norm=True),
}  # fmt: skip


def inverse_frequencies(cfg: Config) -> np.ndarray:
    """RoPE's angular frequencies, float32 [D/2], with the Llama-3.1 scaling where the config has it."""
    freq = 1.0 / cfg.rope_theta ** (np.arange(0, cfg.head_dim, 2, dtype=np.float64) / cfg.head_dim)
    if (s := cfg.rope_scaling) is not None:
        turns = s.original * freq / (2 * math.pi)  # full turns within the original context
        keep = np.clip((turns - s.low) / (s.high - s.low), 0.0, 1.0)
        freq = freq * keep + freq / s.factor * (1 - keep)
    return freq.astype(np.float32)


def turns(tokens: jax.Array, pos: Any, frequencies: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """cos and sin float32 [S, D/2] of the angles at which `tokens` [B, S] stand: from 0 on in prefill (pos None), else at `pos`."""
    positions = jnp.arange(tokens.shape[1]) if pos is None else jnp.full((1,), pos)
    angles = positions.astype(jnp.float32)[:, None] * jnp.asarray(frequencies)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turn the two halves of each head, x [B, S, H, D], by the angles of its position, cos and sin [S, D/2]."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Grouped-query attention: q [B, S, H, D] over k, v [B, T, K, D] where mask [S, T] allows; gives [B, S, H * D]."""
    B, S, H, D = q.shape
    K = k.shape[2]
    q = q.reshape(B, S, K, H // K, D)
    scores = jnp.einsum("bskgd,btkd->bkgst", q, k, preferred_element_type=jnp.float32) * D**-0.5
    weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1).astype(v.dtype)
    return jnp.einsum("bkgst,btkd->bskgd", weights, v).reshape(B, S, H * D)


class Linear(nnx.Module):
    """y = x W, without bias, as everywhere in this family."""

    def __init__(self, name: str, din: int, dout: int, make: Make):
        self.kernel = nnx.Param(make(f"{name}.weight", (din, dout)))

    def __call__(self, x: jax.Array) -> jax.Array:
        return x @ self.kernel[...]


class RMSNorm(nnx.Module):
    def __init__(self, name: str, dim: int, eps: float, make: Make):
        self.scale = nnx.Param(make(f"{name}.weight", (dim,)))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        h = x.astype(jnp.float32)
        h = h * jax.lax.rsqrt(jnp.mean(h * h, axis=-1, keepdims=True) + self.eps)
        return self.scale[...] * h.astype(x.dtype)


class Attention(nnx.Module):
    def __init__(self, name: str, cfg: Config, make: Make):
        H, K, D = cfg.heads, cfg.kv_heads, cfg.head_dim
        self.q = Linear(f"{name}.q_proj", cfg.dim, H * D, make)
        self.k = Linear(f"{name}.k_proj", cfg.dim, K * D, make)
        self.v = Linear(f"{name}.v_proj", cfg.dim, K * D, make)
        self.o = Linear(f"{name}.o_proj", H * D, cfg.dim, make)
        if cfg.qk_norm:
            self.q_norm = RMSNorm(f"{name}.q_norm", D, cfg.norm_eps, make)
            self.k_norm = RMSNorm(f"{name}.k_norm", D, cfg.norm_eps, make)
        self.cfg = cfg

    def __call__(self, x, cos, sin, cache, pos):  # type: ignore[no-untyped-def]
        """x [B, S, E], cache (k, v) each [B, T, K, D]; pos is None in prefill, else the position of the one new token."""
        cfg = self.cfg
        B, S, _ = x.shape
        q = self.q(x).reshape(B, S, cfg.heads, cfg.head_dim)
        k = self.k(x).reshape(B, S, cfg.kv_heads, cfg.head_dim)
        v = self.v(x).reshape(B, S, cfg.kv_heads, cfg.head_dim)
        if cfg.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        start = (0, 0 if pos is None else pos, 0, 0)
        cache = tuple(jax.lax.dynamic_update_slice(c, n, start) for c, n in zip(cache, (k, v), strict=True))
        if pos is None:
            y = attend(q, k, v, jnp.tril(jnp.ones((S, S), bool)))
        else:
            y = attend(q, *cache, jnp.arange(cache[0].shape[1])[None, :] <= pos)
        return self.o(y), cache


class MLP(nnx.Module):
    """Gated by an activation: SwiGLU, or what Llama's kin put in its place."""

    def __init__(self, name: str, cfg: Any, make: Make, act: Callable[[jax.Array], jax.Array] = jax.nn.silu):
        self.gate = Linear(f"{name}.gate_proj", cfg.dim, cfg.ffn, make)
        self.up = Linear(f"{name}.up_proj", cfg.dim, cfg.ffn, make)
        self.down = Linear(f"{name}.down_proj", cfg.ffn, cfg.dim, make)
        self.act = act

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(self.act(self.gate(x)) * self.up(x))


Part = Callable[[str, Any, Make], nnx.Module]
"""(name of the layer in the checkpoint, Config, Make) -> what stands in the place of a layer's attention or MLP."""


def attention(name: str, cfg: Any, make: Make) -> nnx.Module:
    return Attention(f"{name}.self_attn", cfg, make)


def mlp(name: str, cfg: Any, make: Make) -> nnx.Module:
    return MLP(f"{name}.mlp", cfg, make)


class Block(nnx.Module):
    """A layer: attention and MLP, each normed before and added. Llama's kin put other parts in."""

    def __init__(self, name: str, cfg: Any, make: Make, *, attention: Part = attention, mlp: Part = mlp):
        self.attn_norm = RMSNorm(f"{name}.input_layernorm", cfg.dim, cfg.norm_eps, make)
        self.attn = attention(name, cfg, make)
        self.mlp_norm = RMSNorm(f"{name}.post_attention_layernorm", cfg.dim, cfg.norm_eps, make)
        self.mlp = mlp(name, cfg, make)

    def __call__(self, x, cos, sin, cache, pos):  # type: ignore[no-untyped-def]
        with jax.named_scope("attn"):
            y, cache = self.attn(self.attn_norm(x), cos, sin, cache, pos)
            x = x + y
        with jax.named_scope("mlp"):
            return x + self.mlp(self.mlp_norm(x)), cache


class Llama(nnx.Module):
    """The model. With `scanned` the blocks' weights and caches are stacked on a leading layer axis and run by `lax.scan`."""

    def __init__(self, cfg: Any, make: Make, *, scanned: bool = False, mlp: Part = mlp):
        self.embed = nnx.Param(make("model.embed_tokens.weight", (cfg.vocab, cfg.dim)))
        if scanned:
            self.blocks = Block("model.layers.*", cfg, lambda name, shape: make(name, (cfg.layers, *shape)), mlp=mlp)
        else:
            self.blocks = nnx.List([Block(f"model.layers.{i}", cfg, make, mlp=mlp) for i in range(cfg.layers)])
        self.norm = RMSNorm("model.norm", cfg.dim, cfg.norm_eps, make)
        if not cfg.tied:
            self.head = Linear("lm_head", cfg.dim, cfg.vocab, make)
        self.cfg, self.scanned = cfg, scanned

    def new_cache(self, batch: int, length: int) -> Any:
        """Zeros for keys and values: a pair of [B, T, K, D] for each layer, or one pair of [layers, B, T, K, D] when scanned."""
        cfg = self.cfg
        shape = (batch, length, cfg.kv_heads, cfg.head_dim)
        dtype = self.embed[...].dtype
        if self.scanned:
            return tuple(jnp.zeros((cfg.layers, *shape), dtype) for _ in "kv")
        return [tuple(jnp.zeros(shape, dtype) for _ in "kv") for _ in range(cfg.layers)]

    def forward(self, tokens, cache, pos):  # type: ignore[no-untyped-def]
        """tokens int32 [B, S] -> logits float32 [B, vocab] of the last position, and the cache with S more positions."""
        cos, sin = turns(tokens, pos, inverse_frequencies(self.cfg))
        with jax.named_scope("embed"):
            x = self.embed[...][tokens]
        x, cache = through(self.blocks, lambda block, x, layer_cache: block(x, cos, sin, layer_cache, pos), x, cache)
        with jax.named_scope("head"):
            x = self.norm(x)[:, -1]
            logits = jnp.einsum("be,ve->bv", x, self.embed[...]) if self.cfg.tied else self.head(x)
            return logits.astype(jnp.float32), cache

    def prefill(self, tokens, length: int):  # type: ignore[no-untyped-def]
        """Read the whole prompt, tokens [B, S]: logits [B, vocab] of the last position and a cache of `length` positions."""
        return self.forward(tokens, self.new_cache(tokens.shape[0], length), None)

    def decode_step(self, token, cache, pos):  # type: ignore[no-untyped-def]
        """Read one token [B] at position `pos`: logits [B, vocab] and the cache with that position written."""
        return self.forward(token[:, None], cache, pos)


def _read_config(meta: Mapping[str, Any], where: str, dtype: str) -> Config:
    """The Config of a config.json; raises ModelError for what this family does not compute and for missing keys."""
    rope, kind = rotary_part(meta, where)
    hold_to_known(
        "llama", where, "use a Llama, SmolLM2 or Qwen3 checkpoint without biases, with plain or llama3 rotary positions",
        ("model_type", meta.get("model_type"), ("llama", "qwen3")), ("hidden_act", meta.get("hidden_act", "silu"), ("silu",)),
        ("rope_type", kind, ("default", "llama3")), *absent(meta, "attention_bias", "mlp_bias", "use_sliding_window"),
    )  # fmt: skip
    with reading(where):
        dim, heads, qwen, scaling = meta["hidden_size"], meta["num_attention_heads"], meta["model_type"] == "qwen3", None
        if kind == "llama3" or "factor" in rope:
            scaling = RopeScaling(factor=rope["factor"], low=rope["low_freq_factor"], high=rope["high_freq_factor"],
                                  original=rope["original_max_position_embeddings"])  # fmt: skip
        return Config(vocab=meta["vocab_size"], dim=dim, layers=meta["num_hidden_layers"], heads=heads, ffn=meta["intermediate_size"],
                      kv_heads=meta.get("num_key_value_heads") or heads, head_dim=meta.get("head_dim") or (128 if qwen else dim // heads),
                      rope_theta=rope.get("rope_theta", meta.get("rope_theta", 1e4)), rope_scaling=scaling, qk_norm=qwen,
                      norm_eps=meta["rms_norm_eps"], tied=bool(meta.get("tie_word_embeddings")), dtype=dtype)  # fmt: skip


def load(path: str | Path, *, dtype: str = "float32") -> tuple[Config, Make]:
    """Open a Hugging Face folder or a .gguf file for `generation(cfg, weights=make)`: its Config, and a Make of NumPy arrays in `dtype`.

    Linear kernels come as (in, out), the embedding as (vocab, dim), names with `*` as a stack [layers, ...]. Raises ModelError for
    damaged files and models outside this family; the Make, for a tensor that is missing or not of the shape asked for.
    """
    gguf = Path(path).suffix == ".gguf"
    file = open_gguf(path) if gguf else open_safetensors(path)
    cfg = _read_config(gguf_config(file) if gguf else file.meta, str(path), dtype)
    hold_to_layers(file, "blk." if gguf else "model.layers.", cfg.layers)

    def from_gguf(name: str, shape: tuple[int, ...]) -> np.ndarray:
        linear = len(shape) == 2 and "embed" not in name
        value = file.tensor(gguf_name(name), shape[::-1] if linear else shape)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            value = unpermute(value, cfg.heads if "q_proj" in name else cfg.kv_heads)
        return np.ascontiguousarray(value.T if linear else value, dtype=jnp.dtype(dtype))

    return cfg, stacks(from_gguf if gguf else kernels(file, dtype))


def generation(name: str | Config, **options: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """One request as a traceable function and its arguments: `fn(weights, tokens[, key])` -> tokens int32 [batch, new_tokens].

    `name` is one of CONFIGS or a Config; the options are those of `models.generate.requested`: batch, prompt, new_tokens, seed, weights,
    dtype, layers, loop, sample, temperature, eos, logits. Raises ModelError for a name that is not in CONFIGS and for lengths that make
    no request.
    """
    return requested(config(name), lambda cfg, make, scanned, *_: of_nnx(Llama(cfg, make, scanned=scanned)), **options)


def config(name: str | Config) -> Config:
    """Look a configuration up by name; raises ModelError with the names there are."""
    found: Config = named(name, CONFIGS, "Llama", "llama")
    return found
