"""Plain PyTorch, for every other device, and for tensors that have no memory of their own. Holds the rules once more, on flat
tensors: the same names in the same order as ``csrc/rule.h``, one rounding an operation. The weights have the other backends'
bits but for the last one in AdaBayes-FP on CPUs, where ``torch.sqrt`` is not correctly rounded.

It works in blocks: many small tensors end to end, or a part of a large one. A block's temporaries fit a CPU's cache, and nothing
here reads a value that only a device knows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..scalars import wide
from .in_turn import Copies, in_turn
from .launch import Launch

Scalars = Sequence[Any]  # numbers, or 0-dim tensors on the device
Values = tuple[Tensor, ...]

BLOCK = {"cpu": 1 << 15}  # elements that have temporaries at a time
BLOCK_ELSEWHERE = 1 << 22


def unavailable(device: torch.device) -> str | None:
    return None


def lerp(average: Tensor, value: Tensor, weight: Any) -> Tensor:
    """``average`` moved towards ``value``: by a weight of 1 - beta from the average, or of -beta, maybe -0, from the value."""
    if isinstance(weight, Tensor):
        start = torch.where(torch.signbit(weight), value, average)
    else:
        start = value if math.copysign(1.0, weight) < 0.0 else average
    return (value - average).mul_(weight).add_(start)


def adabayes(
    c: Scalars,
    grad: Tensor,
    param: Tensor,
    exp_avg: Tensor,
    prior_var: Tensor,
    exp_avg_sq: Tensor | None = None,
    post_var: Tensor | None = None,
) -> Values:
    grad_scale, weight1, weight2, keep, step_size, fisher, forget, drift = c
    g = grad * grad_scale
    g_sq = g * g
    exp_avg = lerp(exp_avg, g, weight1)  # Eq. 2
    kept = () if exp_avg_sq is None else (lerp(exp_avg_sq, g_sq, weight2),)  # Eq. 4
    post = prior_var / (prior_var * fisher).mul_(g_sq).add_(1.0)  # Eq. 17a
    prior_var = (post * forget).neg_().add_(drift).add_(post)  # Eq. 16b
    param = (param * keep).sub_((exp_avg * step_size).mul_(post))  # Eq. 18
    return param, exp_avg, prior_var, *kept, post


def adabayes_fp(
    c: Scalars, grad: Tensor, param: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, post_var: Tensor | None = None
) -> Values:
    grad_scale, weight1, weight2, keep, step_size, a, debias2, eps = c
    g = grad * grad_scale
    exp_avg = lerp(exp_avg, g, weight1)  # Eq. 2
    exp_avg_sq = lerp(exp_avg_sq, g.mul_(g), weight2)  # Eq. 4
    denom = (exp_avg_sq * debias2).add_(a * a).sqrt_().add_(a).add_(eps)  # Eq. 20
    param = (param * keep).sub_((exp_avg * step_size).div_(denom))  # Eq. 18
    kept = () if post_var is None else (torch.full_like(denom, 1.0).mul_(a + a).div_(denom),)
    return param, exp_avg, exp_avg_sq, *kept


RULES: dict[str, Callable[..., Values]] = {"AdaBayes": adabayes, "AdaBayesFP": adabayes_fp}


def sum_of_squares(launch: Launch) -> Tensor:
    dtype = wide(launch.device)
    grads = [tensors[1] for tensors in launch.tensors if tensors[1].numel()]
    if not grads:
        return torch.zeros((), dtype=dtype, device=launch.device)
    return torch.stack(torch._foreach_norm(grads, dtype=dtype)).square().sum()


def prepare(launches: list[Launch], copies: Copies) -> Callable[[], None]:
    return in_turn(launches, [_prepare(launch) for launch in launches], copies)


def _prepare(launch: Launch) -> Callable[[], None]:
    rule = RULES[launch.algorithm.name]
    state_dtype = torch.promote_types(launch.param_dtype, torch.float32)
    skip = None if launch.found_inf is None else launch.found_inf != 0

    rows = launch.coefficient_rows().to(state_dtype)  # rounded once, to the type the rule computes in
    known = not isinstance(launch.keys[0][1], Tensor)
    coefficients: list[Scalars] = rows.tolist() if known else [row.unbind() for row in rows.unbind()]

    def run() -> None:
        for k, block in _blocks(launch):
            columns = [list(column) for column in zip(*block, strict=True)]
            param, grad, *slots = (_flat(column).to(state_dtype) for column in columns)
            values = rule(coefficients[k], grad, param, *slots)
            if skip is not None:
                values = tuple(torch.where(skip, old, new) for old, new in zip((param, *slots), values, strict=False))
            del columns[1]  # the gradients stay
            split = (_unflatten(value, column) for value, column in zip(values, columns, strict=False))
            torch._foreach_copy_([t for column in columns for t in column], [t for column in split for t in column])

    return run


def _flat(column: list[Tensor]) -> Tensor:
    return column[0].reshape(-1) if len(column) == 1 else torch._C._nn.flatten_dense_tensors(column)


def _unflatten(value: Tensor, column: list[Tensor]) -> Sequence[Tensor]:
    return [value.view(column[0].shape)] if len(column) == 1 else torch._C._nn.unflatten_dense_tensors(value, column)


def _blocks(launch: Launch) -> Iterator[tuple[int, list[list[Tensor]]]]:
    """Tensors of one row of coefficients, whole ones up to a block's size together, or one part of a larger one."""
    most = BLOCK.get(launch.device.type, BLOCK_ELSEWHERE)
    block: list[list[Tensor]] = []
    block_k = numel = 0
    for k, tensors in sorted(zip(launch.which, launch.tensors, strict=True), key=lambda item: item[0]):
        size = tensors[0].numel()
        if block and (k != block_k or numel + size > most):
            yield block_k, block
            block, numel = [], 0
        if size > most:
            lines = [t.as_strided((size,), (1,)) for t in tensors]  # all are dense and laid out alike
            yield from ((k, [[line[i : i + most] for line in lines]]) for i in range(0, size, most))
        elif size:
            block.append(tensors)
            block_k, numel = k, numel + size
    if block:
        yield block_k, block
