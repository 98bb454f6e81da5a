"""Fused AdaBayes: optimizers that filter each weight's optimum, one memory sweep and one launch a step."""

import warnings as _warnings

from ._version import __version__
from .backends import native as _kernels
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

if _kernels.in_the_way:
    _warnings.warn(f"adabayes_fused has no compiled kernels here: {_kernels.missing}.", stacklevel=2)
