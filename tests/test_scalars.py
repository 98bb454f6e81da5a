"""Scalars are computed in float64 wherever the device has it: it is asked, whatever its name is."""

import types

import pytest
import torch

from adabayes_fused import scalars


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
