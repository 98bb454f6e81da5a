"""What a step multiplies every gradient by: AMP's scale taken out, and the norm of all of them clipped; or no step at all.

Where all parameters are on the CPU these are numbers. Else a GPU decides, and the host never asks: the decision is a tensor there
of factor, norm and skip, which the update reads (``csrc/decision.h``).
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backends
from .algorithms import quotient
from .backends.launch import Launch, Undecided
from .scalars import on, wide
from .sharding import summed

EPSILON = 1e-6  # torch.nn.utils.clip_grad_norm_'s


class Clipping(NamedTuple):
    """An optimizer's options of these names."""

    max_grad_norm: float | None
    skip_nonfinite: bool

    @property
    def reads_gradients_first(self) -> bool:
        return self.max_grad_norm is not None or self.skip_nonfinite

    @property
    def limit(self) -> float:
        return math.inf if self.max_grad_norm is None else float(self.max_grad_norm)

    def check(self) -> None:
        """Raises ValueError or TypeError for what they may not be."""
        limit = self.max_grad_norm
        number = isinstance(limit, numbers.Real) and not isinstance(limit, bool)
        if limit is not None and not (number and limit > 0):
            raise ValueError(
                f"Invalid max_grad_norm: {limit!r} (allowed: None, or a number > 0, no tensor; inf measures only)"
            )
        if not isinstance(self.skip_nonfinite, bool):
            raise TypeError(f"Invalid skip_nonfinite value: {self.skip_nonfinite!r} (allowed: True or False)")


class Scaling(NamedTuple):
    """What torch.amp.GradScaler tells a step: numbers or one-element tensors."""

    grad_scale: Any = 1.0  # what the gradients have been multiplied by
    found_inf: Any = None  # not zero where nothing may change

    @property
    def on_device(self) -> bool:
        return any(isinstance(t, Tensor) and t.device.type != "cpu" for t in self)


def check_whole(groups: Sequence[dict[str, Any]]) -> None:
    """Raises where gradients are parts of which nothing tells who has the others: of FSDP1's flat parameters."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return
    if any(getattr(p, "_fsdp_flattened", False) for group in groups for p in group["params"]):
        raise RuntimeError(
            "max_grad_norm and skip_nonfinite would see this process's part of FullyShardedDataParallel's gradients alone; "
            "call the model's clip_grad_norm_ before step(), or shard it with fully_shard (FSDP2), whose norm is over all parts"
        )


def known(launches: list[Launch], clipping: Clipping, scaling: Scaling) -> tuple[float | None, float | None]:
    """The factor of all gradients, None where nothing may change, and their norm, None if nobody wants it. Waits for what an
    accelerator knows."""
    if scaling.found_inf is not None and bool(scaling.found_inf):
        return None, None
    grad_scale = float(scaling.grad_scale)
    if not clipping.reads_gradients_first:
        return 1.0 / grad_scale, None
    total = square_sums(launches).sum().item()
    norm, factor = norm_and_factor(total, grad_scale, clipping.limit)
    return (factor if math.isfinite(total) or not clipping.skip_nonfinite else None), norm


def decide(launches: list[Launch], clipping: Clipping, scaling: Scaling, skipped: Tensor) -> Tensor:
    """The decision, float64 (where the device has it) on the device of ``skipped``, an int64 which counts it if it is to skip."""
    sums = square_sums(launches) if clipping.reads_gradients_first else None
    scale, found_inf = (on(skipped.device, t, torch.float32) if isinstance(t, Tensor) else t for t in scaling)
    grad_scale, known_scale = (scale, 1.0) if isinstance(scale, Tensor) else (None, float(scale))
    by = Undecided(sums, grad_scale, known_scale, found_inf, clipping.limit, clipping.skip_nonfinite, skipped)
    decision: Tensor = getattr(backends.BACKENDS[launches[0].backend], "decide", _decide)(by)
    return decision


def _decide(by: Undecided) -> Tensor:
    dtype, device = wide(by.skipped.device), by.skipped.device
    total = torch.zeros((), dtype=dtype, device=device) if by.sums is None else by.sums.sum()
    scale = by.known_scale if by.grad_scale is None else by.grad_scale.to(dtype)
    norm, factor = norm_and_factor(total, scale, by.limit)
    skip = torch.zeros_like(total, dtype=torch.bool) if by.found_inf is None else by.found_inf != 0
    if by.skip_nonfinite:
        skip = skip | ~torch.isfinite(total)
    if by.skip_nonfinite or by.found_inf is not None:
        by.skipped.add_(skip)
    return torch.stack([torch.as_tensor(x, dtype=dtype, device=total.device) for x in (factor, norm, skip)])


def square_sums(launches: list[Launch]) -> Tensor:
    """Numbers of which the sum is that of all squared gradients as they are: 1-dim, float64, on an accelerator if any launch is
    on one. Infinite beyond a norm of 1e154."""
    spread: dict[tuple[Any, ...], list[Tensor]] = {}
    for launch in launches:
        spread.setdefault(launch.spread, []).append(backends.BACKENDS[launch.backend].sum_of_squares(launch))
    if spread.keys() <= {()}:
        parts = spread.get((), [])
    else:
        parts = [t.reshape(1) for t in summed({groups: total(parts) for groups, parts in spread.items()})]
    home = next((s for s in parts if s.device.type != "cpu"), torch.zeros(0, dtype=torch.float64, device="cpu"))
    return parts[0] if len(parts) == 1 else torch.cat([home[:0], *(s.to(home, non_blocking=True) for s in parts)])


def total(sums: list[Tensor]) -> Tensor:
    home = next((s for s in sums if s.device.type != "cpu"), torch.zeros((), dtype=torch.float64, device="cpu"))
    zero = home.new_zeros(())  # made there: under capture nothing is copied from memory that is not pinned
    return torch.stack([zero, *(s.sum().to(home, non_blocking=True) for s in sums)]).sum()


def norm_and_factor(total: Any, grad_scale: Any, limit: float) -> tuple[Any, Any]:
    """The norm of the unscaled gradients, and what to multiply the scaled ones by, from the sum of their squares: floats,
    or 0-dim tensors. A norm that is not finite goes into the factor, as in torch.nn.utils.clip_grad_norm_."""
    norm = total**0.5 / grad_scale
    if limit == math.inf:
        return norm, 1.0 / grad_scale
    clip = quotient(limit, norm + EPSILON)
    if isinstance(clip, Tensor):
        clip = clip.clamp(max=1.0)
    elif clip > 1.0:  # not of a NaN
        clip = 1.0
    return norm, clip / grad_scale
