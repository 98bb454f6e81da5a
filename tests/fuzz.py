"""A fuzzer over inputs: whatever shapes, layouts, dtypes, values and options a step is given, all backends do the same.

``python tests/fuzz.py --cases 50000 --seed 0 --minutes 60`` ends after so many cases or minutes, or once ``--stop`` cases found
something. hypothesis draws a case, a whole run of one to four steps, and makes one that fails as small as it can. The case is
printed as a call that repeats it. (``walk.py`` is about what happens between steps; a few of its events are drawn here too.)

The subject (``cpp`` with any instruction set, ``triton`` interpreted, ``foreach`` in small blocks) has to have the bits of the
referee (``foreach``); the slow path in float64 judges both. What has to be refused is refused, and then nothing has changed.
Canaries lie around the memory of weights, gradients and state.
"""

import argparse
import ast
import contextlib
import dataclasses
import math
import os
import sys
import time
import traceback
import warnings
from unittest import mock

os.environ.setdefault("TRITON_INTERPRET", "1")

import hypothesis  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from runs import FUSED, SLOW  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from walk import BF16, C64, EVENTS, F16, F32, F64, FILLER, KINDS, Found, Side, Walk, in_child, same, short  # noqa: E402

from adabayes_fused.backends import cpp, foreach, native, triton  # noqa: E402

inf = math.inf
C128, E4M3, E5M2 = torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2
FLOATS, COMPLEX = (F32, BF16, F16, F64), (C64, C128)
MARGIN = 16  # elements on either side that are nobody's

# --- A case -----------------------------------------------------------------------------------------------------------


def drawn(cls):
    """A class whose objects are printed as the call that makes them."""

    def call(self):
        fields = ((f, getattr(self, f.name)) for f in dataclasses.fields(self))
        return f"{cls.__name__}({', '.join(f'{f.name}={value!r}' for f, value in fields if value != f.default)})"

    cls.__repr__ = call
    return dataclasses.dataclass(frozen=True, repr=False)(cls)


@drawn
class Param:
    shape: tuple = (3,)
    dtype: torch.dtype = F32
    layout: str = "contiguous"
    offset: int = 0  # elements
    values: str = "usual"
    kind: int = 0  # of KINDS
    group: int = 0

    @property
    def shares(self):
        """Whether elements share memory."""
        return self.layout == "expanded" and self.shape[:1] > (1,) and 0 not in self.shape


@drawn
class Grad:
    layout: str = "contiguous"
    offset: int = 0
    dtype: torch.dtype | None = None  # None: the parameter's
    values: str = "usual"


@drawn
class Step:
    grads: tuple = ()  # of each parameter; None: it has none
    events: tuple = ()  # before the step
    edit: tuple | None = None  # an option of the last group, and its value
    mode: str = "ordinary"
    guards: bool = False  # whether state lies amid canaries from now on
    scale: float | None = None  # torch.amp.GradScaler's
    overflow: bool = False


@drawn
class Case:
    algorithm: str
    options: dict
    policy: dict
    groups: tuple  # options of each
    params: tuple
    steps: tuple
    subject: tuple = ("cpp", "")  # backend, instruction set
    threads: int = 1
    tensors: bool = False  # lr and batch_size are tensors
    seed: int = 0


LEFT_OUT = "usual"


def often(usual, *others, share=0.3):
    """Mostly the usual one, which a case that fails shrinks to."""
    return st.sampled_from((*(usual,) * max(round(len(others) / share * (1 - share)), 1), *others))


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def set_for_now(get, change, value):
    before = get()
    change(value)
    try:
        yield
    finally:
        change(before)


