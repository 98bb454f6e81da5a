"""AdaBayes on real data: a small convolutional network learns scikit-learn's 1,797 handwritten digits.

    python examples/digits.py

trains it with five optimizers from the same initial weights over the same batches, prints a table and writes two files:
``demo/digits.png``, the training loss and the paper's Figure 3, and ``demo/digits.json``, the numbers.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read as torch loads: threads that spin crawl where cores are shared

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

import adabayes_fused
from adabayes_fused import backends, reference

FUSED, SLOW = "AdaBayes, fused", "AdaBayes, slow path"
EARLY = 100  # steps after which fused and slow path are compared first


# --- Data, network, optimizers ----------------------------------------------------------------------------------------


class Data(NamedTuple):
    """Images (n, 1, 8, 8) in [0, 1] and labels (n,)."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def load_data(device: torch.device) -> Data:
    """The digits, 70 % of each for training: 1,257, so that the last batch of 64 has 41 images. The split is fixed."""
    images, labels = load_digits(return_X_y=True)
    split = train_test_split(images, labels, test_size=0.3, stratify=labels, random_state=0)
    train_x, test_x = (torch.tensor(x / 16, dtype=torch.float32, device=device).view(-1, 1, 8, 8) for x in split[:2])
    train_y, test_y = (torch.tensor(y, device=device) for y in split[2:])
    return Data(train_x, train_y, test_x, test_y)


def network() -> nn.Module:
    """1.1 million weights, most of them where they cost little time but the optimizer's.

    Smooth, or a sign that rounding flips would change a gradient at once; with dropout, or the gradients would die out.
    """
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, stride=2, padding=1), nn.GELU(),
        nn.Conv2d(32, 64, 3, padding=1), nn.GELU(),
        nn.Flatten(), nn.Linear(1024, 1024), nn.GELU(), nn.Dropout(),
        nn.Linear(1024, 10),
    )  # fmt: skip


def optimizers(options: argparse.Namespace) -> dict[str, Callable[[Any], Optimizer]]:
    """What is compared: name -> function of the parameters.

    SGD averages its gradients, as AdaBayes does: dampening 0.9 makes lr 0.3 what lr 0.03 is without.
    """
    adabayes = dict(lr=options.lr, sgd_lr=options.sgd_lr, batch_size=options.batch_size)
    fused = dict(adabayes, backend=options.backend)
    return {
        FUSED: functools.partial(adabayes_fused.AdaBayes, **fused),
        SLOW: functools.partial(reference.AdaBayes, **adabayes),
        "AdaBayes-FP, fused": functools.partial(adabayes_fused.AdaBayesFP, **fused),
        "AdamW, torch's fused": functools.partial(torch.optim.AdamW, lr=options.lr, weight_decay=0.05, fused=True),
        "SGD, torch's": functools.partial(torch.optim.SGD, lr=options.sgd_lr, momentum=0.9, dampening=0.9),
    }


# --- Training ---------------------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """What one training leaves: loss per step, ms per optimizer.step(), all weights early on and at the end, flattened."""

    optimizer: Optimizer
    losses: list[float]
    step_ms: list[float]
    early: Tensor
    final: Tensor
    test_error: float
    test_loss: float


def batches(n: int, batch_size: int, epochs: int, seed: int) -> Iterator[Tensor]:
    """Indices of each batch; the shuffles depend on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        yield from torch.randperm(n, generator=generator).split(batch_size)


def set_batch_size(optimizer: Optimizer, batch_size: int) -> None:
    """Tells AdaBayes how many examples the next gradient averages over; it sets the noise of that gradient."""
    for group in optimizer.param_groups:
        if "batch_size" in group:
            group["batch_size"] = batch_size


def timed_step(optimizer: Optimizer, device: torch.device) -> float:
    """One step; returns how long it took, in milliseconds."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    optimizer.step()
    wait()
    return 1e3 * (time.perf_counter() - start)


