"""C++ on the CPU: one parallel region over all tensors, vectorised for the processor found at run time."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import native
from .in_turn import Copies
from .launch import Launch

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


def _table(launch: Launch) -> tuple[int, Tensor | None]:
    """The address of the rows, and what holds them."""
    if launch.address:
        return launch.address, None
    rows = launch.rows()
    return rows.data_ptr(), rows


def sum_of_squares(launch: Launch) -> Tensor:
    address, _rows = _table(launch)
    isa = chosen_isa(os.environ.get(ISA_VARIABLE))
    total = native.module.sum_of_squares_cpu(*native.bucket(launch, address, 0), torch.get_num_threads(), isa)
    return torch.tensor(total, dtype=torch.float64, device="cpu")


def prepare(launches: list[Launch], copies: Copies) -> Callable[[], None]:
    launches = [launch for launch in launches if launch.found_inf is None or not launch.found_inf.item()]
    tables = [_table(launch) for launch in launches]
    buckets = [
        native.bucket(launch, address, launch.coefficient_address())
        for launch, (address, _) in zip(launches, tables, strict=True)
    ]
    arguments = buckets, torch.get_num_threads(), chosen_isa(os.environ.get(ISA_VARIABLE)), list(copies) if launches else []

    def run(_held: Any = (launches, tables)) -> None:  # what the addresses point to
        native.module.step_cpu(*arguments)

    return run
