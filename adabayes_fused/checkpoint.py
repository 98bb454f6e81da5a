"""Loading a state_dict: checked against the optimizer first, then restored bit for bit.

torch's ``load_state_dict`` casts state to the parameters' dtype. Ours is float32 whatever theirs is, so it is hidden from
torch: after the user's hooks that come before, restored before those that come after.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from .algorithms import ADABAYES, complete_group
from .gather import new_slot, new_step, own_copy
from .slabs import Slabs


class _Hidden:
    """A tensor that torch's load_state_dict passes on untouched."""

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor


def hide_state(optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Checks a state_dict against the optimizer; returns it with its tensors hidden."""
    groups = state_dict["param_groups"]
    if [len(g["params"]) for g in groups] != [len(g["params"]) for g in optimizer.param_groups]:
        return state_dict  # torch refuses it, in its own words
    _check_groups(optimizer, groups)
    ids = [i for group in state_dict["param_groups"] for i in group["params"]]
    params = dict(zip(ids, (p for group in optimizer.param_groups for p in group["params"]), strict=False))
    state = {}
    for i, entry in state_dict["state"].items():
        if i in params:
            _check_entry(optimizer, i, params[i], entry)
            entry = {name: _Hidden(value) for name, value in entry.items()}
        state[i] = entry
    return {**state_dict, "state": state}


def _check_groups(optimizer, groups: list[dict[str, Any]]) -> None:
    needed = {*optimizer.defaults, "r"} - {"differentiable", "capturable", "maximize"}  # as in torch, older ones may lack flags
    for g, group in enumerate(groups):
        missing = sorted(needed - group.keys())
        if missing:
            raise ValueError(
                f"loaded state dict is not of {type(optimizer).__name__}: its group {g} lacks {', '.join(missing)} "
                f"(it has {', '.join(sorted(group))})"
            )
        complete_group(optimizer.algorithm, {**optimizer.defaults, **group})


def _check_entry(optimizer, i: int, p: Tensor, entry: dict[str, Any]) -> None:
    algorithm = optimizer.algorithm
    missing = [name for name in ("step", *algorithm.stored(lean=True)) if name not in entry]
    if entry and missing:
        raise ValueError(
            f"loaded state dict is not of {type(optimizer).__name__}: the state of parameter {i} lacks {', '.join(missing)} "
            f"(it has {', '.join(entry)})"
        )
    if entry and torch.as_tensor(entry["step"]).numel() != 1:
        raise ValueError(f"loaded state dict: step of parameter {i} must be one number, given {entry['step']!r}")
    for name in algorithm.slots:
        if name in entry and not isinstance(entry[name], Tensor):
            raise ValueError(f"loaded state dict: {name} of parameter {i} must be a tensor, given {entry[name]!r}")
        if name in entry and entry[name].shape != p.shape:
            raise ValueError(
                f"loaded state dict is of another model: {name} of parameter {i} has shape {tuple(entry[name].shape)}, "
                f"the parameter {tuple(p.shape)}"
            )


def restore_state(optimizer) -> None:
    """Puts the hidden tensors in place, in our dtype, on the parameter's device."""
    names = optimizer.algorithm.stored(optimizer.lean)
    absent: set[str] = set()
    slabs = Slabs()
    for group in optimizer.param_groups:
        for p in group["params"]:
            if not optimizer.state.get(p):
                continue
            saved = {name: hidden.tensor for name, hidden in optimizer.state[p].items()}
            step_device = p.device if optimizer._counts_on_device(None, None) else torch.device("cpu")
            entry = {"step": new_step(saved["step"], step_device, slabs)}
            for name, initial in zip(names, optimizer.algorithm.initial, strict=False):
                entry[name] = own_copy(p, saved[name], slabs) if name in saved else new_slot(p, initial, slabs)
            entry.update({name: value for name, value in saved.items() if name not in ("step", *optimizer.algorithm.slots)})
            absent.update(name for name in names if name not in saved)
            optimizer.state[p] = entry
    optimizer._slabs = slabs
    if optimizer.algorithm is ADABAYES and "exp_avg_sq" in absent:
        warnings.warn(
            "the loaded state is lean: exp_avg_sq, which AdaBayes keeps for you and does not use, starts at zero. "
            "The weights go on as they would have.",
            stacklevel=3,
        )
