"""Mamba-1 in Flax NNX: a causal convolution and a selective scan; prefill, decode_step, and generate as one traceable function.

Like models.llama, `generation(name, batch=, prompt=, new_tokens=)` hands on `(fn, args)`, of shapes only without `seed` or `weights`.
What prefill hands to decode does not grow with the prompt: of each layer, the last inputs of the convolution and the state of the scan.
`time` says how prefill runs the recurrence: "associative" in log(S) parallel steps, "scan" one position after the other.

Shapes: B batch, S prompt length, E width, I inner width, N states per inner channel, K taps of the convolution, R rank of the step size.
Left out: biases of in_proj and out_proj, padded prompts, Mamba-2. Source: Gu and Dao, "Mamba" (2023), arXiv 2312.00752.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from .checkpoint import Make, ModelError, hold_to_known, hold_to_layers, hold_to_numbers, open_safetensors, reading, stacks
from .generate import named, of_nnx, requested, through
from .llama import Linear, RMSNorm

Time = Literal["associative", "scan"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Shape of one member of the family. `residual_f32` keeps the sum that runs through the layers in float32."""

    vocab: int
    dim: int
    layers: int
    inner: int
    state: int = 16
    conv: int = 4
    rank: int
    norm_eps: float = 1e-5
    residual_f32: bool = True
    tied: bool = True
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        hold_to_numbers(self, ("vocab", "dim", "layers", "inner", "state", "conv", "rank"))


CONFIGS: dict[str, Config] = {
    "tiny": Config(vocab=256, dim=64, layers=3, inner=128, state=8, rank=4, dtype="float32"),
    "mamba-130m": Config(vocab=50_280, dim=768, layers=24, inner=1536, rank=48),
    "mamba-2.8b": Config(vocab=50_280, dim=2560, layers=64, inner=5120, rank=160),
}


