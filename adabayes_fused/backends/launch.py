"""What a backend is handed: one bucket of parameters that one launch updates."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..algorithms import Algorithm

ROW_WORDS = 9  # 64-bit words a row of the table, csrc/table.h
COEFFICIENTS = 8  # numbers a rule takes


@dataclass
class Launch:
    """Parameters of one device and one pair of dtypes. Either ``address`` and ``count`` say where the rows of the table
    lie, or ``tensors`` holds each parameter's (param, grad, *slots), ``steps`` its step count and ``which`` its row of
    ``coefficients``."""

    algorithm: Algorithm
    lean: bool
    backend: str
    device: torch.device
    param_dtype: torch.dtype
    grad_dtype: torch.dtype
    keys: Sequence[tuple[int, Any]]  # the group and the step count after this step of each row of coefficients
    address: int = 0
    count: int = 0
    tensors: list[list[Tensor]] = field(default_factory=list)
    steps: list[Tensor] = field(default_factory=list)
    which: list[int] = field(default_factory=list)
    coefficients: array[float] | Tensor | None = None  # float64, eight a set; on the device where the host must not know them
    far: bool = False  # some average moves by more than half, which takes a kernel of Triton's that can
    uploaded: tuple[Tensor, Tensor] | None = None  # rows and chunk map, on the device: backends/table.py
    found_inf: Tensor | None = None  # on the device: one float32, not zero where nothing may change
    groups: tuple[Any, ...] = ()  # process groups over which its gradients are spread, where their norm is wanted
    kept_alive: list[Tensor] = field(default_factory=list)  # takes memory that a captured graph goes on reading

    @property
    def slots(self) -> int:
        return len(self.algorithm.stored(self.lean))

    def __len__(self) -> int:
        return self.count or len(self.tensors)

    def coefficient_rows(self) -> Tensor:
        """``coefficients``, which are set before a backend prepares the launch, as a tensor of shape (sets, 8)."""
        assert self.coefficients is not None
        if isinstance(self.coefficients, array):
            self.coefficients = torch.tensor(self.coefficients, dtype=torch.float64, device="cpu").view(-1, COEFFICIENTS)
        return self.coefficients

    def coefficient_address(self) -> int:
        """Where they lie, for a kernel on the CPU."""
        return self.coefficients.buffer_info()[0] if isinstance(self.coefficients, array) else self.coefficient_rows().data_ptr()

    def rows(self) -> Tensor:
        """The table's rows: int64 on the CPU, shape (parameters, 9)."""
        if self.address:
            rows = torch.empty(self.count, ROW_WORDS, dtype=torch.int64, device="cpu")
            ctypes.memmove(rows.data_ptr(), self.address, rows.nbytes)
            return rows
        unused = [0] * (ROW_WORDS - 5 - self.slots)
        return torch.tensor(
            [
                [*(self._address(t) for t in tensors), *unused, tensors[0].numel(), k, step.data_ptr()]
                for tensors, step, k in zip(self.tensors, self.steps, self.which, strict=True)
            ],
            dtype=torch.int64,
            device="cpu",
        )

    def _address(self, t: Tensor) -> int:
        """Where a kernel of this launch finds ``t``. Of another tensor it would follow an address that is not its own."""
        address = t.data_ptr()
        if t.device != self.device or not address and t.numel():
            raise RuntimeError(f"a kernel on {self.device} was to be given a tensor on {t.device} at address {address:#x}")
        return address
