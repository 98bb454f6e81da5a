"""The algorithms: what each keeps per weight, and the numbers of one step, in float64.

The elementwise half of an algorithm, its rule, stands once per language: ``csrc/rule.h``, ``triton_kernels/rules.py``,
``backends/foreach.py``. The scalar half stands here, once for all of them: ``coefficients`` turns a parameter group into the
eight numbers a rule takes, in the rule's order. Averages begin at zero; some of the eight are therefore divided by
``1 - beta**step`` where the update runs, since on a GPU only the GPU knows the step count.

Units: ``g = p.grad`` is the gradient of the mean loss, the paper's gradient is ``B * g`` with B the batch size. The paper's
sigma^2 is ``lr * r / B`` with ``r = sgd_lr / lr``, and variances are kept in units of it (``transition`` and
``variance_follows_lr`` below), so that nothing divides by the learning rate.
"""

from __future__ import annotations

import math
import numbers
import os.path
from collections.abc import Callable, Iterable, Mapping, Sequence
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
    coefficients: Callable[[Group], tuple[Any, ...]]
    corrected: tuple[tuple[int, int], ...]  # (which coefficient, of which beta) are divided by 1 - beta**step

    def stored(self, lean: bool) -> tuple[str, ...]:
        return self.slots[: self.lean] if lean else self.slots

    def numbers(self, group: Group) -> tuple[Any, ...]:
        """The coefficients, then for each the decay of the average it is corrected for, 0.0 where it is for none: all that a
        step takes of a group. Works on floats and on 0-dim float64 tensors alike."""
        decays: list[Any] = [0.0] * 8
        for i, beta in self.corrected:
            decays[i] = group["betas"][beta]
        return *self.coefficients(group), *decays


def power(base: Any, exponent: Any) -> Any:
    """``base**exponent`` by repeated squaring: multiplications alone, which every language and device rounds alike. Exponents are
    whole numbers, or tensors of such in the type to compute in."""
    if isinstance(exponent, torch.Tensor):  # which is not waited for: all 25 bits that a step count may have
        places = torch.arange(25, device=exponent.device).view(-1, *[1] * exponent.dim())
        result: Any = torch.ones_like(exponent)
        for bit in (exponent.long() >> places) & 1 != 0:
            result, base = torch.where(bit, result * base, result), base * base
        return result
    result = 1.0
    while exponent > 0:
        result = result * base if exponent % 2 else result
        base, exponent = base * base, exponent // 2
    return result


def corrected(numbers: Sequence[Any], step: Any) -> list[Any]:
    """The coefficients at step count ``step`` (1 at the first; a whole number, or a tensor of such in the type to compute in),
    from ``Algorithm.numbers``."""
    exact = zip(numbers[:8], numbers[8:], strict=True)
    return [c if type(decay) is float and decay == 0.0 else quotient(c, 1.0 - power(decay, step)) for c, decay in exact]


def quotient(a: Any, b: Any) -> Any:
    """``a / b`` rounded once: of a number and a tensor, torch multiplies the rounded reciprocal."""
    return torch.full_like(b, a) / b if isinstance(b, torch.Tensor) and not isinstance(a, torch.Tensor) else a / b


def _expm1(x: Any) -> Any:
    return torch.expm1(x) if isinstance(x, torch.Tensor) else math.expm1(x)


def _average_weight(beta: Any) -> Any:
    """How an average moves in the rules' ``lerp``: by 1 - beta, or by -beta from the new value where beta is below a half. The
    smaller of the two keeps all its digits in the state's precision, and what it leaves of the other is not cancelled."""
    if isinstance(beta, torch.Tensor):
        return torch.where(beta < 0.5, -beta, 1.0 - beta)
    return -beta if beta < 0.5 else 1.0 - beta


def moves_far(group: Group) -> bool:
    """Whether an average of the group moves, or may move, by more than half in a step."""
    return any(isinstance(beta, torch.Tensor) or beta < 0.5 for beta in group["betas"])


def _common(group: Group) -> tuple[Any, ...]:
    """What both rules begin with: the gradient's factor, how the averages move, and the weight's factor (1 - lambda)."""
    sign = -1.0 if group["maximize"] else 1.0
    return sign, *map(_average_weight, group["betas"]), 1.0 - group["lr"] * group["weight_decay"]


def variance_units(group: Group) -> tuple[Any, Any]:
    """(unit, prior): a stored variance of 1 is ``unit`` in the paper's units, and sigma^2, Eq. 22 under the schedule, is
    ``prior`` in units of it. Floats or 0-dim tensors, as the group's are."""
    sigma_sq = group["lr"] * group["r"] / group["batch_size"]
    if group.get("variance_follows_lr", True):
        return sigma_sq, 1.0
    return group["first_prior"], sigma_sq / group["first_prior"]  # the literal s, in units of the first sigma^2


