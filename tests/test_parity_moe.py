"""Mixtral, Gemma 2, DeepSeek V2 and V3: our logits against transformers' own, of the same random weights on disk. Needs torch: `parity` extra.

Also here: what these models can do in two ways gives the same logits (a ring buffer, a capacity that drops nothing, an absorbed projection).
"""

from __future__ import annotations

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import deepseek, gemma, mixtral
from models.checkpoint import ModelError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from test_parity import compare, theirs  # noqa: E402

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

STEPS, PROMPT, BOUND = 17, 24, 1e-5  # prefill and 16 decode steps
SIZES = dict(vocab_size=199, hidden_size=64, num_attention_heads=4, max_position_embeddings=256, pad_token_id=None, bos_token_id=None,
             eos_token_id=None, initializer_range=0.1)  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 40.0, "beta_fast": 4, "beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 64}  # fmt: skip
LATENT = dict(num_hidden_layers=4, intermediate_size=96, moe_intermediate_size=48, n_routed_experts=8, num_experts_per_tok=3, kv_lora_rank=32,
              qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=24, num_key_value_heads=4, rope_parameters=YARN)  # fmt: skip


def mixtral_8_of_2():
    config = transformers.MixtralConfig(**SIZES, num_hidden_layers=3, num_key_value_heads=2, intermediate_size=96, num_local_experts=8)
    return mixtral, transformers.MixtralForCausalLM(config)


def gemma_2():
    """The window of 8 is shorter than the prompt, and small caps bend scores and logits well."""
    config = transformers.Gemma2Config(**SIZES, num_hidden_layers=4, num_key_value_heads=2, head_dim=24, intermediate_size=96, sliding_window=8,
                                       query_pre_attn_scalar=20, attn_logit_softcapping=2.0, final_logit_softcapping=3.0)  # fmt: skip
    return gemma, transformers.Gemma2ForCausalLM(config)


def deepseek_v2_lite():
    config = transformers.DeepseekV2Config(**SIZES, **LATENT, q_lora_rank=None, n_shared_experts=2, first_k_dense_replace=1)
    return deepseek, transformers.DeepseekV2ForCausalLM(config)


def deepseek_v2():
    groups = dict(topk_method="group_limited_greedy", n_group=4, topk_group=2, routed_scaling_factor=4.0)
    config = transformers.DeepseekV2Config(**SIZES, **LATENT, q_lora_rank=24, n_shared_experts=2, first_k_dense_replace=1, **groups)
    return deepseek, transformers.DeepseekV2ForCausalLM(config)


def deepseek_v3():
    config = transformers.DeepseekV3Config(**SIZES, **LATENT | {"rope_parameters": YARN | {"mscale": 1.0}}, q_lora_rank=24, n_shared_experts=1,
                                           first_k_dense_replace=2, n_group=4, topk_group=2)  # fmt: skip
    return deepseek, transformers.DeepseekV3ForCausalLM(config)


FAMILIES = [mixtral_8_of_2, gemma_2, deepseek_v2_lite, deepseek_v2, deepseek_v3]


def saved(build, folder):
    """The family's module and a random model of transformers, as saved in `folder`: norms and routing biases are not what they start as."""
    torch.manual_seed(11)
    module, model = build()
    model = model.eval().to(torch.float32)
    with torch.no_grad():
        for name, weight in [*model.named_parameters(), *model.named_buffers()]:
            if "norm" in name or "correction_bias" in name:
                weight.add_(0.3 * torch.randn_like(weight))
    model.save_pretrained(folder)
    return module, model


def ours(module, cfg, make, ids, **options):
    fn, args = module.generation(cfg, weights=make, prompt=ids, new_tokens=STEPS, logits=True, **options)
    with jax.default_matmul_precision("highest"):
        return tuple(np.asarray(x) for x in jax.jit(fn)(*args))


def prompt(batch=2, length=PROMPT):
    return np.random.default_rng(2).integers(0, SIZES["vocab_size"], (batch, length), np.int32)


