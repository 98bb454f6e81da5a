"""Parameters of which a process holds a part: DTensors, of FSDP2 and of tensor parallelism.

A kernel updates the part that is here, and needs no other. State is a DTensor wherever the parameter is. torch.distributed
is not imported for it: where there is a DTensor, somebody has.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def dtensor_type() -> Any:
    """torch.distributed.tensor.DTensor, or None where nobody has imported it."""
    module = sys.modules.get("torch.distributed.tensor")
    return getattr(module, "DTensor", None)


def is_sharded(t: Any) -> bool:
    kind = dtensor_type()
    return kind is not None and isinstance(t, kind)


def local(t: Tensor) -> Tensor:
    """The part of ``t`` that is in this process, without a copy or a DTensor operation; of a plain tensor itself."""
    if not is_sharded(t):
        return t
    part: Tensor = t._local_tensor  # type: ignore[attr-defined]
    return part.wait() if hasattr(part, "wait") else part  # a collective that is still under way


def like(p: Tensor, part: Tensor) -> Tensor:
    """``part``, shaped like the local part of ``p``, as what ``p`` is: a DTensor of the same mesh and placements."""
    if not is_sharded(p):
        return part
    sharded: Tensor = dtensor_type().from_local(
        part,
        p.device_mesh,
        p.placements,
        run_check=False,
        shape=p.shape,
        stride=p.stride(),  # type: ignore[attr-defined]
    )
    return sharded


def placed_like(p: Tensor, t: Tensor) -> Tensor:
    """``t``, of the shape of ``p``, as ``p`` is placed: a DTensor of other placements is redistributed, a whole tensor cut to
    the part that is here. What has the shape of that part already is taken for it."""
    if not is_sharded(p):
        return t.full_tensor() if is_sharded(t) else t  # type: ignore[attr-defined, no-any-return]
    if is_sharded(t):
        same = t.placements == p.placements and t.device_mesh == p.device_mesh  # type: ignore[attr-defined]
        return t if same else t.redistribute(p.device_mesh, p.placements)  # type: ignore[attr-defined, no-any-return]
    if t.shape == p.shape and t.shape != local(p).shape:
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(t.to(p.device), p.device_mesh, p.placements, src_data_rank=None)  # type: ignore[attr-defined]
    return like(p, t)


def groups_of(p: Tensor) -> tuple[Any, ...]:
    """The process groups whose members hold different parts of ``p``; none for what every process has whole."""
    if not is_sharded(p):
        return ()
    mesh = p.device_mesh  # type: ignore[attr-defined]
    return tuple(mesh.get_group(d) for d, at in enumerate(p.placements) if not at.is_replicate())  # type: ignore[attr-defined]


def summed(total: Tensor, groups: Iterable[Any]) -> Tensor:
    """``total`` summed over the processes of these groups, one after the other."""
    for group in groups:
        torch.distributed.all_reduce(total, group=group)
    return total
