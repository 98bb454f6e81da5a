"""The slow path: the paper's Algorithms 1 and 2 as it prints them, one parameter at a time, in plain PyTorch.

Everything is in the paper's units: ``g`` is the gradient of the *summed* loss (``batch_size * p.grad``), the variances are
those of the weight, eta = ``lr``, sigma^2 = ``sgd_lr / batch_size``. The paper maximises, we minimise. The fused classes
take the same arguments and give the same weights; read this file to see what they compute.

State per parameter, shaped like it (float32, or float64 for float64 parameters): ``exp_avg`` (m), ``exp_avg_sq`` (v),
``post_var`` (sigma^2_post) and, for AdaBayes, ``prior_var`` (sigma^2_prior).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from .algorithms import ADABAYES, ADABAYES_FP, Algorithm, check_step, complete_group, take_up_edits
from .scalars import scalars

__all__ = ["AdaBayes", "AdaBayesFP"]


class _Reference(Optimizer):
    algorithm: Algorithm

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        group = {**self.defaults, **param_group}
        complete_group(self.algorithm, group)
        group["sgd_lr_of_r"] = group["sgd_lr"]
        super().add_param_group(group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step over all parameters with a gradient. Returns the closure's loss, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            check_step(self.algorithm, group, group["sgd_lr_of_r"])
            group["sgd_lr_of_r"] = take_up_edits(self.algorithm, group, group["sgd_lr_of_r"])
            numbers = scalars(group, float)
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, p.grad, self.state[p], numbers)
        return loss

    def _update(self, p: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        raise NotImplementedError

    @staticmethod
    def _moments(
        p: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any], batch_size: float
    ) -> tuple[Tensor, float, float]:
        """m and v; returns g and the divisors that make <g> = m / (1 - beta1^t) and <g^2> = v / (1 - beta2^t)."""
        dtype = torch.promote_types(p.dtype, torch.float32)
        if not state:
            state["step"], state["batch_size"] = 0, batch_size
            for name in ("exp_avg", "exp_avg_sq", "post_var"):
                state[name] = torch.zeros_like(p, dtype=dtype)
        state["step"] += 1
        if state["batch_size"] != batch_size:  # another sum: the averages are of the mean loss's gradient, times the batch size
            ratio, state["batch_size"] = batch_size / state["batch_size"], batch_size
            state["exp_avg"].mul_(ratio)
            state["exp_avg_sq"].mul_(ratio**2)
        beta1, beta2 = group["betas"]
        g = grad.to(dtype).mul(-batch_size if group["maximize"] else batch_size)
        state["exp_avg"].lerp_(g, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(g, g, value=1 - beta2)
        return g, 1 - beta1 ** state["step"], 1 - beta2 ** state["step"]

    @staticmethod
    def _weights(p: Tensor, state: dict[str, Any], weight_decay: float, debias1: float) -> None:
        """mu <- (1 - lambda) mu - sigma^2_post <g>"""
        if p.dtype == state["exp_avg"].dtype:
            p.mul_(1 - weight_decay).addcmul_(state["post_var"], state["exp_avg"], value=-1 / debias1)
        else:
            p.mul_(1 - weight_decay).sub_(state["post_var"] * state["exp_avg"] / debias1)


class AdaBayes(_Reference):
    """Algorithm 1. Arguments as in :class:`adabayes_fused.AdaBayes`."""

    algorithm = ADABAYES

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        *,
        batch_size: float,
        sgd_lr: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.05,
        transition: str = "paper",
        variance_follows_lr: bool = True,
        maximize: bool = False,
    ) -> None:
        super().__init__(
            params,
            dict(
                lr=lr,
                batch_size=batch_size,
                sgd_lr=sgd_lr,
                betas=betas,
                weight_decay=weight_decay,
                transition=transition,
                variance_follows_lr=variance_follows_lr,
                maximize=maximize,
                capturable=False,
            ),
        )

    def _update(self, p: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        eta, batch_size = group["lr"], group["batch_size"]
        sigma_sq = eta * group["r"] / batch_size  # eta_SGD / minibatch size; eta_SGD follows the schedule of eta
        g, debias1, _ = self._moments(p, grad, state, group, batch_size)
        if "prior_var" not in state:
            state["prior_var"] = torch.full_like(state["exp_avg"], group["first_prior"])
            state["prior_unit"] = group["first_prior"]
        if eta == 0:  # nothing drifts and nothing moves
            return
        post, prior = state["post_var"], state["prior_var"]
        if group["variance_follows_lr"] and state["prior_unit"] != sigma_sq:
            prior.mul_(sigma_sq / state["prior_unit"])
            state["prior_unit"] = sigma_sq

        # sigma^2_post <- 1 / (sigma^-2_prior + g^2)
        torch.reciprocal(prior, out=post).addcmul_(g, g).reciprocal_()

        # sigma^2_prior <- (1 - eta^2 / (2 sigma^2))^2 sigma^2_post + eta^2
        if group["transition"] == "paper":
            torch.mul(post, (1 - eta**2 / (2 * sigma_sq)) ** 2, out=prior).add_(eta**2)
        else:
            torch.mul(post, math.exp(-(eta**2) / sigma_sq), out=prior).add_(-sigma_sq * math.expm1(-(eta**2) / sigma_sq))

        self._weights(p, state, eta * group["weight_decay"], debias1)


class AdaBayesFP(_Reference):
    """Algorithm 2. Arguments as in :class:`adabayes_fused.AdaBayesFP`."""

    algorithm = ADABAYES_FP

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        *,
        sgd_lr: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.05,
        batch_size: float | None = None,
        maximize: bool = False,
    ) -> None:
        super().__init__(
            params,
            dict(
                lr=lr,
                sgd_lr=sgd_lr,
                betas=betas,
                eps=eps,
                weight_decay=weight_decay,
                batch_size=batch_size,
                maximize=maximize,
                capturable=False,
            ),
        )

    def _update(self, p: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        eta, batch_size = group["lr"], group["batch_size"] or 1.0  # the batch size cancels in the weights
        sigma_sq = eta * group["r"] / batch_size
        _, debias1, debias2 = self._moments(p, grad, state, group, batch_size)
        if eta == 0:
            return
        post = state["post_var"]

        # sigma^2_post <- 1 / (1 / (2 sigma^2) + sqrt(1 / (4 sigma^4) + <g^2> / eta^2)), and AdamW's eps beside the root
        torch.mul(state["exp_avg_sq"], 1 / (debias2 * eta**2), out=post).add_(1 / (4 * sigma_sq**2)).sqrt_()
        post.add_(1 / (2 * sigma_sq) + group["eps"] * batch_size / eta).reciprocal_()

        self._weights(p, state, eta * group["weight_decay"], debias1)
