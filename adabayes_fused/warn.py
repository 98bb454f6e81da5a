"""Warnings that point at the line of the caller's own code."""

from __future__ import annotations

import sys
import warnings

_NOT_THE_CALLERS = (__package__, "torch", "contextlib", "functools")


def warn(message: str) -> None:
    """A UserWarning for the nearest line outside of this package and of torch, which wraps our methods and calls them."""
    level = 2
    while (frame := sys._getframe(level - 1)).f_back is not None:
        if frame.f_globals.get("__name__", "").partition(".")[0] not in _NOT_THE_CALLERS:
            break
        level += 1
    warnings.warn(message, stacklevel=level)
