"""What a device holds of things that the host knows, and that hardly ever change: the table of a launch, the groups' numbers.

It goes there when it differs from what is there. Each time into new memory: kernels that are still to run, and captured graphs,
read the old one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .plain import ordinary_mode

MAX_SLOTS, ROW_WORDS, NUMBERS = 4, 14, 16  # of a row; 64-bit words of a row, and of a group's numbers: csrc/table.h
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)  # what kernels load and store, numbered as there


def raw_stream(device: torch.device) -> int:
    """The current stream there, as the CUDA runtime knows it; 0 on the CPU."""
    if device.type != "cuda":
        return 0
    index = device.index if device.index is not None else torch.cuda.current_device()
    stream: int = torch._C._cuda_getCurrentRawStream(index)  # the public way takes ten times as long
    return stream


class Mirror:
    """A device's copy of what the host has as bytes."""

    def __init__(self) -> None:
        self._key: tuple[object, ...] = ()
        self._there: Tensor | None = None

    def of(self, what: bytes, device: torch.device, words: Callable[[], Tensor], kept_alive: list[Tensor]) -> tuple[Tensor, bool]:
        """``words()``, int64 on the CPU that depend on ``what`` alone, on ``device``; and whether they have gone there just now.
        Waits for nothing. Into ``kept_alive`` goes what a graph under capture reads from now on."""
        on_gpu = device.type == "cuda"
        capturing = on_gpu and torch.cuda.is_current_stream_capturing()
        # Capture begins where all work is done, so that what lies there already may be read on its stream.
        key = what, device, self._key[2] if capturing and self._key else raw_stream(device)
        new = key != self._key
        if new or self._there is None:
            with ordinary_mode():
                here = words().pin_memory() if on_gpu else words()
                self._there, self._key = here.to(device, non_blocking=True), key
            if capturing:
                kept_alive.append(here)  # the graph copies from it at every replay
        if capturing:
            kept_alive.append(self._there)
        return self._there, new


class Table:
    """A launch's rows, its chunk map and a ticket for each row: what a GPU kernel reads."""

    def __init__(self) -> None:
        self._mirror = Mirror()
        self._chunk = 0
        self._numels = torch.empty(0, dtype=torch.int64, device="cpu")
        self._map = self._numels
        self.rows = self.chunks = self.tickets = self._numels
        self._sums: Tensor | None = None

    def bring(self, rows: bytes, chunk: int, device: torch.device, kept_alive: list[Tensor]) -> None:
        """Has ``rows``, ``chunks`` and ``tickets`` on ``device``, for programs of ``chunk`` elements."""
        if chunk != self._chunk:
            self._mirror, self._numels, self._chunk = Mirror(), self._numels[:0], chunk

        def words() -> Tensor:
            here = torch.frombuffer(bytearray(rows), dtype=torch.int64).view(-1, ROW_WORDS)
            if not torch.equal(here[:, 6], self._numels):
                self._numels = here[:, 6].clone()
                self._map = chunk_map(self._numels, chunk)
            return torch.cat((here.reshape(-1), self._map, torch.zeros(len(here), dtype=torch.int64, device="cpu")))

        there, new = self._mirror.of(rows, device, words, kept_alive)
        if new:
            n = len(self._numels)
            self.rows, self.chunks, self.tickets = torch.split(there, [n * ROW_WORDS, len(self._map), n])
            self._sums = None

    @property
    def sums(self) -> Tensor:
        """Memory for a float64 of each chunk, there until the next step."""
        if self._sums is None:
            with ordinary_mode():
                self._sums = torch.empty(len(self.chunks), dtype=torch.float64, device=self.chunks.device)
        return self._sums


def chunk_map(numels: Tensor, chunk: int) -> Tensor:
    """One word a program: the row's index above the number of the chunk in its tensor. An empty tensor has one, which counts."""
    counts = ((numels + (chunk - 1)) // chunk).clamp(min=1)
    rows = torch.repeat_interleave(torch.arange(len(numels), device="cpu"), counts)
    first = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    return (rows << 32) | (torch.arange(len(rows), device="cpu") - first)
