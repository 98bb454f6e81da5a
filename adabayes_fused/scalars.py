"""A group's options as numbers: floats on the host, or 0-dim tensors on the device where the host must not wait for them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from operator import is_
from typing import Any

import torch
from torch import Tensor

from .algorithms import pair, python_number

SCALARS = ("lr", "r", "batch_size", "weight_decay", "eps", "first_prior")  # numbers or one-element tensors; betas too


def tensor_options(group: dict[str, Any]) -> dict[str, Tensor]:
    """The group's options that are tensors, by name; those in ``betas`` as "betas[0]" and "betas[1]"."""
    found = [(name, group.get(name)) for name in SCALARS]
    found += [(f"betas[{i}]", beta) for i, beta in enumerate(pair(group["betas"]))]
    return {name: value for name, value in found if isinstance(value, Tensor)}


def scalars(group: dict[str, Any], convert: Callable[[Any], Any]) -> dict[str, Any]:
    """The group with ``convert`` applied to every hyper-parameter that is a number or a one-element tensor. What a schedule
    has put below 0 by rounding is 0."""
    found = {name: convert(_number(group[name])) for name in SCALARS if group.get(name) is not None}
    betas = tuple(_not_negative(convert(_number(beta))) for beta in pair(group["betas"]))
    for name in ("lr", "weight_decay"):
        found[name] = _not_negative(found[name])
    return {**group, **found, "betas": betas}


_OPTIONS = (*SCALARS, "betas", "sgd_lr", "maximize", "capturable", "transition", "variance_follows_lr")
_FIXED = (float, int, bool, str, type(None))  # what nobody can change but by putting another object in its place


class KnownOptions:
    """The options of groups that have been checked, as floats. They hold as long as the very objects that were checked are in
    the group, none of which can change."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[dict[str, Any], tuple[Any, ...], dict[str, Any]]] = {}

    def __contains__(self, group: dict[str, Any]) -> bool:
        found = self._known.get(id(group))
        return found is not None and found[0] is group and all(map(is_, map(group.get, _OPTIONS), found[1]))

    def note(self, group: dict[str, Any], groups: int) -> None:
        """Remembers a group, one of so many, that has been checked."""
        values = tuple(map(group.get, _OPTIONS))
        if len(self._known) > groups:  # some were taken away, and must not be kept alive
            self._known.clear()
        self._known.pop(id(group), None)
        if all(type(v) in _FIXED or type(v) is tuple and all(type(x) in _FIXED for x in v) for v in values):
            options = {name: group[name] for name in _OPTIONS if name in group}
            self._known[id(group)] = group, values, scalars(options, float)

    def floats(self, group: dict[str, Any]) -> dict[str, Any]:
        """The options of a group that this step has found here or noted."""
        found = self._known.get(id(group))
        return found[2] if found is not None else scalars(group, float)

    def tensors(self, group: dict[str, Any]) -> dict[str, Tensor]:
        """Of such a group, the options that are tensors."""
        return {} if id(group) in self._known else tensor_options(group)


def _number(value: Any) -> Any:
    if type(value) is float:  # nearly always, at each step
        return value
    return value.detach() if isinstance(value, Tensor) else python_number(value)


def _not_negative(value: Any) -> Any:
    return value.clamp(min=0.0) if isinstance(value, Tensor) else max(value, 0.0)


def on(device: torch.device, value: Any, dtype: torch.dtype) -> Any:
    """A one-element tensor there, as a 0-dim tensor of ``dtype``, waited for only where the CPU is to read it; None as it
    is; another number as a float."""
    if isinstance(value, Tensor):
        return value.detach().reshape(()).to(device=device, dtype=dtype, non_blocking=device.type != "cpu")
    return None if value is None else float(value)


def wide(device: torch.device) -> torch.dtype:
    """The type that scalars are computed in there: float64, or float32 where the device has no other."""
    return torch.float64 if device.type in ("cpu", "cuda", "meta") or _has_float64(device) else torch.float32


@functools.cache
def _has_float64(device: torch.device) -> bool:
    """Asks the device: Apple's GPUs have no float64, and some of Intel's have none where others of the same name have it."""
    if device.type == "xpu":
        return bool(torch.xpu.get_device_properties(device).has_fp64)
    try:
        torch.ones((), dtype=torch.float64, device=device).add(1.0)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, NotImplementedError):
        return False
    return True
