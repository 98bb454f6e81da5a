"""Preparing one parameter for a kernel: plain, dense tensors of one layout, whatever PyTorch hands out.

The kernels sweep flat memory. Here everything else is brought to that form: complex parameters as pairs of reals,
gradients of another layout, lazily conjugated or negated ones, parameters that are views with gaps, state that a
checkpoint loader has put in place with another dtype, device or layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from . import codes
from .algorithms import Algorithm
from .codes import Layout, Storage
from .plain import is_plain, ordinary_mode, watched
from .sharding import is_sharded, like, local, place_of, placed_like, spec_of
from .slabs import Slabs
from .table import DTYPES

_OWN_TYPES = (torch.nn.Parameter, Tensor)


class Item(NamedTuple):
    """A parameter that a step has found: where (its group, its position there), its gradient and its state."""

    group: int
    position: int
    param: Tensor
    grad: Tensor
    state: dict[str, Any]

    def __str__(self) -> str:
        return f"parameter {self.position} of group {self.group}, shape {tuple(self.param.shape)},"


class Prepared(NamedTuple):
    """One parameter as the kernels take it. ``copied``: a parameter with gaps, and the dense tensor updated in its place."""

    param: Tensor
    tensors: list[Tensor]  # param, grad, *slots, correction: real, dense, alike in layout
    numbers: tuple[Tensor, ...]  # step, seed
    group: int
    backend: str
    copied: tuple[Tensor, Tensor] | None
    layout: Layout
    place: tuple[int, int, int]  # first, run and stride (csrc/table.h)

    @classmethod
    def of(cls, item: Item, layout: Layout, tensors: list[Tensor], backend: str, copied: Any = None) -> Prepared:
        numbers = tuple(map(item.state.__getitem__, layout.numbers))
        spec = spec_of(item.param) if layout.random else None
        place = (0, max(tensors[0].numel(), 1), 0) if spec is None else place_of(spec)
        return cls(item.param, tensors, numbers, item.group, backend, copied, layout, place)

    @property
    def state(self) -> dict[str, Tensor]:
        return dict(zip((*self.layout.numbers, *self.layout.names), (*self.numbers, *self.tensors[2:]), strict=True))


def check_item(item: Item, algorithm: Algorithm, storage: Storage) -> None:
    """Raises for a parameter, gradient or state no kernel can take, naming it. Changes nothing."""
    p, grad, state, where = item.param, item.grad, item.state, str(item)
    if grad.layout != torch.strided:
        raise RuntimeError(
            f"{where} has a sparse gradient ({grad.layout}), and AdaBayes takes dense ones only. "
            "Build its embedding with sparse=False, or give it to torch.optim.SparseAdam."
        )
    for t in (p, grad):
        if is_traceable_wrapper_subclass(t) and not (is_sharded(t) and is_sharded(p)):
            raise TypeError(
                f"{where} or its gradient is a {type(t).__name__}, a tensor made of others (allowed: plain tensors, and DTensors "
                "with DTensors for gradients)"
            )
    real = p.dtype.to_real() if p.is_complex() else p.dtype
    if real not in DTYPES:
        raise TypeError(f"{where} is of {p.dtype} (allowed: {', '.join(map(str, DTYPES))}, and complex)")
    if (reason := storage.why_not(p.dtype)) is not None:
        raise TypeError(f"{where} is of {p.dtype}: {reason}")
    names = storage.layout(algorithm, p.dtype).names
    if p.is_complex() != grad.is_complex() or not (grad.is_complex() or grad.is_floating_point()):
        raise TypeError(f"{where} is of {p.dtype} and its gradient of {grad.dtype} (allowed: both floating, or both complex)")
    if p.is_inference() and not torch.is_inference_mode_enabled():
        raise RuntimeError(f"{where} was made in inference mode, whose tensors may not be changed outside it; clone it outside")
    if p.numel() and any(stride == 0 and size > 1 for size, stride in zip(p.shape, p.stride(), strict=True)):
        raise RuntimeError(f"{where} is an expanded view, whose elements share memory; optimize the tensor it is a view of")
    for name, t in {"weights": p, "its gradient": grad, **{name: state[name] for name in names if name in state}}.items():
        if _freed(local(t)):
            raise RuntimeError(f"{where} has {name} whose storage was freed; give it memory before the step, or another tensor")
        if t.shape != p.shape and t.shape != local(p).shape:
            raise RuntimeError(
                f"{where} has {name} of shape {tuple(t.shape)}; a resized parameter needs a new gradient and state"
            )
    needed = ("step", *(name for name in names if name != "correction"))  # which begins at zero, as a seed does anew
    if state and (missing := [name for name in needed if name not in state]):
        raise RuntimeError(f"{where} lacks {', '.join(missing)} in its state; delete optimizer.state[p] to begin anew")


def _freed(t: Tensor) -> bool:
    return is_plain(t) and t.numel() > 0 and t.data_ptr() == 0


def wide_dtype(p: Tensor) -> torch.dtype:
    """float32, float64 for float64 parameters, complex where the parameter is."""
    return torch.promote_types(p.dtype, torch.float32)


def empty_slot(p: Tensor, dtype: torch.dtype, slabs: Slabs) -> Tensor:
    """A state tensor for the part of ``p`` that is here, on its device; laid out as that is where it has no gaps."""
    part, slot = local(p).detach(), None
    with ordinary_mode():
        if is_traceable_wrapper_subclass(part):
            return torch.empty(part.shape, dtype=dtype, device=part.device)
        # In one storage, the state of DTensors would break torch.distributed.checkpoint.async_save.
        if is_plain(part) and _dense(part) and not is_sharded(p):
            slot = slabs.empty(part.shape, part.stride(), dtype, part.device)
        if slot is None:
            slot = torch.empty_like(part, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False)
    return slot


def new_slot(p: Tensor, value: float, dtype: torch.dtype, slabs: Slabs) -> Tensor:
    """A state tensor like ``p``, ``value`` everywhere, in the real and the imaginary part alike."""
    slot = empty_slot(p, dtype, slabs)
    as_real(slot).fill_(codes.constant(value, dtype))
    return like(p, slot)


def _new_number(dtype: torch.dtype, device: torch.device, slabs: Slabs) -> Tensor:
    with ordinary_mode():
        number = slabs.empty((), (), dtype, device)
        return torch.empty((), dtype=dtype, device=device) if number is None else number


def new_step(value: Any, device: torch.device, slabs: Slabs) -> Tensor:
    """A step count of its own: a 0-dim float32 tensor."""
    return _new_number(torch.float32, device, slabs).copy_(step_tensor(value, device))


def new_seed(value: int | Tensor, device: torch.device, slabs: Slabs) -> Tensor:
    """A seed of its own (``codes.new_seed``): a 0-dim int64 tensor."""
    seed = _new_number(torch.int64, device, slabs)
    return seed.copy_(value.reshape(())) if isinstance(value, Tensor) else seed.fill_(value)


def step_device(p: Tensor) -> torch.device:
    """Where the step count of ``p`` lies: where the part of it does that is here, so that what updates it reads the count."""
    device = local(p).device
    return device if device.type != "meta" else torch.device("cpu")  # which holds no number


def new_state(algorithm: Algorithm, layout: Layout, p: Tensor, seed: int, slabs: Slabs) -> dict[str, Tensor]:
    """State before the first step."""
    device = step_device(p)
    state = {"step": new_step(0, device, slabs)}
    for name, value in initial(algorithm, layout).items():
        state[name] = new_slot(p, value, layout.dtype_of(name), slabs)
    if layout.random:
        state["seed"] = new_seed(seed, device, slabs)
    return state


def initial(algorithm: Algorithm, layout: Layout) -> dict[str, float]:
    """What the tensors that are shaped like the parameter begin as."""
    values = dict(zip(layout.slots, algorithm.initial, strict=False))
    return values if layout.correction is None else {**values, "correction": 0.0}


def as_real(t: Tensor) -> Tensor:
    return torch.view_as_real(t) if t.is_complex() else t


def _dense(p: Tensor) -> bool:
    """One element after the other in memory, and the memory holds the values themselves."""
    dense = not p.numel() or p.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(p)
    return dense and not p.is_conj() and not p.is_neg()


def _same_layout(a: Tensor, b: Tensor) -> bool:
    """Whether the two have their elements in the same places: strides count where a dimension has a second element."""
    if a.shape != b.shape or not a.numel():
        return a.shape == b.shape
    return all(x == y for size, x, y in zip(a.shape, a.stride(), b.stride(), strict=True) if size != 1)


def laid_out_like(template: Tensor, t: Tensor, dtype: torch.dtype) -> Tensor:
    """``t`` itself if it has ``template``'s layout and device, and ``dtype``; else a copy that has."""
    usable = torch.is_inference_mode_enabled() or not t.is_inference()
    if t.dtype == dtype and t.device == template.device and usable and _same_layout(template, t) and _dense(t):
        return t
    return torch.empty_like(template, dtype=dtype).copy_(t)


