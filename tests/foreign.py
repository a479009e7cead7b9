"""Adapters of Flax language models that others wrote, installed from PyPI: tiny, random, called through their own public API.

Each gives {"prefill": (fn, args), "decode": (fn, args)} or {"generate": (fn, args)}; nothing in a model is edited. `NEEDS` says what to
install for each. None of their source is here.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

B, L, C, V = 2, 8, 16, 128  # batch, prompt, cache length, vocabulary
TOKENS = np.random.default_rng(0).integers(3, V, (B, L)).astype(np.int32)
TOKEN, POSITION = np.full((B, 1), 5, np.int32), np.int32(L)

TRANSFORMERS, TUNIX, DANTINOX = "transformers==4.57.6", "google-tunix==0.1.7", "dantinox==0.4.14"
GEMMA, MAXTEXT = "gemma==4.0.1 kauldron==1.4.4 (Python 3.13)", "maxtext==0.2.5 (Python 3.13)"
NEEDS = {
    "hf_gpt2": TRANSFORMERS, "hf_gpt2_generate": TRANSFORMERS, "hf_gpt_neo": TRANSFORMERS, "hf_bloom": TRANSFORMERS, "hf_bart": TRANSFORMERS,
    "hf_whisper": TRANSFORMERS, "tunix_llama3": TUNIX, "tunix_qwen3_moe": TUNIX, "tunix_gemma3": TUNIX, "dantinox_mla_moe": DANTINOX,
    "gemma3": GEMMA, "gemma3n": GEMMA, "gemma4": GEMMA, "gemma4_moe": GEMMA, "maxtext_llama": MAXTEXT, "maxtext_llama_scanned": MAXTEXT,
}  # fmt: skip
LAYERS = dict.fromkeys(NEEDS, 2) | dict.fromkeys(("gemma3", "gemma4", "gemma4_moe"), 4) | {"gemma3n": None}
"""Layers that the token loop runs; None: not told right, several residual streams run side by side."""


def positions(tokens: Any, start: Any = 0) -> Any:
    return jnp.broadcast_to(start + jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)


def mask(tokens: Any, start: Any = 0) -> Any:
    return jnp.arange(C)[None, None, :] <= positions(tokens, start)[:, :, None]


def drawn(tree: Any) -> Any:
    """Small random numbers on every float: some models start with whole matrices of zeros."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return structure.unflatten([x + 0.1 * jax.random.normal(k, x.shape, x.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x for k, x in zip(keys, leaves, strict=True)])


def pair(prefill: Any, decode: Any, weights: Any, *args: Any) -> dict[str, Any]:
    state = jax.eval_shape(prefill, weights, *args)[1]
    return {"prefill": (prefill, (weights, *args)), "decode": (decode, (weights, TOKEN, state, POSITION))}


# transformers 4, the last with Flax: Linen behind a class of its own -----------------------------------------------------


def hf_causal(model: Any, positioned: bool = True) -> dict[str, Any]:
    def step(w: Any, tokens: Any, cache: Any, start: Any = 0) -> Any:
        more = {"position_ids": positions(tokens, start)} if positioned else {}
        out = model(tokens, params=w, past_key_values=cache, attention_mask=jnp.ones((tokens.shape[0], C), "i4"), **more)
        return out.logits, out.past_key_values

    return pair(step, step, model.params, TOKENS, model.init_cache(B, C))


def hf_gpt2() -> dict[str, Any]:
    from transformers import FlaxGPT2LMHeadModel, GPT2Config

    return hf_causal(FlaxGPT2LMHeadModel(GPT2Config(vocab_size=V, n_positions=C, n_embd=32, n_layer=2, n_head=2)))


def hf_gpt2_generate() -> dict[str, Any]:
    """The library's own generate(): prefill, then a while loop."""
    from transformers import FlaxGPT2LMHeadModel, GPT2Config

    model = FlaxGPT2LMHeadModel(GPT2Config(vocab_size=V, n_positions=C, n_embd=32, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2, pad_token_id=0))
    return {"generate": (lambda w, t: model.generate(t, params=w, max_length=C - 1, do_sample=False).sequences, (model.params, TOKENS))}


def hf_gpt_neo() -> dict[str, Any]:
    from transformers import FlaxGPTNeoForCausalLM, GPTNeoConfig

    kinds = [[["global", "local"], 1]]
    return hf_causal(FlaxGPTNeoForCausalLM(GPTNeoConfig(vocab_size=V, max_position_embeddings=C, hidden_size=32, num_layers=2, num_heads=2, attention_types=kinds, window_size=6)))


