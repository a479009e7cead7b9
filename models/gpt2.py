"""GPT-2 in Flax Linen: learned positions, LayerNorm, biases, a tied head; prefill and the token loop as one traceable function.

Like models.llama, `generation(name, batch=, prompt=, new_tokens=)` hands on `(fn, args)`, of shapes only without `seed` or `weights`;
the weights are a Linen tree {"params": ...}, and keys and values lie in Linen's `cache` collection.

Shapes: B batch, S tokens read at once, T cache length (prompt + new tokens), H heads, D head size, E width.
Left out: padded prompts, an untied head, cross-attention. Source: Radford et al., "Language Models are Unsupervised Multitask Learners" (2019).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from .checkpoint import Make, ModelError, hold_to_known, hold_to_layers, hold_to_numbers, open_safetensors, reading, stacks
from .generate import Steps, named, parameters, requested


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Shape of one member of the family; nothing but numbers."""

    vocab: int = 50_257
    positions: int = 1024
    dim: int
    layers: int
    heads: int
    ffn: int
    norm_eps: float = 1e-5
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        hold_to_numbers(self, ("vocab", "positions", "dim", "layers", "heads", "ffn"))
        if self.dim % self.heads:
            raise ModelError(f"a model cannot have {self.heads} heads in a width of {self.dim}", where="the configuration", mend="heads divide dim")


CONFIGS: dict[str, Config] = {
    "tiny": Config(vocab=256, positions=512, dim=64, layers=3, heads=4, ffn=256, dtype="float32"),
    "gpt2": Config(dim=768, layers=12, heads=12, ffn=3072),
    "gpt2-xl": Config(dim=1600, layers=48, heads=25, ffn=6400),
}


class Attention(nn.Module):
    cfg: Config
    length: int  # of the cache

    @nn.compact
    def __call__(self, x: jax.Array, pos: Any) -> jax.Array:
        """x [B, S, E]; pos is None in prefill (a prompt from position 0), else the position of the one new token."""
        B, S, E = x.shape
        H, D = self.cfg.heads, E // self.cfg.heads
        q, k, v = (part.reshape(B, S, H, D) for part in jnp.split(nn.Dense(3 * E, name="qkv")(x), 3, axis=-1))
        keys = self.variable("cache", "keys", jnp.zeros, (B, self.length, H, D), k.dtype)
        values = self.variable("cache", "values", jnp.zeros, (B, self.length, H, D), v.dtype)
        start = 0 if pos is None else pos
        keys.value = jax.lax.dynamic_update_slice_in_dim(keys.value, k, start, axis=1)
        values.value = jax.lax.dynamic_update_slice_in_dim(values.value, v, start, axis=1)
        if pos is None:
            mask = jnp.tril(jnp.ones((S, S), bool))
        else:
            k, v, mask = keys.value, values.value, jnp.arange(self.length)[None, :] <= pos
        scores = jnp.einsum("bshd,bthd->bhst", q, k, preferred_element_type=jnp.float32) * D**-0.5
        shares = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1).astype(v.dtype)
        return nn.Dense(E, name="out")(jnp.einsum("bhst,bthd->bshd", shares, v).reshape(B, S, E))


class MLP(nn.Module):
    cfg: Config

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(x.shape[-1], name="down")(nn.gelu(nn.Dense(self.cfg.ffn, name="up")(x), approximate=True))


class Block(nn.Module):
    cfg: Config
    length: int

    @nn.compact
    def __call__(self, x: jax.Array, pos: Any) -> tuple[jax.Array, None]:
        """x [B, S, E] -> the same, and nothing (the form that nn.scan wants)."""
        x = x + Attention(self.cfg, self.length, name="attn")(_norm(self.cfg, "attn_norm")(x), pos)
        return x + MLP(self.cfg, name="mlp")(_norm(self.cfg, "mlp_norm")(x)), None


def _norm(cfg: Config, name: str) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=cfg.norm_eps, use_fast_variance=False, name=name)


class GPT2(nn.Module):
    """The model. With `scanned` the blocks' weights and caches are stacked on a leading layer axis and run by `nn.scan`."""

    cfg: Config
    length: int
    scanned: bool

    @nn.compact
    def __call__(self, tokens: jax.Array, pos: Any) -> jax.Array:
        """tokens int32 [B, S], a prompt (pos None) or one token at position `pos` -> logits float32 [B, vocab] of the last position."""
        cfg = self.cfg
        embed = nn.Embed(cfg.vocab, cfg.dim, name="embed")
        places = nn.Embed(cfg.positions, cfg.dim, name="position_embed")
        x = embed(tokens) + places(jnp.arange(tokens.shape[1]) if pos is None else jnp.full((1,), pos))
        if self.scanned:
            axes = {"params": 0, "cache": 0}
            stack = nn.scan(Block, variable_axes=axes, split_rngs={"params": True}, in_axes=nn.broadcast, length=cfg.layers)
            x, _ = stack(cfg, self.length, name="layers")(x, pos)
        else:
            for i in range(cfg.layers):
                x, _ = Block(cfg, self.length, name=f"layers.{i}")(x, pos)
        with jax.named_scope("head"):
            return embed.attend(_norm(cfg, "norm")(x)[:, -1]).astype(jnp.float32)


