"""``python -m bench.precision``: what state and weights of fewer bits cost in quality.

    python -m bench.precision stationary                       the filter's averages beside float64's: minutes
    python -m bench.precision train TEXT [--fashion FOLDER]    trainings beside float32's: an hour on two cores

Both write a JSON with every figure, and a table. Trainings that the folder holds already are not made again, so that seeds and
arms may be added.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import shlex
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from adabayes_fused import AdaBayes, AdaBayesFP, codes

from . import machine
from .paper import data
from .trainings import Images, Text, fit

# --- Stationary: gradients of one kind for five times the filter's memory ------------------------------------------------

ELEMENTS, LR, BATCH_SIZE = 2048, 1e-3, 100  # elements of each kind of gradient
KAPPAS = (1e-3, 1e-4, 1e-5)


def gaussian(t: float, generator: torch.Generator) -> Tensor:
    return 0.01 * torch.randn(ELEMENTS, generator=generator)


def constant(t: float, generator: torch.Generator) -> Tensor:
    return torch.logspace(-4, 0, ELEMENTS)


def sparse(t: float, generator: torch.Generator) -> Tensor:
    return gaussian(t, generator) * 10.0 * (torch.rand(ELEMENTS, generator=generator) < 0.01)


def fading(t: float, generator: torch.Generator) -> Tensor:
    """To a thousandth within the first fifth."""
    return gaussian(t, generator) * 10.0 ** -min(15.0 * t, 3.0)


KINDS = {f.__name__: f for f in (gaussian, constant, sparse, fading)}


class Follower(NamedTuple):
    """An optimizer that is followed beside float64's. ``nearest``: its state is rounded to nearest after each step."""

    name: str
    algorithm: type
    options: dict[str, Any]
    nearest: str = ""

    def make(self, r: float, dtype: torch.dtype = torch.float32) -> Any:
        p = nn.Parameter(torch.zeros(len(KINDS) * ELEMENTS, dtype=dtype))
        batch = dict(batch_size=BATCH_SIZE) if self.algorithm is AdaBayes else {}
        return self.algorithm([p], lr=LR, sgd_lr=LR * r, weight_decay=0.0, lean=True, **batch, **self.options)


FOLLOWERS = [
    Follower(f"{algorithm.__name__} {name}", algorithm, options, nearest)
    for algorithm in (AdaBayes, AdaBayesFP)
    for name, options, nearest in (
        ("bfloat16", dict(state_dtype="bfloat16"), ""),
        ("8bit", dict(state_dtype="8bit"), ""),
        ("bfloat16, to nearest", {}, "bfloat16"),
        ("8bit, to nearest", {}, "8bit"),
    )
    if (algorithm, nearest) != (AdaBayesFP, "8bit")  # whose second slot is bfloat16's
]


def state_of(optimizer: Any) -> list[Tensor]:
    """exp_avg and the second slot, as numbers."""
    ((p, entry),) = optimizer.state.items()
    slots = [entry[name] for name in optimizer.algorithm.slots[:2]]
    return codes.decoded(slots, codes.unit_of(entry["seed"]) if "seed" in entry else 0)


def round_to_nearest(optimizer: Any, state_dtype: str, r: float) -> None:
    ((p, entry),) = optimizer.state.items()
    layout = codes.Storage(True, state_dtype).layout(optimizer.algorithm, torch.float32)
    slots, unit = [entry[slot] for slot in layout.slots], codes.unit_of(codes.new_seed(0, 0, r))
    stored = codes.encoded(layout.dtypes, slots, unit, None)
    for slot, value in zip(slots, codes.decoded(stored, unit), strict=True):
        slot.copy_(value)


def follow(kappa: float, steps: int = 0) -> list[dict[str, Any]]:
    """Bias and spread of each follower's state after 5 / kappa steps, or so many, for each kind of gradients."""
    torch.set_num_threads(1)
    r, steps, generator = LR * BATCH_SIZE / kappa, steps or round(5 / kappa), torch.Generator().manual_seed(0)
    optimizers = [(f, f.make(r)) for f in FOLLOWERS]
    truths = {a: Follower("", a, {}).make(r, torch.float64) for a in (AdaBayes, AdaBayesFP)}
    for t in range(steps):
        grad = torch.cat([kind(t / steps, generator) for kind in KINDS.values()])
        for optimizer in (*truths.values(), *(o for _, o in optimizers)):
            p = optimizer.param_groups[0]["params"][0]
            p.grad = grad.to(p.dtype)
            optimizer.step()
        for follower, optimizer in optimizers:
            if follower.nearest:
                round_to_nearest(optimizer, follower.nearest, r)
    return [row for f, optimizer in optimizers for row in _compared(f, optimizer, truths[f.algorithm], kappa)]


