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
# # A planner from scratch
#
# This notebook is the whole of Partition in a hundred and fifty lines: it traces a model, counts its work, finds prefill and decode, places them on two
# unlike machines, cuts the program, runs the pieces and checks them. Each step is the simplest thing that works; each ends with the file that does it in
# earnest. It uses JAX, NetworkX and NumPy, and nothing of `partition`.

# %%
# %matplotlib inline
import itertools

import jax
import jax.extend
import jax.numpy as jnp
import matplotlib.pyplot as plt
import networkx as nx
import numpy as np

# %% [markdown]
# ## A model
#
# One layer of attention with a cache, and a small MLP. `generate` reads a prompt (prefill), then writes tokens one by one in a loop (decode). In earnest:
# `models/llama.py`.

# %%
V, D, S, N = 512, 128, 256, 192  # vocabulary, width, prompt, new tokens


def step(w, x, k, v, at):
    """x [n, D] at positions `at` [n]: attends to the cache k, v [S + N, D] up to each position."""
    k = jax.lax.dynamic_update_slice(k, x @ w["k"], (at[0], 0))
    v = jax.lax.dynamic_update_slice(v, x @ w["v"], (at[0], 0))
    scores = (x @ w["q"]) @ k.T / D**0.5
    seen = jnp.arange(S + N)[None, :] <= at[:, None]
    e = jnp.where(seen, jnp.exp(scores - scores.max(axis=1, keepdims=True)), 0.0)
    x = x + (e / e.sum(axis=1, keepdims=True)) @ v
    return x + jnp.tanh(x @ w["up"]) @ w["down"], k, v


def generate(w, tokens):
    empty = jnp.zeros((S + N, D))
    x, k, v = step(w, w["embed"][tokens], empty, empty, jnp.arange(S))
    first = jnp.argmax(x[-1] @ w["head"])

    def write(carry, at):
        token, k, v = carry
        x, k, v = step(w, w["embed"][token][None], k, v, at[None])
        return (jnp.argmax(x[0] @ w["head"]), k, v), token

    _, written = jax.lax.scan(write, (first, k, v), jnp.arange(S, S + N))
    return written


rng = np.random.default_rng(0)
shapes = {"embed": (V, D), "head": (D, V), "q": (D, D), "k": (D, D), "v": (D, D), "up": (D, 4 * D), "down": (4 * D, D)}
weights = {name: (2 * rng.standard_normal(shape) / D**0.5).astype(np.float32) for name, shape in shapes.items()}
prompt = rng.integers(0, V, S, np.int32)
args = (weights, prompt)

# %% [markdown]
# ## Trace: the program as equations
#
# JAX records what the function does as a jaxpr. Calls inside it are unfolded, so that one list of equations is left. In earnest: `partition/program.py`,
# `partition/graph.py`.

# %%
closed = jax.make_jaxpr(generate)(*args)


def unfold(jaxpr, names, known):
    """Equations of a jaxpr with calls opened up: (eqn, inputs, outputs), where inputs and outputs are numbers of tensors, or literals."""
    read = lambda a: a.val if hasattr(a, "val") else names[a]
    for eqn in jaxpr.eqns:
        inner = eqn.params.get("jaxpr") if eqn.primitive.name in ("jit", "pjit") else eqn.params.get("call_jaxpr")
        if inner is not None:
            body = getattr(inner, "jaxpr", inner)
            inside = dict(zip(body.invars, [read(a) for a in eqn.invars]))
            yield from unfold(body, inside, known)
            names.update(zip(eqn.outvars, [inside[a] if not hasattr(a, "val") else a.val for a in body.outvars]))
            continue
        outs = []
        for v in eqn.outvars:
            known.append(v.aval)
            names[v] = len(known) - 1
            outs.append(names[v])
        yield eqn, [read(a) for a in eqn.invars], outs


avals = [v.aval for v in closed.jaxpr.invars]  # tensor number -> its shape and type
names = {v: i for i, v in enumerate(closed.jaxpr.invars)}
eqns = list(unfold(closed.jaxpr, names, avals))
result = names[closed.jaxpr.outvars[0]]
print(f"{len(eqns)} equations, {len(avals)} tensors; the last is a {eqns[-1][0].primitive.name} of {eqns[-1][0].params['length']} trips")

# %% [markdown]
# ## Work: flops and bytes
#
# A contraction costs two flops for each product; everything reads its inputs and writes its outputs. A loop costs its body, as often as it runs.
# In earnest: `partition/work.py` and `partition/rules/`, where a primitive without a rule is an error and not zero.

