# ---
# jupyter:
#   jupytext:
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
# # How a model becomes a plan
#
# A language model answers in two phases. *Prefill* reads the whole prompt at once and is limited by arithmetic; *decode* writes one token
# after the other and is limited by memory. Different machines are good at each. Partition takes a JAX function, finds the two phases in
# it, places them on a cluster of unlike machines, and runs the cut program on this CPU to prove that it is still the same program.
#
# This notebook goes through the chain one value at a time with a tiny Llama that has real (random) weights, and then makes a plan for a
# Llama of 70 billion parameters from shapes alone. All times and prices are predictions of a cost model; nothing here runs on an accelerator.

# %%
# %matplotlib inline
import matplotlib.pyplot as plt
import numpy as np

import partition as pt
from models.llama import generation

# %% [markdown]
# ## Program: what JAX sees
#
# `generation` gives a function `fn(weights, tokens)` and its arguments: a prompt of 16 tokens, to be continued by 8. `trace` records it as a
# jaxpr, the form that JAX itself compiles, and reads that into a graph of ops.

# %%
fn, args = generation("tiny", prompt=16, new_tokens=8, seed=0)
program = pt.trace(fn, *args)
print(program)

# %% [markdown]
# The last ops of the top level. One of them is a loop: its body writes one token a trip.

# %%
for op in program.graph.ops[-4:]:
    print(f"op {op.id:<4} {op.primitive:<12} {'loop of ' + str(op.loop.trips) + ' trips, ' + str(len(op.loop.body)) + ' ops in its body' if op.loop else ''}")

# %% [markdown]
# ## Phases: prefill, decode, and what crosses
#
# `tag` is told nothing about Llama. It looks for the loop that feeds a chosen token back into the model: that loop is decode, and what the
# loop needs is prefill. The reason is part of the result.

# %%
phases = pt.tag(program)
print(phases)

# %% [markdown]
# A phase is a NetworkX graph that you can look at and compute with: ops as nodes, tensors and their bytes on the edges.

# %%
import networkx as nx

prefill = phases.nx("prefill")
print(prefill)
path = nx.dag_longest_path(prefill, weight=None)
print(f"the longest chain has {len(path)} ops; it ends in")
for op in path[-4:]:
    print(f"  {prefill.nodes[op]['primitive']:<14} {prefill.nodes[op]['scope']}")

# %% [markdown]
# The hand-off is what prefill makes and the loop takes: here the KV cache of every layer, and the first token.

# %%
for c in phases.handoff:
    t = program.graph.tensors[c.tensor]
    print(f"{c.kind:<6} {t.dtype}{list(t.shape)!s:<16} {c.nbytes:>6,.0f} B  {c.scope}")

# %% [markdown]
# ## Problem: the numbers a policy sees
#
# A cluster is read from a profile in which every number has a kind and a source. This one is a server of 16 Trainium2 chips and four
# CS-3 wafers. Its links are the edges of a NetworkX graph; the hand-off will use those over EFA.

# %%
cluster = pt.cluster("trn2_efa_4cs3")
for name, mesh in cluster.nx.nodes(data=True):
    print(f"{name:<6} {mesh['count']:>2} x {mesh['device']:<5} {mesh['capacity'] / 1e9:>7,.1f} GB usable  {mesh['price'] * 3600:>6.2f} $/h")
print()
for a, b, link in cluster.nx.edges(data=True):
    if a == "trn2" or (a, b) == ("cs3.0", "cs3.1"):
        print(f"{a:<5} -> {b:<6} {link['link']:<10} {link['alpha'] * 1e6:>4.0f} us + bytes / {link['beta'] / 1e9:.0f} GB/s")

# %% [markdown]
# `pose` gathers ops into blocks and prices each block on each mesh. Seconds of one run, in microseconds (the four wafers are alike):

# %%
problem = pt.pose(phases, cluster, objective="e2e")
print(f"{'':<3}{'node':<18}{'phase':<9}{'runs':>4}" + "".join(f"{m:>9}" for m in problem.meshes))
for n, name in enumerate(problem.names):
    print(f"{n:<3}{name:<18}{problem.phase[n]:<9}{problem.times[n]:>4}" + "".join(f"{s * 1e6:>9.2f}" for s in problem.seconds[n]))

# %% [markdown]
# A model as small as this one is all fixed cost: on the 16 chips it waits for the collectives that join them, 70 us each. So a plan for a
# small model says little about a large one.
#
# ## Placement: one mesh number a node
#
# A policy is any function from a problem to a placement. `phase_split` is the split that the package is made for.

