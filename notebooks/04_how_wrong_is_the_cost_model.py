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
# # How wrong is the cost model?
#
# Every time and price in a plan is a prediction. This notebook holds them against what was published: speeds of Trainium servers, of wafers, GPU kernels and
# serving runs, transfers. Points that a number of the model was fitted to are kept apart from those it never saw. The bad ones are shown too.

# %%
# %matplotlib inline
import matplotlib.pyplot as plt
import numpy as np

import partition as pt

# %% [markdown]
# ## Predicted against published
#
# `validate` reads the tables in `device_profiles/measurements/` (each point with its source), predicts each, and gives a band: the prediction with every
# uncertain number at either end.

# %%
points = pt.validate()
table = pt.frame(points)
table["error"] = [p.error for p in points]
table["inside"] = [p.inside for p in points]
print(f"{len(points)} points of {table['subject'].nunique()} subjects")
summary = table.groupby(["subject", "metric", "fitted"]).agg(points=("error", "size"), mean_error=("error", lambda e: e.abs().mean()), worst=("error", lambda e: e.iloc[e.abs().argmax()]), inside=("inside", "mean"))
print(summary.to_string(float_format=lambda x: f"{100 * x:+.1f} %"))

# %% [markdown]
# ## The worst
#
# What a reader should know before trusting a plan: the points that are furthest off, and where they come from.

# %%
worst = table.reindex(table["error"].abs().sort_values(ascending=False).index).head(8)
for _, row in worst.iterrows():
    print(f"{100 * row['error']:+6.1f} %  {row['subject']:<22} {row['what'][:70]:<70}  {row['source'][:60]}")

# %% [markdown]
# ## Do the bands hold?
#
# A band that holds 90 % of the points is honest; one that holds all of them is too wide to be of use.

# %%
fresh = table[~table["fitted"]]
print(f"of {len(fresh)} points that nothing was fitted to, {100 * fresh['inside'].mean():.0f} % lie in their bands; of all {len(table)}, {100 * table['inside'].mean():.0f} %")
print(f"the median band is {(fresh['high'] / fresh['low']).median():.2f} times as high as it is low")

# %% [markdown]
# ## The picture
#
# Left: each point with its band; on the line is right. Right: the errors of each subject, filled where the model was fitted to the points.

# %%
subjects = sorted(table["subject"].unique())
colours = {s: plt.get_cmap("tab20")(i % 20) for i, s in enumerate(subjects)}
fig, (left, right) = plt.subplots(1, 2, figsize=(12, 5.4), layout="constrained", gridspec_kw={"width_ratios": [1, 1.15]})
for s in subjects:
    rows = table[table["subject"] == s]
    band = np.clip(np.array([rows["predicted"] - rows["low"], rows["high"] - rows["predicted"]]), 0, None)
    left.errorbar(rows["published"], rows["predicted"], yerr=band, fmt="o", markersize=3.5, linewidth=0.7, color=colours[s], alpha=0.85)
ends = [table["published"].min() / 2, table["published"].max() * 2]
left.plot(ends, ends, color="0.3", linewidth=1)
left.fill_between(ends, [0.8 * e for e in ends], [1.25 * e for e in ends], color="0.85", zorder=0, label="within a quarter")
left.set(xscale="log", yscale="log", xlabel="published [s]", ylabel="predicted [s], with its band", xlim=ends, ylim=ends)
left.legend(frameon=False, loc="upper left")
for i, s in enumerate(subjects):
    for fitted, face in ((True, colours[s]), (False, "white")):
        rows = table[(table["subject"] == s) & (table["fitted"] == fitted)]
        right.scatter(100 * rows["error"], np.full(len(rows), i) + np.linspace(-0.18, 0.18, len(rows)) if len(rows) else [], s=18, facecolor=face, edgecolor=colours[s], linewidth=1.2)
right.axvline(0, color="0.3", linewidth=1)
right.axvspan(-20, 25, color="0.9", zorder=0)
right.set_yticks(range(len(subjects)), subjects, fontsize=8)
right.set(xlabel="error [%] (filled: the model was fitted to it)")
for axis in (left, right):
    axis.spines[["top", "right"]].set_visible(False)
plt.show()
