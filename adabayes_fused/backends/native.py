"""The one place that imports the compiled module. ``module`` is None, and ``missing`` says why, where there is none."""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch

from .. import plain
from ..algorithms import Algorithm
from ..codes import Storage, described
from ..sharding import place_of
from ..table import DTYPES, NUMBERS, ROW_WORDS
from .launch import Launch

FOLDER = Path(__file__).parents[1]
_REMEDY = (
    "install a C++ compiler (and nvcc for CUDA) and run 'pip install --force-reinstall --no-deps .' again, with -e if you work "
    "in the source folder, which Python imports before any installed copy"
)


def _load() -> tuple[Any, str]:
    """The compiled module, or None and why it cannot be used."""
    try:  # not `from .. import`, whose error for a module that is not there speaks of circular imports
        found = importlib.import_module("adabayes_fused._native")
    except ImportError as error:
        return None, _why_missing(error)
    if (getattr(found, "ROW_WORDS", None), getattr(found, "NUMBERS", None)) != (ROW_WORDS, NUMBERS):
        return None, f"the compiled extension {found.__file__} was built from another version of the sources; {_REMEDY}"
    return found, ""


def _why_missing(error: ImportError) -> str:
    if copy := _copy_with_module():
        return (
            f"Python imported the sources in {FOLDER}, which have no compiled extension, not the installed copy in {copy}, "
            f"which has one. Run Python from another folder than {FOLDER.parent}, or run 'pip install --no-deps -e .' there"
        )
    others = ", ".join(sorted(path.name for path in FOLDER.glob("_native.*") if path.suffix in (".so", ".pyd")))
    beside = f"; there is {others}, which this Python does not load" if others else ""
    return f"the compiled extension is not there ({error}; looked in {FOLDER}{beside}); {_REMEDY}"


def _copy_with_module() -> Path | None:
    """Where else on sys.path this package lies, with a module of this Python's."""
    for entry in sys.path:
        copy = Path(entry).resolve() / FOLDER.name
        if copy != FOLDER.resolve() and any((copy / f"_native{suffix}").exists() for suffix in EXTENSION_SUFFIXES):
            return copy
    return None


module, missing = _load()
in_the_way = module is None and _copy_with_module() is not None  # of an installed copy, which whoever imports this means
_plain_tensors = module and module.plain_tensors(plain.samples(), plain.PLAIN, plain.DEVICE_BITS, plain.is_plain)
DLPACK_CPU = 1  # DLPack's device type, csrc/dlpack.h


def new_batch(algorithm: Algorithm, storage: Storage, device_types: set[str], dtensor: Any) -> Any:
    """A reader of parameters and state in C++, or None where the module or torch's DLPack exchange API is missing."""
    api = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if module is None or api is None or not device_types:
        return None
    slots, layouts = algorithm.stored(storage.lean), described(storage, algorithm)
    types = (torch.nn.Parameter, torch.Tensor, dtensor)
    return module.batch(slots, layouts, place_of, plain.alone, types, api, sorted(device_types), _plain_tensors)


def bucket(launch: Launch, rows: int, numbers: int) -> tuple[int, ...]:
    """The module's description of a launch whose rows and numbers lie at these addresses."""
    layout = launch.layout
    return (
        launch.algorithm.number,
        not launch.storage.lean,
        layout.state,
        layout.weight,
        DTYPES.index(launch.param_dtype),
        DTYPES.index(launch.grad_dtype),
        rows,
        len(launch),
        numbers,
    )
