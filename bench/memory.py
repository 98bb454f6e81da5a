"""Bytes an optimizer keeps, bytes a step has to move, and what it takes while it runs: ``python -m bench memory``."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from .case import Case, Row
from .contenders import Contender
from .timing import Tell


class Traffic(NamedTuple):
    """Bytes a step cannot do without touching: read, changed in place (counted once here), only written; gradients that had
    to be read for their norm first."""

    read: int
    changed: int
    written: int
    looked_at: int = 0

    @property
    def moved(self) -> int:
        return self.read + 2 * self.changed + self.written + self.looked_at


def traffic(optimizer, params: list[Tensor], clipped: bool = False) -> Traffic:
    """Gradients are read, weights and state are read and written; ``post_var`` is a result that is only written."""
    written = sum(s["post_var"].nbytes for s in optimizer.state.values() if isinstance(s, dict) and "post_var" in s)
    grads, weights = sum(p.grad.nbytes for p in params), sum(p.nbytes for p in params)
    return Traffic(grads, weights + state_bytes(optimizer) - written, written, grads if clipped else 0)


def state_bytes(optimizer) -> int:
    """Of every state tensor but step counts and other single numbers."""
    roots = [list(optimizer.state.values())]
    roots += [[v for key, v in group.items() if key != "params"] for group in optimizer.param_groups]
    return sum({t.data_ptr(): t.nbytes for t in tensors_in(roots, set()) if t.numel() > 1}.values())


def tensors_in(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """The plain tensors in containers, in objects that hold tensors and in tensor subclasses such as torchao's."""
    if id(value) in seen or isinstance(value, type):
        return
    seen.add(id(value))
    if isinstance(value, Tensor) and not hasattr(value, "__tensor_flatten__"):
        yield value
    else:
        for part in _parts(value):
            yield from tensors_in(part, seen)


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, Tensor):
        return [getattr(value, name) for name in value.__tensor_flatten__()[0]]
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, (list, tuple)) else vars(value).values() if hasattr(value, "__dict__") else ()


def peak_extra(step, device: str) -> int:
    """Bytes of tensors that live during a step beyond those before it, at the most."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        step()
    events = [e for e in run.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def figures(optimizer, params: list[Tensor], device: str, clipped: bool = False) -> Row:
    return dict(
        moved_bytes=traffic(optimizer, params, clipped).moved,
        state_bytes=state_bytes(optimizer),
        parameter_bytes=sum(p.nbytes + p.grad.nbytes for p in params),
        peak_extra_bytes=peak_extra(optimizer.step, device),
    )


def measure(name: str, options: Namespace, tell: Tell) -> list[Row]:
    """The rows of a case, one contender after the other."""
    case = Case("memory", name, options)
    case.leave_out_slow_compilations()

    def of(contender: Contender) -> Row:
        params = case.parameters_for(contender)
        optimizer = contender.make(params)
        for _ in range(3):  # state, and what is compiled for later steps
            optimizer.step()
        return figures(optimizer, params, case.device, case.loop.clipped)

    for n, found in case.each(of, tell, "memory of").items():
        case.rows[n] |= found
    return list(case.rows.values())
