"""Draws docs/images/limits.png, Eq. 20 and its two limits: ``python docs/site/limits.py``, which needs matplotlib."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

LR, SGD_LR = 1e-3, 0.1
PICTURE = Path(__file__).parents[1] / "images" / "limits.png"


def step_size(g: np.ndarray, lr: float = LR, sgd_lr: float = SGD_LR) -> np.ndarray:
    """What a weight's averaged gradient is multiplied by: Eq. 20. ``g`` is the root of its mean squared gradient."""
    a = lr / (2 * sgd_lr)
    return lr / (a + np.sqrt(a * a + g * g))


def picture() -> Figure:
    g = np.logspace(-5, 0, 200)
    figure = Figure(figsize=(7, 4), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.loglog(g, np.full_like(g, SGD_LR), "--", color="tab:orange", label=f"SGD: sgd_lr = {SGD_LR}")
    axes.loglog(g, LR / g, "--", color="tab:green", label=f"Adam: lr / RMS, lr = {LR}")
    axes.loglog(g, step_size(g), color="tab:blue", linewidth=2.5, label="AdaBayes at its fixed point")
    axes.set(ylim=(5e-4, 1), xlim=(g[0], g[-1]), ylabel="step size of the weight")
    axes.set_xlabel("root mean square (RMS) of the weight's gradient")
    axes.set_title("sgd_lr limits the step of weights with tiny gradients")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure


if __name__ == "__main__":
    picture().savefig(PICTURE)
