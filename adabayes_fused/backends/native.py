"""The one place that imports the compiled module. ``module`` is None, and ``missing`` says why, where there is none."""

from __future__ import annotations

from typing import Any

import torch

from .. import plain
from ..gather import DTYPES
from .launch import ROW_WORDS, Launch

module: Any
try:
    from .. import _native  # type: ignore[attr-defined,unused-ignore]

    module, missing = _native, ""
except ImportError as error:
    module = None
    missing = (
        f"the compiled extension is not there ({error}); install a C++ compiler (and nvcc for CUDA) and run "
        "'pip install --force-reinstall --no-deps .' again"
    )

assert module is None or module.ROW_WORDS == ROW_WORDS
DLPACK_CPU = 1  # DLPack's device type, csrc/dlpack.h


def new_batch(slots: tuple[str, ...], device_types: set[str], dtensor: Any) -> Any:
    """A reader of parameters and state in C++, or None where the module or torch's DLPack exchange API is missing."""
    api = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if module is None or api is None or not device_types:
        return None
    known = module.PlainTensors(plain.samples(), plain.PLAIN, plain.DEVICE_BITS, plain.is_plain)
    return module.Batch(slots, (torch.nn.Parameter, torch.Tensor, dtensor), api, sorted(device_types), known)


def bucket(launch: Launch, rows: int, coefficients: int) -> tuple[int, ...]:
    """The module's arguments for a launch whose rows and coefficients lie at these addresses."""
    return (
        launch.algorithm.number,
        not launch.lean,
        DTYPES.index(launch.param_dtype),
        DTYPES.index(launch.grad_dtype),
        rows,
        len(launch),
        coefficients,
    )