MODES = {
    "ordinary": contextlib.nullcontext,
    "inference": torch.inference_mode,
    "grad": torch.enable_grad,
    "autocast": lambda: torch.autocast("cpu", BF16),
    "watched": Watching,
    "meta by default": lambda: torch.device("meta"),
    "float64 by default": lambda: set_for_now(torch.get_default_dtype, torch.set_default_dtype, F64),
    "float16 by default": lambda: set_for_now(torch.get_default_dtype, torch.set_default_dtype, F16),
    "deterministic": lambda: set_for_now(torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True),
}
TINY = ((3,), (), (1,), (2,), (1, 1), (4, 3), (1, 5), (5, 1), (2, 3, 2), (2, 3, 4, 5), (3, 1, 2, 1), (17,), (2, 1, 3, 1), (33, 7))
EMPTY = ((0,), (0, 3), (2, 0), (3, 0, 2), (1, 1, 0), (0, 0))
EDGES = tuple((n + k,) for n in (8, 16, 32, 64, 128, 256, 512, 1024) for k in (0, -1, 1))
LARGE = ((16384,), (16383,), (16385,), (32769,), (129, 257), (3, 4, 5, 700), (131073,))
STREAMED = ((1 << 20) + 17,)  # one thread has ranges of 65536 elements
DENSE = ("transposed", "channels_last", "odd", "own", "numpy", "sliced", "rows")
LAZY = ("expanded", "overlapping", "negated", "conjugated", "imaginary", "zero", "inference", "graph")
CALM, WILD = ("usual", "zero", "negative zero"), ("denormal", "huge", "inf", "nan", "mixed")
ISAS = native.module.cpu_isas()[1:] if native.module else ()
TRITON = () if triton.unavailable(torch.device("cpu")) else (("triton", ""),)

EITHER, SOMETIMES, RARELY = st.booleans(), often(False, True, share=0.2), often(False, True, share=0.04)
SHAPE = st.one_of(*[st.sampled_from(TINY)] * 6, st.sampled_from(EMPTY), *[st.sampled_from(EDGES)] * 2)
LARGE_SHAPE = often(*LARGE, STREAMED, share=0.9)
LAYOUT = often("contiguous", *DENSE, "negated", "conjugated", share=0.5)
REFUSED_LAYOUT = often(None, "expanded", "inference", share=0.02)
GRAD_LAYOUT = often("contiguous", *DENSE, *LAZY, share=0.5)
VALUES = {False: st.just("usual"), True: often(*CALM, *WILD, share=0.6)}
DTYPE = often(F32, BF16, BF16, F16, F64, C64, C128, share=0.5)
GRAD_DTYPE = often(None, *FLOATS, E4M3, E5M2, share=0.25)
OFFSET, KIND, SEED = often(0, 1, 2, 3, 7, share=0.5), often(0, 3, 4, share=0.2), st.integers(0, 1 << 30)
COUNT, UP_TO_TWO, THREADS = st.sampled_from((1, 2, 2, 3, 4)), st.integers(0, 2), often(1, 2, 7, share=0.5)
SUBJECT = st.sampled_from((*[("cpp", isa) for isa in ("", *ISAS)] * 12, *[("auto", "")] * 4, *[("foreach", "")] * 4, *TRITON))
OPTIONS = {
    "lr": often(LEFT_OUT, 1e-2, 0.1),
    "sgd_lr": often(LEFT_OUT, 3.0, 1e-3),
    "batch_size": often(8, 1, 300, 37.5),
    "betas": often(LEFT_OUT, (0.0, 0.5), (0.5, 0.0), (0.99, 0.9)),
    "weight_decay": often(LEFT_OUT, 0.0, 0.5),
    "maximize": often(LEFT_OUT, True, share=0.1),
    "capturable": often(LEFT_OUT, True, share=0.1),
}
OPTIONS_OF = {
    "AdaBayes": OPTIONS | {"transition": often(LEFT_OUT, "exact"), "variance_follows_lr": often(LEFT_OUT, False)},
    "AdaBayesFP": OPTIONS | {"eps": often(LEFT_OUT, 0.0, 1e-3), "sgd_lr": often(LEFT_OUT, inf, 3.0, 1e-3)},
}
POLICY = {
    "lean": often(LEFT_OUT, True),
    "max_grad_norm": often(LEFT_OUT, 0.5, 1e-6, inf),
    "skip_nonfinite": often(LEFT_OUT, True),
    "state_dtype": often(LEFT_OUT, "bfloat16", "8bit"),
    "weight_rounding": often(LEFT_OUT, "stochastic", "24bit", "32bit"),
    "seed": often(LEFT_OUT, 3, (1 << 63) - 1),
    "fused_unscale": often(LEFT_OUT, False, share=0.1),
}
NEW_LR, NEW_BETAS = (("lr", 5e-3), ("lr", 0.0)), (("betas", (0.5, 0.5)),)
EDIT = often(None, *NEW_LR, *NEW_BETAS, ("weight_decay", 0.2), ("batch_size", 12.5), ("maximize", True), ("sgd_lr", 0.3))
EVENTS_HERE = ("delete_state", "replace_state", "edit_state", "new_state_dict", "load", "copied", "new_data", "cast_module")
EVENT = st.sampled_from((*EVENTS_HERE, "add_group", "regroup", "policy", "wrong"))
MODE, SCALE = often(*MODES), often(None, 4.0, 3.0, share=0.15)


