"""The fused optimizers: torch.optim.Optimizer around the kernels.

The two classes are at the end; what they share is above them, a step's work in ``stepper.py``.
"""

from __future__ import annotations

import functools
import weakref
from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from . import backends, checkpoint, warm_start
from .algorithms import (
    ADABAYES,
    ADABAYES_FP,
    Algorithm,
    check_batch_size,
    check_group,
    check_step,
    complete_group,
    meant,
    python_number,
    take_up_edits,
)
from .clipping import Clipping, Scaling
from .codes import check_seed, checked_storage
from .prepare import Item
from .stepper import Groups, Stepper, capturing
from .warn import warn

# Options of the whole optimizer, and what they are in those pickled before there was the option. They are found in ``defaults``,
# from which frameworks build an optimizer anew, and in no group: a checkpoint must not change them.
_RUN_POLICY: dict[str, Any] = {
    "backend": "auto",
    "lean": False,
    "fused_unscale": True,
    "max_grad_norm": None,
    "skip_nonfinite": False,
    "state_dtype": "float32",
    "weight_rounding": "nearest",
    "seed": 0,
}


class _AlsoInDefaults:
    """An attribute that ``defaults`` holds too. It has no ``__get__``, so that reading it costs nothing more."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __set__(self, optimizer: Optimizer, value: Any) -> None:
        vars(optimizer)[self.name] = optimizer.defaults[self.name] = value


_all: weakref.WeakSet[_FusedOptimizer] = weakref.WeakSet()
Init = TypeVar("Init", bound=Callable[..., None])


def _found_in_groups(init: Init) -> Init:
    """Lets ``batch_size`` be left out where every group has its own: Horovod builds an optimizer from another's groups alone."""

    @functools.wraps(init)
    def wrapper(self: Any, params: Any, *args: Any, **options: Any) -> None:
        if "batch_size" not in options and not isinstance(params, Tensor):
            params = list(params)
            sizes = [group.get("batch_size") if isinstance(group, dict) else None for group in params]
            if sizes and all(size is not None for size in sizes):  # a tensor compares with None in its own way
                options["batch_size"] = sizes[0]
        init(self, params, *args, **options)

    return cast(Init, wrapper)


