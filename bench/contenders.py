"""Who is timed: ours in every backend, the slow path, torch's AdamW, and the peers that are installed.

A contender that cannot run here raises, saying why, when it is made; that becomes its row.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from adabayes_fused import AdaBayes, AdaBayesFP, backends, reference

from .shapes import PLAIN, Loop

ANCHOR = "torch AdamW fused"  # what the others are compared with
WEIGHT_DECAY = 0.05
MAX_GRAD_NORM = 1.0
ADAM = dict(lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=WEIGHT_DECAY)


class Contender(NamedTuple):
    """``make(params)`` gives the optimizer; ``judge`` names the contender whose weights it must give, None if no other has
    its rounding; ``compiles`` says that torch.compile is at work, which takes long for many tensors."""

    name: str
    family: str
    make: Callable[[list], Any]
    judge: str | None = None
    compiles: bool = False
    backend: str = ""
    detail: bool = False  # tables only, not pictures


def contenders(device: str, loop: Loop = PLAIN, dtype: torch.dtype = torch.bfloat16) -> dict[str, Contender]:
    """All of them, by name; the first in each family is the one to look at. Where the loop clips, ours do so within the step,
    the others by torch's function. ``dtype``: the parameters'; bfloat16 ones may be rounded in several ways."""
    others = (*torch_adamw(), *slow_paths(), *peers())
    if any(loop):
        others = tuple(c._replace(make=within(loop, device, c.make)) for c in others)
    own = ours(device, loop.clipped, dtype)
    if loop.scaled:
        own = [c._replace(make=within(loop._replace(clipped=False), device, c.make)) for c in own]
    return {c.name: c for c in (*own, *others)}


def within(loop: Loop, device: str, make: Callable[[list], Any]) -> Callable[[list], Any]:
    """``step`` of what it makes does what the loop does besides. The scale is 1, since gradients stay what they are."""

    def make_within(params):
        optimizer = make(params)
        update = optimizer.step
        scaler = torch.amp.GradScaler(device, init_scale=1.0, growth_interval=1 << 30, enabled=loop.scaled)
        scaler.scale(torch.zeros((), device=device))  # as in loss.backward(): the scale comes to be

        def step():
            optimizer.step = update  # which the scaler calls
            if loop.clipped:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(params, MAX_GRAD_NORM)
            scaler.step(optimizer)
            scaler.update()
            optimizer.step = step

        optimizer.step = step
        return optimizer

    return make_within


# state_dtype and weight_rounding, of lean state
PRESETS = [("bfloat16", "nearest"), ("8bit", "nearest")]
OF_BFLOAT16 = [("bfloat16", "32bit"), ("8bit", "24bit"), ("8bit", "stochastic")]  # weights


def ours(device: str, clipped: bool, dtype: torch.dtype) -> list[Contender]:
    first, *others = backends.PREFERRED.get(device, ("foreach",))  # what does not run is no contender by another's name
    storages = [(False, "float32", "nearest"), (True, "float32", "nearest"), *((True, *preset) for preset in PRESETS)]
    storages += [(True, *preset) for preset in OF_BFLOAT16 if dtype == torch.bfloat16]
    return [
        _ours(b, fp, *storage, b != first, MAX_GRAD_NORM if clipped else None)
        for b in (first, *others)
        for fp in (0, 1)
        for storage in storages
    ]


def _ours(backend: str, fp: int, lean: bool, state: str, weights: str, detail: bool, max_grad_norm: float | None) -> Contender:
    options = dict(lr=1e-3, weight_decay=WEIGHT_DECAY, lean=lean, backend=backend, max_grad_norm=max_grad_norm)
    options |= dict(state_dtype=state, weight_rounding=weights)
    make = (lambda p: AdaBayesFP(p, **options)) if fp else (lambda p: AdaBayes(p, batch_size=128, **options))
    name = ("AdaBayes-FP" if fp else "AdaBayes") + (" lean" if lean else "") + (f" {state}" if state != "float32" else "")
    name += f" with {weights} weights" if weights != "nearest" else ""
    judge: str | None = "slow path AdaBayes-FP" if fp else "slow path AdaBayes"
    if state != "float32" or weights != "nearest":  # whose random numbers no other has but itself
        judge = f"{name}, foreach" if backend != "foreach" else None
    return Contender(f"{name}, {backend}" if detail else name, "ours", make, judge, backend=backend, detail=detail)


def slow_paths() -> list[Contender]:
    found = []
    for name, make in (
        ("slow path AdaBayes", lambda p: reference.AdaBayes(p, batch_size=128, weight_decay=WEIGHT_DECAY)),
        ("slow path AdaBayes-FP", lambda p: reference.AdaBayesFP(p, weight_decay=WEIGHT_DECAY)),
    ):
        found += [Contender(name, "slow path", make), Contender(f"{name}, compiled", "slow path", compiled(make), name, True)]
    return found


def torch_adamw() -> list[Contender]:
    judge = "torch AdamW for-loop"
    return [
        Contender(ANCHOR, "torch", lambda p: torch.optim.AdamW(p, **ADAM, fused=True), judge),
        Contender("torch AdamW foreach", "torch", lambda p: torch.optim.AdamW(p, **ADAM, foreach=True), judge),
        Contender(judge, "torch", lambda p: torch.optim.AdamW(p, **ADAM, foreach=False)),
        Contender("torch AdamW compiled", "torch", compiled(lambda p: torch.optim.AdamW(p, **ADAM)), judge, True),
    ]


def compiled(make: Callable[[list], Any]) -> Callable[[list], Any]:
    def make_compiled(params):
        optimizer = make(params)
        optimizer.step = torch.compile(optimizer.step)
        return optimizer

    return make_compiled


# --- Peers: name of the package on the index, and how it is called ----------------------------------------------------


def peers() -> list[Contender]:
    judge = "torch AdamW for-loop"
    return [
        _peer("torch-optimi", "AdamW", lambda p, optimi: optimi.AdamW(p, **ADAM), "optimi", judge),
        _peer("flashoptim", "AdamW", lambda p, flash: flash.FlashAdamW(p, **ADAM, **_flash_bits(p)), "flashoptim"),
        _peer("torchao", "AdamW8bit", lambda p, optim: optim.AdamW8bit(p, **ADAM), "torchao.optim", compiles=True),
        _peer("bitsandbytes", "AdamW8bit", lambda p, bnb: bnb.optim.AdamW8bit(p, **ADAM), "bitsandbytes"),
        _peer("apex", "FusedAdam", lambda p, optimizers: optimizers.FusedAdam(p, **ADAM), "apex.optimizers", judge),
        _peer("ivon-opt", "IVON", lambda p, ivon: _ivon(ivon.IVON(p, lr=1e-3, ess=50_000)), "ivon"),
    ]


def _peer(package: str, title: str, make, module: str, judge: str | None = None, compiles: bool = False) -> Contender:
    where = "github.com/NVIDIA/apex; the index's package apex is another" if package == "apex" else f"pip install {package}"

    def make_peer(params):
        try:
            imported = importlib.import_module(module)
        except ImportError as error:
            raise ImportError(f"not installed: {where}" if error.name == module.partition(".")[0] else str(error)) from error
        return make(params, imported)

    return Contender(f"{package} {title}", "peer", make_peer, judge, compiles)


def _flash_bits(params) -> dict[str, int | None]:
    """Its default is refused where all weights have 32 bits."""
    return dict(master_weight_bits=None if all(p.dtype == torch.float32 for p in params) else 24)


def _ivon(optimizer):
    """Its step needs the sample of the weights that gradients were taken at; drawing it belongs to the method's price."""
    update = optimizer.step

    def step():
        with optimizer.sampled_params(train=True):
            pass
        update()

    optimizer.step = step
    return optimizer
