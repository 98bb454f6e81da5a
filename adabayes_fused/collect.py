"""One step: what is to be updated, read and checked, then launched. Whatever can fail, fails before anything changes.

Plain parameters are read in C++ (``native.new_batch``) as rows of addresses; the others, and all of them where the
extension is missing, are prepared in Python as tensors.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from . import backends
from .backends import native
from .backends.launch import WORDS, Launch
from .gather import DTYPES, Prepared, check_parameter, new_state, prepare

SCALARS = ("lr", "r", "batch_size", "weight_decay", "eps", "first_prior")  # of a group, numbers or one-element tensors


def collect(optimizer, grad_scale: Any, found_inf: Any, on_device: bool) -> Callable[[], None]:
    """Everything of one step up to its launches.

    Args:
        optimizer: a fused optimizer.
        grad_scale: what the gradients have been multiplied by, a number; on_device: also a tensor.
        found_inf: on_device: a tensor that is not zero where nothing may change, or None.
        on_device: step counts and coefficients are tensors on each parameter's device, never read by the host.

    Returns: the function that counts the step and updates.
    """
    created: list[Tensor] = []
    batch = None if on_device else optimizer._reader()
    try:
        return _collect(optimizer, batch, grad_scale, found_inf, on_device, created)
    except BaseException:
        for p in created:
            del vars(optimizer)["state"][p]
        if batch is not None:
            batch.clear()
        raise


def _collect(optimizer, batch, grad_scale, found_inf, on_device, created) -> Callable[[], None]:
    positions = _unread(optimizer) if batch is None else _read(optimizer, batch)
    prepared = _prepare(optimizer, positions, on_device, created) if positions else []
    if created and _only_makes_state(optimizer, prepared, created):
        return lambda: None
    by_tensor = [
        p for p in prepared if batch is None or not batch.add(p.tensors[0], p.tensors[1], p.tensors[2:], p.step, p.group)
    ]
    launches = [] if batch is None else _launches_of_rows(optimizer, batch, grad_scale)
    launches += _launches_of_tensors(optimizer, by_tensor, grad_scale, found_inf, on_device)
    runs = [backends.BACKENDS[backends.choose(optimizer.backend, launch.device)].prepare(launch) for launch in launches]

    def run() -> None:
        try:
            if batch is not None:
                batch.count_step()
            _count(by_tensor, found_inf)
            for launch in runs:
                launch()
            for p in prepared:
                p.write_back()
        finally:
            if batch is not None:
                batch.release()

    return run


def _only_makes_state(optimizer, prepared: list[Prepared], created: list[Tensor]) -> bool:
    """Whether all state is new, every ``lr`` is 0 and every gradient zero: torch.distributed.checkpoint's step for the sake of
    the state (``_init_optim_state``). It updates nothing and is not counted. Asked where state is made, and waits for an
    accelerator only at ``lr = 0``."""
    lrs = [group["lr"] for group in optimizer.param_groups]
    if any(isinstance(lr, Tensor) and lr.device.type != "cpu" or lr != 0 for lr in lrs):
        return False
    if len(created) < len(vars(optimizer)["state"]) or torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return False
    return not any(p.tensors[1].any() for p in prepared)


def _unread(optimizer) -> list[tuple[int, int]]:
    """(group, position) of every parameter with a gradient."""
    return [(g, i) for g, group in enumerate(optimizer.param_groups) for i, p in enumerate(group["params"]) if p.grad is not None]


def _read(optimizer, batch) -> list[tuple[int, int]]:
    """Fills ``batch``; returns (group, position) of the parameters it leaves to Python."""
    batch.begin(optimizer._slabs.all, optimizer._state_asked_for or _references(optimizer) > _REFERENCES_OF_ONE)
    optimizer._state_asked_for = False
    state = vars(optimizer)["state"]
    return [(g, i) for g, group in enumerate(optimizer.param_groups) for i in batch.read(group["params"], state, g)]


def _references(owner) -> int:
    return sys.getrefcount(vars(owner)["state"])


_REFERENCES_OF_ONE = _references(SimpleNamespace(state={}))  # what is counted where nobody else holds the state


def _prepare(optimizer, positions, on_device: bool, created: list[Tensor]) -> list[Prepared]:
    found = [(g, i, optimizer.param_groups[g]["params"][i]) for g, i in positions]
    names = optimizer.algorithm.stored(optimizer.lean)
    state = vars(optimizer)["state"]
    optimizer._slabs.forget_unused(entry.get(name) for entry in state.values() for name in ("step", *names))
    for g, i, p in found:
        check_parameter(p, state.get(p, {}), names, f"parameter {i} of group {g}, shape {tuple(p.shape)},")
        backends.choose(optimizer.backend, p.device)
    prepared = []
    for g, _, p in found:
        step_device = p.device if on_device else torch.device("cpu")
        if not state[p]:
            created.append(p)
            state[p] = new_state(optimizer.algorithm, optimizer.lean, p, step_device, optimizer._slabs)
        prepared.append(prepare(p, state[p], names, g, step_device))
    return prepared


def _launches_of_rows(optimizer, batch, grad_scale: float) -> list[Launch]:
    coefficients = None
    launches = []
    for device_type, index, param_dtype, grad_dtype, address, count in batch.buckets():
        if coefficients is None:
            coefficients = _coefficients(optimizer, batch.coefficient_keys(), grad_scale)
        device = torch.device("cpu") if device_type == native.DLPACK_CPU else torch.device("cuda", index)
        launches.append(
            Launch(
                optimizer.algorithm,
                optimizer.lean,
                device,
                DTYPES[param_dtype],
                DTYPES[grad_dtype],
                coefficients,
                address=address,
                count=count,
            )
        )
    return launches


def _launches_of_tensors(optimizer, prepared: list[Prepared], grad_scale, found_inf, on_device: bool) -> list[Launch]:
    buckets: dict[tuple, list[Prepared]] = {}
    for p in prepared:
        param, grad = p.tensors[:2]
        buckets.setdefault((param.device, param.dtype, grad.dtype), []).append(p)
    launches = []
    for (device, param_dtype, grad_dtype), members in buckets.items():
        if on_device:
            coefficients, which = _device_coefficients(optimizer, members, device, grad_scale), list(range(len(members)))
        else:
            keys: dict[tuple[int, float], int] = {}
            which = [keys.setdefault((p.group, float(p.step) + 1), len(keys)) for p in members]
            coefficients = _coefficients(optimizer, keys, grad_scale)
        launches.append(
            Launch(
                optimizer.algorithm,
                optimizer.lean,
                device,
                param_dtype,
                grad_dtype,
                coefficients,
                tensors=[p.tensors for p in members],
                which=which,
                found_inf=_on(device, found_inf, torch.float32),
                kept_alive=optimizer._kept_alive,
            )
        )
    return launches


def _coefficients(optimizer, keys: Iterable[tuple[int, float]], grad_scale: float) -> Tensor:
    """One row for each (group, step count), computed in float64."""
    groups = [_scalars(group, float) for group in optimizer.param_groups]
    return torch.tensor(
        [optimizer.algorithm.coefficients(groups[g], step, grad_scale) for g, step in keys], dtype=torch.float64, device="cpu"
    )


def _device_coefficients(optimizer, members: list[Prepared], device: torch.device, grad_scale: Any) -> Tensor:
    """One row for each parameter, computed on the device (in float64 where it has it) and never waited for."""
    dtype = torch.float32 if device.type == "mps" else torch.float64
    steps = torch.stack([p.step for p in members]).to(dtype) + 1
    rows = torch.empty(len(members), WORDS, dtype=dtype, device=device)
    for g in dict.fromkeys(p.group for p in members):
        at = [i for i, p in enumerate(members) if p.group == g]
        group = _scalars(optimizer.param_groups[g], lambda t: _on(device, t, dtype))
        start, stop = at[0], at[-1] + 1  # members come in the groups' order
        for column, value in enumerate(
            optimizer.algorithm.coefficients(group, steps[start:stop], _on(device, grad_scale, dtype))
        ):
            rows[start:stop, column] = value
    return rows


def _scalars(group: dict[str, Any], convert: Callable[[Any], Any]) -> dict[str, Any]:
    """The group with ``convert`` applied to every hyper-parameter that is a number or a one-element tensor."""
    found = {name: convert(group[name]) for name in SCALARS if group.get(name) is not None}
    return {**group, **found, "betas": tuple(map(convert, group["betas"]))}


def _on(device: torch.device, value: Any, dtype: torch.dtype) -> Any:
    """A one-element tensor there, as a 0-dim tensor of ``dtype``, waited for only where the CPU is to read it; None as it
    is; another number as a float."""
    if isinstance(value, Tensor):
        return value.detach().reshape(()).to(device=device, dtype=dtype, non_blocking=device.type != "cpu")
    return None if value is None else float(value)


def _count(prepared: list[Prepared], found_inf: Any) -> None:
    """Raises the step counts by one, but for steps that ``found_inf`` skips."""
    for device in dict.fromkeys(p.step.device for p in prepared):
        steps = [p.step for p in prepared if p.step.device == device]
        torch._foreach_add_(steps, 1 if found_inf is None else (_on(device, found_inf, torch.float32) == 0).float())
