"""Mamba, GPT-2 and T5 against transformers' own, of the same random weights on disk. Needs torch: `parity` extra."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import gpt2, mamba, t5

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

STEPS, BOUND = 17, 1e-5  # prefill and 16 decode steps; max abs logit error / max abs logit
NO_IDS = dict(pad_token_id=None, bos_token_id=None, eos_token_id=None)


def mamba_tied() -> Any:
    sizes = dict(vocab_size=199, hidden_size=64, num_hidden_layers=3, state_size=8, time_step_rank=5)
    return transformers.MambaForCausalLM(transformers.MambaConfig(**sizes, **NO_IDS))


def mamba_untied() -> Any:
    sizes = dict(vocab_size=199, hidden_size=64, num_hidden_layers=2, expand=3, conv_kernel=3, residual_in_fp32=False)
    return transformers.MambaForCausalLM(transformers.MambaConfig(**sizes, tie_word_embeddings=False, **NO_IDS))


def gpt2_plain() -> Any:
    sizes = dict(vocab_size=199, n_embd=64, n_layer=3, n_head=4, n_positions=64)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **NO_IDS))


def gpt2_narrow() -> Any:
    sizes = dict(vocab_size=199, n_embd=60, n_layer=2, n_head=5, n_inner=100, n_positions=56)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **NO_IDS))


T5_SIZES = dict(vocab_size=199, d_model=64, d_kv=12, d_ff=96, num_heads=4, pad_token_id=0, eos_token_id=None, decoder_start_token_id=0)


def t5_relu() -> Any:
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**T5_SIZES, num_layers=2, num_decoder_layers=3))


def t5_gated() -> Any:
    """1.1: a head of its own, which is not scaled; few buckets, so that 16 steps reach the far ones."""
    config = transformers.T5Config(**T5_SIZES | {"decoder_start_token_id": 7}, num_layers=3, feed_forward_proj="gated-gelu",
                                   tie_word_embeddings=False, relative_attention_num_buckets=10, relative_attention_max_distance=13)  # fmt: skip
    model = transformers.T5ForConditionalGeneration(config)
    model.lm_head.weight = torch.nn.Parameter(torch.randn(199, 64))
    model.config.tie_word_embeddings = False
    return model


def saved(model: Any, folder: Path) -> Any:
    """The model saved in `folder`, with every weight drawn so that it shows.

    No norm is left at ones and no bias at zeros, which would hide one that is left out; embeddings are small, so that a tied head says
    more of what the layers made than of the token read. T5, which does not scale its scores, is drawn narrower: at 0.2 the float32
    logits of transformers are themselves 7e-5 from its float64 ones.
    """
    model = model.eval().to(torch.float32)
    spread = (0.1 if model.config.is_gated_act else 0.13) if model.config.is_encoder_decoder else 0.2
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name or "ln_" in name or name.endswith((".bias", ".D", "A_log")):
                weight.add_(0.3 * torch.randn_like(weight))
            elif "relative_attention_bias" in name or "lm_head" in name:
                weight.copy_(torch.randn_like(weight))
            else:
                small = any(part in name for part in ("embeddings", "wte", "wpe", "shared"))
                weight.copy_(torch.randn_like(weight) * (0.05 if small else spread))
    model.save_pretrained(folder)
    return model


def theirs(model: Any, ids: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Greedy decoding with transformers' cache: tokens [B, steps] and logits [B, steps, vocab]."""
    prompt = torch.tensor(ids, dtype=torch.long)
    seq2seq, recurrent = model.config.is_encoder_decoder, isinstance(model, transformers.MambaForCausalLM)
    given: dict[str, Any] = {"use_cache": True}
    if seq2seq:
        given["encoder_outputs"] = model.get_encoder()(prompt)
        read = torch.full((len(ids), 1), model.config.decoder_start_token_id)
    else:
        read = prompt
    tokens, logits = [], []
    with torch.no_grad():
        for _ in range(steps):
            out = model(**{"decoder_input_ids" if seq2seq else "input_ids": read}, **given)
            given["cache_params" if recurrent else "past_key_values"] = out.cache_params if recurrent else out.past_key_values
            last = out.logits[:, -1]
            read = last.argmax(-1, keepdim=True)
            tokens.append(read.numpy()[:, 0])
            logits.append(last.numpy())
    return np.stack(tokens, 1), np.stack(logits, 1)


