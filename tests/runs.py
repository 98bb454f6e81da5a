"""The run every parity test makes: ragged parameters, a changing learning rate, gradients that are sometimes missing."""

import functools

import numpy as np
import torch
from transcription import Weight

from adabayes_fused import AdaBayes, AdaBayesFP, reference

FUSED = {"AdaBayes": AdaBayes, "AdaBayesFP": AdaBayesFP}
SLOW = {"AdaBayes": reference.AdaBayes, "AdaBayesFP": reference.AdaBayesFP}
SHAPES = [(3,), (), (33, 7), (0, 4), (1,), (1100,), (5, 2, 16)]
LR = 1e-2

MAIN = ("AdaBayes", "AdaBayesFP-eps")  # one of each kernel; the other cases differ in coefficients alone
CASES = {
    "AdaBayes": ("AdaBayes", dict(batch_size=8)),
    "AdaBayes-exact": ("AdaBayes", dict(batch_size=300, sgd_lr=0.5, transition="exact")),  # kappa = 0.06
    "AdaBayes-literal": ("AdaBayes", dict(batch_size=64, variance_follows_lr=False)),
    "AdaBayes-exact-literal": (
        "AdaBayes",
        dict(batch_size=2000, sgd_lr=0.02, transition="exact", variance_follows_lr=False),
    ),  # kappa = 10
    "AdaBayes-maximize": ("AdaBayes", dict(batch_size=1, weight_decay=0.0, maximize=True, betas=(0.5, 0.9))),
    "AdaBayesFP": ("AdaBayesFP", dict(eps=0.0)),
    "AdaBayesFP-eps": ("AdaBayesFP", dict(eps=1e-3, sgd_lr=3.0, batch_size=8)),
    "AdaBayesFP-adamw": ("AdaBayesFP", dict(sgd_lr=float("inf"), eps=1e-8)),
    "AdaBayesFP-maximize": ("AdaBayesFP", dict(maximize=True, weight_decay=0.5, betas=(0.0, 0.0))),
}


def learning_rate(t, steps):
    """Warm-up from 0, then a fall, with a stop at 0 on the way."""
    if t == steps // 2:
        return 0.0
    return LR * min(t / 10, 1) * (1 - 0.9 * t / steps)


def make_params(dtype, device="cpu"):
    generator = torch.Generator().manual_seed(1)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype).to(device)) for shape in SHAPES]


def gradients(steps, dtype):
    """Per step, per parameter: a gradient over six orders of magnitude, or None."""
    generator = torch.Generator().manual_seed(2)
    for t in range(steps):
        yield [
            None if (t + i) % 5 == 0 else (torch.randn(shape, generator=generator) * 10.0 ** ((i % 4) - 3)).to(dtype)
            for i, shape in enumerate(SHAPES)
        ]


def run(optimizer, params, steps, dtype=None):
    for t, grads in enumerate(gradients(steps, dtype or params[0].dtype)):
        for p, grad in zip(params, grads, strict=True):
            p.grad = None if grad is None else grad.to(p.device)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(t, steps)
        optimizer.step()
    return optimizer


@functools.lru_cache
def transcribe(case, steps, dtype):
    """The same run through the paper's equations, on the same (rounded) weights and gradients."""
    name, options = CASES[case]
    weights = [
        Weight(
            p.detach().double().numpy(),
            fixed_point=name == "AdaBayesFP",
            lr=LR,
            **({"eps": 1e-8} if name == "AdaBayesFP" else {}) | options,
        )
        for p in make_params(dtype)
    ]
    for t, grads in enumerate(gradients(steps, dtype)):
        for weight, grad in zip(weights, grads, strict=True):
            if grad is not None:
                weight.step(grad.double().numpy(), learning_rate(t, steps))
    return weights


def fused_run(case, steps, dtype, backend, device="cpu", **policy):
    name, options = CASES[case]
    params = make_params(dtype, device)
    optimizer = FUSED[name](params, lr=LR, backend=backend, **options, **policy)
    return params, run(optimizer, params, steps)


@functools.lru_cache
def slow_run(case, steps, dtype):
    name, options = CASES[case]
    params = make_params(dtype)
    return params, run(SLOW[name](params, lr=LR, **options), params, steps)


def in_paper_units(optimizer, p, sigma_sq):
    """State of ``p`` as the paper has it: gradients of the summed loss, variances of the weight. ``sigma_sq`` is the one
    of its last step."""
    group = next(group for group in optimizer.param_groups if any(q is p for q in group["params"]))
    batch_size = group["batch_size"] or 1
    state = {name: value.detach().cpu().double().numpy() for name, value in optimizer.state[p].items() if name != "step"}
    unit = sigma_sq if group.get("variance_follows_lr", True) else group["first_prior"]
    scale = {"exp_avg": batch_size, "exp_avg_sq": batch_size**2, "prior_var": unit, "post_var": unit}
    return {name: value * scale[name] for name, value in state.items()}


def assert_equal_to_paper(params, optimizer, weights, tolerance=1e-12):
    """Weights, moments, variances and step counts against the transcription."""
    for i, (p, weight) in enumerate(zip(params, weights, strict=True)):
        np.testing.assert_allclose(
            p.detach().cpu().double().numpy(), weight.w, rtol=tolerance, atol=tolerance, err_msg=f"weight {i}"
        )
        assert float(optimizer.state[p]["step"]) == weight.t, f"step count {i}"
        state = in_paper_units(optimizer, p, weight.sigma_sq)
        for name, expected in {
            "exp_avg": weight.m,
            "exp_avg_sq": weight.v,
            "prior_var": weight.prior,
            "post_var": weight.post,
        }.items():
            if name in state and np.isfinite(expected).all() and np.isfinite(state[name]).all():
                np.testing.assert_allclose(state[name], expected, rtol=1e-10, atol=tolerance, err_msg=f"{name} {i}")


def as_if_all_were_skipped(optimizer):
    """Leaves state as a GPU does that alone knows of overflows, and has skipped every step there was."""
    optimizer.found_inf = None
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    optimizer.step()
    for entry in optimizer.state.values():
        entry["step"].zero_()
        for name, value in zip(optimizer.algorithm.stored(optimizer.lean), optimizer.algorithm.initial, strict=False):
            entry[name].fill_(value)
