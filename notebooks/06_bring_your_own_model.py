# ---
# jupyter:
#   jupytext:
#     cell_metadata_filter: -all
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Bring your own model
#
# Two models that Partition has never seen, written here as their author would write them: one in Flax Linen, one in Flax NNX. The first is one function that reads a prompt and
# writes tokens in a loop; of the second, only a forward with a cache is given, and the request is put together. Each is planned, cut, run and checked.

# %%
# %matplotlib inline
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from flax import linen, nnx

import partition as pt

pt.host_devices(16)  # before JAX is first used: CPU devices that will stand for those of the cluster

VOCAB, WIDTH, HEADS, LAYERS, PROMPT, NEW = 128, 48, 4, 3, 20, 10

# %% [markdown]
# ## A Linen model
#
# Keys and values lie in Linen's `cache` collection. `generate(variables, tokens)` is all that Partition is given: weights first, then tokens.


# %%
class Block(linen.Module):
    @linen.compact
    def __call__(self, x, at):
        """x [B, S, E] at positions `at` [S]."""
        h = linen.LayerNorm()(x)
        q, k, v = (linen.DenseGeneral((HEADS, WIDTH // HEADS), name=n)(h) for n in "qkv")
        shape = (x.shape[0], PROMPT + NEW, HEADS, WIDTH // HEADS)
        keys, values = (self.variable("cache", n, jnp.zeros, shape) for n in ("keys", "values"))
        keys.value = jax.lax.dynamic_update_slice(keys.value, k, (0, at[0], 0, 0))
        values.value = jax.lax.dynamic_update_slice(values.value, v, (0, at[0], 0, 0))
        scores = jnp.einsum("bshd,bthd->bhst", q, keys.value) / (WIDTH // HEADS) ** 0.5
        seen = jnp.arange(PROMPT + NEW)[None, :] <= at[:, None]
        weights = linen.softmax(jnp.where(seen, scores, -1e30))
        x = x + linen.DenseGeneral(WIDTH, axis=(-2, -1), name="out")(jnp.einsum("bhst,bthd->bshd", weights, values.value))
        return x + linen.Dense(WIDTH)(linen.gelu(linen.Dense(4 * WIDTH)(linen.LayerNorm()(x))))


class Model(linen.Module):
    @linen.compact
    def __call__(self, tokens, at):
        embed = linen.Embed(VOCAB, WIDTH)
        x = embed(tokens) + linen.Embed(PROMPT + NEW, WIDTH, name="position")(at)
        for i in range(LAYERS):
            x = Block(name=f"block{i}")(x, at)
        return embed.attend(linen.LayerNorm()(x))


model = Model()


def generate(variables, tokens):
    def read(cache, tokens, at):
        logits, state = model.apply({"params": variables["params"], "cache": cache}, tokens, at, mutable=["cache"])
        return logits[:, -1].argmax(axis=-1).astype(jnp.int32), state["cache"]

    token, cache = read(variables["cache"], tokens, jnp.arange(PROMPT))

    def write(carry, at):
        token, cache = carry
        following, cache = read(cache, token[:, None], at[None])
        return (following, cache), token

    return jax.lax.scan(write, (token, cache), jnp.arange(PROMPT, PROMPT + NEW))[1].T


prompt = np.random.default_rng(0).integers(0, VOCAB, (2, PROMPT), np.int32)
variables = jax.tree.map(np.asarray, jax.jit(model.init)(jax.random.key(0), prompt, jnp.arange(PROMPT)))
variables["cache"] = jax.tree.map(np.zeros_like, variables["cache"])

# %% [markdown]
# Four lines: trace, tag, place, check. That the loop is decode is found from its structure; the reason is printed.

# %%
program = pt.trace(generate, variables, prompt)
phases = pt.tag(program)
print(phases)

# %%
problem = pt.pose(phases, pt.cluster("trn2_efa_4cs3"), objective="tpot", sharding="tensor")
stages = pt.cut(program, pt.place(problem, "phase_split"))
print(pt.check(stages, variables, prompt))

# %% [markdown]
# ## An NNX model
#
# A recurrent model this time: no attention and no cache, but a state per layer. NNX modules are split into a graph definition and their state, which is the weights. Prefill and decode are given apart; Partition joins them
# where decode takes what prefill gives: the state, then the token.


# %%
class Cell(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.gates = nnx.Linear(WIDTH, 3 * WIDTH, rngs=rngs)
        self.out = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x, state):
        """x [B, S, E], state [B, E] -> the same."""
        decay, new, show = jnp.split(self.gates(self.norm(x)), 3, axis=-1)

        def advance(s, now):
            keep, add = now
            s = jax.nn.sigmoid(keep) * s + add
            return s, s

        state, states = jax.lax.scan(advance, state, (decay.swapaxes(0, 1), jnp.tanh(new).swapaxes(0, 1)))
        return x + self.out(states.swapaxes(0, 1) * jax.nn.silu(show)), state


class Recurrent(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        self.cells = nnx.List([Cell(rngs) for _ in range(LAYERS)])

    def __call__(self, tokens, states):
        x, after = self.embed(tokens), []
        for cell, state in zip(self.cells, states):
            x, state = cell(x, state)
            after.append(state)
        return self.embed.attend(x[:, -1]), after


definition, weights = nnx.split(Recurrent(nnx.Rngs(0)))


def prefill(weights, tokens):
    empty = [jnp.zeros((tokens.shape[0], WIDTH))] * LAYERS
    logits, states = nnx.merge(definition, weights)(tokens, empty)
    return states, logits.argmax(axis=-1).astype(jnp.int32)


def decode(weights, states, token):
    logits, states = nnx.merge(definition, weights)(token[:, None], states)
    return states, logits.argmax(axis=-1).astype(jnp.int32)


states, token = prefill(weights, prompt)
both = pt.trace(prefill=(prefill, (weights, prompt)), decode=(decode, (weights, states, token)), new_tokens=NEW)
other = pt.pose(pt.tag(both), pt.cluster("trn2_efa_4cs3"), objective="tpot", sharding="tensor")
print(pt.tag(both))

# %% [markdown]
# ## A policy that cuts anywhere
#
# Any placement must give the same numbers. Here layers go round the four wafers in turn, so that the body of the token loop is cut, and state crosses every token.


# %%
def in_turn(problem):
    mesh = np.zeros(len(problem), int)
    for n in problem.nodes(pt.Phase.DECODE):
        mesh[n] = 1 + max(0, int(problem.layer[n])) % 4
    mesh[problem.nodes(pt.Phase.NONE)] = 4
    return problem.placement(mesh)


placed = {}
for name, traced, posed, arguments in (("Linen", program, problem, (variables, prompt)), ("NNX", both, other, both.args)):
    placed[name] = pt.place(posed, in_turn)
    cut = pt.cut(traced, placed[name])
    verdict = pt.check(cut, *arguments)
    print(f"{name}: {len(cut.all)} stages, {sum(t.times for t in pt.transfers(cut))} transfers a request")
    print(verdict, end="\n\n")

# %% [markdown]
# ## The picture
#
# What a policy sees of each model, placed in turn: blocks of prefill above, of decode below, from left to right in the order of the program; what flows between them, and in green what is handed over. Colours are meshes.

# %%
COLOURS = dict(zip(problem.meshes, ["#3b6fb6", "#e08a1e", "#f2b661", "#c0392b", "#8a63b8"]))
fig, axes = plt.subplots(1, 2, figsize=(13, 4.4), layout="constrained")
for axis, (name, posed) in zip(axes, (("Linen", problem), ("NNX", other))):
    rows = {pt.Phase.PREFILL: 1.0, pt.Phase.DECODE: 0.0, pt.Phase.NONE: 0.0, pt.Phase.BOTH: 0.5}
    at, counts = {}, {}
    for n in range(len(posed)):
        row = rows[posed.phase[n]]
        counts[row] = counts.get(row, 0) + 1
        at[n] = (counts[row], row)
    at = {n: (x / (counts[y] + 1), y) for n, (x, y) in at.items()}
    for f in posed.flows:
        for d in f.dst:
            crosses = posed.phase[f.src] == pt.Phase.PREFILL and posed.phase[d] == pt.Phase.DECODE
            bend = 0.25 if at[f.src][1] == at[d][1] else 0.0
            axis.annotate("", at[d], at[f.src], arrowprops={"arrowstyle": "-|>", "color": "#2f9e6e" if crosses else "0.6", "linewidth": 1.6 if crosses else 0.7, "connectionstyle": f"arc3,rad={bend}", "shrinkA": 7, "shrinkB": 7, "alpha": 0.8})
    for m, mesh in enumerate(posed.meshes):
        nodes = [n for n in range(len(posed)) if placed[name].mesh[n] == m]
        axis.scatter([at[n][0] for n in nodes], [at[n][1] for n in nodes], s=190, color=COLOURS[mesh], label=mesh, zorder=3)
    for n, (x, y) in at.items():
        axis.text(x, y + (0.13 if y else -0.13), posed.names[n].split("/")[-1], ha="right" if y == 0 else "left", va="top" if y == 0 else "bottom", fontsize=7, rotation=35)
    axis.set(xlim=(0, 1), ylim=(-0.75, 1.75), title=f"{name}: {len(posed)} blocks")
    axis.set_yticks([0, 1], ["decode", "prefill"])
    axis.set_xticks([])
    axis.spines[["top", "right", "bottom", "left"]].set_visible(False)
handles, labels = axes[0].get_legend_handles_labels()
fig.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
plt.show()
