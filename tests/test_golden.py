"""Checkpoints of released versions (tests/data/README.md) load bit for bit, and their training goes on as the paper's."""

from pathlib import Path

import numpy as np
import pytest
import torch
from runs import FUSED, in_paper_units
from transcription import Weight

FILES = sorted((Path(__file__).parent / "data").glob("*.pt"))


def transcribed(file, group_of):
    """The whole run from its start through the paper's equations."""
    defaults = {"eps": 1e-8, "fixed_point": True} if file["name"] == "AdaBayesFP" else {"fixed_point": False}
    weights = [
        Weight(w.double().numpy(), lr=file["lr"], **defaults | file["options"][g])
        for w, g in zip(file["start"], group_of, strict=True)
    ]
    for t, lr in enumerate(file["lrs"]):
        for weight, gradients, present in zip(weights, file["gradients"], file["present"][t], strict=True):
            if present:
                weight.step(gradients[t].double().numpy(), lr)
    return weights


def build(file, **policy):
    """An optimizer for the file's weights, its options left to be found there; its parameters; each one's group."""
    params = [torch.nn.Parameter(w.clone()) for w in file["weights"]]
    group_of = [g for g, group in enumerate(file["state_dict"]["param_groups"]) for _ in group["params"]]
    groups = [{"params": [p for p, its in zip(params, group_of, strict=True) if its == g]} for g in dict.fromkeys(group_of)]
    arguments = {"batch_size": 2} if file["name"] == "AdaBayes" else {}
    optimizer = FUSED[file["name"]](groups, lr=0.02, lean=file["lean"], **arguments, **policy)
    return optimizer, params, group_of


def test_there_is_one_of_each_kind_for_each_version():
    kinds = {(path.stem.rsplit("-", 1)[1], path.stem.rsplit("-", 1)[0]) for path in FILES}
    assert ("0.1.0", "AdaBayes-full") in kinds
    versions = {version for version, _ in kinds}
    assert kinds == {(v, f"{name}-{kind}") for v in versions for name in FUSED for kind in ("full", "lean")}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_released_checkpoint_goes_on(path, target):
    backend, device = target
    file = torch.load(path, weights_only=True, map_location=device)
    optimizer, params, group_of = build(file, backend=backend)
    optimizer.load_state_dict(file["state_dict"])
    for i, p in enumerate(params):
        for key, value in file["state_dict"]["state"][i].items():
            kept = optimizer.state[p][key]
            assert kept.dtype == value.dtype, (i, key)
            assert torch.equal(kept.cpu(), value.cpu()), (i, key)
    for t in range(file["stop"], len(file["lrs"])):
        for p, gradients, present in zip(params, file["gradients"], file["present"][t], strict=True):
            p.grad = gradients[t].to(p.dtype) if present else None
        for group in optimizer.param_groups:
            group["lr"] = file["lrs"][t]
        optimizer.step()
    for p, weight in zip(params, transcribed({**file, **cpu(file)}, group_of), strict=True):
        assert_near(optimizer, p, weight, steps=len(file["lrs"]))


def cpu(file):
    return {key: [t.cpu() for t in file[key]] for key in ("start", "gradients")}


def assert_near(optimizer, p, weight, steps):
    """A step rounds a weight once to its dtype, half an epsilon of it, and each slot at most eight times to its own: from
    gradients that are exact, and do not depend on the weights, errors add up and never grow."""
    assert float(optimizer.state[p]["step"]) == weight.t
    state = in_paper_units(optimizer, p, weight.sigma_sq)
    found = {"w": p.detach().cpu().double().numpy(), **state}
    expected = {"w": weight.w, "exp_avg": weight.m, "exp_avg_sq": weight.v, "prior_var": weight.prior, "post_var": weight.post}
    for name, value in found.items():
        wanted = expected[name]
        dtype = p.dtype if name == "w" else torch.promote_types(p.dtype, torch.float32)
        tolerance = steps * torch.finfo(dtype).eps * (0.5 if dtype == torch.bfloat16 else 8)
        np.testing.assert_allclose(value, wanted, rtol=tolerance, atol=tolerance * np.abs(wanted).max(initial=0), err_msg=name)


HERE = dict(capturable=True, maximize=True, transition="exact", variance_follows_lr=False, eps=0.25, sgd_lr=0.7, batch_size=3)


@pytest.mark.parametrize("key", HERE)
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_group_key_the_file_lacks_stays_as_it_is_here(path, key):
    """As from a version that did not know it yet."""
    file = torch.load(path, weights_only=True)
    optimizer, _, _ = build(file)
    if key not in optimizer.defaults:
        pytest.skip(f"{file['name']} has no {key}")
    lacking, complete = file["state_dict"]["param_groups"]
    del lacking[key]
    for group in optimizer.param_groups:
        group[key] = HERE[key]
    optimizer.load_state_dict(file["state_dict"])
    assert optimizer.param_groups[0][key] == HERE[key]
    assert optimizer.param_groups[1][key] == (True if key == "capturable" else complete[key])
    for group, saved in zip(optimizer.param_groups, (lacking, complete), strict=True):
        assert all(group[k] == saved[k] for k in saved.keys() - {"params", "capturable"})


@pytest.mark.parametrize("key", ["lr", "betas", "weight_decay", "r"])
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_group_key_no_file_may_lack(path, key):
    file = torch.load(path, weights_only=True)
    optimizer, _, _ = build(file)
    del file["state_dict"]["param_groups"][1][key]
    with pytest.raises(ValueError, match=f"not of {file['name']}: its group 1 lacks {key}"):
        optimizer.load_state_dict(file["state_dict"])
    assert not optimizer.state
