"""Appendix A and B on a trained network: are minibatch gradients linear in their weight, is g^2 the curvature, are they Gaussian?

The network is in eval mode: in training mode BatchNorm mixes the examples of a batch, and neither the gradient of one example nor
a curvature that is a sum over examples exists. Images are not augmented, minibatches are drawn with replacement (their examples
are independent and alike, as Appendix B has it), and gradients are those of the summed loss, as in the paper.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy import stats
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from .. import machine

Z = np.linspace(-3.5, 3.5, 57)  # where quantiles are compared, in standard deviations
SIZES = (1, 8, 32)  # minibatches on the way to the full one, where the central limit theorem is seen at work
SHOWN = (10, 50, 90)  # percentiles of the excess kurtosis whose weights have a normal plot
SPANS = (1e-3, 1e-2, 3e-2, 1e-1)  # a weight's displacement: a step of Adam's, ..., the prior's sigma (0.028), more
POINTS = (-1.0, -0.5, 0.0, 0.5, 1.0)  # displacements, in spans
Tick = Callable[[int], None]  # hears how many passes of an image through the network, forth and back, are done
LINEAR, CURVED, IMAGES = 50, 200, 1024  # weights displaced, weights whose curvature is taken, images it is taken over


def measure(
    model: nn.Module,
    data: Any,
    batch_size: int,
    seed: int,
    weights: int = 1000,
    batches: int = 256,
    device: torch.device | str = "cpu",
    tell: Callable[[float], None] = lambda part: None,
) -> dict[str, Any]:
    """Appendix A and B on ``weights`` of the model's weights, each as likely to be picked as any other.

    ``data`` has train_x, train_y and normalized(images), as ``data.Data``; the model stays as it is. ``tell`` hears which part of
    the work is done. The result is all numbers, lists and names. Weights that had no gradient at all are counted as silent and
    left out.
    """
    sizes = sorted({size for size in SIZES if size < batch_size} | {batch_size})
    images = min(IMAGES, len(data.train_y))
    linear, curved = min(LINEAR, weights), min(CURVED, weights)
    total = batches * sum(sizes) + linear * (len(SPANS) * len(POINTS) + 2) * batch_size + (2 * curved + 1) * images
    done = 0

    def tick(passes: int) -> None:
        nonlocal done
        done += passes
        tell(min(1.0, done / total))

    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        network = Network(model, data, weights, seed, device)
        gradients = {size: minibatch_gradients(network, size, batches, tick) for size in sizes}
        return {
            "weights": len(network.picked),
            "of_weights": sum(p.numel() for p in network.params),
            "batch_size": batch_size,
            "batches": batches,
            "seed": seed,
            "mode": "eval mode, no augmentation, minibatches drawn with replacement, gradients of the summed loss",
            "normality": normality(gradients),
            "linearity": linearity(network, gradients[batch_size].std(0), batch_size, tick),
            "curvature": curvature(network, gradients[batch_size], batch_size, images, tick),
        }


class Network:
    """A copy of the model in eval mode, the data, and the weights picked at random: flat indices (weights,)."""

    def __init__(self, model: nn.Module, data: Any, weights: int, seed: int, device: torch.device | str) -> None:
        self.model = copy.deepcopy(model).to(device, memory_format=torch.contiguous_format).eval()
        self.data, self.device = data, torch.device(device)
        self.params = [p for p in self.model.parameters() if p.requires_grad]
        self.random = torch.Generator().manual_seed(seed)
        self.ends = np.cumsum([p.numel() for p in self.params])
        self.picked = torch.randperm(int(self.ends[-1]), generator=self.random)[:weights]

    def place(self, flat: int) -> tuple[int, int]:
        """Which parameter a weight is in, and where in it."""
        k = int(np.searchsorted(self.ends, flat, side="right"))
        return k, flat - int(self.ends[k]) + self.params[k].numel()

    def draw(self, size: int) -> Tensor:
        return torch.randint(len(self.data.train_y), (size,), generator=self.random)

    def gradients(self, rows: Tensor, params: list[Tensor] | None = None, create_graph: bool = False) -> tuple[Tensor, ...]:
        """Of the loss summed over the images of these rows, with respect to the parameters (all, if none are given)."""
        rows = rows.to(self.data.train_y.device)
        images = self.data.normalized(self.data.train_x[rows]).to(self.device)
        loss = cross_entropy(self.model(images), self.data.train_y[rows].to(self.device), reduction="sum")
        return torch.autograd.grad(loss, params or self.params, create_graph=create_graph)

    def of_picked(self, rows: Tensor, n: int | None = None) -> Tensor:
        """The gradient of the first n picked weights (all, if none is given), on the CPU."""
        return torch.cat([g.reshape(-1) for g in self.gradients(rows)])[self.picked[:n].to(self.device)].cpu()


def minibatch_gradients(network: Network, size: int, batches: int, tick: Tick) -> np.ndarray:
    """(batches, weights), float64."""
    found = []
    for _ in range(batches):
        found.append(network.of_picked(network.draw(size)))
        tick(size)
    return torch.stack(found).double().numpy()


# --- Appendix B: minibatch gradients are Gaussian ---------------------------------------------------------------------


def normality(gradients: dict[int, np.ndarray]) -> dict[str, Any]:
    """How far from Gaussian the gradients (batches, weights) of each batch size are, and normal plots of the largest's."""
    largest, _ = heard(gradients[max(gradients)])
    kurtosis = stats.kurtosis(largest)
    typical = [int(np.argsort(kurtosis)[(len(kurtosis) - 1) * percentile // 100]) for percentile in SHOWN]
    return {
        "test": "D'Agostino and Pearson's K^2 at 5 %, per weight over the minibatches",
        "z": Z.tolist(),
        "by_batch_size": [{"batch_size": size} | describe(of_size) for size, of_size in gradients.items()],
        "plots": [
            {"percentile": percentile, "kurtosis": float(kurtosis[k])} | normal_plot(largest[:, k])
            for percentile, k in zip(SHOWN, typical, strict=True)
        ],
    }


def heard(gradients: np.ndarray) -> tuple[np.ndarray, int]:
    """Without the weights whose gradient never changes, standardised; and how many those are."""
    changing = np.ptp(gradients, axis=0) > 0
    if not changing.any():
        raise ValueError("No weight that was picked has a gradient that changes: nothing can be tested on this network.")
    return stats.zscore(gradients[:, changing]), int((~changing).sum())


def describe(gradients: np.ndarray) -> dict[str, Any]:
    """Share of weights (in percent) that are no Gaussian's, medians of the moments a Gaussian has none of, pooled quantiles."""
    standard, silent = heard(gradients)
    return {
        "weights": standard.shape[1],
        "silent": silent,
        "rejected_percent": float(100 * (stats.normaltest(standard).pvalue < 0.05).mean()),
        "median_excess_kurtosis": float(np.median(stats.kurtosis(standard))),
        "median_abs_skewness": float(np.median(np.abs(stats.skew(standard)))),
        "quantiles": rounded(np.quantile(standard, stats.norm.cdf(Z))),
    }


def normal_plot(values: np.ndarray) -> dict[str, list[float]]:
    theoretical, ordered = stats.probplot(values, fit=False)
    return {"theoretical": rounded(theoretical), "ordered": rounded(ordered)}


# --- Appendix A: the objective is quadratic (Eq. 10), and g^2 is its curvature (Eq. 11) -------------------------------


def linearity(network: Network, noise: np.ndarray, batch_size: int, tick: Tick) -> list[dict[str, Any]]:
    """A straight line through a weight's gradient at displacements up to each span; each weight has a minibatch of its own.

    Beside R^2: half the gradient's range, in the standard deviations it has over minibatches (``noise``, one per weight); and the
    line's slope over the H_ii of the same minibatch, which Eq. 10 says it is. Gradients that stand still are counted as silent.
    """
    found: dict[float, list[tuple[float, ...]]] = {span: [] for span in SPANS}
    for flat, sd in zip(network.picked[:LINEAR].tolist(), noise, strict=False):
        rows = network.draw(batch_size)
        (hessian,) = hessian_diagonal(network, [flat], rows, tick)
        for span in SPANS:
            by = span * np.array(POINTS)
            gradient = displaced(network, flat, by, rows)
            tick(len(POINTS) * batch_size)
            if np.ptp(gradient) > 0:
                line = stats.linregress(by, gradient)
                found[span].append((line.rvalue**2, over(np.ptp(gradient) / 2, sd), over(line.slope, hessian)))
    return [summary(span, len(noise[:LINEAR]), np.array(lines).reshape(-1, 3)) for span, lines in found.items()]


def summary(span: float, weights: int, lines: np.ndarray) -> dict[str, Any]:
    r_squared, change, slope = (column[np.isfinite(column)] for column in lines.T)
    return {
        "span": span,
        "weights": len(lines),
        "silent": weights - len(lines),
        "median_change_in_sd": float(np.median(change)) if len(change) else None,
        "slope_per_hessian_p10_p50_p90": rounded(np.quantile(slope, [0.1, 0.5, 0.9])) if len(slope) else None,
        "r_squared": rounded(sorted(r_squared)),
    }


def over(a: float, b: float) -> float:
    return a / b if b else np.nan


def displaced(network: Network, flat: int, by: np.ndarray, rows: Tensor) -> np.ndarray:
    """The gradient of one weight where it is moved by so much, (n,) -> (n,)."""
    k, j = network.place(flat)
    weight = network.params[k].data.view(-1)
    stood, found = weight[j].item(), []
    for delta in by:
        weight[j] = stood + delta
        (gradient,) = network.gradients(rows, [network.params[k]])
        found.append(gradient.reshape(-1)[j].item())
    weight[j] = stood
    return np.array(found)


def curvature(network: Network, gradients: np.ndarray, batch_size: int, images: int, tick: Tick) -> dict[str, Any]:
    """H_ii of a minibatch's summed loss beside two stand-ins: the mean of g^2 over minibatches (batches, weights), which Eq. 17a
    takes, and the variance of g, which Eq. 11 speaks of.

    H_ii and the variance are batch_size times their means over the same images, and so exact for minibatches drawn from them.
    ReLU makes logits piecewise linear in a single weight: H_ii is then the Fisher information itself, never negative, and what
    parts it from the variance is that labels are the data's, not drawn from the network's predictions. What the kinks between
    the pieces add to the curvature, no second derivative sees; ``linearity``'s slopes do.
    """
    rows = torch.randperm(len(network.data.train_y), generator=network.random)[:images]
    picked = network.picked[:CURVED].tolist()
    hessian = batch_size / images * hessian_diagonal(network, picked, rows, tick)
    single = []
    for row in rows:
        single.append(network.of_picked(row[None], CURVED))
        tick(1)
    variance = batch_size * torch.stack(single).double().var(0).numpy()
    mean_sq = (gradients[:, :CURVED] ** 2).mean(0)
    return {
        "images": images,
        "weights": len(picked),
        "negative": int((hessian < 0).sum()),
        "zero": int((hessian == 0).sum()),
        "hessian": rounded(hessian),
        "mean_sq": rounded(mean_sq),
        "variance": rounded(variance),
        "mean_sq_against_hessian": against(mean_sq, hessian),
        "variance_against_hessian": against(variance, hessian),
    }


def hessian_diagonal(network: Network, flats: list[int], rows: Tensor, tick: Tick) -> np.ndarray:
    """d^2 loss / dw^2 of each weight, exact, the loss summed over the images of these rows; (weights,), float64."""
    found, places = np.zeros(len(flats)), [network.place(flat) for flat in flats]
    for chunk in rows.split(128):
        gradients = network.gradients(chunk, create_graph=True)
        for n, (k, j) in enumerate(places):
            of_weight = gradients[k].reshape(-1)[j]
            if of_weight.requires_grad:  # else it depends on no weight
                (row,) = torch.autograd.grad(of_weight, network.params[k], retain_graph=True, materialize_grads=True)
                found[n] += row.reshape(-1)[j].item()
            tick(2 * len(chunk))
    return found


def against(stand_in: np.ndarray, hessian: np.ndarray) -> dict[str, Any] | None:
    """How a stand-in goes with the curvature, where both are positive; None where those are fewer than three, or all alike."""
    both = (hessian > 0) & (stand_in > 0)
    x, y = np.log(hessian[both]), np.log(stand_in[both])
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    ratio = np.exp(np.quantile(y - x, [0.1, 0.5, 0.9]))
    return {
        "weights": int(both.sum()),
        "spearman": float(stats.spearmanr(x, y).statistic),
        "log_slope": float(stats.linregress(x, y).slope),
        "median_ratio": float(ratio[1]),
        "ratio_p10_p90": [float(ratio[0]), float(ratio[2])],
    }


def rounded(values: Any) -> list[float]:
    return [float(f"{value:.5g}") for value in values]


# --- Picture ----------------------------------------------------------------------------------------------------------

COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#0072B2")  # Okabe and Ito's


def draw(folder: Path) -> list[Path]:
    """Writes gradients.png where there is a gradients.json; returns its path."""
    if not (folder / "gradients.json").exists():
        return []
    measured = json.loads((folder / "gradients.json").read_text())
    caption = f"{measured['network']}, {measured['data']}, {measured['run']}; {machine.caption(measured['machine'])}"
    picture(measured, folder / "gradients.png", caption)
    return [folder / "gradients.png"]


def picture(measured: dict[str, Any], path: Path, caption: str) -> None:
    """Four panels from what ``measure`` returned: normal plots, of weights and pooled; straight lines; g^2 against H_ii."""
    figure = Figure(figsize=(11, 9.5), layout="constrained")
    (plots, pooled), (lines, curved) = figure.subplots(2, 2)
    draw_plots(plots, measured)
    draw_pooled(pooled, measured["normality"])
    draw_linearity(lines, measured["linearity"])
    draw_curvature(curved, measured["curvature"])
    for axes in (plots, pooled, lines, curved):
        axes.grid(color="#E5E5E5")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(caption, fontsize=8, color="#555555")
    figure.savefig(path, dpi=110)


def draw_plots(axes, measured: dict[str, Any]) -> None:
    axes.axline((0, 0), slope=1, color="black", linewidth=1)
    for plot, colour in zip(measured["normality"]["plots"], COLOURS[1:], strict=True):
        label = f"{plot['percentile']}th percentile: {plot['kurtosis']:.2f}"
        axes.plot(plot["theoretical"], plot["ordered"], ".", markersize=5, color=colour, label=label)
    axes.set(title=f"B  Gradients of three weights, batch size {measured['batch_size']}", xlabel="Gaussian quantile",
             ylabel="standardised gradient")  # fmt: skip
    axes.legend(title="excess kurtosis", loc="upper left", fontsize=9)


def draw_pooled(axes, found: dict[str, Any]) -> None:
    axes.axline((0, 0), slope=1, color="black", linewidth=1)
    for row, colour in zip(found["by_batch_size"], COLOURS[-len(found["by_batch_size"]) :], strict=True):
        label = f"{row['batch_size']}: {row['rejected_percent']:.0f} % of weights rejected"
        axes.plot(found["z"], row["quantiles"], color=colour, linewidth=2, label=label)
    axes.set(title="B  All weights pooled, by batch size", xlabel="Gaussian quantile",
             ylabel="quantile of standardised gradients", ylim=(-8, 8))  # fmt: skip
    axes.legend(title="batch size (a Gaussian: 5 %)", loc="upper left", fontsize=9)


def draw_linearity(axes, found: list[dict[str, Any]]) -> None:
    for row, colour in zip(found, COLOURS, strict=True):
        r_squared = row["r_squared"]
        if r_squared:
            label = f"± {row['span']:g}: {np.median(r_squared):.2f} ({row['median_change_in_sd'] or 0:.1g} sd)"
            axes.plot([0, *r_squared], np.linspace(0, 1, 1 + len(r_squared)), color=colour, linewidth=2, label=label)
    axes.set(title="A  Is a minibatch's gradient linear in its weight? (Eq. 10)", xlabel="$R^2$ of a straight line",
             ylabel="share of weights below", xlim=(0, 1.01), ylim=(0, 1.01))  # fmt: skip
    axes.legend(title="moved by: median $R^2$\n(change of gradient)", loc="upper left", fontsize=9)


def draw_curvature(axes, found: dict[str, Any]) -> None:
    hessian = np.array(found["hessian"])
    names = {"mean_sq": r"mean of $g^2$", "variance": "variance of $g$"}
    for (key, name), colour in zip(names.items(), (COLOURS[0], COLOURS[3]), strict=True):
        of, values = found[f"{key}_against_hessian"], np.array(found[key])
        both = (hessian > 0) & (values > 0)
        label = f"{name}: median ratio {of['median_ratio']:.2f}, Spearman {of['spearman']:.2f}" if of else name
        axes.loglog(hessian[both], values[both], ".", markersize=5, color=colour, label=label)
    axes.axline((1, 1), (10, 10), color="black", linewidth=1)
    axes.set(title=f"A  $g^2$ against curvature (Eq. 11); {found['negative']} of {found['weights']} $H_{{ii}}$ negative",
             xlabel="$H_{ii}$ of a minibatch's summed loss", ylabel="$g^2$ or variance, summed loss")  # fmt: skip
    axes.legend(loc="upper left", fontsize=9)
