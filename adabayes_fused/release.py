"""Gradient release: each parameter is updated during ``backward()``, as soon as its gradient is there, and the gradient freed.

One parameter's update is a step on that parameter alone: the same checks, kernels and bits.
"""

from __future__ import annotations

import sys
import threading
import weakref
from types import TracebackType

import torch
from torch import Tensor

from .clipping import Clipping
from .optimizer import _FusedOptimizer
from .posterior import check_optimizer
from .prepare import Item
from .sharding import is_sharded, local


def release_gradients(model: torch.nn.Module, optimizer: _FusedOptimizer) -> ReleasedGradients:
    """From now on ``backward()`` updates each parameter as soon as its gradient is there, and frees the gradient.

    The memory holds one or two gradients at a time instead of all. Weights and state get the bits of ``step()``.

    ``step()`` updates what still has a gradient: parameters outside of ``model``, frozen ones that now train, gradients
    set by hand. A loop may leave it out; then each ``backward()`` is a step. Options are read during ``backward()``: tell a
    new ``lr`` or ``set_batch_size`` before it. Parameters of ``model`` that are not the optimizer's keep their gradients.
    FSDP2 (``fully_shard``) works, with gradients as it has reduced them.

    Args:
        model: whose parameters are to be updated so; what of it is frozen now is left to ``step()``.
        optimizer: an ``AdaBayes`` or ``AdaBayesFP``. Checkpoints and copies, of the model too, know nothing of this.

    Returns:
        A handle. Its ``remove()``, or leaving it as a context, restores the ordinary behaviour. You need not keep it: it lasts
            as long as the optimizer.

    Raises:
        TypeError: the model or the optimizer is something else.
        ValueError: they have no parameter in common, or an option or wrapper needs all gradients at once: ``max_grad_norm``,
            ``skip_nonfinite``, DistributedDataParallel, FSDP1.
        RuntimeError: the optimizer's gradients are released already.

    Examples:
        >>> import torch, adabayes_fused
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = adabayes_fused.AdaBayes(model.parameters(), batch_size=8)
        >>> with adabayes_fused.release_gradients(model, optimizer):
        ...     model(torch.ones(8, 4)).square().mean().backward()  # updates
        ...     optimizer.step()  # for hooks and schedulers
        >>> model.weight.grad is None
        True

    What ``backward()`` cannot know makes the next ``step()`` raise a RuntimeError, after the harm: a torch.amp.GradScaler, whose
    scale the gradients carried; gradient accumulation, if ``step()`` is called (micro-batches were steps); a gradient that came
    back after its update (DistributedDataParallel around ``model``). A graph that still needs a weight once it has moved
    (``retain_graph=True``, ``weight.detach()`` in the loss) makes ``backward()`` raise autograd's own error.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"given a {type(model).__name__} for the model (allowed: a torch.nn.Module; several go in a ModuleList)")
    check_optimizer(optimizer)
    if optimizer._before_updates is not None:
        raise RuntimeError(
            "this optimizer's gradients are released already (allowed: one handle at a time). Call remove() on the first; for "
            "several models, give a torch.nn.ModuleList of them"
        )
    _check_options(optimizer)
    _check_wrappers(model)
    return ReleasedGradients(model, optimizer)


class ReleasedGradients:
    """Gradients that are released, until ``remove()``. Also a context manager."""

    def __init__(self, model: torch.nn.Module, optimizer: _FusedOptimizer) -> None:
        self._optimizer = optimizer
        self._lock = threading.Lock()  # autograd has a thread for each device
        self._updated: set[int] = set()  # places of what has been updated since the last call of step()
        self._twice: Item | None = None
        self._find_places()
        params = [p for p in model.parameters() if p in self._places]
        if not params:
            raise ValueError(
                f"given a model none of whose {sum(1 for _ in model.parameters())} parameters is of this "
                f"{type(optimizer).__name__} (allowed: the model whose parameters the optimizer was given)"
            )
        # A parameter's hooks are out of the garbage collector's sight: they must not own what owns the parameter. Once that is
        # gone they do nothing.
        alive = weakref.ref(self)

        def hook(p: Tensor) -> None:
            released = alive()
            if released is not None:
                released._update(p)

        self._hooks = [p.register_post_accumulate_grad_hook(hook) for p in params if p.requires_grad]  # type: ignore[no-untyped-call]
        optimizer._call_before_updates(self._check_step)

    def remove(self) -> None:
        """Ordinary behaviour from now on; may be called again."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self._optimizer._before_updates == self._check_step:
            self._optimizer._call_before_updates(None)

    def __enter__(self) -> ReleasedGradients:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.remove()

    def _find_places(self) -> None:
        groups = enumerate(self._optimizer.param_groups)
        self._places = {p: (g, i) for g, group in groups for i, p in enumerate(group["params"])}

    def _place(self, p: Tensor) -> tuple[int, int] | None:
        """The group of ``p`` and its position there; None where it is no longer the optimizer's."""
        place = self._places.get(p)
        groups = self._optimizer.param_groups
        if place is not None and place[0] < len(groups):
            params = groups[place[0]]["params"]
            if place[1] < len(params) and params[place[1]] is p:
                return place
        self._find_places()
        return self._places.get(p)

    def _update(self, p: Tensor) -> None:
        with self._lock, torch.no_grad():
            optimizer, place = self._optimizer, self._place(p)
            grad = p.grad
            if grad is None or place is None:
                return
            _check_options(optimizer)
            _check_scaling(optimizer)
            item = Item(*place, p, grad, optimizer._kept_state.get(p, {}))
            optimizer._step([item])
            p.grad = None
            # Behind autograd's back the weights would be wrong, silently, for a part of the graph that still needs them.
            torch.autograd.graph.increment_version((p, local(p)) if is_sharded(p) else p)
            if id(p) in self._updated:
                self._twice = item._replace(grad=p, state={})
            self._updated.add(id(p))

    def _check_step(self) -> None:
        """Before ``step()`` looks for gradients: whether what happened since the last one was a step."""
        updated, self._updated = self._updated, set()
        twice, self._twice = self._twice, None
        _check_options(self._optimizer)
        _check_scaling(self._optimizer)
        if twice is not None:
            raise RuntimeError(
                f"{twice} was updated more than once since the last step(): with released gradients each backward() updates "
                "(allowed: one backward() a step). To accumulate gradients, remove() the handle; if each backward() is meant "
                "to be a step, leave out the calls of step()"
            )
        for p, (g, i) in self._places.items():
            if id(p) in updated and p.grad is not None:
                raise RuntimeError(
                    f"{Item(g, i, p, p.grad, {})} has a gradient again after its update (allowed: one gradient a step). "
                    "DistributedDataParallel does so, which reduces gradients after they were released, so that its processes "
                    "have drifted apart: use FSDP2's fully_shard, or remove() the handle"
                )