# %%
split = pt.place(problem, "phase_split")
print(split.mesh)


# %% [markdown]
# And one written here. It cuts *inside* the token loop: the first half of decode on one wafer, the second half on the next.

# %%
def two_wafers(problem: pt.Problem) -> pt.Placement:
    mesh = np.zeros(len(problem), int)  # prefill stays on mesh 0
    decode = problem.nodes(pt.Phase.DECODE)
    mesh[decode] = 1
    mesh[decode[len(decode) // 2 :]] = 2
    mesh[problem.nodes(pt.Phase.NONE)] = 2
    return problem.placement(mesh)


mine = pt.place(problem, two_wafers)
print(mine.mesh)

# %% [markdown]
# `evaluate` defines every objective once: TTFT (until the first token is there and decode can go on), TPOT (each further token), and the
# price of a million tokens in a fleet where every machine is kept busy. For this model the second wafer only adds two crossings a token.

# %%
for name, placement in (("phase_split", split), ("two_wafers", mine)):
    e = pt.evaluate(problem, placement)
    print(f"{name:<12} TTFT {e.ttft * 1e6:6.1f} us   TPOT {e.tpot * 1e6:6.1f} us   end to end {e.e2e * 1e6:7.1f} us   {e.usd_per_mtok:.2f} $ a million tokens")

# %% [markdown]
# ## Timeline: who runs when
#
# `schedule` keeps the slots that `evaluate` scores. Here the first twelve that are not prefill.

# %%
timeline = pt.schedule(problem, mine)
print(f"makespan {timeline.makespan * 1e6:.1f} us, bottleneck {timeline.bottleneck}")
later = [s for s in timeline.slots if s.node is None or problem.phase[s.node] != pt.Phase.PREFILL]
for s in sorted(later, key=lambda s: s.start)[:12]:
    lane = problem.meshes[s.mesh] if s.to is None else f"{problem.meshes[s.mesh]} -> {problem.meshes[s.to]}"
    what = problem.names[s.node] if s.node is not None else problem.flows[s.flow].kind
    print(f"{s.start * 1e6:8.1f} .. {s.end * 1e6:8.1f} us  {lane:<15} {what}")

# %% [markdown]
# ## Stages: the cut program
#
# `cut` turns a placement into sub-jaxprs that run on one mesh each. With `phase_split` the token loop stays whole; with the policy above its
# body becomes two stages that run once a trip.

# %%
print("phase_split:", pt.cut(program, split))
stages = pt.cut(program, mine)
print("two_wafers:", stages)

# %% [markdown]
# Run them: every mesh gets CPU host devices of its own, and what crosses is really moved between them.

# %%
runner = pt.prepare(stages)  # compiles every stage; pt.run(stages, *args) does both at once
tokens = runner(*args)
print(tokens)

# %% [markdown]
# ## Verdict: is it still the same program?
#
# `check` runs the uncut program too and compares the outputs and everything that crosses between stages, within stated bounds. It also says
# what a run on stand-ins cannot show.

# %%
verdict = pt.check(stages, *args, runner=runner)
print(verdict)

# %% [markdown]
# ## A plan for 70 billion parameters
#
# The same chain in one call. The weights are shapes only: nothing of that size is made or run, and no verdict is possible here.

# %%
fn70, args70 = generation("llama-3.1-70b", prompt=2048, new_tokens=256)
plan = pt.plan(fn70, args70, cluster="trn2_efa_4cs3", policy="phase_split", title="Llama-3.1-70B, 2048 + 256 tokens")
print(plan)

# %% [markdown]
# Is the split worth it? `explain` holds it against the best single kind of machine, and gives the price and the bandwidth at which the answer flips, since neither is published.

# %%
answer = pt.explain(plan.problem)
print(answer.sentence)

# %% [markdown]
# The alternatives as numbers, with one more: the same tagged program posed on eight H100.

# %%
h100 = pt.pose(plan.problem.phases, pt.cluster("h100_only"), objective=plan.problem.objective)
estimates = {a.name: a.estimate for a in answer.alternatives} | {"all on h100": pt.evaluate(h100, pt.place(h100, "single"))}
for a in answer.alternatives:
    if a.estimate is None:
        print(f"{a.name}: {a.why_not}")
for name, e in estimates.items():
    if e is not None:
        print(f"{name:<12} TTFT {e.ttft * 1e3:5.0f} ms   TPOT {e.tpot * 1e3:5.2f} ms   {e.usd_per_mtok:6.2f} $ a million tokens if kept busy, {e.usd_reserved:6.2f} $ if reserved for one request")

# %% [markdown]
# Read both columns of prices. Kept busy, a machine is paid for the time it works on this request and serves others in between. Reserved, every
# machine that the plan uses is paid for until the request ends: then the wafers wait through prefill and the chips through decode. The
# split is made for the first case. Nor does it help the first token, which the machine of the prefill alone decides.
#
# ## The picture
#
# Above, the plan in time: prefill on the left; enlarged on the right, its end and the first three trips of the token loop. The hand-off of a layer crosses while prefill goes on with the next one, so that next to nothing of it is left to wait for. A slot too short to
# be seen is drawn as a thin line. Below, the alternatives. All numbers are predictions; the price of a wafer-hour is an assumption.

# %%
p, slots = plan.problem, pt.schedule(plan.problem, plan.placement).slots
COLOUR = {"prefill": "#3b6fb6", "decode": "#e08a1e", "hand-off": "#2f9e6e", "between wafers": "#8a63b8"}
lanes = [*p.meshes, *(f"{p.meshes[0]} → {m}" for m in p.meshes[1:]), "cs3 → cs3"]


def lane_and_kind(slot):
    if slot.to is None:
        return lanes.index(p.meshes[slot.mesh]), str(p.phase[slot.node])
    if slot.mesh == 0:
        return len(p.meshes) + slot.to - 1, "hand-off"
    return len(lanes) - 1, "between wafers"


fig = plt.figure(figsize=(12, 7.6), layout="constrained")
grid = fig.add_gridspec(2, 1, height_ratios=[1.75, 1])
top = grid[0].subgridspec(1, 2, width_ratios=[1.35, 1])
whole = fig.add_subplot(top[0])
near = fig.add_subplot(top[1], sharey=whole)
drawn = {}
for s in slots:
    lane, kind = lane_and_kind(s)
    drawn.setdefault((lane, kind), []).append((s.start * 1e3, (s.end - s.start) * 1e3))
for axes in (whole, near):
    for (lane, kind), spans in drawn.items():
        if kind in COLOUR:
            axes.broken_barh(spans, (lane - 0.36, 0.72), facecolor=COLOUR[kind], edgecolor=COLOUR[kind], linewidth=0.7)
    axes.grid(axis="x", alpha=0.25)
    axes.axhline(len(p.meshes) - 0.5, color="0.6", linewidth=0.8)
    axes.set_xlabel("ms since the request came")
    axes.spines[["top", "right"]].set_visible(False)
end = max(s.end for s in slots) * 1e3
whole.set(xlim=(0, end + 2), ylim=(len(lanes) - 0.4, -0.6), yticks=range(len(lanes)), yticklabels=lanes, title="prefill, hand-off, first three tokens")
near.set(xlim=(plan.estimate.ttft * 1e3 - 2, end + 0.3), title="enlarged: the first three tokens of decode")
near.tick_params(labelleft=False)
whole.legend([plt.Rectangle((0, 0), 1, 1, color=c) for c in COLOUR.values()], COLOUR, loc="center", bbox_to_anchor=(0.42, 0.72), ncols=2, frameon=False)

SHOWN = {"split": "split\ntrn2 + cs3", "all on trn2": "16 trn2", "all on h100": "8 h100"}
LOOKS = ["#2d3e50", "#9aa5b1", "#c3cad2"]
bars = grid[1].subgridspec(1, 3, wspace=0.08)
for i, (title, unit, value) in enumerate((
    ("TTFT", "{:.0f} ms", lambda e: e.ttft * 1e3),
    ("TPOT", "{:.1f} ms", lambda e: e.tpot * 1e3),
    ("$ a million tokens, fleet kept busy", "{:.0f} $", lambda e: e.usd_per_mtok),
)):
    axes = fig.add_subplot(bars[i])
    drawn_bars = axes.bar(list(SHOWN.values()), [value(estimates[name]) for name in SHOWN], color=LOOKS, width=0.62)
    axes.bar_label(drawn_bars, fmt=lambda v, unit=unit: unit.format(v), padding=2)
    axes.set_title(title)
    axes.margins(y=0.16)
    axes.set_yticks([])
    axes.spines[["top", "right", "left"]].set_visible(False)
fig.suptitle(f"{plan.title}, planned on {plan.cluster}", fontweight="bold")
plt.show()
