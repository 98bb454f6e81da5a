"""Fused AdaBayes: optimizers that filter each weight's optimum, one memory sweep and one launch a step."""

from ._version import __version__
from .diagnostics import Diagnosis, Diagnostics, diagnostics
from .optimizer import AdaBayes, AdaBayesFP
from .posterior import Posterior, posterior
from .release import ReleasedGradients, release_gradients

__all__ = [
    "AdaBayes",
    "AdaBayesFP",
    "Diagnosis",
    "Diagnostics",
    "Posterior",
    "ReleasedGradients",
    "diagnostics",
    "posterior",
    "release_gradients",
    "__version__",
]
