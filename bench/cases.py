"""What is measured: parameter lists, and the optimizers that step over them."""

from __future__ import annotations

import torch

from adabayes_fused import AdaBayes, AdaBayesFP, reference

SHAPES = {
    "32 M in one tensor": [(32_000_000,)],
    "24 tensors of 1 M": [(1_000_000,)] * 24,
    "1,000 tensors of 16": [(16,)] * 1000,
}
QUICK = {"4 M in one tensor": [(4_000_000,)], "1,000 tensors of 16": [(16,)] * 1000}

CONTENDERS = {  # the first is what the others are compared with
    "slow path AdaBayes": lambda p: reference.AdaBayes(p, batch_size=128),
    "slow path AdaBayes-FP": lambda p: reference.AdaBayesFP(p),
    "AdaBayes": lambda p: AdaBayes(p, batch_size=128),
    "AdaBayes lean": lambda p: AdaBayes(p, batch_size=128, lean=True),
    "AdaBayes-FP": lambda p: AdaBayesFP(p),
    "AdaBayes-FP lean": lambda p: AdaBayesFP(p, lean=True),
    "torch AdamW fused": lambda p: torch.optim.AdamW(p, fused=True, weight_decay=0.05),
}
JUDGES = {
    "AdaBayes": "slow path AdaBayes",
    "AdaBayes lean": "slow path AdaBayes",
    "AdaBayes-FP": "slow path AdaBayes-FP",
    "AdaBayes-FP lean": "slow path AdaBayes-FP",
}


def parameters(shapes, device, seed=0):
    """Parameters and gradients; random, as the time of an operation may depend on its values."""
    generator = torch.Generator(device).manual_seed(seed)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator, device=device)) for shape in shapes]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator, device=device) * 1e-2
    return params
