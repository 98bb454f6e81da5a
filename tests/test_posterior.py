"""posterior(): the variance in the paper's units, held against the transcription; reading it disturbs nothing."""

import math

import numpy as np
import pytest
import torch
from runs import CASES, FUSED, LR, SLOW, as_if_all_were_skipped, gradients, learning_rate, make_params
from transcription import Weight, fixed_point

from adabayes_fused import AdaBayesFP, posterior

OPTIONS = {"AdaBayes": dict(batch_size=8), "AdaBayesFP": dict(batch_size=8)}
ULP = 2.0**-24  # relative error of one float32 operation


def parameter(*shape, dtype=torch.float32):
    p = torch.nn.Parameter(torch.randn(*shape, dtype=dtype))
    p.grad = torch.randn_like(p)
    return p


def make(name, params, **options):
    return FUSED[name](params, **{"lr": LR} | OPTIONS[name] | options)


def variance(optimizer, p):
    return posterior(optimizer, p).variance.double().cpu().numpy()


def judged_run(case, dtype, steps, backend="auto", device="cpu", **policy):
    """Runs ``case`` beside the transcription; yields (optimizer, p, Weight) for each weight that has just moved."""
    name, options = CASES[case]
    options = OPTIONS[name] | options
    params = make_params(dtype, device)
    judge_options = ({"eps": 1e-8} if name == "AdaBayesFP" else {}) | options
    weights = [
        Weight(p.detach().double().cpu().numpy(), fixed_point=name == "AdaBayesFP", lr=LR, **judge_options) for p in params
    ]
    optimizer = FUSED[name](params, lr=LR, backend=backend, **options, **policy)
    for t, grads in enumerate(gradients(steps, dtype)):
        optimizer.param_groups[0]["lr"] = lr = learning_rate(t, steps)
        for p, weight, grad in zip(params, weights, grads, strict=True):
            p.grad = None if grad is None else grad.to(p.device)
            if grad is not None:
                weight.step(grad.double().numpy(), lr)
        optimizer.step()
        if lr > 0:  # at 0 the transcription leaves its last variance standing
            yield from ((optimizer, p, w) for p, w, grad in zip(params, weights, grads, strict=True) if grad is not None)


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_variance_is_the_papers(case, lean):
    """At every step of a run with a schedule and missing gradients, in float64. Lean "exact" divides by exp(-10)."""
    for optimizer, p, weight in judged_run(case, torch.float64, steps=40, lean=lean):
        np.testing.assert_allclose(variance(optimizer, p), weight.post, rtol=1e-10, atol=0)


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("case", ["AdaBayes", "AdaBayes-exact", "AdaBayes-literal", "AdaBayesFP-eps", "AdaBayesFP-adamw"])
def test_variance_to_float32(case, lean, target, interpreted):
    """Five roundings a step at most, and no step enlarges a relative error. Of the lean reading, Eq. 16b's inverse also has
    the four roundings of the last prior, relative to what is left of it once the drift is gone."""
    backend, device = target
    steps = 8 if interpreted else 40
    for optimizer, p, weight in judged_run(case, torch.float32, steps, backend, device, lean=lean):
        tolerance = 5 * ULP * weight.t * weight.post
        if lean and not weight.fixed_point:
            tolerance = tolerance + 4 * ULP * weight.prior / kept(weight)
        error = np.abs(variance(optimizer, p) - weight.post)
        assert (error <= tolerance).all(), (error / weight.post).max()


def kept(weight):
    """What Eq. 16b multiplies the variance by, from the learning rate of the last step, sigma_sq * batch_size / r."""
    lr = weight.sigma_sq * weight.batch_size / weight.r
    kappa = lr**2 / weight.sigma_sq
    return (1 - kappa / 2) ** 2 if weight.transition == "paper" else math.exp(-kappa)


