"""A fuzzer over inputs: whatever a step is given, every backend does the same, and the slow path agrees (``fuzz.py``)."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fuzz import BF16, Case, Grad, Param, Step, check

from adabayes_fused.backends import cpp, triton

FUZZ = Path(__file__).with_name("fuzz.py")
NO_CPP = cpp.unavailable(torch.device("cpu"))
NO_TRITON = triton.unavailable(torch.device("cpu"))


def python(code, *arguments):
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=FUZZ.parent, timeout=300)


@pytest.mark.skipif(NO_CPP is not None, reason="the compiled module is not there")
def test_whatever_a_step_is_given():
    done = python("import sys, fuzz; sys.exit(fuzz.main())", "--cases", "500", "--seed", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "500 cases" in done.stdout


def test_the_fuzzer_can_fail_and_prints_a_call_that_repeats_it():
    """``foreach`` against itself, but for the sign of a gradient."""
    fault = (
        "import fuzz, sys\n"
        "act = fuzz.Run.act\n"
        "def wrong(run, side, step):\n"
        "    if side is run.subject: [p.grad.neg_() for p in side.params if p.grad is not None]\n"
        "    return act(run, side, step)\n"
        "fuzz.Run.act, fuzz.SUBJECT = wrong, fuzz.st.just(('foreach', ''))\n"
    )
    done = python(fault + "sys.exit(fuzz.main())", "--cases", "100", "--stop", "1")
    assert done.returncode == 1, done.stdout + done.stderr
    (call,) = re.findall(r'python -c "(.*)"', done.stdout)
    assert "Found: " in python(fault + call).stderr
    assert python(call).returncode == 0


@pytest.mark.skipif(NO_TRITON is not None, reason=str(NO_TRITON))
def test_subnormal_bfloat16_under_tritons_interpreter():
    """Once found: the interpreter widens them to other numbers."""
    params, grads = (Param(), Param(dtype=BF16)), (Grad(dtype=BF16, values="denormal"), Grad(values="mixed"))
    check(Case("AdaBayesFP", {"batch_size": 8}, {}, ({},), params, (Step(grads),), ("triton", "")))
