"""Step time against the number of parameters in one tensor, and against the number of tensors: ``python -m bench scaling``."""

from __future__ import annotations

from .contenders import ANCHOR

CONTENDERS = ["AdaBayes", "AdaBayes lean", ANCHOR, "slow path AdaBayes"]


def points(quick: bool) -> list[str]:
    """Names of cases: one tensor that grows, then a fixed total in more and more tensors."""
    sizes = ["1K", "100K", "4M"] if quick else ["1K", "10K", "100K", "1M", "10M", "100M", "1G"]
    total, counts = (1_000_000, [1, 32, 1000]) if quick else (16_000_000, [1, 10, 100, 1000, 10_000])
    return [*(f"1x{size}" for size in sizes), *(f"{n}x{total // n}" for n in counts)]
