"""DeepSeek V2 and V3 in Flax NNX: multi-head latent attention, then shared and routed experts (dense MLPs in the first layers).

The cache of a layer is the compressed latent [B, T, R] and one rotary key [B, T, D] for all heads. Prefill expands the latent to keys
and values of every head; decode absorbs these projections into the query and the output instead, so that each step reads the latent as
it lies. V2 routes by softmax, V3 by sigmoid with a bias that only chooses; both may first choose groups of experts. Left out:
V3's module for predicting further tokens, and its fp8 weights. Names, arguments and results are those of models/llama.py.

Shapes: B batch, S prompt length, T cache length, H query heads, R latent rank, E width; a head has N plain and D rotary dimensions, and V values.
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

from .checkpoint import (
    Make,
    ModelError,
    absent,
    hold_to_known,
    hold_to_numbers,
    kernels,
    open_safetensors,
    reading,
    rotary_part,
    stacks,
)
from .generate import named, of_nnx, requested, through
from .llama import MLP, Block, Linear, RMSNorm, mlp
from .llama import rotate as rotate_halves
from .mixtral import Experts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Yarn:
    """YaRN's scaling of the rotary frequencies; `mscale_all` also sharpens the softmax."""

    factor: float = 40.0
    original: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all: float = 1.0

    def __post_init__(self) -> None:
        hold_to_numbers(self, (), ("factor", "original", "beta_fast", "beta_slow", "mscale", "mscale_all"))

    def magnitude(self, mscale: float) -> float:
        return 0.1 * mscale * math.log(max(self.factor, 1.0)) + 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Shape of one member of the family; the first `dense` layers have an MLP of width `ffn`, the others experts of width `moe_ffn`."""

    vocab: int
    dim: int
    layers: int
    heads: int
    ffn: int
    moe_ffn: int
    experts: int
    top_k: int
    shared: int
    dense: int = 1
    q_rank: int | None = None
    kv_rank: int = 512
    nope_dim: int = 128
    rope_dim: int = 64
    v_dim: int = 128
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    groups: int = 1
    top_groups: int = 1
    normalise: bool = False
    share_scale: float = 1.0
    rope_theta: float = 10_000.0
    rope_scaling: Yarn | None = None
    norm_eps: float = 1e-6
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        hold_to_numbers(self, ("vocab", "dim", "layers", "heads", "rope_dim", "ffn"), ("rope_theta", "norm_eps"))
        sizes = (self.moe_ffn, self.experts, self.top_k, self.shared, self.q_rank or 1, self.kv_rank, self.nope_dim, self.v_dim, self.groups)
        whole = all(isinstance(n, int | np.integer) and n > 0 for n in (*sizes, self.top_groups)) and isinstance(self.dense, int | np.integer)
        if not (whole and self.rope_dim % 2 == 0 and 0 <= self.dense < self.layers and self.experts % self.groups == 0 and self.top_groups <= self.groups
                and self.top_k <= self.experts // self.groups * self.top_groups and self.scoring in ("softmax", "sigmoid")):  # fmt: skip
            raise ModelError(f"these sizes make no model: {self}", where="the configuration", mend="use whole numbers; groups divide the "
                             "experts, the chosen groups hold top_k of them, and a layer is left after the dense ones")  # fmt: skip

    @property
    def softmax_scale(self) -> float:
        sharper = self.rope_scaling.magnitude(self.rope_scaling.mscale_all) if self.rope_scaling else 1.0
        return (self.nope_dim + self.rope_dim) ** -0.5 * sharper**2


_V2 = Yarn(mscale=0.707, mscale_all=0.707)
CONFIGS: dict[str, Config] = {
    "tiny": Config(vocab=256, dim=64, layers=3, heads=4, ffn=160, moe_ffn=48, experts=8, top_k=3, shared=1, q_rank=24, kv_rank=32, nope_dim=16,
                   rope_dim=8, v_dim=16, scoring="sigmoid", groups=4, top_groups=2, normalise=True, share_scale=2.5, dtype="float32"),
    "deepseek-v2-lite": Config(vocab=102_400, dim=2048, layers=27, heads=16, ffn=10_944, moe_ffn=1408, experts=64, top_k=6, shared=2, rope_scaling=_V2),
    "deepseek-v2": Config(vocab=102_400, dim=5120, layers=60, heads=128, ffn=12_288, moe_ffn=1536, experts=160, top_k=6, shared=2, q_rank=1536,
                          groups=8, top_groups=3, share_scale=16.0, rope_scaling=_V2),
    "deepseek-v3": Config(vocab=129_280, dim=7168, layers=61, heads=128, ffn=18_432, moe_ffn=2048, experts=256, top_k=8, shared=1, dense=3, q_rank=1536,
                          scoring="sigmoid", groups=8, top_groups=4, normalise=True, share_scale=2.5, rope_scaling=Yarn()),
}  # fmt: skip


def rotary(cfg: Config, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin float32 [S, D/2] of the angles at `positions` [S], with YaRN's scaling where the config has it."""
    D, magnitude = cfg.rope_dim, 1.0
    freq = cfg.rope_theta ** -(np.arange(0, D, 2, dtype=np.float64) / D)
    if (s := cfg.rope_scaling) is not None:
        # the dimension that turns `beta` times within the original context; between the two, kept and divided frequencies are blended
        low, high = (D * math.log(s.original / (2 * math.pi * beta)) / (2 * math.log(cfg.rope_theta)) for beta in (s.beta_fast, s.beta_slow))
        low, high = max(math.floor(low), 0), min(math.ceil(high), D - 1)
        divided = np.clip((np.arange(D // 2) - low) / (high - low or 1e-3), 0.0, 1.0)
        freq = freq * (1 - divided) + freq / s.factor * divided
        magnitude = s.magnitude(s.mscale) / s.magnitude(s.mscale_all)
    angles = positions.astype(jnp.float32)[:, None] * jnp.asarray(freq.astype(np.float32))
    return jnp.cos(angles) * magnitude, jnp.sin(angles) * magnitude


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turn neighbouring pairs of each head, x [B, S, H, D], by cos and sin [S, D/2]; the result has first the even, then the odd ones."""
    return rotate_halves(x.reshape(*x.shape[:-1], -1, 2).swapaxes(-1, -2).reshape(x.shape), cos, sin)


class Attention(nnx.Module):
    def __init__(self, name: str, cfg: Config, make: Make):
        E, H, R, N, D, V = cfg.dim, cfg.heads, cfg.kv_rank, cfg.nope_dim, cfg.rope_dim, cfg.v_dim
        if cfg.q_rank is None:
            self.q = Linear(f"{name}.q_proj", E, H * (N + D), make)
        else:
            self.q_a = Linear(f"{name}.q_a_proj", E, cfg.q_rank, make)
            self.q_norm = RMSNorm(f"{name}.q_a_layernorm", cfg.q_rank, 1e-6, make)
            self.q_b = Linear(f"{name}.q_b_proj", cfg.q_rank, H * (N + D), make)
        self.kv_a = Linear(f"{name}.kv_a_proj_with_mqa", E, R + D, make)
        self.kv_norm = RMSNorm(f"{name}.kv_a_layernorm", R, 1e-6, make)
        self.kv_b = Linear(f"{name}.kv_b_proj", R, H * (N + V), make)
        self.o = Linear(f"{name}.o_proj", H * V, E, make)
        self.cfg = cfg

    def __call__(self, x: jax.Array, cos: jax.Array, sin: jax.Array, cache: Any, pos: Any) -> tuple[jax.Array, Any]:
        """x [B, S, E], cache (latent [B, T, R], key [B, T, D]); pos is None in prefill, else the position of the one new token."""
        cfg = self.cfg
        B, S, _ = x.shape
        q = self.q(x) if cfg.q_rank is None else self.q_b(self.q_norm(self.q_a(x)))
        plain, turned = jnp.split(q.reshape(B, S, cfg.heads, -1), [cfg.nope_dim], axis=-1)
        latent, key = jnp.split(self.kv_a(x), [cfg.kv_rank], axis=-1)
        latent, key, turned = self.kv_norm(latent), rotate(key[:, :, None], cos, sin)[:, :, 0], rotate(turned, cos, sin)
        start = (0, 0 if pos is None else pos, 0)
        cache = tuple(jax.lax.dynamic_update_slice(c, n, start) for c, n in zip(cache, (latent, key), strict=True))
        if pos is None:  # expanded: keys and values of every head are read out of the latent
            keys, values = jnp.split(self.kv_b(latent).reshape(B, S, cfg.heads, -1), [cfg.nope_dim], axis=-1)
            scores = jnp.einsum("bshn,bthn->bhst", plain, keys, preferred_element_type=jnp.float32)
            mask = jnp.tril(jnp.ones((S, S), bool))
        else:  # absorbed: the query is taken into the latent space, and what it reads there is taken out of it
            latent, key = cache
            kernel = self.kv_b.kernel[...].reshape(cfg.kv_rank, cfg.heads, -1)
            to_keys, to_values = jnp.split(kernel, [cfg.nope_dim], axis=-1)
            inner = jnp.einsum("bshn,rhn->bshr", plain, to_keys)
            scores = jnp.einsum("bshr,btr->bhst", inner, latent, preferred_element_type=jnp.float32)
            mask = jnp.arange(key.shape[1])[None, :] <= pos
        scores = scores + jnp.einsum("bshd,btd->bhst", turned, key, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(jnp.where(mask, scores * cfg.softmax_scale, -jnp.inf), axis=-1).astype(x.dtype)
        if pos is None:
            y = jnp.einsum("bhst,bthv->bshv", weights, values)
        else:
            y = jnp.einsum("bshr,rhv->bshv", jnp.einsum("bhst,btr->bshr", weights, latent), to_values)
        return self.o(y.reshape(B, S, -1)), cache


class MoE(nnx.Module):
    def __init__(self, name: str, cfg: Config, make: Make):
        self.router = nnx.Param(make(f"{name}.gate.weight", (cfg.dim, cfg.experts)))
        if cfg.scoring == "sigmoid":
            bias = make(f"{name}.gate.e_score_correction_bias", (cfg.experts,))  # float32 whatever the dtype of the weights
            self.bias = nnx.Param(jax.ShapeDtypeStruct(bias.shape, jnp.float32) if isinstance(bias, jax.ShapeDtypeStruct) else bias.astype(jnp.float32))
        self.experts = Experts(f"{name}.experts", cfg.experts, cfg.dim, cfg.moe_ffn, make, ("gate_proj", "up_proj", "down_proj"))
        self.shared = MLP(f"{name}.shared_experts", dataclasses.replace(cfg, ffn=cfg.shared * cfg.moe_ffn), make)
        self.cfg = cfg

    def __call__(self, x: jax.Array) -> jax.Array:
        tokens = x.reshape(-1, x.shape[-1])
        with jax.named_scope("router"):
            chosen, shares = self.route(tokens.astype(jnp.float32))
        with jax.named_scope("experts"):
            y = self.experts(tokens, chosen, shares).reshape(x.shape)
        with jax.named_scope("shared"):
            return y + self.shared(x)

    def route(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Tokens [N, E] -> their experts int [N, top_k] and the shares of these, all in float32, as small differences decide."""
        cfg, N, sigmoid = self.cfg, x.shape[0], self.cfg.scoring == "sigmoid"
        logits = x @ self.router[...].astype(jnp.float32)
        scores = jax.nn.sigmoid(logits) if sigmoid else jax.nn.softmax(logits, axis=-1)
        ranked = scores + self.bias[...] if sigmoid else scores
        if cfg.groups > 1:  # a group is as good as its best expert (V2) or its two best (V3)
            grouped = ranked.reshape(N, cfg.groups, -1)
            merit = jax.lax.top_k(grouped, min(2 if sigmoid else 1, grouped.shape[2]))[0].sum(axis=-1)
            allowed = jax.nn.one_hot(jax.lax.top_k(merit, cfg.top_groups)[1], cfg.groups, dtype=bool).any(axis=1)
            ranked = jnp.where(allowed[:, :, None], grouped, -jnp.inf).reshape(N, -1)
        chosen = jax.lax.top_k(ranked, cfg.top_k)[1]
        shares = jnp.take_along_axis(scores, chosen, axis=-1)
        if cfg.normalise:
            shares = shares / (jnp.sum(shares, axis=-1, keepdims=True) + 1e-20)
        return chosen, shares * cfg.share_scale


def attention(name: str, cfg: Config, make: Make) -> nnx.Module:
    """What stands in the place of Llama's attention."""
    return Attention(f"{name}.self_attn", cfg, make)


def experts(name: str, cfg: Config, make: Make) -> nnx.Module:
    """What stands in the place of Llama's MLP, after the dense layers."""
    return MoE(f"{name}.mlp", cfg, make)


class DeepSeek(nnx.Module):
    """The model. With `scanned` the layers after the dense ones are stacked, weights and caches, and run by `lax.scan`."""

    def __init__(self, cfg: Config, make: Make, *, scanned: bool = False):
        self.embed = nnx.Param(make("model.embed_tokens.weight", (cfg.vocab, cfg.dim)))
        alone = cfg.dense if scanned else cfg.layers
        parts = [mlp if i < cfg.dense else experts for i in range(alone)]
        self.blocks = nnx.List([Block(f"model.layers.{i}", cfg, make, attention=attention, mlp=part) for i, part in enumerate(parts)])
        if scanned:
            stacked = cfg.layers - cfg.dense
            self.stack = Block("model.layers.*", cfg, lambda name, shape: make(name, (stacked, *shape)), attention=attention, mlp=experts)
        self.norm = RMSNorm("model.norm", cfg.dim, cfg.norm_eps, make)
        self.head = Linear("lm_head", cfg.dim, cfg.vocab, make)
        self.cfg, self.scanned = cfg, scanned

    def new_cache(self, batch: int, length: int) -> Any:
        """Zeros: a pair of latent [B, T, R] and rotary key [B, T, D] for each layer; when scanned the last pair is [layers - dense, ...]."""
        cfg, dtype = self.cfg, self.embed[...].dtype
        stacks: list[tuple[int, ...]] = [()] * len(self.blocks) + ([(cfg.layers - cfg.dense,)] if self.scanned else [])
        return [tuple(jnp.zeros((*stack, batch, length, width), dtype) for width in (cfg.kv_rank, cfg.rope_dim)) for stack in stacks]

    def forward(self, tokens: jax.Array, cache: Any, pos: Any) -> tuple[jax.Array, Any]:
        """tokens int32 [B, S] -> logits float32 [B, vocab] of the last position, and the cache with S more positions."""
        cos, sin = rotary(self.cfg, jnp.arange(tokens.shape[1]) if pos is None else jnp.full((1,), pos))
        with jax.named_scope("embed"):
            x = self.embed[...][tokens]

        def run(block: nnx.Module, x: jax.Array, layer_cache: Any) -> tuple[jax.Array, Any]:
            return block(x, cos, sin, layer_cache, pos)

        x, caches = through(self.blocks, run, x, cache)
        if self.scanned:
            x, stack_cache = through(self.stack, run, x, cache[-1])
            caches = [*caches, stack_cache]
        with jax.named_scope("head"):
            return self.head(self.norm(x)[:, -1]).astype(jnp.float32), caches

    def prefill(self, tokens: jax.Array, length: int) -> tuple[jax.Array, Any]:
        """Read the whole prompt, tokens [B, S]: logits [B, vocab] of the last position and a cache of `length` positions."""
        return self.forward(tokens, self.new_cache(tokens.shape[0], length), None)

    def decode_step(self, token: jax.Array, cache: Any, pos: Any) -> tuple[jax.Array, Any]:
        """Read one token [B] at position `pos`: logits [B, vocab] and the cache with that position written."""
        return self.forward(token[:, None], cache, pos)


def _read_config(meta: Mapping[str, Any], where: str, dtype: str) -> Config:
    """The Config of a config.json; raises ModelError for what this family does not compute and for missing keys."""
    v3 = meta.get("model_type") == "deepseek_v3"
    rope, kind = rotary_part(meta, where)
    grouped = v3 or meta.get("topk_method") == "group_limited_greedy"
    hold_to_known(
        "deepseek", where, "use an unquantised DeepSeek V2 or V3 checkpoint (of V3 a conversion to bfloat16)",
        ("model_type", meta.get("model_type"), ("deepseek_v2", "deepseek_v3")), ("hidden_act", meta.get("hidden_act", "silu"), ("silu",)),
        ("topk_method", meta.get("topk_method"), (None, "noaux_tc") if v3 else (None, "greedy", "group_limited_greedy")),
        ("scoring_func", meta.get("scoring_func"), (None, "sigmoid" if v3 else "softmax")), ("rope_type", kind, ("default", "yarn")),
        ("norm_topk_prob", meta.get("norm_topk_prob"), (None, v3, False)), ("rope_interleave", meta.get("rope_interleave"), (None, True)),
        ("moe_layer_freq", meta.get("moe_layer_freq"), (None, 1)), *absent(meta, "attention_bias", "mlp_bias", "tie_word_embeddings", "quantization_config"),
    )  # fmt: skip
    with reading(where):
        yarn = kind == "yarn" and Yarn(factor=rope["factor"], original=rope["original_max_position_embeddings"], mscale=rope["mscale"],
                                       mscale_all=rope["mscale_all_dim"], beta_fast=rope["beta_fast"], beta_slow=rope["beta_slow"])  # fmt: skip
        return Config(vocab=meta["vocab_size"], dim=meta["hidden_size"], layers=meta["num_hidden_layers"], heads=meta["num_attention_heads"],
                      ffn=meta["intermediate_size"], moe_ffn=meta["moe_intermediate_size"], experts=meta["n_routed_experts"],
                      top_k=meta["num_experts_per_tok"], shared=meta["n_shared_experts"], dense=meta["first_k_dense_replace"],
                      q_rank=meta["q_lora_rank"], kv_rank=meta["kv_lora_rank"], nope_dim=meta["qk_nope_head_dim"], rope_dim=meta["qk_rope_head_dim"],
                      v_dim=meta["v_head_dim"], scoring="sigmoid" if v3 else "softmax", groups=meta["n_group"] if grouped else 1,
                      top_groups=meta["topk_group"] if grouped else 1, normalise=v3 and meta.get("norm_topk_prob", True),
                      share_scale=meta["routed_scaling_factor"], rope_theta=rope.get("rope_theta", meta.get("rope_theta", 1e4)),
                      rope_scaling=yarn or None, norm_eps=meta["rms_norm_eps"], dtype=dtype)  # fmt: skip


def load(path: str | Path, *, dtype: str = "float32") -> tuple[Config, Make]:
    """As `models.mixtral.load`: the Config of a Hugging Face folder, and a Make of its NumPy arrays in `dtype`.

    Published V3 files hold a further layer, the module that predicts more tokens; it is not read.
    """
    file = open_safetensors(path)
    cfg = _read_config(file.meta, str(path), dtype)
    return cfg, stacks(kernels(file, dtype), first=cfg.dense)


def generation(name: str | Config, **options: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """One request as a traceable function and its arguments; the options are those of `models.generate.requested`."""
    return requested(named(name, CONFIGS, "DeepSeek", "deepseek"), lambda cfg, make, scanned, *_: of_nnx(DeepSeek(cfg, make, scanned=scanned)), **options)
