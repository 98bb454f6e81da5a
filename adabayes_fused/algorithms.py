"""The algorithms: what each keeps per weight, and the numbers of one step, in float64.

The elementwise half of an algorithm, its rule, stands once per language: ``csrc/rule.h``, ``triton_kernels/rules.py``,
``backends/foreach.py``. The scalar half stands here, once for all of them: ``coefficients`` turns a parameter group and
a step count into the eight numbers a rule takes, in the rule's order.

Units: ``g = p.grad`` is the gradient of the mean loss, the paper's gradient is ``B * g`` with B the batch size. The paper's
sigma^2 is ``lr * r / B`` with ``r = sgd_lr / lr``, and variances are kept in units of it (``transition`` and
``variance_follows_lr`` below), so that nothing divides by the learning rate.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

Group = Mapping[str, Any]


class Algorithm(NamedTuple):
    """One row of the registry. ``number`` is C++'s; the first ``lean`` slots suffice for the recursion,
    the rule reads the first ``reads`` and writes all; ``initial`` is each slot's value before the first step."""

    name: str
    number: int
    slots: tuple[str, ...]
    lean: int
    reads: int
    initial: tuple[float, ...]
    coefficients: Callable[..., tuple[Any, ...]]  # (group, step, grad_factor=1.0)

    def stored(self, lean: bool) -> tuple[str, ...]:
        return self.slots[: self.lean] if lean else self.slots


def _expm1(x: Any) -> Any:
    return torch.expm1(x) if isinstance(x, torch.Tensor) else math.expm1(x)


def _common(group: Group, step: Any, grad_factor: Any) -> tuple[Any, ...]:
    """What both rules begin with: the gradient's factor, 1 - beta1, 1 - beta2, and the weight's factor (1 - lambda)."""
    beta1, beta2 = group["betas"]
    sign = -1.0 if group["maximize"] else 1.0
    return sign * grad_factor, 1.0 - beta1, 1.0 - beta2, 1.0 - group["lr"] * group["weight_decay"]


def variance_units(group: Group) -> tuple[Any, Any]:
    """(unit, prior): a stored variance of 1 is ``unit`` in the paper's units, and sigma^2, Eq. 22 under the schedule, is
    ``prior`` in units of it. Floats or 0-dim tensors, as the group's are."""
    sigma_sq = group["lr"] * group["r"] / group["batch_size"]
    if group.get("variance_follows_lr", True):
        return sigma_sq, 1.0
    return group["first_prior"], sigma_sq / group["first_prior"]  # the literal s, in units of the first sigma^2


def adabayes_coefficients(group: Group, step: Any, grad_factor: Any = 1.0) -> tuple[Any, ...]:
    """Algorithm 1's numbers at step count ``step`` (1 at the first), gradients being multiplied by ``grad_factor`` first.

    Works on floats and, for capturable steps, on 0-dim or 1-dim float64 tensors alike.
    """
    lr, r, batch_size = group["lr"], group["r"], group["batch_size"]
    unit, drift_unit = variance_units(group)
    unit = unit * (lr != 0)  # lr = 0 freezes the literal variance too
    kappa = lr * batch_size / r  # eta^2 / sigma^2
    if group["transition"] == "paper":  # (1 - kappa/2)^2 s + eta^2, Eq. 16b
        drift, forget = kappa, kappa * (1.0 - kappa / 4.0)
    else:  # the Ornstein-Uhlenbeck process it linearises
        drift = forget = -_expm1(-kappa)
    step_size = unit * batch_size / (1.0 - group["betas"][0] ** step)
    fisher = unit * batch_size * batch_size  # times g^2: the squared gradient of the summed loss in units of 1/unit
    return *_common(group, step, grad_factor), step_size, fisher, forget, drift * drift_unit


def adabayes_fp_coefficients(group: Group, step: Any, grad_factor: Any = 1.0) -> tuple[Any, ...]:
    """Algorithm 2's numbers; arguments as in :func:`adabayes_coefficients`. The batch size cancels."""
    beta1, beta2 = group["betas"]
    step_size = group["lr"] / (1.0 - beta1**step)
    return *_common(group, step, grad_factor), step_size, 0.5 / group["r"], 1.0 / (1.0 - beta2**step), group["eps"]


ADABAYES = Algorithm(
    name="AdaBayes",
    number=0,
    slots=("exp_avg", "prior_var", "exp_avg_sq", "post_var"),
    lean=2,
    reads=3,
    initial=(0.0, 1.0, 0.0, 1.0),
    coefficients=adabayes_coefficients,
)
ADABAYES_FP = Algorithm(
    name="AdaBayesFP",
    number=1,
    slots=("exp_avg", "exp_avg_sq", "post_var"),
    lean=2,
    reads=2,
    initial=(0.0, 0.0, 1.0),
    coefficients=adabayes_fp_coefficients,
)
ALGORITHMS = (ADABAYES, ADABAYES_FP)


# --- What a group may say ---------------------------------------------------------------------------------------------


