"""Figures 3 and 4, from the JSON of a results folder alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from . import reported
from .compare import ERROR, LOSS, Measure
from .report import captions
from .runs import FIGURE3, OURS, Group, groups, original, read, read_json

# Okabe and Ito's colours: a hue per family. The dashes tell all apart in grey.
STYLES: dict[str, dict[str, Any]] = {
    "SGD": dict(color="black", linestyle="-", linewidth=1),
    "Adam": dict(color="#E69F00", linestyle=(0, (5, 2))),
    "AdaGrad": dict(color="#CC79A7", linestyle=(0, (3, 1.5, 1, 1.5, 1, 1.5))),
    "AMSGrad": dict(color="#E69F00", linestyle=(0, (1, 1))),
    "AdaBound": dict(color="#009E73", linestyle=(0, (8, 2))),
    "AMSBound": dict(color="#009E73", linestyle=(0, (2, 2))),
    "AdamW": dict(color="#D55E00", linestyle=(0, (6, 1.5, 1, 1.5))),
    "AdaBayes-FP": dict(color="#56B4E9", linestyle=(0, (10, 1)), linewidth=2),
    "AdaBayes": dict(color="#0072B2", linestyle="-", linewidth=2.4),
    "AdaBayes, as released": dict(color="#D55E00", linestyle=(0, (8, 2))),
    "AdaBayes, exact transition": dict(color="#E69F00", linestyle=(0, (5, 2))),
    "AdaBayes, lagging variance": dict(color="#009E73", linestyle=(0, (1, 1))),
    "AdaBayes, slow path": dict(color="black", linestyle=(0, (6, 1.5, 1, 1.5))),
    "AdaBayes, sgd_lr=1": dict(color="#0072B2", linestyle=(0, (2, 2)), linewidth=2),
    "AdaBayes-FP, sgd_lr=1": dict(color="#56B4E9", linestyle=(0, (1, 1)), linewidth=2),
    "AdaBayes-FP, as released": dict(color="#CC79A7", linestyle=(0, (2, 2))),
    "AdaBayes-FP, slow path": dict(color="#7F7F7F", linestyle=(0, (3, 1.5, 1, 1.5, 1, 1.5))),
}
OTHER = dict(color="#7F7F7F", linestyle=":")
LAGGING = "AdaBayes, lagging variance"
GREY = "#555555"


def draw(folder: Path) -> list[Path]:
    """Writes figure4.png and, where AdaBayes was trained, figure3.png; returns their paths. Raises what ``read`` does."""
    found = groups(read(folder))
    written = []
    for name, picture in (("figure4", figure4(found)), ("figure3", figure3(found))):
        if picture:
            written.append(folder / f"{name}.png")
            picture.savefig(written[-1], dpi=110)
    return written


# --- Figure 4: test error and loss over the epochs --------------------------------------------------------------------


def figure4(found: list[Group]) -> Figure:
    """A row per group: Table 1's optimizers, and the variants beside what they are variants of."""
    variants = any(name not in reported.ORDER for group in found for name in curves(group))
    figure = Figure(figsize=(16 if variants else 11, 0.9 + 5 * len(found)), layout="constrained")
    axes = figure.subplots(len(found), 4 if variants else 2, squeeze=False, width_ratios=[3, 3, 2, 2] if variants else None)
    for line, group in zip(axes, found, strict=True):
        table1 = [name for name in curves(group) if name in reported.ORDER]
        others = [name for name in curves(group) if name not in reported.ORDER]
        originals = [name for name in table1 if name in map(original, others)]
        for at, measure, label in zip(line, (ERROR, LOSS) * 2, ("test error, %", "test loss") * 2, strict=False):
            _curves(at, group, originals + others if at in line[2:] else table1, measure)
            at.set_ylabel(label)
        line[0].set_title(group.title, loc="left")
        if others:
            line[2].set_title("Variants", loc="left")
            line[2].legend(fontsize=7, framealpha=1, edgecolor="white", loc="upper right")
    handles = {label: line for at in axes[:, 0] for line, label in zip(*at.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=9, frameon=False, handlelength=3.2)
    caption = f"Lines: means over seeds; bands: their range; dotted: the learning rates drop. {captions(found)}"
    figure.supxlabel(caption, fontsize=8, color=GREY)
    return figure


def curves(group: Group) -> dict[str, list[dict[str, Any]]]:
    """The runs whose mean is drawn, by optimizer: the complete ones or, where there are none, the longest."""
    unfinished = {run["optimizer"]: run for run in sorted(group.incomplete, key=lambda run: len(run["epochs"])) if run["epochs"]}
    return group.complete | {name: [run] for name, run in unfinished.items() if name not in group.complete}


def _curves(at: Axes, group: Group, names: Iterable[str], measure: Measure) -> None:
    for name in names:
        runs = curves(group)[name]
        label = name if name in group.complete else f"{name} (unfinished)"
        _band(at, runs, measure.key, dict(label=label, zorder=3 if name.startswith(OURS) else 2) | STYLES.get(name, OTHER))
    _over_epochs(at, group)


def _band(at: Axes, runs: list[dict[str, Any]], key: str, style: Mapping[str, Any]) -> None:
    """The mean over runs as a line, their range as a band."""
    epochs = [epoch["epoch"] for epoch in runs[0]["epochs"]]
    values = np.array([[epoch[key] for epoch in run["epochs"]] for run in runs], dtype=float)
    at.plot(epochs, values.mean(0), **style)
    if len(runs) > 1:
        at.fill_between(epochs, values.min(0), values.max(0), color=style["color"], alpha=0.15, linewidth=0)


def _over_epochs(at: Axes, group: Group) -> None:
    """The drop, at the end of its epoch, and axes of readable numbers, y's logarithmic."""
    if group.protocol["drop"] < group.protocol["epochs"]:
        at.axvline(group.protocol["drop"], color=GREY, linestyle=":", linewidth=1)
    at.set(yscale="log", xlabel="epoch")
    at.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    at.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 6, 8)))
    at.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    at.yaxis.set_minor_formatter(NullFormatter())
    open_sides(at)


