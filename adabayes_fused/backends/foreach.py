"""Plain PyTorch over lists of tensors, for every other device. Holds the rules once more, in ``torch._foreach_*``:
the same names in the same order as ``csrc/rule.h``, one rounding an operation. The weights have the other backends' bits
but for the last one in AdaBayes-FP on CPUs, where ``torch.sqrt`` is not correctly rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..scalars import wide
from .launch import Launch

Tensors = list[Tensor] | tuple[Tensor, ...]
Scalars = Sequence[Any]  # numbers, or 0-dim tensors on the device

BLOCK_NUMEL = 1 << 22  # so many elements, or one tensor, have temporaries at a time


def unavailable(device: torch.device) -> str | None:
    return None


def adabayes(
    c: Scalars,
    grad: Tensors,
    param: Tensors,
    exp_avg: Tensors,
    prior_var: Tensors,
    exp_avg_sq: Tensors | None = None,
    post_var: Tensors | None = None,
) -> None:
    grad_scale, one_minus_beta1, one_minus_beta2, keep, step_size, fisher, forget, drift = c
    g = torch._foreach_mul(grad, grad_scale)
    g_sq = torch._foreach_mul(g, g)
    _lerp(exp_avg, g, one_minus_beta1)  # Eq. 2
    if exp_avg_sq is not None:
        _lerp(exp_avg_sq, g_sq, one_minus_beta2)  # Eq. 4
    denom = torch._foreach_mul(prior_var, fisher)
    torch._foreach_mul_(denom, g_sq)
    torch._foreach_add_(denom, 1.0)
    post = torch._foreach_div(prior_var, denom)  # Eq. 17a
    forgotten = torch._foreach_mul(post, forget)
    torch._foreach_neg_(forgotten)
    torch._foreach_add_(forgotten, drift)
    torch._foreach_copy_(prior_var, torch._foreach_add(post, forgotten))  # Eq. 16b
    move = torch._foreach_mul(exp_avg, step_size)
    torch._foreach_mul_(move, post)
    torch._foreach_mul_(param, keep)
    torch._foreach_sub_(param, move)  # Eq. 18
    if post_var is not None:
        torch._foreach_copy_(post_var, post)


def adabayes_fp(
    c: Scalars, grad: Tensors, param: Tensors, exp_avg: Tensors, exp_avg_sq: Tensors, post_var: Tensors | None = None
) -> None:
    grad_scale, one_minus_beta1, one_minus_beta2, keep, step_size, a, debias2, eps = c
    g = torch._foreach_mul(grad, grad_scale)
    g_sq = torch._foreach_mul(g, g)
    _lerp(exp_avg, g, one_minus_beta1)  # Eq. 2
    _lerp(exp_avg_sq, g_sq, one_minus_beta2)  # Eq. 4
    denom = torch._foreach_mul(exp_avg_sq, debias2)
    torch._foreach_add_(denom, a * a)
    torch._foreach_sqrt_(denom)
    torch._foreach_add_(denom, a)
    torch._foreach_add_(denom, eps)  # Eq. 20
    move = torch._foreach_mul(exp_avg, step_size)
    torch._foreach_div_(move, denom)
    torch._foreach_mul_(param, keep)
    torch._foreach_sub_(param, move)  # Eq. 18
    if post_var is not None:
        torch._foreach_zero_(post_var)
        torch._foreach_add_(post_var, a + a)
        torch._foreach_div_(post_var, denom)


RULES: dict[str, Callable[..., None]] = {"AdaBayes": adabayes, "AdaBayesFP": adabayes_fp}


def _lerp(average: Tensors, value: Tensors, weight: Any) -> None:
    difference = torch._foreach_sub(value, average)
    torch._foreach_mul_(difference, weight)
    torch._foreach_add_(average, difference)


def sum_of_squares(launch: Launch) -> Tensor:
    dtype = wide(launch.device)
    grads = [tensors[1] for tensors in launch.tensors if tensors[1].numel()]
    if not grads:
        return torch.zeros((), dtype=dtype, device=launch.device)
    return torch.stack(torch._foreach_norm(grads, dtype=dtype)).square().sum()


def prepare(launch: Launch) -> Callable[[], None]:
    rule = RULES[launch.algorithm.name]
    state_dtype = torch.promote_types(launch.param_dtype, torch.float32)

    def run() -> None:
        if launch.found_inf is not None and launch.found_inf.item():  # the one backend that waits for the device
            return
        for k, tensors in _blocks(launch):
            param, grad, *slots = (list(column) for column in zip(*tensors, strict=True))
            wide = [p.to(state_dtype) for p in param]
            rule(_coefficients(launch.known_coefficients()[k], state_dtype), [g.to(state_dtype) for g in grad], wide, *slots)
            if launch.param_dtype != state_dtype:
                torch._foreach_copy_(param, wide)

    return run


def _coefficients(row: Tensor, dtype: torch.dtype) -> Scalars:
    """A row of coefficients, rounded once to the type the rule computes in: numbers, or 0-dim tensors on a device."""
    row = row.to(dtype)
    return row.tolist() if row.device.type == "cpu" else list(row.unbind())


def _blocks(launch: Launch) -> Iterator[tuple[int, list[list[Tensor]]]]:
    """Runs of tensors with one row of coefficients and at most BLOCK_NUMEL elements, or one tensor."""
    block: list[list[Tensor]] = []
    block_k = numel = 0
    for k, tensors in sorted(zip(launch.which, launch.tensors, strict=True), key=lambda item: item[0]):
        size = tensors[0].numel()
        if block and (k != block_k or numel + size > BLOCK_NUMEL):
            yield block_k, block
            block, numel = [], 0
        if size:
            block.append(tensors)
            block_k, numel = k, numel + size
    if block:
        yield block_k, block