def dtypes_of(policy):
    """Those of parameters that may be stored so."""
    fits = (F32, BF16, F16) if "state_dtype" in policy else (*FLOATS, *COMPLEX)
    return [dtype for dtype in fits if dtype != F16 or "weight_rounding" not in policy]


@st.composite
def cases(draw):
    some = lambda choices: {name: value for name, choice in choices.items() if (value := draw(choice)) != LEFT_OUT}
    algorithm, subject = draw(st.sampled_from([*SLOW])), draw(SUBJECT)
    options, policy = some(OPTIONS_OF[algorithm]), some(POLICY)
    if policy.get("state_dtype") == "8bit" and not draw(RARELY):
        policy["lean"] = True
    happens, values = draw(SOMETIMES), VALUES[draw(EITHER)]
    if happens and algorithm == "AdaBayes":
        options["transition"] = "exact"  # which refuses no lr that an event sets
    large = draw(RARELY) and subject[0] != "triton"
    dtypes = (*FLOATS, *COMPLEX) if not happens and draw(RARELY) else dtypes_of(policy)
    groups = ({}, *(some(OPTIONS_OF[algorithm]) for _ in range(draw(often(0, 1, 2)))))
    params = []
    for _ in range(draw(COUNT)):
        shape, dtype = draw(LARGE_SHAPE if large and not params else SHAPE), draw(DTYPE)
        layout = not happens and draw(REFUSED_LAYOUT) or draw(LAYOUT)
        group = draw(st.integers(0, len(groups) - 1))
        params.append(Param(shape, dtype if dtype in dtypes else BF16, layout, draw(OFFSET), draw(values), draw(KIND), group))
    steps = []
    grad = lambda: None if draw(SOMETIMES) else Grad(draw(GRAD_LAYOUT), draw(OFFSET), draw(GRAD_DTYPE), draw(values))
    for _ in range(draw(COUNT)):
        grads, scale = tuple(grad() for _ in params), draw(SCALE)
        events = tuple(draw(EVENT) for _ in range(draw(UP_TO_TWO))) if happens and steps else ()
        guards = large or draw(SOMETIMES)
        steps.append(Step(grads, events, draw(EDIT), draw(MODE), guards, scale, scale is not None and draw(SOMETIMES)))
    threads = draw(THREADS) if large else 1
    return Case(algorithm, options, policy, groups, tuple(params), tuple(steps), subject, threads, draw(SOMETIMES), draw(SEED))


# --- Tensors ----------------------------------------------------------------------------------------------------------


def numbers(shape, dtype, kind):
    """Values of a kind, drawn by torch."""
    if dtype.is_complex:
        return torch.complex(*(numbers(shape, dtype.to_real(), kind) for _ in range(2)))
    limits, usual = torch.finfo(dtype), torch.randn(shape, dtype=F64) * 10.0 ** int(torch.randint(-3, 2, ()))
    part, last = usual.sign() * torch.rand(shape, dtype=F64), {"inf": inf, "nan": math.nan}.get(kind)
    mixed = [0.0, -0.0, limits.tiny / 8, -limits.tiny / 4, limits.max, limits.max / 3, inf, -inf, math.nan, 1.0]
    mixed = torch.tensor(mixed, dtype=F64)[torch.randint(len(mixed), shape)]
    zeros = {"zero": part.abs() * 0.0, "negative zero": part.abs() * -0.0}
    values = (zeros | {"denormal": part * limits.tiny, "huge": part * limits.max, "mixed": mixed}).get(kind, usual)
    if last is not None and values.numel():
        values.view(-1)[-1] = last * (1 if float(values.view(-1)[0]) > 0 else -1)
    return values.to(F32).to(dtype) if dtype.itemsize < 4 else values.to(dtype)


