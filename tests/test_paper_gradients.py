"""Appendix A and B on models whose gradients, curvatures and their distribution are known on paper."""

import copy
import json
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

for needed in ("matplotlib", "scipy"):
    pytest.importorskip(needed)

from bench.paper import gradients  # noqa: E402


class Features(NamedTuple):
    train_x: Tensor
    train_y: Tensor

    def normalized(self, images):
        return images


def linear(features, classes=2, weight=0.0):
    model = nn.Linear(features, classes)
    nn.init.normal_(model.weight, std=weight) if weight else nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    return model


def symmetric(distribution, n=100_000, features=40):
    """With zero weights and two classes a gradient is +-x / 2: distributed as x is, if that is symmetric."""
    x = torch.tensor(distribution(np.random.default_rng(0), (n, features)), dtype=torch.float32)
    return Features(x, torch.arange(n) % 2)


def measure(model, data, batch_size=16, seed=0, **others):
    return gradients.measure(model, data, batch_size, seed, **dict(dict(weights=60, batches=64), **others))


def picked(model, data, weights=60, seed=0):
    return gradients.Network(model, data, weights, seed, "cpu").picked


@pytest.fixture
def data():
    return Features(torch.randn(300, 6), torch.randint(3, (300,)))


# --- Appendix B -------------------------------------------------------------------------------------------------------


def sizes(found):
    return {row["batch_size"]: row for row in found["normality"]["by_batch_size"]}


@pytest.mark.parametrize(
    ("draw", "least", "most"), [(lambda r, n: r.normal(size=n), 0, 20), (lambda r, n: r.standard_t(3, size=n), 95, 100)]
)
def test_gaussian_gradients_pass_and_heavy_tails_do_not(draw, least, most):
    found = sizes(measure(linear(40), symmetric(draw), batch_size=1, batches=256))
    assert least <= found[1]["rejected_percent"] <= most


def test_the_central_limit_theorem():
    """A Laplace variable's excess kurtosis is 3, that of a sum of B is 3 / B; its quantiles are in every textbook."""
    found = sizes(measure(linear(40), symmetric(lambda r, n: r.laplace(size=n)), batch_size=16, batches=1500))
    assert list(found) == [1, 8, 16]
    for size, row in found.items():
        assert row["median_excess_kurtosis"] == pytest.approx(3 / size, abs=0.4 if size == 1 else 0.12)
        assert row["weights"] + row["silent"] == 60
    at_2 = gradients.Z.tolist().index(2.0)
    assert found[1]["quantiles"][at_2] == pytest.approx(-np.log(2 * 0.0227501) / np.sqrt(2), rel=0.04)
    assert found[16]["quantiles"][at_2] == pytest.approx(2, rel=0.04)
    assert found[1]["rejected_percent"] == 100 > found[8]["rejected_percent"] > found[16]["rejected_percent"]


def test_gradients_are_of_the_summed_loss():
    data = symmetric(lambda r, n: r.normal(size=n), features=3)
    network = gradients.Network(linear(3), data, 8, 0, "cpu")
    rows = torch.tensor([5, 7, 7, 100])
    one_hot = nn.functional.one_hot(data.train_y[rows], 2).float()
    weight, bias = (0.5 - one_hot).T @ data.train_x[rows], (0.5 - one_hot).sum(0)
    torch.testing.assert_close(network.of_picked(rows), torch.cat([weight.flatten(), bias])[network.picked])


def test_silent_weights_are_counted_and_left_out(data):
    data.train_x[:, 1] = 0
    found = measure(linear(6, 3), data, weights=21)
    assert all((row["silent"], row["weights"]) == (3, 18) for row in sizes(found).values())
    assert all((row["silent"], row["weights"]) == (3, 18) for row in found["linearity"])
    assert found["curvature"]["zero"] == 3
    with pytest.raises(ValueError, match="No weight that was picked has a gradient that changes"):
        measure(linear(6, 3), data._replace(train_x=torch.zeros(300, 6), train_y=torch.zeros(300, dtype=torch.int64)))


