"""What a backend is handed: one bucket of parameters that one launch updates."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..algorithms import Algorithm
from ..codes import Layout, Storage
from ..table import MAX_SLOTS, ROW_WORDS, Table

CANNOT_LOAD = "its kernels cannot be loaded there"  # so begins the reason on a GPU, or a driver, they were not built for
Copies = Sequence[tuple[Tensor, Tensor]]  # a parameter with gaps, and the dense tensor that is updated in its place


class Undecided(NamedTuple):
    """What a GPU decides a step by: its norm, torch.amp.GradScaler's scale and overflow, and what clips and skips."""

    sums: Tensor | None  # whose sum is that of all squared gradients; None where nobody wants their norm
    grad_scale: Tensor | None  # one float32 there; None where the host knows it
    known_scale: float
    found_inf: Tensor | None  # one float32 there, not zero where nothing may change
    limit: float  # of the norm; infinite where nothing is clipped
    skip_nonfinite: bool
    skipped: Tensor  # int64, counts the step if it is to be skipped; on the device that decides

    def decision(self) -> Tensor:
        """Memory for factor, norm and skip, float64."""
        return torch.empty(3, dtype=torch.float64, device=self.skipped.device)


def in_turn(updates: list[Callable[[], None]], copies: Copies) -> Callable[[], None]:
    """The function that makes these updates and writes ``copies`` back."""

    def run() -> None:
        for update in updates:
            update()
        for param, copy in copies:
            param.copy_(copy)

    return run


@dataclass
class Launch:
    """Parameters of one device and one pair of dtypes. Either ``address`` and ``count`` say where the rows of the table lie, or
    ``tensors`` holds each parameter's (param, grad, *slots, correction), ``numbers_of`` its step count and seed, and ``group_of``
    its parameter group."""

    algorithm: Algorithm
    storage: Storage
    backend: str
    device: torch.device
    param_dtype: torch.dtype
    grad_dtype: torch.dtype
    address: int = 0
    count: int = 0
    tensors: list[list[Tensor]] = field(default_factory=list)
    numbers_of: list[tuple[Tensor, ...]] = field(default_factory=list)  # step, seed
    places: list[tuple[int, int, int]] = field(default_factory=list)  # first, run, stride (csrc/table.h)
    group_of: list[int] = field(default_factory=list)
    spread: tuple[Any, ...] = ()  # process groups over which its gradients are spread, where their norm is wanted
    far: bool = False  # some average moves by more than half, which takes a kernel of Triton's that can
    table: Table | None = None  # what the device has of the rows
    kept_alive: list[Tensor] = field(default_factory=list)  # takes memory that a captured graph goes on reading
    numbers: Sequence[Sequence[Any]] = ()  # sixteen of each group: floats, or 0-dim tensors there (scalars.Numbers)
    factor: float = 1.0  # of every gradient, as far as the host knows it
    packed: Any = None  # both for kernels that read a table: float64, an array on the CPU, a tensor on the device
    decides: bool = False  # whether there will be a decision
    decision: Tensor | None = None  # factor, norm and skip on the device, float64, where the host must not know them
    known_steps: bool = False  # whether the host may read the step counts
    _brought: bool = False

    @property
    def layout(self) -> Layout:
        return self.storage.layout(self.algorithm, self.param_dtype)

    @property
    def steps(self) -> list[Tensor]:
        return [numbers[0] for numbers in self.numbers_of]

    def __len__(self) -> int:
        return self.count or len(self.tensors)

    @property
    def key(self) -> tuple[Any, ...]:
        """What tells it from the other launches of a step."""
        return self.backend, self.device, self.param_dtype, self.grad_dtype, self.spread, bool(self.address)

    def rows(self) -> bytes:
        """The table's rows (csrc/table.h)."""
        if self.address:
            return ctypes.string_at(self.address, 8 * ROW_WORDS * self.count)
        words = [self._row(*entry) for entry in zip(self.tensors, self.numbers_of, self.group_of, self.places, strict=True)]
        return bytes((ctypes.c_int64 * (ROW_WORDS * len(words)))(*chain.from_iterable(words)))

    def _row(self, tensors: list[Tensor], numbers: tuple[Tensor, ...], group: int, place: tuple[int, int, int]) -> list[int]:
        slots = len(self.layout.slots)
        addresses = [self._address(t) for t in tensors]
        correction, seed = addresses[2 + slots :] or [0], [self._address(t) for t in numbers[1:]] or [0]
        addresses = [*addresses[: 2 + slots], *[0] * (MAX_SLOTS - slots)]
        return [*addresses, tensors[0].numel(), group, self._address(numbers[0]), *correction, *seed, *place]

    def bring_table(self, chunk: int) -> Table:
        """The table on the device, for programs of ``chunk`` elements."""
        assert self.table is not None
        if not self._brought:
            self.table.bring(self.rows(), chunk, self.device, self.kept_alive)
            self._brought = True
        return self.table

    def _address(self, t: Tensor) -> int:
        """Where a kernel of this launch finds ``t``. Of another tensor it would follow an address that is not its own."""
        address = t.data_ptr()
        if t.device != self.device or not address and t.numel():
            raise RuntimeError(f"a kernel on {self.device} was to be given a tensor on {t.device} at address {address:#x}")
        return address
