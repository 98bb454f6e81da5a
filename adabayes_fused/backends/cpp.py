"""C++ on the CPU: one parallel region over all tensors, vectorised for the processor found at run time."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import native
from .launch import Copies, Launch

ISA_VARIABLE = "ADABAYES_FUSED_ISA"  # forces one of module.cpu_isas(), for tests and comparisons


def unavailable(device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"it updates parameters on the CPU only, not on {device}; use backend='auto'"
    return native.missing or None


@functools.lru_cache
def chosen_isa(forced: str | None) -> str:
    isas = native.module.cpu_isas()
    if forced and forced not in isas:
        raise ValueError(f"{ISA_VARIABLE}={forced} (allowed here: {', '.join(isas)})")
    return forced or isas[0]


def _rows(launch: Launch) -> tuple[int, Any]:
    """The address of the rows, and what holds them."""
    if launch.address:
        return launch.address, None
    rows = ctypes.create_string_buffer(launch.rows())
    return ctypes.addressof(rows), rows


def sum_of_squares(launch: Launch) -> Tensor:
    address, _held = _rows(launch)
    isa = chosen_isa(os.environ.get(ISA_VARIABLE))
    total = native.module.sum_of_squares_cpu(native.bucket(launch, address, 0), torch.get_num_threads(), isa)
    return torch.tensor([total], dtype=torch.float64, device="cpu")


def prepare(launches: list[Launch], copies: Copies) -> Callable[[], None]:
    rows = [_rows(launch) for launch in launches]
    buckets = [native.bucket(launch, at, launch.packed.buffer_info()[0]) for launch, (at, _) in zip(launches, rows, strict=True)]
    arguments = buckets, torch.get_num_threads(), chosen_isa(os.environ.get(ISA_VARIABLE)), list(copies)

    def run(_held: Any = (launches, rows)) -> None:  # what the addresses point to
        native.module.step_cpu(*arguments)

    return run