@pytest.mark.parametrize("build", FAMILIES)
def test_logits_are_those_of_transformers(tmp_path, build):
    module, model = saved(build, tmp_path)
    tokens, logits = theirs(model, prompt(), STEPS)
    assert len(np.unique(tokens)) > 4, "a model that repeats itself would show little"
    cfg, make = module.load(tmp_path)
    for layers in ("unrolled", "scanned"):
        our_tokens, our_logits = ours(module, cfg, make, prompt(), layers=layers)
        assert compare(f"{build.__name__} {layers}", our_logits, logits) <= BOUND
        np.testing.assert_array_equal(our_tokens, tokens)
    if module is gemma:
        for layers in ("unrolled", "scanned"):
            _, our_logits = ours(module, dataclasses.replace(cfg, ring=True), make, prompt(), layers=layers)
            assert compare(f"{build.__name__} {layers}, ring", our_logits, logits) <= BOUND
        _, wide = ours(module, dataclasses.replace(cfg, window=64), make, prompt())
        assert np.abs(wide - logits).max() > 0.01 * np.abs(logits).max(), "the window should matter"


@pytest.mark.parametrize("window", [3, 8, 30, 64])
@pytest.mark.parametrize("length", [2, 8, 24])
def test_a_ring_gives_the_logits_of_a_full_cache(window, length):
    """Prompts shorter than, as long as and longer than the window, and windows that decode passes or never fills."""
    full = dataclasses.replace(gemma.CONFIGS["tiny"], layers=2, window=window)
    results = []
    for cfg in (full, dataclasses.replace(full, ring=True)):
        fn, args = gemma.generation(cfg, seed=4, prompt=length, new_tokens=STEPS, logits=True)
        results.append(jax.jit(fn)(*args))
    np.testing.assert_array_equal(results[0][0], results[1][0])
    np.testing.assert_allclose(results[0][1], results[1][1], atol=1e-5)


def by_hand(x, chosen, shares, weights, places):
    """Tokens one after another through their experts, in the order that a capacity serves them."""
    gate, up, down = (np.asarray(w, np.float64) for w in weights)
    y, served = np.zeros_like(x, np.float64), np.zeros(len(gate), int)
    for choice in range(chosen.shape[1]):
        for token, expert in enumerate(chosen[:, choice]):
            if served[expert] < places:
                a = x[token] @ gate[expert]
                y[token] += shares[token, choice] * ((a / (1 + np.exp(-a)) * (x[token] @ up[expert])) @ down[expert])
            served[expert] += 1
    return y


@pytest.mark.parametrize("places", [1, 3, 20])
def test_experts_are_those_of_a_loop_over_tokens(places):
    rng = np.random.default_rng(places)
    x, chosen = rng.standard_normal((20, 6)), np.stack([rng.permutation(5)[:2] for _ in range(20)])
    shares, weights = rng.random((20, 2)), [rng.standard_normal(shape) for shape in ((5, 6, 7), (5, 6, 7), (5, 7, 6))]
    values = [jnp.asarray(v, jnp.float32) for v in (x, shares, *weights)]
    args = values[0], jnp.asarray(chosen), values[1], tuple(values[2:])
    np.testing.assert_allclose(mixtral.capacity_experts(*args, places), by_hand(x, chosen, shares, weights, places), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(mixtral.ragged_experts(*args), by_hand(x, chosen, shares, weights, math.inf), rtol=1e-4, atol=1e-4)


def test_a_capacity_drops_tokens_only_where_it_is_short():
    cfg = mixtral.CONFIGS["tiny"]
    logits = []
    for capacity in (None, cfg.experts / cfg.top_k, 0.5):  # at experts / top_k every expert could serve every token
        fn, args = mixtral.generation(dataclasses.replace(cfg, capacity=capacity), seed=4, batch=3, prompt=12, new_tokens=4, logits=True)
        logits.append(np.asarray(jax.jit(fn)(*args)[1][:, 0]))
    np.testing.assert_allclose(logits[1], logits[0], atol=1e-5)
    assert np.abs(logits[2] - logits[0]).max() > 0.01


@pytest.mark.parametrize("module", [mixtral, gemma, deepseek])
@pytest.mark.parametrize("layers", ["unrolled", "scanned"])
def test_decoding_in_the_cache_is_reading_the_whole_text_again(module, layers):
    """In DeepSeek this also holds decode's absorbed projections to prefill's expanded ones."""
    fn, args = module.generation("tiny", seed=6, batch=2, prompt=11, new_tokens=5, layers=layers, logits=True)
    tokens, logits = (np.asarray(v) for v in jax.jit(fn)(*args))
    text = np.concatenate([args[1], tokens[:, :4]], axis=1)
    whole, (state, _) = module.generation("tiny", seed=6, prompt=text, new_tokens=2, layers=layers, logits=True)
    np.testing.assert_allclose(jax.jit(whole)(state, text)[1][:, 0], logits[:, 4], atol=1e-5)


PUBLISHED = {mixtral: {"mixtral-8x7b": 46.7e9, "mixtral-8x22b": 140.6e9}, gemma: {"gemma-2-2b": 2.614e9, "gemma-2-9b": 9.24e9, "gemma-2-27b": 27.2e9},
             deepseek: {"deepseek-v2-lite": 15.7e9, "deepseek-v2": 236e9, "deepseek-v3": 671e9}}  # fmt: skip


@pytest.mark.parametrize("module", PUBLISHED)
@pytest.mark.parametrize("layers", ["unrolled", "scanned"])
def test_published_sizes_are_shapes_of_the_published_count(module, layers):
    assert set(module.CONFIGS) == {"tiny", *PUBLISHED[module]}
    for name, count in PUBLISHED[module].items():
        fn, args = module.generation(name, layers=layers, prompt=8, new_tokens=2)
        leaves = jax.tree.leaves(args)
        assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
        assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(args[0])) == pytest.approx(count, rel=0.005)
        assert jax.eval_shape(fn, *args).shape == (1, 2)


