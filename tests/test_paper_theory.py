"""How normalisers grow: stationary points against closed forms and the slow path, exponents against what they must be."""

import json

import numpy as np
import pytest
import torch

for needed in ("matplotlib", "scipy"):
    pytest.importorskip(needed)

from adabayes_fused import reference  # noqa: E402
from bench.paper import theory  # noqa: E402

ETA_G = np.geomspace(1e-5, 1e3, 17)
PAPERS = theory.PAPERS


def at(name, eta_g=ETA_G, c=PAPERS):
    return theory.stationary(theory.FILTERS[name], (eta_g / c.eta) ** 2, c)


def test_a_random_walk_is_stationary_where_it_must_be():
    """s = 1 / (1 / (s + eta^2) + G^2) is a quadratic in s G / eta."""
    s = (np.sqrt(1 + (ETA_G / 2) ** 2) - ETA_G / 2) * PAPERS.eta / (ETA_G / PAPERS.eta)
    np.testing.assert_allclose(at("random walk"), 1 / s, rtol=1e-6)


def test_noise_proportional_to_the_posterior_gives_the_mean_square():
    g_sq, c = (ETA_G / PAPERS.eta) ** 2, PAPERS._replace(memory=0.02)
    np.testing.assert_allclose(at("fading memory", c=c), g_sq / 0.02, rtol=1e-8)
    np.testing.assert_allclose(at("variational online Newton", c=c), g_sq, rtol=1e-8)


def test_adabayes_is_stationary_where_the_slow_path_is():
    """The paper's Algorithm 1, run until it stays on gradients that do; eta^2 / sigma^2 = 0.128, so that 1,000 steps do."""
    c = theory.Constants(eta=0.01)
    gradients = torch.logspace(-4, 3, 12, dtype=torch.float64)  # of the mean loss
    p = torch.nn.Parameter(torch.zeros(12, dtype=torch.float64))
    optimizer = reference.AdaBayes([p], lr=c.eta, sgd_lr=0.1, batch_size=128)
    for _ in range(1000):
        p.grad = gradients.clone()
        optimizer.step()
    found = at("AdaBayes", c.eta * 128 * gradients.numpy(), c)
    np.testing.assert_allclose(found, 1 / optimizer.state[p]["post_var"].numpy(), rtol=1e-7)


@pytest.fixture(scope="module")
def found():
    return theory.numbers()


@pytest.mark.parametrize(
    ("name", "exponents"),
    [("random walk", (1 / 2, 1 / 2, 1)), ("AdaBayes", (0, 1 / 2, 1)), (theory.EQ_20, (0, 1 / 2, 1 / 2)),
     ("fading memory", (1, 1, 1)), ("variational online Newton", (1, 1, 1))],
)  # fmt: skip
def test_exponents(found, name, exponents):
    fitted = found["filters"][name]["fitted_exponent"]
    assert list(fitted) == ["flat", "root mean square", "mean square"]
    assert list(fitted.values()) == pytest.approx(exponents, abs=0.012)


def test_where_regimes_end(found):
    """The random walk's exponent is (1 + tanh t) / 2 with 2 sinh t = eta G, and e^t Adam's; Eq. 20's solves in the same way."""
    walk, fp, both = (found["filters"][name] for name in ("random walk", theory.EQ_20, "AdaBayes"))
    end, begin = 2 / np.sqrt(3), np.sqrt(3) / 2 * PAPERS.eta**2 / PAPERS.sigma_sq
    assert walk["eta_g_at_exponent_3/4"] == pytest.approx([end], rel=3e-3)
    assert walk["eta_g_at_1.1_of_adam"] == pytest.approx([1.1 - 1 / 1.1], rel=3e-3)
    assert fp["eta_g_at_exponent_1/4"] == pytest.approx([begin], rel=3e-3)
    assert fp["eta_g_at_1.1_of_adam"] == pytest.approx([PAPERS.eta**2 / PAPERS.sigma_sq * 1.1 / 0.21], rel=3e-3)
    assert both["eta_g_at_exponent_1/4"] == pytest.approx([begin], rel=1e-2)
    assert both["eta_g_at_exponent_3/4"] == pytest.approx([end], rel=1e-2)
    assert len(both["eta_g_at_1.1_of_adam"]) == 2
    assert walk["eta_g_at_exponent_1/4"] == fp["eta_g_at_exponent_3/4"] == []


def test_what_is_written(tmp_path):
    numbers, picture = theory.write(tmp_path)
    found = json.loads(numbers.read_text())
    assert picture.read_bytes().startswith(b"\x89PNG")
    for name, row in found["filters"].items():
        row["normaliser"] = [len(name) * value for value in row["normaliser"]]  # the picture has these, not its own
    above, below = theory.picture(found).axes[:2]
    drawn = {tuple(line.get_ydata()) for axes in (above, below) for line in axes.lines}
    assert {tuple(row[key]) for row in found["filters"].values() for key in ("normaliser", "exponent")} <= drawn
