"""Warnings that point at the line of the caller's own code."""

from __future__ import annotations

import sys
import warnings

_NOT_THE_CALLERS = (__package__, "torch")


def warn(message: str) -> None:
    """A UserWarning for the nearest line outside of this package and of torch, which wraps our methods and calls them."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _NOT_THE_CALLERS:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
