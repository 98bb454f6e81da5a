"""The distribution over each weight's optimum that an optimizer holds, in the paper's units, read from its state.

Reading changes nothing, and waits for no accelerator.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .algorithms import ADABAYES_FP, _number, adabayes_coefficients, corrected, present, variance_units
from .codes import decode_u8
from .optimizer import _FusedOptimizer
from .prepare import as_real, wide_dtype
from .scalars import on, scalars, wide
from .sharding import like, local, placed_like


class Posterior(NamedTuple):
    """A normal distribution for each weight. Both tensors are shaped like the parameter; ``mean`` is a view of its weights."""

    mean: Tensor
    variance: Tensor


def posterior(optimizer: _FusedOptimizer, p: Tensor) -> Posterior:
    """What the optimizer believes of the optimal weights of ``p``: Eq. 15b after the last step.

    Reading changes nothing and waits for no accelerator. The variance is that under the group's present ``lr``, ``r`` and
    ``batch_size``, which the next step would use:

    - ``AdaBayes``: ``post_var``, in units of sigma^2 = lr r / batch_size, so that it follows a schedule at once; under
      ``variance_follows_lr=False`` the literal variance, which does not.
    - ``AdaBayes(lean=True)`` keeps only the next step's prior, of which Eq. 16b gives the posterior back. Read it before
      ``lr`` or ``batch_size`` changes: the prior holds the drift eta^2 of the last step, and the reading is off by as much
      as that has changed since. In float32, rounding leaves an error of about 1e-7 sigma^2_prior / (1 - kappa/2)^2, which is
      much of a variance far below eta^2. (Under ``transition="exact"`` the divisor is exp(-kappa): from kappa = 15 on there
      are no digits left, and from 37 on the reading is not finite.)
    - ``AdaBayesFP``, lean or not: Eq. 20 at <g^2>, with ``eps`` beside the root. Infinite where <g^2>, 1/sgd_lr and eps are 0.

    Args:
        optimizer: an ``AdaBayes`` or ``AdaBayesFP``, which is left as it is.
        p: one of its parameters.

    Returns:
        ``mean`` and ``variance``, each shaped like ``p``. ``mean`` is a detached view of the weights, which the next step moves.
            ``variance``, sigma^2_post of the weight itself, is a new tensor in float32, or in float64 for float64 parameters. A
            complex variance holds that of the real and that of the imaginary part. Before the first step it is the prior's
            sigma^2. Of a DTensor both are DTensors, placed as it is.

    Raises:
        TypeError: the optimizer is another one.
        ValueError: ``p`` is none of its parameters, or its batch size is unknown.

    Examples:
        >>> import torch, adabayes_fused
        >>> weight = torch.nn.Parameter(torch.ones(3))
        >>> optimizer = adabayes_fused.AdaBayes([weight], batch_size=64, sgd_lr=0.5)
        >>> mean, variance = adabayes_fused.posterior(optimizer, weight)
        >>> torch.allclose(variance, torch.full((3,), 0.5 / 64))
        True
    """
    check_optimizer(optimizer)
    reading = Reading(optimizer, _group_of(optimizer, p), p)
    group = reading.group
    if group["batch_size"] is None:
        raise ValueError(
            "the variance depends on the batch size, which this AdaBayesFP was not told. Give it batch_size, or call "
            "optimizer.set_batch_size(n): the examples the mean loss of one step averages over"
        )
    unit, _ = variance_units(group)
    variance = torch.empty_like(local(p), dtype=wide_dtype(p), requires_grad=False)
    if not reading.state:
        as_real(variance).fill_(unit)
    elif optimizer.algorithm is ADABAYES_FP:
        as_real(variance).copy_(group["lr"] / group["batch_size"] / reading.equation_20().denominator)
    else:
        as_real(variance).copy_(reading.filtered() * unit)
    return Posterior(p.detach(), like(p, variance))


class Equation20(NamedTuple):
    """Eq. 20 for gradients of the mean loss: sigma^2_post = lr / batch_size / denominator, a = 1 / (2 r), <g^2> = v_hat."""

    a: Any
    v_hat: Tensor
    denominator: Tensor


class Reading:
    """One parameter's group and state, real and in float64 (where the device has it); a complex parameter's two parts
    lie in a last dimension; of a DTensor, the part that is here. A scalar is a float where the host knows it, else a 0-dim
    tensor on the parameter's device."""

    def __init__(self, optimizer: _FusedOptimizer, group: dict[str, Any], p: Tensor) -> None:
        self.device, self.dtype = p.device, wide(p.device)
        self.param, self.values = p, local(p).numel() * (2 if p.is_complex() else 1)
        self.algorithm, self.lean = optimizer.algorithm, optimizer.lean
        self.group = scalars({**present(optimizer.algorithm, group, optimizer._sgd_lr_of_r(group))}, self._scalar)
        self.state: Mapping[str, Any] = optimizer.state.get(p) or {}
        self.step = self._scalar(self.state.get("step", 0))

    def _scalar(self, value: Any) -> Any:
        known = _number(value)
        return on(self.device, value, self.dtype) if known is None else known

    def keeps(self, name: str) -> bool:
        return name in self.algorithm.stored(self.lean)

    def _slot(self, name: str) -> Tensor:
        slot = local(placed_like(self.param, self.state[name])).detach()
        if slot.dtype == torch.uint8:  # a variance: nothing here reads exp_avg
            slot = decode_u8(slot)
        return as_real(slot).to(self.dtype)

    @property
    def _last_step(self) -> Any:
        """The step count, or 1 where an overflow has skipped all there were: what it debiases is 0 then."""
        return self.step.clamp(min=1) if isinstance(self.step, Tensor) else max(self.step, 1.0)

    def filtered(self) -> Tensor:
        """AdaBayes' sigma^2_post in the unit it is kept in: as stored, or Eq. 16b solved for it."""
        if self.keeps("post_var"):
            return self._slot("post_var")
        *_, forget, drift = adabayes_coefficients(self.group)
        taken = self.step > 0  # nothing has drifted before
        taken = taken.to(self.dtype) if isinstance(taken, Tensor) else taken
        post: Tensor = (self._slot("prior_var") - drift * taken) / (1.0 - forget * taken)
        return post.clamp_(min=0.0)

    def relative(self) -> Tensor:
        """AdaBayes' sigma^2_post in units of sigma^2."""
        _, prior = variance_units(self.group)
        return torch.div(self.filtered(), prior)

    def equation_20(self) -> Equation20:
        """Eq. 20 at <g^2>, for either algorithm; ``exp_avg_sq`` must be kept."""
        *_, a, debias2, eps = corrected(ADABAYES_FP.numbers({"eps": 0.0, **self.group}), self._last_step)
        v_hat = self._slot("exp_avg_sq") * debias2
        return Equation20(a, v_hat, a + (a * a + v_hat).sqrt() + eps)


def check_optimizer(optimizer: Any) -> None:
    if not isinstance(optimizer, _FusedOptimizer):
        raise TypeError(
            f"given a {type(optimizer).__module__}.{type(optimizer).__name__} (allowed: adabayes_fused's AdaBayes and "
            "AdaBayesFP; of a wrapper, give the optimizer inside)"
        )


def _group_of(optimizer: _FusedOptimizer, p: Tensor) -> dict[str, Any]:
    for group in optimizer.param_groups:
        if any(q is p for q in group["params"]):
            return group
    given = f"a tensor of shape {tuple(p.shape)}" if isinstance(p, Tensor) else repr(p)
    raise ValueError(
        f"given {given}, which is no parameter of this {type(optimizer).__name__} (allowed: the tensors in its "
        'param_groups[i]["params"] themselves; a copy, a view or p.data is another tensor)'
    )
