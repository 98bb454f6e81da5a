"""A group's options as numbers: floats on the host, or 0-dim tensors on the device where the host must not wait for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

SCALARS = ("lr", "r", "batch_size", "weight_decay", "eps", "first_prior")  # numbers or one-element tensors; betas too


def tensor_options(group: dict[str, Any]) -> dict[str, Tensor]:
    """The group's options that are tensors, by name; those in ``betas`` as "betas[0]" and "betas[1]"."""
    found = [(name, group.get(name)) for name in SCALARS]
    found += [(f"betas[{i}]", beta) for i, beta in enumerate(group["betas"])]
    return {name: value for name, value in found if isinstance(value, Tensor)}


def scalars(group: dict[str, Any], convert: Callable[[Any], Any]) -> dict[str, Any]:
    """The group with ``convert`` applied to every hyper-parameter that is a number or a one-element tensor."""
    found = {name: convert(group[name]) for name in SCALARS if group.get(name) is not None}
    return {**group, **found, "betas": tuple(map(convert, group["betas"]))}


def on(device: torch.device, value: Any, dtype: torch.dtype) -> Any:
    """A one-element tensor there, as a 0-dim tensor of ``dtype``, waited for only where the CPU is to read it; None as it
    is; another number as a float."""
    if isinstance(value, Tensor):
        return value.detach().reshape(()).to(device=device, dtype=dtype, non_blocking=device.type != "cpu")
    return None if value is None else float(value)


def wide(device: torch.device) -> torch.dtype:
    """The type that scalars are computed in there: float64, or float32 where the device has no other."""
    return torch.float32 if device.type == "mps" else torch.float64
