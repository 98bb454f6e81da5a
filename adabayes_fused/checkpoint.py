"""Loading a state_dict: checked against the optimizer first, then restored bit for bit.

torch's ``load_state_dict`` casts state to the parameters' dtype. Ours is float32 whatever theirs is, so it is hidden from
torch: after the user's hooks that come before, restored before those that come after.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import codes
from .algorithms import ADABAYES, ALGORITHMS, Algorithm, complete_group, make_python_numbers, present, python_number
from .codes import Layout
from .prepare import initial, new_seed, new_slot, new_step, number, own_copy, step_device
from .scalars import SCALARS
from .sharding import is_sharded, local, placed_like
from .slabs import Slabs
from .warn import warn

_INDISPENSABLE = ("lr", "betas", "weight_decay", "r")  # of a group; what else it lacks, its version may not have known


class _Hidden:
    """A tensor that torch's load_state_dict passes on untouched."""

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor


def tidy_groups(optimizer: Any, state_dict: dict[str, Any]) -> None:
    """The groups of a new state_dict with an edited ``sgd_lr`` taken up, so that nothing of it need be saved, and options
    that were written to a group in another form as Python's own numbers."""
    for group, here in zip(state_dict["param_groups"], optimizer.param_groups, strict=True):
        group.update(present(optimizer.algorithm, group, optimizer._sgd_lr_of_r(here)))
        make_python_numbers(group)


