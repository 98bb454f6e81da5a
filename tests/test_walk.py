"""A random walk: whatever happens between two steps, ``cpp`` does what ``foreach`` does (``walk.py``)."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from adabayes_fused.backends import cpp

WALK = Path(__file__).with_name("walk.py")


def walk(*arguments):
    return subprocess.run([sys.executable, WALK, *arguments], capture_output=True, text=True, timeout=600)


@pytest.mark.skipif(cpp.unavailable(torch.device("cpu")) is not None, reason="the compiled module is not there")
def test_whatever_happens_between_two_steps():
    done = walk("--cases", "1000")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_walk_can_fail_and_says_how_to_repeat_it():
    """``foreach`` against itself, but for the sign of a gradient."""
    code = (
        "import sys; sys.argv[1:] = ['--cases', '20', '--stop', '1', '--subject', 'foreach', '--without', 'empty']\n"
        "import walk\n"
        "act = walk.Walk.gradients\n"
        "def gradients(self, which): act(self, which); [p.grad.neg_() for p in self.subject.params[:1] if p.grad is not None]\n"
        "walk.Walk.gradients = gradients\n"
        "sys.exit(walk.main())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=WALK.parent, timeout=300)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "step: all" in done.stdout
    assert "python tests/walk.py --seed " in done.stdout
