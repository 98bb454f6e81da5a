"""Launches one after the other, each counted as soon as it is made: of the backends that change things from Python."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import native
from .launch import Launch

Copies = Sequence[tuple[Tensor, Tensor]]  # a parameter with gaps, and the dense tensor that is updated in its place


def in_turn(launches: list[Launch], updates: list[Callable[[], None]], copies: Copies) -> Callable[[], None]:
    """The function that makes these launches, raises their step counts and writes ``copies`` back."""
    counts = [_counting(launch) for launch in launches]

    def run() -> None:
        for update, count in zip(updates, counts, strict=True):
            update()
            count()
        for param, copy in copies:
            param.copy_(copy)

    return run


def _counting(launch: Launch) -> Callable[[], None]:
    """What raises the step counts by one, but for those of a step that ``found_inf`` skips. It waits for no device."""
    if launch.address:
        numbers = native.bucket(launch, launch.address, 0)
        return lambda: native.module.count_steps(*numbers)
    steps, by = launch.steps, 1 if launch.found_inf is None else launch.found_inf == 0
    if not isinstance(by, Tensor):
        return lambda: torch._foreach_add_(steps, by)
    # Without alpha torch would take the overload for numbers, and wait for this one's value.
    return lambda: torch._foreach_add_(steps, by.float(), alpha=1)
