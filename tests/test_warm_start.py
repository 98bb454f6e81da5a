"""load_adam_state_dict: from torch's Adam and AdamW, against torch itself and the paper's equations."""

import copy

import numpy as np
import pytest
import torch
from runs import FUSED
from transcription import fixed_point

SHAPES = [(4, 3), (), (70,), (0, 2)]
OPTIONS = {"AdaBayes": dict(batch_size=8), "AdaBayesFP": {}}


def parameters(dtype=torch.float32):
    generator = torch.Generator().manual_seed(5)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in SHAPES]


def grouped(params, second=None):
    return [dict(params=params[:2]), dict(params=params[2:], **(second or {}))]


def train(optimizer, params, steps, seed):
    generator = torch.Generator().manual_seed(seed)
    for t in range(steps):
        for i, p in enumerate(params):
            drawn = torch.randn(p.shape, generator=generator, dtype=p.dtype) * 10.0 ** (i - 1)
            p.grad = None if (t + i) % 4 == 0 else drawn
        optimizer.step()


def trained(cls=torch.optim.AdamW, dtype=torch.float32, steps=7, **options):
    params = parameters(dtype)
    optimizer = cls(grouped(params, dict(weight_decay=0.3)), lr=1e-2, **options)
    train(optimizer, params, steps, seed=1)
    return params, optimizer


def copies(params):
    return [torch.nn.Parameter(p.detach().clone()) for p in params]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.complex64], ids=str)
@pytest.mark.parametrize("options", [{}, dict(foreach=True)], ids=str)
def test_with_infinite_sgd_lr_adamw_goes_on(options, dtype):
    params, adamw = trained(dtype=dtype, weight_decay=0.1, eps=1e-6, betas=(0.8, 0.99), **options)
    ours = copies(params)
    optimizer = FUSED["AdaBayesFP"](
        grouped(ours, dict(weight_decay=0.3)), lr=1e-2, sgd_lr=float("inf"), weight_decay=0.1, eps=1e-6, betas=(0.8, 0.99)
    )
    optimizer.load_adam_state_dict(adamw.state_dict())
    train(adamw, params, 20, seed=2)
    train(optimizer, ours, 20, seed=2)
    tolerance = 50 * torch.finfo(dtype).eps
    for p, q in zip(params, ours, strict=True):
        assert float(optimizer.state[q]["step"]) == float(adamw.state[p]["step"]) > 14
        theirs, own = adamw.state[p], optimizer.state[q]
        for a, b in ((p.detach(), q.detach()), *((theirs[name], own[name]) for name in ("exp_avg", "exp_avg_sq"))):
            largest = float(a.abs().max()) if a.numel() else 0.0
            torch.testing.assert_close(b, a, rtol=tolerance, atol=tolerance * largest)


@pytest.mark.parametrize("lr", [2e-2, 0.0])
@pytest.mark.parametrize(
    "options",
    [
        dict(batch_size=8),
        dict(batch_size=300, transition="exact"),
        dict(batch_size=64, variance_follows_lr=False),
        dict(batch_size=300, transition="exact", variance_follows_lr=False, sgd_lr=0.5),
    ],
    ids=str,
)
def test_adabayes_starts_at_the_fixed_point(options, lr):
    """In the paper's units: Eq. 20 for the averaged squared gradient, then the drift of Eq. 16b, or the exact one."""
    params, adam = trained(torch.optim.Adam, torch.float64, betas=(0.8, 0.99))
    ours = copies(params)
    optimizer = FUSED["AdaBayes"](grouped(ours), lr=1e-2, **options)  # betas are not Adam's: its own unbias its averages
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.load_adam_state_dict(adam.state_dict())
    B, sgd_lr, literal = options["batch_size"], options.get("sgd_lr", 0.1), not options.get("variance_follows_lr", True)
    eta = lr or 1e-2  # at 0 there is no drift, and the fixed point is that of the first lr
    sigma_sq = eta * (sgd_lr / 1e-2) / B
    unit = sgd_lr / B if literal else sigma_sq
    for p, q in zip(params, ours, strict=True):
        state = optimizer.state[q]
        step = float(adam.state[p]["step"])
        v_hat = adam.state[p]["exp_avg_sq"].numpy() / (1 - 0.99**step)
        post = fixed_point(B * np.sqrt(v_hat), eta, sigma_sq)
        if options.get("transition") == "exact":
            decay = np.exp(-(lr**2) / sigma_sq)
            prior = decay * post + sigma_sq * (1 - decay)
        else:
            prior = (1 - lr**2 / (2 * sigma_sq)) ** 2 * post + lr**2
        np.testing.assert_allclose(state["post_var"].numpy() * unit, post, rtol=1e-12)
        np.testing.assert_allclose(state["prior_var"].numpy() * unit, prior, rtol=1e-12)
        for name in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(state[name], adam.state[p][name])


