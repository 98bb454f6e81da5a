"""What ``torch.compile`` sees of a step: one operator that changes the parameters in place.

The operator runs an eager step, so the graph holds no option, no state and no rule: a schedule compiles nothing anew, the
bits are an eager step's, and compilation takes no longer for more state. ``look`` breaks the graph, which gives the step one
of its own: what a compiled function has written to ``param_groups`` by then is written, and what it reads after it is there.

Imported when a step is traced: it brings in the compiler, which takes seconds.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .sharding import is_sharded

_by_name: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()


@torch.library.custom_op("adabayes_fused::step_", mutates_args=("params",), tags=(torch.Tag.cudagraph_unsafe,))
def step_(params: list[Tensor], grads: list[Tensor], optimizer: str) -> None:
    """A step of the optimizer of this name; ``params`` are its parameters with a gradient, ``grads`` those gradients."""
    found = _by_name[optimizer]
    found._step()
    for given, p in zip(params, _with_gradients(found), strict=True):
        if given.data_ptr() != p.data_ptr():  # a copy, which the graph would write back
            given.copy_(p)


@step_.register_fake
def _(params: list[Tensor], grads: list[Tensor], optimizer: str) -> None:
    pass


def _with_gradients(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


@torch.compiler.disable  # type: ignore[untyped-decorator]
def look(optimizer: Any) -> tuple[list[Tensor], str]:
    """The parameters and the name for ``trace``, to which every number in ``param_groups`` would be a constant. Steps eagerly
    where there are none, and where the compiler cannot change one in place; then it names no parameters."""
    name = f"{type(optimizer).__name__} {id(optimizer)}"
    _by_name[name] = optimizer
    params = _with_gradients(optimizer)
    if not params or any(p.is_complex() or is_sharded(p) for p in params):
        optimizer._step()
        params = []
    return params, name


def trace(optimizer: Any) -> None:
    """``optimizer.step`` as torch.compile traces it."""
    params, name = look(optimizer)
    if params:
        torch.ops.adabayes_fused.step_(params, [p.grad for p in params], name)
