"""CUDA graphs. On a GPU: replays are eager steps. Anywhere: what cannot be captured is refused, in words."""

import io

import pytest
import torch
from conftest import HAS_GPU
from runs import FUSED

from adabayes_fused import stepper

OPTIONS = {"AdaBayes": dict(batch_size=8), "AdaBayesFP": {}}
SHAPES = [(300, 70), (5,), (), (0, 3)]


def make_params(device):
    generator = torch.Generator().manual_seed(3)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(device)) for shape in SHAPES]


def make(name, params, lr=1e-2, **policy):
    return FUSED[name](params, lr=lr, **OPTIONS[name], **policy)


def draw(params, t):
    generator = torch.Generator().manual_seed(t)
    return [(torch.randn(p.shape, generator=generator) * (10.0 if t % 2 else 1e-3)).to(p) for p in params]


@pytest.fixture
def capturing(monkeypatch):
    """As far as the step can tell; torch would look for a driver if it were told so itself."""
    monkeypatch.setattr(stepper, "capturing", lambda: True)


@pytest.mark.parametrize("name", FUSED)
def test_capture_without_state_is_refused(name, capturing):
    params = make_params("cpu")
    optimizer = make(name, params, capturable=True)
    for p, grad in zip(params, draw(params, 0), strict=True):
        p.grad = grad
    with pytest.raises(RuntimeError, match=r"parameter 0 of group 0, shape \(300, 70\), has no state yet: run a few steps"):
        optimizer.step()
    assert not optimizer.state


@pytest.mark.parametrize("option", ["lr", "weight_decay", "r"])
def test_capture_of_an_option_on_the_cpu_is_refused(option, request):
    params = make_params("cpu")
    optimizer = make("AdaBayesFP", params, capturable=True)
    for p, grad in zip(params, draw(params, 0), strict=True):
        p.grad = grad
    optimizer.step()
    optimizer.param_groups[0][option] = torch.tensor(0.5)
    request.getfixturevalue("capturing")
    before = [p.detach().clone() for p in params]
    with pytest.raises(RuntimeError, match=f"{option} of group 0 is a tensor on the CPU"):
        optimizer.step()
    assert all(map(torch.equal, before, params))
    assert all(float(entry["step"]) == 1 for entry in optimizer.state.values())


@pytest.mark.skipif(not HAS_GPU, reason="needs an NVIDIA GPU; this machine has none")
@pytest.mark.parametrize("backend", ["cuda", "triton", "foreach"])
@pytest.mark.parametrize("policy", [{}, dict(max_grad_norm=1.0, skip_nonfinite=True)])
@pytest.mark.parametrize("name", FUSED)
def test_replays_are_eager_steps(name, policy, backend):
    """Twenty replays under a schedule, gradients clipped or skipped by turns, and after a checkpoint has been loaded."""
    params, others = make_params("cuda"), make_params("cuda")
    lr = torch.tensor(1e-2, dtype=torch.float64, device="cuda")
    captured = make(name, params, lr, backend=backend, capturable=True, **policy)
    eager = make(name, others, lr, backend=backend, capturable=True, **policy)
    for p in params:
        p.grad = torch.zeros_like(p)

    def load(t):
        for p, q, grad in zip(params, others, draw(params, t), strict=True):
            if policy and t % 7 == 3 and grad.numel():
                grad.reshape(-1)[-1] = float("nan")
            p.grad.copy_(grad)
            q.grad = grad.clone()
        for optimizer in (captured, eager):
            optimizer.param_groups[0]["lr"].fill_(1e-2 / (t + 1))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for t in range(3):
            load(t)
            captured.step()
            eager.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    saved = None
    for t in range(3, 23):
        load(t)
        graph.replay()
        eager.step()
        if t == 8:
            saved = {k: v for k, v in captured.state_dict().items()}
            saved = torch.load(_through_a_file(saved), weights_only=True)
        if t == 14:
            captured.load_state_dict(saved)
            eager.load_state_dict(saved)
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)
        for key, value in eager.state[q].items():
            assert torch.equal(captured.state[p][key], value), key
    assert int(captured.skipped_steps) == int(eager.skipped_steps) == (3 if policy else 0)


def _through_a_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return file
