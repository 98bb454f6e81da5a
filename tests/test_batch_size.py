"""set_batch_size: what the next step averages over, in every group."""

import math

import numpy as np
import pytest
import torch
from runs import FUSED
from transcription import Weight

from adabayes_fused import AdaBayes, AdaBayesFP

OPTIONS = {"AdaBayes": dict(batch_size=8), "AdaBayesFP": dict(batch_size=8)}


def make(name, *options, **shared):
    params = [torch.nn.Parameter(torch.zeros(3, dtype=torch.float64)) for _ in options or [{}]]
    groups = [dict(params=[p], **given) for p, given in zip(params, options or [{}], strict=True)]
    return FUSED[name](groups, **OPTIONS[name] | shared)


def sizes(optimizer):
    return [group["batch_size"] for group in optimizer.param_groups]


@pytest.mark.parametrize("name", FUSED)
def test_every_group_is_told(name):
    optimizer = make(name, {}, dict(batch_size=3))
    optimizer.set_batch_size(5)
    assert sizes(optimizer) == [5, 5]
    optimizer.set_batch_size(torch.tensor([7.5]))
    assert sizes(optimizer) == [7.5, 7.5]
    assert not any(isinstance(size, torch.Tensor) for size in sizes(optimizer))


def test_fp_that_was_told_nothing():
    optimizer = AdaBayesFP([torch.nn.Parameter(torch.zeros(3))])
    optimizer.set_batch_size(4)
    assert sizes(optimizer) == [4]


@pytest.mark.parametrize("follows", [True, False])
@pytest.mark.parametrize("lean", [False, True])
def test_the_next_step_uses_it(follows, lean, target):
    """Against the transcription, its sigma^2 and kappa changed with the batch size; the first sigma^2 stays the unit."""
    backend, device = target
    p = torch.nn.Parameter(torch.zeros(40, dtype=torch.float64, device=device))
    optimizer = AdaBayes([p], lr=1e-2, batch_size=64, variance_follows_lr=follows, lean=lean, backend=backend)
    first_prior = optimizer.param_groups[0]["first_prior"]
    weight = Weight(np.zeros(40), fixed_point=False, lr=1e-2, batch_size=64, variance_follows_lr=follows)
    for n in (64, 64, 17, 64, 17):
        p.grad = torch.randn(40, dtype=torch.float64).to(device)
        weight.m *= n / weight.batch_size  # the average of gradients of the summed loss, of another sum now
        weight.batch_size = n
        optimizer.set_batch_size(n)
        optimizer.step()
        weight.step(p.grad.cpu().numpy(), 1e-2)
    np.testing.assert_allclose(p.detach().cpu().numpy(), weight.w, rtol=1e-10)
    assert optimizer.param_groups[0]["first_prior"] == first_prior


def test_a_tensor_is_written_in_place():
    optimizer = make("AdaBayes", dict(batch_size=torch.tensor(8.0)), {})
    tensor = sizes(optimizer)[0]
    optimizer.set_batch_size(6)
    assert sizes(optimizer)[0] is tensor
    assert tensor == 6
    assert sizes(optimizer)[1] == 6


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("n", [0, -1, 0.5, math.nan, math.inf, None, "8", True, torch.tensor([1, 2]), torch.tensor(1j)])
def test_bad_input_changes_nothing(name, n):
    optimizer = make(name, dict(batch_size=torch.tensor(8.0)), dict(batch_size=3))
    with pytest.raises((ValueError, TypeError), match="Invalid batch_size|a number|1-element"):
        optimizer.set_batch_size(n)
    assert sizes(optimizer) == [8, 3]


def test_a_batch_too_large_for_one_of_the_groups_changes_nothing():
    optimizer = make("AdaBayes", {}, dict(sgd_lr=1e-3, lr=1e-2))
    with pytest.raises(ValueError, match="kappa.*is above 1"):
        optimizer.set_batch_size(20)
    assert sizes(optimizer) == [8, 8]


def test_numpy_numbers_later_groups_and_integer_tensors():
    optimizer = make("AdaBayes", dict(batch_size=torch.tensor(8)), {})
    optimizer.set_batch_size(np.int64(6))
    assert type(sizes(optimizer)[1]) is int  # weights_only loading takes no other
    optimizer.add_param_group(dict(params=[torch.nn.Parameter(torch.ones(2))]))
    assert sizes(optimizer) == [6, 6, 6]
    with pytest.raises(ValueError, match="Invalid batch_size: 2.5 .*tensor of torch.int64: integers"):
        optimizer.set_batch_size(2.5)
    assert sizes(optimizer) == [6, 6, 6]