@pytest.mark.parametrize("name", ["AdaBayes", "AdaBayes-literal", "AdaBayesFP", "AdaBayesFP-lean"])
def test_a_schedule_since_the_last_step(name):
    """A variance relative to sigma^2 follows lr and batch_size; the literal one stands; Eq. 20 is taken afresh."""
    cls, _, how = name.partition("-")
    options = {"literal": dict(variance_follows_lr=False), "lean": dict(lean=True), "": {}}[how]
    p = parameter(50, dtype=torch.float64)
    optimizer = make(cls, [p], **options)
    judge = {"variance_follows_lr": False} if how == "literal" else {"eps": 1e-8} if cls == "AdaBayesFP" else {}
    weight = Weight(p.detach().numpy(), fixed_point=cls == "AdaBayesFP", lr=LR, batch_size=8, **judge)
    for _ in range(3):
        p.grad = torch.randn_like(p) / 100
        weight.step(p.grad.numpy(), LR)
        optimizer.step()
    sigma_sq, lr, batch_size = 0.03 / 5, 3e-3, 5  # sgd_lr = 0.1 follows lr
    expected = weight.post if how == "literal" else weight.post * sigma_sq / weight.sigma_sq
    if cls == "AdaBayesFP":
        rms = batch_size / 8 * np.sqrt(weight.v / (1 - 0.999**3))
        expected = 1 / (1 / fixed_point(rms, lr, sigma_sq) + 1e-8 * batch_size / lr)
    optimizer.param_groups[0]["lr"] = lr
    optimizer.set_batch_size(batch_size)
    np.testing.assert_allclose(variance(optimizer, p), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("transition", ["paper", "exact"])
def test_lean_is_off_by_the_change_of_the_drift(transition):
    """Eq. 16b with another kappa: wrong by the difference times 1 - u, over what it divides by."""
    p = parameter(300, dtype=torch.float64)
    q = torch.nn.Parameter(p.detach().clone())
    lean, full = (make("AdaBayes", [x], batch_size=200, transition=transition, lean=x is p) for x in (p, q))
    for _ in range(3):
        p.grad = q.grad = torch.randn_like(p) / 10
        lean.step()
        full.step()
    np.testing.assert_allclose(variance(lean, p), variance(full, q), rtol=1e-12, atol=0)
    for optimizer in (lean, full):
        optimizer.param_groups[0]["lr"] = 0.9 * LR
    error = np.abs(variance(lean, p) - variance(full, q))
    kappa, sigma_sq = LR * 200 / 10, 0.9 * 0.1 / 200
    assert 0 < error.max() <= sigma_sq * 0.1 * kappa / (1 - kappa / 2) ** 2


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("name", FUSED)
def test_before_the_first_step_it_is_the_priors(name, lean):
    """sigma^2 = sgd_lr / batch_size, Eq. 22; also where an overflow has skipped every step there was."""
    p = parameter(3, 4)
    optimizer = make(name, [p], sgd_lr=0.2, lean=lean)
    mean, var = posterior(optimizer, p)
    assert torch.equal(mean, p.detach())
    assert torch.equal(var, torch.full((3, 4), 0.2 / 8))
    assert not optimizer.state
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(1.0)
    optimizer.step()
    assert p not in optimizer.state
    np.testing.assert_allclose(variance(optimizer, p), 0.2 / 8, rtol=1e-6)
    as_if_all_were_skipped(optimizer)
    np.testing.assert_allclose(variance(optimizer, p), 0.2 / 8, rtol=1e-6)


def test_before_the_first_step_under_a_schedule():
    p = parameter(3)
    for options, expected in ({}, 0.1 * 0.1 / 8), (dict(variance_follows_lr=False), 0.1 / 8):
        optimizer = make("AdaBayes", [p], **options)
        optimizer.param_groups[0]["lr"] = 0.1 * LR
        np.testing.assert_allclose(variance(optimizer, p), expected, rtol=1e-6)
    assert posterior(make("AdaBayesFP", [p], sgd_lr=math.inf), p).variance.isinf().all()


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("name", FUSED)
def test_reading_disturbs_nothing(name, lean):
    params = make_params(torch.float64)
    others = make_params(torch.float64)
    read, unread = make(name, params, lean=lean), make(name, others, lean=lean)
    for grads in gradients(10, torch.float64):
        for p, q, grad in zip(params, others, grads, strict=True):
            p.grad = q.grad = grad
        read.step()
        unread.step()
        for p in params:
            posterior(read, p).variance.fill_(7.0)
    assert set(read.state) == set(params)
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)
        assert all(torch.equal(value, unread.state[q][key]) for key, value in read.state[p].items())


