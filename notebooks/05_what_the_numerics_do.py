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
# # What the numerics do
#
# A cut model must give the numbers of the uncut one. This notebook asks three questions of a small Llama and keeps them apart: is the *cut* right; does *sharding* matter; what
# would the *target's arithmetic* do. Then it plants a fault and has it found.

# %%
# %matplotlib inline
import dataclasses

import matplotlib.pyplot as plt
import numpy as np

import partition as pt
from models.llama import generation
from partition import numerics

# %% [markdown]
# ## Is the cut right?
#
# Prefill on Trainium, decode on a wafer. `check` runs the uncut program and the stages, and compares the outputs and every value at a boundary, bit for bit. With `oracle=True` it also
# holds both against the same program in float64: how wrong are they, each?

# %%
fn, args = generation("tiny", prompt=24, new_tokens=12, seed=0, logits=True)
program = pt.trace(fn, *args)
problem = pt.pose(pt.tag(program), pt.cluster("trn2_efa_4cs3"), sharding="tensor")
stages = pt.cut(program, pt.place(problem, "random"))  # cut anywhere, the body of the token loop too
verdict = pt.check(stages, *args, oracle=True)
print(verdict)

# %% [markdown]
# ## The error, stage by stage
#
# Root mean square errors against float64 at the boundaries, over the size of the values: they grow as the model goes on, in the cut and in the uncut program alike.

# %%
table = pt.frame(verdict)
errors = [(d.name, d.oracle) for d in verdict.boundaries if d.oracle is not None and "made by" in d.name]
for name, (uncut, cut) in errors[:8]:
    print(f"{name:<44} uncut {uncut:.2e}   cut {cut:.2e}")

# %% [markdown]
# ## What would the target's arithmetic do?
#
# Trainium multiplies in bfloat16 and adds up in float32; a wafer computes in float16. Their profiles say so, with sources. `effects` runs the same stages in that arithmetic, phase by
# phase, and with what crosses cast on the wire. The model is in bfloat16 here, as it would be served.

# %%
fn2, args2 = generation("tiny", prompt=24, new_tokens=32, seed=0, logits=True, batch=4, dtype="bfloat16")
other = pt.trace(fn2, *args2)
split = pt.cut(other, pt.place(pt.pose(pt.tag(other), pt.cluster("trn2_efa_cs3"), sharding="tensor"), "phase_split"))
effects = numerics.effects(split, *args2)
print(numerics.effects_text(effects))

# %% [markdown]
# ## A planted fault
#
# Somebody's kernel turns keys by the wrong angle: the cosine is taken for the sine, in one stage of decode. The tokens may even stay the same. The check names the op, and the line of
# the model that it comes from.

# %%


def faulty(stages):
    """The same stages, but for one whose first cosine is a sine."""
    import jax

    for s in stages.all:
        inner = s.jaxpr.jaxpr if hasattr(s.jaxpr, "jaxpr") else s.jaxpr
        for i, eqn in enumerate(inner.eqns):
            if eqn.primitive is jax.lax.cos_p and s.region == "body":
                eqns = [*inner.eqns[:i], eqn.replace(primitive=jax.lax.sin_p), *inner.eqns[i + 1 :]]
                broken = dataclasses.replace(s, jaxpr=s.jaxpr.replace(jaxpr=inner.replace(eqns=eqns)))
                steps = tuple(dataclasses.replace(step, body=tuple(broken if b is s else b for b in step.body)) if hasattr(step, "body") else step for step in stages.steps)
                return dataclasses.replace(stages, steps=steps)
    raise LookupError("no stage of the body has a cosine")


try:
    pt.check(faulty(stages), *args)
except pt.EquivalenceError as error:
    wrong = error.verdict
    print(error)

# %% [markdown]
# ## The picture
#
# Left: errors against float64 at each boundary, the cut on top of the uncut. Middle: how far the target's arithmetic moves the distribution of the next token. Right: the planted
# fault, beside the clean run: differences at the boundaries, in the order of the run.

# %%
fig, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained", gridspec_kw={"width_ratios": [1, 1.25, 1]})
left.semilogy([max(u, 1e-12) for _, (u, _) in errors], "o", color="#9aa5b1", markersize=7, label="uncut")
left.semilogy([max(c, 1e-12) for _, (_, c) in errors], ".", color="#3b6fb6", label="cut")
left.set(xlabel="boundary, in the order of the run", ylabel="rms error against float64", title="is the cut right?")
left.legend(frameon=False)
shown = [e for e in effects[1:] if e.logits is not None]
middle.barh([e.name for e in shown], [e.logits.kl[0] for e in shown], color=["#2f9e6e" if "crosses" in e.name else "#e08a1e" for e in shown], height=0.6)
for i, e in enumerate(shown):
    middle.text(e.logits.kl[0], i, f" {100 * e.agree:.0f} % of tokens kept", va="center", fontsize=8)
middle.invert_yaxis()
middle.set(xlabel="KL divergence of the next token [nats]", title="what would the target do?")
middle.set_xlim(0, max(e.logits.kl[0] for e in shown) * 1.9)
clean, faults = ([d.relative for d in v.boundaries] for v in (verdict, wrong))
right.semilogy(np.maximum(faults, 1e-9), ".", color="#c0392b", label="with the fault")
right.semilogy(np.maximum(clean, 1e-9), ".", color="#3b6fb6", label="clean (nothing: drawn at 1e-9)")
right.set(xlabel="boundary", ylabel="difference, of scale", title="a planted fault")
right.legend(frameon=False, fontsize=8)
for axis in (left, middle, right):
    axis.spines[["top", "right"]].set_visible(False)
plt.show()
