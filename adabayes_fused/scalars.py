"""A group's options as numbers: floats on the host, or 0-dim tensors on the device where the host must not wait for them."""

from __future__ import annotations

import functools
from array import array
from collections.abc import Callable, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor

from .algorithms import Algorithm, pair, python_number
from .plain import ordinary_mode
from .table import NUMBERS, Mirror

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
_UNUSED = (0.0,) * NUMBERS
_FIXED = (float, int, bool, str, type(None))  # what nobody can change but by putting another object in its place


class Numbers:
    """The numbers of groups that have been checked. They hold as long as the very objects that were checked are in the group,
    none of which can change."""

    def __init__(self, algorithm: Algorithm) -> None:
        self._algorithm = algorithm
        self._known: dict[int, tuple[dict[str, Any], tuple[Any, ...], tuple[float, ...] | None]] = {}
        self._packed: tuple[tuple[Any, ...], float, array[float]] = (), 0.0, array("d")
        self._mirrors: dict[torch.device, Mirror] = {}
        self._there: dict[torch.device, tuple[Tensor, Tensor, tuple[Tensor, ...]]] = {}

    def __contains__(self, group: dict[str, Any]) -> bool:
        found = self._known.get(id(group))
        return found is not None and found[0] is group and all(map(is_, map(group.get, _OPTIONS), found[1]))

    def note(self, group: dict[str, Any], groups: int) -> None:
        """Remembers a group, one of so many, that has been checked."""
        values = tuple(map(group.get, _OPTIONS))
        if len(self._known) > groups:  # some were taken away, and must not be kept alive
            self._known.clear()
        self._known.pop(id(group), None)
        parts = [x for v in values for x in (v if type(v) is tuple else (v,))]
        tensors = [x for x in parts if type(x) not in _FIXED]
        if not tensors:
            self._known[id(group)] = group, values, self._algorithm.numbers(scalars(group, float))
        elif all(isinstance(x, Tensor) and x.device.type != "cpu" for x in tensors):  # whose value no host checks
            self._known[id(group)] = group, values, None

    def rows(
        self, groups: Sequence[dict[str, Any]], used: set[int] | None, device: torch.device, wait: bool
    ) -> tuple[Sequence[Any], ...]:
        """A row of sixteen for each group (``Algorithm.numbers``): floats, and what follows from options that are tensors on an
        accelerator as 0-dim tensors on ``device``, unless they may be waited for; a list, if it may hold tensors. ``used``: which
        groups are, if not all."""

        def row(group: dict[str, Any]) -> Sequence[Any]:
            known = self._known.get(id(group))
            if known is not None and known[2] is not None:
                return known[2]
            if wait:
                return self._algorithm.numbers(scalars(group, float))
            dtype = wide(device)
            return list(self._algorithm.numbers(scalars(group, lambda t: _as_known(t, device, dtype))))

        return tuple(row(group) if used is None or g in used else _UNUSED for g, group in enumerate(groups))

    def packed(self, rows: tuple[Sequence[Any], ...], factor: float) -> array[float]:
        """Rows one after the other, the gradients' factor among them; 0 for what is a tensor."""
        known, known_factor, numbers = self._packed
        if len(known) != len(rows) or factor != known_factor or not all(map(is_, known, rows)):
            numbers = array("d", (0.0 if isinstance(x, Tensor) else x for row in rows for x in row))
            for g in range(len(rows)):
                numbers[NUMBERS * g] *= factor
            self._packed = rows, factor, numbers
        return numbers

    def on(self, device: torch.device, rows: tuple[Sequence[Any], ...], factor: float, kept_alive: list[Tensor]) -> Tensor:
        """Rows on ``device``, float64 of shape (groups, 16), with the gradients' factor in them. Waits for nothing."""
        known = bytes(self.packed(rows, factor))
        mirror = self._mirrors.setdefault(device, Mirror())
        words = mirror.of(known, device, lambda: torch.frombuffer(bytearray(known), dtype=torch.int64), kept_alive)[0]
        found = self._there.get(device)
        if found is None or found[0] is not words:
            with ordinary_mode():
                there = words.view(torch.float64)
                found = self._there[device] = words, there.view(-1, NUMBERS), there.unbind()
        lists = [(NUMBERS * g, row) for g, row in enumerate(rows) if type(row) is list]
        computed = [(found[2][first + i], x) for first, row in lists for i, x in enumerate(row) if isinstance(x, Tensor)]
        if computed:
            numbers, values = zip(*computed, strict=True)
            torch._foreach_copy_(list(numbers), list(values))
        return found[1]


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
        number = value.detach() if not value.dim() else value.detach().reshape(())
        return number.to(device=device, dtype=dtype, non_blocking=device.type != "cpu")
    return None if value is None else float(value)


def _as_known(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """A tensor on the CPU as a float, beside an accelerator; another on ``device``."""
    if type(value) is float:  # nearly always, at each step
        return value
    known = isinstance(value, Tensor) and value.device.type == "cpu" and device.type != "cpu"
    return float(value) if known else on(device, value, dtype)


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
