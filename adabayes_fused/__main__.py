"""``python -m adabayes_fused``: which backends this machine has, why not the others, and whether each is right.

Every backend that runs here takes a few steps beside the slow path (``adabayes_fused.reference``) in float64. The exit status
is 1 if one of them fails or differs, or if a device for which there are kernels gets none; else it is 0.
"""

from __future__ import annotations

import platform
import sys

import torch

from . import AdaBayes, AdaBayesFP, __version__, reference
from .backends import BACKENDS, choose

TOLERANCE = 1e-12
SHAPES = [(), (3,), (33, 7), (0, 4), (1,), (10007,)]
ALGORITHMS = [(AdaBayes, reference.AdaBayes, {"batch_size": 8}), (AdaBayesFP, reference.AdaBayesFP, {})]


def largest_difference(backend: str, device: torch.device, steps: int = 5) -> float:
    """The largest difference between a weight of the fused and of the slow path, over both algorithms."""
    largest = 0.0
    for fused_class, slow_class, options in ALGORITHMS:
        generator = torch.Generator().manual_seed(0)
        starts = [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in SHAPES]
        fused, slow = ([torch.nn.Parameter(w.to(device, copy=True)) for w in starts] for device in (device, "cpu"))
        optimizers = fused_class(fused, lr=1e-2, backend=backend, **options), slow_class(slow, lr=1e-2, **options)
        for _ in range(steps):
            for p, q in zip(fused, slow, strict=True):
                q.grad = torch.randn(q.shape, dtype=torch.float64, generator=generator)
                p.grad = q.grad.to(device)
            for optimizer in optimizers:
                optimizer.step()
        differences = [(p.cpu() - q).abs().max().item() for p, q in zip(fused, slow, strict=True) if p.numel()]
        largest = max(largest, *(d if d == d else float("inf") for d in differences))
    return largest


def describe(backend: str, device: torch.device) -> tuple[bool, str]:
    """(whether all is well, a line) for one backend on one device."""
    reason = BACKENDS[backend].unavailable(device)
    if reason is not None:
        return True, f"no   {reason}"
    try:
        difference = largest_difference(backend, device)
    except Exception as error:
        return False, f"FAILS  {type(error).__name__}: {error}"
    verdict = "ok " if difference <= TOLERANCE else "WRONG"
    preferred = ", what backend='auto' takes" if choose("auto", device) == backend else ""
    return difference <= TOLERANCE, f"{verdict}  largest difference to the slow path {difference:.1e}{preferred}"


def main() -> int:
    devices = [torch.device("cpu")] + ([torch.device("cuda")] if torch.cuda.is_available() else [])
    names = {"cpu": platform.processor() or platform.machine(), "cuda": torch.cuda.get_device_name() if len(devices) > 1 else ""}
    print(f"adabayes_fused {__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    all_well = True
    for device in devices:
        print(f"\nparameters on {device.type} ({names[device.type]})")
        for backend in BACKENDS:
            well, line = describe(backend, device)
            all_well &= well
            print(f"  {backend:8} {line}")
        if choose("auto", device) == "foreach":
            all_well = False
            print("  No kernel runs here, so backend='auto' takes 'foreach', which is slow. What to do stands above.")
    if len(devices) == 1:
        print("\nparameters on cuda")
        for backend in ("cuda", "triton"):
            print(f"  {backend:8} no   {BACKENDS[backend].unavailable(torch.device('cuda'))}")
    return 0 if all_well else 1


if __name__ == "__main__":
    sys.exit(main())
