"""Fused AdaBayes: optimizers that filter each weight's optimum, one memory sweep and one launch a step."""

from ._version import __version__
from .optimizer import AdaBayes, AdaBayesFP

__all__ = ["AdaBayes", "AdaBayesFP", "__version__"]