def open_sides(at: Axes) -> None:
    at.grid(color="#E5E5E5")
    at.set_axisbelow(True)
    at.spines[["top", "right"]].set_visible(False)


# --- Figure 3: sigma^2_post of each weight ----------------------------------------------------------------------------


def figure3(found: list[Group]) -> Figure | None:
    """A column per group: the points, their ratio to Eq. 20, that ratio over the epochs. None where there is no AdaBayes."""
    found = [group for group in found if OURS in curves(group)]
    if not found:
        return None
    figure = Figure(figsize=(2 + 6.5 * len(found), 11), layout="constrained")
    axes = figure.subplots(3, len(found), squeeze=False, height_ratios=[5, 2.2, 2.4])
    for (top, middle, bottom), group in zip(axes.T, found, strict=True):
        points = read_points(curves(group)[OURS][0])
        if points:
            _points(top, middle, group, points)
        else:
            top.text(0.5, 0.5, "no points: not trained as far", ha="center", transform=top.transAxes)
        _ratio_over_epochs(bottom, group)
    figure.supxlabel(captions(found), fontsize=8, color=GREY)
    return figure


def read_points(run: Mapping[str, Any]) -> dict[str, Any] | None:
    path = run["path"].with_suffix(FIGURE3)
    points = read_json(path) if path.exists() else None
    return points if points and points["x"] else None  # a network that diverged has none


def _points(top: Axes, middle: Axes, group: Group, points: Mapping[str, Any]) -> None:
    """The points with Eq. 20 and its two limits; beneath, their ratio to Eq. 20."""
    x, post, sigma_sq = np.array(points["x"]), np.array(points["post"]), points["sigma_sq"]
    line = np.geomspace(min(x.min(), sigma_sq / 10) / 1.5, max(1.5 * np.quantile(x, 0.99), 30 * sigma_sq), 300)
    shown = x <= line[-1]
    dots = dict(color="#7F7F7F", s=4, alpha=0.35, linewidths=0, rasterized=True)
    top.scatter(x[shown], post[shown], **dots, label=f"weights ({len(x):,} of {points['weights']:,})")
    top.plot(line, line, color="#0072B2", linestyle=(0, (5, 2)), label=r"Adam limit, $\eta\,/\sqrt{\langle g^2\rangle}$")
    top.axhline(sigma_sq, color="#E69F00", linestyle=(0, (6, 1.5, 1, 1.5)), label=r"SGD limit, $\sigma^2$")
    top.plot(line, reported.eq_20(line, sigma_sq), color="#009E73", linewidth=2, label="Eq. 20")
    low = min(post.min(), reported.eq_20(line[0], sigma_sq))
    top.set(xscale="log", yscale="log", xlim=line[[0, -1]], ylim=(low / 1.3, 4 * sigma_sq), ylabel=r"$\sigma^2_{post}$",
            title=f"{group.title}, epoch {points['epoch']}: step size of each weight")  # fmt: skip
    ratio = post / reported.eq_20(x, sigma_sq)
    middle.scatter(x[shown], ratio[shown], **dots)
    middle.axhline(1, color="#009E73", linewidth=2)
    low, high = np.quantile(ratio, [0.001, 0.999])
    limits = dict(xlim=line[[0, -1]], ylim=(min(0.9, low - 0.02), max(1.1, high + 0.02)))
    names = dict(xlabel=r"$\eta\,/\sqrt{\langle g^2\rangle}$", ylabel=r"$\sigma^2_{post}$ / Eq. 20")
    middle.set(xscale="log", **limits, **names, title=_ratios(points))
    for at in (top, middle):
        at.axvline(sigma_sq, color="#CC79A7", linestyle=":", linewidth=1.5, label=r"$\sigma^2$")
        open_sides(at)
    beyond = int((~shown).sum())
    note = f"{points['left_out']:,} weights never had a gradient" + (f"; {beyond:,} points lie further right" if beyond else "")
    top.text(0.02, 0.98, note, transform=top.transAxes, va="top", fontsize=8, color=GREY)
    top.legend(loc="lower right", frameon=False)


def _ratios(points: Mapping[str, Any]) -> str:
    def shown(part: Mapping[str, Any]) -> str:
        return f"{part['ratio_mean']:.3f} ± {part['ratio_std']:.3f} over {part['weights']:,}"

    adam = points["adam_side"]
    return f"{shown(points)} weights; " + (f"{shown(adam)} on Adam's side" if adam else "none on Adam's side")


def _ratio_over_epochs(at: Axes, group: Group) -> None:
    """The mean over all weights, across the drop, with variances that follow the learning rate and, if trained, that lag."""
    for name in (OURS, LAGGING):
        runs = [run for run in curves(group).get(name, []) if all("ratio" in epoch for epoch in run["epochs"])]
        if runs:
            _band(at, runs, "ratio", dict(STYLES[name], label=name, marker="o", markersize=3))
    _over_epochs(at, group)
    low, high = at.get_ylim()
    at.set(ylim=(min(0.75, low), max(1.6, high)), ylabel=r"mean $\sigma^2_{post}$ / Eq. 20")
    if at.get_legend_handles_labels()[0]:
        at.legend(frameon=False)
