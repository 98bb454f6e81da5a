"""What a step multiplies every gradient by: AMP's scale taken out, and the norm of all of them clipped; or no step at all.

One reduction over the gradients (each backend's ``sum_of_squares``); the factor then goes into the update's coefficients.
"""

from __future__ import annotations

import math
import numbers
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import backends
from .backends.launch import Launch
from .scalars import on, wide
from .sharding import summed

if TYPE_CHECKING:
    from .optimizer import _FusedOptimizer

EPSILON = 1e-6  # torch.nn.utils.clip_grad_norm_'s


def reads_gradients_first(optimizer: _FusedOptimizer) -> bool:
    return optimizer.max_grad_norm is not None or optimizer.skip_nonfinite


def check(max_grad_norm: Any, skip_nonfinite: Any) -> None:
    number = isinstance(max_grad_norm, numbers.Real) and not isinstance(max_grad_norm, bool)
    if max_grad_norm is not None and not (number and max_grad_norm > 0):
        raise ValueError(
            f"Invalid max_grad_norm: {max_grad_norm!r} (allowed: None, or a number > 0, no tensor; inf measures only)"
        )
    if not isinstance(skip_nonfinite, bool):
        raise TypeError(f"Invalid skip_nonfinite value: {skip_nonfinite!r} (allowed: True or False)")


def check_whole(optimizer: _FusedOptimizer) -> None:
    """Raises where gradients are parts of which nothing tells who has the others: of FSDP1's flat parameters."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return
    if any(getattr(p, "_fsdp_flattened", False) for group in optimizer.param_groups for p in group["params"]):
        raise RuntimeError(
            "max_grad_norm and skip_nonfinite would see this process's part of FullyShardedDataParallel's gradients alone; "
            "call the model's clip_grad_norm_ before step(), or shard it with fully_shard (FSDP2), whose norm is over all parts"
        )


class Scaling(NamedTuple):
    """What is known of a step's gradients before they are looked at. ``on_device``: it may be on an accelerator alone, so
    that nothing here is ever read by the host; else both are numbers, and a step with ``found_inf`` does not get here."""

    grad_scale: Any = 1.0  # what the gradients have been multiplied by
    found_inf: Tensor | None = None  # not zero where nothing may change
    on_device: bool = False


def decide(optimizer: _FusedOptimizer, launches: list[Launch], scaling: Scaling) -> tuple[Any, Tensor | None] | None:
    """The factor of all gradients of these launches and ``found_inf`` after having looked at them; None where the host
    has seen that they are not finite, and that skips the step."""
    grad_scale, found_inf, on_device = scaling
    if isinstance(grad_scale, Tensor):
        grad_scale = on(grad_scale.device, grad_scale, wide(grad_scale.device))
    if not reads_gradients_first(optimizer):
        return 1.0 / grad_scale, found_inf
    total: Any = square_sum(optimizer, launches)
    if isinstance(grad_scale, Tensor):
        grad_scale = on(total.device, grad_scale, wide(total.device))
    if not on_device:
        total = total.item()
    optimizer._grad_norm, factor = norm_and_factor(total, grad_scale, optimizer.max_grad_norm)
    if optimizer.skip_nonfinite and on_device:
        overflow = (~torch.isfinite(total)).float()
        found_inf = overflow if found_inf is None else overflow + on(total.device, found_inf, torch.float32)
    elif optimizer.skip_nonfinite and not math.isfinite(total):
        return None
    return factor, found_inf


def square_sum(optimizer: _FusedOptimizer, launches: list[Launch]) -> Tensor:
    """The sum of all squared gradients as they are: 0-dim, float64, on an accelerator if any launch is on one. Infinite
    beyond a norm of 1e154."""
    spread: dict[tuple[Any, ...], list[Tensor]] = {}
    for launch in launches:
        spread.setdefault(launch.groups, []).append(backends.BACKENDS[launch.backend].sum_of_squares(launch))
    return total(summed({groups: total(parts) for groups, parts in spread.items()}))


def total(sums: list[Tensor]) -> Tensor:
    home = next((s for s in sums if s.device.type != "cpu"), torch.zeros((), dtype=torch.float64, device="cpu"))
    zero = torch.zeros_like(home)  # made there: under capture nothing is copied from memory that is not pinned
    return torch.stack([zero, *(s.to(home, non_blocking=True) for s in sums)]).sum()


def norm_and_factor(total: Any, grad_scale: Any, max_grad_norm: float | None) -> tuple[Any, Any]:
    """The norm of the unscaled gradients, and what to multiply the scaled ones by, from the sum of their squares: floats,
    or 0-dim tensors. A norm that is not finite goes into the factor, as in torch.nn.utils.clip_grad_norm_."""
    norm = total**0.5 / grad_scale
    if max_grad_norm is None or max_grad_norm == math.inf:
        return norm, 1.0 / grad_scale
    clip = float(max_grad_norm) / (norm + EPSILON)
    if isinstance(clip, Tensor):
        clip = clip.clamp(max=1.0)
    elif clip > 1.0:  # not of a NaN
        clip = 1.0
    return norm, clip / grad_scale
