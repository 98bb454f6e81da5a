"""The example on digits: its arithmetic of the paper's Figure 3, and a short run from end to end."""

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transcription import fixed_point

import adabayes_fused

for needed in ("matplotlib", "rich", "sklearn"):
    pytest.importorskip(needed)

SCRIPT = Path(__file__).parents[1] / "examples" / "digits.py"
ROWS = ["AdaBayes, fused", "AdaBayes, slow path", "AdaBayes-FP, fused", "AdamW, torch's fused", "SGD, torch's"]


@pytest.fixture(scope="module")
def digits():
    spec = importlib.util.spec_from_file_location("digits_example", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where NamedTuple's annotations are looked up
    spec.loader.exec_module(module)
    return module


def test_fixed_point_is_equation_20(digits):
    lr, sigma_sq = 1e-3, 2e-3
    for gradient in (1e-4, 0.3, 1.0, 50.0, 1e6):
        assert digits.fixed_point(lr / gradient, sigma_sq) == pytest.approx(fixed_point(gradient, lr, sigma_sq), rel=1e-12)
    assert digits.fixed_point(math.inf, sigma_sq) == pytest.approx(sigma_sq)


def test_figure3_points_are_in_the_papers_units(digits):
    """Gradients of random sign and constant size settle on Eq. 20, weights without a gradient are left out."""
    lr, sgd_lr, batch_size = 4e-3, 0.05, 32  # kappa = 0.01: settled after a few hundred steps
    mean_gradient = torch.tensor([0.0, 1e-3, 0.02, 0.3], dtype=torch.float64)
    p = torch.nn.Parameter(torch.zeros(4, dtype=torch.float64))
    optimizer = adabayes_fused.AdaBayes([p], lr=lr, sgd_lr=sgd_lr, batch_size=batch_size)
    for _ in range(2000):
        p.grad = mean_gradient * (torch.randint(0, 2, (4,)) * 2 - 1)
        optimizer.step()
    points = digits.figure3_points(optimizer)
    gradient = batch_size * mean_gradient[1:].numpy()
    assert points.left_out == 1
    assert points.sigma_sq == digits.prior_variance(optimizer.param_groups[0]) == pytest.approx(sgd_lr / batch_size)
    assert points.x == pytest.approx(lr / gradient, rel=1e-9)
    expected = [fixed_point(g, lr, sgd_lr / batch_size) for g in gradient]
    assert points.post == pytest.approx(expected, rel=0.03)  # Eq. 20 leaves out eta sqrt(<g^2>) / 2, here up to 0.02
    mean, spread, count = digits.ratio_to_fixed_point(points)
    assert mean == pytest.approx(1, abs=0.03)
    assert spread < 0.03
    assert count == 3


def test_one_epoch_from_end_to_end(tmp_path):
    subprocess.run(
        [sys.executable, SCRIPT, "--epochs", "1", "--device", "cpu", "--output", tmp_path / "demo"], check=True, cwd=tmp_path
    )
    assert (tmp_path / "demo" / "digits.png").read_bytes().startswith(b"\x89PNG")
    numbers = json.loads((tmp_path / "demo" / "digits.json").read_text())
    assert numbers["torch"] == torch.__version__
    assert [row["optimizer"] for row in numbers["rows"]] == ROWS
    for row in numbers["rows"]:
        assert all(math.isfinite(row[key]) for key in ("test_error_percent", "test_loss", "step_ms", "speed_up"))
    fused = numbers["rows"][0]
    assert fused["compared_early_at_step"] == numbers["steps"] == 20
    assert 0 < fused["early_weight_difference"] < 1e-6  # a few float32 roundings of weights below 1