def hf_bloom() -> dict[str, Any]:
    from transformers import BloomConfig, FlaxBloomForCausalLM

    return hf_causal(FlaxBloomForCausalLM(BloomConfig(vocab_size=V, hidden_size=32, n_layer=2, n_head=2)), positioned=False)


def hf_seq2seq(model: Any, inputs: Any) -> dict[str, Any]:
    def decode(w: Any, tokens: Any, state: Any, start: Any = 0) -> Any:
        out = model.decode(tokens, state[0], params=w, past_key_values=state[1], decoder_attention_mask=jnp.ones((tokens.shape[0], C), "i4"),
                           decoder_position_ids=positions(tokens, start))  # fmt: skip
        return out.logits, (state[0], out.past_key_values)

    def prefill(w: Any, inputs: Any, tokens: Any, cache: Any) -> Any:
        return decode(w, tokens, (model.encode(inputs, params=w), cache))

    return pair(prefill, decode, model.params, inputs, TOKENS, model.init_cache(B, C, model.encode(inputs)))


_HALVES = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "encoder_attention_heads": 2,
           "decoder_attention_heads": 2}  # fmt: skip


def hf_bart() -> dict[str, Any]:
    from transformers import BartConfig, FlaxBartForConditionalGeneration

    return hf_seq2seq(FlaxBartForConditionalGeneration(BartConfig(vocab_size=V, max_position_embeddings=C, **_HALVES)), TOKENS)


def hf_whisper() -> dict[str, Any]:
    from transformers import FlaxWhisperForConditionalGeneration, WhisperConfig

    sound = np.random.default_rng(1).standard_normal((B, 8, 20)).astype(np.float32)
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = WhisperConfig(vocab_size=V, num_mel_bins=8, max_source_positions=10, max_target_positions=C, **special, **_HALVES)
    return hf_seq2seq(FlaxWhisperForConditionalGeneration(config, input_shape=(1, 8, 20)), sound)


# google-tunix: NNX --------------------------------------------------------------------------------------------------------

_DENSE = {"num_layers": 2, "vocab_size": V, "embed_dim": 32, "hidden_dim": 64, "num_heads": 4, "head_dim": 8, "num_kv_heads": 2, "rope_theta": 10000, "norm_eps": 1e-6}


def tunix(model: Any) -> dict[str, Any]:
    from flax import nnx
    from tunix.generate import sampler

    c = model.config
    graph, w = nnx.split(model)

    def step(w: Any, tokens: Any, cache: Any, start: Any = 0) -> Any:
        return nnx.merge(graph, w)(tokens, positions(tokens, start), cache, mask(tokens, start))

    return pair(step, step, drawn(w), TOKENS, sampler._init_cache(c.num_layers, C, B, c.num_kv_heads, c.head_dim, jnp.float32))


def tunix_llama3() -> dict[str, Any]:
    from flax import nnx
    from tunix.models.llama3 import model as m

    return tunix(m.Llama3(m.ModelConfig(**_DENSE), rngs=nnx.Rngs(0)))


def tunix_qwen3_moe() -> dict[str, Any]:
    from flax import nnx
    from tunix.models.qwen3 import model as m

    return tunix(m.Qwen3(m.ModelConfig(**_DENSE, num_experts=4, num_experts_per_tok=2), rngs=nnx.Rngs(0)))


def tunix_gemma3() -> dict[str, Any]:
    from flax import nnx
    from tunix.models.gemma3 import model as m

    sizes = {"num_layers": 2, "num_embed": V, "embed_dim": 32, "hidden_dim": 64, "num_heads": 4, "head_dim": 8, "num_kv_heads": 1, "sliding_window_size": 6}
    return tunix(m.Gemma3(m.ModelConfig(**sizes, param_dtype=jnp.float32), rngs=nnx.Rngs(0)))


# dantinox: NNX, latent attention, experts ---------------------------------------------------------------------------------


def dantinox_mla_moe() -> dict[str, Any]:
    from dantinox.core.config import ModelConfig
    from dantinox.core.model import Transformer
    from flax import nnx

    sizes = {"dim": 32, "n_heads": 4, "head_size": 8, "num_blocks": 2, "vocab_size": V, "max_context": C, "weight_tying": False}
    latent = {"attention": "mla", "down_dim_q": 16, "down_dim_kv": 16, "rope_dim": 8, "inference_mode": True, "ffn": "moe"}
    model = Transformer(ModelConfig(**sizes, **latent), rngs=nnx.Rngs(0))
    graph, w, rest = nnx.split(model, nnx.Param, ...)

    def step(w: Any, tokens: Any, cache: Any, start: Any = 0) -> Any:
        out = nnx.merge(graph, w, rest)(tokens, caches=cache, cache_index=start, deterministic=True)
        return out.logits, out.kv_caches

    return pair(lambda w, t: step(w, t, ((None, None),) * model.num_blocks), step, w, TOKENS)