def placed(values, strides, offset):
    """``values`` laid out so in memory of their own; and the whole of that memory, with margins."""
    span = 1 + sum((n - 1) * s for n, s in zip(values.shape, strides, strict=True)) if values.numel() else 0
    whole = torch.full((2 * MARGIN + offset + span,), FILLER).to(values.dtype)
    tensor = whole.as_strided(values.shape, strides, MARGIN + offset)
    if span < values.numel():  # elements share memory
        whole[MARGIN + offset :][:span] = values.reshape(-1)[:span]
    else:
        tensor.copy_(values)
    return tensor, whole


def strides_of(shape, layout):
    n, rows = len(shape), layout == "rows" and len(shape) > 1
    order = {"transposed": [*range(n)][::-1], "channels_last": [0, *range(2, n), 1][:n]}.get(layout, [*range(n)])
    strides, size = [0] * n, 2 if layout == "sliced" else 1
    for d in order[::-1]:
        strides[d], size = size, size * max(shape[d], 1) + 3 * (rows and d == n - 1)
    if layout == "odd":  # strides that no element is reached by may be anything
        return [77 if length < 2 or 0 in shape else s for length, s in zip(shape, strides, strict=True)]
    return [1] * n if layout == "overlapping" else [0, *strides[1:]] if layout == "expanded" and n else strides


def laid_out(values, layout, offset):
    """A tensor of such values; the memory its elements are in, without laziness, and the whole of it."""
    strides, ours, to_numpy = strides_of(values.shape, layout), values.dtype in (*FLOATS, *COMPLEX), layout == "numpy"
    if layout == "zero":
        return torch._efficientzerotensor(values.shape, dtype=values.dtype), None, None
    if layout in ("own", "numpy", "inference"):  # its memory ends where it does, which sanitizers see
        with torch.inference_mode(layout == "inference"):
            to_numpy &= ours and values.dtype != BF16
            values = torch.from_numpy(values.numpy().copy()) if to_numpy else values.clone()
        return values, values, values
    if layout == "imaginary" and values.dtype in (F32, F64):
        base, whole = placed(torch.complex(torch.zeros_like(values), -values), strides, offset)
        return base.conj().imag, base, whole
    if layout in ("negated", "conjugated") and ours and values.is_complex() == (layout == "conjugated"):
        base, whole = placed(values.conj() if layout == "conjugated" else -values, strides, offset)
        return base.conj() if layout == "conjugated" else torch._neg_view(base), base, whole
    base, whole = placed(values, strides, offset)
    return base.clone().requires_grad_().view(values.shape) if layout == "graph" else base, base, whole


def as_real(t):
    t = t.detach().clone().resolve_conj().resolve_neg()
    return torch.view_as_real(t) if t.is_complex() else t


# --- A run ------------------------------------------------------------------------------------------------------------


def root(t):
    """Rounded correctly, which torch.sqrt is not on CPUs: all of ``foreach``'s bits are then known in AdaBayes-FP too."""
    with np.errstate(invalid="ignore"):
        np.sqrt(t.numpy(), out=t.numpy())
    return t


