"""What the algorithms tend to: AdamW, SGD, and Eq. 20's fixed point."""

import math

import numpy as np
import pytest
import torch
from runs import FUSED, SLOW
from transcription import fixed_point

from adabayes_fused import AdaBayes, AdaBayesFP


def train(optimizer, params, grads):
    for step in grads:
        for p, grad in zip(params, step, strict=True):
            p.grad = grad.to(p)
        optimizer.step()


def test_fp_with_infinite_sgd_lr_is_adamw(target):
    """To float32 rounding over 100 steps: as near to AdamW in float64 as AdamW in float32 is."""
    backend, device = target
    start = [torch.randn(50), torch.randn(7, 9)]
    grads = [[torch.randn_like(w) * 10.0 ** (t % 5 - 4) for w in start] for t in range(100)]
    options = dict(lr=3e-3, betas=(0.8, 0.99), eps=1e-8, weight_decay=0.1)

    def weights(make, dtype):
        params = [torch.nn.Parameter(w.to(device, dtype)) for w in start]
        train(make(params), params, grads)
        return torch.cat([p.detach().double().cpu().ravel() for p in params])

    exact = weights(lambda p: torch.optim.AdamW(p, **options), torch.float64)
    ours = weights(lambda p: AdaBayesFP(p, sgd_lr=math.inf, backend=backend, **options), torch.float32)
    torchs = weights(lambda p: torch.optim.AdamW(p, **options), torch.float32)
    assert (ours - exact).abs().max() <= 2 * (torchs - exact).abs().max()


@pytest.mark.parametrize("name", FUSED)
def test_vanishing_gradients_give_sgd(name, target):
    """Averaged, debiased momentum at sgd_lr; AdaBayes's stationary variance is sigma^2 (1 + kappa/4) under Eq. 16b."""
    backend, device = target
    options = dict(batch_size=128) if name == "AdaBayes" else {}
    p = torch.nn.Parameter(torch.zeros(300, dtype=torch.float64, device=device))
    optimizer = FUSED[name]([p], lr=1e-3, sgd_lr=0.1, weight_decay=0.0, backend=backend, **options)
    w, m = torch.zeros(300, dtype=torch.float64), torch.zeros(300, dtype=torch.float64)
    for t in range(1, 51):
        grad = (0.5 + torch.rand(300, dtype=torch.float64)) * 1e-9
        train(optimizer, [p], [[grad]])
        m = 0.9 * m + 0.1 * grad
        w -= 0.1 * m / (1 - 0.9**t)
    kappa = 1e-3 * 128 / 100
    torch.testing.assert_close(p.detach().cpu(), w, rtol=kappa / 3.9, atol=0)


@pytest.mark.parametrize("name", ["AdaBayes", "AdaBayes-slow"])
@pytest.mark.parametrize("size", [1e-5, 1e-3, 0.1, 1.0, 10.0])
def test_variance_settles_on_equation_20(name, size):
    """Within 1% for gradients (of the summed loss) of constant size G >= 1e-5 with eta G <= 0.01."""
    assert stationary_ratio(name, size, lr=1e-3, batch_size=128) == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("eta_g", [0.1, 0.5, 2.0])
def test_beyond_equation_20(eta_g):
    """Without a prior, s = 1 / (1/(s + eta^2) + G^2) has s G/eta = sqrt(1 + (eta G/2)^2) - eta G/2: what Eq. 20 neglects."""
    lr = 1e-3
    expected = math.sqrt(1 + (eta_g / 2) ** 2) - eta_g / 2
    assert stationary_ratio("AdaBayes", eta_g / lr, lr=lr, batch_size=1, sgd_lr=1e6) == pytest.approx(expected, rel=1e-6)
    assert expected == pytest.approx(1 - eta_g / 2, abs=eta_g**2 / 8)


def stationary_ratio(name, size, lr, batch_size, sgd_lr=0.1):
    """sigma^2_post under gradients of random sign and constant size, over Eq. 20."""
    p = torch.nn.Parameter(torch.zeros(4, dtype=torch.float64))
    cls = AdaBayes if name == "AdaBayes" else SLOW["AdaBayes"]
    optimizer = cls([p], lr=lr, batch_size=batch_size, sgd_lr=sgd_lr)
    signs = torch.randint(0, 2, (20000, 4)).double() * 2 - 1
    train(optimizer, [p], ([sign * size / batch_size] for sign in signs[: 20000 if size < 1 else 3000]))
    sigma_sq = sgd_lr / batch_size
    post = optimizer.state[p]["post_var"].numpy() * (sigma_sq if name == "AdaBayes" else 1)
    assert np.ptp(post) < 1e-9 * post[0]
    return float(post[0] / fixed_point(size, lr, sigma_sq))


@pytest.mark.parametrize("name", FUSED)
def test_zero_learning_rate_is_a_fixed_point(name, target):
    backend, device = target
    options = dict(batch_size=128) if name == "AdaBayes" else {}
    for follows in ({}, {"variance_follows_lr": False}) if name == "AdaBayes" else ({},):
        p = torch.nn.Parameter(torch.randn(40, device=device))
        optimizer = FUSED[name]([p], lr=1e-3, backend=backend, **options, **follows)
        train(optimizer, [p], [[torch.randn(40)]])
        before, state = p.detach().clone(), {k: v.clone() for k, v in optimizer.state[p].items()}
        optimizer.param_groups[0]["lr"] = 0.0
        train(optimizer, [p], [[torch.randn(40)]] * 3)
        assert torch.equal(p.detach(), before)
        assert optimizer.state[p]["step"] == 4
        assert not torch.equal(optimizer.state[p]["exp_avg"], state["exp_avg"])
        if name == "AdaBayes":
            assert torch.equal(optimizer.state[p]["prior_var"], state["prior_var"])


def test_small_kappa_keeps_its_precision():
    """kappa = 1e-7, where 1 - exp(-kappa) in float32 would be off by a fifth: the drift away from u = 1/2 over 1,000 steps."""
    p = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = AdaBayes([p], lr=1e-4, sgd_lr=0.1, batch_size=1, transition="exact", lean=True)
    train(optimizer, [p], [[torch.zeros(1)]])
    optimizer.state[p]["prior_var"].fill_(0.5)
    train(optimizer, [p], [[torch.zeros(1)]] * 1000)
    assert optimizer.state[p]["prior_var"].item() - 0.5 == pytest.approx(-0.5 * math.expm1(-1000 * 1e-7), rel=1e-9)
