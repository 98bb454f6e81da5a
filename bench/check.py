"""Whether a contender is right: its weights after a few steps against those of its judge, an unfused optimizer."""

from __future__ import annotations

import torch
from torch import Tensor

from .contenders import Contender
from .shapes import copies, random_parameters

STEPS = 3
TOLERANCE = {
    torch.float64: dict(rtol=1e-10, atol=1e-10),
    torch.float32: dict(rtol=1e-5, atol=1e-6),  # a few roundings of weights about 1
    torch.bfloat16: dict(rtol=1.6e-2, atol=5e-4),  # a few roundings, or half a step
}


class Wrong(AssertionError):
    """What is not timed, and why."""


class Checker:
    """Compares contenders on one list of shapes; each judge runs once."""

    def __init__(self, all_contenders: dict[str, Contender], shapes: list, device: str, dtype: torch.dtype) -> None:
        self.contenders, self.start = all_contenders, random_parameters(shapes, device, dtype)
        self.judged: dict[str, list[Tensor]] = {}

    def weights(self, contender: Contender) -> list[Tensor]:
        params = copies(self.start)
        optimizer = contender.make(params)
        for t in range(STEPS):
            for p, start in zip(params, self.start, strict=True):
                p.grad.copy_(start.grad).mul_((-0.5) ** t)  # some contenders clip it in place
            optimizer.step()
        return [p.detach() for p in params]

    def check(self, contender: Contender) -> None:
        """Raises Wrong, naming contender, tensor and element; or whatever the contender raises."""
        found = self.weights(contender)
        rounds_its_own_way = self.start[0].dtype == torch.bfloat16 and contender.family in ("torch", "peer")
        if contender.judge is None or rounds_its_own_way:  # at least it must have done something
            for i, (w, start) in enumerate(zip(found, self.start, strict=True)):
                if not w.isfinite().all() or torch.equal(w, start):
                    raise Wrong(f"{contender.name}: tensor {i} stood still or is not finite after {STEPS} steps")
            return
        if contender.judge not in self.judged:
            self.judged[contender.judge] = self.weights(self.contenders[contender.judge])
        for i, (w, expected) in enumerate(zip(found, self.judged[contender.judge], strict=True)):
            try:
                torch.testing.assert_close(w, expected, **TOLERANCE[w.dtype])
            except AssertionError as error:
                differs = " ".join(str(error).split())
                raise Wrong(f"{contender.name} against {contender.judge}, tensor {i}: {differs}") from None
