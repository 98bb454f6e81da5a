"""python -m adabayes_fused tells the truth."""

import os
import subprocess
import sys

import pytest

from adabayes_fused import __main__ as report
from adabayes_fused.backends import foreach


def run(**environment):
    return subprocess.run(
        [sys.executable, "-m", "adabayes_fused"], capture_output=True, text=True, env={**os.environ, **environment}
    )


def test_report():
    done = run(TRITON_INTERPRET="0")
    lines = {line.split()[0]: line for line in done.stdout.split("parameters on cuda")[0].splitlines() if line.startswith("  ")}
    assert set(lines) == {"cpp", "cuda", "triton", "foreach"}
    compiled = lines["cpp"].split()[1] == "ok"
    assert done.returncode == (0 if compiled else 1), done.stdout + done.stderr
    assert ("No kernel runs here" in done.stdout) != compiled
    assert "ok" in lines["foreach"]
    assert "TRITON_INTERPRET=1" in lines["triton"]
    assert "backend='auto'" in lines["cuda"] or "nvcc" in lines["cuda"]


@pytest.mark.parametrize("wrong", ["sign", "nan", "raises"])
def test_a_wrong_backend_is_reported(wrong, monkeypatch, capsys):
    def rule(c, scratch, grad, param, *slots):
        if wrong == "raises":
            raise RuntimeError("no such operator")
        param.add_(1e-9 if wrong == "sign" else float("nan"))

    monkeypatch.setattr(foreach, "RULES", dict.fromkeys(foreach.RULES, rule))
    assert report.main() == 1
    line = next(line for line in capsys.readouterr().out.splitlines() if line.strip().startswith("foreach"))
    assert ("no such operator" if wrong == "raises" else "WRONG") in line