def adabayes_coefficients(group: Group) -> tuple[Any, ...]:
    """Algorithm 1's coefficients. Works on floats and, where a GPU alone knows an option, on 0-dim float64 tensors alike."""
    lr, r, batch_size = group["lr"], group["r"], group["batch_size"]
    kappa = lr * quotient(batch_size, r)  # eta^2 / sigma^2
    if group["transition"] == "paper":  # (1 - kappa/2)^2 s + eta^2, Eq. 16b
        drift, forget = kappa, kappa * (1.0 - kappa / 4.0)
    else:  # the Ornstein-Uhlenbeck process it linearises
        drift = forget = -_expm1(-kappa)
    if group.get("variance_follows_lr", True):
        step_size = lr * r  # the unit of the variances, times the batch size
    else:
        unit, drift_unit = variance_units(group)
        moves = (lr != 0).to(lr.dtype) if isinstance(lr, torch.Tensor) else lr != 0  # a bool would become torch's default dtype
        step_size = unit * moves * batch_size  # lr = 0 freezes the literal variance too
        drift = drift * drift_unit
    fisher = step_size * batch_size  # times g^2: the squared gradient of the summed loss in units of 1/unit
    return *_common(group), step_size, fisher, forget, drift


def adabayes_fp_coefficients(group: Group) -> tuple[Any, ...]:
    """Algorithm 2's coefficients; as :func:`adabayes_coefficients`. The batch size cancels."""
    return *_common(group), group["lr"], quotient(0.5, group["r"]), 1.0, group["eps"]


ADABAYES = Algorithm(
    name="AdaBayes",
    number=0,
    slots=("exp_avg", "prior_var", "exp_avg_sq", "post_var"),
    lean=2,
    reads=3,
    initial=(0.0, 1.0, 0.0, 1.0),
    coefficients=adabayes_coefficients,
    corrected=((4, 0),),
)
ADABAYES_FP = Algorithm(
    name="AdaBayesFP",
    number=1,
    slots=("exp_avg", "exp_avg_sq", "post_var"),
    lean=2,
    reads=2,
    initial=(0.0, 0.0, 1.0),
    coefficients=adabayes_fp_coefficients,
    corrected=((4, 0), (6, 1)),
)
ALGORITHMS = (ADABAYES, ADABAYES_FP)


# --- What a group may say ---------------------------------------------------------------------------------------------


# Schedules end below 0 by rounding: torch's LinearLR(end_factor=0) at -3e-20 for an lr of 1e-3. Down to this such a number
# acts as 0. A linear schedule that runs one step too far is further below, and so is a wrong sign.
ROUNDING = 1e-9


def python_number(value: Any) -> Any:
    """A number of numpy's, or a fraction or decimal, as one of Python's own, which a step computes with and every checkpoint
    loads; a tensor, and what is no number, as it is."""
    if value is None or type(value) in (float, int, bool, str) or isinstance(value, torch.Tensor):
        return value
    if hasattr(value, "item") and getattr(value, "size", 1) == 1:  # an array, a numpy scalar
        value = value.item()
    if isinstance(value, bool):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if hasattr(type(value), "__float__") and getattr(value, "ndim", 0) == 0 else value


def pair(betas: Any) -> tuple[Any, ...]:
    """``betas`` as a tuple, of whatever has two numbers in an order: a list of OmegaConf's, an array, a tensor."""
    if type(betas) is tuple and len(betas) == 2:  # nearly always, at each step
        return betas
    ordered = all(hasattr(type(betas), name) for name in ("__len__", "__getitem__")) and not isinstance(betas, (str, Mapping))
    if not ordered or getattr(betas, "ndim", 1) != 1 or len(betas) != 2:
        raise ValueError(f"Invalid betas: {betas!r} (allowed: two numbers, each 0 <= beta < 1)")
    return tuple(betas)


def _number(value: Any, name: str = "hyper-parameter") -> float | None:
    """``value`` as a float; None for a tensor on an accelerator, which cannot be read without waiting for it."""
    if type(value) is float:  # nearly always, at each step
        return value
    if isinstance(value, torch.Tensor):
        if value.numel() != 1:
            raise ValueError(f"Tensor {name} must be 1-element, given shape {tuple(value.shape)}")
        if value.is_complex() or value.dtype == torch.bool:
            raise TypeError(f"{name} must be a real number, given {value!r}")
        return float(value.detach()) if value.device.type == "cpu" else None
    number = python_number(value)
    if type(number) not in (int, float):
        raise TypeError(f"{name} must be a number or a one-element tensor, given {value!r}")
    return float(number)


