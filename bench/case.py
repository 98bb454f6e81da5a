"""A case: a list of shapes, who steps over it, and a row for each; who cannot, has a note that says why."""

from __future__ import annotations

import gc
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import psutil
import torch

from .check import Wrong
from .contenders import ANCHOR, Contender, contenders
from .shapes import case_of, copies, count, random_parameters
from .timing import Tell

SHARED_ABOVE = 64_000_000  # parameters: beyond every cache, and a copy for each contender would not fit
LARGEST_STATE, TEMPORARIES = 16, 8  # bytes a parameter
Row = dict[str, Any]


class Case:
    """A list of shapes with its contenders, and a row for each: what was measured, or in ``note`` why nothing was."""

    def __init__(self, what: str, name: str, options: Namespace) -> None:
        title, self.shapes, self.dtype, self.loop = case_of(name)
        self.device, self.options = options.device, options
        self.parameters = count(self.shapes)
        self.shared = self.parameters > SHARED_ABOVE
        self.start: list = []  # made once
        everyone = contenders(self.device, self.loop, self.dtype)
        self.all = everyone
        self.contenders = {n: c for n, c in everyone.items() if chosen(c, options.contenders)}
        about = dict(what=what, case=name, title=title, device=self.device, dtype=str(self.dtype).removeprefix("torch."))
        about |= dict(tensors=len(self.shapes), parameters=self.parameters)
        self.rows: dict[str, Row] = {
            n: about | dict(contender=n, family=c.family, backend=c.backend, detail=c.detail, note="", wrong=False)
            for n, c in self.contenders.items()
        }
        self.about = about

    @property
    def running(self) -> dict[str, Contender]:
        return {n: c for n, c in self.contenders.items() if not self.rows[n]["note"]}

    def each(self, do: Callable[[Contender], Any], tell: Tell, doing: str) -> dict[str, Any]:
        """``do`` for every contender that still runs; one that fails gets its note and is out."""
        results = {}
        for i, (name, contender) in enumerate((running := self.running).items()):
            tell(i / len(running), f"{doing} {name}")
            try:
                results[name] = do(contender)
            except Wrong as error:
                self.rows[name] |= dict(note=f"WRONG, not timed: {error}", wrong=True)
            except Exception as error:
                self.rows[name]["note"] = reason(error)
        return results

    def leave_out_slow_compilations(self) -> None:
        for name, contender in self.running.items():
            if contender.compiles and len(self.shapes) > self.options.compile_at_most:
                self.rows[name]["note"] = f"not compiled: {len(self.shapes):,} tensors"

    def parameters_for(self, contender: Contender) -> list:
        """Parameters of its own, or in huge cases those of all. MemoryError where its state would not fit."""
        if self.shared and contender.name.startswith("ivon"):
            raise MemoryError("it gives parameters new memory; here all contenders share them")
        per_parameter = LARGEST_STATE + TEMPORARIES + 2 * self.dtype.itemsize * ((not self.start) + (not self.shared))
        needed, free = self.parameters * per_parameter, available(self.device)
        if needed > free:
            raise MemoryError(f"not enough memory: {needed / 1e9:.1f} GB may be needed, {free / 1e9:.1f} GB are free")
        self.start = self.start or random_parameters(self.shapes, self.device, self.dtype)
        return self.start if self.shared else copies(self.start)


def chosen(contender: Contender, wanted: list[str] | None) -> bool:
    return wanted is None or contender.name == ANCHOR or contender.name in wanted


def reason(error: BaseException) -> str:
    """The gist of an error on one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:2]) or type(error).__name__
    return (text if isinstance(error, (ImportError, MemoryError)) else f"{type(error).__name__}: {text}")[:200]


def available(device: str) -> int:
    """Bytes that can still be taken."""
    if device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]
    return psutil.virtual_memory().available
