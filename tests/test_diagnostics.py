"""diagnostics(): regimes and distances worked out by hand, by Eq. 20 and by the limits it has."""

import math

import numpy as np
import pytest
import torch
from runs import FUSED, as_if_all_were_skipped, make_params
from transcription import fixed_point

from adabayes_fused import AdaBayes, AdaBayesFP, diagnostics
from adabayes_fused.diagnostics import _sums
from adabayes_fused.posterior import Reading

OPTIONS = {"AdaBayes": dict(batch_size=8), "AdaBayesFP": {}}
A = 0.005  # 1 / (2 r) at lr = 1e-3, sgd_lr = 0.1: Eq. 20's first term, for gradients of the mean loss


def optimizer_of(cls, *shapes, dtype=torch.float64, steps=2, named=False, **options):
    """One whose parameters have taken ``steps`` steps with beta2 = 1/2, so that <g^2> is exp_avg_sq / 0.75 after two."""
    params = [torch.nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes]
    given = list(zip(("weight", "bias"), params, strict=False)) if named else params
    optimizer = cls(given, lr=1e-3, sgd_lr=0.1, betas=(0.9, 0.5), **options)
    for _ in range(steps):
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.step()
    return optimizer, params


def set_mean_square(optimizer, p, values):
    optimizer.state[p]["exp_avg_sq"].copy_(0.75 * torch.tensor(values, dtype=torch.float64))


@pytest.mark.parametrize("lean", [False, True])
def test_regimes_of_fp_by_hand(lean):
    """In the paper's units: 1 / sigma^2 = 2 B a / lr against B sqrt(<g^2>) / lr, whatever the batch size B."""
    optimizer, (p, q) = optimizer_of(AdaBayesFP, (4,), (2, 3), lean=lean)
    set_mean_square(optimizer, p, [0.0, 0.99 * 4 * A**2, 1.01 * 4 * A**2, 9 * A**2])
    set_mean_square(optimizer, q, [[4 * A**2 * 1.3] * 3, [4 * A**2 / 1.2, 16 * A**2, 1.0]])
    report = diagnostics(optimizer)
    assert report.parameters[0] == ("group 0, parameter 0", 4, 0.5, 0.5, 0.0)
    assert report.parameters[1][1:] == (6, 1 / 6, 5 / 6, 0.0)
    assert report.overall == ("all", 10, 0.3, 0.7, 0.0)


def test_infinite_sgd_lr_is_adam_like():
    p = torch.nn.Parameter(torch.zeros(3))
    optimizer = AdaBayesFP([p], sgd_lr=math.inf)
    p.grad = torch.tensor([0.0, 1e-20, 1.0])
    optimizer.step()
    assert diagnostics(optimizer).overall == ("all", 3, 0.0, 1.0, 0.0)


def test_distance_by_hand():
    """<g^2> = 8 a^2: Eq. 20 is 2 a / (a + 3 a) = 1/2 in units of sigma^2; 0: it is 1."""
    optimizer, (p, q) = optimizer_of(AdaBayes, (3,), (5,), batch_size=8)
    set_mean_square(optimizer, p, [8 * A**2, 8 * A**2, 0.0])
    optimizer.state[p]["post_var"].copy_(torch.tensor([0.5 * math.e, 0.5 / math.e**2, 1.0]))
    set_mean_square(optimizer, q, [8 * A**2] * 5)
    optimizer.state[q]["post_var"].fill_(0.5)
    report = diagnostics(optimizer)
    assert report.parameters[0][1:] == pytest.approx((3, 1 / 3, 2 / 3, 1.0), rel=1e-7)
    assert report.parameters[1][1:] == pytest.approx((5, 0.0, 1.0, 0.0), abs=1e-15)
    assert report.overall[1:] == pytest.approx((8, 1 / 8, 7 / 8, 3 / 8), rel=1e-7)


def test_a_literal_variance_is_compared_in_the_present_units():
    """At a tenth of the lr sigma^2 is a tenth: the stored 0.2 is twice sigma^2, and Eq. 20 four times below it."""
    optimizer, (p,) = optimizer_of(AdaBayes, (1,), batch_size=8, variance_follows_lr=False)
    set_mean_square(optimizer, p, [8 * A**2])
    optimizer.state[p]["post_var"].fill_(0.2)
    optimizer.param_groups[0]["lr"] = 1e-4
    assert diagnostics(optimizer).overall.distance == pytest.approx(math.log(4), rel=1e-12)


@pytest.mark.parametrize("follows", [True, False])
def test_regimes_of_lean_adabayes_by_hand(follows):
    """u_post = 0.61 | 0.63 around 2 / (1 + sqrt 5) = 0.618 after kappa = 0.5, where both priors are above 0.9."""
    optimizer, (p,) = optimizer_of(AdaBayes, (5,), batch_size=50_000, lean=True, variance_follows_lr=follows)
    post = torch.tensor([0.0, 0.5, 0.61, 0.63, 1.0], dtype=torch.float64)
    optimizer.state[p]["prior_var"].copy_((1 - 0.5 / 2) ** 2 * post + 0.5)
    assert diagnostics(optimizer).overall == ("all", 5, 0.4, 0.6, None)