# %%
def work(eqn):
    """(flops, bytes) of one equation."""
    if eqn.primitive.name == "scan":
        inside = [work(e) for e, _, _ in unfold(eqn.params["jaxpr"].jaxpr, {v: 0 for v in eqn.params["jaxpr"].jaxpr.invars}, [])]
        return tuple(eqn.params["length"] * sum(x) for x in zip(*inside))
    size = lambda a: a.aval.size * a.aval.dtype.itemsize
    flops = eqn.outvars[0].aval.size
    if eqn.primitive.name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        flops *= 2 * np.prod([eqn.invars[0].aval.shape[d] for d in contracted])
    moved = sum(map(size, [*eqn.invars, *eqn.outvars]))
    if eqn.primitive.name == "dynamic_update_slice":  # done in place: only what is written moves
        moved = 2 * size(eqn.invars[1])
    return float(flops), float(moved)


graph = nx.DiGraph()
for n, (eqn, ins, outs) in enumerate(eqns):
    graph.add_node(n, name=eqn.primitive.name, work=work(eqn))
maker = {t: n for n, (_, _, outs) in enumerate(eqns) for t in outs}
for n, (_, ins, _) in enumerate(eqns):
    graph.add_edges_from((maker[t], n) for t in ins if isinstance(t, int) and t in maker)
print(graph)

# %% [markdown]
# ## Phases: what is prefill, what is decode
#
# The token loop is the one that feeds an integer which it chose (an argmax) back into itself. It is decode; all that it needs is prefill; the tensors that
# go in are the hand-off. In earnest: `partition/loops.py` and `partition/phases.py`, which find it in any model.

# %%
def is_token_loop(eqn):
    if eqn.primitive.name != "scan":
        return False
    body = eqn.params["jaxpr"].jaxpr
    chosen = {v for e, _, _ in unfold(body, {v: 0 for v in body.invars}, []) if e.primitive.name == "argmax" for v in e.outvars}
    return bool(chosen) and any(jnp.issubdtype(v.aval.dtype, jnp.integer) and v.aval.shape == () for v in body.outvars)


loop = next(n for n, (eqn, _, _) in enumerate(eqns) if is_token_loop(eqn))
prefill = nx.ancestors(graph, loop)
decode = set(graph) - prefill
handoff = sorted({t for t in eqns[loop][1] if isinstance(t, int) and maker.get(t) in prefill})
print(f"prefill {len(prefill)} equations, decode {len(decode)}; the hand-off:", *(f"{avals[t].dtype}{list(avals[t].shape)}" for t in handoff))

# %% [markdown]
# ## Machines and a roofline
#
# A machine has arithmetic and a memory bandwidth; a phase takes the longer of both, equation by equation. Values that cross pay latency and bandwidth.
# In earnest: `partition/costs/` (with what published runs say that real machines reach), `device_profiles/` (every number with its source).

# %%
machines = {"chips": {"flops": 10e12, "bytes": 3e12}, "wafer": {"flops": 2e12, "bytes": 200e12}}
alpha, beta = 20e-6, 50e9  # s, B/s between the two


def seconds(phase, machine):
    """One phase on one machine [s]."""
    m = machines[machine]
    return sum(max(f / m["flops"], b / m["bytes"]) for f, b in (graph.nodes[n]["work"] for n in phase))


crossing = alpha + sum(avals[t].size * avals[t].dtype.itemsize for t in handoff) / beta
for name, phase in (("prefill", prefill), ("decode", decode)):
    print(f"{name:<8}", *(f"{m} {seconds(phase, m) * 1e6:8.1f} us" for m in machines))
print(f"the hand-off takes {crossing * 1e6:.1f} us")

# %% [markdown]
# ## Place: try everything
#
# Two phases on two machines are four placements. In earnest there are hundreds of nodes, and `partition/policies/` has a dozen ways to search, with
# `partition/bounds.py` to say how far from the best they may be.

# %%
placements = list(itertools.product(machines, machines))
cost = {(a, b): seconds(prefill, a) + seconds(decode, b) + (crossing if a != b else 0.0) for a, b in placements}
best = min(cost, key=cost.get)
for (a, b), c in sorted(cost.items(), key=lambda x: x[1]):
    print(f"prefill on {a:<6} decode on {b:<6} {c * 1e6:8.1f} us{'   <- taken' if (a, b) == best else ''}")