# --- Appendix A -------------------------------------------------------------------------------------------------------


def test_curvature_of_softmax_regression(data):
    """H_ii = sum of x^2 p (1 - p), the gradient's of one example (p - y) x, with x = 1 for the bias."""
    model, batch_size = linear(6, 3, weight=0.3), 10
    order = picked(model, data, 21)
    p = model(data.train_x).softmax(1).detach().double()
    x = torch.cat([data.train_x, torch.ones(300, 1)], 1).double()

    def flat(values):  # (classes, features and bias) in the order of the parameters, as picked
        return torch.cat([values[:, :-1].flatten(), values[:, -1]])[order].numpy()

    hessian = flat((p * (1 - p)).T @ x**2) * batch_size / 300
    single = (p - nn.functional.one_hot(data.train_y, 3))[:, :, None] * x[:, None]
    variance, mean = flat(single.var(0)) * batch_size, flat(single.mean(0))
    mean_sq = variance * 299 / 300 + (batch_size * mean) ** 2  # over minibatches drawn with replacement

    found = measure(model, data, batch_size, weights=21, batches=3000)["curvature"]
    assert (found["images"], found["weights"], found["negative"], found["zero"]) == (300, 21, 0, 0)
    np.testing.assert_allclose(found["hessian"], hessian, rtol=1e-4)
    np.testing.assert_allclose(found["variance"], variance, rtol=1e-4)
    np.testing.assert_allclose(found["mean_sq"], mean_sq, rtol=0.15)
    ratio = np.median(np.log(variance / hessian))
    assert found["variance_against_hessian"]["median_ratio"] == pytest.approx(np.exp(ratio), rel=1e-3)


def test_with_the_models_own_labels_the_variance_is_the_curvature():
    """The Fisher identity, exact: predictions of 1/2, 1/4 and 1/4, and each image in four copies that are labelled so."""
    x = torch.randn(100, 6) * torch.logspace(-1, 1, 6)
    data = Features(x.repeat(4, 1), torch.tensor([0, 0, 1, 2]).repeat_interleave(100))
    model = linear(6, 3)
    model.bias.data = torch.tensor([0.5, 0.25, 0.25]).log()
    found = measure(model, data, weights=21)["curvature"]
    np.testing.assert_allclose(np.array(found["variance"]) * 399 / 400, found["hessian"], rtol=1e-4)
    one = found["variance_against_hessian"]
    assert (one["spearman"], one["log_slope"], one["median_ratio"]) == pytest.approx((1, 1, 1), abs=5e-3)

    wrong = measure(model, data._replace(train_y=torch.zeros(400, dtype=torch.int64)), weights=21)["curvature"]
    assert abs(wrong["variance_against_hessian"]["median_ratio"] - 1) > 0.1


class Added(nn.Module):
    """A linear model, to whose first logit something of one more weight, at 0, is added."""

    def __init__(self, function):
        super().__init__()
        self.linear, self.w, self.function = linear(6), nn.Parameter(torch.zeros(1)), function

    def forward(self, x):
        return self.linear(x) + torch.stack([self.function(self.w), torch.zeros(1)], 1)


def test_negative_curvature_is_counted(data):
    """With every label 0 and p = 1/2, the loss falls by w^2 / 2 in each example: H = -1."""
    model, data = Added(torch.square), data._replace(train_y=torch.zeros(300, dtype=torch.int64))
    found = measure(model, data, batch_size=8)["curvature"]
    assert (found["negative"], found["weights"], found["variance_against_hessian"]["weights"]) == (
        1,
        15,
        12,
    )  # the biases' variance is 0
    assert min(found["hessian"]) == pytest.approx(-8, rel=1e-5)