def hold(name: str, module: Any, folder: Path, model: Any, prompt: int, **options: Any) -> None:
    """Load `folder` with our `module` and hold tokens and logits to those of `model`, as unrolled and as scanned layers."""
    ids = np.random.default_rng(2).integers(1, 199, (2, prompt), np.int32)
    tokens, logits = theirs(model, ids, STEPS)
    assert len(np.unique(tokens)) > 4, "a model that repeats itself would show little"
    cfg, make = module.load(folder)
    for layers in ("unrolled", "scanned"):
        fn, args = module.generation(cfg, weights=make, prompt=ids, new_tokens=STEPS, layers=layers, logits=True, **options)
        with jax.default_matmul_precision("highest"):
            our_tokens, our_logits = (np.asarray(x) for x in jax.jit(fn)(*args))
        error = np.abs(our_logits - logits).max(axis=(0, 2)) / np.abs(logits).max()
        print(f"\n{name} {layers}: max abs logit error / max abs logit: prefill {error[0]:.2e}, decode {error[1:].max():.2e}")
        assert error.max() <= BOUND
        np.testing.assert_array_equal(our_tokens, tokens)


@pytest.mark.parametrize("build", [mamba_tied, mamba_untied])
@pytest.mark.parametrize("time", ["associative", "scan"])
def test_mamba(tmp_path: Path, build: Callable[[], Any], time: str) -> None:
    torch.manual_seed(11)
    model = saved(build(), tmp_path)
    assert mamba.load(tmp_path)[0].tied == (build is mamba_tied)
    hold(f"{build.__name__} {time}", mamba, tmp_path, model, 40, time=time)


@pytest.mark.parametrize("prompt", [1, 2, 3])
def test_mamba_reads_prompts_shorter_than_its_window(tmp_path: Path, prompt: int) -> None:
    torch.manual_seed(11)
    hold(f"mamba, prompt {prompt}", mamba, tmp_path, saved(mamba_tied(), tmp_path), prompt)


@pytest.mark.parametrize("build", [gpt2_plain, gpt2_narrow])
def test_gpt2(tmp_path: Path, build: Callable[[], Any]) -> None:
    torch.manual_seed(11)
    hold(build.__name__, gpt2, tmp_path, saved(build(), tmp_path), 40)


def test_gpt2_loads_without_its_head_as_published(tmp_path: Path) -> None:
    torch.manual_seed(11)
    model = saved(gpt2_plain(), tmp_path / "whole")
    model.transformer.save_pretrained(tmp_path / "trunk")
    hold("gpt2 trunk", gpt2, tmp_path / "trunk", model, 12)


@pytest.mark.parametrize("build", [t5_relu, t5_gated])
def test_t5(tmp_path: Path, build: Callable[[], Any]) -> None:
    torch.manual_seed(11)
    model = saved(build(), tmp_path)
    meta = json.loads((tmp_path / "config.json").read_text())
    cfg, _ = t5.load(tmp_path)
    assert (cfg.tied, cfg.scaled_head, cfg.gated) == ((True, True, False) if build is t5_relu else (False, False, True)), meta
    hold(build.__name__, t5, tmp_path, model, 150)


@pytest.mark.parametrize(("buckets", "far"), [(32, 128), (16, 40), (10, 13), (32, 32)])
@pytest.mark.parametrize("both_ways", [True, False])
def test_t5_buckets_are_those_of_transformers(buckets: int, far: int, both_ways: bool) -> None:
    from transformers.models.t5.modeling_t5 import T5Attention

    ahead = np.arange(-300, 301)
    asked = T5Attention._relative_position_bucket(torch.tensor(ahead), bidirectional=both_ways, num_buckets=buckets, max_distance=far)
    cfg = t5.Config(dim=8, layers=1, decoder_layers=1, heads=1, ffn=8, buckets=buckets, max_distance=far)
    np.testing.assert_array_equal(t5.bucket(jnp.asarray(ahead), cfg, both_ways=both_ways), asked.numpy())
