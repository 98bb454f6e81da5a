"""CUDA C++ on NVIDIA GPUs: one launch over all tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from ..table import raw_stream
from . import native
from .launch import CANNOT_LOAD, Copies, Launch, Undecided, in_turn


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
    why = _why_not((0, True, 0, 0, 0, 0), _index(device))
    return f"{CANNOT_LOAD}: {why}; use backend='auto'" if why else None


def _index(device: torch.device) -> int:
    return device.index if device.index is not None else torch.cuda.current_device()


def _where(device: torch.device) -> tuple[int, int]:
    """The device's index and the current stream there."""
    return _index(device), raw_stream(device)


@functools.cache
def _why_not(kernel: tuple[int, ...], index: int) -> str:
    """In CUDA's words why the update of such a bucket cannot run there; "" if it can."""
    why: str = native.module.why_not_cuda((*kernel, 0, 0, 0), index)
    return why


def _table(launch: Launch) -> tuple[tuple[int, ...], int, int]:
    """The bucket, its chunk map and how long that is."""
    table = launch.bring_table(native.module.CUDA_CHUNK)
    return native.bucket(launch, table.rows.data_ptr(), launch.packed.data_ptr()), table.chunks.data_ptr(), len(table.chunks)


def sum_of_squares(launch: Launch) -> Tensor:
    sums = launch.bring_table(native.module.CUDA_CHUNK).sums
    native.module.sum_of_squares_cuda(*_table(launch), sums.data_ptr(), *_where(launch.device))
    return sums


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def decide(by: Undecided) -> Tensor:
    decision = by.decision()
    native.module.decide_cuda(
        _address(by.sums),
        0 if by.sums is None else len(by.sums),
        _address(by.grad_scale),
        by.known_scale,
        _address(by.found_inf),
        by.limit,
        by.skip_nonfinite,
        decision.data_ptr(),
        by.skipped.data_ptr(),
        *_where(by.skipped.device),
    )
    return decision


def prepare(launches: list[Launch], copies: Copies) -> Callable[[], None]:
    return in_turn([_prepare(launch) for launch in launches], copies)


def _prepare(launch: Launch) -> Callable[[], None]:
    table = _table(launch)
    if why := _why_not(table[0][:6], _index(launch.device)):
        raise RuntimeError(f"backend 'cuda' cannot run on {launch.device}: {CANNOT_LOAD}: {why}")

    def run() -> None:
        native.module.run_cuda(*table, _address(launch.decision), *_where(launch.device))

    return run
