"""The backends, one file each, and the choice between them.

Each has ``unavailable(device)``: None, or why it cannot update parameters there and what to do about it;
``sum_of_squares(launch)``: a 1-dim tensor on the launch's device (float64 where it has it) whose sum is that of all its squared
gradients, never waited for; and ``prepare(launches, copies)``: everything that may fail, returning the function that updates,
raises the step counts and writes ``copies`` back, pairs of a parameter and the tensor updated in its place. Those with kernels
for GPUs also have ``decide``: one kernel for what ``clipping.decide`` else has torch's operations do.
"""

from __future__ import annotations

import functools
from types import ModuleType

import torch

from ..warn import warn
from . import cpp, cuda, foreach, native, triton
from .launch import CANNOT_LOAD

BACKENDS: dict[str, ModuleType] = {"cpp": cpp, "cuda": cuda, "triton": triton, "foreach": foreach}
READ_TABLES = ("cpp", "cuda", "triton")  # these want addresses, foreach wants tensors
PREFERRED = {"cpu": ("cpp", "foreach"), "cuda": ("cuda", "triton", "foreach")}
NAMES = ("auto", *BACKENDS)


def check_name(name: str) -> None:
    if name not in NAMES:
        raise ValueError(f"Invalid backend: {name!r} (allowed: {', '.join(map(repr, NAMES))})")


@functools.lru_cache
def choose(name: str, device: torch.device) -> str:
    """The backend that ``name`` means for parameters on ``device``. RuntimeError if the named one cannot run there."""
    if name == "auto":
        unloaded = []
        for chosen in _preferred(device):
            if (reason := BACKENDS[chosen].unavailable(device)) is None:
                break
            if reason.startswith(CANNOT_LOAD):
                unloaded.append(f"{chosen}: {reason}")
        if unloaded and chosen != "foreach":  # of which a step warns
            warn(f"parameters on {device} are updated by the backend {chosen!r}. {'; '.join(unloaded)}")
        return chosen
    reason = BACKENDS[name].unavailable(device)
    if reason is not None:
        raise RuntimeError(f"backend={name!r} cannot run on {device}: {reason}")
    return name


def _preferred(device: torch.device) -> tuple[str, ...]:
    return PREFERRED.get(device.type, ("foreach",))


@functools.lru_cache
def warn_of_foreach(device: torch.device) -> None:
    """Says, once a device, why "auto" has come down to "foreach" there although there are kernels for such devices."""
    reasons = {b: BACKENDS[b].unavailable(device) for b in _preferred(device) if b != "foreach"}
    if native.in_the_way:  # the import has said so
        reasons = {b: reason for b, reason in reasons.items() if reason != native.missing}
    if reasons and choose("auto", device) == "foreach":
        why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        warn(f"parameters on {device} are updated by the slow backend 'foreach': no other runs. {why}")
