"""Section 2's claim and Appendix C from numbers alone: how a filter's normaliser 1/sigma^2_post grows with <g^2>.

Each filter sees gradients of one size, g^2 = G^2, until it is stationary. With fixed process noise the normaliser grows as
<g^2>^(1/2), as RMSprop and Adam normalise; with noise proportional to the posterior, as <g^2>. AdaBayes is in the former regime
only between its two ends: below it is SGD, its normaliser flat at 1/sigma^2; above, from eta G near 1 on, one gradient says more
than the prior knows and the normaliser is G^2 alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from scipy.optimize import fixed_point

from .reported import eq_20


class Constants(NamedTuple):
    """The paper's section 4; ``memory`` is Ollivier's lambda, and what variational online Newton's average gives the new g^2."""

    eta: float = 1e-3
    batch_size: int = 128
    sigma_sq: float = 0.1 / 128  # Eq. 22
    memory: float = 1e-3


PAPERS = Constants()
Step = Callable[[np.ndarray, np.ndarray, Constants], np.ndarray]


# --- One step of each filter: the normaliser x = 1/sigma^2_post and g^2, both (n,), give the next x -------------------


def adabayes(x: np.ndarray, g_sq: np.ndarray, c: Constants) -> np.ndarray:
    """Fixed process noise eta^2, and forgetting: Eq. 16b, then Eq. 17a."""
    prior = (1 - c.eta**2 / (2 * c.sigma_sq)) ** 2 / x + c.eta**2
    return 1 / prior + g_sq


def random_walk(x: np.ndarray, g_sq: np.ndarray, c: Constants) -> np.ndarray:
    """Fixed process noise alone, sigma^2 -> infinity."""
    return adabayes(x, g_sq, c._replace(sigma_sq=np.inf))


def fading_memory(x: np.ndarray, g_sq: np.ndarray, c: Constants) -> np.ndarray:
    """Noise proportional to the posterior: P -> P / (1 - lambda) (Ollivier), then Eq. 17a."""
    return (1 - c.memory) * x + g_sq


def online_newton(x: np.ndarray, g_sq: np.ndarray, c: Constants) -> np.ndarray:
    """Variational online Newton (Khan et al. 2018, Eq. 7) without its prior: the exponential average of g^2."""
    return (1 - c.memory) * x + c.memory * g_sq


FILTERS: dict[str, Step] = {
    "random walk": random_walk,
    "AdaBayes": adabayes,
    "fading memory": fading_memory,
    "variational online Newton": online_newton,
}
EQ_20 = "AdaBayes-FP, Eq. 20"


def stationary(step: Step, g_sq: np.ndarray, c: Constants) -> np.ndarray:
    """Iterates a filter from sigma^2_prior = sigma^2, with Aitken's acceleration, until its normaliser stays to six digits;
    (n,) -> (n,)."""
    return fixed_point(step, 1 / c.sigma_sq + g_sq, args=(g_sq, c), xtol=1e-9)


# --- Numbers ----------------------------------------------------------------------------------------------------------


def numbers(c: Constants = PAPERS, eta_g: np.ndarray | None = None) -> dict:
    """Everything the picture shows, and: exponents fitted in named ranges of eta G; where the local exponent (of <g^2>) passes
    1/4 and 3/4, half-way to the neighbouring regimes; where the normaliser is Adam's, G / eta, to 10 %.
    """
    eta_g = np.geomspace(1e-5, 1e3, 161) if eta_g is None else eta_g
    g_sq, kappa = (eta_g / c.eta) ** 2, c.eta**2 / c.sigma_sq  # where Adam's G / eta is SGD's 1 / sigma^2
    ranges = {"flat": (eta_g[0], kappa / 10), "root mean square": (10 * kappa, 0.1), "mean square": (10, eta_g[-1])}
    curves = {name: stationary(step, g_sq, c) for name, step in FILTERS.items()} | {
        EQ_20: 1 / eq_20(c.eta / np.sqrt(g_sq), c.sigma_sq)
    }
    return {
        **c._asdict(),
        "kappa": kappa,
        "eta_g": rounded(eta_g),
        "ranges_of_eta_g": ranges,
        "filters": {name: describe(eta_g, g_sq, x, ranges, c) for name, x in curves.items()},
    }