def _within(value: Any, name: str, low: float, high: float, what: str, allowed: str) -> None:
    """``value`` in [low, high); a NaN is in no range."""
    number = _number(value, name)
    if number is not None and not low <= number < high:
        raise ValueError(f"Invalid {what}: {value} (allowed: {allowed})")


def _rounding_of_lr(group: Group) -> float:
    """How far below 0 rounding may have put ``lr``: ROUNDING, or a millionth of what its schedule began with, since a float32
    tensor is rounded to 6e-8 of that at each step."""
    lr, sgd_lr, r = (_number(group.get(name) or 0.0, name) or 0.0 for name in ("initial_lr", "sgd_lr", "r"))
    return max(ROUNDING, 1e-6 * max(lr, sgd_lr / r if 0.0 < sgd_lr < math.inf and r else 0.0))


def check_batch_size(batch_size: Any) -> None:
    """Raises ValueError or TypeError for what is not a number >= 1."""
    allowed = "a number >= 1: the examples the mean loss of one step averages over"
    _within(batch_size, "batch_size", 1.0, math.inf, "batch_size", allowed)


def check_group(algorithm: Algorithm, group: Group) -> None:
    """Raises ValueError or TypeError for a hyper-parameter out of its range; wording begins as torch.optim's."""
    inf = math.inf
    lr = _number(group["lr"], "lr")
    if lr is not None and not 0.0 <= lr < inf and not (lr < 0.0 and -lr <= _rounding_of_lr(group)):
        raise ValueError(f"Invalid learning rate: {group['lr']} (allowed: a finite number >= 0)")
    for i, beta in enumerate(pair(group["betas"])):
        _within(beta, f"betas[{i}]", -ROUNDING, 1.0, f"beta parameter at index {i}", "0 <= beta < 1")
    allowed = "a finite number >= 0; lambda is lr * weight_decay"
    _within(group["weight_decay"], "weight_decay", -ROUNDING, inf, "weight_decay value", allowed)
    for flag in ("maximize", "capturable"):
        if not isinstance(python_number(group[flag]), (bool, int)):
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
    if not isinstance(python_number(group["variance_follows_lr"]), (bool, int)):
        raise TypeError(f"Invalid variance_follows_lr value: {group['variance_follows_lr']!r} (allowed: True or False)")


def check_step(algorithm: Algorithm, group: Group, known: Any = None) -> None:
    """What has to hold at each step: the ranges, and a transition that is stable at this learning rate. ``known`` as in
    :func:`present`."""
    group = present(algorithm, group, known)
    check_group(algorithm, group)
    _check_r(algorithm, group)
    if algorithm is not ADABAYES or group["transition"] != "paper":
        return
    lr, r, batch_size = _number(group["lr"], "lr"), _number(group["r"], "r"), _number(group["batch_size"], "batch_size")
    rounded = 1.0 + 1e-6  # a restarted schedule comes back to its first lr but for rounding, which may be where kappa is 1
    if lr is not None and r is not None and batch_size is not None and lr * batch_size > r * rounded:
        raise ValueError(
            f"kappa = lr * batch_size / r = {lr:g} * {batch_size:g} / {r:g} = {lr * batch_size / r:g} is above 1: "
            'transition="paper" linearises a decay of exp(-kappa) and means nothing there. '
            'Use transition="exact", a smaller lr or batch_size, or a larger sgd_lr.'
        )


def _allowed_sgd_lr(algorithm: Algorithm) -> str:
    return "a number > 0; inf is AdamW" if algorithm is ADABAYES_FP else "a finite number > 0; AdaBayesFP takes inf too"


def _in_range_of_sgd_lr(algorithm: Algorithm, number: float) -> bool:
    return 0.0 < number < math.inf or algorithm is ADABAYES_FP and number == math.inf


def _sgd_lr_of(algorithm: Algorithm, group: Group) -> float:
    """``sgd_lr`` as a float, checked: it only sets ``r``, so that a tensor is read once."""
    sgd_lr = _number_of(group, "sgd_lr")
    if not _in_range_of_sgd_lr(algorithm, sgd_lr):
        raise ValueError(f"Invalid sgd_lr: {group['sgd_lr']} (allowed: {_allowed_sgd_lr(algorithm)})")
    return sgd_lr


def _check_r(algorithm: Algorithm, group: Group) -> None:
    r = _number(group["r"], "r")
    if r is not None and not _in_range_of_sgd_lr(algorithm, r):
        raise ValueError(f"Invalid r: {group['r']} (allowed: sgd_lr / lr, {_allowed_sgd_lr(algorithm)})")


