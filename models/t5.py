"""T5 in Flax Linen, the original (ReLU, tied head) and 1.1 (gated GELU, Flan): encoder, decoder, and generate as one traceable function.

`generation(name, batch=, prompt=, new_tokens=)` hands on `(fn, args)` like models.llama; the weights are a Linen tree {"params": ...}.
Prefill is all that is done once: the encoder reads the prompt, each decoder layer makes its cross-attention keys and values of the
outcome (Linen's collection `memory`, which decode only reads), and the decoder reads its start token. The token loop then adds to the
collection `cache`, the decoder's own keys and values.

Shapes: B batch, S prompt length, T cache length (new tokens + 1), H heads, D head size, E width.
Left out: padded prompts. Source: Raffel et al., "Exploring the Limits of Transfer Learning" (2020), arXiv 1910.10683.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from .checkpoint import (
    Checkpoint,
    Make,
    ModelError,
    hold_to_known,
    hold_to_layers,
    hold_to_numbers,
    open_safetensors,
    reading,
    stacks,
)
from .generate import Steps, named, parameters, requested


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Shape of one member of the family. `scaled_head` divides by sqrt(dim) before the head, as the original does and 1.1 does not."""

    vocab: int = 32_128
    dim: int
    layers: int  # of the encoder
    decoder_layers: int
    heads: int
    head_dim: int = 64
    ffn: int
    gated: bool = False
    tied: bool = True
    scaled_head: bool = True
    buckets: int = 32
    max_distance: int = 128
    start_token: int = 0
    norm_eps: float = 1e-6
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        hold_to_numbers(self, ("vocab", "dim", "layers", "decoder_layers", "heads", "head_dim", "ffn", "buckets", "max_distance"))
        if self.buckets < 4 or self.max_distance <= self.buckets // 2:
            raise ModelError(f"a model cannot have {self.buckets} buckets for distances up to {self.max_distance}", where="the configuration",
                             mend="give 4 buckets or more, and a max_distance above half of them")  # fmt: skip
        if self.start_token not in range(self.vocab):
            raise ModelError(f"a model cannot have start_token = {self.start_token!r}", where="the configuration", mend="give a token of the vocabulary")


CONFIGS: dict[str, Config] = {
    "tiny": Config(vocab=256, dim=64, layers=2, decoder_layers=3, heads=4, head_dim=16, ffn=128, gated=True, tied=False, scaled_head=False,
                   dtype="float32"),
    "t5-base": Config(dim=768, layers=12, decoder_layers=12, heads=12, ffn=3072),
    "t5-3b": Config(dim=1024, layers=24, decoder_layers=24, heads=32, head_dim=128, ffn=16_384),
    "flan-t5-xl": Config(dim=2048, layers=24, decoder_layers=24, heads=32, head_dim=64, ffn=5120, gated=True, tied=False, scaled_head=False),
    "flan-t5-xxl": Config(dim=4096, layers=24, decoder_layers=24, heads=64, ffn=10_240, gated=True, tied=False, scaled_head=False),
}  # fmt: skip


def bucket(ahead: jax.Array, cfg: Config, *, both_ways: bool) -> jax.Array:
    """The bucket of a distance, int32 of any shape: how far the position looked at lies `ahead` of the one that looks.

    Near distances have a bucket each, farther ones share theirs by the logarithm, as a table reckoned in float32 says. `both_ways`
    gives half of the buckets to positions ahead; else what lies ahead, which a causal mask hides, counts as distance 0.
    """
    half = cfg.buckets // 2 if both_ways else cfg.buckets
    exact = half // 2
    distance = np.arange(cfg.max_distance + 1, dtype=np.float32)
    far = exact + (np.log(np.maximum(distance, 1) / exact) / math.log(cfg.max_distance / exact) * (half - exact)).astype(np.int32)
    table = jnp.asarray(np.where(distance < exact, distance, np.minimum(far, half - 1)), jnp.int32)
    if both_ways:
        return table[jnp.minimum(jnp.abs(ahead), cfg.max_distance)] + jnp.where(ahead > 0, half, 0)
    return table[jnp.clip(-ahead, 0, cfg.max_distance)]


