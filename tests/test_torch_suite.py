"""PyTorch's own optimizer tests over ours, on the CPU. README.md beside this file says what is left out, and why."""

import math
import unittest

import pytest
import torch
import torch_suite

import adabayes_fused
from adabayes_fused import AdaBayesFP

common = torch_suite.common_optimizers()
from torch.testing._internal.common_methods_invocations import DecorateInfo  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")  # the tests' closures return such


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """The tensors are tiny: on a busy machine a second thread doubles the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class AdaBayes(adabayes_fused.AdaBayes):
    """With a default for the one option that is required: many tests pass parameters alone."""

    def __init__(self, *args, batch_size=8, **options):
        super().__init__(*args, batch_size=batch_size, **options)


class AdaBayesLeanForeach(AdaBayes):
    """``lean`` and ``backend`` are of the whole optimizer, and many tests put what they construct with into groups."""

    def __init__(self, *args, **options):
        super().__init__(*args, lean=True, backend="foreach", **options)


class AdaBayesFPLeanForeach(AdaBayesFP):
    def __init__(self, *args, **options):
        super().__init__(*args, lean=True, backend="foreach", **options)


def options(cls):
    """What the tests construct ``cls`` with. Decay is always given: where it is not, they take it for zero."""
    paths = [  # through our code: plain, another sign, scalars on the device
        dict(weight_decay=0.05),
        dict(weight_decay=0.1, lr=0.01, maximize=True),
        dict(weight_decay=0.0, lr=torch.tensor(0.001), betas=(torch.tensor([[[0.9]]]), torch.tensor([[0.99]])), capturable=True),
    ]
    if issubclass(cls, AdaBayesFP):
        return [
            dict(weight_decay=0.0, lr=torch.tensor(0.001), sgd_lr=math.inf),
            dict(weight_decay=0.1, eps=1e-3, batch_size=8),
            *paths,
        ]
    return [
        dict(weight_decay=0.0, lr=torch.tensor(0.001), batch_size=300, sgd_lr=0.5, transition="exact"),
        dict(weight_decay=0.1, variance_follows_lr=False),
        *paths,
    ]


ERRORS = [
    (dict(lr=-1e-3), "Invalid learning rate: -0.001"),
    (dict(lr=1e-2, betas=(1.0, 0.0)), "Invalid beta parameter at index 0: 1.0"),
    (dict(lr=1e-2, betas=(0.0, torch.tensor([0.9, 0.9]))), r"Tensor betas\[1\] must be 1-element"),
    (dict(lr=1e-2, weight_decay=-1), "Invalid weight_decay value: -1"),
    (dict(sgd_lr=0.0), "Invalid sgd_lr: 0.0"),
    (dict(batch_size=0), "Invalid batch_size: 0"),
]


def error_inputs(device, dtype):
    sparse = torch.nn.Parameter(torch.randn(3, 2, device=device, dtype=dtype))
    sparse.grad = torch.ones_like(sparse).to_sparse()
    return [
        *common.get_error_inputs_for_all_optims(device, dtype),
        *(
            common.ErrorOptimizerInput(common.OptimizerInput([sparse], given), error_type=ValueError, error_regex=words)
            for given, words in ERRORS
        ),
        common.ErrorOptimizerInput(
            common.OptimizerInput([sparse], {}),
            error_on=common.OptimizerErrorEnum.STEP_ERROR,
            error_type=RuntimeError,
            error_regex="has a sparse gradient",
        ),
    ]


def info(cls, skips=()):
    def inputs(device, dtype=None):
        return [common.OptimizerInput(None, given) for given in options(cls)]

    adam = next(info for info in common.optim_db if info.optim_cls is torch.optim.Adam)
    return common.OptimizerInfo(
        cls,
        optim_inputs_func=inputs,
        optim_error_inputs_func=error_inputs,
        scheduler_inputs=adam.scheduler_inputs,
        supported_impls=(),  # foreach=, fused= and differentiable=: we have backend=
        not_og_supported_flags=adam.not_og_supported_flags,
        has_capturable_arg=True,
        supports_complex=True,
        supports_sparse=False,
        decorators=[DecorateInfo(unittest.skip(reason), "TestOptimRenewed", test) for test, reason in dict(skips).items()],
    )


SKIPS = {"test_param_groups_lr": "the first steps of Algorithm 1 are of size sgd_lr, whatever lr the group begins with"}

TestOptimRenewedCPU = torch_suite.load(
    torch_suite.path(), [info(AdaBayes, SKIPS), info(AdaBayesFP), info(AdaBayesLeanForeach, SKIPS), info(AdaBayesFPLeanForeach)]
)
