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
# # Write a policy
#
# A policy is any function from a `Problem` to a `Placement`. This notebook writes one in twenty lines, puts it on the leaderboard beside those of the
# package, and holds all of them to the bound, which says how far from the best anything can be. No file of the package is touched.

# %%
# %matplotlib inline
import matplotlib.pyplot as plt
import numpy as np

import partition as pt
from models.llama import generation

# %% [markdown]
# ## What a policy sees
#
# A problem is numbers alone: `seconds[n, m]` of one run of node n on mesh m, `times[n]` runs a request, `flows` (what passes between nodes),
# `residents` (weights and state, and the nodes that need them), capacities, links, prices. Here: Llama-3.1-8B on 16 Trainium2 chips and four wafers.

# %%
fn, shapes = generation("llama-3.1-8b", prompt=2048, new_tokens=256)
phases = pt.tag(pt.trace(fn, *shapes))
problem = pt.pose(phases, pt.cluster("trn2_efa_4cs3"), objective="e2e")
print(f"{len(problem)} nodes on {len(problem.meshes)} meshes: {', '.join(problem.meshes)}")
print(f"a node of decode in the middle, {problem.names[len(problem) // 2]}: ", *(f"{m} {s * 1e6:.1f} us" for m, s in zip(problem.meshes, problem.seconds[len(problem) // 2])))

# %% [markdown]
# ## Twenty lines
#
# Start with each phase on the mesh that is fastest for all of it. Then look at the nodes in their order and try to cut each phase once: everything behind the cut moves
# to another mesh. Keep what `evaluate`, the one definition of every objective, likes best. What does not fit its memory raises, and is passed over.


# %%
def one_cut(problem: pt.Problem) -> pt.Placement:
    """Each phase in at most two pieces: the best of all single cuts."""
    total = problem.seconds * problem.times[:, None]
    order = [problem.nodes(p) for p in (pt.Phase.PREFILL, pt.Phase.DECODE)]
    mesh = np.zeros(len(problem), int)
    for nodes in order:
        mesh[nodes] = total[nodes].sum(axis=0).argmin()
    rest = problem.nodes(pt.Phase.NONE)  # what follows the loop goes where decode ended
    best, score = None, np.inf
    for nodes in order:
        for cut in range(0, len(nodes), max(1, len(nodes) // 24)):
            for m in range(len(problem.meshes)):
                tried = mesh.copy()
                tried[nodes[cut:]] = m
                tried[rest] = tried[order[1][-1]]
                try:
                    placement = pt.verify(problem, problem.placement(tried))
                except pt.PartitionError:
                    continue
                if (value := pt.evaluate(problem, placement).score(problem.objective)) < score:
                    best, score, mesh = placement, value, tried
    return best


mine = pt.place(problem, one_cut)
print(f"end to end {pt.evaluate(problem, mine).e2e * 1e3:.1f} ms")

# %% [markdown]
# ## The leaderboard
#
# `compare` runs policies on problems side by side. `gap` is the share of a policy's own score by which something better may exist, (score - bound) / score: the bound is proved, whoever
# found the placement. Four questions about the same model: fastest to the end, cheapest, most tokens per second, and the shortest prompt.

# %%
short, short_shapes = generation("llama-3.1-8b", prompt=128, new_tokens=256)
small = pt.tag(pt.trace(short, *short_shapes))
machines = pt.cluster("trn2_efa_4cs3")
problems = {
    "end to end": problem,
    "money": pt.pose(phases, machines, objective="usd_per_mtok"),
    "tokens/s": pt.pose(phases, machines, objective="throughput"),
    "end to end,\nprompt 128": pt.pose(small, machines, objective="e2e"),
}
POLICIES = ["portfolio", one_cut, "phase_split", "single", "heft", "random"]
results = pt.compare(problems, POLICIES)
board = pt.frame(results)
print(board[["problem", "policy", "seconds", "score", "gap"]].to_string(index=False))

# %% [markdown]
# ## The picture
#
# How far each policy may be from the best, on each question. A grey part cannot be blamed on the policy alone: it is the gap of the best known, so either all leave it, or
# the bound is weak there.

# %%
names = [p if isinstance(p, str) else p.__name__ for p in POLICIES]
fig, axes = plt.subplots(1, len(problems), figsize=(11.5, 3.6), sharey=True, layout="constrained")
for axis, title in zip(axes, problems):
    rows = board[board["problem"] == title].set_index("policy").reindex(names)
    gap = 100 * rows["gap"].to_numpy(float)
    known = np.nanmin(gap)
    axis.barh(names, gap, color=["#e08a1e" if n == "one_cut" else "#3b6fb6" for n in names], height=0.62)
    axis.barh(names, np.full(len(names), known), color="#c3cad2", height=0.62)
    for i, g in enumerate(gap):
        axis.text(g if np.isfinite(g) else 0, i, f" {g:.1f} %" if np.isfinite(g) else " does not fit", va="center", fontsize=8)
    axis.set_title(title, fontsize=10)
    axis.set_xlim(0, max(12, np.nanmax(gap) * 1.55))
    axis.set_xlabel("gap at most [%]")
    axis.spines[["top", "right"]].set_visible(False)
axes[0].invert_yaxis()
fig.suptitle("How far from the best a placement may be (grey: the best that is known)", fontweight="bold")
plt.show()