def present(algorithm: Algorithm, group: Group, known: Any) -> Group:
    """The group as the next step takes it: itself, or, where ``sgd_lr`` was edited, a copy with the ``r`` that follows.

    ``known`` is the ``sgd_lr`` that ``r`` stands for; None: the group's. An edited one gives ``r = sgd_lr / lr`` at the present
    ``lr``. Where a scheduler of torch drives ``lr``, it is what ``initial_lr`` is to ``lr``: ``r`` changes by the factor that
    ``sgd_lr`` does, as if the group had begun with it. The present ``lr`` of a warm-up would make it huge afterwards. So too
    where ``lr`` is 0.
    """
    if group["sgd_lr"] is known:
        return group
    sgd_lr, r = _sgd_lr_of(algorithm, group), group["r"]
    if known is not None and sgd_lr != known:
        lr = _number_of(group, "lr")
        if sgd_lr == math.inf:
            r = math.inf
        elif known != math.inf and ("initial_lr" in group or lr <= 0.0):
            r = r * (sgd_lr / known)
        else:
            lr = _number_of(group, "initial_lr") if "initial_lr" in group else lr
            if lr <= 0.0:
                raise ValueError(
                    f"sgd_lr was changed from inf to {sgd_lr:g} where lr is 0, so that r = sgd_lr / lr is not known. "
                    "Change it where lr is above 0, or set the group's r as well."
                )
            r = sgd_lr / lr
    return {**group, "sgd_lr": sgd_lr, "r": r}


def take_up_edits(algorithm: Algorithm, group: dict[str, Any], known: Any) -> Any:
    """Writes what follows from an edited ``sgd_lr`` into the group; ``r`` in place where it is a tensor that a CUDA graph reads.
    Returns what is ``known`` from now on."""
    now = present(algorithm, group, known)
    if now is not group:
        if isinstance(group["r"], torch.Tensor):
            group["r"].detach().fill_(now["r"])
        else:
            group["r"] = now["r"]
        group["sgd_lr"] = now["sgd_lr"]
    return now["sgd_lr"]


_NUMBERS = ("lr", "batch_size", "weight_decay", "eps", "r", "first_prior", "maximize", "capturable", "variance_follows_lr")


def make_python_numbers(group: dict[str, Any]) -> None:
    """Turns the options into Python's own numbers, or one-element tensors, and a tuple."""
    betas = tuple(map(python_number, pair(group["betas"])))
    group.update({name: python_number(group[name]) for name in _NUMBERS if name in group}, betas=betas)


def complete_group(algorithm: Algorithm, group: dict[str, Any]) -> None:
    """Adds what is derived once, when a group is added: ``r`` and, for AdaBayes, ``first_prior``, the first sigma^2."""
    check_group(algorithm, group)
    make_python_numbers(group)
    lr, sgd_lr = max(_number_of(group, "lr"), 0.0), _sgd_lr_of(algorithm, group)
    if group.get("r") is None:
        if lr == 0.0 and sgd_lr != math.inf:
            raise ValueError(
                "Invalid learning rate: 0 at the time a parameter group is added, where r = sgd_lr / lr is fixed. "
                "Give the group its full lr and let a scheduler start from 0, or give the group r itself."
            )
        group["r"] = math.inf if sgd_lr == math.inf else sgd_lr / lr
    group["sgd_lr"] = sgd_lr
    check_step(algorithm, group)
    if algorithm is ADABAYES:
        group.setdefault("first_prior", (lr * _number_of(group, "r") or sgd_lr) / _number_of(group, "batch_size"))


def _number_of(group: Group, name: str) -> float:
    """An option as a float, waiting for an accelerator if it must: for what happens once."""
    number = _number(group[name], name)
    if number is None and group[name].is_meta:
        raise ValueError(
            f"{name} is a tensor on the meta device, which holds no number (allowed: a number, or a tensor elsewhere)"
        )
    return float(group[name].detach()) if number is None else number


def meant(key: str, options: Iterable[str]) -> str | None:
    """The option of which ``key`` is a misspelling, if it is one: by one letter, or by capitals and underscores.

    Frameworks keep keys of their own in groups. Those that are made of an option's name (``no_weight_decay``, ``beta1``),
    begin with another letter (``patch_size``) or are as short as ``lr`` are theirs.
    """
    typed = key.lower().replace("_", "").replace("-", "")
    for option in options:
        name = option.replace("_", "")
        own = len(name) < 5 or name in typed or typed[:1] != name[0] or not typed.isalpha()
        if typed == name or not own and _one_slip(typed, name):
            return option
    return None


def _one_slip(a: str, b: str) -> bool:
    """Whether one letter more, less or other, or two neighbours that change places, make ``a`` of ``b``."""
    same = len(os.path.commonprefix([a, b]))
    a, b = a[same:], b[same:]
    return a[1:] == b[1:] or a[1:] == b or a == b[1:] or a[:2] == b[1::-1] and a[2:] == b[2:]
