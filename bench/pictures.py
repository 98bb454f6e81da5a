"""The two pictures: steps of every case beside torch's fused AdamW, and how the time grows with the model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from .contenders import ANCHOR

TITLE = "Time of optimizer.step() as a multiple of torch's fused AdamW (log scale, left is faster)"
COLOURS = {"ours": "#0072B2", "torch": "#7F7F7F", "slow path": "#E69F00", "peer": "#009E73"}  # Okabe and Ito's
FAMILIES = {"ours": "adabayes_fused", "torch": "torch.optim", "slow path": "AdaBayes in plain PyTorch", "peer": "other packages"}
LINES = {
    "AdaBayes": ("#0072B2", "o"),
    "AdaBayes lean": ("#56B4E9", "s"),
    ANCHOR: ("#7F7F7F", "D"),
    "slow path AdaBayes": ("#E69F00", "^"),
}


def draw(folder: Path, caption: str, rows: list[dict]) -> list[Path]:
    """Writes step.png and scaling.png for what was measured; returns their paths."""
    written = []
    for name, picture in (("step", step_picture), ("scaling", scaling_picture)):
        some = [row for row in rows if row["what"] == name]
        if any(row.get("relative") for row in some):
            written.append(folder / f"{name}.png")
            picture(some, caption).savefig(written[-1], dpi=110)
    return written


# --- Steps beside AdamW's ---------------------------------------------------------------------------------------------


def step_picture(rows: list[dict], caption: str) -> Figure:
    rows = [row for row in rows if not row["detail"]]
    cases = {row["case"]: row["title"] for row in rows if row.get("relative")}
    names = list(dict.fromkeys(row["contender"] for row in rows if row["family"] in COLOURS))
    columns = min(3, len(cases))
    lines = -(-len(cases) // columns)
    figure = Figure(figsize=(2.6 + 3.6 * max(columns, 2), 1.9 + lines * (0.7 + 0.24 * len(names))), layout="constrained")
    axes = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    ratios = [row["relative"] for row in rows if row.get("relative")]
    limits = (min(0.3, min(ratios) / 2), max(3, max(ratios) * 4))
    for at, case, title in zip(axes.flat, cases, cases.values(), strict=False):
        _bars(at, {row["contender"]: row for row in rows if row["case"] == case}, names, limits)
        at.set_title(title, fontsize=11, loc="left")
    for at in axes.flat[len(cases) :]:
        at.set_visible(False)
    axes[0, 0].invert_yaxis()
    axes[0, 0].set_yticks(range(len(names)), names)
    for at in [axes[-1, k] if k < len(cases) - columns * (lines - 1) else axes[-2, k] for k in range(columns)]:
        at.set_xlabel("step time / AdamW fused")
        at.tick_params(labelbottom=True)
    _legend(figure, {row["family"] for row in rows})
    figure.supxlabel(caption, fontsize=8, color="#555555")
    return figure


def _bars(axes, rows: dict[str, dict], names: list[str], limits: tuple[float, float]) -> None:
    axes.set(xscale="log", xlim=limits, ylim=(-0.6, len(names) - 0.4))
    axes.axvline(1, color="#7F7F7F", linewidth=1)
    anchor = rows[ANCHOR]["median_s"]
    for y, name in enumerate(names):
        row = rows.get(name, {})
        ratio = row.get("relative")
        if ratio is None:
            axes.text(1.08, y, _short(row.get("note", "")), va="center", fontsize=7, style="italic", color="#888888")
            continue
        axes.barh(y, ratio - 1, left=1, height=0.7, color=COLOURS[row["family"]])
        floor = row.get("floor_s", 0) / anchor
        axes.text(1.08 * max(ratio, 1, floor), y, f"{ratio:.2f}" if ratio < 9.95 else f"{ratio:.0f}", va="center", fontsize=8)
        if floor > limits[0]:
            axes.plot([floor, floor], [y - 0.42, y + 0.42], color="black", linewidth=1.8, solid_capstyle="butt")
        elif floor:
            axes.plot(limits[0] * 1.1, y, marker="<", color="black", markersize=3.5)
    axes.grid(axis="x", color="#E5E5E5")
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0,)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="y", length=0, labelsize=9)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _short(note: str) -> str:
    return note if len(note) <= 40 else note[:38] + "…"


def _legend(figure: Figure, families: set[str]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list = [Patch(color=COLOURS[f], label=label) for f, label in FAMILIES.items() if f in families]
    handles.append(Line2D([], [], color="black", linewidth=1.8, label="floor: memory moves the same bytes (◂ off the scale)"))
    figure.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False, fontsize=9, title=TITLE, title_fontsize=12)


# --- Scaling ----------------------------------------------------------------------------------------------------------


def scaling_picture(rows: list[dict], caption: str) -> Figure:
    rows = [row for row in rows if "median_s" in row and row["family"] != "floor"]
    many = max((row for row in rows), key=lambda row: row["tensors"])["parameters"]
    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    _curves(left, [row for row in rows if row["tensors"] == 1], "parameters")
    left.set(title="One tensor that grows", xlabel="parameters", ylabel="time of optimizer.step(), ms")
    _curves(right, [row for row in rows if row["parameters"] == many], "tensors")
    right.set(
        title=f"{many / 1e6:g} M parameters in more and more tensors", xlabel="tensors", ylabel="time of optimizer.step(), ms"
    )
    figure.supxlabel(caption, fontsize=8, color="#555555")
    return figure


def _curves(axes, rows: list[dict], key: str) -> None:
    axes.set(xscale="log", yscale="log")
    labels = []
    for name, (colour, marker) in LINES.items():
        points = sorted(
            (row[key], row["median_s"], row["p20_s"], row["p80_s"], row.get("floor_s"))
            for row in rows
            if row["contender"] == name
        )
        if not points:
            continue
        x, median, p20, p80, floors = zip(*points, strict=True)
        axes.fill_between(x, 1e3 * np.array(p20), 1e3 * np.array(p80), color=colour, alpha=0.2, linewidth=0)
        axes.plot(x, 1e3 * np.array(median), color=colour, marker=marker, markersize=4, linewidth=2)
        labels.append((1e3 * median[-1], x[-1], name, colour))
        if name.startswith("AdaBayes") and all(floors):
            axes.plot(x, 1e3 * np.array(floors), color="black", linewidth=1, linestyle=":" if "lean" in name else "--", zorder=1)
            labels.append((1e3 * floors[-1], x[-1], f"floor, {'lean' if 'lean' in name else 'full'}", "black"))
    _direct_labels(axes, labels)
    axes.grid(color="#E5E5E5")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.spines[["top", "right"]].set_visible(False)


def _direct_labels(axes, labels: list[tuple]) -> None:
    """Names at the right ends of the curves, pushed apart where the curves meet."""
    labels = sorted(labels)
    wanted = np.log([y for y, *_ in labels])
    apart = np.diff(np.log(axes.get_ylim()))[0] * 0.055 * np.arange(len(labels))
    up, down = np.maximum.accumulate(wanted - apart) + apart, np.minimum.accumulate((wanted - apart)[::-1])[::-1] + apart
    for (y, x, name, colour), at in zip(labels, np.exp((up + down) / 2), strict=True):
        axes.annotate(name, (x, y), xytext=(x * 1.25, at), color=colour, fontsize=9, va="center", annotation_clip=False)
    axes.margins(x=0.02)
