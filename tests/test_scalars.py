"""Scalars are computed in float64 wherever the device has it: it is asked, whatever its name is."""

import types

import pytest
import torch

from adabayes_fused import AdaBayes, AdaBayesFP, scalars
from adabayes_fused.algorithms import corrected
from adabayes_fused.clipping import norm_and_factor


@pytest.fixture(autouse=True)
def _asked_anew():
    scalars._has_float64.cache_clear()
    yield
    scalars._has_float64.cache_clear()


@pytest.mark.parametrize(
    ("error", "dtype"),
    [
        (None, torch.float64),
        (TypeError("Cannot convert a MPS Tensor to float64 dtype"), torch.float32),
        (RuntimeError("Required aspect fp64 is not supported on the device"), torch.float32),
        (NotImplementedError("no such kernel"), torch.float32),
    ],
    ids=str,
)
def test_a_device_is_tried_once(monkeypatch, error, dtype):
    device, asked, ones = torch.device("privateuseone", 0), [], torch.ones

    def there(*shape, **options):
        asked.append(options["device"])
        if error is not None and options["dtype"] == torch.float64:
            raise error
        return ones(*shape, **options | dict(device="cpu"))

    monkeypatch.setattr(torch, "ones", there)
    assert [scalars.wide(device) for _ in range(3)] == [dtype] * 3
    assert asked == [device]


def test_no_memory_is_no_answer(monkeypatch):
    def full(*shape, **options):
        raise torch.OutOfMemoryError("no memory")

    device = torch.device("privateuseone", 1)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "ones", full)
        with pytest.raises(torch.OutOfMemoryError):
            scalars.wide(device)
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *shape, **options: ones(*shape, **options | dict(device="cpu")))
    assert scalars.wide(device) == torch.float64


@pytest.mark.parametrize(("index", "has"), [(0, True), (1, False)])
def test_intels_say_so_themselves(monkeypatch, index, has):
    properties = [types.SimpleNamespace(has_fp64=True), types.SimpleNamespace(has_fp64=False)]
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda device: properties[device.index])
    assert (scalars.wide(torch.device("xpu", index)) == torch.float64) == has


def test_those_known_to_have_it_are_not_tried(monkeypatch):
    monkeypatch.setattr(torch, "ones", None)
    assert {scalars.wide(torch.device(name)) for name in ("cpu", "cuda", "cuda:1", "meta")} == {torch.float64}


def test_scalars_stay_in_float32_where_there_is_no_other():
    """What a device without float64 would be given holds none."""
    group = dict(
        lr=torch.tensor(1e-3, dtype=torch.float64), r=100.0, batch_size=8, weight_decay=0.1, betas=(torch.tensor(0.9), 0.99)
    )
    found = scalars.scalars(group, lambda t: scalars.on(torch.device("cpu"), t, torch.float32))
    tensors = [value for value in (*found.values(), *found["betas"]) if isinstance(value, torch.Tensor)]
    assert [t.dtype for t in tensors] == [torch.float32] * 2


@pytest.mark.parametrize("lr", [1e-2, 3e-3])
@pytest.mark.parametrize("cls", [AdaBayes, AdaBayesFP])
def test_tensors_give_the_bits_that_numbers_give(cls, lr):
    """A host computes with numbers what a device, or a step that somebody watches, computes with tensors."""
    group = cls([torch.nn.Parameter(torch.ones(1))], lr=lr, batch_size=37).param_groups[0]
    algorithm = cls.algorithm
    tensors = scalars.scalars(group, lambda x: torch.tensor(float(x), dtype=torch.float64))
    steps = torch.arange(1, 200, dtype=torch.float64)
    for numbers in (algorithm.numbers(scalars.scalars(group, float)), algorithm.numbers(tensors)):
        found = corrected(numbers, steps)
        for i, step in enumerate(steps.tolist()):
            expected = corrected(algorithm.numbers(scalars.scalars(group, float)), int(step))
            assert [float(x[i] if getattr(x, "ndim", 0) else x) for x in found] == expected


def test_a_norm_that_is_a_tensor_gives_the_factor_of_a_number():
    for norm in torch.arange(1, 200, dtype=torch.float64) / 16:
        total = norm * norm  # whose root is exact
        assert float(norm_and_factor(total, 1.0, 0.07)[1]) == norm_and_factor(float(total), 1.0, 0.07)[1]
