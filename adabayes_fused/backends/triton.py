"""Triton: one launch over all tensors, on any GPU Triton compiles for; on CPU tensors under its interpreter."""

from __future__ import annotations

import functools
import importlib.util
import math
import os
import struct
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..algorithms import Algorithm
from ..codes import Storage
from . import native
from .launch import CANNOT_LOAD, Copies, Launch, Undecided, in_turn

CHUNK = 8192  # elements a program updates
BLOCK = 1024  # elements at a time
EVICT = ""  # or "evict_first": which data leaves the cache first
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}  # no contraction: the same bits as the other backends
_loaded: set[tuple[Any, ...]] = set()  # kernels that update parameters


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def unavailable(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed; 'pip install triton'"
    if importlib.util.find_spec("adabayes_fused.triton_kernels") is None:  # sources keep it elsewhere, where Python does not look
        without = f"the Triton kernels are not in {native.FOLDER}; run 'pip install --no-deps -e .' in {native.FOLDER.parent}"
        return native.missing if native.in_the_way else without
    if device.type == "cuda":
        if not torch.cuda.is_available():
            return "torch sees no GPU here (torch.cuda.is_available() is False)"
        return f"{CANNOT_LOAD}: {why}" if (why := _why_not(device)) else None
    if device.type == "cpu" and interpreted():
        return None
    return f"it updates parameters on a GPU, not on {device}; TRITON_INTERPRET=1 runs it, slowly, on the CPU"


@functools.cache
def _why_not(device: torch.device) -> str:
    """Why a kernel of Triton's cannot be compiled and loaded there, the smallest; "" if it can."""
    from ..triton_kernels import multi_tensor

    try:
        with torch.cuda.device(device):
            number = torch.empty(3, dtype=torch.float64, device=device)
            skipped = torch.empty(1, dtype=torch.int64, device=device)
            arguments = number, 0, number, _bits(1.0), number, _bits(1.0), number, skipped
            load(multi_tensor.decide, arguments, dict(SCALED=False, CHECKED=False, CLIPS=False, SKIPS=False, BLOCK=BLOCK))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of Triton's compilers, of the driver: each has its own
        return f"{type(error).__name__}: {error}".partition("\n")[0]
    return ""


def load(kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
    """Compiles a kernel for these arguments, if it has to, and loads it."""
    kernel.warmup(*arguments, grid=(1,), **constants, **OPTIONS)._init_handles()


def _named(dtype: torch.dtype) -> Any:
    import triton.language as tl

    found = {torch.float32: tl.float32, torch.float64: tl.float64, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
    return found.get(dtype, tl.uint8)


def constants(launch: Launch, lanes: int = 64 if torch.version.hip else 32) -> dict[str, Any]:
    """The compile-time arguments of ``multi_tensor`` for a launch, on GPUs whose warps have so many lanes. Not to be changed."""
    return _constants(launch.algorithm, launch.storage, launch.param_dtype, launch.grad_dtype, launch.far, lanes, CHUNK)


@functools.cache
def _constants(
    algorithm: Algorithm,
    storage: Storage,
    param_dtype: torch.dtype,
    grad_dtype: torch.dtype,
    far: bool,
    lanes: int,
    chunk: int,
) -> dict[str, Any]:
    from ..triton_kernels.rules import RULES

    layout = storage.layout(algorithm, param_dtype)
    widest = max(dtype.itemsize for dtype in (param_dtype, grad_dtype, *layout.dtypes))
    return dict(
        RULE=RULES[algorithm.name],
        CORRECTED=sum(1 << i for i, _ in algorithm.corrected),
        READS=algorithm.lean if storage.lean else algorithm.reads,
        SLOTS=len(layout.slots),
        PARAM=_named(param_dtype),
        GRAD=_named(grad_dtype),
        STATE=_named(torch.promote_types(param_dtype, torch.float32)),
        STORED=tuple(map(_named, layout.dtypes[:2])),
        CODE=layout.state,
        WEIGHT=layout.weight,
        CHUNK=chunk,
        BLOCK=max(BLOCK, 16 // widest * OPTIONS["num_warps"] * lanes),  # 16 bytes a thread of the widest stream
        EVICT=EVICT,
        FAR=far,
    )


def _on(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def sum_of_squares(launch: Launch) -> Tensor:
    from ..triton_kernels import multi_tensor

    table = launch.bring_table(CHUNK)
    with _on(launch.device):
        multi_tensor.sum_of_squares[(len(table.chunks),)](
            table.rows, table.chunks, table.sums, GRAD=_named(launch.grad_dtype), CHUNK=CHUNK, BLOCK=BLOCK, **OPTIONS
        )
    return table.sums


def _bits(number: float) -> int:
    found: int = struct.unpack("q", struct.pack("d", number))[0]
    return found


def decide(by: Undecided) -> Tensor:
    from ..triton_kernels import multi_tensor

    decision = by.decision()
    with _on(by.skipped.device):
        multi_tensor.decide[(1,)](
            decision if by.sums is None else by.sums,
            0 if by.sums is None else len(by.sums),
            decision if by.grad_scale is None else by.grad_scale,
            _bits(by.known_scale),
            decision if by.found_inf is None else by.found_inf,
            _bits(by.limit),
            decision,
            by.skipped,
            SCALED=by.grad_scale is not None,
            CHECKED=by.found_inf is not None,
            CLIPS=math.isfinite(by.limit),
            SKIPS=by.skip_nonfinite,
            BLOCK=BLOCK,
            **OPTIONS,
        )
    return decision


def prepare(launches: list[Launch], copies: Copies) -> Callable[[], None]:
    return in_turn([_prepare(launch) for launch in launches], copies)


def _prepare(launch: Launch) -> Callable[[], None]:
    from ..triton_kernels.multi_tensor import multi_tensor

    table = launch.bring_table(CHUNK)
    keywords = constants(launch)
    grid = (len(table.chunks),)

    def run() -> None:
        decision = launch.packed if launch.decision is None else launch.decision
        with _on(launch.device):
            multi_tensor[grid](
                *(table.rows, table.chunks, table.tickets, launch.packed, decision),
                DECIDED=launch.decision is not None,
                **keywords,
                **OPTIONS,
            )

    if not interpreted():
        arguments = table.rows, table.chunks, table.tickets, launch.packed, launch.packed
        # What Triton compiles apart: `keywords` are kept, so that their identity tells them.
        kind = launch.device, launch.decides, id(keywords), *(t.data_ptr() % 16 == 0 for t in arguments)
        if kind not in _loaded:  # before anything is changed
            with _on(launch.device):
                load(multi_tensor, arguments, dict(DECIDED=launch.decides, **keywords))
            _loaded.add(kind)
    return run
