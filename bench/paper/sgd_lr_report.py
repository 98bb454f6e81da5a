"""The study of lr and sgd_lr, from its JSON alone: tables, and the picture of loss against lr."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter

from ..machine import caption
from .compare import Sample, pooled_variance
from .pictures import open_sides
from .runs import BrokenRun, original, read_json
from .sgd_lr import ADABAYES, FIXED_POINT, FP, MEMORY, PARTS

SAME = ("steps", "data", "parameters", "examples")  # in all runs of a task
KEYS = {"task", "optimizer", "sgd_lr", "lr", "seed", "options", *SAME, "train_loss", "test_loss", "machine"}
TITLES = {"image": "Images", "text": "Text"}
Curve = tuple[str, float | None]  # optimizer and sgd_lr
ADAMW: Curve = ("AdamW", None)
CURVES: list[Curve] = [(optimizer, sgd_lr) for part in PARTS for optimizer, some in part.items() for sgd_lr in some]
HEADINGS = {FIXED_POINT: "AdaBayes, begun at the fixed point", MEMORY: "AdaBayes, memory of 1,000 steps"}


class Point(NamedTuple):
    """The runs of one optimizer, sgd_lr and lr: their losses by seed, infinite where one is no number."""

    test_loss: dict[int, float]
    train_loss: dict[int, float]

    def beyond(self, other: Point) -> list[float]:
        """The test losses less the other's, of the seeds that both have and that have numbers."""
        gaps = [self.test_loss[seed] - other.test_loss[seed] for seed in sorted(self.test_loss.keys() & other.test_loss.keys())]
        return [gap for gap in gaps if math.isfinite(gap)]


class Grid(NamedTuple):
    """One task: a run of it, and its points by curve and lr."""

    task: str
    first: dict[str, Any]
    points: dict[Curve, dict[float, Point]]

    @property
    def title(self) -> str:
        return TITLES.get(self.task, self.task)

    @property
    def curves(self) -> list[Curve]:
        return [curve for curve in CURVES if curve in self.points]

    @property
    def lrs(self) -> list[float]:
        return sorted({lr for points in self.points.values() for lr in points})

    @property
    def seeds(self) -> list[int]:
        """Those of every point: over others, a mean would be of other weights and batches."""
        every = [point.test_loss.keys() for points in self.points.values() for point in points.values()]
        return sorted(set.intersection(*map(set, every)))

    def mean(self, curve: Curve, lr: float, measure: str = "test_loss") -> float:
        return math.fsum(getattr(self.points[curve][lr], measure)[seed] for seed in self.seeds) / len(self.seeds)

    def best(self, curve: Curve) -> float:
        """The lr of the lowest mean test loss."""
        return min(self.points[curve], key=lambda lr: self.mean(curve, lr))

    def gaps(self, curve: Curve, other: Curve = ADAMW) -> list[float]:
        """Test losses of the curve's best lr less those of the other's, for all seeds of both; empty where one is not there."""
        if not {curve, other} <= self.points.keys():
            return []
        one, two = (self.points[each][self.best(each)] for each in (curve, other))
        return one.beyond(two)

    def near(self, curve: Curve) -> bool:
        """Whether its best loss is within a fifth of AdamW's: far from it, seeds differ by more."""
        return ADAMW in self.points and self.mean(curve, self.best(curve)) <= 1.2 * self.mean(ADAMW, self.best(ADAMW))

    def deviation(self) -> float:
        """Between seeds, of a gap to AdamW's best: pooled over the curves near it, each at its best lr with several seeds."""
        samples = []
        for curve in filter(self.near, self.curves):
            adamw = self.points[ADAMW][self.best(ADAMW)]
            several = [np.array(gaps) for point in self.points[curve].values() if len(gaps := point.beyond(adamw)) > 1]
            samples += [min(several, key=np.mean)] if several and curve != ADAMW else []
        pooled = pooled_variance(Sample(gaps, gaps) for gaps in samples)
        return math.nan if pooled is None else math.sqrt(pooled)

    def shown_gap(self, curve: Curve, other: Curve = ADAMW) -> str:
        """Their mean and, near AdamW's best, its standard error; a dash where there are none."""
        if not (gaps := self.gaps(curve, other)) or curve == other:
            return "-"
        error = self.deviation() / math.sqrt(len(gaps)) if self.near(curve) and self.near(other) else math.nan
        return f"{math.fsum(gaps) / len(gaps):+.4f}" + (f" ± {error:.4f}" if math.isfinite(error) else "")