class _FusedOptimizer(Optimizer):
    algorithm: Algorithm

    _stepper: Stepper
    _kept_state: defaultdict[Tensor, Any]  # what ``state`` is; under a name of its own, so that nobody reads it past ``state``
    _before_updates: Callable[[], None] | None  # what is called before each
    # By the id of a group: the group, and the sgd_lr that its r stands for. In the group itself it would be one more key that
    # torch.distributed.checkpoint expects in every checkpoint.
    _known_sgd_lrs: dict[int, tuple[dict[str, Any], Any]]
    if TYPE_CHECKING:
        backend: str
        lean: bool
        fused_unscale: bool
        max_grad_norm: float | None
        skip_nonfinite: bool
        state_dtype: str
        weight_rounding: str
        seed: int
    else:
        backend, lean, fused_unscale, max_grad_norm, skip_nonfinite, state_dtype, weight_rounding, seed = (
            _AlsoInDefaults() for _ in _RUN_POLICY
        )

    def __init__(self, params: ParamsT, options: dict[str, Any], policy: dict[str, Any]) -> None:
        backends.check_name(policy["backend"])
        if not isinstance(policy["fused_unscale"], bool):
            raise TypeError(f"Invalid fused_unscale value: {policy['fused_unscale']!r} (allowed: True or False)")
        checked_storage(policy["lean"], policy["state_dtype"], policy["weight_rounding"])
        check_seed(policy["seed"])
        Clipping(policy["max_grad_norm"], policy["skip_nonfinite"]).check()
        check_group(self.algorithm, options)  # before the parameters are looked at, as torch does
        self._forget_run()
        self._known_sgd_lrs = {}
        self.defaults = {**options, **policy}
        vars(self).update(policy)
        if not isinstance(params, Tensor):  # which torch refuses
            params = list(params)  # type: ignore[assignment]
            groups = [group for group in params if isinstance(group, dict)]
            for group in groups:  # all of them before the first is changed
                self._completed(group)
            self._warn_of_lost_policy(groups)
        super().__init__(params, self.defaults)

    # --- Groups and options -------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group as torch.optim does, and fixes its ``r = sgd_lr / lr``; lr alone is scheduled afterwards."""
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, but got {type(param_group)}")
        group = self._completed(param_group)
        for key in map(str, param_group.keys() - self.defaults.keys()):
            if option := meant(key, self.defaults):
                warn(f"a parameter group has the key {key!r}, which no step reads; did you mean {option!r}?")
        super().add_param_group(group)  # a copy: if torch refuses it, the group that was given is as it was
        self.param_groups.pop()
        once = dict(zip(group["params"], group.get("param_names", group["params"]), strict=True))  # torch has warned of doubles
        group["params"] = list(once)
        if "param_names" in group:
            group["param_names"] = list(once.values())
        param_group.update(group)
        for name in _RUN_POLICY:
            param_group.pop(name, None)
        self.param_groups.append(param_group)  # the very dict, as in torch: its owner may go on editing it
        self._take_up_edits([param_group])

    def _completed(self, param_group: dict[str, Any]) -> dict[str, Any]:
        """A copy of the group with all its options, checked."""
        for key in param_group.keys() & _RUN_POLICY.keys():
            if param_group[key] != getattr(self, key):  # ZeroRedundancyOptimizer repeats them
                raise ValueError(
                    f"{key} is an option of the whole optimizer, not of a parameter group; give it to the constructor"
                )
        group = {**{name: self.defaults[name] for name in self.defaults.keys() - _RUN_POLICY.keys()}, **param_group}
        if isinstance(group["lr"], Tensor):
            group["lr"] = group["lr"].detach().clone()  # each group's own: schedulers write it in place
        complete_group(self.algorithm, group)
        return group

    def _sgd_lr_of_r(self, group: dict[str, Any]) -> Any:
        """The ``sgd_lr`` that the group's ``r`` stands for; None where that is the present one."""
        return self._known_sgd_lrs.get(id(group), (None, None))[1]

    def _take_up_edits(self, groups: list[dict[str, Any]]) -> None:
        for group in groups:
            known = self._sgd_lr_of_r(group)
            if known is None or group["sgd_lr"] is not known:
                self._known_sgd_lrs[id(group)] = group, take_up_edits(self.algorithm, group, known)
        if len(self._known_sgd_lrs) > len(self.param_groups):  # a group was taken away, and must not be kept alive
            there = set(map(id, self.param_groups))
            self._known_sgd_lrs = {key: value for key, value in self._known_sgd_lrs.items() if key in there}

    def _warn_of_lost_policy(self, groups: list[dict[str, Any]]) -> None:
        """Horovod builds an optimizer anew from another's groups alone, which do not hold the options of the whole optimizer."""
        given = set(map(id, groups))
        for other in list(_all):
            if other is not self and given & set(map(id, getattr(other, "param_groups", ()))):
                lost = {name: getattr(other, name) for name, usual in _RUN_POLICY.items() if getattr(self, name) == usual}
                lost = {name: value for name, value in lost.items() if value != _RUN_POLICY[name]}
                if lost:
                    options = ", ".join(f"{name}={value!r}" for name, value in lost.items())
                    warn(
                        f"these groups are of an optimizer with {options}. Groups do not hold that, the new one is without; "
                        "give the constructor **optimizer.defaults, or set the attributes of the new one"
                    )

    def set_batch_size(self, n: float | Tensor) -> None:
        """Tells every group how many terms the mean loss of the next steps averages over.

        Call it where a batch is smaller than the others, before its step. Under ``variance_follows_lr=False`` the unit of the
        variances stays the first one.

        Args:
            n: a number >= 1, or a one-element tensor, which is read once. A group whose ``batch_size`` is a tensor has it
                written in place, so that a captured step sees it.

        Raises:
            ValueError: ``n`` is out of its range, or kappa would be above 1. Nothing has changed then.
            TypeError: ``n`` is no number. Nothing has changed then.

        Examples:
            >>> import torch, adabayes_fused
            >>> optimizer = adabayes_fused.AdaBayes([torch.nn.Parameter(torch.ones(3))], batch_size=64)
            >>> optimizer.set_batch_size(17)
            >>> optimizer.param_groups[0]["batch_size"]
            17
        """
        n = n.item() if isinstance(n, Tensor) and n.numel() == 1 else python_number(n)
        check_batch_size(n)
        for group in self.param_groups:
            check_step(self.algorithm, {**group, "batch_size": n}, self._sgd_lr_of_r(group))
            kept = group["batch_size"]
            if isinstance(kept, Tensor) and not kept.is_floating_point() and n != int(n):
                raise ValueError(
                    f"Invalid batch_size: {n} (allowed in a group that keeps it in a tensor of {kept.dtype}: integers)"
                )
        self.defaults["batch_size"] = n  # of groups to come
        for group in self.param_groups:
            if isinstance(group["batch_size"], Tensor):
                group["batch_size"].detach().fill_(n)
            else:
                group["batch_size"] = n

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Tells torch.amp.GradScaler that ``step`` unscales gradients and skips overflows itself."""
        return self.fused_unscale

    def __getstate__(self) -> dict[str, Any]:
        known = [self._sgd_lr_of_r(group) for group in self.param_groups]
        return {**super().__getstate__(), **{name: getattr(self, name) for name in _RUN_POLICY}, "_known_sgd_lrs": known}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "_stepper" not in self.__dict__:  # unpickled, not loaded into
            self._forget_run()
        self._stepper.forget_state()
        known = state.get("_known_sgd_lrs") or [None] * len(state["param_groups"])
        super().__setstate__(state)
        self.state = vars(self).pop("state")  # torch writes past the property
        self._known_sgd_lrs = {id(group): (group, sgd_lr) for group, sgd_lr in zip(self.param_groups, known, strict=True)}
        self.defaults.pop("differentiable", None)  # torch puts it there; the constructors have no such option
        self.defaults.update({name: vars(self).setdefault(name, before) for name, before in _RUN_POLICY.items()})
        for group in self.param_groups:
            for name, value in self.defaults.items():
                if name not in _RUN_POLICY:
                    group.setdefault(name, value)
            complete_group(self.algorithm, group)
            if self._sgd_lr_of_r(group) is None:
                self._take_up_edits([group])

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """Each parameter's state: ``step`` and the slots. Whoever asks may change it: the next step looks at all of it."""
        self._stepper.forget_state()
        return self._kept_state

    @state.setter
    def state(self, state: defaultdict[Tensor, Any]) -> None:
        self._stepper.forget_state()
        self._kept_state = state

    # --- The step -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every parameter that has a gradient, and raises its step count by one. The others stay as they are.

        Args:
            closure: re-evaluates the model and returns the loss, if given.

        Returns:
            The closure's loss, or None.

        Raises:
            ValueError: an option is out of its range. Nothing has changed then, as with the other errors.
            TypeError: an option, a parameter or a gradient is of a wrong type.
            RuntimeError: a parameter or its state cannot be updated, or a named backend cannot run.

        Examples:
            >>> import torch, adabayes_fused
            >>> weight = torch.nn.Parameter(torch.ones(3))
            >>> optimizer = adabayes_fused.AdaBayesFP([weight])
            >>> weight.square().sum().backward()
            >>> optimizer.step()
            >>> bool((weight < 1).all())
            True
        """
        compiling = torch.compiler.is_compiling()
        if not compiling and self._may_be_captured():
            self._accelerator_graph_capture_health_check()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if compiling:
            from . import operators

            operators.trace(self)
        else:
            self._step()
        return loss

    def _may_be_captured(self) -> bool:
        """Whether torch's check for a graph under capture, a tenth of a step on one tensor, has anything to say."""
        on_xpu: bool = torch.xpu.is_initialized()  # type: ignore[no-untyped-call]
        return on_xpu or capturing() or any(group["capturable"] for group in self.param_groups)

    def _step(self, items: list[Item] | None = None) -> None:
        """A step on every parameter with a gradient, or on these."""
        if items is None and self._before_updates is not None:
            self._before_updates()
        groups = self.param_groups if items is None else [self.param_groups[g] for g in {item.group for item in items}]
        numbers = self._stepper.numbers
        changed = [group for group in groups if group not in numbers]
        for group in changed:
            check_step(self.algorithm, group, self._sgd_lr_of_r(group))
        self._take_up_edits(changed)
        for group in changed:
            numbers.note(group, len(self.param_groups))
        given = self._given()
        given.clipping.check()
        grad_scale = getattr(self, "grad_scale", None)
        scaling = Scaling(1.0 if grad_scale is None else grad_scale, getattr(self, "found_inf", None))
        self._stepper.step(given, items, scaling)

    def _given(self) -> Groups:
        """What a step is given."""
        clipping = Clipping(self.max_grad_norm, self.skip_nonfinite)
        storage = checked_storage(self.lean, self.state_dtype, self.weight_rounding)
        return Groups(self.param_groups, self._kept_state, self.backend, storage, self.seed, clipping)

    def _call_before_updates(self, check: Callable[[], None] | None) -> None:
        """Has each :meth:`step` call ``check`` once its closure has run; None: nothing."""
        self._before_updates = check

    @property
    def skipped_steps(self) -> Tensor:
        """How many steps this object has skipped: a 0-dim int64 tensor on the device that decides. Reading it does not wait
        for a GPU; ``int(...)`` does."""
        return self._stepper.skipped.clone()

    @property
    def grad_norm(self) -> Tensor | None:
        """The 2-norm of the last step's gradients, unscaled and before clipping: a 0-dim float64 tensor on their device. It
        is None without ``max_grad_norm`` and ``skip_nonfinite``."""
        return self._stepper.grad_norm

    def _forget_run(self) -> None:
        """What is found anew in each process."""
        self._stepper = Stepper(self.algorithm)
        self._before_updates = None
        _all.add(self)

    # --- Saving and loading -------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim's, with the options as numbers that ``torch.load(weights_only=True)`` takes."""
        hook = self.register_state_dict_post_hook(checkpoint.tidy_groups, prepend=True)
        try:
            return super().state_dict()
        finally:
            hook.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what ``state_dict()`` gave, bit for bit. State keeps its own dtype, whatever the parameters' is.

        ``capturable`` and the options of the whole optimizer stay as they are here, and so does an option that the saved groups
        lack. Lean state loads into a full optimizer and the other way round; AdaBayes' ``exp_avg_sq`` then starts at zero, with
        a warning. An option that is a tensor here stays that tensor and takes the loaded value. So do the state tensors of
        groups with ``capturable``.

        Args:
            state_dict: of the same class, over parameters of the same shapes.

        Raises:
            ValueError: the state is another optimizer's or of other shapes. Nothing has changed then.
        """
        self._load(state_dict, told=False)

    def _load(self, state_dict: dict[str, Any], told: bool) -> None:
        """``told``: whether the user knows that the state was stored otherwise."""
        before, known = (self.state, self.param_groups), self._known_sgd_lrs

        def restore(optimizer: Any) -> None:
            nonlocal before
            self._stepper.use_slabs(checkpoint.restore(optimizer, *before, told))
            before = optimizer.state, optimizer.param_groups  # a hook of the user's that fails after this undoes nothing

        hooks = [
            self.register_load_state_dict_pre_hook(checkpoint.hide_state),
            self.register_load_state_dict_post_hook(restore, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        except BaseException:
            self.state, self.param_groups = before
            self._known_sgd_lrs = {**known, **self._known_sgd_lrs}
            raise
        finally:
            for hook in hooks:
                hook.remove()

    def load_adam_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from where torch's Adam or AdamW stopped: it takes over the averages and step counts.

        The options stay as they are here. AdaBayesFP goes on as if it had been trained so far, with ``sgd_lr=inf`` exactly as
        AdamW. AdaBayes starts each variance at the fixed point that the averaged squared gradient implies (Eq. 20).
        ``max_exp_avg_sq`` (amsgrad) is left out, with a warning.

        Args:
            state_dict: of an Adam or AdamW over the same parameters, in groups of the same lengths, with the same ``betas``.

        Raises:
            ValueError: the state is another optimizer's or of other shapes. Nothing has changed then.

        Examples:
            >>> import torch, adabayes_fused
            >>> weight = torch.nn.Parameter(torch.ones(3))
            >>> adamw = torch.optim.AdamW([weight])
            >>> weight.square().sum().backward()
            >>> adamw.step()
            >>> optimizer = adabayes_fused.AdaBayesFP([weight], sgd_lr=10)
            >>> optimizer.load_adam_state_dict(adamw.state_dict())
            >>> int(optimizer.state[weight]["step"])
            1
        """
        self._load(warm_start.from_adam(self.algorithm, self.param_groups, state_dict), told=True)


