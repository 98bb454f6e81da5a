"""Triton: one launch over all tensors, on any GPU Triton compiles for; on CPU tensors under its interpreter."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from .in_turn import Copies, in_turn
from .launch import Launch
from .table import coefficients_of, upload

CHUNK = 8192  # elements a program updates
BLOCK = 1024  # elements at a time
EVICT = ""  # or "evict_first": which data leaves the cache first
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}  # no contraction: the same bits as the other backends


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def unavailable(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed; 'pip install triton'"
    if device.type == "cuda":
        return None if torch.cuda.is_available() else "torch sees no GPU here (torch.cuda.is_available() is False)"
    if device.type == "cpu" and interpreted():
        return None
    return f"it updates parameters on a GPU, not on {device}; TRITON_INTERPRET=1 runs it, slowly, on the CPU"


def _named(dtype: torch.dtype) -> Any:
    import triton.language as tl

    return {torch.float32: tl.float32, torch.float64: tl.float64, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[dtype]


def constants(launch: Launch) -> dict[str, Any]:
    """The compile-time arguments of ``multi_tensor`` for a launch."""
    from ..triton_kernels.rules import RULES

    algorithm = launch.algorithm
    return dict(
        RULE=RULES[algorithm.name],
        READS=algorithm.lean if launch.lean else algorithm.reads,
        SLOTS=launch.slots,
        PARAM=_named(launch.param_dtype),
        GRAD=_named(launch.grad_dtype),
        STATE=_named(torch.promote_types(launch.param_dtype, torch.float32)),
        CHUNK=CHUNK,
        BLOCK=BLOCK,
        EVICT=EVICT,
        SKIPPABLE=launch.found_inf is not None,
        FAR=launch.far,
    )


def _on_device(launch: Launch) -> AbstractContextManager[None]:
    return torch.cuda.device(launch.device) if launch.device.type == "cuda" else nullcontext()


def sum_of_squares(launch: Launch) -> Tensor:
    from ..triton_kernels import multi_tensor

    rows, chunks = upload(launch, CHUNK)
    sums = torch.empty(len(chunks), dtype=torch.float64, device=launch.device)
    if len(chunks):
        with _on_device(launch):
            multi_tensor.sum_of_squares[(len(chunks),)](
                rows, chunks, sums, GRAD=_named(launch.grad_dtype), CHUNK=CHUNK, BLOCK=BLOCK, **OPTIONS
            )
    return sums.sum()


def prepare(launches: list[Launch], copies: Copies) -> Callable[[], None]:
    return in_turn(launches, [_prepare(launch) for launch in launches], copies)


def _prepare(launch: Launch) -> Callable[[], None]:
    from ..triton_kernels.multi_tensor import multi_tensor

    rows, chunks = upload(launch, CHUNK)
    coefficients = coefficients_of(launch)
    found_inf = coefficients if launch.found_inf is None else launch.found_inf
    arguments = (rows, chunks, coefficients, found_inf)
    keywords = constants(launch) | OPTIONS
    if len(chunks) and not interpreted():
        with _on_device(launch):  # compiles, if it has to, before anything is changed
            multi_tensor.warmup(*arguments, grid=(1,), **keywords)

    def run() -> None:
        if len(chunks):
            with _on_device(launch):
                multi_tensor[(len(chunks),)](*arguments, **keywords)

    return run
