"""Triton: one launch over all tensors, on any GPU Triton compiles for; on CPU tensors under its interpreter."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from contextlib import nullcontext

import torch

from .launch import Launch
from .table import upload

CHUNK = 8192  # elements a program updates
BLOCK = 1024  # elements at a time
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


def constants(launch: Launch) -> dict:
    """The compile-time arguments of ``multi_tensor`` for a launch."""
    import triton.language as tl

    from ..triton_kernels.rules import RULES

    named = {torch.float32: tl.float32, torch.float64: tl.float64, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
    algorithm = launch.algorithm
    return dict(
        RULE=RULES[algorithm.name],
        READS=algorithm.lean if launch.lean else algorithm.reads,
        SLOTS=launch.slots,
        PARAM=named[launch.param_dtype],
        GRAD=named[launch.grad_dtype],
        STATE=tl.float64 if launch.param_dtype == torch.float64 else tl.float32,
        CHUNK=CHUNK,
        BLOCK=BLOCK,
        SKIPPABLE=launch.found_inf is not None,
    )


def prepare(launch: Launch) -> Callable[[], None]:
    from ..triton_kernels.multi_tensor import multi_tensor

    rows, chunks, coefficients = upload(launch, CHUNK)
    found_inf = coefficients if launch.found_inf is None else launch.found_inf
    arguments = (rows, chunks, coefficients, found_inf)
    keywords = constants(launch) | OPTIONS
    on_device = (lambda: torch.cuda.device(launch.device)) if launch.device.type == "cuda" else nullcontext
    if len(chunks) and not interpreted():
        with on_device():  # compiles, if it has to, before anything is changed
            multi_tensor.warmup(*arguments, grid=(1,), **keywords)

    def run() -> None:
        if len(chunks):
            with on_device():
                multi_tensor[(len(chunks),)](*arguments, **keywords)

    return run
