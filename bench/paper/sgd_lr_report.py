"""The study of lr and sgd_lr, from its JSON alone: a table, and the picture of loss against lr."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter

from ..machine import caption
from .compare import Sample, pooled_variance
from .runs import BrokenRun, original, read_json
from .sgd_lr import ADABAYES, FIXED_POINT, FP, MEMORY, PARTS

SAME = ("steps", "data", "parameters", "examples")
KEYS = {"task", "optimizer", "sgd_lr", "lr", "seed", "options", *SAME, "train_loss", "test_loss", "machine"}
TITLES = {"image": "Images", "text": "Text"}
ADAMW = ("AdamW", None)
CURVES = [(optimizer, sgd_lr) for part in PARTS for optimizer, some in part.items() for sgd_lr in some]
Curve = tuple[str, float | None]


class Point(NamedTuple):
    """The runs of one optimizer, sgd_lr and lr, by seed; infinite where a loss is."""

    test: dict[int, float]
    train: dict[int, float]

    @property
    def mean(self) -> float:
        return sum(self.test.values()) / len(self.test)


class Grid(NamedTuple):
    """One task. ``points``: by curve and lr."""

    task: str
    first: dict[str, Any]  # a run
    points: dict[Curve, dict[float, Point]]

    def best(self, curve: Curve) -> tuple[float, Point]:
        """Its lr and the runs there: of the lowest mean loss among the lr that most seeds were trained with."""
        most = max(len(point.test) for point in self.points[curve].values())
        some = {lr: point for lr, point in self.points[curve].items() if len(point.test) == most}
        return min(some.items(), key=lambda item: item[1].mean)

    def beyond(self, curve: Curve, other: Curve = ADAMW) -> tuple[float, float] | None:
        """Its best loss less the other's best, the mean over the seeds of both, and the standard error; None without both."""
        if curve not in self.points or other not in self.points:
            return None
        gaps = _gaps(self.best(curve)[1], self.best(other)[1])
        return (_mean(gaps), self.error(len(gaps))) if gaps and all(map(math.isfinite, gaps)) else None

    def error(self, seeds: int) -> float:
        """Standard error of a mean over so many seeds of a difference to AdamW: the variance between seeds is pooled over the
        best points of all curves."""
        samples = []
        for curve in self.points.keys() - {ADAMW}:
            gaps = _gaps(self.best(curve)[1], self.best(ADAMW)[1]) if ADAMW in self.points else []
            if len(gaps) > 1 and all(map(math.isfinite, gaps)):
                samples.append(Sample(*2 * (_array(gaps),)))
        pooled = pooled_variance(samples)
        return math.nan if pooled is None else math.sqrt(pooled / seeds)


def _gaps(one: Point, other: Point) -> list[float]:
    return [one.test[seed] - other.test[seed] for seed in sorted(one.test.keys() & other.test.keys())]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _array(values: list[float]) -> Any:
    import numpy as np

    return np.array(values)


def read(folder: Path) -> list[Grid]:
    """Raises: BrokenRun where there is no run, and, naming the file, where one does not hold a run of this study."""
    runs = [_read_run(path) for path in sorted((folder / "runs").glob("[!.]*.json"))]
    if not runs:
        raise BrokenRun(f"there are no runs in {folder / 'runs'}")
    grids: dict[str, Grid] = {}
    for run in runs:
        grid = grids.setdefault(run["task"], Grid(run["task"], run, {}))
        for key in SAME:
            if run[key] != grid.first[key]:
                raise BrokenRun(f"{run['path']} and {grid.first['path']} have another {key}: no line through them has a meaning")
        curve = (run["optimizer"], None if run["sgd_lr"] is None else float(run["sgd_lr"]))
        point = grid.points.setdefault(curve, {}).setdefault(run["lr"], Point({}, {}))
        for values, name in ((point.test, "test_loss"), (point.train, "train_loss")):
            values[run["seed"]] = math.inf if run[name] is None else run[name]
    return [grids[task] for task in sorted(grids)]


def _read_run(path: Path) -> dict[str, Any]:
    run = read_json(path)
    missing = KEYS - run.keys() if isinstance(run, dict) else KEYS
    if missing:
        raise BrokenRun(f"{path} holds no run of this study: it lacks {', '.join(sorted(missing))}")
    return {**run, "path": path}