# %% [markdown]
# ## Cut: two programs
#
# A stage is some of the equations, with what they read from outside as inputs and what others need as outputs. It is evaluated equation by equation, which
# `jax.jit` turns into one compiled program. In earnest: `partition/stages.py`, which writes jaxprs, also when the body of the loop itself is cut.

# %%
def stage(numbers, outputs):
    """Some equations as (compiled function, the tensors it reads)."""
    own = {t for n in numbers for t in eqns[n][2]}
    inputs = sorted({t for n in numbers for t in eqns[n][1] if isinstance(t, int)} - own)

    def run(*values):
        env = dict(zip(inputs, values))
        for n in sorted(numbers):
            eqn, ins, outs = eqns[n]
            given = [env[t] if isinstance(t, int) else t for t in ins]
            made = jax.extend.core.jaxpr_as_fun(alone(eqn))(*given)
            env.update(zip(outs, made))
        return [env[t] for t in outputs]

    return jax.jit(run), inputs


def alone(eqn):
    """One equation as a jaxpr of its own, all of its operands as inputs."""
    core = jax.extend.core
    invars = [core.Var(a.aval) for a in eqn.invars]
    fresh = eqn.replace(invars=invars)
    debug = core.DebugInfo("jit", "one", tuple(f"x{i}" for i in range(len(invars))), tuple(f"y{i}" for i in range(len(eqn.outvars))))
    return core.ClosedJaxpr(core.Jaxpr(constvars=(), invars=invars, outvars=eqn.outvars, eqns=[fresh], effects=core.no_effects, debug_info=debug), ())


first, first_reads = stage(prefill, handoff)
second, second_reads = stage(decode, [result])

# %% [markdown]
# ## Run and check
#
# Each stage on its machine; what crosses is really moved. Then the uncut program: the same tokens? In earnest: `partition/execution.py` and
# `partition/equivalence.py`, which compares every value at every boundary, and names the first equation that differs.

# %%
leaves = dict(enumerate(jax.tree.leaves(args)))
env = leaves | dict(zip(handoff, first(*[leaves[t] for t in first_reads])))
moved = sum(np.asarray(env[t]).nbytes for t in handoff)
(tokens,) = second(*[env[t] for t in second_reads])
uncut = jax.jit(generate)(*args)
print("cut:  ", *np.asarray(tokens)[:12], "...")
print("uncut:", *np.asarray(uncut)[:12], "...")
print(f"{moved:,} B crossed;", "the same tokens" if np.array_equal(tokens, uncut) else "OTHER TOKENS")
assert np.array_equal(tokens, uncut)

# %% [markdown]
# ## The picture
#
# Left: every equation against both machines' rooflines (bytes and flops of one run). Right: the four placements in time. The split wins here because the
# two phases want different machines and the cache is small; notebook 03 asks when that is so with real machines.

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
BLUE, ORANGE, GREEN = "#3b6fb6", "#e08a1e", "#2f9e6e"
body = {n: graph.nodes[n]["work"] for n in graph}
for nodes, colour, name in ((prefill, BLUE, "prefill"), (decode, ORANGE, "decode (all trips)")):
    points = [body[n] for n in nodes if body[n][0] > 1]
    left.scatter([f / b for f, b in points], [f for f, _ in points], s=26, color=colour, alpha=0.8, label=name, zorder=3)
left.set(xscale="log", yscale="log", xlabel="flops per byte", ylabel="flops", title="every equation")
for name, m in machines.items():
    ridge = m["flops"] / m["bytes"]
    left.axvline(ridge, color="0.45", linewidth=1, linestyle="--")
    left.text(ridge, left.get_ylim()[0] * 1.6, f" ridge of {name}", rotation=90, fontsize=8, color="0.35", va="bottom")
left.legend(frameon=False, loc="upper left")
for row, ((a, b), c) in enumerate(sorted(cost.items(), key=lambda x: -x[1])):
    at = 0.0
    for width, colour in ((seconds(prefill, a), BLUE), (crossing if a != b else 0.0, GREEN), (seconds(decode, b), ORANGE)):
        right.barh(row, width * 1e6, left=at, color=colour, height=0.6)
        at += width * 1e6
    right.text(at, row, f" {c * 1e6:.0f} us", va="center", fontweight="bold" if (a, b) == best else None)
right.set_yticks(range(4), [f"{a} → {b}" for (a, b), _ in sorted(cost.items(), key=lambda x: -x[1])])
right.set(xlabel="us", title="prefill, hand-off, decode of each placement", xlim=(0, max(cost.values()) * 1.18e6))
for axes in (left, right):
    axes.spines[["top", "right"]].set_visible(False)
plt.show()
