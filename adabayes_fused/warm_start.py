"""From torch's Adam or AdamW to our state: its averages as they are, and for AdaBayes the variances that go with them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .algorithms import ADABAYES, ADABAYES_FP, Algorithm, corrected, variance_units
from .checkpoint import check_entry
from .prepare import as_real
from .scalars import scalars
from .warn import warn

AVERAGES = ("exp_avg", "exp_avg_sq")


def from_adam(algorithm: Algorithm, here: list[dict[str, Any]], state_dict: dict[str, Any]) -> dict[str, Any]:
    """What ``load_state_dict`` of an optimizer with the groups ``here`` takes: these, and the state that follows from Adam's.

    Raises: ValueError where ``state_dict`` is not one of Adam or AdamW for these parameters.
    """
    if not {"state", "param_groups"} <= state_dict.keys():
        raise ValueError(
            f"load_adam_state_dict takes what state_dict() of torch.optim.Adam or AdamW gave, given {list(state_dict)}"
        )
    groups = state_dict["param_groups"]
    lengths, expected = ([len(group["params"]) for group in them] for them in (groups, here))
    if lengths != expected:
        raise ValueError(f"Adam's state dict has groups of {lengths} parameters; here they have {expected}")
    state = {}
    for g, (saved, group) in enumerate(zip(groups, here, strict=True)):
        if "amsgrad" not in saved:
            raise ValueError(
                f"load_adam_state_dict takes what torch.optim.Adam or AdamW gave; group {g} lacks amsgrad "
                f"(it has {', '.join(sorted(saved))})"
            )
        if bool(saved.get("maximize")) != bool(group["maximize"]):
            raise ValueError(
                f"group {g} of Adam has maximize={saved.get('maximize')}, here it is {group['maximize']}: other signs"
            )
        for i, p in zip(saved["params"], group["params"], strict=True):
            entry = state_dict["state"].get(i)
            if entry:
                state[i] = _entry(algorithm, group, saved["betas"], i, p, entry)
    if any("max_exp_avg_sq" in entry for entry in state_dict["state"].values()):
        warn("Adam's max_exp_avg_sq (amsgrad) has no counterpart here and is left out")
    groups = [{**group, "params": list(saved["params"])} for saved, group in zip(groups, here, strict=True)]
    return {"state": {i: entry for i, entry in state.items() if entry}, "param_groups": groups}


def _entry(algorithm: Algorithm, group: dict[str, Any], betas: Any, i: Any, p: Tensor, entry: dict[str, Any]) -> dict[str, Any]:
    """Our state of parameter ``i``; none where Adam has made no step."""
    missing, others = {"step", *AVERAGES} - entry.keys(), entry.keys() - {"step", *AVERAGES, "max_exp_avg_sq"}
    if missing or others:
        raise ValueError(
            f"load_adam_state_dict takes step, exp_avg and exp_avg_sq as torch.optim.Adam or AdamW keeps them; "
            f"the state of parameter {i} has {', '.join(map(str, entry))}"
        )
    check_entry(AVERAGES, i, p, entry)
    step = float(entry["step"])
    if step == 0.0:
        return {}
    kept = {name: entry[name] for name in ("step", *AVERAGES)}
    return kept | _variances(group, betas, step, entry["exp_avg_sq"]) if algorithm is ADABAYES else kept


def _variances(group: dict[str, Any], betas: Any, step: float, exp_avg_sq: Tensor) -> dict[str, Tensor]:
    """``post_var`` at the fixed point for gradients of this mean square, Eq. 20, and ``prior_var`` one drift later, Eq. 16b;
    in float64, in the units of AdaBayes's state, shaped like ``exp_avg_sq``."""
    group = scalars({**group, "betas": betas, "eps": 0.0}, float)
    *_, a, debias2, _ = corrected(ADABAYES_FP.numbers(group), step)
    *_, forget, drift = ADABAYES.coefficients(group)
    sigma_sq = variance_units(group)[1] or 1.0  # the literal one, where lr is 0
    post = exp_avg_sq.detach().to(torch.promote_types(exp_avg_sq.dtype, torch.float64), copy=True)
    as_real(post).mul_(debias2).add_(a * a).sqrt_().add_(a).reciprocal_().mul_(2.0 * a * sigma_sq)
    prior = post.clone()
    as_real(prior).mul_(1.0 - forget).add_(drift)
    return {"prior_var": prior, "post_var": post}