def describe(eta_g: np.ndarray, g_sq: np.ndarray, x: np.ndarray, ranges: dict, c: Constants) -> dict:
    exponent = np.gradient(np.log(x), np.log(g_sq))
    chosen = {name: (low <= eta_g) & (eta_g <= high) for name, (low, high) in ranges.items()}
    return {
        "fitted_exponent": {name: float(np.polyfit(np.log(g_sq[k]), np.log(x[k]), 1)[0]) for name, k in chosen.items()},
        "eta_g_at_exponent_1/4": crossings(eta_g, exponent, 1 / 4),
        "eta_g_at_exponent_3/4": crossings(eta_g, exponent, 3 / 4),
        "eta_g_at_1.1_of_adam": crossings(eta_g, x * c.eta / np.sqrt(g_sq), 1.1),
        "normaliser": rounded(x),
        "exponent": rounded(exponent),
    }


def rounded(values: np.ndarray) -> list[float]:
    return [float(f"{value:.6g}") for value in values]


def crossings(x: np.ndarray, y: np.ndarray, level: float) -> list[float]:
    """Where y(x) passes the level, interpolated in log x."""
    log_x, above = np.log(x), y - level
    k = np.flatnonzero(np.diff(np.sign(above)))
    return np.exp(log_x[k] - above[k] * np.diff(log_x)[k] / np.diff(above)[k]).tolist()


# --- Picture ----------------------------------------------------------------------------------------------------------

STYLES = {  # colours are Okabe and Ito's
    "variational online Newton": dict(color="#E69F00"),
    "fading memory": dict(color="#D55E00", linestyle=(0, (6, 2))),
    EQ_20: dict(color="#009E73", linestyle=(0, (1, 1.2))),
    "random walk": dict(color="#56B4E9", linestyle=(0, (6, 2))),
    "AdaBayes": dict(color="#0072B2"),
}
LEGEND = {
    "random walk": "fixed noise, no forgetting ($\\sigma^2\\to\\infty$)",
    "AdaBayes": "AdaBayes: fixed noise",
    "fading memory": "fading memory: noise $\\propto$ posterior",
}


def picture(found: dict) -> Figure:
    figure = Figure(figsize=(8, 8), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    for name, style in STYLES.items():
        of = found["filters"][name]
        above.loglog(found["eta_g"], of["normaliser"], label=LEGEND.get(name, name), linewidth=2.2, **style)
        below.semilogx(found["eta_g"], of["exponent"], linewidth=2.2, **style)
    above.set(ylabel=r"normaliser  $1/\sigma^2_{post}$", title="How a filter's normaliser grows with the size of its gradients")
    below.set(
        xlabel=r"$\eta G$,  $G=\sqrt{\langle g^2\rangle}$ of the summed loss",
        ylabel=r"local exponent of $\langle g^2\rangle$",
        ylim=(-0.08, 1.12),
    )
    below.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0   flat: SGD", "¼", "½   Adam", "¾", "1   mean square"])
    above.legend(loc="upper left", fontsize=9, framealpha=1)
    above.secondary_xaxis(
        "top", functions=(lambda a: a / (found["eta"] * found["batch_size"]), lambda g: g * found["eta"] * found["batch_size"])
    ).set_xlabel(
        f"root mean square gradient of the mean loss, at $\\eta$ = {found['eta']:g} and {found['batch_size']} examples",
        fontsize=9,
    )
    for axes in (above, below):
        axes.grid(color="#E5E5E5")
        axes.spines[["top", "right"]].set_visible(False)
        for x in (1, found["kappa"]):
            axes.axvline(x, color="black", linewidth=1, linestyle=":")
    below.text(1.2, -0.04, r"$\eta G = 1$", fontsize=10)
    below.text(found["kappa"] * 1.2, -0.04, r"$\eta G = \eta^2/\sigma^2$", fontsize=10)
    return figure


def write(folder: Path) -> list[Path]:
    """Writes theory.json, and theory.png from its numbers; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / "theory.json", folder / "theory.png"]
    written[0].write_text(json.dumps(numbers(), indent=1) + "\n")
    picture(json.loads(written[0].read_text())).savefig(written[1], dpi=110)
    return written
