"""Importing costs nothing and needs nothing optional. In fresh interpreters, since this one has imported everything."""

import subprocess
import sys

import pytest

TRAIN = """
import torch
from adabayes_fused import AdaBayes, AdaBayesFP
for make in (lambda p: AdaBayes(p, lr=1e-2, batch_size=8), lambda p: AdaBayesFP(p, lr=1e-2)):
    w = torch.nn.Parameter(torch.ones(5))
    optimizer = make([w])
    for _ in range(3):
        optimizer.zero_grad()
        w.square().sum().backward()
        optimizer.step()
    assert (w < 1).all(), w
"""


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_leaves_triton_and_cuda_alone():
    run(
        "import sys, torch\nbefore = 'triton' in sys.modules\nimport adabayes_fused\n"
        "assert before or 'triton' not in sys.modules\nassert not torch.cuda.is_initialized()"
    )


@pytest.mark.parametrize("blocked", ["triton", "adabayes_fused._native"])
def test_trains_without(blocked):
    run(f"import sys\nsys.modules[{blocked!r}] = None\n" + TRAIN)


def test_without_native_auto_is_foreach_and_cpp_says_what_to_do():
    out = run(
        "import sys\nsys.modules['adabayes_fused._native'] = None\n"
        + TRAIN
        + """
from adabayes_fused import backends
print(backends.choose("auto", torch.device("cpu")))
optimizer = AdaBayesFP([w], lr=1e-2, backend="cpp")
before = w.detach().clone()
try:
    optimizer.step()
except RuntimeError as error:
    print(error)
assert torch.equal(w, before)
"""
    )
    chosen, error = out.splitlines()
    assert chosen == "foreach"
    assert "backend='cpp'" in error
    assert "install a C++ compiler" in error
    assert "pip install" in error


def test_without_triton_its_backend_says_what_to_do():
    out = run(
        "import sys\nsys.modules['triton'] = None\n"
        + TRAIN
        + """
try:
    AdaBayesFP([w], lr=1e-2, backend="triton").step()
except RuntimeError as error:
    print(error)
"""
    )
    assert "pip install triton" in out