# google-deepmind gemma: Linen ---------------------------------------------------------------------------------------------

_GEMMA = {"num_embed": V, "embed_dim": 32, "hidden_dim": 64, "num_heads": 4, "head_dim": 8, "num_kv_heads": 1, "sliding_window_size": 6, "vision_encoder": None}


def gemma(kind: Any, kinds_of_layers: slice = slice(4, 6), **more: Any) -> dict[str, Any]:
    config = dataclasses.replace(kind.config, **_GEMMA, attention_types=kind.config.attention_types[kinds_of_layers] * 2, **more)
    model = kind(config=config, dtype=jnp.float32)
    w = drawn(model.init(jax.random.key(0), TOKENS)["params"])

    def step(w: Any, tokens: Any, cache: Any, start: Any = 0) -> Any:
        out = model.apply({"params": w}, tokens, positions=positions(tokens, start), cache=cache, attention_mask=mask(tokens, start))
        return out.logits, out.cache

    return pair(step, step, w, TOKENS, model.config.init_cache(batch_size=B, dtype=model.dtype, cache_length=C))


def _half_shared(kind: Any) -> Any:
    return dataclasses.replace(kind.config.kv_cache_sharing_config, frac_shared_layers=0.5)


def gemma3() -> dict[str, Any]:
    from gemma import gm

    return gemma(gm.nn.Gemma3_1B)


def gemma3n() -> dict[str, Any]:
    """Layers that share caches, embeddings of their own in each, several residual streams."""
    from gemma import gm

    kind = gm.nn.Gemma3n_E2B
    return gemma(kind, slice(3, 5), activation_sparsity_pattern=(0.95, 0.0, 0.0, 0.0), per_layer_input_dim=8, laurel_rank=4,
                 kv_cache_sharing_config=_half_shared(kind))  # fmt: skip


def gemma4() -> dict[str, Any]:
    from gemma import gm

    kind = gm.nn.Gemma4_E4B
    return gemma(kind, audio_encoder=None, per_layer_input_dim=8, global_key_size=16, kv_cache_sharing_config=_half_shared(kind))


def gemma4_moe() -> dict[str, Any]:
    from gemma import gm

    return gemma(gm.nn.Gemma4_26B_A4B, num_global_kv_heads=1, global_key_size=16, num_experts=4, top_k_experts=2, expert_dim=16, moe_dense_hidden_dim=32)


# MaxText: NNX behind Linen's apply; a cache of the prompt and one of what is written ---------------------------------------


def maxtext(**more: Any) -> dict[str, Any]:
    import os

    import maxtext as package
    from flax.core import meta
    from maxtext.configs import pyconfig
    from maxtext.models import models
    from maxtext.utils import maxtext_utils

    sizes = {"vocab_size": V, "base_emb_dim": 32, "base_mlp_dim": 64, "base_num_decoder_layers": 2, "base_num_query_heads": 4, "base_num_kv_heads": 2, "head_dim": 8,
             "max_prefill_predict_length": L, "max_target_length": C, "per_device_batch_size": B / len(jax.devices()), "dtype": "float32", "weight_dtype": "float32"}  # fmt: skip
    where = {"run_name": "tiny", "attention": "dot_product", "enable_checkpointing": False, "skip_jax_distributed_system": True, "log_config": False}
    config = pyconfig.initialize(["", os.path.join(os.path.dirname(package.__file__), "configs", "base.yml")], **sizes, **where, **more)
    mesh = jax.sharding.Mesh(maxtext_utils.create_device_mesh(config, jax.devices()[:1]), config.mesh_axes)
    model = models.transformer_as_linen(config, mesh, None)
    made = meta.unbox(model.init(jax.random.key(0), TOKENS[:, :1], positions(TOKENS[:, :1]), enable_dropout=False, model_mode="autoregressive"))

    def step(mode: str, w: Any, tokens: Any, cache: Any, start: Any = 0) -> Any:
        live = {"decoder_segment_ids": jnp.ones_like(tokens)} if mode == "prefill" else {}
        logits, new = model.apply({"params": w, "cache": cache}, tokens, positions(tokens, start), **live, enable_dropout=False, model_mode=mode,
                                  rngs={"params": jax.random.key(0)}, mutable=["cache"])  # fmt: skip
        return logits, meta.unbox(new["cache"])

    return pair(functools.partial(step, "prefill"), functools.partial(step, "autoregressive"), drawn(made["params"]), TOKENS, made["cache"])


def maxtext_llama() -> dict[str, Any]:
    return maxtext(scan_layers=False)


def maxtext_llama_scanned() -> dict[str, Any]:
    return maxtext(scan_layers=True)
