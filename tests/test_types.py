"""mypy in strict mode: the package itself, and what a user's editor is told of it."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mypy")

ROOT = Path(__file__).parents[1]


def mypy(*arguments):
    done = subprocess.run([sys.executable, "-m", "mypy", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_package():
    status, printed = mypy()
    assert status == 0, printed


def test_users_code(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        "import torch\n"
        "from adabayes_fused import AdaBayes, AdaBayesFP, diagnostics, posterior\n"
        "model = torch.nn.Linear(3, 3)\n"
        "optimizer = AdaBayes(model.parameters(), lr=1e-3, batch_size=8, max_grad_norm=1.0)\n"
        "optimizer.set_batch_size(4)\n"
        "mean: torch.Tensor = posterior(optimizer, model.weight).variance\n"
        "share: float | None = diagnostics(optimizer).overall.sgd_like\n"
        "AdaBayes(model.parameters())  # no batch_size\n"
        "AdaBayesFP(model.named_parameters(), learning_rate=1.0)\n"
        'optimizer.set_batch_size("all")\n'
    )
    status, printed = mypy("--strict", str(script))
    errors = [line.split(" error: ")[1] for line in printed.splitlines() if " error: " in line]
    assert status == 1
    assert len(errors) == 3, printed
    assert 'Missing named argument "batch_size"' in errors[0]
    assert 'Unexpected keyword argument "learning_rate"' in errors[1]
    assert "incompatible type" in errors[2]
