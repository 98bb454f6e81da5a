"""Every scheduler of torch drives the fused optimizers as it drives the slow path, from learning rate 0 too."""

import inspect

import pytest
import torch
from runs import FUSED, SLOW
from torch.optim import lr_scheduler as schedulers
from torch.optim.swa_utils import SWALR

OPTIONS = {"AdaBayes": dict(batch_size=8), "AdaBayesFP": {}}
LR, STEPS = 1e-2, 12

MAKE = {
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda t: t / 4),  # warm-up from 0
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda t: 0.9),
    "StepLR": lambda o: schedulers.StepLR(o, step_size=3),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [2, 7]),
    "ConstantLR": lambda o: schedulers.ConstantLR(o, factor=0.25, total_iters=4),
    "LinearLR": lambda o: schedulers.LinearLR(o, start_factor=1e-3, total_iters=6),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, total_iters=8, power=2.0),  # ends at 0
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, T_max=5),  # 0 and back
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, T_0=4),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, factor=0.5, patience=1),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, base_lr=1e-3, max_lr=5e-2, step_size_up=4, cycle_momentum=True),  # betas
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, max_lr=5e-2, total_steps=STEPS + 1),  # betas
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.LambdaLR(o, lambda t: t / 3), schedulers.CosineAnnealingLR(o, 6)], milestones=[3]
    ),
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(o, factor=0.5, total_iters=3), schedulers.ExponentialLR(o, 0.9)], optimizer=o
    ),
    "SWALR": lambda o: SWALR(o, swa_lr=2e-3, anneal_epochs=5),
}


def test_none_is_missing():
    found = {name for name in schedulers.__all__ if inspect.isclass(getattr(schedulers, name))}
    assert found - {"LRScheduler"} <= MAKE.keys()


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("scheduler", MAKE)
@pytest.mark.parametrize("name", FUSED)
def test_schedulers_drive_it_as_they_drive_the_slow_path(name, scheduler, tensor_lr):
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(50, dtype=torch.float64))
    q = torch.nn.Parameter(p.detach().clone())
    lr = torch.tensor(LR, dtype=torch.float64) if tensor_lr else LR
    optimizer, slow = FUSED[name]([p], lr=lr, **OPTIONS[name]), SLOW[name]([q], lr=LR, **OPTIONS[name])
    given, rates, betas = optimizer.param_groups[0]["lr"], set(), set()
    pairs = [(optimizer, MAKE[scheduler](optimizer)), (slow, MAKE[scheduler](slow))]
    for _ in range(STEPS):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
        rates.add(float(optimizer.param_groups[0]["lr"]))
        betas.add(optimizer.param_groups[0]["betas"])
        for one, schedule in pairs:
            one.step()
            schedule.step(*([1.0] if scheduler == "ReduceLROnPlateau" else []))
    torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)
    assert len(rates) > 1
    assert (len(betas) > 1) == (scheduler in ("CyclicLR", "OneCycleLR"))
    assert not tensor_lr or optimizer.param_groups[0]["lr"] is given  # written in place