class Run(Walk):
    """The subject and the referee, which agree bit for bit; ``weights`` are those of the judge, the slow path in float64."""

    def __init__(self, case):
        self.case = case
        super().__init__(case.seed)

    def setting(self):
        case = self.case
        self.fixed_point, self.many, self.clipped = False, "few", "max_grad_norm" in case.policy
        self.coded = case.policy.keys() & {"state_dtype", "weight_rounding"} != set()
        self.dtypes = [F32, BF16] if self.coded else [F32, BF16, F16, C64]
        # Each backend sums squares in another order. Float32 shows nothing of that, float64 the last bits.
        limits = {case.policy.get("max_grad_norm", inf), 0.1 if any("policy" in step.events for step in case.steps) else inf}
        self.inexact = self.clipped and limits != {inf}
        self.sides = self.subject, self.referee = [Side(self.maker(backend)) for backend in (case.subject[0], "foreach")]
        for side in self.sides:
            side.guards, side.gradients = [], []
        for p in case.params:
            values = numbers(p.shape, p.dtype, p.values)
            for side in self.sides:
                with torch.inference_mode(p.layout == "inference"):
                    tensor, *memory = laid_out(values, p.layout, p.offset)
                    base, whole = (t.detach() for t in memory)  # somebody may change a parameter's ``data``
                    side.params.append(KINDS[p.kind](tensor))
                side.guards.append((whole, whole.clone(), None if p.shares else base, "weights"))
        self.weights = [torch.nn.Parameter(as_real(p).double()) for p in self.referee.params]
        self.scales = [torch.zeros_like(w) for w in self.weights]  # of what has been added up, for compare_with_judge
        self.largest = [torch.zeros_like(w) for w in self.weights]  # of the gradients so far
        self.judged = {p.values for p in case.params} <= {*CALM} and "state_dtype" not in case.policy

    def maker(self, backend):
        algorithm, policy = FUSED[self.case.algorithm], self.case.policy
        return lambda params: algorithm(params, backend=backend, **self.given(self.case.options), **policy)

    def given(self, options, without=()):
        tensors = ("lr", "batch_size") if self.case.tensors else ()
        as_given = lambda name, value: torch.tensor(value, dtype=F64) if name in tensors else value
        return {name: as_given(name, value) for name, value in options.items() if name not in without}

    def groups(self, params, without=()):
        groups = [dict(params=[], **self.given(group, without)) for group in self.case.groups]
        for p, drawn in zip(params, self.case.params, strict=True):
            groups[drawn.group]["params"].append(p)
        return groups

    def check(self):
        case, unknown = self.case, ("capturable",)  # to the slow path
        refused, self.judge = case.policy.get("state_dtype") == "8bit" and not case.policy.get("lean"), None
        with contextlib.suppress(ValueError):
            self.judge = SLOW[case.algorithm](self.groups(self.weights, unknown), **self.given(case.options, unknown))
        error, _ = self.both(lambda side: setattr(side, "optimizer", side.make(self.groups(side.params))), raises=True)
        self.expect(error, refused or self.judge is None)
        for k, step in enumerate(() if error else case.steps):
            for i, name in enumerate(step.events):
                self.random.seed(f"{case.seed} {k} {i}")
                self.judge, self.judged = None, False
                for p in (*self.subject.params, *self.referee.params):
                    p.grad = None
                EVENTS[name](self)
            if step.guards:
                self.guard_state()
            self.give(step)
            self.make(step)

    def guard_state(self):
        for side in self.sides:
            for entry in side.optimizer.state.values():
                for name, value in entry.items():
                    if isinstance(value, torch.Tensor) and not value.is_complex():
                        entry[name], whole = placed(value, value.stride(), 1)
                        side.guards.append((whole, whole.clone(), entry[name].detach(), name))

    def give(self, step):
        """The step's edit and gradients, to each side."""
        for optimizer in (self.subject.optimizer, self.referee.optimizer, self.judge):
            if step.edit and optimizer is not None:
                optimizer.param_groups[-1][step.edit[0]] = step.edit[1]
        for side in self.sides:
            side.gradients.clear()
            side.optimizer.grad_scale = torch.tensor(step.scale) if step.scale else None
            side.optimizer.found_inf = torch.tensor(float(step.overflow)) if step.scale else None
        for i, p in enumerate(self.referee.params):
            drawn = step.grads[i] if i < len(step.grads) else Grad()
            values = drawn and numbers(p.shape, p.dtype if p.is_complex() else drawn.dtype or p.dtype, drawn.values)
            for side in self.sides:
                q = side.params[i]
                q.grad = q.grad_dtype = None  # of any dtype
                if drawn:
                    q.grad, _, whole = laid_out(values, drawn.layout, drawn.offset)
                    side.gradients += [(t, t.detach().clone()) for t in (q.grad, whole) if t is not None]

    def make(self, step):
        """The step: refused by all where it has to be, else the same on all sides."""
        refused = self.is_wrong(step)
        if self.judge is not None:
            refused |= not self.judge_step(step, refused)
        before, skipped = [side.snapshot() for side in self.sides], int(self.referee.optimizer.skipped_steps)
        error, _ = self.both(lambda side: self.act(side, step), raises=True)
        self.expect(error, refused or error is not None and self.judge is None)
        if error or int(self.referee.optimizer.skipped_steps) > skipped:
            self.unchanged(before)
        if not error:
            self.compare()
        self.intact()
        if self.judged and not error:
            self.compare_with_judge()

    def is_wrong(self, step):
        """Whether a parameter with a gradient is none that a step takes."""
        fits, members = dtypes_of(self.case.policy), zip(self.case.params, step.grads, strict=True)
        read_only = lambda p: p.layout == "inference" and step.mode != "inference"
        return any(p.shares or p.dtype not in fits or read_only(p) for p, grad in members if grad)

    def act(self, side, step):
        skips = step.overflow or side.optimizer.skip_nonfinite or not all(float(g["lr"]) for g in side.optimizer.param_groups)
        mode = "ordinary" if step.mode == "watched" and skips else step.mode  # watched, a step makes state that is not counted
        with contextlib.ExitStack() as stack:
            if side is self.subject:
                stack.enter_context(mock.patch.dict(foreach.BLOCK, cpu=64))
                stack.enter_context(mock.patch.dict(os.environ, {cpp.ISA_VARIABLE: self.case.subject[1]}))
                stack.enter_context(set_for_now(torch.get_num_threads, torch.set_num_threads, self.case.threads))
            if side is self.subject or mode == "inference":
                stack.enter_context(MODES[mode]())
            side.optimizer.step()

    @staticmethod
    def expect(error, refused):
        if (error is not None) != refused:
            raise Found(f"{'to be refused' if refused else 'not to be refused'}; raised: {error}")

    def agree(self, name, found, expected, before):
        if name == "exp_avg" and found.dtype == torch.uint8:  # the sign of a NaN is anyone's
            found, expected = (torch.where(code & 127 == 127, 127, code) for code in (found, expected))
        if same(found, expected) or not self.inexact or found.dtype not in (F64, C128):
            return same(found, expected)
        a, b = as_real(found), as_real(expected)
        largest = float(b.abs().nan_to_num(0.0, 0.0).max()) if b.numel() else 0.0
        found.copy_(expected)
        return torch.allclose(a, b, rtol=1e-9, atol=1e-9 * largest, equal_nan=True)

    def intact(self):
        """Memory beside the elements of weights and state is as it was; gradients, and what lies beside them, too."""
        for side in self.sides:
            for whole, before, base, name in side.guards:
                if base is not None:
                    before.as_strided(base.shape, base.stride(), base.storage_offset()).copy_(base)
                if not same(whole, before):
                    raise Found(f"memory beside {name} was written")
            for gradient, before in side.gradients:
                if not same(*(t.float() if t.itemsize == 1 else t for t in (gradient, before))):
                    raise Found(f"a gradient, or memory beside it, was written: {short(gradient)}")

    def judge_step(self, step, refused):
        """The slow path's step: unscaled, clipped and skipped as torch does it. False if it refuses the options."""
        for w in self.weights:
            w.grad = None
        try:
            self.judge.step()
        except ValueError:
            return False
        grads = [None if p.grad is None else as_real(p.grad) for p in self.referee.params]
        finite = all(bool(g.float().isfinite().all()) for g in grads if g is not None)
        if refused or step.overflow or self.case.policy.get("skip_nonfinite") and not finite:
            return True
        self.judged &= {grad.values for grad in step.grads if grad} <= {*CALM}
        for w, g in zip(self.weights, grads, strict=True):
            w.grad = None if g is None else (g.float() if g.itemsize == 1 else g).double() / (step.scale or 1.0)
        if self.clipped and any(w.grad is not None for w in self.weights):
            torch.nn.utils.clip_grad_norm_(self.weights, self.case.policy["max_grad_norm"])
        self.judge.step()
        return True

    def compare_with_judge(self):
        """As in test_parity, 1e-12 for float64. Else a step errs by a unit of what the weight is stored in, or by what its few
        operations round in float32, relative to the weight and to its moves towards the largest gradient so far."""
        for i, (p, w) in enumerate(zip(self.referee.params, self.weights, strict=True)):
            group = next(group for group in self.judge.param_groups if any(q is w for q in group["params"]))
            state, count = self.judge.state[w], float(self.referee.entry(i).get("step", 0))
            if count != state.get("step", 0):
                if float(group["lr"]) == 0 and count == 0:  # it was for the sake of the state
                    self.judged = False
                    return
                raise Found(f"parameter {i} has made {count:.0f} steps; the slow path {state.get('step', 0)}")
            limits = torch.finfo(as_real(p).dtype)
            self.scales[i] += w.detach().abs() + limits.tiny
            if w.grad is not None:
                torch.maximum(self.largest[i], w.grad.abs() * float(group["batch_size"] or 1), out=self.largest[i])
                self.scales[i] += state["post_var"] * self.largest[i] / (1 - float(group["betas"][0]) ** state["step"])
            unit = 1e-12 if as_real(p).dtype == F64 else max(limits.eps, 64 * torch.finfo(F32).eps)
            far = (as_real(p).double() - w.detach()).abs() / (unit * self.scales[i])
            if bool((far[w.isfinite()] > 1.0).any()) or p.isnan().any() and not w.isnan().any():
                raise Found(f"weight {i} is {short(p)}; the slow path's {short(w)}: {float(far.max()):.3g} times too far")