@pytest.mark.parametrize("lean", [False, True])
def test_settled_variances(lean):
    """Constant gradients on either side of eta / G = sigma^2."""
    lr, batch_size, sigma_sq = 1e-3, 128, 0.1 / 128
    size = np.array([1e-5, 1e-3, 0.1, 1.2, 1.36, 2.0, 6.0, 20.0])  # of the summed loss; eta / sigma^2 = 1.28
    p = torch.nn.Parameter(torch.zeros(8, dtype=torch.float64))
    optimizer = AdaBayes([p], lr=lr, batch_size=batch_size, lean=lean)
    for sign in torch.randint(0, 2, (20_000, 8)).double() * 2 - 1:
        p.grad = sign * torch.tensor(size) / batch_size
        optimizer.step()
    overall = diagnostics(optimizer).overall
    assert (overall.sgd_like, overall.adam_like) == (0.5, 0.5)
    assert ((lr / size > sigma_sq) == (fixed_point(size, lr, sigma_sq) > 2 * sigma_sq / (1 + math.sqrt(5)))).all()
    assert ((lr / size > sigma_sq) == (np.arange(8) < 4)).all()
    assert overall.distance is None if lean else overall.distance < 0.01


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("size", [1e-9, 1e3])
def test_limits(name, size, target):
    """Vanishing gradients are SGD-like, large ones Adam-like, on every backend."""
    backend, device = target
    p = torch.nn.Parameter(torch.zeros(300, device=device))
    for lean in (False, True):
        optimizer = FUSED[name]([p], backend=backend, lean=lean, **OPTIONS[name])
        for _ in range(3):
            p.grad = torch.full_like(p, size)
            optimizer.step()
        assert diagnostics(optimizer).overall[2:4] == ((1.0, 0.0) if size < 1 else (0.0, 1.0))


def test_table():
    optimizer, (p, q) = optimizer_of(AdaBayes, (40, 30), (5,), batch_size=8, named=True)
    optimizer.add_param_group({"params": [("late", torch.nn.Parameter(torch.zeros(0))), ("unused", torch.nn.Parameter(p[0]))]})
    p.grad = q.grad = None
    set_mean_square(optimizer, q, [0.0, 0.0, 8 * A**2, 8 * A**2, 8 * A**2])
    optimizer.state[q]["post_var"].copy_(torch.tensor([1.0, 1.0, 0.5, 0.5, 0.5 * math.e]))
    optimizer.state[p]["post_var"].fill_(1.0)
    assert str(diagnostics(optimizer)).splitlines() == [
        "parameter  numel  SGD-like  Adam-like  distance",
        "weight     1,200   100.0 %      0.0 %         0",
        "bias           5    40.0 %     60.0 %       0.2",
        "late           0         -          -         -",
        "unused        30         -          -         -",
        "all        1,235    99.8 %      0.2 %   0.00083",
    ]


def test_without_names_and_before_any_step():
    params = [torch.nn.Parameter(torch.zeros(n)) for n in (2, 3)]
    report = diagnostics(AdaBayes([dict(params=[p]) for p in params], batch_size=8))
    assert report.parameters == (("group 0, parameter 0", 2, *[None] * 3), ("group 1, parameter 0", 3, *[None] * 3))
    assert report.overall == ("all", 5, None, None, None)


@pytest.mark.parametrize("name", FUSED)
def test_steps_that_an_overflow_skipped_are_none(name):
    p = torch.nn.Parameter(torch.zeros(2))
    optimizer = FUSED[name]([p], **OPTIONS[name])
    p.grad = torch.full_like(p, math.inf)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(1.0)
    optimizer.step()
    assert p not in optimizer.state
    assert diagnostics(optimizer).overall == ("all", 2, None, None, None)
    as_if_all_were_skipped(optimizer)
    assert diagnostics(optimizer).overall == ("all", 2, None, None, None)


def test_parts_of_complex_weights_count_one_by_one_and_what_is_not_a_number_not_at_all():
    optimizer, (p, q) = optimizer_of(AdaBayesFP, (2,), (4,), dtype=torch.complex128)
    optimizer.state[p]["exp_avg_sq"].copy_(torch.tensor([complex(1, 0), complex(0, 0)]))
    torch.view_as_real(optimizer.state[q]["exp_avg_sq"]).fill_(1.0)[0] = math.nan
    report = diagnostics(optimizer)
    assert report.parameters[0][1:] == (2, 0.75, 0.25, 0.0)
    assert report.parameters[1][1:] == (4, 0.0, 0.75, 0.0)


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("name", FUSED)
def test_disturbs_nothing_and_fetches_once(name, lean, monkeypatch):
    params = make_params(torch.float64)
    optimizer = FUSED[name](params, lean=lean, **OPTIONS[name])
    for _ in range(3):
        for p in params[1:]:
            p.grad = torch.randn_like(p)
        optimizer.step()
    before = {p: {key: value.clone() for key, value in state.items()} for p, state in optimizer.state.items()}
    fetched, tolist = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda t: fetched.append(t) or tolist(t))
    diagnostics(optimizer)
    assert [t.shape for t in fetched] == [(len(params) - 1, 4)]
    assert set(optimizer.state) == set(before)
    assert all(torch.equal(value, before[p][key]) for p, state in optimizer.state.items() for key, value in state.items())


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("name", FUSED)
def test_waits_for_no_accelerator_before_it_fetches(name, lean):
    """A meta tensor has no value to wait for: whoever asks for one gets an error."""
    p = torch.nn.Parameter(torch.empty(4, 3, device="meta"))
    optimizer = FUSED[name]([p], lean=lean, **OPTIONS[name])
    optimizer.param_groups[0]["lr"] = torch.empty((), device="meta")
    step = torch.empty((), device="meta")
    optimizer.state[p] = {"step": step, **{key: torch.empty_like(p) for key in optimizer.algorithm.stored(lean)}}
    assert _sums(Reading(optimizer, optimizer.param_groups[0], p)).shape == (4,)


def test_another_optimizer():
    with pytest.raises(TypeError, match="AdamW .allowed: adabayes_fused's"):
        diagnostics(torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))]))
