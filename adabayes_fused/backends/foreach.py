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

BLOCK = {"cpu": 1 << 18}  # elements that have temporaries at a time
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
    torch.mul(grad, grad_scale, out=g)
    lerp_(exp_avg, g, weight1, move)  # Eq. 2
    g_sq = g.mul_(g)
    if exp_avg_sq is not None:
        lerp_(exp_avg_sq, g_sq, weight2, move)  # Eq. 4
    denom = torch.mul(prior_var, fisher, out=move).mul_(g_sq).add_(1.0)
    torch.div(prior_var, denom, out=post)  # Eq. 17a
    torch.mul(post, forget, out=prior_var).neg_().add_(drift).add_(post)  # Eq. 16b
    torch.mul(exp_avg, step_size, out=move).mul_(post)
    param.mul_(keep).sub_(move)  # Eq. 18


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
    torch.mul(grad, grad_scale, out=g)
    lerp_(exp_avg, g, weight1, move)  # Eq. 2
    lerp_(exp_avg_sq, g.mul_(g), weight2, move)  # Eq. 4
    denom = torch.mul(exp_avg_sq, debias2, out=g).add_(a * a).sqrt_().add_(a).add_(eps)  # Eq. 20
    torch.mul(exp_avg, step_size, out=move).div_(denom)
    param.mul_(keep).sub_(move)  # Eq. 18
    if post_var is not None:
        post_var.fill_(1.0).mul_(a + a).div_(denom)


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
                split = (_unflatten(value, column) for value, column in zip(values, written, strict=True))
                torch._foreach_copy_([t for column in written for t in column], [t for column in split for t in column])
        # With a tensor and no alpha torch would take the overload for numbers, and wait for this one's value.
        taken = 1 if skip is None else (~skip).float()
        torch._foreach_add_(launch.steps, taken, **({} if skip is None else dict(alpha=1)))

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
    return column[0] if len(column) == 1 else torch._C._nn.flatten_dense_tensors(column)


def _unflatten(value: Tensor, column: list[Tensor]) -> Tensors:
    return [value] if len(column) == 1 else torch._C._nn.unflatten_dense_tensors(value, column)


def _blocks(launch: Launch, which: list[int]) -> Iterator[tuple[int, list[list[Tensor]], list[_Part]]]:
    """Tensors of one row of coefficients, whole ones up to a block's size together, or one part of a larger one."""
    most, random = BLOCK.get(launch.device.type, BLOCK_ELSEWHERE), launch.layout.random
    block: list[list[Tensor]] = []
    parts: list[_Part] = []
    block_k = numel = 0
    for t in sorted(range(len(which)), key=which.__getitem__):
        k, tensors = which[t], launch.tensors[t]
        size = tensors[0].numel()
        if block and (k != block_k or numel + size > most):
            yield block_k, _lines(block, random), parts
            block, parts, numel = [], [], 0
        if 2 * size > most:  # worth no copy
            (lines,) = _lines([tensors], random)
            for i in range(0, size, most):
                yield k, [[line[i : i + most] for line in lines]], [_Part(t, i, min(most, size - i))]
        elif size:
            block.append(tensors)
            parts.append(_Part(t, 0, size))
            block_k, numel = k, numel + size
    if block:
        yield block_k, _lines(block, random), parts


def _lines(block: list[list[Tensor]], random: bool) -> list[list[Tensor]]:
    """Each parameter's tensors in the order of their memory, which is the same for all of them; of several, only where random
    numbers count elements in that order."""
    if len(block) > 1 and not random:
        return block
    return [[t.view(-1) if t.is_contiguous() else t.as_strided((t.numel(),), (1,)) for t in tensors] for tensors in block]