BAD = [
    (mixtral_8_of_2, {"sliding_window": 16}, "sliding_window=16"), (mixtral_8_of_2, {"model_type": "llama"}, "model_type='llama'"),
    (mixtral_8_of_2, {"num_experts_per_tok": 9}, "9 of 8 experts"), (mixtral_8_of_2, {"intermediate_size": 80}, "has shape"),
    (mixtral_8_of_2, {"num_local_experts": None}, "experts"), (mixtral_8_of_2, {"rope_parameters": [1]}, "rope_type"),
    (gemma_2, {"layer_types": ["full_attention"] * 4}, "layer_types"), (gemma_2, {"final_logit_softcapping": None}, "final_cap"),
    (gemma_2, {"num_hidden_layers": 3, "layer_types": None}, "3 layers"), (gemma_2, {"sliding_window": 0}, "window of 0"),
    (deepseek_v3, {"n_group": 3}, "no model"), (deepseek_v3, {"first_k_dense_replace": 4}, "no model"), (deepseek_v3, {"num_hidden_layers": 5}, "layers.4"),
    (deepseek_v3, {"rope_interleave": False}, "rope_interleave"), (deepseek_v3, {"quantization_config": {"quant_method": "fp8"}}, "quantization"),
    (deepseek_v3, {"kv_lora_rank": "32"}, "no model"), (deepseek_v2, {"norm_topk_prob": True}, "norm_topk_prob"),
    (deepseek_v2, {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "no key"),
]  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {build: (path := tmp_path_factory.mktemp(build.__name__), saved(build, path)[0]) for build in {b for b, _, _ in BAD}}


@pytest.mark.parametrize(("build", "change", "what"), BAD, ids=lambda v: next(iter(v)) if isinstance(v, dict) else getattr(v, "__name__", "-"))
def test_what_a_family_does_not_compute_is_refused(folders, tmp_path, build, change, what):
    source, module = folders[build]
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=rf"{what}(.|\n)*where:(.|\n)*mend:"):
        cfg, make = module.load(tmp_path)
        module.generation(cfg, weights=make)


@pytest.mark.parametrize("module", [mixtral, gemma, deepseek])
def test_an_unknown_name_lists_the_known_ones(module):
    with pytest.raises(ModelError, match=rf"'nobody'(.|\n)*where:.*{module.__name__}(.|\n)*mend:.*tiny"):
        module.generation("nobody")
