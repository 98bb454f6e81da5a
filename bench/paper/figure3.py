"""Figure 3's points: each weight's variance beside what Eq. 20 says it should be."""

from __future__ import annotations

from typing import Any

import torch

from adabayes_fused import AdaBayes, posterior

from .reported import eq_20

POINTS = 10_000


@torch.no_grad()
def figure3(optimizer: AdaBayes, seed: int) -> dict[str, Any]:
    """x and sigma^2_post of random weights, drawn with replacement, in the paper's units (gradients of the summed loss); mean and
    standard deviation of sigma^2_post / Eq. 20 over all weights that ever had a gradient, and over those where x < sigma^2."""
    (group,) = optimizer.param_groups
    eta, batch_size = rounded(group["lr"]), float(group["batch_size"])
    sigma_sq = eta * float(group["r"]) / batch_size  # Eq. 22
    found = []
    for p in group["params"]:
        state = optimizer.state[p]
        mean_sq = state["exp_avg_sq"].double() / (1 - group["betas"][1] ** float(state["step"]))
        found.append(torch.stack([eta / (batch_size * mean_sq.sqrt()), posterior(optimizer, p)[1].double()]).flatten(1))
    x, post = torch.cat(found, 1)
    seen = x.isfinite()
    x, post = x[seen], post[seen]
    ratio = post / eq_20(x, sigma_sq)
    some = torch.randint(max(1, len(x)), (min(POINTS, len(x)),), generator=torch.Generator().manual_seed(seed)).to(x.device)
    on_adams_side = ratio[x < sigma_sq]
    return dict(
        eta=eta,
        sigma_sq=sigma_sq,
        x=short(x[some]),
        post=short(post[some]),
        left_out=int((~seen).sum()),
        **statistics(ratio),
        adam_side=statistics(on_adams_side) if len(on_adams_side) else None,
    )


def statistics(ratio: torch.Tensor) -> dict[str, Any]:
    return dict(weights=len(ratio), ratio_mean=ratio.mean().item(), ratio_std=ratio.std(correction=0).item())


def rounded(lr: float | torch.Tensor) -> float:
    """0.0001, also where it is a float32 tensor's 0.00010000000474974513 or a scheduler's 0.00010000000000000002."""
    return float(f"{float(lr):.7g}")


def short(values: torch.Tensor) -> list[float]:
    return [float(f"{v:.5g}") for v in values.tolist()]