def _compared(follower: Follower, optimizer: Any, truth: Any, kappa: float) -> list[dict[str, Any]]:
    rows = []
    parts = (zip(*(t.double().split(ELEMENTS) for t in state_of(o)), strict=True) for o in (optimizer, truth))
    for kind, (m, second), (true_m, true_second) in zip(KINDS, *parts, strict=True):
        ratio, error = (second / true_second).log(), (m - true_m) / true_m.square().mean().sqrt()
        figures = dict(second_bias=ratio.mean(), second_spread=ratio.std(), exp_avg_bias=error.mean(), exp_avg_spread=error.std())
        rows.append(dict(who=follower.name, kind=kind, kappa=kappa, **{name: float(value) for name, value in figures.items()}))
    return rows


def stationary(options: argparse.Namespace) -> Table:
    with ProcessPoolExecutor(options.jobs) as pool:
        rows = [row for found in pool.map(follow, reversed(KAPPAS)) for row in found]
    write(options, [machine.about("cpu", "bench.precision")], rows)
    table = Table(
        *("state", "gradients", "kappa", "ln(second / float64's): mean", "spread", "exp_avg, of its rms: mean", "spread"),
        title="After 5 / kappa steps; the second is prior_var of AdaBayes, exp_avg_sq of AdaBayesFP",
    )
    for row in sorted(rows, key=lambda row: (row["who"], row["kappa"])):
        figures = (row[name] for name in ("second_bias", "second_spread", "exp_avg_bias", "exp_avg_spread"))
        table.add_row(row["who"], row["kind"], f"{row['kappa']:g}", *(f"{figure:+.4f}" for figure in figures))
    return table


# --- Trainings ------------------------------------------------------------------------------------------------------------

ARMS: dict[str, tuple[dict[str, Any], bool]] = {  # options, and whether weights and gradients are bfloat16
    "float32": ({}, False),
    "bfloat16": (dict(state_dtype="bfloat16"), False),
    "8bit": (dict(state_dtype="8bit"), False),
    "bfloat16, weights 32bit": (dict(state_dtype="bfloat16", weight_rounding="32bit"), True),
    "8bit, weights 24bit": (dict(state_dtype="8bit", weight_rounding="24bit"), True),
    "8bit, weights stochastic": (dict(state_dtype="8bit", weight_rounding="stochastic"), True),
    "float32, weights to nearest": ({}, True),
    "float32, begun a millionth off": ({}, False),  # what any difference comes to: trainings are chaotic
}
TASKS = {"text": ("characters, transformer", 4000), "fashion": ("Fashion-MNIST, small network", 2000)}


class Stored:
    """A model's weights as an optimizer keeps them: themselves, or in bfloat16, from which the model's float32 are copied; its
    activations are float32 in both, so that what is stored is all that differs."""

    def __init__(self, model: nn.Module, bfloat16: bool) -> None:
        self.weights = list(model.parameters())
        self.kept = [nn.Parameter(p.detach().bfloat16()) for p in self.weights] if bfloat16 else self.weights

    @torch.no_grad()
    def step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.kept is self.weights:
            return optimizer.step()
        for p, q in zip(self.weights, self.kept, strict=True):
            q.grad = None if p.grad is None else p.grad.bfloat16()
        optimizer.step()
        for p, q in zip(self.weights, self.kept, strict=True):
            p.copy_(q)