class AdaBayes(_FusedOptimizer):
    """AdaBayes, Algorithm 1 of the paper. Each weight's step size is its posterior variance under a Kalman filter.

    Let g be the gradient of the mean loss, r = sgd_lr / lr, kappa = lr * batch_size / r, and let variances be in units of
    sigma^2 = sgd_lr / batch_size. Step t does to each weight w:

        m         <- beta1 m + (1 - beta1) g
        post_var  <- prior_var / (1 + prior_var * lr * r * batch_size * g^2)
        prior_var <- (1 - kappa / 2)^2 post_var + kappa
        w         <- (1 - lr * weight_decay) w - lr * r * post_var * m / (1 - beta1^t)

    A parameter group may have its own value of every option down to ``capturable``. A step reads them afresh, so you may
    change them between steps.

    State per parameter: ``step`` is a 0-dim float32 tensor. ``exp_avg``, ``prior_var`` and, unless ``lean``, ``exp_avg_sq`` and
    ``post_var`` are shaped like it, float32 (float64 for float64), with variances in units of sigma^2. In fewer bits they are
    uint8 or bfloat16. ``correction`` is int8 or int16. ``seed`` is a 0-dim int64 tensor where anything is random.

    Args:
        params: parameters, or groups of them: float32, float64, float16, bfloat16 or complex, on any device.
        lr: Adam's learning rate, the paper's eta. It is a float, or a one-element tensor, of which each group keeps a copy
            (write ``group["lr"]``). At 0 weights stand still.
        batch_size: how many terms the mean loss of one step averages over: examples, or tokens of a language model, times
            micro-batches, times processes. It sets the filter's memory, 1/kappa steps.
        sgd_lr: the learning rate of a weight whose gradients say nothing, as SGD's. It follows the schedule of ``lr``.
        betas: the decay of the averages of the gradient and of its square. AdaBayes keeps the latter for you and does not use it.
        weight_decay: decoupled. A step multiplies weights by ``1 - lr * weight_decay``, as torch's AdamW does.
        transition: ``"paper"`` is the linearised drift of Eq. 16b, for kappa <= 1. ``"exact"`` is the process itself, for any.
        variance_follows_lr: True keeps variances relative to sigma^2, so that a new ``lr`` acts at once, as in Adam. False
            keeps the literal variance, which takes epochs to follow a schedule, as in the paper's own runs.
        maximize: ascend instead of descend.
        capturable: let a CUDA graph capture steps, and keep the state's tensors where they are when a checkpoint is loaded.
        lean: store only what the recursion needs (``exp_avg``, ``prior_var``): the same weights with AdamW's memory.
        backend: ``"auto"`` is the fastest on each parameter's device; else ``"cpp"``, ``"cuda"``, ``"triton"`` or ``"foreach"``.
        fused_unscale: let ``step`` unscale gradients and skip overflows under torch.amp.GradScaler. False leaves both to
            the scaler, for Lightning's clipping and Accelerate's fp16.
        max_grad_norm: ``step`` clips the 2-norm of all gradients to this. ``p.grad`` stays as it is; inf measures only. The
            norm is over all parts of DTensors, and under ZeroRedundancyOptimizer over this process's share alone.
        skip_nonfinite: a step with a gradient that is not finite changes nothing.
        state_dtype: ``"float32"``, ``"bfloat16"``, or ``"8bit"`` with ``lean`` alone. The latter two are rounded stochastically.
        weight_rounding: of bfloat16 parameters: ``"nearest"``, ``"stochastic"``, or ``"24bit"`` and ``"32bit"``, which store what
            a weight lacks in ``correction``, 8 or 16 bits.
        seed: of the random numbers. Each parameter's own is made of it and of its position, and is saved with the state.

    Raises:
        ValueError: an option is out of its range. The message says what was given and what is allowed.
        TypeError: an option is of a wrong type.

    Examples:
        >>> import torch, adabayes_fused
        >>> model = torch.nn.Linear(784, 10)
        >>> optimizer = adabayes_fused.AdaBayes(model.parameters(), lr=1e-3, sgd_lr=1, batch_size=128, lean=True)

    Source: Aitchison, "Bayesian filtering unifies adaptive and non-adaptive neural network optimization methods", NeurIPS 2020.
    """

    algorithm = ADABAYES

    @_found_in_groups
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        *,
        batch_size: float | Tensor,
        sgd_lr: float = 0.1,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        weight_decay: float = 0.05,
        transition: str = "paper",
        variance_follows_lr: bool = True,
        maximize: bool = False,
        lean: bool = False,
        backend: str = "auto",
        capturable: bool = False,
        fused_unscale: bool = True,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        state_dtype: str = "float32",
        weight_rounding: str = "nearest",
        seed: int = 0,
    ) -> None:
        options = dict(
            lr=lr,
            batch_size=batch_size,
            sgd_lr=sgd_lr,
            betas=betas,
            weight_decay=weight_decay,
            transition=transition,
            variance_follows_lr=variance_follows_lr,
            maximize=maximize,
            capturable=capturable,
        )
        policy = dict(
            lean=lean,
            backend=backend,
            fused_unscale=fused_unscale,
            max_grad_norm=max_grad_norm,
            skip_nonfinite=skip_nonfinite,
            state_dtype=state_dtype,
            weight_rounding=weight_rounding,
            seed=seed,
        )
        super().__init__(params, options, policy)