def test_a_stand_in_beside_the_curvature():
    hessian = np.array([1e-3, 0.1, -5.0, 10.0, 0.0, 1.0])
    found = gradients.against(2 * np.abs(hessian) ** 1.5, hessian)  # the ratio is 2 h^(1/2)
    assert found["weights"] == 4
    assert (found["spearman"], found["log_slope"]) == pytest.approx((1, 1.5))
    assert found["median_ratio"] == pytest.approx(2 * (0.1 * 1) ** 0.25)
    assert gradients.against(1 / hessian[[0, 1, 3]], hessian[[0, 1, 3]])["spearman"] == pytest.approx(-1)


def test_smooth_gradients_are_linear_with_the_curvatures_slope(data):
    model = nn.Sequential(nn.Linear(6, 20), nn.GELU(), nn.Linear(20, 3))
    for row in measure(model, data)["linearity"][:2]:
        assert row["weights"] == 50
        assert np.median(row["r_squared"]) > 0.999
        assert row["slope_per_hessian_p10_p50_p90"][1] == pytest.approx(1, abs=0.02)


def test_a_kink_is_not_linear(data):
    """The gradient of c |w| has the sign of w: a line through (-1, -1, 0, 1, 1) has R^2 = 9 / 10. All 15 weights are moved."""
    model, data = Added(lambda w: 1e-3 * w.abs()), data._replace(train_y=torch.zeros(300, dtype=torch.int64))
    for row in measure(model, data, batch_size=8)["linearity"]:
        assert row["weights"] == 15
        assert min(row["r_squared"]) == pytest.approx(0.9, abs=1e-3)
        assert sum(r > 0.95 for r in row["r_squared"]) == 14


def test_change_of_a_gradient_in_standard_deviations():
    """Zero weights, two classes: g' = x^2 / 4 an example, g = +-x / 2; with x = +-1, B / 4 against B^(1/2) / 2."""
    data = symmetric(lambda r, n: r.choice([-1.0, 1.0], size=n), features=20)
    for row in measure(linear(20), data, batch_size=64, weights=42, batches=2000)["linearity"]:
        assert row["median_change_in_sd"] == pytest.approx(row["span"] * 64**0.5 / 2, rel=0.03)


# --- What is left behind ----------------------------------------------------------------------------------------------


def test_the_model_stays_as_it_is_and_is_measured_in_eval_mode(data):
    model = nn.Sequential(nn.Linear(6, 10), nn.BatchNorm1d(10), nn.ReLU(), nn.Dropout(), nn.Linear(10, 3)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = measure(model, data)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert found == measure(model.eval(), data)
    assert found["normality"] != measure(model, data, seed=1)["normality"]


def test_channels_last_is_the_same(data):
    data = data._replace(train_x=data.train_x.new_tensor(np.random.default_rng(0).normal(size=(300, 2, 5, 5))))
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(36, 3))
    assert measure(copy.deepcopy(model).to(memory_format=torch.channels_last), data) == measure(model, data)


def test_displaced_weights_go_back(data):
    network = gradients.Network(linear(6, 3, weight=0.3), data, 21, 0, "cpu")
    before = [p.clone() for p in network.params]
    for flat in network.picked.tolist():
        k, j = network.place(flat)
        assert torch.cat([p.flatten() for p in network.params])[flat] == network.params[k].flatten()[j]
        gradients.displaced(network, flat, np.array([0.1, 0.2]), torch.arange(5))
    assert all(torch.equal(p, was) for p, was in zip(network.params, before, strict=True))


def test_progress_json_and_picture(data, tmp_path):
    told = []
    found = measure(nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 3)), data, tell=told.append)
    assert told == sorted(told)
    assert told[0] > 0
    assert told[-1] == 1
    assert len(told) > 100
    read = json.loads(json.dumps(found, allow_nan=False))
    assert read == found
    gradients.picture(read, tmp_path / "gradients.png", "digits, a perceptron")
    assert (tmp_path / "gradients.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_of_few_weights(data, tmp_path):
    found = measure(linear(6, 3), data, weights=2)
    assert found["curvature"]["variance_against_hessian"] is None
    gradients.picture(found, tmp_path / "few.png", "")