def read(folder: Path) -> list[Grid]:
    """Raises: BrokenRun where there is no run, and, naming the file, where one is none of this study or not like the others."""
    runs = [_read_run(path) for path in sorted((folder / "runs").glob("[!.]*.json"))]
    if not runs:
        raise BrokenRun(f"there are no runs in {folder / 'runs'}")
    grids: dict[str, Grid] = {}
    for run in runs:
        grid = grids.setdefault(run["task"], Grid(run["task"], run, {}))
        if other := [key for key in SAME if run[key] != grid.first[key]]:
            raise BrokenRun(f"{run['path']} and {grid.first['path']} differ in {', '.join(other)}: they cannot be compared")
        curve = (run["optimizer"], None if run["sgd_lr"] is None else float(run["sgd_lr"]))
        point = grid.points.setdefault(curve, {}).setdefault(run["lr"], Point({}, {}))
        for name in ("test_loss", "train_loss"):
            getattr(point, name)[run["seed"]] = math.inf if run[name] is None else run[name]
    for task, grid in grids.items():
        if not grid.seeds:
            raise BrokenRun(f"{folder}: no seed of {task} was trained at every point: the same command, not stopped, trains them")
    return [grids[task] for task in sorted(grids)]


def _read_run(path: Path) -> dict[str, Any]:
    run = read_json(path)
    missing = KEYS - run.keys() if isinstance(run, dict) else KEYS
    if missing:
        raise BrokenRun(f"{path} holds no run of lr and sgd_lr: it lacks {', '.join(sorted(missing))}")
    return {**run, "path": path}


def holds(folder: Path) -> bool:
    """Whether a folder's runs are this study's."""
    first = next((folder / "runs").glob("[!.]*.json"), None)
    found = read_json(first) if first else None
    return isinstance(found, dict) and "task" in found


def write(folder: Path) -> list[Path]:
    """Writes table.md, loss.png and, of the variants that were trained, variants.png; returns the paths. Raises as ``read``."""
    grids = read(folder)
    written = [folder / "table.md"]
    written[0].write_text("\n".join(["# Loss against lr and sgd_lr", "", *map(markdown, grids)]))
    for name, columns in PICTURES.items():
        if figure := draw(grids, columns):
            written.append(folder / f"{name}.png")
            figure.savefig(written[-1], dpi=110)
    return written


# --- The tables -------------------------------------------------------------------------------------------------------


def markdown(grid: Grid) -> str:
    head = [*(f"`lr={lr:g}`" for lr in grid.lrs), "beyond AdamW's best", "memory there, steps", "seeds"]
    rows = [[*_losses(grid, curve, "test_loss"), grid.shown_gap(curve), *_memory_and_seeds(grid, curve)] for curve in grid.curves]
    training = [_losses(grid, curve, "train_loss") for curve in grid.curves]
    title = f"## {grid.title}: {grid.first['data'].partition(', sha256')[0]}"
    parts = [title, _table(grid, "test loss", head, rows), _table(grid, "training loss", head[: len(grid.lrs)], training)]
    return "\n\n".join([*parts, "\n".join(f"- {line}" for line in notes(grid))]) + "\n"


