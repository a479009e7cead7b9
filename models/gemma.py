"""Gemma 2 (2B, 9B, 27B) in Flax NNX: layers come in pairs, the first attending to a sliding window, the second to everything.

What else differs from Llama: attention scores and final logits are capped softly (cap * tanh(x / cap)), the MLP is a GeGLU, each half of a
layer is normed before and after, norms scale by 1 + w, and the embedding (which is also the head) is scaled by sqrt(dim) on reading.
With `ring` the local layers keep the last `window` positions only, in a ring buffer; the logits are the same. Names, arguments and
results are those of models/llama.py.

Shapes: B batch, S prompt length, T cache length, R ring length (min(window, T)), H query heads, K key/value heads, D head size, E width.
"""

from __future__ import annotations

import dataclasses
import functools
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
    hold_to_known,
    hold_to_layers,
    hold_to_numbers,
    kernels,
    open_safetensors,
    reading,
    rotary_part,
)
from .generate import named, of_nnx, requested, through
from .llama import MLP, Linear, hold_to_shape, rotate, turns


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Shape of one member of the family. Scores are divided by sqrt(query_scale); a local layer sees `window` positions, its own included."""

    vocab: int
    dim: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    window: int = 4096
    query_scale: float = 256.0
    attn_cap: float = 50.0
    final_cap: float = 30.0
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    ring: bool = False
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        hold_to_shape(self)
        if isinstance(self.window, bool) or not isinstance(self.window, int | np.integer) or self.window < 1 or self.layers % 2:
            raise ModelError(f"{self.layers} layers cannot alternate with a window of {self.window!r}", where="the configuration",
                             mend="give an even number of layers (a local and a global one in turn) and a whole window from 1")  # fmt: skip
        hold_to_numbers(self, (), ("query_scale", "attn_cap", "final_cap"))


CONFIGS: dict[str, Config] = {
    "tiny": Config(vocab=256, dim=64, layers=4, heads=4, kv_heads=2, head_dim=16, ffn=160, window=8, query_scale=16.0, dtype="float32"),
    "gemma-2-2b": Config(vocab=256_000, dim=2304, layers=26, heads=8, kv_heads=4, head_dim=256, ffn=9216),
    "gemma-2-9b": Config(vocab=256_000, dim=3584, layers=42, heads=16, kv_heads=8, head_dim=256, ffn=14_336),
    "gemma-2-27b": Config(vocab=256_000, dim=4608, layers=46, heads=32, kv_heads=16, head_dim=128, ffn=36_864, query_scale=144.0),
}


def soft_cap(x: jax.Array, cap: float) -> jax.Array:
    """Hold x within -cap and cap, smoothly."""
    return cap * jnp.tanh(x / cap)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, cfg: Config) -> jax.Array:
    """Grouped-query attention with capped scores: q [B, S, H, D] over k, v [B, T, K, D] where mask [S, T] allows; gives [B, S, H * D]."""
    B, S, H, D = q.shape
    K = k.shape[2]
    q = q.reshape(B, S, K, H // K, D)
    scores = jnp.einsum("bskgd,btkd->bkgst", q, k, preferred_element_type=jnp.float32) * cfg.query_scale**-0.5
    weights = jax.nn.softmax(jnp.where(mask, soft_cap(scores, cfg.attn_cap), -jnp.inf), axis=-1).astype(v.dtype)
    return jnp.einsum("bkgst,btkd->bskgd", weights, v).reshape(B, S, H * D)


class RMSNorm(nnx.Module):
    """Scaled by 1 + w, in float32 throughout."""

    def __init__(self, name: str, dim: int, eps: float, make: Make):
        self.scale = nnx.Param(make(f"{name}.weight", (dim,)))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        h = x.astype(jnp.float32)
        h = h * jax.lax.rsqrt(jnp.mean(h * h, axis=-1, keepdims=True) + self.eps)
        return (h * (1 + self.scale[...].astype(jnp.float32))).astype(x.dtype)


class Attention(nnx.Module):
    def __init__(self, name: str, cfg: Config, make: Make, *, local: bool):
        H, K, D = cfg.heads, cfg.kv_heads, cfg.head_dim
        self.q = Linear(f"{name}.q_proj", cfg.dim, H * D, make)
        self.k = Linear(f"{name}.k_proj", cfg.dim, K * D, make)
        self.v = Linear(f"{name}.v_proj", cfg.dim, K * D, make)
        self.o = Linear(f"{name}.o_proj", H * D, cfg.dim, make)
        self.cfg, self.local = cfg, local

    def __call__(self, x: jax.Array, cos: jax.Array, sin: jax.Array, cache: Any, pos: Any) -> tuple[jax.Array, Any]:
        """x [B, S, E], cache (k, v) each [B, T or R, K, D]; pos is None in prefill, else the position of the one new token."""
        cfg = self.cfg
        B, S, _ = x.shape
        q = rotate(self.q(x).reshape(B, S, cfg.heads, cfg.head_dim), cos, sin)
        k = rotate(self.k(x).reshape(B, S, cfg.kv_heads, cfg.head_dim), cos, sin)
        v = self.v(x).reshape(B, S, cfg.kv_heads, cfg.head_dim)
        cache = tuple(self.write(c, new, pos) for c, new in zip(cache, (k, v), strict=True))
        query = jnp.arange(S)[:, None] if pos is None else pos
        if pos is None:
            key = jnp.arange(S)[None, :]
        else:
            k, v = cache
            key = self.held(k.shape[1], pos)[None, :]
        mask = (key >= 0) & (key <= query)
        if self.local:
            mask &= key > query - cfg.window
        return self.o(attend(q, k, v, mask, cfg)), cache

    def write(self, cache: jax.Array, new: jax.Array, pos: Any) -> jax.Array:
        """The cache [B, T or R, K, D] with the positions of `new` [B, S, K, D]; position p of a ring lies at p mod R."""
        start, ring, S = 0 if pos is None else pos, cache.shape[1], new.shape[1]
        if self.local and self.cfg.ring:
            start = start % ring
            if S > ring:  # of a long prompt, the last R positions
                new = jnp.roll(new[:, -ring:], S % ring, axis=1)
        return jax.lax.dynamic_update_slice(cache, new, (0, start, 0, 0))

    def held(self, length: int, pos: Any) -> jax.Array:
        """Which position each place of a cache holds once `pos` is written, int [length]; in a ring negative where there is none yet."""
        place = jnp.arange(length)
        return pos - (pos - place) % length if self.local and self.cfg.ring else place


_gelu = functools.partial(jax.nn.gelu, approximate=True)


class Block(nnx.Module):
    def __init__(self, name: str, cfg: Config, make: Make, *, local: bool):
        self.attn_norm = RMSNorm(f"{name}.input_layernorm", cfg.dim, cfg.norm_eps, make)
        self.attn = Attention(f"{name}.self_attn", cfg, make, local=local)
        self.attn_post_norm = RMSNorm(f"{name}.post_attention_layernorm", cfg.dim, cfg.norm_eps, make)
        self.mlp_norm = RMSNorm(f"{name}.pre_feedforward_layernorm", cfg.dim, cfg.norm_eps, make)
        self.mlp = MLP(f"{name}.mlp", cfg, make, act=_gelu)
        self.mlp_post_norm = RMSNorm(f"{name}.post_feedforward_layernorm", cfg.dim, cfg.norm_eps, make)

    def __call__(self, x: jax.Array, cos: jax.Array, sin: jax.Array, cache: Any, pos: Any) -> tuple[jax.Array, Any]:
        with jax.named_scope("attn"):
            y, cache = self.attn(self.attn_norm(x), cos, sin, cache, pos)
            x = x + self.attn_post_norm(y)
        with jax.named_scope("mlp"):
            return x + self.mlp_post_norm(self.mlp(self.mlp_norm(x))), cache


class Gemma(nnx.Module):
    """The model. With `scanned`, `lax.scan` runs over the pairs of layers: weights and caches are stacked on a leading axis of layers / 2."""

    def __init__(self, cfg: Config, make: Make, *, scanned: bool = False):
        self.embed = nnx.Param(make("model.embed_tokens.weight", (cfg.vocab, cfg.dim)))
        if scanned:
            pairs = cfg.layers // 2
            self.blocks = nnx.List([Block(f"model.layers.2*+{i}", cfg, lambda name, shape: make(name, (pairs, *shape)), local=i == 0) for i in range(2)])
        else:
            self.blocks = nnx.List([Block(f"model.layers.{i}", cfg, make, local=i % 2 == 0) for i in range(cfg.layers)])
        self.norm = RMSNorm("model.norm", cfg.dim, cfg.norm_eps, make)
        self.cfg, self.scanned = cfg, scanned

    def new_cache(self, batch: int, length: int) -> Any:
        """Zeros for keys and values: for each layer a pair of [B, T or R, K, D]; when scanned two such pairs, [layers / 2, ...]."""
        cfg, dtype = self.cfg, self.embed[...].dtype
        stack = (cfg.layers // 2,) if self.scanned else ()

        def zeros(local: bool) -> tuple[jax.Array, jax.Array]:
            shape = (*stack, batch, min(cfg.window, length) if local and cfg.ring else length, cfg.kv_heads, cfg.head_dim)
            return jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)

        return [zeros(block.attn.local) for block in self.blocks]

    def forward(self, tokens: jax.Array, cache: Any, pos: Any) -> tuple[jax.Array, Any]:
        """tokens int32 [B, S] -> logits float32 [B, vocab] of the last position, and the cache with S more positions."""
        cfg = self.cfg
        frequencies = cfg.rope_theta ** -(np.arange(0, cfg.head_dim, 2, dtype=np.float64) / cfg.head_dim)
        cos, sin = turns(tokens, pos, frequencies.astype(np.float32))
        with jax.named_scope("embed"):
            x = self.embed[...][tokens] * cfg.dim**0.5
        if self.scanned:
            graphdef, stacked = nnx.split(self.blocks)

            def pair(x: jax.Array, xs: Any) -> tuple[jax.Array, Any]:
                weights, pair_cache = xs
                caches = []
                for name, block, layer_cache in zip(("local", "global"), nnx.merge(graphdef, weights), pair_cache, strict=True):
                    with jax.named_scope(name):
                        x, layer_cache = block(x, cos, sin, layer_cache, pos)
                    caches.append(layer_cache)
                return x, caches

            with jax.named_scope("layers"):
                x, cache = jax.lax.scan(pair, x, (stacked, cache))
        else:
            x, cache = through(self.blocks, lambda block, x, layer_cache: block(x, cos, sin, layer_cache, pos), x, cache)
        with jax.named_scope("head"):
            logits = jnp.einsum("be,ve->bv", self.norm(x)[:, -1], self.embed[...])
            return soft_cap(logits.astype(jnp.float32), cfg.final_cap), cache

    def prefill(self, tokens: jax.Array, length: int) -> tuple[jax.Array, Any]:
        """Read the whole prompt, tokens [B, S]: logits [B, vocab] of the last position and a cache of `length` positions."""
        return self.forward(tokens, self.new_cache(tokens.shape[0], length), None)

    def decode_step(self, token: jax.Array, cache: Any, pos: Any) -> tuple[jax.Array, Any]:
        """Read one token [B] at position `pos`: logits [B, vocab] and the cache with that position written."""
        return self.forward(token[:, None], cache, pos)


def _read_config(meta: Mapping[str, Any], where: str, dtype: str) -> Config:
    """The Config of a config.json; raises ModelError for what this family does not compute and for missing keys."""
    (rope, kind), gelu = rotary_part(meta, where), "gelu_pytorch_tanh"
    turn = ["sliding_attention", "full_attention"] * (len(meta.get("layer_types") or ()) // 2)
    hold_to_known(
        "gemma", where, "use an unquantised Gemma 2 checkpoint: local and global layers in turn, a tied head, no biases",
        ("model_type", meta.get("model_type"), ("gemma2",)), ("hidden_activation", meta.get("hidden_activation", gelu), (gelu,)),
        ("rope_type", kind, ("default",)), ("layer_types", meta.get("layer_types") or turn, (turn,)),
        ("tie_word_embeddings", meta.get("tie_word_embeddings", True), (True,)),
        *absent(meta, "attention_bias", "use_bidirectional_attention", "quantization_config"),
    )  # fmt: skip
    with reading(where):
        return Config(vocab=meta["vocab_size"], dim=meta["hidden_size"], layers=meta["num_hidden_layers"], heads=meta["num_attention_heads"],
                      kv_heads=meta["num_key_value_heads"], head_dim=meta["head_dim"], ffn=meta["intermediate_size"],
                      window=meta["sliding_window"], query_scale=meta["query_pre_attn_scalar"], attn_cap=meta["attn_logit_softcapping"],
                      final_cap=meta["final_logit_softcapping"], rope_theta=rope.get("rope_theta", meta.get("rope_theta", 1e4)),
                      norm_eps=meta["rms_norm_eps"], dtype=dtype)  # fmt: skip


def load(path: str | Path, *, dtype: str = "float32") -> tuple[Config, Make]:
    """Open a Hugging Face folder for `generation(cfg, weights=make)`: its Config, and a Make of NumPy arrays in `dtype`.

    Linear kernels come as (in, out), the embedding as (vocab, dim); a name with `2*+i` as a stack of every second layer from i on.
    Raises ModelError for damaged files and models outside this family; the Make, for a tensor that is missing or of another shape.
    """
    file = open_safetensors(path)
    cfg = _read_config(file.meta, str(path), dtype)
    hold_to_layers(file, "model.layers.", cfg.layers)
    one = kernels(file, dtype)

    def make(name: str, shape: tuple[int, ...]) -> Any:
        for i in range(2):
            if (pairs := f"2*+{i}") in name:
                return np.stack([one(name.replace(pairs, str(2 * n + i)), shape[1:]) for n in range(shape[0])])
        return one(name, shape)

    return cfg, make


def generation(name: str | Config, **options: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """One request as a traceable function and its arguments; the options are those of `models.generate.requested`."""
    return requested(named(name, CONFIGS, "Gemma", "gemma"), lambda cfg, make, scanned, *_: of_nnx(Gemma(cfg, make, scanned=scanned)), **options)