def train(task: str, where: Path, algorithm: str, arm: str, seed: int, steps: int) -> dict[str, Any]:
    """One training; lr rises for a twentieth of its steps and falls to a tenth as a cosine does. The filter's memory, 1 / kappa,
    is a quarter of the steps."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    source = Text(where.read_bytes()) if task == "text" else Images(data.load("fashion", where))
    model, generator = source.model(), torch.Generator().manual_seed(seed)
    if arm.endswith("off"):
        for p in model.parameters():
            p.data.mul_(1.0 + 1e-6)
    options, bfloat16 = ARMS[arm]
    stored, lr = Stored(model, bfloat16), 3e-3
    kind: Any = {"AdaBayes": AdaBayes, "AdaBayesFP": AdaBayesFP}[algorithm]
    sgd_lr = lr * lr * source.examples * steps / 4
    batch = dict(batch_size=source.examples) if kind is AdaBayes else {}
    optimizer = kind(stored.kept, lr=lr, sgd_lr=sgd_lr, weight_decay=0.02, lean=True, seed=seed, **batch, **options)
    found = fit(source, model, optimizer, functools.partial(stored.step, optimizer), steps, generator)
    figures = dict(sgd_lr=sgd_lr, train_loss=found.train_loss, test_loss=found.test_loss)
    return dict(task=task, algorithm=algorithm, arm=arm, seed=seed, steps=steps, **figures)


def train_all(options: argparse.Namespace) -> Table:
    where = {"text": options.text, "fashion": options.fashion}
    before = results(options)
    rows = before.get("rows", [])
    about = [*before.get("about", []), machine.about("cpu", "bench.precision")]
    made = {tuple(row[name] for name in ("task", "algorithm", "arm", "seed", "steps")) for row in rows}
    jobs = [
        (task, where[task], algorithm, arm, seed, options.steps or TASKS[task][1])
        for seed in options.seeds
        for task in options.tasks
        if where[task] is not None
        for algorithm, arms in (("AdaBayes", list(ARMS)), ("AdaBayesFP", list(ARMS)[:3]))
        for arm in arms
        if arm in options.arms and (task, algorithm, arm, seed, options.steps or TASKS[task][1]) not in made
    ]
    with ProcessPoolExecutor(options.jobs) as pool:
        for row in pool.map(train, *zip(*jobs, strict=True)) if jobs else ():
            rows.append(row)
            write(options, about, rows)
    table = Table(
        *("", "optimizer", "state and weights", "seeds", "test loss", "beyond float32's", "standard error"),
        title="Final test losses, means over seeds; differences of the same seed",
    )
    for task in TASKS:
        for algorithm in ("AdaBayes", "AdaBayesFP"):
            for arm in ARMS:
                if found := _losses(rows, task, algorithm, arm):
                    judge = _losses(rows, task, algorithm, "float32")
                    table.add_row(TASKS[task][0], algorithm, arm, *_beside(found, judge))
    return table


def _losses(rows: list[dict[str, Any]], *which: str) -> dict[int, float]:
    return {row["seed"]: row["test_loss"] for row in rows if (row["task"], row["algorithm"], row["arm"]) == which}


def _beside(found: dict[int, float], judge: dict[int, float]) -> tuple[str, ...]:
    beyond = [found[seed] - judge[seed] for seed in found]
    error = statistics.stdev(beyond) / math.sqrt(len(beyond)) if len(beyond) > 1 else math.nan
    return str(len(found)), f"{statistics.mean(found.values()):.4f}", f"{statistics.mean(beyond):+.4f}", f"{error:.4f}"


def results(options: argparse.Namespace) -> dict[str, Any]:
    """What the folder holds."""
    file = options.output / "results.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    return found


def write(options: argparse.Namespace, about: list[dict[str, Any]], rows: list[dict[str, Any]]) -> None:
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "results.json").write_text(json.dumps(dict(about=about, rows=rows), indent=1) + "\n")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.precision", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    one = commands.add_parser("stationary", help="the filter's averages beside float64's")
    two = commands.add_parser("train", help="trainings beside float32's")
    two.add_argument("text", type=Path, metavar="TEXT", help="a file of about a million characters")
    two.add_argument("--fashion", type=Path, metavar="FOLDER", help="Fashion-MNIST as IDX files; without it, the text alone")
    two.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="0 1 2, if not given")
    arms = f"all, if not given: {', '.join(map(repr, ARMS))}"
    two.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help=arms)
    two.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK", help="text fashion, if not given")
    two.add_argument("--steps", type=int, help="of each training; 4000 and 2000, if not given")
    for command in (one, two):
        command.add_argument("--jobs", type=int, default=2, help="processes, of one thread each; 2, if not given")
        command.add_argument("--output", type=Path, metavar="FOLDER", help="runs/precision-COMMAND, if not given")
    options, console = parser.parse_args(argv), Console()
    if not console.is_terminal:
        console.width = 150
    folder = options.output = options.output or Path("runs") / f"precision-{options.command}"
    table = (stationary if options.command == "stationary" else train_all)(options)
    with (folder / "table.txt").open("w") as file:
        Console(file=file, width=150).print(table)
    console.print(table)
    console.print(f"Written: {shlex.quote(str(folder))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