def flat_weights(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach().cpu()


def train(make: Callable[[Any], Optimizer], data: Data, options: argparse.Namespace, tick: Callable[[], None]) -> Run:
    """Trains a new network; every call sees the same initial weights, batches and dropout."""
    device = data.train_x.device
    torch.manual_seed(options.seed)
    model = network().to(device)
    optimizer = make(model.parameters())
    losses, step_ms, early = [], [], flat_weights(model)
    for index in batches(len(data.train_y), options.batch_size, options.epochs, options.seed):
        index = index.to(device)
        optimizer.zero_grad()
        loss = cross_entropy(model(data.train_x[index]), data.train_y[index])
        loss.backward()
        set_batch_size(optimizer, len(index))  # the last batch of an epoch is smaller
        step_ms.append(timed_step(optimizer, device))
        losses.append(loss.item())
        if len(losses) <= EARLY and len(losses) in (EARLY, steps_of(options, data)):
            early = flat_weights(model)
        tick()
    set_batch_size(optimizer, options.batch_size)
    return Run(optimizer, losses, step_ms, early, flat_weights(model), *evaluate(model, data))


def steps_of(options: argparse.Namespace, data: Data) -> int:
    return options.epochs * -(-len(data.train_y) // options.batch_size)


@torch.no_grad()
def evaluate(model: nn.Module, data: Data) -> tuple[float, float]:
    """Test error in percent, and mean test loss."""
    logits = model.eval()(data.test_x)
    error = (logits.argmax(1) != data.test_y).double().mean().item()
    return 100 * error, cross_entropy(logits, data.test_y).item()


# --- The paper's Figure 3, in the paper's units: the gradient is that of the summed loss ------------------------------


def prior_variance(group: Mapping[str, Any]) -> float:
    """sigma^2 = eta_SGD / batch size (Eq. 22): the variance of a weight whose gradients say nothing."""
    return float(group["lr"]) * float(group["r"]) / float(group["batch_size"])


def fixed_point(x: np.ndarray, sigma_sq: float) -> np.ndarray:
    """sigma^2_post where the filter comes to rest (Eq. 20), at x = eta / sqrt(<g^2>), of x's shape."""
    return 2 * sigma_sq / (1 + np.sqrt(1 + 4 * (sigma_sq / x) ** 2))


class Figure3(NamedTuple):
    """x = eta / sqrt(<g^2>) and sigma^2_post, each (weights,); sigma^2; how many weights were left out, their x infinite."""

    x: np.ndarray
    post: np.ndarray
    sigma_sq: float
    left_out: int


def figure3_points(optimizer: Optimizer) -> Figure3:
    """Every weight of a fused AdaBayes (one group, not lean), taken back from its units to the paper's."""
    (group,) = optimizer.param_groups
    lr, batch_size, sigma_sq = float(group["lr"]), float(group["batch_size"]), prior_variance(group)
    states = [optimizer.state[p] for p in group["params"]]
    mean_sq = [s["exp_avg_sq"].double().flatten() / (1 - group["betas"][1] ** float(s["step"])) for s in states]
    rms = batch_size * torch.cat(mean_sq).sqrt().cpu().numpy()
    post = sigma_sq * torch.cat([s["post_var"].double().flatten() for s in states]).cpu().numpy()
    seen = rms > 0
    return Figure3(lr / rms[seen], post[seen], sigma_sq, int((~seen).sum()))


def ratio_to_fixed_point(points: Figure3, below: float = np.inf) -> tuple[float, float, int] | None:
    """Mean and standard deviation of sigma^2_post / Eq. 20 over the weights with x < below, and their number, if any."""
    chosen = points.x < below
    ratio = points.post[chosen] / fixed_point(points.x[chosen], points.sigma_sq)
    return (float(ratio.mean()), float(ratio.std()), len(ratio)) if len(ratio) else None


# --- Picture ----------------------------------------------------------------------------------------------------------


def draw(runs: Mapping[str, Run], points: Figure3, window: int, path: Path) -> None:
    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_losses(left, runs, window)
    draw_figure3(right, points)
    figure.savefig(path, dpi=120)


def draw_losses(axes, runs: Mapping[str, Run], window: int) -> None:
    """Training loss per step, averaged over ``window`` steps."""
    for name, run in runs.items():
        style = dict(color="black", linestyle=(0, (2, 3)), zorder=3) if name == SLOW else dict(linewidth=2)
        smooth = np.convolve(run.losses, np.full(window, 1 / window), mode="valid")
        axes.semilogy(np.arange(len(smooth)) + window, smooth, label=name, **style)
    axes.set(title=f"Training loss on digits (mean over {window} steps)", xlabel="step", ylabel="cross-entropy with dropout")
    axes.legend()
    axes.grid(alpha=0.3)


def draw_figure3(axes, points: Figure3) -> None:
    """How many weights lie where, with Eq. 20 and its two limits."""
    x = np.geomspace(points.x.min() / 2, 50 * points.sigma_sq, 200)
    shown = points.x < x[-1]  # further to the right there is nothing to see
    limits = dict(xlim=(x[0], x[-1]), ylim=(x[0] / 2, points.sigma_sq * 3))
    cells = axes.hexbin(points.x[shown], points.post[shown], xscale="log", yscale="log", bins="log", gridsize=(80, 40),
                        extent=np.log10([*limits["xlim"], *limits["ylim"]]), cmap="viridis_r", linewidths=0.2)  # fmt: skip
    axes.figure.colorbar(cells, ax=axes, label="weights")
    axes.plot(x, fixed_point(x, points.sigma_sq), color="black", label="Eq. 20")
    axes.axhline(points.sigma_sq, color="tab:red", linestyle="--", label=r"SGD limit, $\sigma^2$")
    axes.plot(x, x, color="tab:green", linestyle="--", label=r"Adam limit, $\eta\,/\sqrt{\langle g^2\rangle}$")
    axes.set(**limits, xlabel=r"$\eta\,/\sqrt{\langle g^2\rangle}$", ylabel=r"$\sigma^2_{post}$",
             title="Step size of each weight (the paper's Figure 3)")
    axes.legend(loc="lower right")
    axes.grid(alpha=0.3)


# --- Numbers ----------------------------------------------------------------------------------------------------------


def row(name: str, run: Run, runs: Mapping[str, Run]) -> dict[str, Any]:
    """A line of the table; the differences, fused against slow path, are the largest over all weights."""
    slow = runs[SLOW]
    step_ms = statistics.median(run.step_ms)
    numbers = {"optimizer": name, "test_error_percent": run.test_error, "test_loss": run.test_loss, "step_ms": step_ms,
               "speed_up": statistics.median(slow.step_ms) / step_ms}
    if name == FUSED:
        numbers["compared_early_at_step"] = min(EARLY, len(run.losses))
        numbers["early_weight_difference"] = (run.early - slow.early).abs().max().item()
        numbers["final_weight_difference"] = (run.final - slow.final).abs().max().item()
    return numbers


def table(rows: list[dict[str, Any]]) -> Table:
    result = Table(padding=0)
    result.add_column("optimizer", no_wrap=True)
    early = next(numbers["compared_early_at_step"] for numbers in rows if numbers["optimizer"] == FUSED)
    for title in ("test\nerror, %", "test\nloss", "ms per\nstep()", "speed-up", f"|Δw| at\nstep {early}", "|Δw| at\nend"):
        result.add_column(title, justify="right")
    for numbers in rows:
        differences = [f"{value:.1e}" for key, value in numbers.items() if key.endswith("weight_difference")]
        result.add_row(numbers["optimizer"], f"{numbers['test_error_percent']:.2f}", f"{numbers['test_loss']:.4f}",
                       f"{numbers['step_ms']:.3f}", f"{numbers['speed_up']:.1f}", *differences)
    return result


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3, help="the paper's eta, also AdamW's")
    parser.add_argument("--sgd-lr", type=float, default=0.3, help="AdaBayes's sgd_lr, also SGD's")
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights, the batches and dropout")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--backend", choices=backends.NAMES, default="auto", help="of the fused optimizers")
    parser.add_argument("--output", type=Path, default=Path("demo"))
    return parser.parse_args(argv)