def test_mean_is_a_view():
    p = parameter(5)
    mean, var = posterior(make("AdaBayes", [p]), p)
    assert mean.data_ptr() == p.data_ptr()
    assert not mean.requires_grad
    assert not var.requires_grad


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("name", FUSED)
def test_complex_parameters_have_the_variances_of_their_parts(name, lean):
    start, grads = torch.randn(4, 3, dtype=torch.complex128), torch.randn(5, 4, 3, dtype=torch.complex128)
    p = torch.nn.Parameter(start.clone())
    optimizer = make(name, [p], lean=lean)
    eps = {"eps": 1e-8} if name == "AdaBayesFP" else {}
    weight = Weight(torch.view_as_real(start).numpy(), fixed_point=name == "AdaBayesFP", lr=LR, batch_size=8, **eps)
    before = posterior(optimizer, p).variance
    assert torch.equal(before, torch.full_like(start, complex(0.1 / 8, 0.1 / 8)))
    for grad in grads:
        p.grad = grad
        optimizer.step()
        weight.step(torch.view_as_real(grad).numpy(), LR)
    mean, var = posterior(optimizer, p)
    assert mean.dtype == var.dtype == torch.complex128
    assert mean.shape == var.shape == p.shape
    np.testing.assert_allclose(torch.view_as_real(var), weight.post, rtol=1e-10)


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("name", FUSED)
def test_dtypes_and_layouts(name, lean):
    """Shaped like the parameter, in the state's dtype, element by element as for a plain one."""
    plain = parameter(4, 3)
    wide = torch.randn(4, 6)
    gaps = torch.nn.Parameter(wide[:, ::2])
    turned = torch.nn.Parameter(torch.randn(3, 4).t())
    half = torch.nn.Parameter(torch.randn(4, 3).bfloat16())
    params = [plain, gaps, turned, half]
    grad = torch.randn(4, 3).bfloat16().float()
    for p in params:
        p.grad = grad.to(p.dtype)
    optimizer = make(name, params, lean=lean)
    optimizer.step()
    for p in params:
        mean, var = posterior(optimizer, p)
        assert mean.dtype == p.dtype
        assert var.dtype == optimizer.state[p]["exp_avg"].dtype == torch.float32
        assert torch.equal(var, posterior(optimizer, plain).variance)


@pytest.mark.parametrize("name", FUSED)
def test_tensor_options(name):
    p = parameter(20)
    q = torch.nn.Parameter(p.detach().clone())
    q.grad = p.grad
    optimizer, other = make(name, [p], lean=True), make(name, [q], lean=True)
    group = other.param_groups[0]
    group.update({key: torch.tensor([group[key]], dtype=torch.float64) for key in ("lr", "r", "batch_size")})
    for o in (optimizer, other):
        o.step()
    np.testing.assert_allclose(variance(other, q), variance(optimizer, p), rtol=1e-6)


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("options", [{}, dict(variance_follows_lr=False), dict(transition="exact")])
def test_waits_for_no_accelerator(options, lean):
    """A meta tensor has no value to wait for: whoever asks for one gets an error."""
    p = torch.nn.Parameter(torch.empty(4, 3, device="meta"))
    for name in FUSED if not options else ["AdaBayes"]:
        optimizer = make(name, [p], lean=lean, **options)
        group = optimizer.param_groups[0]
        group.update({key: torch.empty((), device="meta") for key in ("lr", "r", "batch_size")})
        assert posterior(optimizer, p).variance.shape == (4, 3)
        step = torch.empty((), device="meta")
        optimizer.state[p] = {"step": step, **{key: torch.empty_like(p) for key in optimizer.algorithm.stored(lean)}}
        assert posterior(optimizer, p).variance.shape == (4, 3)


def test_rounding_makes_no_variance_negative():
    p = parameter(1)
    optimizer = make("AdaBayes", [p], lean=True)
    optimizer.step()
    kappa = LR * 8 / 10
    optimizer.state[p]["prior_var"].fill_(kappa * (1 - 1e-6))
    assert variance(optimizer, p) == 0.0


def test_errors():
    p, q = parameter(3), parameter(3)
    optimizer = make("AdaBayes", [p])
    for other, words in (q, r"shape \(3,\).*no parameter of this AdaBayes"), (p.data, "p.data is another"), ("bias", "'bias'"):
        with pytest.raises(ValueError, match=words):
            posterior(optimizer, other)
    for make_other in (torch.optim.AdamW, lambda params: SLOW["AdaBayes"](params, batch_size=8)):
        with pytest.raises(TypeError, match="allowed: adabayes_fused's AdaBayes and AdaBayesFP"):
            posterior(make_other([p]), p)
    untold = AdaBayesFP([p])
    with pytest.raises(ValueError, match=r"set_batch_size\(n\)"):
        posterior(untold, p)
    untold.set_batch_size(4)
    np.testing.assert_allclose(variance(untold, p), 0.1 / 4, rtol=1e-6)
