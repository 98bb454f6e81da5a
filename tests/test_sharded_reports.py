"""Two processes with parts of the parameters: posterior(), diagnostics() and released gradients against one process.

``torchrun --standalone --nproc-per-node 2 test_sharded_reports.py FOLDER`` is what each process does.
"""

import sys
from pathlib import Path

import pytest
import torch
from processes import run_script
from runs import FUSED
from torch import nn

from adabayes_fused import diagnostics, posterior, release_gradients

CASES = {
    "AdaBayes": ("AdaBayes", dict(batch_size=8)),
    "AdaBayes-lean": ("AdaBayes", dict(batch_size=8, lean=True)),
    "AdaBayesFP": ("AdaBayesFP", dict(batch_size=8)),
}
# (5, 3): 3 rows here and 2 there; (1, 4): nothing there; the last has no gradient, ever.
SHAPES = {"rows": (5, 3), "columns": (2, 3), "one": (1, 4), "copies": (6,), "copied parts": (3, 2), "plain": (4,), "still": (3,)}


def whole(seed):
    """Values over some orders of magnitude, by name."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator) * 10.0 ** torch.randint(-4, 1, shape, generator=generator)
        for name, shape in SHAPES.items()
    }


def trained(case, place):
    """An optimizer after three steps, and its parameters; ``place(name, tensor)`` is what the tensor becomes."""
    name, options = CASES[case]
    params = {key: nn.Parameter(place(key, value)) for key, value in whole(0).items()}
    optimizer = FUSED[name](params.items(), lr=1e-2, **options)
    for t in range(3):
        for key, grad in whole(1 + t).items():
            params[key].grad = None if key == "still" else place(key, grad)
        optimizer.step()
    return optimizer, params


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """What each process found."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    folder = tmp_path_factory.mktemp("processes")
    status, _, said = run_script(__file__, folder, group=2)
    assert status == 0, said
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_posterior(case, processes):
    optimizer, params = trained(case, lambda _, t: t)
    for found in processes:
        for name, (mean, variance, placed) in found[case]["posterior"].items():
            expected = posterior(optimizer, params[name])
            assert torch.equal(mean, expected.mean), name
            assert torch.equal(variance, expected.variance), name
            assert placed, name


@pytest.mark.parametrize("case", CASES)
def test_diagnostics(case, processes):
    """Counted once each: what is in parts, what every process has whole, and what is both."""
    optimizer, _ = trained(case, lambda _, t: t)
    expected = diagnostics(optimizer)
    reports = [found[case]["diagnostics"] for found in processes]
    assert reports[0] == reports[1]
    for d, e in zip((*reports[0].parameters, reports[0].overall), (*expected.parameters, expected.overall), strict=True):
        assert d[:4] == e[:4]
        assert d.distance == (None if e.distance is None else pytest.approx(e.distance, rel=1e-12))
    assert 0 < expected.overall.sgd_like < 1
    for found in processes:
        assert found[case]["transfers"] == 1
        assert found[case]["disturbed"] is False


@pytest.mark.parametrize("case", CASES)
def test_before_any_step(case, processes):
    for found in processes:
        assert found[case]["before"].overall == (
            "all",
            sum(map(torch.Size.numel, map(torch.Size, SHAPES.values()))),
            None,
            None,
            None,
        )


@pytest.mark.parametrize("case", CASES)
def test_released_gradients_of_fsdp2(case, processes):
    for found in processes:
        assert found[case]["fsdp"] == {"left": 0, "updates": 5.0, "same": True}


def test_distributed_data_parallel(processes):
    """Its hooks would see gradients before they are reduced."""
    for found in processes:
        wrapper, inside = found["ddp"]
        assert "DistributedDataParallel" in wrapper
        assert "fully_shard" in wrapper
        assert "gradient again after its update" in inside


# --- One of the two processes -----------------------------------------------------------------------------------------