def train_all(data: Data, options: argparse.Namespace, console: Console) -> dict[str, Run]:
    """One after the other, so that each is timed alone."""
    contenders, runs = optimizers(options), {}
    columns = (TextColumn("{task.description:20}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=steps_of(options, data) * len(contenders))
        for name, make in contenders.items():
            progress.update(bar, description=name)
            runs[name] = train(make, data, options, lambda: progress.advance(bar))
        progress.update(bar, description="steps")
    return runs


def numbers_of(runs: Mapping[str, Run], points: Figure3, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """What digits.json holds; the ratios to Eq. 20 are (mean, standard deviation, weights)."""
    fused = runs[FUSED]
    return {
        "options": {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()},
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "backend": backends.choose(options.backend, device),
        "steps": len(fused.losses),
        "weights": fused.final.numel(),
        "rows": [row(name, run, runs) for name, run in runs.items()],
        "ratio_to_eq_20": ratio_to_fixed_point(points),
        "ratio_to_eq_20_on_adams_side": ratio_to_fixed_point(points, below=points.sigma_sq),
        "left_out": points.left_out,
    }


def report(numbers: Mapping[str, Any], console: Console) -> None:
    console.print(table(numbers["rows"]))
    console.print("{weights:,} weights, {steps} steps on {device}, backend {backend}. |Δw|: the largest weight difference, "
                  "fused to slow path. It begins as rounding; the passes through the network amplify it.".format(**numbers))
    console.print("Figure 3, σ²_post / Eq. 20, mean ± std:")
    for key, which in (("ratio_to_eq_20", "all"), ("ratio_to_eq_20_on_adams_side", "on Adam's side, x < σ²")):
        if numbers[key]:
            console.print("  {:.3f} ± {:.3f} over {:,} weights ({which})".format(*numbers[key], which=which))
    console.print(f"  {numbers['left_out']:,} weights left out, that never got a gradient")
    console.print("Eq. 20 is for steady gradients. These shrank while the network learned, and <g²> averages over 1/(1 - beta2) "
                  "= 1,000 steps: the filter's own memory is shorter where gradients are large.")


def main(argv: list[str] | None = None) -> None:
    options, console = parse(argv), Console()
    name = options.device if options.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    torch.backends.cudnn.deterministic = True
    runs = train_all(load_data(device), options, console)
    points = figure3_points(runs[FUSED].optimizer)
    numbers = numbers_of(runs, points, options, device)

    options.output.mkdir(parents=True, exist_ok=True)
    picture, written = options.output / "digits.png", options.output / "digits.json"
    draw(runs, points, max(1, min(20, numbers["steps"] // 4)), picture)
    written.write_text(json.dumps(numbers, indent=2) + "\n")
    report(numbers, console)
    console.print(f"Written: {picture}, {written}")


if __name__ == "__main__":
    main()
