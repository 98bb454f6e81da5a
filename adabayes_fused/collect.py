"""One step: what is to be updated, read and checked, then launched. Whatever can fail, fails before anything changes.

Plain parameters are read in C++ (``native.new_batch``) as rows of addresses; the others, and all of them where the
extension is missing, are prepared in Python as tensors.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable, Sequence
from itertools import chain
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import backends, clipping
from .algorithms import moves_far
from .backends import native
from .backends.launch import COEFFICIENTS, Launch
from .clipping import Scaling
from .gather import DTYPES, Item, Prepared, check_item, new_state, prepare, ready
from .plain import watched
from .scalars import on, scalars, tensor_options, wide
from .sharding import groups_of, spec_of, summed
from .signals import held_back

CPU = torch.device("cpu")

if TYPE_CHECKING:
    from .optimizer import _FusedOptimizer


def collect(optimizer: _FusedOptimizer, given: list[Item] | None, scaling: Scaling) -> Callable[[], None] | None:
    """Everything of one step up to its launches.

    Args:
        optimizer: a fused optimizer.
        given: what is updated; None: every parameter that has a gradient.
        scaling: of the gradients. ``on_device``: step counts and coefficients are tensors on each parameter's device.

    Returns: the function that counts the step and updates; None where gradients are not finite and that skips the step.
    """
    if clipping.reads_gradients_first(optimizer):
        clipping.check_whole(optimizer)
    created: list[Tensor] = []
    if watched():  # by what must see each operation, and may have given the tensors no values
        scaling = scaling._replace(on_device=True)
    batch = None if scaling.on_device else optimizer._reader()
    run = None
    try:
        run = _collect(optimizer, batch, given, scaling, created)
    finally:
        if run is None:
            for p in created:
                del optimizer._kept_state[p]
            if batch is not None:
                batch.clear()
    return run


def _collect(
    optimizer: _FusedOptimizer, batch: Any, given: list[Item] | None, scaling: Scaling, created: list[Tensor]
) -> Callable[[], None] | None:
    if given is None:
        items = _unread(optimizer) if batch is None else _read(optimizer, batch)
    else:
        items = given if batch is None else _read_given(optimizer, batch, given)
    prepared = _prepare(optimizer, items, scaling.on_device, created) if items else []
    if created and given is None and _only_makes_state(optimizer, prepared, created):
        if batch is not None:
            batch.clear()
        return lambda: None
    by_tensor = [p for p in prepared if batch is None or not _add(batch, p)]
    launches = [] if batch is None else _launches_of_rows(optimizer, batch)
    launches += _launches_of_tensors(optimizer, by_tensor, scaling.on_device)
    reads_first = clipping.reads_gradients_first(optimizer)
    if reads_first and not scaling.on_device and any(launch.device.type != "cpu" for launch in launches):
        if batch is not None:
            batch.clear()  # the norm is not the host's to know
        return _collect(optimizer, None, given, scaling._replace(on_device=True), created)
    decided = clipping.decide(optimizer, launches, scaling)
    if decided is None:
        return None
    factor, found_inf = decided
    _set_coefficients(optimizer, launches, factor)
    for launch in launches:
        launch.found_inf = on(launch.device, found_inf, torch.float32)
    updates = _updates(launches, prepared)
    counted_on_device = scaling.on_device and not watched()
    at_once = len(updates) == 1 and launches[0].backend == "cpp"  # changes everything in one call, which no signal interrupts

    def run() -> None:
        optimizer._counted_on_device = counted_on_device
        try:
            if at_once and found_inf is None:
                return updates[0]()
            with held_back():
                for update in updates:
                    update()
                optimizer._count_skipped(found_inf)
        finally:
            if batch is not None:
                _let_go(batch)

    return run


def _let_go(batch: Any) -> None:
    """Of the gradients. The step is made: it must not fail any more, and the next one lets go of them, too."""
    try:
        batch.release()
    except MemoryError:
        return


def _updates(launches: list[Launch], prepared: list[Prepared]) -> list[Callable[[], None]]:
    """What each backend does of the step, once all of it can be done."""
    updates = []
    for name in dict.fromkeys(launch.backend for launch in launches):
        copies = [p.copied for p in prepared if p.copied is not None and p.backend == name]
        updates.append(backends.BACKENDS[name].prepare([launch for launch in launches if launch.backend == name], copies))
    return updates


def _only_makes_state(optimizer: _FusedOptimizer, prepared: list[Prepared], created: list[Tensor]) -> bool:
    """Whether all state is new, every ``lr`` is 0 and every gradient zero: torch.distributed.checkpoint's step for the sake of
    the state (``_init_optim_state``). It updates nothing and is not counted. Asked where state is made, and waits for an
    accelerator only at ``lr = 0``."""
    lrs = [group["lr"] for group in optimizer.param_groups]
    if any(isinstance(lr, Tensor) and lr.device.type != "cpu" or lr != 0 for lr in lrs):
        return False
    if watched() or _capturing() or len(created) < len(optimizer._kept_state):
        return False
    # A process that holds only zeros of it, or nothing, must not take a first step of warm-up for that.
    nonzero: dict[tuple[Any, ...], list[Tensor]] = {}
    for p in prepared:
        nonzero.setdefault(groups_of(spec_of(p.param)), []).append(p.tensors[1].any())
    return not any(summed({groups: clipping.total(found) for groups, found in nonzero.items()}))


def _add(batch: Any, p: Prepared) -> bool:
    if p.backend not in backends.READ_TABLES:
        return False
    taken: bool = batch.add(p.tensors[0], p.tensors[1], p.tensors[2:], p.step, p.group, spec_of(p.param))
    return taken


def _item(optimizer: _FusedOptimizer, g: int, i: int) -> Item:
    p = optimizer.param_groups[g]["params"][i]
    return Item(g, i, p, p.grad, optimizer._kept_state.get(p, {}))


def _unread(optimizer: _FusedOptimizer) -> list[Item]:
    """Every parameter with a gradient."""
    groups = enumerate(optimizer.param_groups)
    return [_item(optimizer, g, i) for g, group in groups for i, p in enumerate(group["params"]) if p.grad is not None]


def _read(optimizer: _FusedOptimizer, batch: Any) -> list[Item]:
    """Fills ``batch``; returns the parameters it leaves to Python."""
    held = _references(optimizer) > _REFERENCES_OF_ONE
    # A norm sums what is spread over processes apart from what each has whole.
    batch.begin(optimizer._slabs.all, optimizer._state_asked_for, held, clipping.reads_gradients_first(optimizer))
    state, groups = optimizer._kept_state, enumerate(optimizer.param_groups)
    return [_item(optimizer, g, i) for g, group in groups for i in batch.read(group["params"], state, g)]


def _read_given(optimizer: _FusedOptimizer, batch: Any, given: list[Item]) -> list[Item]:
    """Fills ``batch`` with these; returns those it leaves to Python."""
    names = optimizer.algorithm.stored(optimizer.lean)
    batch.begin(optimizer._slabs.all, optimizer._state_asked_for, True, clipping.reads_gradients_first(optimizer))

    def taken(item: Item) -> bool:
        if any(name not in item.state for name in ("step", *names)):
            return False
        slots = [item.state[name] for name in names]
        known: bool = batch.add(item.param, item.grad, slots, item.state["step"], item.group, None)
        return known

    return [item for item in given if not taken(item)]


def _references(owner: Any) -> int:
    return sys.getrefcount(owner._kept_state)


_REFERENCES_OF_ONE = _references(SimpleNamespace(_kept_state={}))  # what is counted where nobody else holds the state


def _prepare(optimizer: _FusedOptimizer, items: list[Item], on_device: bool, created: list[Tensor]) -> list[Prepared]:
    names = optimizer.algorithm.stored(optimizer.lean)
    state = optimizer._kept_state
    entries = (entry for entry in state.values() if isinstance(entry, dict))  # hooks may keep state of no parameter
    optimizer._slabs.forget_unused(entry.get(name) for entry in entries for name in ("step", *names))
    found, unwatched = [], not watched()
    for item in items:  # all of them before the first is touched
        step_device = item.param.device if on_device else CPU
        tensors = ready(item, names, step_device) if unwatched else None
        if tensors is None:
            check_item(item, names)
        found.append((item, step_device, backends.choose(optimizer.backend, item.param.device), tensors))
    if on_device and _capturing():
        _check_capture(optimizer, items)
    prepared = []
    for item, step_device, backend, tensors in found:
        p = item.param
        if tensors is not None:
            prepared.append(Prepared(p, tensors, item.state["step"], item.group, backend, None))
            continue
        if not item.state:
            state[p] = new_state(optimizer.algorithm, optimizer.lean, p, step_device, optimizer._slabs)
            created.append(p)
            item = item._replace(state=state[p])
        prepared.append(prepare(item, names, step_device, backend))
    return prepared


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _check_capture(optimizer: _FusedOptimizer, items: list[Item]) -> None:
    """Raises for what a CUDA graph would freeze or lose: state made during capture, options the host holds in tensors."""
    for item in items:
        if not item.state:
            raise RuntimeError(f"{item} has no state yet: run a few steps before capturing a CUDA graph")
        if item.state["step"].device != item.param.device:
            raise RuntimeError(f"{item} has its step count on the CPU: run a step with capturable=True before capturing")
    for g in dict.fromkeys(item.group for item in items):
        for name, value in tensor_options(optimizer.param_groups[g]).items():
            if value.device.type == "cpu":
                raise RuntimeError(
                    f"{name} of group {g} is a tensor on the CPU, where replays of a CUDA graph would not see it change; "
                    f"move it to the GPU, in optimizer.param_groups[{g}]"
                )


def _launches_of_rows(optimizer: _FusedOptimizer, batch: Any) -> list[Launch]:
    keys = batch.coefficient_keys()
    return [
        Launch(
            optimizer.algorithm,
            optimizer.lean,
            backends.choose(optimizer.backend, device),
            device,
            DTYPES[param_dtype],
            DTYPES[grad_dtype],
            keys,
            address=address,
            count=count,
            groups=groups_of(spec),
        )
        for device_type, index, param_dtype, grad_dtype, address, count, spec in batch.buckets()
        for device in (torch.device("cpu") if device_type == native.DLPACK_CPU else torch.device("cuda", index),)
    ]


def _launches_of_tensors(optimizer: _FusedOptimizer, prepared: list[Prepared], on_device: bool) -> list[Launch]:
    buckets: dict[tuple[Any, ...], list[Prepared]] = {}
    for p in prepared:
        param, grad = p.tensors[:2]
        groups = groups_of(spec_of(p.param)) if clipping.reads_gradients_first(optimizer) else ()
        buckets.setdefault((p.backend, param.device, param.dtype, grad.dtype, groups), []).append(p)
    launches = []
    for (backend, device, param_dtype, grad_dtype, groups), members in buckets.items():
        if backend == "foreach" and optimizer.backend == "auto":
            backends.warn_of_foreach(device)
        keys: dict[tuple[int, Any], int] = {}
        # On the device a parameter's count is not known, so each has a key, the tensor, of its own.
        which = [keys.setdefault((p.group, p.step if on_device else float(p.step) + 1), len(keys)) for p in members]
        launches.append(
            Launch(
                optimizer.algorithm,
                optimizer.lean,
                backend,
                device,
                param_dtype,
                grad_dtype,
                list(keys),
                tensors=[p.tensors for p in members],
                steps=[p.step for p in members],
                which=which,
                groups=groups,
                kept_alive=optimizer._kept_alive,
            )
        )
    return launches


def _set_coefficients(optimizer: _FusedOptimizer, launches: list[Launch], factor: Any) -> None:
    known: tuple[Any, array[float] | None] = None, None  # rows read in C++ have their keys in common
    for launch in launches:
        launch.far = any(moves_far(optimizer.param_groups[g]) for g in {g for g, _ in launch.keys})
        if isinstance(launch.keys[0][1], Tensor):
            launch.coefficients = _device_coefficients(optimizer, launch.keys, launch.device, factor)
        else:
            if launch.keys is not known[0]:
                known = launch.keys, _coefficients(optimizer, launch.keys, factor)
            launch.coefficients = known[1]


def _coefficients(optimizer: _FusedOptimizer, keys: Sequence[tuple[int, float]], factor: float) -> array[float]:
    """One row for each (group, step count), computed in float64."""
    groups = {g: optimizer._options.floats(optimizer.param_groups[g]) for g in {g for g, _ in keys}}
    return array("d", chain.from_iterable(optimizer.algorithm.coefficients(groups[g], step, factor) for g, step in keys))


def _device_coefficients(
    optimizer: _FusedOptimizer, keys: Sequence[tuple[int, Tensor]], device: torch.device, factor: Any
) -> Tensor:
    """One row for each (group, step count before this step), computed on the device (in float64 where it has it) and never
    waited for."""
    dtype = wide(device)
    steps = torch.stack([step for _, step in keys]).to(dtype) + 1
    rows = torch.empty(len(keys), COEFFICIENTS, dtype=dtype, device=device)
    for g in dict.fromkeys(g for g, _ in keys):
        at = [i for i, key in enumerate(keys) if key[0] == g]
        group = scalars(optimizer.param_groups[g], lambda t: on(device, t, dtype))
        start, stop = at[0], at[-1] + 1  # keys come in the groups' order
        for column, value in enumerate(optimizer.algorithm.coefficients(group, steps[start:stop], on(device, factor, dtype))):
            rows[start:stop, column] = value
    return rows