def test_at_a_constant_gradient_adabayes_stays_at_the_fixed_point():
    """The filter itself agrees: with gradients of one size its variance stays, to one step's drift, where it was put."""
    params = [torch.nn.Parameter(torch.zeros(50, dtype=torch.float64))]
    size = torch.logspace(-3, 1, 50, dtype=torch.float64)
    adam = torch.optim.Adam(params, lr=1e-3)
    optimizer = FUSED["AdaBayes"](copies(params), lr=1e-3, batch_size=8)  # kappa = 8e-5
    for t in range(50):
        params[0].grad = size * (-1) ** t
        adam.step()
    optimizer.load_adam_state_dict(adam.state_dict())
    (q,) = optimizer.param_groups[0]["params"]
    before = optimizer.state[q]["prior_var"].clone()
    for t in range(2000):
        q.grad = size * (-1) ** t
        optimizer.step()
    torch.testing.assert_close(optimizer.state[q]["prior_var"], before, rtol=0, atol=8e-5)


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("name", FUSED)
def test_options_stay_and_lower_precision_is_widened(name, lean):
    params = [p.bfloat16() for p in parameters()]
    params = [torch.nn.Parameter(p.detach()) for p in params]
    adam = torch.optim.Adam(grouped(params), lr=0.5, betas=(0.5, 0.6))
    train(adam, params, 4, seed=3)
    optimizer = FUSED[name](grouped(copies(params)), lr=torch.tensor(1e-2), lean=lean, **OPTIONS[name])
    groups, lr = [dict(group) for group in optimizer.param_groups], optimizer.param_groups[0]["lr"]
    optimizer.load_adam_state_dict(adam.state_dict())
    assert optimizer.param_groups == groups
    assert optimizer.param_groups[0]["lr"] is lr
    ours = [p for group in optimizer.param_groups for p in group["params"]]
    kept = ("exp_avg",) if lean and name == "AdaBayes" else ("exp_avg", "exp_avg_sq")
    for p, q in zip(params, ours, strict=True):
        assert set(optimizer.state[q]) == {"step", *optimizer.algorithm.stored(lean)}
        assert all(value.dtype == torch.float32 for value in optimizer.state[q].values())
        assert all(torch.equal(optimizer.state[q][name], adam.state[p][name].float()) for name in kept)
    train(optimizer, ours, 3, seed=4)
    assert all(p.isfinite().all() for p in ours)


def test_a_parameter_adam_has_not_stepped_begins_anew():
    p, q = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    adam = torch.optim.Adam([p, q])
    q.grad = torch.ones(3)
    adam.step()
    adam.state[p] = {"step": torch.tensor(0.0), "exp_avg": torch.zeros(3), "exp_avg_sq": torch.zeros(3)}
    optimizer = FUSED["AdaBayes"](copies([p, q]), batch_size=8)
    optimizer.load_adam_state_dict(adam.state_dict())
    first, second = optimizer.param_groups[0]["params"]
    assert not optimizer.state.get(first)
    assert optimizer.state[second]["step"] == 1


def test_amsgrad_is_left_out_with_a_warning():
    params, adam = trained(torch.optim.Adam, amsgrad=True)
    optimizer = FUSED["AdaBayesFP"](grouped(copies(params)))
    with pytest.warns(UserWarning, match="max_exp_avg_sq") as found:
        optimizer.load_adam_state_dict(adam.state_dict())
    assert found[0].filename == __file__
    assert all(set(state) == {"step", "exp_avg", "exp_avg_sq", "post_var"} for state in optimizer.state.values())


def reshaped(state_dict):
    state_dict["state"][1]["exp_avg_sq"] = torch.zeros(2)
    return state_dict


def without(key):
    def change(state_dict):
        del state_dict["state"][2][key]
        return state_dict

    return change


def of(cls, **options):
    return lambda _: trained(cls, **options)[1].state_dict()


def one_group(_):
    params = parameters()
    adam = torch.optim.Adam(params)
    train(adam, params, 2, seed=1)
    return adam.state_dict()


WRONG = {
    "another shape": (reshaped, "exp_avg_sq of parameter 1 has shape"),
    "two step counts": (lambda d: d["state"][1].update(step=torch.ones(2)) or d, "step of parameter 1 must be one number"),
    "no step": (without("step"), "the state of parameter 2 has exp_avg, exp_avg_sq"),
    "no exp_avg": (without("exp_avg"), "the state of parameter 2 has"),
    "another's slot": (lambda d: d["state"][0].update(mu_product=torch.ones(())) or d, "the state of parameter 0 has"),
    "other groups": (one_group, r"groups of \[4\] parameters; here they have \[2, 2\]"),
    "NAdam": (of(torch.optim.NAdam), "group 0 lacks amsgrad"),
    "RAdam": (of(torch.optim.RAdam), "group 0 lacks amsgrad"),
    "Adamax": (of(torch.optim.Adamax), "group 0 lacks amsgrad"),
    "SGD": (of(torch.optim.SGD, momentum=0.9), "group 0 lacks amsgrad"),
    "ours": (of(FUSED["AdaBayesFP"]), "group 0 lacks amsgrad"),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("name", FUSED)
def test_what_is_not_adams_changes_nothing(name, wrong):
    change, words = WRONG[wrong]
    params = parameters()
    optimizer = FUSED[name](grouped(params), **OPTIONS[name])
    train(optimizer, params, 2, seed=1)
    before = copy.deepcopy(optimizer.state_dict())
    bad = change(copy.deepcopy(trained()[1].state_dict()))
    with pytest.raises(ValueError, match=words):
        optimizer.load_adam_state_dict(bad)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for i, entry in before["state"].items():
        assert all(torch.equal(after["state"][i][key], value) for key, value in entry.items())


def test_averages_of_the_other_sign_are_refused():
    p, q = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    adam = torch.optim.Adam([q], maximize=True)
    q.grad = torch.ones(3)
    adam.step()
    optimizer = FUSED["AdaBayesFP"]([p])
    with pytest.raises(ValueError, match="group 0 of Adam has maximize=True, here it is False"):
        optimizer.load_adam_state_dict(adam.state_dict())
    with pytest.raises(ValueError, match="takes what state_dict"):
        optimizer.load_adam_state_dict({})
    assert not optimizer.state