def attend(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None) -> jax.Array:
    """q [B, S, H, D] over k, v [B, T, H, D], with bias float32 [H, S, T]; T5 does not scale the scores. Gives [B, S, H * D]."""
    scores = jnp.einsum("bshd,bthd->bhst", q, k, preferred_element_type=jnp.float32)
    shares = jax.nn.softmax(scores if bias is None else scores + bias, axis=-1).astype(v.dtype)
    return jnp.einsum("bhst,bthd->bshd", shares, v).reshape(*q.shape[:2], -1)


def _linear(width: int, name: str) -> nn.Dense:
    return nn.Dense(width, use_bias=False, name=name)


def _norm(cfg: Config, name: str) -> nn.RMSNorm:
    return nn.RMSNorm(epsilon=cfg.norm_eps, use_fast_variance=False, name=name)


class Attention(nn.Module):
    cfg: Config
    kind: Literal["encoder", "decoder", "cross"]
    length: int = 0  # of the decoder's cache

    @nn.compact
    def __call__(self, x: jax.Array, bias: jax.Array | None, memory: jax.Array | None = None, pos: Any = 0) -> jax.Array:
        """x [B, S, E] over itself ("encoder"), over the cache with x put at `pos` ("decoder"), or over `memory` [B, S, E] ("cross").

        With no `memory` to read, cross-attention uses the keys and values that it made of an earlier one.
        """
        H, D = self.cfg.heads, self.cfg.head_dim
        read = memory if self.kind == "cross" else x
        q = _linear(H * D, "q")(x).reshape(*x.shape[:2], H, D)
        if read is None:
            k, v = self.get_variable("memory", "keys"), self.get_variable("memory", "values")
        else:
            k, v = (_linear(H * D, name)(read).reshape(*read.shape[:2], H, D) for name in "kv")
        if self.kind == "cross" and read is not None:
            self.put_variable("memory", "keys", k)
            self.put_variable("memory", "values", v)
        if self.kind == "decoder":
            keys = self.variable("cache", "keys", jnp.zeros, (x.shape[0], self.length, H, D), k.dtype)
            values = self.variable("cache", "values", jnp.zeros, (x.shape[0], self.length, H, D), v.dtype)
            k = keys.value = jax.lax.dynamic_update_slice_in_dim(keys.value, k, pos, axis=1)
            v = values.value = jax.lax.dynamic_update_slice_in_dim(values.value, v, pos, axis=1)
        return _linear(self.cfg.dim, "o")(attend(q, k, v, bias))


class MLP(nn.Module):
    cfg: Config

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.cfg.gated:
            h = nn.gelu(_linear(self.cfg.ffn, "wi_0")(x), approximate=True) * _linear(self.cfg.ffn, "wi_1")(x)
        else:
            h = nn.relu(_linear(self.cfg.ffn, "wi")(x))
        return _linear(self.cfg.dim, "wo")(h)


class EncoderLayer(nn.Module):
    cfg: Config

    @nn.compact
    def __call__(self, x: jax.Array, bias: jax.Array) -> tuple[jax.Array, None]:
        x = x + Attention(self.cfg, "encoder", name="attn")(_norm(self.cfg, "attn_norm")(x), bias)
        return x + MLP(self.cfg, name="mlp")(_norm(self.cfg, "mlp_norm")(x)), None


