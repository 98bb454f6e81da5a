"""Where an optimizer stands between SGD and Adam, and how far its variances are from Eq. 20."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .algorithms import ADABAYES_FP
from .optimizer import _FusedOptimizer
from .posterior import Reading, check_optimizer
from .sharding import groups_of, spec_of, summed

EVEN = 2.0 / (1.0 + math.sqrt(5.0))  # sigma^2_post / sigma^2 at Eq. 20 where eta / sqrt(<g^2>) = sigma^2


class Diagnosis(NamedTuple):
    """One parameter, or all of them. Shares are of the weights that have taken a step, None where none has.

    ``distance`` is the mean of abs(ln(sigma^2_post / Eq. 20)), 0 at the fixed point; None where <g^2> is not kept.
    """

    name: str
    numel: int
    sgd_like: float | None
    adam_like: float | None
    distance: float | None


class Diagnostics(NamedTuple):
    """A ``Diagnosis`` for each parameter, in the groups' order, and one over all their weights. ``print`` shows a table."""

    parameters: tuple[Diagnosis, ...]
    overall: Diagnosis

    def __str__(self) -> str:
        rows = [("parameter", "numel", "SGD-like", "Adam-like", "distance")]
        for d in (*self.parameters, self.overall):
            rows.append((d.name, f"{d.numel:,}", _percent(d.sgd_like), _percent(d.adam_like), _figure(d.distance)))
        name, *others = (max(map(len, column)) for column in zip(*rows, strict=True))
        return "\n".join(
            "  ".join([row[0].ljust(name), *(cell.rjust(width) for cell, width in zip(row[1:], others, strict=True))])
            for row in rows
        )


def diagnostics(optimizer: _FusedOptimizer) -> Diagnostics:
    """The regime each weight is in, and how far its variance is from the fixed point.

    A weight is SGD-like where SGD's limit of Eq. 20 is below Adam's, sigma^2 < eta / sqrt(<g^2>) (they
    cross in the paper's Figure 3), Adam-like elsewhere; one that is not a number is neither. ``AdaBayes(lean=True)`` keeps
    no <g^2>: there a weight is SGD-like where sigma^2_post is above what Eq. 20 gives at the border, 2 sigma^2 / (1 + sqrt(5)),
    which is the same once the variance has settled.

    ``AdaBayesFP`` is at the fixed point by construction: its distance is 0. An ``exp_avg_sq`` that began at 0 as a lean state
    was loaded is read as it is, too small. The function waits for an accelerator once. Of DTensors the weights of all
    processes count: call it in each of them, and each gets the same.

    Args:
        optimizer: an ``AdaBayes`` or ``AdaBayesFP``, which is left as it is.

    Returns:
        Shares in [0, 1] and distances under the groups' present ``lr``, ``r`` and ``batch_size``. Parameters that have taken no
            step are listed and not counted. The parts of a complex weight count one by one.

    Raises:
        TypeError: the optimizer is another one.

    Examples:
        >>> import torch, adabayes_fused
        >>> weight = torch.nn.Parameter(torch.ones(3))
        >>> optimizer = adabayes_fused.AdaBayes([weight], batch_size=64)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> adabayes_fused.diagnostics(optimizer).overall.numel
        3
    """
    check_optimizer(optimizer)
    found = [(name, p, _sums(Reading(optimizer, group, p))) for group, name, p in _named_parameters(optimizer)]
    counts = iter(_to_host(_over_processes([(p, sums) for _, p, sums in found if sums is not None])))
    rows = [(name, p.numel(), [0.0] * 4 if sums is None else next(counts)) for name, p, sums in found]
    total = [math.fsum(column) for column in zip(*(sums for _, _, sums in rows), strict=True)]
    measured = optimizer.algorithm is ADABAYES_FP or not optimizer.lean
    return Diagnostics(
        tuple(_diagnosis(name, numel, sums, measured) for name, numel, sums in rows),
        _diagnosis("all", sum(numel for _, numel, _ in rows), total, measured),
    )


def _named_parameters(optimizer: _FusedOptimizer) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    for g, group in enumerate(optimizer.param_groups):
        names = group.get("param_names", ())
        for i, p in enumerate(group["params"]):
            yield group, names[i] if len(names) == len(group["params"]) else f"group {g}, parameter {i}", p


def _sums(reading: Reading) -> Tensor | None:
    """(4,): how many weights here have taken a step, are SGD-like, are Adam-like; their distances' sum. None without state."""
    if not reading.state:
        # Where other processes have parts too, each takes its place in the sum over them.
        return torch.zeros(4, dtype=reading.dtype, device=reading.device) if groups_of(spec_of(reading.param)) else None
    sgd_like, adam_like = (regime.sum(dtype=reading.dtype) for regime in _regimes(reading))
    sums = [sgd_like.new_full((), reading.values), sgd_like, adam_like, _distance(reading)]
    return torch.stack(sums).mul_(reading.step > 0)


def _regimes(reading: Reading) -> tuple[Tensor, Tensor]:
    """Which weights are SGD-like, and which Adam-like."""
    if not reading.keeps("exp_avg_sq"):
        return reading.relative() > EVEN, reading.relative() <= EVEN
    a, mean_square, _ = reading.equation_20()
    return mean_square < 4.0 * a * a, mean_square >= 4.0 * a * a


def _distance(reading: Reading) -> Tensor:
    """The sum of abs(ln(sigma^2_post / Eq. 20)); 0 where it is so by construction, or not known."""
    if reading.algorithm is ADABAYES_FP or not reading.keeps("exp_avg_sq"):
        return torch.zeros((), dtype=reading.dtype, device=reading.device)
    a, _, denominator = reading.equation_20()
    return (reading.relative() * denominator).div_(2.0 * a).log_().abs_().sum()


def _over_processes(found: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """The sums of each of these parameters over all its parts, from those of the part that is here."""
    sums = [here for _, here in found]
    spread: dict[tuple[Any, ...], list[int]] = {}
    for i, (p, _) in enumerate(found):
        if groups := groups_of(spec_of(p)):
            spread.setdefault(groups, []).append(i)
    totals = {groups: torch.stack([sums[i] for i in members]) for groups, members in spread.items()}
    summed(totals)  # in place
    for groups, members in spread.items():
        for i, total in zip(members, totals[groups], strict=True):
            sums[i] = total
    return sums


def _to_host(sums: list[Tensor]) -> list[list[float]]:
    """All of them in one transfer, from an accelerator where one of them is there."""
    if not sums:
        return []
    there = next((s for s in sums if s.device.type != "cpu"), sums[0])
    rows: list[list[float]] = torch.stack([s.to(there) for s in sums]).tolist()
    return rows


def _diagnosis(name: str, numel: int, sums: list[float], measured: bool) -> Diagnosis:
    counted, sgd_like, adam_like, distance = sums
    if not counted:
        return Diagnosis(name, numel, None, None, None)
    return Diagnosis(name, numel, sgd_like / counted, adam_like / counted, distance / counted if measured else None)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
