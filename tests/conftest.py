"""Where the tests run: every backend on every device this machine has for it. GPU tests skip where there is no GPU."""

import os

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton's kernels then run on CPU tensors

from adabayes_fused import backends  # noqa: E402
from adabayes_fused.backends import triton as triton_backend  # noqa: E402

TARGETS = [("cpp", "cpu"), ("foreach", "cpu"), ("triton", "cuda" if HAS_GPU else "cpu"), ("cuda", "cuda"), ("foreach", "cuda")]


@pytest.fixture(params=TARGETS, ids=lambda target: "-".join(target))
def target(request):
    """(backend, device), skipped where it cannot run."""
    backend, device = request.param
    if device == "cuda" and not HAS_GPU:
        pytest.skip("needs an NVIDIA GPU; this machine has none")
    reason = backends.BACKENDS[backend].unavailable(torch.device(device))
    if reason:
        pytest.skip(f"backend {backend}: {reason}")
    return backend, torch.device(device)


@pytest.fixture
def interpreted(target):
    """Whether Triton's interpreter runs the kernel, at milliseconds a tensor: such tests take fewer steps."""
    return target[0] == "triton" and target[1].type == "cpu"


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    """Small tensors then span several chunks under the interpreter too."""
    if triton_backend.interpreted():
        monkeypatch.setattr(triton_backend, "CHUNK", 1024)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