class DecoderLayer(nn.Module):
    cfg: Config
    length: int

    @nn.compact
    def __call__(self, x: jax.Array, bias: jax.Array, memory: jax.Array | None, pos: Any) -> tuple[jax.Array, None]:
        x = x + Attention(self.cfg, "decoder", self.length, name="attn")(_norm(self.cfg, "attn_norm")(x), bias, pos=pos)
        x = x + Attention(self.cfg, "cross", name="cross")(_norm(self.cfg, "cross_norm")(x), None, memory)
        return x + MLP(self.cfg, name="mlp")(_norm(self.cfg, "mlp_norm")(x)), None


class Stack(nn.Module):
    """Encoder or decoder: the bias of relative positions, which all layers share, the layers (run by `nn.scan` if `scanned`), a norm."""

    cfg: Config
    length: int  # of the decoder's cache; 0 makes an encoder
    scanned: bool

    @nn.compact
    def __call__(self, x: jax.Array, memory: jax.Array | None = None, pos: Any = None) -> jax.Array:
        """x [B, S, E] -> the same; a decoder reads one token (S = 1) at `pos`, and the encoder's outcome or nothing as `memory`."""
        cfg, decoder = self.cfg, self.length > 0
        table = self.param("relative_embedding", nn.initializers.zeros, (cfg.buckets, cfg.heads))
        with jax.named_scope("bias"):
            seen = jnp.arange(self.length if decoder else x.shape[1])
            ahead = seen[None, :] - (jnp.full((1,), pos) if decoder else seen)[:, None]
            bias = table[bucket(ahead, cfg, both_ways=not decoder)].transpose(2, 0, 1).astype(jnp.float32)
            bias = jnp.where(ahead > 0, -jnp.inf, bias) if decoder else bias
        kind, fields, count, given = EncoderLayer, (cfg,), cfg.layers, (bias,)
        if decoder:
            kind, fields, count, given = DecoderLayer, (cfg, self.length), cfg.decoder_layers, (bias, memory, pos)
        if self.scanned:
            kind = nn.scan(kind, variable_axes={"params": 0, "cache": 0, "memory": 0}, split_rngs={"params": True}, in_axes=nn.broadcast, length=count)
        for name in ["layers"] if self.scanned else [f"layers.{i}" for i in range(count)]:
            x, _ = kind(*fields, name=name)(x, *given)
        return _norm(cfg, "norm")(x)


class T5(nn.Module):
    cfg: Config
    length: int
    scanned: bool

    @nn.compact
    def __call__(self, tokens: jax.Array, pos: Any) -> jax.Array:
        """The prompt, int32 [B, S] (pos None), or one new token [B, 1] at `pos` -> logits float32 [B, vocab] of the token after it."""
        cfg, memory = self.cfg, None
        embed = nn.Embed(cfg.vocab, cfg.dim, name="embed")
        if pos is None:
            memory = Stack(cfg, 0, self.scanned, name="encoder")(embed(tokens))
            tokens, pos = jnp.full((tokens.shape[0], 1), cfg.start_token, jnp.int32), 0
        x = Stack(cfg, self.length, self.scanned, name="decoder")(embed(tokens), memory, pos)[:, -1]
        with jax.named_scope("head"):
            x = x * cfg.dim**-0.5 if cfg.scaled_head else x
            return (embed.attend(x) if cfg.tied else _linear(cfg.vocab, "head")(x)).astype(jnp.float32)


_ON_DISK = {"attn": "SelfAttention", "cross": "EncDecAttention", "mlp": "DenseReluDense"}


def _on_disk(name: str) -> str:
    """What Hugging Face calls a parameter: decoder.layers.3.mlp.wo.kernel is decoder.block.3.layer.2.DenseReluDense.wo.weight."""
    stack, _, rest = name.partition(".")
    if not rest.startswith("layers."):
        return {"embed": "shared.weight", "head": "lm_head.weight"}.get(stack) or stack + (
            ".final_layer_norm.weight" if rest.startswith("norm") else ".block.0.layer.0.SelfAttention.relative_attention_bias.weight")  # fmt: skip
    _, layer, part, leaf, *_ = rest.split(".")
    parts = ("attn", "mlp") if stack == "encoder" else ("attn", "cross", "mlp")
    inside = "layer_norm" if part.endswith("_norm") else f"{_ON_DISK[part]}.{leaf}"
    return f"{stack}.block.{layer}.layer.{parts.index(part.removesuffix('_norm'))}.{inside}.weight"


