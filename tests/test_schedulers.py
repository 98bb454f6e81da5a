"""Every scheduler of torch drives the fused optimizers as it drives the slow path, from learning rate 0 too."""

import copy
import inspect
import math

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


ENDS = MAKE | {  # at 0, at the limits of betas, and back
    "LinearLR to 0": lambda o: schedulers.LinearLR(o, end_factor=0.0, total_iters=10),
    "LinearLR from 1/3 to 0": lambda o: schedulers.LinearLR(o, start_factor=1 / 3, end_factor=0.0, total_iters=7),
    "LambdaLR to 0": lambda o: schedulers.LambdaLR(o, lambda t: max(0.0, 1 - t / 10)),
    "MultiplicativeLR by 0": lambda o: schedulers.MultiplicativeLR(o, lambda t: float(t != 4)),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, total_iters=7, power=0.3),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, T_max=7, eta_min=0.0),
    "CosineAnnealingLR, chained": lambda o: schedulers.ChainedScheduler(
        [schedulers.CosineAnnealingLR(o, T_max=7), schedulers.LinearLR(o, end_factor=0.0, total_iters=9)], optimizer=o
    ),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, T_0=3, T_mult=2, eta_min=0.0),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(
        o, max_lr=LR, total_steps=3 * STEPS + 1
    ),  # torch itself refuses to go on after it
    "OneCycleLR to 0": lambda o: schedulers.OneCycleLR(
        o, max_lr=LR, total_steps=3 * STEPS + 1, final_div_factor=float("inf"), base_momentum=0.0, anneal_strategy="linear"
    ),
    "CyclicLR from 0": lambda o: schedulers.CyclicLR(
        o, base_lr=0.0, max_lr=LR, step_size_up=3, cycle_momentum=True, base_momentum=0.0, max_momentum=0.95
    ),
    "CyclicLR, triangular2": lambda o: schedulers.CyclicLR(
        o, base_lr=0.0, max_lr=0.7 * LR, step_size_up=7, step_size_down=3, mode="triangular2", base_momentum=0.1, max_momentum=0.7
    ),
    "ReduceLROnPlateau to 0": lambda o: schedulers.ReduceLROnPlateau(o, factor=0.0, patience=2),
    "SequentialLR to 0": lambda o: schedulers.SequentialLR(
        o,
        [schedulers.LinearLR(o, start_factor=0.1, total_iters=3), schedulers.LinearLR(o, end_factor=0.0, total_iters=6)],
        milestones=[3],
    ),
    "SWALR to 0": lambda o: SWALR(o, swa_lr=0.0, anneal_epochs=5),
    "SWALR to 0, linear": lambda o: SWALR(o, swa_lr=0.0, anneal_epochs=5, anneal_strategy="linear"),
}
KAPPA_OF_1 = dict(batch_size=8, sgd_lr=LR**2 * 8)  # transition="paper" allows no more


@pytest.mark.parametrize("kind", ["float", "float64", "float32", "capturable"])
@pytest.mark.parametrize("scheduler", ENDS)
@pytest.mark.parametrize("name", ["AdaBayes", "AdaBayes at kappa = 1", "AdaBayesFP", "AdaBayesFP as AdamW"])
def test_no_step_dies_at_the_end_of_a_schedule_or_after_it(name, scheduler, kind):
    """Rounding may put lr and betas a little below 0, and a restart lr a little above where it began."""
    if name.endswith("1") and scheduler in ("CyclicLR", "LambdaLR"):
        pytest.skip("it raises lr to several times what kappa allows")
    options = {"AdaBayes": dict(batch_size=8), "AdaBayes at kappa = 1": KAPPA_OF_1, "AdaBayesFP as AdamW": dict(sgd_lr=math.inf)}
    p = torch.nn.Parameter(torch.randn(5, dtype=torch.float64))
    lr = LR if kind == "float" else torch.tensor(LR, dtype=torch.float32 if kind == "float32" else torch.float64)
    if name.endswith("1") and kind == "float32":
        lr = torch.tensor(LR * (1 - 1e-6))  # no float32 is LR
    optimizer = FUSED[name.split()[0]]([p], lr=lr, capturable=kind == "capturable", **options.get(name, {}))
    schedule = ENDS[scheduler](optimizer)
    for _ in range(3 * STEPS):
        p.grad = torch.randn_like(p)
        before, rate = p.detach().clone(), float(optimizer.param_groups[0]["lr"])
        optimizer.step()
        assert rate > 0 or torch.equal(p, before)
        schedule.step(*([1.0] if "Plateau" in scheduler else []))
    assert p.isfinite().all()


@pytest.mark.parametrize("name", FUSED)
def test_saved_and_copied_at_the_end_of_a_schedule(name):
    p = torch.nn.Parameter(torch.randn(5))
    optimizer = FUSED[name]([p], lr=1e-3, **OPTIONS[name])
    schedule = schedulers.LinearLR(optimizer, end_factor=0.0, total_iters=10)
    for _ in range(10):
        p.grad = torch.randn_like(p)
        optimizer.step()
        schedule.step()
    assert optimizer.param_groups[0]["lr"] < 0
    optimizer.load_state_dict(optimizer.state_dict())
    copy.deepcopy(optimizer).step()


SLIGHTLY_NEGATIVE = [dict(lr=-1e-10), dict(betas=(-1e-10, 0.9)), dict(betas=(0.9, -1e-10)), dict(weight_decay=-1e-10)]


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("edit", SLIGHTLY_NEGATIVE, ids=str)
@pytest.mark.parametrize("name", FUSED)
def test_what_is_below_0_by_rounding_is_0(name, edit, as_tensor, capturable):
    weights = []
    for zero in (False, True):
        p = torch.nn.Parameter(torch.ones(5, dtype=torch.float64))
        optimizer = FUSED[name]([p], lr=1e-2, capturable=capturable, **OPTIONS[name])
        slow = SLOW[name]([q := torch.nn.Parameter(p.detach().clone())], lr=1e-2, **OPTIONS[name])
        (key, value), small = next(iter(edit.items())), (lambda x, zero=zero: 0.0 if zero and x < 0 else x)
        given = tuple(map(small, value)) if key == "betas" else small(value)
        for one, weight in ((optimizer, p), (slow, q)):
            for t in range(3):
                weight.grad = torch.full_like(weight, t - 0.5)
                one.step()
                one.param_groups[0][key] = torch.tensor(given, dtype=torch.float64) if as_tensor else given
        weights.append((p, q))
    assert torch.equal(weights[0][0], weights[1][0])
    assert torch.equal(weights[0][1], weights[1][1])


@pytest.mark.parametrize(
    "edit", [dict(lr=-1e-6), dict(lr=torch.tensor(-1e-6)), dict(betas=(-1e-3, 0.9)), dict(weight_decay=-1e-3)], ids=str
)
@pytest.mark.parametrize("name", FUSED)
def test_what_is_further_below_is_refused(name, edit):
    """A linear schedule over 1,000 steps that runs one step too far."""
    p = torch.nn.Parameter(torch.ones(5))
    optimizer = FUSED[name]([p], lr=1e-3, **OPTIONS[name])
    schedulers.ConstantLR(optimizer)  # sets initial_lr
    p.grad = torch.ones(5)
    optimizer.param_groups[0].update(edit)
    with pytest.raises(ValueError, match="Invalid"):
        optimizer.step()
    assert not optimizer.state
