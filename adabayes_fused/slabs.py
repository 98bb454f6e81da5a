"""Memory for the state of small tensors: many of them in one storage, side by side in the order a step sweeps them.

A thousand biases' state in allocations of their own would be thousands of places in memory. In slabs, a step finds it in
a few, and one look at a slab tells whether the memory of all that lies in it has been replaced.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .plain import watched

# Bytes. Each step looks at each slab, so that there should be few; whoever pickles or copies one tensor of a slab takes all of it
# along, so that the first is small.
FIRST, SLAB = 1 << 12, 1 << 14
FEW = 16  # slabs: so many may stay though nothing lies in them
ALIGNMENT = 64  # bytes: a cache line and the widest vector. Step counts lie closer.


class Slabs:
    """``all``: the slabs there are, flat tensors. They live as long as anything that lies in them."""

    def __init__(self) -> None:
        self.all: list[Tensor] = []
        self._open: dict[tuple[torch.dtype, torch.device, int], tuple[Tensor, int]] = {}  # slab, elements taken
        self._sweep_at = FEW

    def empty(self, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor | None:
        """A tensor in a slab; None if it is too large, or empty, or where kernels do not go. The strides must leave no gaps."""
        numel = math.prod(shape)
        if not 0 < numel * dtype.itemsize <= SLAB or device.type not in ("cpu", "cuda") or watched():
            return None
        align = ALIGNMENT // dtype.itemsize if shape else 1
        kind = dtype, device, align
        slab, taken = self._open.get(kind, (None, 0))
        if slab is None or taken + numel > len(slab):
            size = FIRST if slab is None and numel * dtype.itemsize <= FIRST else SLAB
            slab, taken = torch.zeros(size // dtype.itemsize, dtype=dtype, device=device), 0
            self.all.append(slab)
        self._open[kind] = slab, taken + -(-numel // align) * align
        return torch.empty(0, dtype=dtype, device=device).set_(slab.untyped_storage(), taken, shape, strides)

    def forget_unused(self, state: Iterable[Any]) -> None:
        """Lets go of the slabs in which no tensor of ``state`` lies, once there are twice as many slabs as were in use."""
        if len(self.all) < self._sweep_at:
            return
        used = {t.untyped_storage().data_ptr() for t in state if isinstance(t, Tensor)}
        self.all = [slab for slab in self.all if slab.data_ptr() in used]
        self._open.clear()
        self._sweep_at = max(FEW, 2 * len(self.all))
