"""
What a dependence measure says of independent data
==================================================

The paper's measure is the distance correlation, the V-statistic. On a batch it has no zero: the
wider two independent batches are, the nearer it is to one. The bias-corrected measures do not do
that.
"""

import matplotlib.pyplot as plt
import torch

from mvmr_loss.dependence import dependence_measure

_ = torch.manual_seed(0)
names = ["distance_correlation", "u_distance_correlation_sqr", "cka", "debiased_cka"]
measures = {name: dependence_measure(name) for name in names}

# %%
# Independent Gaussians of growing width, 128 samples.

widths = [2, 8, 32, 128, 512, 2048, 8192]
independent = {name: [] for name in names}
for width in widths:
    x, y = torch.randn(2, 128, width)
    for name, measure in measures.items():
        independent[name].append(measure(x, y).item())

# %%
# Next, what becomes of the measures as one batch turns into the other: a mixture of a batch of
# width 512 and of independent noise. An embedding that depends more must have the larger value,
# and all measures agree on that; how much of their range they use for it differs.

shares = torch.linspace(0, 1, 11)
x, noise = torch.randn(2, 128, 512)
mixed = {
    name: [measure(x, share * x + (1 - share) * noise).item() for share in shares]
    for name, measure in measures.items()
}

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
for name in names:
    left.plot(widths, independent[name], marker="o", label=name)
    right.plot(shares, mixed[name], marker="o")
left.set(xscale="log", xlabel="width of independent batches", ylabel="dependence")
left.legend(frameon=False)
right.set(xlabel="share of the one batch in the other, width 512")
for axes in (left, right):
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9")

# %%
# In numbers, at the largest width:

for name in names:
    print(f"{name:28} {independent[name][-1]:6.3f}")

# %%
# A loss takes a measure by its name, or by a mapping with its options:

from mvmr_loss import MVMRLoss  # noqa: E402

criterion = MVMRLoss(dependence_measure={"name": "cka", "kernel": "gaussian"})
criterion