def _table(grid: Grid, corner: str, head: list[str], rows: list[list[str]]) -> str:
    lines = [[corner, *head], ["---", *["--:"] * len(head)]]
    lines += [[name_of(curve), *row] for curve, row in zip(grid.curves, rows, strict=True)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def name_of(curve: Curve) -> str:
    optimizer, sgd_lr = curve
    return HEADINGS.get(optimizer, optimizer) + ("" if sgd_lr is None else f", `sgd_lr={sgd_lr:g}`")


def _losses(grid: Grid, curve: Curve, measure: str) -> list[str]:
    """At each lr, the mean over seeds; the one with the best test loss is bold."""
    cells = []
    for lr in grid.lrs:
        loss = grid.mean(curve, lr, measure) if lr in grid.points[curve] else None
        cell = "-" if loss is None else f"{loss:.4f}" if math.isfinite(loss) else "diverged"
        cells.append(f"**{cell}**" if lr == grid.best(curve) else cell)
    return cells


def _memory_and_seeds(grid: Grid, curve: Curve) -> list[str]:
    """The steps that AdaBayes' filter remembers at the best lr, 1 / kappa, and the seeds of the gap there."""
    (optimizer, sgd_lr), lr = curve, grid.best(curve)
    memory = 1000 if optimizer == MEMORY else (sgd_lr or 0) / (lr**2 * grid.first["examples"])
    shown = f"{memory:,.1f}" if memory < 10 else f"{memory:,.0f}"
    return [shown if original(optimizer) == ADABAYES else "-", str(len(grid.gaps(curve)) or "-")]


def notes(grid: Grid) -> list[str]:
    run, options = grid.first, grid.first["options"]
    exact = any(lr**2 * run["examples"] > sgd_lr for name, sgd_lr in grid.curves if name == ADABAYES for lr in grid.lrs)
    return [
        f"Final losses, means over the seeds that every point has ({', '.join(map(str, grid.seeds))}); the best `lr` of each row "
        f"is bold. {run['parameters']:,} parameters, "
        f"{run['steps']:,} steps, `batch_size={run['examples']}`, `weight_decay={options['weight_decay']}`, "
        f"`betas={tuple(options['betas'])}`; `lr` rises for a twentieth of the steps and falls to a tenth as a cosine does. "
        "The training loss is that of the last tenth of the steps.",
        "The gap to AdamW's best is a mean over all seeds of both (their number is in the last column). Runs of the same seed "
        "begin with the same weights and see the same batches. ± is its standard error: the deviation between seeds, pooled over "
        f"the rows within a fifth of AdamW's best loss, is {grid.deviation():.4f}. It holds nothing of another test set.",
        *(
            f"{name_of(curve)}, beside AdaBayes with this `sgd_lr`, each at its best `lr`: {gap}."
            for curve in grid.curves
            if curve[0] in HEADINGS and (gap := grid.shown_gap(curve, (ADABAYES, curve[1]))) != "-"
        ),
        *(
            ['Where AdaBayes\' memory would be less than a step, runs have `transition="exact"`; the default refuses that.']
            if exact
            else []
        ),
        f"{caption(run['machine'])}. Each run's JSON holds its machine, versions, commit and command.",
    ]


# --- The picture ------------------------------------------------------------------------------------------------------

COLOURS = {0.1: "#9ECAE1", 1.0: "#4292C6", 10.0: "#08519C", 100.0: "#E69F00", math.inf: "#009E73"}
MARKERS = {0.1: "v", 1.0: "o", 10.0: "s", 100.0: "^", math.inf: "x"}
PICTURES = {"loss": (ADABAYES, FP), "variants": (FIXED_POINT, MEMORY)}


def draw(grids: list[Grid], optimizers: Iterable[str]) -> Figure | None:
    """A row per task, a column per optimizer: test loss against lr, a line per sgd_lr, and AdamW. None without such runs."""
    columns = [name for name in optimizers if any(name == optimizer for grid in grids for optimizer, _ in grid.points)]
    if not columns:
        return None
    figure = Figure(figsize=(1.2 + 5 * len(columns), 1 + 3.9 * len(grids)), layout="constrained")
    axes = figure.subplots(len(grids), len(columns), sharey="row", squeeze=False)
    for line, grid in zip(axes, grids, strict=True):
        for at, name in zip(line, columns, strict=True):
            _panel(at, grid, name)
        line[0].set_ylabel(f"{grid.title}: final test loss")
    handles = {label: line for at in axes.flat for line, label in zip(*at.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=len(handles), frameon=False)
    return figure


def _panel(at: Axes, grid: Grid, optimizer: str) -> None:
    for curve in [curve for curve in grid.curves if curve[0] == optimizer and curve != ADAMW]:
        style = dict(color=COLOURS[curve[1]], marker=MARKERS[curve[1]], label=f"sgd_lr = {curve[1]:g}")
        _line(at, grid, curve, linewidth=1.8, markersize=5, **style)
    if ADAMW in grid.points:
        _line(at, grid, ADAMW, color="black", linestyle=(0, (4, 2)), marker="D", markersize=4, label="AdamW", zorder=4)
    low = min(grid.mean(curve, lr) for curve in grid.curves for lr in grid.points[curve])
    at.set(xscale="log", xlabel="lr", xlim=(grid.lrs[0] / 1.25, grid.lrs[-1] * 1.25))
    if math.isfinite(low):
        at.set_ylim(0.97 * low, 1.5 * low)  # far beyond, nobody has to tell the lines apart
    at.xaxis.set_major_locator(FixedLocator(grid.lrs))
    at.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    at.xaxis.set_minor_formatter(NullFormatter())
    at.yaxis.set_major_locator(MaxNLocator(6))
    at.set_title(message(grid, optimizer), loc="left", fontsize=11)
    open_sides(at)


def _line(at: Axes, grid: Grid, curve: Curve, **style: Any) -> None:
    """Means over seeds, and a bar from the lowest to the highest; diverged points are left out."""
    lrs = sorted(lr for lr in grid.points[curve] if math.isfinite(grid.mean(curve, lr)))
    at.plot(lrs, [grid.mean(curve, lr) for lr in lrs], **style)
    losses = [[grid.points[curve][lr].test_loss[seed] for seed in grid.seeds] for lr in lrs]
    at.vlines(lrs, [min(some) for some in losses], [max(some) for some in losses], color=style["color"], linewidth=1)


def message(grid: Grid, optimizer: str) -> str:
    """The optimizer's sgd_lr and lr of the lowest loss, beside AdamW's lowest."""
    heading = f"{grid.title}, {HEADINGS.get(optimizer, optimizer)}"
    curves = [curve for curve in grid.curves if curve[0] == optimizer]
    best = min(curves, key=lambda curve: grid.mean(curve, grid.best(curve)), default=ADAMW)
    if best == ADAMW or not math.isfinite(loss := grid.mean(best, grid.best(best))):
        return heading
    adamw = f"; AdamW {grid.mean(ADAMW, grid.best(ADAMW)):.3f}" if ADAMW in grid.points else ""
    return f"{heading}\nbest: {loss:.3f} at sgd_lr = {best[1]:g}, lr = {grid.best(best):g}{adamw}"
