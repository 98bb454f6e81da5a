"""The rows of Table 1 with the paper's hyper-parameters, and what else the paper leaves room for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

from adabayes_fused import AdaBayes, AdaBayesFP, reference

from .reported import STEPS

L2 = 5e-4  # of the first six, added to the gradient
DECOUPLED = 0.05  # times lr = 1e-3: lambda = 5e-5 a step


class Recipe(NamedTuple):
    """``make(params, **options)`` gives the optimizer. ``captured``: it can step within a CUDA graph."""

    make: Callable[..., Optimizer]
    options: dict[str, Any]
    captured: bool = True
    keeps_decay: bool = False  # weight_decay grows as lr falls, so that their product stays


def _bounded(params: Any, **options: Any) -> Optimizer:
    from pytorch_optimizer import AdaBound  # here, as it brings in some hundred optimizers

    return AdaBound(params, **options)


_ADAM = dict(lr=1e-3, betas=(0.9, 0.999), weight_decay=L2)
_BOUND = dict(_ADAM, final_lr=0.1, gamma=1e-3, eps=1e-8, weight_decouple=False)
_FP = dict(lr=1e-3, sgd_lr=0.1, betas=(0.9, 0.999), weight_decay=DECOUPLED)
_BAYES = dict(_FP, batch_size=128)

TABLE1 = {
    "SGD": Recipe(SGD, dict(lr=0.1, momentum=0.9, weight_decay=L2), captured=False),
    "Adam": Recipe(Adam, _ADAM),
    "AdaGrad": Recipe(Adagrad, dict(lr=0.01, weight_decay=L2), captured=False),
    "AMSGrad": Recipe(Adam, dict(_ADAM, amsgrad=True)),
    "AdaBound": Recipe(_bounded, _BOUND, captured=False),
    "AMSBound": Recipe(_bounded, dict(_BOUND, ams_bound=True), captured=False),
    "AdamW": Recipe(AdamW, dict(_ADAM, weight_decay=DECOUPLED)),
    "AdaBayes-FP": Recipe(AdaBayesFP, _FP),
    "AdaBayes": Recipe(AdaBayes, _BAYES),
}
VARIANTS = {
    "AdaBayes, slow path": Recipe(reference.AdaBayes, _BAYES, captured=False),
    "AdaBayes-FP, slow path": Recipe(reference.AdaBayesFP, _FP, captured=False),
    "AdaBayes, lagging variance": Recipe(AdaBayes, dict(_BAYES, variance_follows_lr=False)),
    "AdaBayes, exact transition": Recipe(AdaBayes, dict(_BAYES, transition="exact")),
    "AdaBayes, as released": Recipe(AdaBayes, dict(_BAYES, variance_follows_lr=False, transition="exact")),
    "AdaBayes-FP, as released": Recipe(AdaBayesFP, _FP, keeps_decay=True),
    # Table 1's SGD does not dampen its momentum: its lr = 0.1 moves a weight as far as sgd_lr = 1, ten times the paper's.
    "AdaBayes, sgd_lr=1": Recipe(AdaBayes, dict(_BAYES, sgd_lr=1.0)),
    "AdaBayes-FP, sgd_lr=1": Recipe(AdaBayesFP, dict(_FP, sgd_lr=1.0)),
}
OPTIMIZERS = {**TABLE1, **VARIANTS}
# What is trained first, should the time not suffice for all.
ORDER = ["AdaBayes", "AdaBayes-FP", "AdamW", "SGD", "Adam", "AMSGrad", "AdaGrad", "AdaBound", "AMSBound", *VARIANTS]


def options_of(name: str, network: str, steps: int, batch_size: int) -> dict[str, Any]:
    """The paper's hyper-parameters: Adam's betas depend on the network, AdaBound's gamma on the steps of the whole run
    (gamma x steps is as in the paper's 78,200), the prior's variance on the batch size."""
    options = dict(OPTIMIZERS[name].options)
    if name in ("Adam", "AMSGrad") and network != "densenet121":
        options["betas"] = (0.99, 0.999)
    if "gamma" in options:
        options["gamma"] *= STEPS / steps
    if "batch_size" in options:
        options["batch_size"] = batch_size
    return options


def make(name: str, params: Any, options: dict[str, Any], graphs: bool = False) -> Optimizer:
    """The optimizer; with ``graphs`` one whose step can be captured, where there is one: its lr is then a tensor."""
    recipe, options = OPTIMIZERS[name], dict(options)
    params = list(params)
    if graphs and recipe.captured:
        tensors = ("lr", "weight_decay") if recipe.keeps_decay else ("lr",)
        options |= {key: torch.tensor(options[key], device=params[0].device) for key in tensors} | {"capturable": True}
    if recipe.make in (Adam, AdamW, SGD):
        options["fused"] = True
    return recipe.make(params, **options)


def keep_decay(optimizer: Optimizer, options: dict[str, Any]) -> None:
    """Gives weight_decay so that lr x weight_decay, what the weights lose in a step, is what it was at first."""
    for group in optimizer.param_groups:
        decay = options["lr"] * options["weight_decay"] / group["lr"]
        if isinstance(group["weight_decay"], torch.Tensor):
            group["weight_decay"].copy_(decay)
        else:
            group["weight_decay"] = decay
