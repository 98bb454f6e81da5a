"""torch's own kernels on the host, for a device of fakecuda: each operation on cuda tensors is done once more by the CPU, on
the same memory, when the stream comes to it. ``with compute.on(): ...``; the project's kernels are loaded along.

In threads where the mode is not on (autograd's for cuda) nothing is computed. Triton's kernels are never run.
"""

from __future__ import annotations

import contextlib
import ctypes
import pathlib
from unittest import mock

import fakecuda
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

_lib = fakecuda.library()
_lib.fakecuda_host.restype = ctypes.c_void_p
_lib.fakecuda_host.argtypes = [ctypes.c_void_p]
_HOST_FN = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_lib.cudaLaunchHostFunc.argtypes = [ctypes.c_void_p, _HOST_FN, ctypes.c_void_p]
_kept: list = []  # callbacks that a graph may call again, and errors
errors: list[BaseException] = []

if (_kernels := pathlib.Path(__file__).parent / "build/adabayes_kernels.so").exists():
    ctypes.CDLL(str(_kernels))


class _Device:
    """What is needed to find a cuda tensor's contents later, without keeping it alive."""

    def __init__(self, t):
        s = t.untyped_storage()
        self.at, self.bytes, self.dtype = s.data_ptr(), s.nbytes(), t.dtype
        self.offset, self.size, self.stride = t.storage_offset(), t.size(), t.stride()
        self.conj, self.neg = t.is_conj(), t.is_neg()

    def alias(self):
        if not self.bytes or not self.at:
            return torch.empty(self.size, dtype=self.dtype, device="cpu")
        memory = (ctypes.c_char * self.bytes).from_address(_lib.fakecuda_host(self.at))
        storage = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
        t = torch.empty(0, dtype=self.dtype, device="cpu").set_(storage, self.offset, self.size, self.stride)
        t = torch._conj(t) if self.conj else t
        return torch._neg_view(t) if self.neg else t


def _is_cuda(x):
    return isinstance(x, torch.Tensor) and x.device.type == "cuda"


def _spec(x):
    if _is_cuda(x):
        return _Device(x)
    return x.clone() if isinstance(x, torch.Tensor) and x.dim() == 0 else x


def _alias(x):
    if isinstance(x, _Device):
        return x.alias()
    return torch.device("cpu") if isinstance(x, torch.device) else None if isinstance(x, torch.Generator) else x


# What does nothing to the contents of tensors, or is done by fakecuda itself.
_NOTHING = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_", "set_"}
_NOTHING |= {"_local_scalar_dense", "record_stream", "is_pinned", "_pin_memory"}


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if any(t.__name__ not in ("Tensor", "Parameter", "Buffer") for t in types):
            return func(*args, **kwargs)  # of a subclass: its parts come here one by one
        before = tree_map(_spec, (args, kwargs))
        out = func(*args, **kwargs)
        name = func._schema.name.split("::")[1]
        found = [x for x in tree_leaves((args, kwargs, out)) if _is_cuda(x)]
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not found or views or name in _NOTHING or func.namespace != "aten":
            return out
        mutates = any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments)
        after = tree_map(_spec, out)
        ends = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        host_result = not mutates and ends and not any(map(_is_cuda, ends)) or name == "copy_" and not _is_cuda(args[0])

        def work(_=None):
            with torch._C._DisableTorchDispatch(), torch.no_grad():
                a, k = tree_map(_alias, before)
                if k.get("pin_memory"):
                    k = {**k, "pin_memory": False}
                result = func(*a, **k)
                if not mutates:
                    for to, value in zip(tree_leaves(after), tree_leaves(result), strict=True):
                        to = _alias(to)
                        if isinstance(to, torch.Tensor) and to.numel():
                            to.copy_(value)
                return result

        if host_result or not any(map(_is_cuda, ends)) and not mutates:  # the host has waited for it
            result = work()
            return out if host_result else result

        @_HOST_FN
        def call(_):
            try:
                work()
            except BaseException as error:  # noqa: BLE001
                errors.append(RuntimeError(f"{func}: {error!r}"))

        _kept.append(call)
        device = found[0].device
        with torch.cuda.device(device):
            if error := _lib.cudaLaunchHostFunc(torch.cuda.current_stream(device).cuda_stream, call, None):
                errors.append(RuntimeError(f"cudaLaunchHostFunc: {error}"))
        return out


@contextlib.contextmanager
def on():
    """Until the end of the block kernels compute. What asks torch whether a mode is active does not see this one."""
    depth, mode = torch._C._len_torch_dispatch_stack, _Mode()

    def depth_of_others() -> int:
        return sum(torch._C._get_dispatch_stack_at(i) is not mode for i in range(depth()))

    with mode, mock.patch.object(torch._C, "_len_torch_dispatch_stack", depth_of_others):
        yield