def advance(h: jax.Array, x: jax.Array, dt: jax.Array, A: jax.Array, write: jax.Array, read: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One position of the scan, all float32: state h [B, I, N], x and dt [B, I], A [I, N], write and read [B, N] -> h, y [B, I]."""
    h = jnp.exp(dt[..., None] * A) * h + (dt * x)[..., None] * write[:, None, :]
    return h, jnp.einsum("bin,bn->bi", h, read)


def recur(x: jax.Array, dt: jax.Array, A: jax.Array, write: jax.Array, read: jax.Array, time: Time) -> tuple[jax.Array, jax.Array]:
    """All positions from a state of zeros: x and dt [B, S, I], write and read [B, S, N] -> the last state [B, I, N], y [B, S, I]."""
    if time == "scan":
        along = tuple(jnp.swapaxes(v, 0, 1) for v in (x, dt, write, read))
        zeros = jnp.zeros((x.shape[0], *A.shape), x.dtype)
        h, y = jax.lax.scan(lambda h, at: advance(h, at[0], at[1], A, at[2], at[3]), zeros, along)
        return h, jnp.swapaxes(y, 0, 1)

    def join(early: tuple[jax.Array, jax.Array], late: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """h -> a h + b, one after the other, is again of that form."""
        return early[0] * late[0], late[0] * early[1] + late[1]

    maps = jnp.exp(dt[..., None] * A), (dt * x)[..., None] * write[:, :, None, :]
    _, states = jax.lax.associative_scan(join, maps, axis=1)
    return states[:, -1], jnp.einsum("bsin,bsn->bsi", states, read)


class Conv(nnx.Module):
    """A causal convolution over time of each channel by itself, with SiLU."""

    def __init__(self, name: str, width: int, taps: int, make: Make):
        self.kernel = nnx.Param(make(f"{name}.weight", (taps, width)))
        self.bias = nnx.Param(make(f"{name}.bias", (width,)))

    def __call__(self, x: jax.Array, window: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """x [B, S, I] after the inputs `window` [B, K-1, I] (None: zeros, the prompt starts here) -> the same, and the next window."""
        kernel = self.kernel[...]
        K, width = kernel.shape
        if window is None:
            seen = jnp.pad(x, ((0, 0), (K - 1, 0), (0, 0)))
            y = jax.lax.conv_general_dilated(seen, kernel[:, None, :], (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"),
                                             feature_group_count=width)  # fmt: skip
        else:
            seen = jnp.concatenate([window, x], axis=1)
            y = jnp.einsum("bki,ki->bi", seen, kernel)[:, None]
        return jax.nn.silu(y + self.bias[...]), seen[:, x.shape[1] :]


class Mixer(nnx.Module):
    def __init__(self, name: str, cfg: Config, make: Make):
        self.enter = Linear(f"{name}.in_proj", cfg.dim, 2 * cfg.inner, make)
        self.conv = Conv(f"{name}.conv1d", cfg.inner, cfg.conv, make)
        self.select = Linear(f"{name}.x_proj", cfg.inner, cfg.rank + 2 * cfg.state, make)
        self.dt = Linear(f"{name}.dt_proj", cfg.rank, cfg.inner, make)
        self.dt_bias = nnx.Param(make(f"{name}.dt_proj.bias", (cfg.inner,)))
        self.A_log = nnx.Param(make(f"{name}.A_log", (cfg.inner, cfg.state)))
        self.D = nnx.Param(make(f"{name}.D", (cfg.inner,)))
        self.leave = Linear(f"{name}.out_proj", cfg.inner, cfg.dim, make)
        self.cfg = cfg

    def __call__(self, x: jax.Array, state: Any, time: Time) -> tuple[jax.Array, Any]:
        """x [B, S, E] and state (window [B, K-1, I], h float32 [B, I, N]), None in prefill; the step size, h and y are float32."""
        window, h = (None, None) if state is None else state
        u, gate = jnp.split(self.enter(x), 2, axis=-1)
        with jax.named_scope("conv"):
            u, window = self.conv(u, window)
        with jax.named_scope("ssm"):
            dt, write, read = jnp.split(self.select(u), [self.cfg.rank, self.cfg.rank + self.cfg.state], axis=-1)
            dt = jax.nn.softplus((self.dt(dt) + self.dt_bias[...]).astype(jnp.float32))
            wide, write, read = (v.astype(jnp.float32) for v in (u, write, read))
            A = -jnp.exp(self.A_log[...].astype(jnp.float32))
            if h is None:
                h, y = recur(wide, dt, A, write, read, time)
            else:
                h, y = advance(h, wide[:, 0], dt[:, 0], A, write[:, 0], read[:, 0])
                y = y[:, None]
            y = (y + wide * self.D[...].astype(jnp.float32)).astype(x.dtype)
        return self.leave(y * jax.nn.silu(gate)), (window, h)


class Block(nnx.Module):
    def __init__(self, name: str, cfg: Config, make: Make):
        self.norm = RMSNorm(f"{name}.norm", cfg.dim, cfg.norm_eps, make)
        self.mixer = Mixer(f"{name}.mixer", cfg, make)

    def __call__(self, x: jax.Array, state: Any, time: Time) -> tuple[jax.Array, Any]:
        """x [B, S, E] in the type of the residual, the mixer in that of the weights."""
        with jax.named_scope("mixer"):
            y, state = self.mixer(self.norm(x.astype(self.norm.scale[...].dtype)), state, time)
            return x + y.astype(x.dtype), state


class Mamba(nnx.Module):
    """The model. With `scanned` the blocks' weights and states are stacked on a leading layer axis and run by `lax.scan`."""

    def __init__(self, cfg: Config, make: Make, *, scanned: bool = False, time: Time = "associative"):
        self.embed = nnx.Param(make("backbone.embeddings.weight", (cfg.vocab, cfg.dim)))
        if scanned:
            self.blocks = Block("backbone.layers.*", cfg, lambda name, shape: make(name, (cfg.layers, *shape)))
        else:
            self.blocks = nnx.List([Block(f"backbone.layers.{i}", cfg, make) for i in range(cfg.layers)])
        self.norm = RMSNorm("backbone.norm_f", cfg.dim, cfg.norm_eps, make)
        if not cfg.tied:
            self.head = Linear("lm_head", cfg.dim, cfg.vocab, make)
        self.cfg, self.time = cfg, time

    def forward(self, tokens: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        """tokens int32 [B, S] -> logits float32 [B, vocab] of the last position, and the state after it; state is None in prefill."""
        with jax.named_scope("embed"):
            x = self.embed[...][tokens]
            x = x.astype(jnp.float32) if self.cfg.residual_f32 else x
        x, state = through(self.blocks, lambda block, x, layer_state: block(x, layer_state, self.time), x, state)
        with jax.named_scope("head"):
            x = self.norm(x[:, -1].astype(self.embed[...].dtype))
            logits = jnp.einsum("be,ve->bv", x, self.embed[...]) if self.cfg.tied else self.head(x)
            return logits.astype(jnp.float32), state

    def prefill(self, tokens: jax.Array, length: int) -> tuple[jax.Array, Any]:
        """Read the whole prompt, tokens [B, S]: logits [B, vocab] of the last position and the state, whose size no `length` changes."""
        return self.forward(tokens, None)

    def decode_step(self, token: jax.Array, state: Any, pos: Any) -> tuple[jax.Array, Any]:
        """Read one token [B]: logits [B, vocab] and the state after it; a recurrence does not ask for `pos`."""
        return self.forward(token[:, None], state)


def _read_config(meta: Mapping[str, Any], where: str, dtype: str) -> Config:
    """The Config of a config.json; raises ModelError for what this family does not compute and for missing keys."""
    hold_to_known(
        "mamba", where, "use a Mamba-1 checkpoint in Hugging Face's form (state-spaces/mamba-130m-hf), without projection biases",
        ("model_type", meta.get("model_type"), ("mamba",)), ("hidden_act", meta.get("hidden_act", "silu"), ("silu",)),
        ("use_bias", meta.get("use_bias", False), (False,)), ("use_conv_bias", meta.get("use_conv_bias", True), (True,)),
    )  # fmt: skip
    with reading(where):
        dim, rank = meta["hidden_size"], meta.get("time_step_rank", "auto")
        return Config(vocab=meta["vocab_size"], dim=dim, layers=meta["num_hidden_layers"], inner=int(meta.get("expand", 2) * dim),
                      state=meta["state_size"], conv=meta["conv_kernel"], rank=-(-dim // 16) if rank == "auto" else rank,
                      norm_eps=meta["layer_norm_epsilon"], residual_f32=bool(meta.get("residual_in_fp32", True)),
                      tied=bool(meta.get("tie_word_embeddings", True)), dtype=dtype)  # fmt: skip


def load(path: str | Path, *, dtype: str = "float32") -> tuple[Config, Make]:
    """Open a Hugging Face folder for `generation(cfg, weights=make)`: its Config, and a Make of NumPy arrays in `dtype`.

    Linear kernels come as (in, out), the convolution as (taps, channels), names with `*` as a stack [layers, ...]. Raises ModelError
    for damaged files and models outside this family; the Make, for a tensor that is missing or not of the shape asked for.
    """
    file = open_safetensors(path)
    cfg = _read_config(file.meta, str(path), dtype)

    def one(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name.endswith("conv1d.weight"):
            value = file.tensor(name, (shape[1], 1, shape[0]))[:, 0].T
        elif len(shape) == 2 and "embed" not in name and not name.endswith("A_log"):
            value = file.tensor(name, shape[::-1]).T
        else:
            value = file.tensor(name, shape)
        return np.ascontiguousarray(value, dtype=jnp.dtype(dtype))

    hold_to_layers(file, "backbone.layers.", cfg.layers)
    return cfg, stacks(one)


def generation(name: str | Config, *, time: Time = "associative", **options: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """One request as a traceable function and its arguments; the options but `time` are those of `models.generate.requested`.

    `time` is how prefill runs the recurrence. Raises ModelError for one that there is not.
    """
    if time not in ("associative", "scan"):
        raise ModelError(f"there is no way {time!r} to run the recurrence", where="models.mamba.generation", mend="use time='associative' or 'scan'")
    cfg = named(name, CONFIGS, "Mamba", "mamba")
    return requested(cfg, lambda cfg, make, scanned, *_: of_nnx(Mamba(cfg, make, scanned=scanned, time=time)), **options)