def own_copy(p: Tensor, part: Tensor, dtype: torch.dtype, slabs: Slabs) -> Tensor:
    """A part of a saved slot of ``p``, stored as it is kept here, in our layout and device, sharing no memory with ``part``."""
    return like(p, empty_slot(p, dtype, slabs).copy_(part))


def number(value: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A number, however a checkpoint gives it, as a 0-dim tensor on ``device``."""
    if isinstance(value, Tensor) and value.dtype == dtype and value.device == device and value.dim() == 0:
        return value
    known = value.detach() if isinstance(value, Tensor) else torch.as_tensor(value, device="cpu")
    return known.to(device=device, dtype=dtype, non_blocking=device.type != "cpu").reshape(())


def step_tensor(step: Any, device: torch.device) -> Tensor:
    """A step count as a 0-dim float32 tensor on ``device``."""
    return number(step, torch.float32, device)


def ready(item: Item, layouts: Mapping[torch.dtype, Layout]) -> list[Tensor] | None:
    """(param, grad, *slots) of the common case: torch's own tensors, contiguous, alike in shape, each in its dtype, as PyTorch's
    operations take them together. None in any other, which ``check_item`` and ``prepare`` sort out. ``layouts``: by the
    parameter's dtype."""
    p, grad, state = item.param, item.grad, item.state
    layout = layouts.get(p.dtype)
    if layout is None or type(p) not in _OWN_TYPES or grad.dtype not in DTYPES or not state:
        return None
    tensors: list[Any] = [p, grad, *map(state.get, layout.names)]
    numbers: list[Any] = list(map(state.get, layout.numbers))
    if {*map(type, tensors[1:]), *map(type, numbers)} != {Tensor}:
        return None
    shape, device = p.shape, p.device
    for t, dtype in zip(tensors, (p.dtype, grad.dtype, *layout.stored), strict=True):
        if t.dtype != dtype or t.shape != shape or t.device != device or not t.is_contiguous():
            return None
        if t.is_neg() or t.is_inference() or not t.data_ptr():
            return None
    for t, dtype in zip(numbers, (torch.float32, torch.int64), strict=False):  # step, seed
        if t.dtype != dtype or t.device != device or t.dim():
            return None
    return tensors


def prepare(item: Item, algorithm: Algorithm, layout: Layout, seed: int, backend: str, slabs: Slabs) -> Prepared:
    """An item as plain tensors; state of another dtype, device or layout is replaced by its equal in ours, a seed it lacks is
    ``seed``. The gradient is never written. ``backend`` updates it, unless its tensors are none that a kernel may be given the
    address of."""
    state = item.state
    param = local(item.param).detach()
    grad = local(placed_like(item.param, item.grad)).detach().resolve_conj().resolve_neg()
    if grad._is_zerotensor():  # type: ignore[operator, unused-ignore]
        grad = grad.clone()  # has memory
    if not grad.is_complex() and grad.dtype not in DTYPES:
        grad = grad.to(torch.float32)  # float8 and the like
    copied = None
    if not _dense(param):
        copied = param, torch.empty_like(param).copy_(param)
        param = copied[1]
    device = step_device(item.param)
    with ordinary_mode(), torch.no_grad():  # state may be used in every mode
        state["step"] = step_tensor(state["step"], device)
        if layout.random:
            state["seed"] = number(state["seed"], torch.int64, device) if "seed" in state else new_seed(seed, device, slabs)
        if layout.correction is not None and "correction" not in state:
            state["correction"] = new_slot(item.param, 0.0, layout.correction, slabs)
        placed = {name: placed_like(item.param, state[name]) for name in layout.names}
        stored = codes.stored_as(layout, {name: local(t) for name, t in placed.items()}, state.get("seed"))
        for name in layout.names:
            slot = laid_out_like(param, stored[name], layout.dtype_of(name))
            if placed[name] is not state[name] or slot is not local(placed[name]):
                state[name] = like(item.param, slot)
    tensors = [param, laid_out_like(param, grad, grad.dtype), *(local(state[name]) for name in layout.names)]
    tensors = [as_real(t) for t in tensors]
    if backend != "foreach" and (watched() or not all(map(is_plain, tensors))):
        backend = "foreach"
    return Prepared.of(item, layout, tensors, backend, copied)
