"""What ``torch.compile`` sees of a step: one operator that changes parameters and state in place.

Tracing reads parameters, gradients and state, so that their replacement is noticed; learning rates and the other options
are read when the operator runs, so that a schedule compiles nothing anew. It does what an eager step does, with its bits.

Imported when a step is traced: it brings in the compiler, which takes seconds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .gather import Item, new_state, step_tensor
from .optimizer import _FusedOptimizer, by_name


@torch.library.custom_op("adabayes_fused::step_", mutates_args=("params", "state"))
def step_(params: list[Tensor], grads: list[Tensor], state: list[Tensor], groups: list[int], optimizer: str) -> None:
    """One step of the optimizer of this name on parameters of these groups; ``state``: of each, ``step`` and its slots."""
    found = by_name[optimizer]
    names = ("step", *found.algorithm.stored(found.lean))
    entries = [dict(zip(names, state[i : i + len(names)], strict=True)) for i in range(0, len(state), len(names))]
    used = [dict(entry) for entry in entries]  # what has another form than ours is replaced here
    found._step([Item(*item) for item in zip(groups, range(len(params)), params, grads, used, strict=True)])
    for entry, in_our_form in zip(entries, used, strict=True):
        for name, given in entry.items():
            if in_our_form[name] is not given:
                given.copy_(in_our_form[name])


@step_.register_fake
def _(params: list[Tensor], grads: list[Tensor], state: list[Tensor], groups: list[int], optimizer: str) -> None:
    pass


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _make_ready(name: str) -> None:
    """Runs while ``step`` is traced: state that is missing is made, each tensor of it in memory of its own (the compiler
    copies what shares memory), and step counts go to the parameters' devices."""
    optimizer = by_name[name]
    for p in (p for params in optimizer._param_lists for p in params):
        optimizer._counted_on_device |= p.device.type != "cpu"
        if p.grad is not None and not optimizer.state[p]:
            optimizer.state[p] = new_state(optimizer.algorithm, optimizer.lean, p, p.device, optimizer._slabs)
        entry = optimizer.state.get(p, {})
        for key, value in entry.items():
            if key == "step":
                value = step_tensor(value, p.device)
            if isinstance(value, Tensor) and value.untyped_storage().nbytes() > value.nbytes:
                value = value.clone()
            entry[key] = value


def trace(optimizer: _FusedOptimizer) -> None:
    """``optimizer.step`` as torch.compile traces it."""
    _make_ready(optimizer._name)
    names = ("step", *optimizer.algorithm.stored(optimizer.lean))
    params, groups, grads = [], [], []
    for g, members in enumerate(optimizer._param_lists):
        for p in members:
            if p.grad is not None:
                params.append(p)
                groups.append(g)
                grads.append(p.grad)
    # Only now: once Dynamo knows a parameter as a key of the state, it takes its gradient for one that never changes.
    state = [vars(optimizer)["state"][p][name] for p in params for name in names]
    if params:
        torch.ops.adabayes_fused.step_(params, grads, state, groups, optimizer._name)