def _read_config(file: Checkpoint, dtype: str) -> Config:
    """The Config of a folder; raises ModelError for what this family does not compute and for missing keys."""
    meta, where = file.meta, str(file.path)
    feed = meta.get("feed_forward_proj", "relu")
    hold_to_known("t5", where, "use a T5, T5 1.1 or Flan-T5 checkpoint with feed_forward_proj relu or gated-gelu",
                  ("model_type", meta.get("model_type"), ("t5",)), ("feed_forward_proj", feed, ("relu", "gated-gelu")))  # fmt: skip
    with reading(where):
        return Config(vocab=meta["vocab_size"], dim=meta["d_model"], layers=meta["num_layers"], heads=meta["num_heads"], head_dim=meta["d_kv"],
                      decoder_layers=meta["num_layers"] if (n := meta.get("num_decoder_layers")) is None else n, ffn=meta["d_ff"],
                      gated=feed == "gated-gelu", tied="lm_head.weight" not in file.names, buckets=meta["relative_attention_num_buckets"],
                      scaled_head=bool(meta.get("scale_decoder_outputs", meta.get("tie_word_embeddings", True))),
                      max_distance=meta.get("relative_attention_max_distance", 128), norm_eps=meta["layer_norm_epsilon"],
                      start_token=meta.get("decoder_start_token_id") or 0, dtype=dtype)  # fmt: skip


def load(path: str | Path, *, dtype: str = "float32") -> tuple[Config, Make]:
    """Open a Hugging Face folder for `generation(cfg, weights=make)`: its Config, and a Make of NumPy arrays in `dtype`.

    Names are Linen's, joined by dots; names with `*` come as a stack [layers, ...]. Raises ModelError for damaged files and models
    outside this family; the Make, for a tensor that is missing or not of the shape asked for.
    """
    file = open_safetensors(path)
    cfg = _read_config(file, dtype)

    def one(name: str, shape: tuple[int, ...]) -> np.ndarray:
        kernel = name.endswith(".kernel")
        value = file.tensor(_on_disk(name), shape[::-1] if kernel else shape)
        return np.ascontiguousarray(value.T if kernel else value, dtype=jnp.dtype(dtype))

    hold_to_layers(file, "encoder.block.", cfg.layers)
    hold_to_layers(file, "decoder.block.", cfg.decoder_layers)
    return cfg, stacks(one)


def _build(cfg: Config, make: Make, scanned: bool, prompt: int, new_tokens: int) -> tuple[Any, Callable[[Any], Steps]]:
    """The weights, and prefill and decode_step under such weights."""
    model = T5(cfg, new_tokens + 1, scanned=scanned)

    def steps(weights: Any) -> Steps:
        def prefill(tokens: jax.Array, length: int) -> tuple[jax.Array, Any]:
            return model.apply(weights, tokens, None, mutable=["cache", "memory"])

        def decode_step(token: jax.Array, state: Any, pos: Any) -> tuple[jax.Array, Any]:
            logits, changed = model.apply({**weights, **state}, token[:, None], pos, mutable=["cache"])
            return logits, {**state, **changed}

        return prefill, decode_step

    return parameters(model.clone(scanned=True), make, {"encoder.layers": cfg.layers, "decoder.layers": cfg.decoder_layers}, scanned), steps


def generation(name: str | Config, **options: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """One request as a traceable function and its arguments; the options are those of `models.generate.requested`.

    `prompt` is what the encoder reads; the decoder starts at the Config's start_token.
    """
    return requested(named(name, CONFIGS, "T5", "t5"), _build, start=1, **options)