def _number(value: Any, name: str = "hyper-parameter") -> float | None:
    """``value`` as a float; None for a tensor on an accelerator, which cannot be read without waiting for it."""
    if type(value) is float:  # nearly always, at each step
        return value
    if isinstance(value, torch.Tensor):
        if value.numel() != 1:
            raise ValueError(f"Tensor {name} must be 1-element, given shape {tuple(value.shape)}")
        if value.is_complex():
            raise TypeError(f"{name} must be real, given {value!r}")
        return float(value) if value.device.type == "cpu" else None
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number or a one-element tensor, given {value!r}")
    return float(value)


def _within(value: Any, name: str, low: float, high: float, what: str, allowed: str) -> None:
    """``value`` in [low, high); a NaN is in no range."""
    number = _number(value, name)
    if number is not None and not low <= number < high:
        raise ValueError(f"Invalid {what}: {value} (allowed: {allowed})")


def check_batch_size(batch_size: Any) -> None:
    """Raises ValueError or TypeError for what is not a number >= 1."""
    allowed = "a number >= 1: the examples the mean loss of one step averages over"
    _within(batch_size, "batch_size", 1.0, math.inf, "batch_size", allowed)


def check_group(algorithm: Algorithm, group: Group) -> None:
    """Raises ValueError or TypeError for a hyper-parameter out of its range; wording begins as torch.optim's."""
    inf = math.inf
    _within(group["lr"], "lr", 0.0, inf, "learning rate", "a finite number >= 0")
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"Invalid betas: {betas!r} (allowed: two numbers, each 0 <= beta < 1)")
    for i, beta in enumerate(betas):
        _within(beta, f"betas[{i}]", 0.0, 1.0, f"beta parameter at index {i}", "0 <= beta < 1")
    allowed = "a finite number >= 0; lambda is lr * weight_decay"
    _within(group["weight_decay"], "weight_decay", 0.0, inf, "weight_decay value", allowed)
    for flag in ("maximize", "capturable"):
        if not isinstance(group[flag], (bool, int)):
            raise TypeError(f"Invalid {flag} value: {group[flag]!r} (allowed: True or False)")
    batch_size = group["batch_size"]
    if batch_size is not None:
        check_batch_size(batch_size)
    if algorithm is ADABAYES_FP:
        _within(group["eps"], "eps", 0.0, inf, "epsilon value", "a finite number >= 0")
        return
    if batch_size is None:
        raise ValueError(
            "AdaBayes needs batch_size: the number of examples the mean loss of one step averages over "
            "(micro-batch x accumulation x processes); given None"
        )
    if group["transition"] not in ("paper", "exact"):
        raise ValueError(f"Invalid transition: {group['transition']!r} (allowed: 'paper', 'exact')")
    if not isinstance(group["variance_follows_lr"], (bool, int)):
        raise TypeError(f"Invalid variance_follows_lr value: {group['variance_follows_lr']!r} (allowed: True or False)")


def check_step(algorithm: Algorithm, group: Group) -> None:
    """What has to hold at each step: the ranges, and a transition that is stable at this learning rate."""
    check_group(algorithm, group)
    if algorithm is not ADABAYES or group["transition"] != "paper":
        return
    lr, r, batch_size = _number(group["lr"], "lr"), _number(group["r"], "r"), _number(group["batch_size"], "batch_size")
    if lr is not None and r is not None and batch_size is not None and lr * batch_size > r:
        raise ValueError(
            f"kappa = lr * batch_size / r = {lr:g} * {batch_size:g} / {r:g} = {lr * batch_size / r:g} is above 1: "
            'transition="paper" linearises a decay of exp(-kappa) and means nothing there. '
            'Use transition="exact", a smaller lr or batch_size, or a larger sgd_lr.'
        )


def complete_group(algorithm: Algorithm, group: dict[str, Any]) -> None:
    """Adds what is derived once, when a group is added: ``r`` and, for AdaBayes, ``first_prior``, the first sigma^2."""
    check_group(algorithm, group)
    lr, sgd_lr = _number_of(group, "lr"), _number_of(group, "sgd_lr")
    infinite = algorithm is ADABAYES_FP
    allowed = "a number > 0; inf is AdamW" if infinite else "a finite number > 0; AdaBayesFP takes inf too"
    if not (0.0 < sgd_lr < math.inf or infinite and sgd_lr == math.inf):
        raise ValueError(f"Invalid sgd_lr: {group['sgd_lr']} (allowed: {allowed})")
    if group.get("r") is None:
        if lr == 0.0 and sgd_lr != math.inf:
            raise ValueError(
                "Invalid learning rate: 0 at the time a parameter group is added, where r = sgd_lr / lr is fixed. "
                "Give the group its full lr and let a scheduler start from 0, or give the group r itself."
            )
        group["r"] = math.inf if sgd_lr == math.inf else sgd_lr / lr
    r = _number_of(group, "r")
    if not (0.0 < r < math.inf or infinite and r == math.inf):
        raise ValueError(f"Invalid r: {group['r']} (allowed: sgd_lr / lr, {allowed})")
    if algorithm is ADABAYES:
        group.setdefault("first_prior", (lr * r or sgd_lr) / _number_of(group, "batch_size"))
        check_step(algorithm, group)


def _number_of(group: Group, name: str) -> float:
    """An option as a float, waiting for an accelerator if it must: for what happens once."""
    number = _number(group[name], name)
    return float(group[name]) if number is None else number