_ON_DISK = {
    "embed.embedding": "wte.weight", "position_embed.embedding": "wpe.weight", "norm.scale": "ln_f.weight", "shift": "ln_f.bias",
    "attn_norm.scale": "ln_1.weight", "attn_shift": "ln_1.bias", "mlp_norm.scale": "ln_2.weight", "mlp_shift": "ln_2.bias",
    "attn.qkv": "attn.c_attn", "attn.out": "attn.c_proj", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj",
}  # fmt: skip


def _on_disk(name: str) -> str:
    """What Hugging Face calls a parameter: layers.3.attn.qkv.kernel is h.3.attn.c_attn.weight."""
    layer, name = ("", name) if not name.startswith("layers.") else (f"h.{name.split('.')[1]}.", name.split(".", 2)[2])
    if name in _ON_DISK:
        return layer + _ON_DISK[name]
    stem, _, leaf = name.rpartition(".")
    return f"{layer}{_ON_DISK[stem]}.{'weight' if leaf == 'kernel' else leaf}"


def _read_config(meta: Mapping[str, Any], where: str, dtype: str) -> Config:
    """The Config of a config.json; raises ModelError for what this family does not compute and for missing keys."""
    hold_to_known(
        "gpt2", where, "use a GPT-2 checkpoint with gelu_new, a tied head and scores divided by the root of the head size",
        *((key, meta.get(key), known) for key, known in (
            ("model_type", ("gpt2",)), ("activation_function", (None, "gelu_new", "gelu_pytorch_tanh")), ("scale_attn_weights", (None, True)),
            ("scale_attn_by_inverse_layer_idx", (None, False)), ("add_cross_attention", (None, False)), ("tie_word_embeddings", (None, True)),
        )),
    )  # fmt: skip
    with reading(where):
        dim = meta["n_embd"]
        return Config(vocab=meta["vocab_size"], positions=meta["n_positions"], dim=dim, layers=meta["n_layer"], heads=meta["n_head"],
                      ffn=meta.get("n_inner") or 4 * dim, norm_eps=meta["layer_norm_epsilon"], dtype=dtype)  # fmt: skip


def load(path: str | Path, *, dtype: str = "float32") -> tuple[Config, Make]:
    """Open a Hugging Face folder for `generation(cfg, weights=make)`: its Config, and a Make of NumPy arrays in `dtype`.

    Names are Linen's, joined by dots; names with `*` come as a stack [layers, ...]. Raises ModelError for damaged files and models
    outside this family; the Make, for a tensor that is missing or not of the shape asked for.
    """
    file = open_safetensors(path)
    cfg = _read_config(file.meta, str(path), dtype)
    prefix = "" if "wte.weight" in file.names else "transformer."  # the published files hold the model without its head

    def one(name: str, shape: tuple[int, ...]) -> np.ndarray:
        return np.ascontiguousarray(file.tensor(prefix + _on_disk(name), shape), dtype=jnp.dtype(dtype))

    hold_to_layers(file, f"{prefix}h.", cfg.layers)
    return cfg, stacks(one)


def _build(cfg: Config, make: Make, scanned: bool, prompt: int, new_tokens: int) -> tuple[Any, Callable[[Any], Steps]]:
    """The weights, and prefill and decode_step under such weights. Raises ModelError for more positions than the model has learned."""
    length = prompt + new_tokens
    if length - 1 > cfg.positions:  # the last token is written, never read
        raise ModelError(f"the request reads {length - 1} positions, the model has learned {cfg.positions}", where="models.gpt2.generation",
                         mend="shorten prompt or new_tokens, or use a Config with more positions")  # fmt: skip
    model = GPT2(cfg, length, scanned=scanned)

    def steps(weights: Any) -> Steps:
        def prefill(tokens: jax.Array, length: int) -> tuple[jax.Array, Any]:
            return model.apply(weights, tokens, None, mutable=["cache"])

        def decode_step(token: jax.Array, cache: Any, pos: Any) -> tuple[jax.Array, Any]:
            return model.apply({**weights, **cache}, token[:, None], pos, mutable=["cache"])

        return prefill, decode_step

    return parameters(model.clone(scanned=True), make, {"layers": cfg.layers}, scanned), steps


def generation(name: str | Config, **options: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """One request as a traceable function and its arguments; the options are those of `models.generate.requested`.

    Raises ModelError also for a request longer than the positions that the model has learned.
    """
    return requested(named(name, CONFIGS, "GPT-2", "gpt2"), _build, **options)
