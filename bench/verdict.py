"""``python -m bench.verdict RESULTS ...``: a GPU's results against the targets, line by line; exits with 1 where one is missed"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from .contenders import ANCHOR

LARGE, NETWORKS = "1x256M", ("resnet34", "densenet121", "gpt2")
REAL = [network + loop for network in ("densenet121", "gpt2") for loop in (":clipped", ":scaled", ":scaled:clipped")]
FULL = 40 / 28  # bytes a parameter that a step with the full state moves, over AdamW's
SLOW, PEERS = "slow path AdaBayes", ("torch-optimi AdamW", "flashoptim AdamW")
MEGABYTE = 1e6
Rows = dict[str, dict]  # of a case, by contender


class Target(NamedTuple):
    """``figure(row, rows)`` of the contenders that ``of`` names is to be ``at_most`` so much, or ``at_least``."""

    case: str
    of: str  # "full", "lean" or "": both, of AdaBayes
    what: str
    figure: Callable[[dict, Rows], float]
    bound: float
    at_least: bool = False


def over(contender: str) -> Callable[[dict, Rows], float]:
    """The time of a step over that of another contender's."""
    return lambda row, rows: row["median_s"] / rows[contender]["median_s"]


TARGETS = [
    Target(LARGE, "lean", "% of a device copy", lambda row, _: row["percent_of_floor"], 95, True),
    Target(LARGE, "full", "% of a device copy", lambda row, _: row["percent_of_floor"], 92, True),
    Target(LARGE, "lean", "/ AdamW fused", over(ANCHOR), 0.97),
    Target(LARGE, "full", "/ AdamW fused", over(ANCHOR), FULL),
    *(Target(c, "lean", "/ AdamW fused", over(ANCHOR), b) for c, b in zip(NETWORKS, (0.80, 0.35, 0.80), strict=True)),
    *(Target(c, "full", "/ AdamW fused", over(ANCHOR), b) for c, b in zip(NETWORKS, (FULL, 0.35, FULL), strict=True)),
    *(Target(c, "lean", "/ AdamW fused, which does the same", over(ANCHOR), 0.70) for c in REAL),
    *(Target(c, "full", "/ slow path", over(SLOW), b) for c, b in zip(NETWORKS, (1 / 15, 1 / 50, 1 / 3), strict=True)),
    Target(LARGE, "full", "/ slow path", over(SLOW), 0.36),
    Target(LARGE, "full", "/ slow path, compiled", over(f"{SLOW}, compiled"), 1.00),
    *(Target(c, "", "kernels and copies a step", lambda row, _: row["launches"], 1) for c in (LARGE, *NETWORKS)),
    *(Target(c, "", f"/ {peer}", over(peer), 1.0) for c in (LARGE, *NETWORKS) for peer in PEERS),
    *(Target(c, "", "extra MB at the peak", lambda row, _: row["peak_extra_bytes"] / MEGABYTE, 1.0) for c in (LARGE, *NETWORKS)),
]


def judged(rows: list[dict]) -> Iterator[tuple[Target, str, float | str]]:
    """Each target, with each fused contender's figure; why there is none, where there is none."""
    for target in TARGETS:
        of_case = {row["contender"]: row for row in rows if (row["what"], row["case"]) == ("step", target.case)}
        for name, row in of_case.items():
            lean = name.removeprefix("AdaBayes").startswith(" lean")
            fused = row.get("backend") in ("cuda", "triton") and name.partition(",")[0] in ("AdaBayes", "AdaBayes lean")
            if not fused or target.of not in ("", "lean" if lean else "full"):
                continue
            shown = f"{'lean' if lean else 'full'}, {row['backend']}"
            try:
                yield target, shown, target.figure(row, of_case)
            except KeyError as missing:
                yield (
                    target,
                    shown,
                    row["note"] or f"no {missing}: {of_case.get(missing.args[0], {}).get('note', 'not measured')}",
                )
        if not of_case:
            yield target, "", "the case was not measured"


def holds(target: Target, figure: float | str) -> bool:
    if isinstance(figure, str) or math.isnan(figure):
        return False
    return figure >= target.bound if target.at_least else figure <= target.bound


def show(rows: list[dict], console: Console) -> bool:
    """Prints the table; whether every target holds. Measured and unmeasured ones are told apart."""
    table, found = Table("case", "of", "what", "target", "measured", ""), list(judged(rows))
    for target, shown, figure in found:
        bound = f"{'>=' if target.at_least else '<='} {target.bound:.3g}"
        word = "-" if isinstance(figure, str) else "holds" if holds(target, figure) else "MISSED"
        table.add_row(target.case, shown, target.what, bound, figure if isinstance(figure, str) else f"{figure:.3g}", word)
    console.print(table)
    held = sum(holds(target, figure) for target, _, figure in found)
    console.print(f"{held} of {len(found)} hold")
    return held == len(found)


def main(paths: list[str]) -> int:
    console = Console()
    if not console.is_terminal:
        console.width = 130
    files = [Path(p) / "results.json" if Path(p).is_dir() else Path(p) for p in paths]
    if not files or not all(file.exists() for file in files):
        sys.exit("usage: python -m bench.verdict RESULTS ... (folders with a results.json, or such files)")
    rows = [row for file in files for row in json.loads(file.read_text())["rows"]]
    return 0 if show(rows, console) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
