"""Plain PyTorch, for every other device, and for tensors that have no memory of their own. Holds the rules once more, on flat
tensors: the same names in the same order as ``csrc/rule.h``, one rounding an operation. The weights have the other backends'
bits but for the last one in AdaBayes-FP on CPUs, where ``torch.sqrt`` is not correctly rounded.

It works in blocks: many small tensors end to end, or a part of a large one. A block's temporaries fit a CPU's cache, and nothing
here reads a value that only a device knows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import codes
from ..algorithms import corrected
from ..scalars import wide
from .launch import Copies, Launch, in_turn

Scalars = Sequence[Any]  # numbers, or 0-dim tensors on the device
Tensors = Sequence[Tensor]

BLOCK = {"cpu": 1 << 19}  # elements that have temporaries at a time
BLOCK_ELSEWHERE = 1 << 22


def unavailable(device: torch.device) -> str | None:
    return None


def lerp_(average: Tensor, value: Tensor, weight: Any, scratch: Tensor) -> None:
    """Moves ``average`` towards ``value``: by a weight of 1 - beta from itself, or of -beta, maybe -0, from the value."""
    move = torch.sub(value, average, out=scratch).mul_(weight)
    if isinstance(weight, Tensor):
        torch.where(torch.signbit(weight), value, average, out=average)
    elif math.copysign(1.0, weight) < 0.0:
        average.copy_(value)
    average.add_(move)


def times(value: Tensor, factor: Any, out: Tensor) -> Tensor:
    """The product, which is the value itself where the factor is known to be 1."""
    return value if isinstance(factor, float) and factor == 1.0 else torch.mul(value, factor, out=out)


def scalar(number: Any, beside: Tensor) -> Tensor:
    """The first operand of a difference or quotient, which torch takes as a tensor."""
    return number if isinstance(number, Tensor) else torch.full((), number, dtype=beside.dtype, device=beside.device)


def adabayes(
    c: Scalars,
    scratch: Tensors,
    grad: Tensor,
    param: Tensor,
    exp_avg: Tensor,
    prior_var: Tensor,
    exp_avg_sq: Tensor | None = None,
    post_var: Tensor | None = None,
) -> None:
    grad_scale, weight1, weight2, keep, step_size, fisher, forget, drift = c
    g, move, post = scratch[0], scratch[1], scratch[2] if post_var is None else post_var
    scaled = times(grad, grad_scale, g)
    lerp_(exp_avg, scaled, weight1, move)  # Eq. 2
    g_sq = torch.mul(scaled, scaled, out=g)
    if exp_avg_sq is not None:
        lerp_(exp_avg_sq, g_sq, weight2, move)  # Eq. 4
    denom = torch.mul(prior_var, fisher, out=move).mul_(g_sq).add_(1.0)
    torch.div(prior_var, denom, out=post)  # Eq. 17a
    forgotten = torch.mul(post, forget, out=prior_var)
    torch.sub(scalar(drift, post), forgotten, out=prior_var).add_(post)  # Eq. 16b
    torch.mul(exp_avg, step_size, out=move).mul_(post)
    times(param, keep, param).sub_(move)  # Eq. 18


def adabayes_fp(
    c: Scalars,
    scratch: Tensors,
    grad: Tensor,
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    post_var: Tensor | None = None,
) -> None:
    grad_scale, weight1, weight2, keep, step_size, a, debias2, eps = c
    g, move = scratch[:2]
    scaled = times(grad, grad_scale, g)
    lerp_(exp_avg, scaled, weight1, move)  # Eq. 2
    lerp_(exp_avg_sq, torch.mul(scaled, scaled, out=g), weight2, move)  # Eq. 4
    denom = torch.mul(exp_avg_sq, debias2, out=g).add_(a * a).sqrt_().add_(a).add_(eps)  # Eq. 20
    torch.mul(exp_avg, step_size, out=move).div_(denom)
    times(param, keep, param).sub_(move)  # Eq. 18
    if post_var is not None:
        torch.div(scalar(a + a, denom), denom, out=post_var)


RULES: dict[str, Callable[..., None]] = {"AdaBayes": adabayes, "AdaBayesFP": adabayes_fp}


def sum_of_squares(launch: Launch) -> Tensor:
    dtype = wide(launch.device)
    grads = [tensors[1] for tensors in launch.tensors if tensors[1].numel()]
    if not grads:
        return torch.zeros(1, dtype=dtype, device=launch.device)
    return torch.stack(torch._foreach_norm(grads, dtype=dtype)).square()


def _coefficients(launch: Launch, state_dtype: torch.dtype) -> tuple[list[Scalars], list[int]]:
    """Sets of eight, rounded once to the type the rule computes in, and which of them each tensor takes: one for each group and
    step count where the host knows that, else one for each tensor."""
    if launch.known_steps:
        steps = torch.stack(launch.steps).tolist()
        sets: dict[tuple[int, float], int] = {}
        which = [sets.setdefault((g, step), len(sets)) for g, step in zip(launch.group_of, steps, strict=True)]
        rows = [corrected(launch.numbers[g], int(step) + 1) for g, step in sets]
        for row in rows:
            row[0] *= launch.factor
        return torch.tensor(rows, dtype=torch.float64, device="cpu").to(state_dtype).tolist(), which
    dtype = wide(launch.device)
    each = torch.empty(len(launch), 8, dtype=dtype, device=launch.device)
    counts = torch.stack(launch.steps).to(dtype) + 1
    for g in dict.fromkeys(launch.group_of):  # whose tensors come one after the other
        start, members = launch.group_of.index(g), launch.group_of.count(g)
        for i, value in enumerate(corrected(launch.numbers[g], counts[start : start + members])):
            each[start : start + members, i] = value * launch.factor if i == 0 else value
    return [row.unbind() for row in each.to(state_dtype).unbind()], list(range(len(launch)))


def prepare(launches: list[Launch], copies: Copies) -> Callable[[], None]:
    return in_turn([_prepare(launch) for launch in launches], copies)


class _Part(NamedTuple):
    """Elements of one tensor of a launch that are in a block."""

    tensor: int  # which of the launch's
    begin: int
    numel: int


def _prepare(launch: Launch) -> Callable[[], None]:
    rule, layout = RULES[launch.algorithm.name], launch.layout
    state_dtype = torch.promote_types(launch.param_dtype, torch.float32)
    coefficients, which = _coefficients(launch, state_dtype)
    blocks = list(_blocks(launch, which))
    largest = max((sum(part.numel for part in parts) for _, _, parts in blocks), default=0)
    scratch = [torch.empty(largest, dtype=state_dtype, device=launch.device) for _ in range(3)]

    def run() -> None:
        factor = skip = None
        if launch.decision is not None:
            factor, skip = launch.decision[0], launch.decision[2] != 0
        for k, block, parts in blocks:
            columns = [list(column) for column in zip(*block, strict=True)]
            flat = [_flat(column) for column in columns]
            unit, at = _codes(launch, parts)
            stored, low = flat[2 : 2 + len(layout.slots)], flat[2 + len(layout.slots) :]
            slots = codes.decoded(stored, unit)
            param = codes.decoded_weights(flat[0], low[0] if low else None) if layout.weight else flat[0].to(state_dtype)
            grad = flat[1].to(state_dtype)
            values, written = [param, *slots], [columns[0], *columns[2:]]
            apart = len(block) > 1 or param is not flat[0] or layout.coded  # copies, which are written back
            before = None if skip is None else [t.clone() for t in values]
            c = coefficients[k] if factor is None else [(coefficients[k][0] * factor).to(state_dtype), *coefficients[k][1:]]
            rule(c, [t[: param.numel()] for t in scratch], grad, param, *slots)
            if skip is not None and before is not None:
                for value, old in zip(values, before, strict=True):
                    torch.where(skip, old, value, out=value)
            if layout.coded:
                weights = codes.encoded_weights(layout.weight, param, at) if layout.weight else [param]
                values = [weights[0], *codes.encoded(layout.dtypes, slots, unit, at), *weights[1:]]
            if apart:
                sizes = [part.numel for part in parts]
                pieces = [t for value in values for t in torch.split_with_sizes(value, sizes)]
                torch._foreach_copy_([t for column in written for t in column], pieces)
        # In a list, or torch would take the overload for numbers, and wait for this one's value.
        taken = torch.ones((), dtype=torch.float32, device=launch.steps[0].device) if skip is None else (~skip).float()
        torch._foreach_add_(launch.steps, [taken] * len(launch))

    return run


def _codes(launch: Launch, parts: list[_Part]) -> tuple[Any, Any]:
    """What codes take of each element: the exponent of its unit, and its key plus its place."""
    if not launch.layout.random:
        return None, None
    units, ats = [], []
    for tensor, begin, numel in parts:
        step, seed = launch.numbers_of[tensor]
        ats.append(codes.places(begin, numel, launch.places[tensor], seed.device).add_(codes.key(seed, step)))
        units.append(codes.unit_of(seed).expand(numel))
    return torch.cat(units), torch.cat(ats)


def _flat(column: list[Tensor]) -> Tensor:
    """The tensors end to end: a copy, but for one alone."""
    return column[0] if len(column) == 1 else torch.cat(column)


def _blocks(launch: Launch, which: list[int]) -> Iterator[tuple[int, list[list[Tensor]], list[_Part]]]:
    """Tensors of one row of coefficients, whole ones up to a block's size together, or one part of a larger one."""
    most = BLOCK.get(launch.device.type, BLOCK_ELSEWHERE)
    block: list[list[Tensor]] = []
    parts: list[_Part] = []
    block_k = numel = 0
    for t in sorted(range(len(which)), key=which.__getitem__):
        k, tensors = which[t], launch.tensors[t]
        size = tensors[0].numel()
        if block and (k != block_k or numel + size > most):
            yield block_k, block, parts
            block, parts, numel = [], [], 0
        if 2 * size > most:  # worth no copy
            line = _line(tensors)
            for i in range(0, size, most):
                yield k, [[values[i : i + most] for values in line]], [_Part(t, i, min(most, size - i))]
        elif size:
            block.append(_line(tensors))
            parts.append(_Part(t, 0, size))
            block_k, numel = k, numel + size
    if block:
        yield block_k, block, parts


def _line(tensors: list[Tensor]) -> list[Tensor]:
    """One parameter's tensors in the order of their memory, which is the same for all of them."""
    if tensors[0].dim() == 1:
        return tensors
    return [t.view(-1) if t.is_contiguous() else t.as_strided((t.numel(),), (1,)) for t in tensors]
