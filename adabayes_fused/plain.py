"""Which tensors a kernel may be given the address of, and when it may be.

A kernel reads memory. Much that PyTorch calls a tensor has none, or memory that does not hold its values: fake, meta and
functional tensors, lazily negated and conjugated views, tensors made of others. They are updated by PyTorch's own
operations, in the ``foreach`` backend, and so is everything while a mode watches those operations: a tracer would
otherwise record nothing of a step that has moved the weights.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _disable_current_modes, is_traceable_wrapper_subclass

_keys = torch._C._dispatch_keys


def _raw(key: str) -> int:
    return torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key)).raw_repr()


# These keys say on which of the kernels' devices a tensor lies, and nothing else.
DEVICE_BITS = (_raw("CPU") ^ _raw("CUDA")) | _raw("AutocastCPU") | _raw("AutocastCUDA")
with torch.inference_mode(False), _disable_current_modes():
    PLAIN = _keys(torch.empty(0, device="cpu")).raw_repr() & ~DEVICE_BITS

_TORCHS_OWN = (torch._C._disabled_torch_function_impl, Tensor.__torch_function__.__func__)  # type: ignore[attr-defined]


def have_plain_keys(*tensors: Tensor) -> bool:
    """What :func:`is_plain` asks, of tensors of torch's own Python types."""
    return all(keys & ~DEVICE_BITS == PLAIN for keys in {_keys(t).raw_repr() for t in tensors})


def is_plain(t: Tensor) -> bool:
    """Whether ``t`` lies on a CPU or CUDA device in memory that holds its values and may be written, and nobody but torch
    has a say in what its operations do."""
    function = type(t).__torch_function__
    if getattr(function, "__func__", function) not in _TORCHS_OWN or is_traceable_wrapper_subclass(t):
        return False
    return have_plain_keys(t)


def samples() -> list[tuple[Tensor, int]]:
    """Tensors, plain and not, each with its keys: from them the compiled module learns to tell one from the other."""
    with torch.inference_mode(False), torch.no_grad(), _disable_current_modes():
        t = torch.empty(2, device="cpu", dtype=torch.float32)
        kinds = [t, torch.nn.Parameter(t.clone()), torch._neg_view(t), torch.complex(t, t).conj(), torch._efficientzerotensor(2)]
    return [(t, _keys(t).raw_repr()) for t in kinds]


def _uses(t: Tensor) -> tuple[int, ...] | None:
    """How many hold the storage of ``t``: tensors, objects in Python, weakly too. None where this torch does not count."""
    count = getattr(torch._C, "_storage_Use_Count", None)
    storage = t.untyped_storage()
    return None if count is None else (count(storage._cdata), sys.getrefcount(storage), weakref.getweakrefcount(storage))


with torch.inference_mode(False), _disable_current_modes():
    _OWN = _uses(torch.empty(1, device="cpu"))


def alone(tensors: Sequence[Tensor]) -> bool:
    """Whether nothing but references to these tensors, weak ones too, leads to their memory, and nothing from them to other
    objects."""
    return all(_OWN is not None and _uses(t) == _OWN and not vars(t) for t in tensors)


def ordinary_mode() -> AbstractContextManager[Any]:
    """For memory that may be used in every mode, whatever mode it is made in."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()


def watched() -> bool:
    """Whether a mode of ``__torch_dispatch__`` or ``__torch_function__`` is active; a default device is no such mode."""
    if torch._C._len_torch_dispatch_stack():
        return True
    depth = torch._C._len_torch_function_stack()
    return any(not isinstance(torch._C._get_function_stack_at(i), DeviceContext) for i in range(depth))
