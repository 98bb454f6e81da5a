"""torch's default dtype and device are the user's: whatever they are, a run has the same bits."""

import contextlib
import copy
import importlib
import warnings

import pytest
import torch
from runs import FUSED, SLOW

from adabayes_fused import diagnostics, posterior, release_gradients

OPTIONS = {"AdaBayes": dict(batch_size=64), "AdaBayesFP": dict(batch_size=64)}
KINDS = [
    ("AdaBayes", {}),
    ("AdaBayes", dict(variance_follows_lr=False)),
    ("AdaBayes", dict(transition="exact", lean=True)),
    ("AdaBayesFP", dict(sgd_lr=float("inf"))),
    ("AdaBayesFP", dict(lean=True)),
]


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


DEFAULTS = {
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float16": lambda: default_dtype(torch.float16),
    "meta": lambda: torch.device("meta"),
}


def params():
    generator = torch.Generator().manual_seed(3)
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.complex64)
    found = [torch.nn.Parameter(torch.randn(7, generator=generator).to(dtype)) for dtype in dtypes]
    for p in found:
        p.grad = torch.randn(7, generator=generator).to(p.dtype)
    return found


def numbers(kind, tensors):
    """3e-4 and the like have no exact float32: what passes through it is seen."""
    given = dict(lr=3e-4, weight_decay=0.07, betas=(0.87, 0.997)) | OPTIONS[kind]
    if not tensors:
        return given
    made = {key: torch.tensor(value, dtype=torch.float64) for key, value in given.items()}
    return made | dict(betas=tuple(torch.tensor(beta, dtype=torch.float64) for beta in given["betas"]))


def bits(*trees):
    leaves = []
    for tree in trees:
        if isinstance(tree, torch.Tensor):
            leaves.append((tree.dtype, tree.device.type, tree.detach().clone()))
        elif isinstance(tree, dict):
            leaves += bits(*tree.values())
        elif isinstance(tree, (list, tuple)):
            leaves += bits(*tree)
        else:
            leaves.append((type(tree), None, tree))
    return leaves


def assert_same_bits(found, expected):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a[:2] == b[:2]
        assert torch.equal(a[2].nan_to_num(), b[2].nan_to_num()) if isinstance(a[2], torch.Tensor) else str(a[2]) == str(b[2])


def life_of_a_fused_optimizer(name, options, tensors, context):
    """Made, stepped, read, saved, loaded, begun from Adam's state: all under the defaults; parameters are made before."""
    ps, others, adams = params(), params(), params()
    given = numbers(name, tensors)
    adam = torch.optim.Adam(adams, lr=3e-4, betas=(0.87, 0.997))
    adam.step()
    with context, warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        optimizer = FUSED[name](ps, **given, **options)
        optimizer.step()
        optimizer.param_groups[0]["lr"] *= 0.7
        optimizer.step()
        saved = copy.deepcopy(optimizer.state_dict())
        other = FUSED[name](others, **given, **options)
        other.load_state_dict(saved)
        other.step()
        read = [*map(tuple, (posterior(optimizer, p) for p in ps)), diagnostics(optimizer)]
        begun = FUSED[name](adams, **given, **options)
        begun.load_adam_state_dict(adam.state_dict())
        begun.set_batch_size(7)
        begun.step()
    seen = [[*optimizer.state_dict()["state"].values()] for optimizer in (optimizer, other, begun)]
    return bits(ps, others, adams, seen, read, optimizer.grad_norm, optimizer.skipped_steps)


@pytest.mark.parametrize("policy", [{}, dict(max_grad_norm=0.1, skip_nonfinite=True)], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("capturable", [False, True], ids=["", "capturable"])
@pytest.mark.parametrize("tensors", [False, True], ids=["floats", "tensors"])
@pytest.mark.parametrize("backend", ["cpp", "foreach"])
@pytest.mark.parametrize(("name", "options"), KINDS, ids=str)
def test_a_fused_optimizer(name, options, backend, tensors, capturable, policy):
    options = dict(backend=backend, capturable=capturable, **options, **policy)
    expected = life_of_a_fused_optimizer(name, options, tensors, contextlib.nullcontext())
    for default in DEFAULTS.values():
        assert_same_bits(life_of_a_fused_optimizer(name, options, tensors, default()), expected)


@pytest.mark.parametrize("tensors", [False, True], ids=["floats", "tensors"])
@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("name", FUSED)
def test_the_slow_path(name, default, tensors):
    def run(context):
        ps = params()[:2]
        given = numbers(name, tensors)
        with context:
            optimizer = SLOW[name](ps, **given)
            for _ in range(2):
                optimizer.step()
        return bits(ps, *(optimizer.state[p] for p in ps))

    assert_same_bits(run(DEFAULTS[default]()), run(contextlib.nullcontext()))


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("name", FUSED)
def test_released_gradients(name, default):
    def run(context):
        torch.manual_seed(0)
        model, x, given = torch.nn.Linear(3, 2), torch.randn(5, 3), numbers(name, True)
        with context:
            optimizer = FUSED[name](model.parameters(), **given)
            with release_gradients(model, optimizer):
                model(x).square().sum().backward()
                optimizer.step()
        return bits([*model.parameters()])

    assert_same_bits(run(DEFAULTS[default]()), run(contextlib.nullcontext()))


@pytest.mark.parametrize("default", ["bfloat16", "float16"])
def test_a_reading_that_does_not_wait(default, monkeypatch):
    """As on an accelerator, where the step count is a tensor that the host does not know."""
    (p, *_) = params()
    optimizer = FUSED["AdaBayes"]([p], lean=True, **numbers("AdaBayes", False))
    optimizer.step()
    known = posterior(optimizer, p).variance
    monkeypatch.setattr(
        importlib.import_module("adabayes_fused.posterior"),
        "_number",
        lambda v: None if isinstance(v, torch.Tensor) else float(v),
    )
    with DEFAULTS[default]():
        assert torch.equal(posterior(optimizer, p).variance, known)