def check(case):
    """Makes the steps of a case; raises what is found."""
    patches = mock.patch.object(torch.Tensor, "sqrt_", root), mock.patch.object(triton, "CHUNK", 1024), warnings.catch_warnings()
    with contextlib.ExitStack() as stack:
        for patch in (*patches, set_for_now(torch.get_num_threads, torch.set_num_threads, 1)):
            stack.enter_context(patch)
        warnings.simplefilter("ignore")
        Run(case).check()


# --- Many cases -------------------------------------------------------------------------------------------------------


def chunk(tell, seed, count, end):
    """So many cases of a seed. Tells before each how many there were, at the end the smallest that found something."""
    made, found = 0, None

    def fuzz(case):
        nonlocal made, found
        if found is None and time.time() > end:
            return
        made += found is None
        tell((made, repr(case), None))
        try:
            check(case)
        except Exception as error:
            found = repr(case), str(error) if isinstance(error, Found) else traceback.format_exc()
            raise

    phases, unhealthy = (hypothesis.Phase.generate, hypothesis.Phase.shrink), [*hypothesis.HealthCheck]
    quiet = dict(database=None, deadline=None, report_multiple_bugs=False, suppress_health_check=unhealthy)
    settings = hypothesis.settings(max_examples=count, phases=phases, **quiet)
    with contextlib.suppress(Exception):  # told below
        hypothesis.seed(seed)(settings(hypothesis.given(cases())(fuzz)))()
    tell((made, *(found or ("", None))))


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=inf, help="begin no case after so many")
    parser.add_argument("--stop", type=int, default=5, help="end after so many findings")
    options = parser.parse_args(arguments)
    begin, made, findings, part = time.time(), 0, 0, 0
    end = begin + 60 * options.minutes
    while made < options.cases and findings < options.stop and time.time() < end:
        seed, part = options.seed * 1_000_000 + part, part + 1
        told, death = in_child(chunk, seed, min(1000, options.cases - made), end)
        more, case, found = ast.literal_eval(told)
        made += more
        if part % 10 == 0:
            print(f"{made} cases so far", flush=True)
        if death or found:
            findings += 1
            print(f"{found or f'the process died of {death}'}\n  after {made} cases; in the folder tests:", flush=True)
            print(f'    python -c "from fuzz import *; check({case})"', flush=True)
    seconds = time.time() - begin
    print(f"{made} cases in {seconds:.1f} s ({made / seconds:.0f} a second), {findings} findings")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