def hide_state(optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Checks a state_dict against the optimizer; returns it with its groups completed and its tensors hidden.

    What a file lacks, torch.distributed.checkpoint's flattened form gives as an empty dict; it is left out.
    """
    groups = state_dict["param_groups"]
    if [len(g["params"]) for g in groups] != [len(g["params"]) for g in optimizer.param_groups]:
        return state_dict  # torch refuses it, in its own words
    groups = [_completed(optimizer, g, group) for g, group in enumerate(groups)]
    ids = [i for group in groups for i in group["params"]]
    params = dict(zip(ids, (p for group in optimizer.param_groups for p in group["params"]), strict=False))
    state = {}
    for i, entry in state_dict["state"].items():
        if i in params:
            entry = {name: value for name, value in entry.items() if not (isinstance(value, dict) and not value)}
            _check_kind(optimizer, i, entry)
            check_entry((*optimizer.algorithm.slots, "correction"), i, params[i], entry)
            # What others keep there goes to the parameter's device as torch sees fit.
            ours = ("step", "seed", *optimizer.algorithm.slots, "correction")
            entry = {name: _Hidden(value) if name in ours else value for name, value in entry.items()}
        state[i] = entry
    for group in groups:
        complete_group(optimizer.algorithm, dict(group))
    return {**state_dict, "state": state, "param_groups": groups}


def _completed(optimizer: Any, g: int, saved: dict[str, Any]) -> dict[str, Any]:
    """A saved group; an option it lacks stays as it is here."""
    missing = [name for name in _INDISPENSABLE if name not in saved]
    if missing:
        adam = "; load_adam_state_dict takes over the averages of torch's Adam and AdamW" if "amsgrad" in saved else ""
        raise ValueError(
            f"loaded state dict is not of {type(optimizer).__name__}: its group {g} lacks {', '.join(missing)} "
            f"(it has {', '.join(sorted(saved))}){adam}"
        )
    here = optimizer.param_groups[g]
    return {**{name: here[name] for name in (*optimizer.defaults, "first_prior") if name in here}, **saved}


def _check_kind(optimizer: Any, i: int, entry: dict[str, Any]) -> None:
    """The slots tell whose state it is."""
    algorithm = optimizer.algorithm
    missing = [name for name in ("step", *algorithm.stored(lean=True)) if name not in entry]
    others = [name for other in ALGORITHMS for name in other.slots if name in entry and name not in algorithm.slots]
    for wrong, names in (("lacks", missing), ("has", others)):
        if entry and names:
            raise ValueError(
                f"loaded state dict is not of {type(optimizer).__name__}: the state of parameter {i} {wrong} {', '.join(names)} "
                f"(it has {', '.join(entry)})"
            )


def check_entry(slots: tuple[str, ...], i: Any, p: Tensor, entry: dict[str, Any]) -> None:
    """Raises ValueError unless ``step`` and ``seed`` are one number, and each of ``slots`` that is there a tensor like ``p``."""
    for name in ("step", "seed"):
        value = python_number(entry.get(name, 0))
        if not (value.numel() == 1 if isinstance(value, Tensor) else isinstance(value, (int, float))):
            raise ValueError(f"loaded state dict: {name} of parameter {i} must be one number, given {value!r}")
    for name in slots:
        if name in entry and not isinstance(entry[name], Tensor):
            raise ValueError(f"loaded state dict: {name} of parameter {i} must be a tensor, given {entry[name]!r}")
        if name in entry and entry[name].shape not in (p.shape, local(p).shape):
            raise ValueError(
                f"loaded state dict is of another model: {name} of parameter {i} has shape {tuple(entry[name].shape)}, "
                f"the parameter {tuple(p.shape)}"
            )


def restore(optimizer: Any, state_before: dict[Tensor, Any], groups_before: list[dict[str, Any]], told: bool) -> Slabs:
    """Puts the hidden tensors in place, in our dtype, on the parameter's device. A tensor that a CUDA graph or a compiled
    step may read stays where it is and takes the loaded value; such are written last, once nothing can fail. Returns the memory
    that small state lies in."""
    writes: list[tuple[Tensor, Tensor]] = []
    for group, before in zip(optimizer.param_groups, groups_before, strict=True):
        group["capturable"] = before["capturable"]
        for name in SCALARS:
            if name in group:
                group[name] = _option_stays(before.get(name), group[name], writes)
        group["betas"] = tuple(_option_stays(b, new, writes) for b, new in zip(before["betas"], group["betas"], strict=True))
    absent: set[str] = set()
    converted: set[tuple[torch.dtype, torch.dtype]] = set()
    slabs = Slabs()
    given = optimizer._given()
    for g, group in enumerate(optimizer.param_groups):
        for i, p in enumerate(group["params"]):
            if not optimizer.state.get(p):
                continue
            loaded = optimizer.state[p]
            saved = {name: value.tensor for name, value in loaded.items() if isinstance(value, _Hidden)}
            absent.update(set(optimizer.algorithm.stored(optimizer.lean)) - saved.keys())
            layout = given.storage.layout(optimizer.algorithm, p.dtype)
            fresh_seed = functools.partial(given.seed_of, g, i)
            entry = _own_entry(optimizer.algorithm, layout, p, saved, fresh_seed, converted, slabs)
            if group["capturable"]:
                present = state_before.get(p, {})
                entry = {name: _stays(present.get(name), fresh, writes) for name, fresh in entry.items()}
            optimizer.state[p] = {**entry, **{name: value for name, value in loaded.items() if name not in saved}}
    for present, fresh in writes:
        present.detach().copy_(fresh)
    if optimizer.algorithm is ADABAYES and "exp_avg_sq" in absent:
        warn(
            "the loaded state is lean: exp_avg_sq, which AdaBayes keeps for you and does not use, starts at zero. "
            "The weights go on as they would have."
        )
    if converted and not told:
        kinds = "; ".join(sorted(f"{saved} became {here}" for saved, here in converted))
        warn(f"the loaded state was stored otherwise than here, and is rounded to nearest: {kinds}")
    return slabs


def _own_entry(
    algorithm: Algorithm,
    layout: Layout,
    p: Tensor,
    saved: dict[str, Any],
    fresh_seed: Callable[[], int],
    converted: set[tuple[torch.dtype, torch.dtype]],
    slabs: Slabs,
) -> dict[str, Tensor]:
    """The state of ``p`` as it is kept here, in memory of its own; a slot that was not saved is at its initial value. Into
    ``converted`` goes which dtype was turned into which code, or which code into which dtype."""
    device = step_device(p)
    entry = {"step": new_step(saved["step"], device, slabs)}
    word = number(saved["seed"], torch.int64, device) if "seed" in saved else None
    # torch.distributed.checkpoint has state made at step 0, before it loads the groups that a seed is made of.
    if layout.random and (word is None or saved["step"] == 0):
        word = number(fresh_seed(), torch.int64, device)
    parts = {name: local(placed_like(p, saved[name].detach())) for name in layout.names if name in saved}
    stored = codes.stored_as(layout, parts, word)
    for name, value in initial(algorithm, layout).items():
        dtype = layout.dtype_of(name)
        if name in stored:
            entry[name] = own_copy(p, stored[name], dtype, slabs)
            if stored[name] is not parts[name]:
                converted.add((parts[name].dtype, dtype))
        else:
            entry[name] = new_slot(p, value, dtype, slabs)
    if word is not None and layout.random:
        entry["seed"] = new_seed(word, device, slabs)
    return entry


def _option_stays(present: Any, loaded: Any, writes: list[tuple[Tensor, Tensor]]) -> Any:
    """``present``, noted in ``writes``, where it is a tensor; else the loaded value."""
    if not isinstance(present, Tensor) or loaded is None:
        return loaded
    fresh = torch.full_like(present, float(loaded))
    if any(kept is present and not torch.equal(value, fresh) for kept, value in writes):
        return fresh  # another group has the very tensor, and another value
    return _stays(present, fresh, writes)


def _stays(present: Any, fresh: Tensor, writes: list[tuple[Tensor, Tensor]]) -> Tensor:
    """``present``, noted in ``writes``, where it can hold ``fresh``; else ``fresh``."""
    if not isinstance(present, Tensor) or is_sharded(present) != is_sharded(fresh):
        return fresh
    kept, value = local(present), local(fresh)
    if any(getattr(kept, a) != getattr(value, a) for a in ("shape", "dtype", "device")):
        return fresh
    writes.append((kept, value))
    return present
