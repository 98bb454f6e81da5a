"""The README's picture from committed results, time and memory of a step beside AdamW's: ``python -m bench.overview``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

from .contenders import ANCHOR
from .pictures import COLOURS

H200 = Path(__file__).parent / "results" / "h200"
TITLE = "Lean AdaBayes takes less time than AdamW, or fewer bytes, or both"


class Bar(NamedTuple):
    label: str
    family: str
    relative: float
    each: float  # bytes of weight, gradient and state of one parameter


# Which contenders of which folder are shown, and what the reader knows them by.
SHOWN = {
    "float32 weights": {
        "low-precision": {
            ANCHOR: "torch AdamW(fused=True)",
            "AdaBayes lean": "AdaBayes(lean=True)",
            "AdaBayes lean bfloat16": '… state_dtype="bfloat16"',
            "AdaBayes lean 8bit": '… state_dtype="8bit"',
        },
        "step": {"torch-optimi AdamW": "torch-optimi AdamW, its loop"},
    },
    "bfloat16 weights": {
        "low-precision-bfloat16": {
            ANCHOR: "torch AdamW(fused=True)",
            "AdaBayes lean bfloat16 with 32bit weights": 'bfloat16 state, weights "32bit"',
            "AdaBayes lean 8bit with 24bit weights": '8bit state, weights "24bit"',
            "AdaBayes lean 8bit with stochastic weights": '8bit state, weights "stochastic"',
            "flashoptim AdamW": "flashoptim AdamW",
        },
    },
}


def bars(folders: dict[str, dict[str, str]], results: Path) -> list[Bar]:
    """In the order of ``SHOWN``, of each folder's first case; one that was not measured raises KeyError."""
    found = []
    for folder, labels in folders.items():
        rows = [row for row in json.loads((results / folder / "results.json").read_text())["rows"] if row.get("relative")]
        by_name = {row["contender"]: row for row in rows if row["case"] == rows[0]["case"]}
        for name, label in labels.items():
            row = by_name[name]
            each = (row["parameter_bytes"] + row["state_bytes"]) / row["parameters"]
            found.append(Bar(label, row["family"], row["relative"], each))
    return found


def picture(results: Path = H200) -> Figure:
    figure = Figure(figsize=(9.6, 4.6), layout="constrained")
    groups = {title: bars(folders, results) for title, folders in SHOWN.items()}
    axes = figure.subplots(
        len(groups), 2, sharex="col", squeeze=False, gridspec_kw=dict(height_ratios=[len(some) for some in groups.values()])
    )
    for (title, some), (left, right) in zip(groups.items(), axes, strict=True):
        left.set_title(title, loc="left", fontsize=10, fontweight="bold")
        for at, values, text in (
            (left, [bar.relative for bar in some], "{:.2f}"),
            (right, [bar.each for bar in some], "{:.3g}"),
        ):
            at.barh(range(len(some)), values, height=0.66, color=[COLOURS[bar.family] for bar in some])
            for y, value in enumerate(values):
                label = at.annotate(text.format(value), (value, y), xytext=(3, 0), textcoords="offset points", va="center")
                label.set(fontsize=9, bbox=dict(facecolor="white", edgecolor="none", pad=1))
            at.invert_yaxis()
            at.margins(x=0.12)
            at.spines[["top", "right", "left"]].set_visible(False)
            at.tick_params(length=0)
        left.set_yticks(range(len(some)), [bar.label for bar in some], fontsize=9)
        right.set_yticks([])
        left.axvline(1, color=COLOURS["torch"], linewidth=1, zorder=0)
    axes[-1, 0].set_xlabel("time of a step / AdamW(fused=True)")
    axes[-1, 1].set_xlabel("bytes a parameter: weight, gradient and state")
    figure.suptitle(TITLE, fontsize=12)
    figure.supxlabel("NVIDIA H200, one tensor of 256 M weights; shorter is better", fontsize=8, color="#555555")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.overview", description=__doc__)
    default = Path(__file__).parents[1] / "docs" / "images" / "overview.png"
    parser.add_argument("--output", type=Path, default=default, metavar="FILE", help="docs/images/overview.png, if not given")
    output = parser.parse_args().output
    output.parent.mkdir(parents=True, exist_ok=True)
    picture().savefig(output, dpi=130)
    print(output)


if __name__ == "__main__":
    main()