def reports(case, mesh, square):
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    placements = {
        "rows": (mesh, [Shard(0)]),
        "columns": (mesh, [Shard(1)]),
        "one": (mesh, [Shard(0)]),
        "copies": (mesh, [Replicate()]),
        "copied parts": (square, [Replicate(), Shard(0)]),
        "still": (mesh, [Shard(0)]),
    }

    def place(name, t):
        return distribute_tensor(t, *placements[name]) if name in placements else t

    name, options = CASES[case]
    fresh = FUSED[name]({key: nn.Parameter(place(key, value)) for key, value in whole(0).items()}.items(), **options)
    before = diagnostics(fresh)
    optimizer, params = trained(case, place)
    kept = [(p, key, value, value.clone()) for p, entry in optimizer.state.items() for key, value in entry.items()]
    read = {}
    for key, p in params.items():
        found = posterior(optimizer, p)
        if key == "plain":
            read[key] = (*found, type(found.variance) is torch.Tensor)
            continue
        placed = all(t.placements == p.placements and t.device_mesh == p.device_mesh and t.shape == p.shape for t in found)
        placed &= found.mean._local_tensor.data_ptr() == p._local_tensor.data_ptr() and not found.mean.requires_grad
        read[key] = (*(t.full_tensor() for t in found), placed)
    fetched, tolist = [], torch.Tensor.tolist
    torch.Tensor.tolist = lambda t: fetched.append(t) or tolist(t)
    report = diagnostics(optimizer)
    torch.Tensor.tolist = tolist
    disturbed = any(optimizer.state[p][key] is not value or not bool((value == copy).all()) for p, key, value, copy in kept)
    return {
        "before": before,
        "posterior": read,
        "diagnostics": report,
        "transfers": len(fetched),
        "disturbed": disturbed,
    }


def released(case, mesh, rank):
    from torch.distributed.fsdp import fully_shard

    def make():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 7), nn.Tanh(), nn.Linear(7, 1))
        for layer in (*model[::2], model):  # of the last layer's weight and bias the second process has nothing
            fully_shard(layer, mesh=mesh)
        name, options = CASES[case]
        return model, FUSED[name](model.parameters(), lr=1e-2, **options)

    model, optimizer = make()
    expected_model, expected = make()
    left = 0
    release_gradients(model, optimizer)
    for t in range(5):
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(2 * t + rank))
        for m, o in ((model, optimizer), (expected_model, expected)):
            m(x).square().mean().backward()
            if o is optimizer:
                left += sum(p.grad is not None for p in m.parameters())
            o.step()
            o.zero_grad()
    same = True
    for p, q in zip(model.parameters(), expected_model.parameters(), strict=True):
        same &= torch.equal(p._local_tensor, q._local_tensor)
        same &= optimizer.state[p].keys() == expected.state[q].keys()
        for key, value in optimizer.state[p].items():
            other = expected.state[q][key]
            same &= type(value) is type(other)
            same &= torch.equal(getattr(value, "_local_tensor", value), getattr(other, "_local_tensor", other))
    return {"left": left, "updates": float(optimizer.state[model[0].weight]["step"]), "same": same}


def under_ddp():
    model = nn.Linear(2, 2)
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = FUSED["AdaBayes"](model.parameters(), batch_size=8)
    messages = []
    with pytest.raises(ValueError) as error:  # noqa: PT011
        release_gradients(wrapped, optimizer)
    messages.append(str(error.value))
    with release_gradients(model, optimizer), pytest.raises(RuntimeError) as error:  # noqa: PT011, PT012
        wrapped(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    return [*messages, str(error.value)]


if __name__ == "__main__":
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh

    distributed.init_process_group("gloo")
    rank, mesh = distributed.get_rank(), init_device_mesh("cpu", (2,))
    square = init_device_mesh("cpu", (2, 1))
    found = {case: {**reports(case, mesh, square), "fsdp": released(case, mesh, rank)} for case in CASES}
    torch.save({**found, "ddp": under_ddp()}, Path(sys.argv[1], f"{rank}.pt"))
    distributed.destroy_process_group()
