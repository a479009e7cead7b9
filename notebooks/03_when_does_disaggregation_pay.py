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
# # When does disaggregation pay?
#
# In March 2026 AWS and Cerebras announced that prompts are read on Trainium, tokens written on wafers, and that the KV cache crosses EFA in between. Nothing in this
# notebook is told that. A solver gets profiles of the machines and the graph of a model, and places every block where it likes. Does it find the split? And
# where is the split wrong: at which prompt, batch, load, bandwidth and price?
#
# Every number is a prediction, most with a band (notebook 04). The price of a wafer-hour and the gateway into it are assumptions, which is why they are varied.

# %%
# %matplotlib inline

import dataclasses

import matplotlib.pyplot as plt
from matplotlib.colors import ListedColormap

import partition as pt
from models.llama import generation

# %% [markdown]
# ## The split, rediscovered
#
# Llama-3.1-70B, a prompt of 2,048 tokens and 256 new ones, on a Trainium2 server and four wafers. `portfolio` searches over all placements of all blocks.

# %%
MODEL, MACHINES = "llama-3.1-70b", "trn2_efa_4cs3"
fn, shapes = generation(MODEL, prompt=2048, new_tokens=256)
phases = pt.tag(pt.trace(fn, *shapes))
problem = pt.pose(phases, pt.cluster(MACHINES), objective="e2e")
found = pt.place(problem, "portfolio")
for phase in (pt.Phase.PREFILL, pt.Phase.DECODE):
    nodes = problem.nodes(phase)
    kinds = {k: sum(problem.kinds[found.mesh[n]] == k for n in nodes) for k in sorted(set(problem.kinds))}
    print(f"{phase:<8}", ", ".join(f"{n} of {len(nodes)} blocks on {k}" for k, n in kinds.items() if n))
e = pt.evaluate(problem, found)
print(f"end to end {e.e2e * 1e3:.0f} ms; nothing can be faster than {pt.lower_bound(problem).score * 1e3:.0f} ms")

# %% [markdown]
# ## What it costs under a load
#
# A machine that waits is paid for all the same. `explain` makes a fleet of each alternative that carries so many requests a second, and says what a token costs there.

# %%
answers = {load: pt.explain(dataclasses.replace(problem, objective="usd_per_mtok"), load=load) for load in (0.5, 2.0, 8.0)}
for load, answer in answers.items():
    print(f"--- {load:g} requests/s\n{answer.sentence}\n")

# %% [markdown]
# ## Maps
#
# Three maps of the fastest way to answer one request, and of the cheapest under full load: all on one kind, or split. Prices and bandwidths only change the numbers of a problem
# (`on`), so a map of them needs no new trace; a prompt or a batch needs one.

# %%
WAYS = ("all on trn2", "all on cs3", "split")


def way(posed, objective):
    """Which of the three is best, and by how much the split beats the better of the others (below 1: it does)."""
    values = {}
    for name in WAYS:
        how = "phase_split" if name == "split" else (lambda p, kind=name.removeprefix("all on "): single(p, kind=kind))
        try:
            values[name] = pt.evaluate(posed, pt.place(posed, how)).score(objective)
        except pt.PartitionError:
            values[name] = float("inf")
    return min(WAYS, key=values.get), values["split"] / min(v for k, v in values.items() if k != "split")


def grid(rows, columns, cell):
    """Ways and ratios of all pairs."""
    return [[cell(r, c) for c in columns] for r in rows]


single = pt.policy("single")
base = pt.cluster(MACHINES)
BETAS = ["0.3 GB/s", "1 GB/s", "3 GB/s", "10 GB/s", "100 GB/s", "347 GB/s"]
PRICES = ["3 $/h", "10 $/h", "20 $/h", "42 $/h", "80 $/h", "160 $/h"]
PROMPTS, BATCHES = [128, 512, 2048, 8192], [1, 4, 16]

posed = {}
for prompt in PROMPTS:
    for batch in BATCHES:
        if batch == 1 or prompt == 2048:
            f, s = generation("llama-3.1-8b", prompt=prompt, new_tokens=256, batch=batch)
            posed[prompt, batch] = pt.pose(pt.tag(pt.trace(f, *s)), base, objective="e2e")
print(f"{len(posed)} programs traced")

# %%
from partition.problem import on

maps = {
    "fastest: prompt x EFA bandwidth": (PROMPTS, BETAS, grid(PROMPTS, BETAS, lambda p, b: way(on(posed[p, 1], base.replace({"efa_v3.beta": b})), "e2e"))),
    "cheapest if kept busy: prompt x price of a wafer": (PROMPTS, PRICES, grid(PROMPTS, PRICES, lambda p, c: way(on(posed[p, 1], base.replace({"cs3.price": c})), "usd_per_mtok"))),
    "cheapest if kept busy: batch x price of a wafer": (BATCHES, PRICES, grid(BATCHES, PRICES, lambda b, c: way(on(posed[2048, b], base.replace({"cs3.price": c})), "usd_per_mtok"))),
}
for title, (rows, _, cells) in maps.items():
    won = sum(w == "split" for row in cells for w, _ in row)
    print(f"{title}: the split wins {won} of {sum(map(len, cells))} cells")

# %% [markdown]
# ## The picture
#
# Colour: which way is best for Llama-3.1-8B. Number: the split over the best of one kind; below 1 it pays. What is not published (the price, what EFA gives a wafer) decides
# between the colours, so an announcement alone does not tell who should buy it.

# %%
COLOURS = {"all on trn2": "#3b6fb6", "all on cs3": "#e08a1e", "split": "#2f9e6e"}
fig, axes = plt.subplots(1, 3, figsize=(13, 3.9), layout="constrained")
for axis, (title, (rows, columns, cells)) in zip(axes, maps.items()):
    axis.imshow([[WAYS.index(w) for w, _ in row] for row in cells], cmap=ListedColormap([COLOURS[w] for w in WAYS]), vmin=-0.5, vmax=2.5, aspect="auto", alpha=0.75)
    for i, row in enumerate(cells):
        for j, (_, ratio) in enumerate(row):
            axis.text(j, i, f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}", ha="center", va="center", fontsize=9)
    axis.set_xticks(range(len(columns)), columns, rotation=30, ha="right")
    axis.set_yticks(range(len(rows)), [f"{r:,}" for r in rows])
    axis.set_ylabel(title.split(": ")[1].split(" x ")[0])
    axis.set_title(title, fontsize=10)
fig.legend([plt.Rectangle((0, 0), 1, 1, color=c, alpha=0.75) for c in COLOURS.values()], COLOURS, loc="outside lower center", ncols=3, frameon=False)
plt.show()