class AdaBayesFP(_FusedOptimizer):
    """AdaBayes-FP, Algorithm 2 of the paper: AdaBayes with each variance at its fixed point; AdamW with another denominator.

    Let m_hat and v_hat be Adam's averages and a = lr / (2 sgd_lr). A step does to each weight w:

        w <- (1 - lr * weight_decay) w - lr * m_hat / (a + sqrt(a^2 + v_hat) + eps)

    ``sgd_lr=inf`` is AdamW. Where gradients tend to 0 it is SGD at ``sgd_lr``, with averaged momentum. The batch size cancels.
    The options that are not listed here are those of ``AdaBayes``.

    Args:
        sgd_lr: as in ``AdaBayes``, or inf.
        eps: AdamW's. It is needed only where ``sgd_lr=inf``.
        batch_size: the update does not use it. Tell it to have variances in the paper's units.
        lean: store only ``exp_avg`` and ``exp_avg_sq``, AdamW's state. Else ``post_var`` is stored too, in units of sigma^2.

    Raises:
        ValueError: an option is out of its range. The message says what was given and what is allowed.
        TypeError: an option is of a wrong type.

    Examples:
        >>> import torch, adabayes_fused
        >>> model = torch.nn.Linear(784, 10)
        >>> optimizer = adabayes_fused.AdaBayesFP(model.parameters(), lr=1e-3, sgd_lr=10, lean=True)

    Source: as ``AdaBayes``, Eq. 20.
    """

    algorithm = ADABAYES_FP

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        *,
        sgd_lr: float = 0.1,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.05,
        batch_size: float | Tensor | None = None,
        maximize: bool = False,
        lean: bool = False,
        backend: str = "auto",
        capturable: bool = False,
        fused_unscale: bool = True,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        state_dtype: str = "float32",
        weight_rounding: str = "nearest",
        seed: int = 0,
    ) -> None:
        options = dict(
            lr=lr,
            sgd_lr=sgd_lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            batch_size=batch_size,
            maximize=maximize,
            capturable=capturable,
        )
        policy = dict(
            lean=lean,
            backend=backend,
            fused_unscale=fused_unscale,
            max_grad_norm=max_grad_norm,
            skip_nonfinite=skip_nonfinite,
            state_dtype=state_dtype,
            weight_rounding=weight_rounding,
            seed=seed,
        )
        super().__init__(params, options, policy)