def _check_options(optimizer: _FusedOptimizer) -> None:
    if Clipping(optimizer.max_grad_norm, optimizer.skip_nonfinite).reads_gradients_first:
        name = "skip_nonfinite" if optimizer.max_grad_norm is None else "max_grad_norm"
        allowed = "False" if name == "skip_nonfinite" else "None"
        raise ValueError(
            f"given {name}={getattr(optimizer, name)!r}, which needs all gradients before the first update (allowed with "
            f"released gradients: {allowed}). Set optimizer.{name} = {allowed}, or do not release gradients"
        )


def _check_scaling(optimizer: _FusedOptimizer) -> None:
    if getattr(optimizer, "grad_scale", None) is not None or getattr(optimizer, "found_inf", None) is not None:
        raise RuntimeError(
            "a torch.amp.GradScaler gives its scale to step(), but released gradients are used up during backward(), with the "
            "scale in them (allowed with released gradients: no GradScaler, or one with enabled=False). Train in bfloat16, "
            "which needs no scale, or remove() the handle"
        )


def _check_wrappers(model: torch.nn.Module) -> None:
    kinds = [torch.nn.parallel.DistributedDataParallel]
    if fsdp := getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", None):
        kinds.append(fsdp)
    for name, module in model.named_modules():
        if isinstance(module, tuple(kinds)):
            raise ValueError(
                f"given a model with a {type(module).__name__} ({name or 'itself'}), which reduces gradients over processes only "
                "after they would have been released (allowed: modules of one process, or FSDP2's fully_shard). Use fully_shard, "
                "or do not release gradients"
            )
