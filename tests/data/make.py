"""Writes a checkpoint of each optimizer of the adabayes_fused it imports, beside this file; README.md says when."""

import math
from pathlib import Path

import torch

import adabayes_fused

STEPS, STOP, LR = 18, 12, 1e-2
SHAPES = [  # a list for each group
    [((3, 4), torch.float32), ((5,), torch.bfloat16), ((0, 2), torch.float32)],
    [((), torch.float32), ((7,), torch.float64)],
]
OPTIONS = {  # a dict for each group
    "AdaBayes": [
        dict(batch_size=8),
        dict(batch_size=200, weight_decay=0.5, transition="exact", variance_follows_lr=False),
    ],
    "AdaBayesFP": [dict(), dict(sgd_lr=3.0, weight_decay=0.5, eps=1e-3)],
}


def regimen():
    """Learning rates; for each parameter weights and gradients, as bfloat16 numbers, exact in any dtype; where it has one."""
    shapes = [shape for group in SHAPES for shape, _ in group]
    sizes = [math.prod(shape) for shape in shapes]
    drawn = torch.randn(1 + STEPS, sum(sizes), generator=torch.Generator().manual_seed(11)).bfloat16().split(sizes, 1)
    return dict(
        lrs=[0.0 if t == 7 else LR * min((t + 1) / 4, 1) * (1 - 0.5 * t / STEPS) for t in range(STEPS)],
        start=[d[0].reshape(shape) for d, shape in zip(drawn, shapes, strict=True)],
        gradients=[d[1:].reshape(STEPS, *shape) for d, shape in zip(drawn, shapes, strict=True)],
        present=[[(t + i) % 4 != 0 for i in range(len(shapes))] for t in range(STEPS)],
    )


def train(optimizer, params, run, steps):
    for t in steps:
        for p, gradients, present in zip(params, run["gradients"], run["present"][t], strict=True):
            p.grad = gradients[t].to(p.dtype) if present else None
        for group in optimizer.param_groups:
            group["lr"] = run["lrs"][t]
        optimizer.step()


def build(name, options, weights, **policy):
    """Parameters of these weights, in groups and dtypes as ``SHAPES`` has them, and their optimizer."""
    rest = iter(weights)
    groups = [[torch.nn.Parameter(next(rest).to(dtype, copy=True)) for _, dtype in group] for group in SHAPES]
    arguments = dict(lr=LR, **({"batch_size": 8} if name == "AdaBayes" else {}))
    optimizer = getattr(adabayes_fused, name)(
        [{"params": group, **o} for group, o in zip(groups, options, strict=True)], **arguments, **policy
    )
    return sum(groups, []), optimizer


def main():
    for name, options in OPTIONS.items():
        for kind in ("full", "lean"):
            path = Path(__file__).with_name(f"{name}-{kind}-{adabayes_fused.__version__}.pt")
            run = regimen()
            params, optimizer = build(name, options, run["start"], lean=kind == "lean")
            train(optimizer, params, run, range(STOP))
            about = dict(name=name, lean=kind == "lean", lr=LR, options=options, stop=STOP)
            with path.open("xb") as file:  # what is there was written by released code, and stays
                torch.save({**about, **run, "weights": [p.detach() for p in params], "state_dict": optimizer.state_dict()}, file)


if __name__ == "__main__":
    main()
