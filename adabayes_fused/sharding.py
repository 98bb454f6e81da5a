"""Parameters of which a process holds a part: DTensors, of FSDP2 and of tensor parallelism.

A kernel updates the part that is here, and needs no other. State is a DTensor wherever the parameter is. torch.distributed
is not imported for it: where there is a DTensor, somebody has.
"""

from __future__ import annotations

import math
import sys
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


def whole(t: Tensor) -> Tensor:
    """``t`` with the parts of all processes, which all must ask; of a plain tensor itself."""
    return t.full_tensor() if is_sharded(t) else t  # type: ignore[attr-defined, no-any-return, unused-ignore]


def like(p: Tensor, part: Tensor) -> Tensor:
    """``part``, shaped like the local part of ``p``, as what ``p`` is: a DTensor of the same mesh and placements. It stays on its
    device: FSDP2's CPU offloading keeps parts on the CPU while the mesh is of GPUs, where ``DTensor.from_local`` moves them."""
    if not is_sharded(p):
        return part
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    spec = spec_of(p)
    meta = TensorMeta(p.shape, p.stride(), part.dtype)
    sharded: Tensor = dtensor_type()(part, DTensorSpec(spec.mesh, spec.placements, tensor_meta=meta), requires_grad=False)
    return sharded


def placed_like(p: Tensor, t: Tensor) -> Tensor:
    """``t``, of the shape of ``p``, as ``p`` is placed: a DTensor of other placements is redistributed, a whole tensor cut to
    the part that is here. What has the shape of that part already is taken for it."""
    here, wanted = spec_of(t), spec_of(p)
    if wanted is None:
        return whole(t)
    if here is not None:
        same = here.placements == wanted.placements and here.mesh == wanted.mesh
        return t if same else t.redistribute(wanted.mesh, wanted.placements)  # type: ignore[attr-defined]
    if t.shape == p.shape and t.shape != local(p).shape:
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(t.to(p.device), wanted.mesh, wanted.placements, src_data_rank=None)
    return like(p, t)


def spec_of(p: Tensor) -> Any:
    """Of a DTensor its mesh and placements; None of a plain tensor."""
    return p._spec if is_sharded(p) else None  # type: ignore[attr-defined]


def place_of(spec: Any) -> tuple[int, int, int]:
    """Where the part that is here lies in the whole tensor: its i-th element at ``first + i // run * stride + i % run``.

    Raises: ValueError for a part that does not lie so, in runs of one length at one distance.
    """
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    whole = tuple(spec.tensor_meta.shape)
    part, offset = compute_local_shape_and_global_offset(whole, spec.mesh, spec.placements)
    strides = [math.prod(whole[d + 1 :]) for d in range(len(whole))]
    split = [d for d in range(len(whole)) if part[d] != whole[d]]
    if not split or not math.prod(part):
        return 0, max(math.prod(part), 1), 0
    last = split[-1]
    before = [d for d in range(last) if part[d] > 1]  # dimensions along which its runs lie
    stride = strides[before[-1]] if before else 0
    if any(strides[d] != math.prod(part[d + 1 : last]) * stride for d in before) or _leaves_gaps(spec):
        raise ValueError(
            f"a DTensor of shape {whole} with placements {spec.placements} is split into parts that are no evenly spaced runs "
            "of the whole, which state or weights that are rounded stochastically need; "
            'use state_dtype="float32" and weight_rounding="nearest"'
        )
    run = part[last] * strides[last]
    first = sum(o * s for o, s in zip(offset, strides, strict=True))
    return first, run, stride


def _leaves_gaps(spec: Any) -> bool:
    """Whether a dimension is split by every n-th piece (``_StridedShard``), and not for n later splits of it that take these
    pieces apart, as those of FSDP beside tensor parallelism do."""
    later: dict[int | None, int] = {}  # into how many pieces the splits after this one take a dimension
    for at, size in reversed(list(zip(spec.placements, spec.mesh.shape, strict=True))):
        dim = getattr(at, "dim", None)
        if getattr(at, "split_factor", 1) not in (1, later.get(dim, 1)):
            return True
        later[dim] = later.get(dim, 1) * size
    return False


def groups_of(spec: Any) -> tuple[Any, ...]:
    """The process groups whose members hold different parts of what has this spec; none for what each process has whole."""
    if spec is None:
        return ()
    return tuple(spec.mesh.get_group(d) for d, at in enumerate(spec.placements) if not at.is_replicate())


def summed(totals: dict[tuple[Any, ...], Tensor]) -> list[Tensor]:
    """Each of these totals summed over the processes of its groups; in one order in all processes, which else would wait for
    each other, or add in different orders."""
    names = {groups: [group.group_name for group in groups] for groups in totals}
    for groups in sorted(totals, key=names.__getitem__):
        for group in groups:
            torch.distributed.all_reduce(totals[groups], group=group)
    return [totals[groups] for groups in sorted(totals, key=names.__getitem__)]