def holds(folder: Path) -> bool:
    """Whether a folder's runs are this study's."""
    first = next((folder / "runs").glob("[!.]*.json"), None)
    found = read_json(first) if first else None
    return isinstance(found, dict) and "task" in found


# --- The table --------------------------------------------------------------------------------------------------------


def name_of(curve: Curve) -> str:
    optimizer, sgd_lr = curve
    return optimizer if sgd_lr is None else f"{optimizer}, `sgd_lr={sgd_lr:g}`"


def memory(grid: Grid, curve: Curve, lr: float) -> str:
    """Steps that AdaBayes' filter remembers at the full lr, 1 / kappa."""
    optimizer, sgd_lr = curve
    if original(optimizer) != ADABAYES or sgd_lr is None:
        return "-"
    return "1,000" if optimizer == MEMORY else f"{sgd_lr / (lr**2 * grid.first['examples']):,.3g}"


def shown(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "diverged"


def markdown(grid: Grid) -> str:
    lrs = sorted({lr for points in grid.points.values() for lr in points})
    head = [
        "",
        *(f"`lr={lr:g}`" for lr in lrs),
        "training loss at the best",
        "beyond AdamW's best",
        "memory there, steps",
        "seeds",
    ]
    lines = [head, ["---", *["--:"] * (len(head) - 1)]]
    for curve in some_curves(grid):
        lr, best = grid.best(curve)
        cells = {at: shown(point.mean) for at, point in grid.points[curve].items()}
        cells[lr] = f"**{cells[lr]}**"
        beyond = None if curve == ADAMW else grid.beyond(curve)
        gap = "-" if beyond is None else f"{beyond[0]:+.4f} ± {beyond[1]:.4f}"
        train = shown(_mean(list(best.train.values())))
        row = [name_of(curve), *(cells.get(at, "-") for at in lrs), train, gap, memory(grid, curve, lr), str(len(best.test))]
        lines.append(row)
    table = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([f"## {title_of(grid)}", "", *table, "", *(f"- {line}" for line in notes(grid)), ""])


def title_of(grid: Grid) -> str:
    run = grid.first
    return f"{TITLES.get(grid.task, grid.task)}: {run['data'].partition(', sha256')[0]}"


def some_curves(grid: Grid) -> list[Curve]:
    return [curve for curve in CURVES if curve in grid.points]


def notes(grid: Grid) -> list[str]:
    run = grid.first
    lines = [
        f"Final test loss, the mean over seeds; the best `lr` of each row is bold. {run['parameters']:,} parameters, {run['steps']:,} "
        f"steps, `batch_size={run['examples']}`, `weight_decay=0.05`, `betas=(0.9, 0.999)`; `lr` rises for a twentieth of the steps "
        "and falls to a tenth as a cosine does. The training loss is that of the last tenth of the steps.",
        "± is the standard error of the mean difference between runs of the same seed, which begin with the same weights and see the "
        "same batches. The variance between seeds is pooled over the best points of all rows. It holds nothing of another test set.",
        *variants(grid),
        f"{caption(run['machine'])}. Each run's JSON holds its machine, versions, commit and command.",
    ]
    return lines


def variants(grid: Grid) -> list[str]:
    """What they change, for each sgd_lr, best against best."""
    lines = []
    for optimizer, sgd_lr in some_curves(grid):
        found = grid.beyond((optimizer, sgd_lr), (ADABAYES, sgd_lr)) if optimizer in (FIXED_POINT, MEMORY) else None
        if found:
            lines.append(f"{HEADINGS[optimizer]}, `sgd_lr={sgd_lr:g}`: {found[0]:+.4f} ± {found[1]:.4f} beside AdaBayes' best.")
    return lines


def write(folder: Path) -> list[Path]:
    """Writes table.md and loss.png; returns their paths. Raises what ``read`` does."""
    grids = read(folder)
    table, picture = folder / "table.md", folder / "loss.png"
    table.write_text("\n".join(["# Loss against lr and sgd_lr", "", *map(markdown, grids)]))
    draw(grids).savefig(picture, dpi=110)
    return [table, picture]


# --- The picture ------------------------------------------------------------------------------------------------------

COLOURS = {0.1: "#9ECAE1", 1.0: "#4292C6", 10.0: "#08519C", 100.0: "#E69F00", math.inf: "#009E73"}
MARKERS = {0.1: "v", 1.0: "o", 10.0: "s", 100.0: "^", math.inf: "x"}
COLUMNS = (ADABAYES, FP, FIXED_POINT, MEMORY)
HEADINGS = {FIXED_POINT: "AdaBayes, begun at the fixed point", MEMORY: "AdaBayes, memory of 1,000 steps"}


def draw(grids: list[Grid]) -> Figure:
    """A row per task, a column per optimizer: test loss against lr, a line per sgd_lr, AdamW in each."""
    columns = [name for name in COLUMNS if any(curve[0] == name for grid in grids for curve in grid.points)]
    figure = Figure(figsize=(1.2 + 4.2 * max(1, len(columns)), 1.3 + 3.7 * len(grids)), layout="constrained")
    axes = figure.subplots(len(grids), max(1, len(columns)), sharey="row", squeeze=False)
    for line, grid in zip(axes, grids, strict=True):
        for at, name in zip(line, columns, strict=False):
            _panel(at, grid, name)
        line[0].set_ylabel(f"{TITLES.get(grid.task, grid.task)}: final test loss")
    handles = {label: line for at in axes.flat for line, label in zip(*at.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=len(handles) or 1, frameon=False)
    figure.suptitle(message(grids), fontsize=13, fontweight="bold", x=0.01, ha="left")
    return figure


def _panel(at: Axes, grid: Grid, optimizer: str) -> None:
    curves = [curve for curve in some_curves(grid) if curve[0] == optimizer]
    for curve in curves:
        style = dict(color=COLOURS[curve[1]], marker=MARKERS[curve[1]], label=f"sgd_lr = {curve[1]:g}") if curve[1] else {}
        _line(at, grid.points[curve], linewidth=1.8, markersize=5, **style)
    if ADAMW in grid.points:
        _line(at, grid.points[ADAMW], color="black", linestyle=(0, (4, 2)), marker="D", markersize=4, label="AdamW", zorder=4)
    lrs = sorted({lr for points in grid.points.values() for lr in points})
    means = [point.mean for points in grid.points.values() for point in points.values() if math.isfinite(point.mean)]
    if means:
        low = min(means)
        at.set_ylim(low * 0.985, min(max(means) * 1.01, low * 1.6))
    at.set(xscale="log", xlabel="lr", xlim=(lrs[0] / 1.25, lrs[-1] * 1.25))
    at.xaxis.set_major_locator(FixedLocator(lrs))
    at.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    at.xaxis.set_minor_formatter(NullFormatter())
    at.yaxis.set_major_locator(MaxNLocator(6))
    at.set_title(HEADINGS.get(optimizer, optimizer), loc="left", fontsize=11)
    at.grid(color="#E5E5E5")
    at.set_axisbelow(True)
    at.spines[["top", "right"]].set_visible(False)


def _line(at: Axes, points: dict[float, Point], **style: Any) -> None:
    """Means over seeds, and a bar from the lowest to the highest."""
    lrs = sorted(lr for lr in points if math.isfinite(points[lr].mean))
    at.plot(lrs, [points[lr].mean for lr in lrs], **style)
    at.vlines(
        lrs, *([edge(points[lr].test.values()) for lr in lrs] for edge in (min, max)), color=style.get("color"), linewidth=1
    )


def message(grids: Iterable[Grid]) -> str:
    """For each task, how far each sgd_lr of AdaBayes at its best lr ends from AdamW at its best."""
    parts = []
    for grid in grids:
        gaps = {curve[1]: grid.beyond(curve) for curve in some_curves(grid) if curve[0] == ADABAYES}
        told = [f"{gap[0]:+.3f} with sgd_lr={sgd_lr:g}" for sgd_lr, gap in gaps.items() if gap]
        parts += [f"{TITLES.get(grid.task, grid.task)}: AdaBayes' best loss beside AdamW's: {', '.join(told)}"] if told else []
    return "\n".join(parts) or "Final test loss against lr"
