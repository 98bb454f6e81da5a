"""CUDA C++ on NVIDIA GPUs: one launch over all tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import native
from .in_turn import Copies, in_turn
from .launch import Launch
from .table import coefficients_of, upload


def unavailable(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"it updates parameters on an NVIDIA GPU only, not on {device}; use backend='auto'"
    if native.module is None:
        return native.missing
    if not hasattr(native.module, "run_cuda"):
        return "the extension was built without CUDA; with nvcc on the PATH, run 'pip install --force-reinstall --no-deps .'"
    if torch.version.hip is not None:
        return "this torch is built for ROCm; use backend='triton'"
    if not torch.cuda.is_available():
        return "torch sees no NVIDIA GPU here (torch.cuda.is_available() is False); use backend='auto'"
    return None


def _where(launch: Launch) -> tuple[int, int]:
    """The device's index and the current stream there."""
    index = launch.device.index if launch.device.index is not None else torch.cuda.current_device()
    return index, torch.cuda.current_stream(index).cuda_stream


def sum_of_squares(launch: Launch) -> Tensor:
    rows, chunks = upload(launch, native.module.CUDA_CHUNK)
    sums = torch.empty(len(chunks), dtype=torch.float64, device=launch.device)
    if len(chunks):
        native.module.sum_of_squares_cuda(
            *native.bucket(launch, rows.data_ptr(), 0), chunks.data_ptr(), len(chunks), sums.data_ptr(), *_where(launch)
        )
    return sums.sum()


def prepare(launches: list[Launch], copies: Copies) -> Callable[[], None]:
    return in_turn(launches, [_prepare(launch) for launch in launches], copies)


def _prepare(launch: Launch) -> Callable[[], None]:
    rows, chunks = upload(launch, native.module.CUDA_CHUNK)
    coefficients = coefficients_of(launch)

    def run() -> None:
        if len(chunks):
            found_inf = 0 if launch.found_inf is None else launch.found_inf.data_ptr()
            native.module.run_cuda(
                *native.bucket(launch, rows.data_ptr(), coefficients.data_ptr()),
                chunks.data_ptr(),
                len(chunks),
                found_inf,
                *_where(launch),
            )

    return run
