"""A random walk: two optimizers over equal weights meet the same events, and have to agree after each step.

``python tests/walk.py --cases 20000`` walks seeds 0 to 19999; ``--seed N`` repeats one and prints its events. The subject
remembers where state lies (``cpp`` or ``auto``), the referee (``foreach``) reads all of it at each step. Events are what people
and frameworks do to parameters, gradients, groups and state between two steps. ``--without NAME`` leaves an event out.
"""

import argparse
import ast
import copy
import io
import math
import mmap
import os
import pickle
import random
import re
import signal
import sys
import time
import traceback
import weakref
from collections import defaultdict

import numpy as np
import torch
import torch._dynamo  # which torch.optim imports at its first use, for seconds, in every child

from adabayes_fused import AdaBayes, AdaBayesFP
from adabayes_fused.codes import WEIGHT_ROUNDINGS

F32, F64, F16, BF16, C64 = torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64
SHAPES = ((3,), (), (4, 3), (1,), (2, 0), (0,), (1, 5), (5, 1), (2, 3, 2), (17,), (1, 1), (65,))
LARGE = ((130, 130), (16400,))  # whose state lies in no slab
LAYOUTS = ("plain", "plain", "plain", "transposed", "gapped", "piece", "odd")
LAZY = ("expanded", "negated", "imaginary", "conjugated")
FILLER = 7.0  # what lies in the gaps of parameters and in memory that is not ours


class Found(Exception):
    """The two optimizers differ."""


def laid_out(values, layout, stride=77):
    """``values`` once more, in memory of its own, laid out so."""
    shape, n = values.shape, values.numel()
    if layout == "transposed" and values.dim() > 1:
        return values.transpose(0, 1).clone(memory_format=torch.contiguous_format).transpose(0, 1)
    if layout == "gapped" and values.dim():
        whole = torch.full((*shape[:-1], 2 * shape[-1]), FILLER, dtype=values.dtype)
        return whole[..., ::2].copy_(values)
    if layout == "piece":  # of a flat tensor, at an odd offset, as DDP's buckets give them
        return torch.full((n + 2,), FILLER, dtype=values.dtype)[1 : n + 1].view(shape).copy_(values)
    if layout == "odd":  # strides that no element is reached by may be anything
        if not n and values.dtype == F32 and stride == 0:
            return torch.from_numpy(np.empty(tuple(shape), dtype=np.float32))
        strides = [s if size > 1 and n else stride for size, s in zip(shape, values.contiguous().stride(), strict=True)]
        return values.contiguous().clone().as_strided(shape, strides)
    if layout == "expanded" and n:
        return values.reshape(-1)[:1].clone().reshape((1,) * values.dim()).expand(shape)
    if layout == "negated" and not values.is_complex():
        return torch._neg_view(-values)
    if layout == "imaginary" and values.dtype in (F32, F64):
        return torch.complex(torch.zeros_like(values), -values).conj().imag
    if layout == "conjugated" and values.is_complex():
        return values.conj().resolve_conj().clone().conj()
    return values.clone()


class Side:
    """One optimizer, its parameters, and what somebody holds on to."""

    def __init__(self, make):
        self.params, self.grips, self.left, self.saved = [], [], [], None
        self.make = make

    def add(self, values, layout, stride, kind):
        self.params.append(kind(laid_out(values, layout, stride)))

    def entry(self, i):
        """The state of a parameter, without the optimizer noticing that it was asked for."""
        return self.optimizer._kept_state.get(self.params[i]) or {}

    def snapshot(self):
        weights = [p.detach().clone() for p in self.params]
        return weights, [{k: value_of(v) for k, v in self.entry(i).items()} for i in range(len(self.params))]


class Subclass(torch.nn.Parameter):
    pass


KINDS = (torch.nn.Parameter, torch.nn.Parameter, torch.nn.Parameter, lambda t: t.requires_grad_(), Subclass)


def value_of(v):
    return v.detach().clone() if isinstance(v, torch.Tensor) else torch.tensor(float(v))


def same(a, b):
    """Equal in every bit, but for those of NaNs; of state that was brought to another dtype: equal values."""
    if a.shape != b.shape:
        return False
    if a.dtype != b.dtype:
        wide = torch.promote_types(a.dtype, b.dtype)
        a, b = a.to(wide), b.to(wide)
    if a.is_complex():
        a, b = torch.view_as_real(a.resolve_conj()), torch.view_as_real(b.resolve_conj())
    signed = (a == b) & (torch.signbit(a) == torch.signbit(b))  # 0.0 equals -0.0
    return bool((signed | (a.isnan() & b.isnan())).all())


def near(a, b, before):
    """Equal but for the roots of ``foreach``: torch.sqrt is a unit in the last place off, and so are, after the sums that
    follow, the denominator by two, its quotient by three. The weight is a difference of two numbers not larger than its old
    and new value together, rounded twice more."""
    if same(a, b):
        return True
    unit = torch.finfo(a.dtype).eps
    scale = a.abs().double() + b.abs().double() + before.abs().double()
    difference = (a - b).abs().double()
    return bool(((difference <= 4 * unit * scale) | (a == b) | (a.isnan() & b.isnan())).all())


class Walk:
    def __init__(self, seed, without=(), subject=None):
        self.random = random.Random(seed)
        torch.manual_seed(seed)
        self.without, self.events, self.canaries, self.backend = without, [], [], subject
        self.setting()
        self.allowed = [name for name in EVENTS if name not in without]

    # --- Drawing ------------------------------------------------------------------------------------------------------

    def chance(self, probability):
        return self.random.random() < probability

    def some(self, n=None):
        """One parameter, a few, or all: their numbers."""
        n = len(self.subject.params) if n is None else n
        size = self.random.choice((1, 1, 1, (n + 1) // 2, n - 1, n))
        return sorted(self.random.sample(range(n), min(max(size, 1), n)))

    def values(self, shape, dtype):
        values = torch.randn(shape) * 10.0 ** self.random.randint(-3, 1)
        return torch.complex(values, torch.randn(shape)) if dtype.is_complex else values.to(dtype)

    def layout(self, *more):
        layout = self.random.choice((*LAYOUTS, *more))
        if layout in ("negated", "conjugated", "imaginary") and "lazy" in self.without:
            layout = "plain"
        return layout, self.random.choice((1, 77) if "empty" in self.without else (0, 1, 77))

    def dtype(self):
        return self.random.choice(self.dtypes)

    def floats(self):
        """With a clipped norm no float64: backends sum it in another order, which float32 does not show."""
        return (F32, BF16) if self.coded else (F32, BF16, F16) if self.clipped else (F32, BF16, F16, F64)

    def note(self, *words):
        self.events.append(" ".join(map(str, words)))

    # --- Doing --------------------------------------------------------------------------------------------------------

    def both(self, act, raises=False):
        """Acts on both sides; the same has to be raised on both."""
        outcomes = []
        for side in self.sides:
            try:
                outcomes.append((None, act(side)))
            except Exception as error:  # without its traceback, whose frames hold on to what they used
                words = re.sub(r"\d{9,}", "ID", str(error)).partition("\n")[0]
                outcomes.append((f"{type(error).__name__}: {words}", None))
        (subject, result), (referee, expected) = outcomes
        if subject != referee:
            raise Found(f"the subject: {subject or 'no error'}; the referee: {referee or 'no error'}")
        if referee and not raises:
            raise Found(f"both raise {referee}")
        return referee, (result, expected)

    def setting(self):
        """The optimizers and their first parameters."""
        draw = self.random
        self.fixed_point, self.clipped = self.chance(0.35), self.chance(0.2)
        algorithm = AdaBayesFP if self.fixed_point else AdaBayes
        policy = dict(lean=self.chance(0.2), max_grad_norm=draw.choice((0.5, math.inf)) if self.clipped else None)
        policy["skip_nonfinite"] = self.chance(0.15)
        self.coded = not self.fixed_point and not self.clipped and self.chance(0.25)  # of the others only the last bit may differ
        if self.coded:
            policy |= dict(state_dtype=draw.choice(("bfloat16", "8bit")), weight_rounding=draw.choice(WEIGHT_ROUNDINGS), seed=3)
            policy["lean"] |= policy["state_dtype"] == "8bit"
        options = dict(
            lr=draw.choice((1e-3, 1e-2)), batch_size=8, maximize=self.chance(0.1), betas=draw.choice(((0.9, 0.999), (0.0, 0.5)))
        )
        if not self.fixed_point:
            options.update(transition=draw.choice(("paper", "paper", "exact")), variance_follows_lr=self.chance(0.8))
        subject = draw.choice(("cpp", "cpp", "cpp", "auto"))
        subject = self.backend or subject
        self.sides = self.subject, self.referee = [
            Side(lambda params, backend=backend: algorithm(params, backend=backend, **options, **policy))
            for backend in (subject, "foreach")
        ]
        self.many = draw.choices(("few", "slabs", "thousands"), (0.98, 0.0195, 0.0005))[0]
        self.dtypes = [F32] if self.chance(0.6) else [F32, F32, F32, F32, BF16, F16, C64, *([] if self.clipped else [F64])]
        if self.coded:
            self.dtypes = [F32, F32, BF16]
        shapes = {
            "few": [draw.choice(LARGE if self.chance(0.2) else SHAPES) for _ in range(draw.choice((1, 2, 2, 3, 4)))],
            "slabs": [draw.choice(((4000,), (4000,), (2000,), (40, 100)))] * draw.randint(14, 24),  # a slab for a slot or two
            "thousands": [draw.choice(((16,), (3,), ()))] * draw.randint(1100, 1700),
        }[self.many]
        for shape in shapes:
            self.make_parameter(shape, plain=self.many != "few")
        n, cut = len(shapes), draw.randint(0, len(shapes) - 1)
        groups = [list(range(cut)), list(range(cut, n))] if cut and self.chance(0.5) else [list(range(n))]
        for side in self.sides:
            side.optimizer = side.make([{"params": [side.params[i] for i in group]} for group in groups])
        self.note(algorithm.__name__, subject, options, policy, len(shapes), "parameters in groups of", [len(g) for g in groups])

    def make_parameter(self, shape, plain=False):
        dtype, (layout, stride) = (F32, ("plain", 1)) if plain else (self.dtype(), self.layout("negated", "conjugated"))
        kind = KINDS[0] if plain else self.random.choice(KINDS)
        values = self.values(shape, dtype)
        for side in self.sides:
            side.add(values, layout, stride, kind)
        if not plain:
            self.note("parameter", len(self.subject.params) - 1, tuple(shape), dtype, layout, stride)

    def walk(self):
        rounds = self.random.randint(1, 4) if self.many == "few" else 5
        self.step("all")
        for _ in range(rounds):
            for _ in range(self.random.choice((0, 1, 1, 1, 2, 3))):
                name = self.random.choice(self.allowed)
                if self.many != "few":
                    name = self.random.choice((name, "delete_state", "add_group", "canary", "delete_state"))
                    name = name if name in self.allowed else "canary"
                self.note("--", name)
                EVENTS[name](self)
            for _ in range(self.random.choice((1, 1, 1, 2, 3))):
                self.step()

    # --- The step and what has to be equal after it -------------------------------------------------------------------

    def gradients(self, which):
        """Gives these parameters a gradient each, the others none; some keep the one they had."""
        n, zero = len(self.subject.params), self.chance(0.05)
        which = set(which)
        usual = self.many != "few"
        for i in range(n):
            if i not in which:
                for side in self.sides:
                    side.params[i].grad = None
                continue
            p = self.referee.params[i]
            if p.grad is not None and self.chance(0.1):
                continue
            layout, stride = ("plain", 1) if usual else self.layout(*LAZY)
            values = torch.zeros(p.shape, dtype=p.dtype) if zero else self.values(p.shape, p.dtype)
            if not usual and not p.is_complex() and self.chance(0.05):
                values = values.to(self.random.choice(self.floats()))
            if p.numel() and self.chance(0.01 if usual else 0.03):
                values.view(-1)[-1] = self.random.choice((math.nan, math.inf)) if self.referee.optimizer.skip_nonfinite else 0.0
            for side in self.sides:
                q = side.params[i]
                q.grad = q.grad_dtype = None  # of any dtype
                q.grad = laid_out(values, layout, stride)
            if not usual:
                self.note("  gradient of", i, layout, values.dtype)

    def step(self, kind=None):
        n = len(self.subject.params)
        kind = kind or self.random.choices(("all", "most", "few", "none", "again"), (5, 6, 3, 0.5, 1))[0]
        which = {
            "all": range(n),
            "most": [i for i in range(n) if self.chance(0.7)],
            "few": self.some()[:3],
            "none": [],
            "again": [i for i, p in enumerate(self.referee.params) if p.grad is not None],
        }[kind]
        self.note("step:", kind, *([] if kind in ("all", "none", "again") or n > 30 else [list(which)]))
        if kind != "again":
            self.gradients(which)
        before = [p.detach().clone() for p in self.referee.params] if self.fixed_point else None
        closure = (lambda: 1.0) if self.chance(0.03) else None
        self.both(lambda side: side.optimizer.step(closure))
        self.compare(before)

    def compare(self, before=None):
        """Weights, state, counts, who has state, and memory that is nobody's."""
        a, b = self.sides
        for i, (p, q) in enumerate(zip(a.params, b.params, strict=True)):
            w, found = q if before is None else before[i], a.entry(i)
            expected = b.entry(i)
            if found.keys() != expected.keys():
                raise Found(f"state of parameter {i} has {[*found]}; the referee's {[*expected]}")
            if not self.agree("weight", p.detach(), q.detach(), w):
                raise Found(f"weight {i} is {short(p)}; the referee's {short(q)}")
            for name, value in expected.items():
                here = found[name]
                if not isinstance(value, torch.Tensor) or not isinstance(here, torch.Tensor):
                    if here != value:
                        raise Found(f"{name} of parameter {i} is {here}; the referee's {value}")
                elif here.dtype != value.dtype or here.requires_grad:
                    raise Found(f"{name} of parameter {i} is of {here.dtype}; the referee's of {value.dtype}")
                elif here.is_inference():
                    raise Found(f"{name} of parameter {i} was made in inference mode, and cannot be changed outside")
                elif not self.agree(name, here, value, value):
                    raise Found(f"{name} of parameter {i} is {short(here)}; the referee's {short(value)}")
        if len(a.optimizer._kept_state) != len(b.optimizer._kept_state):
            raise Found("state of parameters that are no more")
        if int(a.optimizer.skipped_steps) != int(b.optimizer.skipped_steps):
            raise Found(f"{a.optimizer.skipped_steps} steps skipped; the referee's {b.optimizer.skipped_steps}")
        norms = [float("nan") if s.optimizer.grad_norm is None else float(s.optimizer.grad_norm) for s in self.sides]
        summed = sum(p.numel() for p in a.params)  # squares, in another order: each sum is rounded to 2**-53 so many times
        if not (math.isclose(*norms, rel_tol=1e-12 + summed * 2.0**-53) or all(map(math.isnan, norms))):
            raise Found(f"grad_norm is {norms[0]}; the referee's {norms[1]}")
        for canary in self.canaries:
            if not bool((canary == FILLER).all()):
                raise Found(f"memory that is not the optimizer's was overwritten: {short(canary)}")
        for side in self.sides:
            for tensor, copy_of_it in side.left:
                if not same(tensor, copy_of_it):
                    raise Found(f"a tensor that was replaced was written: {short(tensor)}, was {short(copy_of_it)}")
            for p in side.params:
                self.check_gaps(p)

    def agree(self, name, found, expected, before):
        """Whether a weight or a tensor of state is the referee's. Where the last bit may differ, both go on from the same."""
        if same(found, expected):
            return True
        alike = self.fixed_point and name in ("weight", "post_var") and near(found, expected, before)
        if alike:
            found.copy_(expected)
        return alike

    @staticmethod
    def check_gaps(p):
        if not p.numel() or not p.dim() or p.stride(-1) != 2 or p.untyped_storage().nbytes() != 2 * p.numel() * p.itemsize:
            return
        gaps = torch.as_strided(p.detach(), p.shape, p.stride(), p.storage_offset() + 1)
        if not bool((gaps == FILLER).all()):
            raise Found("a gap between the elements of a parameter was written")

    # --- Events: state ------------------------------------------------------------------------------------------------

    def way(self):
        """How somebody gets at the state."""
        return lambda side: side.optimizer.state

    def delete_state(self):
        which, state = self.some(), self.way()
        self.note("state deleted of", which)
        self.both(lambda side: [None for i in which if state(side).pop(side.params[i], None) and False])

    def clear_state(self):
        state = self.way()
        self.both(lambda side: state(side).clear())

    def ask(self):
        self.both(lambda side: [None for _ in side.optimizer.state.items()])

    def replace_state(self):
        """New tensors, of the same or another form, under the same names or in a new entry."""
        which, state = self.some(), self.way()
        form = self.random.choice(("clone", "double", "bfloat16", "transposed", "gapped", "number", "shared", "data", "swapped"))
        names = self.random.sample(("step", "exp_avg", "prior_var", "exp_avg_sq", "post_var"), self.random.randint(1, 5))
        anew, keep = self.chance(0.3), self.chance(0.3)
        self.note("state of", which, "replaced:", form, names, "in a new entry" if anew else "", "the old kept" if keep else "")

        def act(side):
            for i in which:
                entry = state(side).get(side.params[i])
                if not entry:
                    continue
                if anew:
                    entry = state(side)[side.params[i]] = dict(entry)
                for name in names:
                    if name in entry and isinstance(entry[name], torch.Tensor):
                        old = entry[name]
                        if keep and form not in ("shared", "swapped"):
                            old_memory = old.data
                            side.left.append((old_memory, old_memory.clone()))
                        in_form(entry, name, form)

        self.both(act, raises=form == "swapped")  # torch does not swap what has views

    def edit_state(self):
        which, state, factor = self.some(), self.way(), self.random.choice((0.5, 2.0, 0.0))
        self.note("state of", which, "times", factor)

        def act(side):
            for i in which:
                for name, value in (state(side).get(side.params[i]) or {}).items():
                    if isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex()):  # no code
                        value.add_(3) if name == "step" else value.mul_(factor)

        self.both(act)

    def new_state_dict(self):
        """The whole dict of dicts exchanged."""
        cloned = self.chance(0.5)
        self.note("another dict for the state", "cloned" if cloned else "")

        def act(side):
            new = defaultdict(dict)
            for p, entry in side.optimizer.state.items():
                new[p] = {k: v.clone() if cloned and isinstance(v, torch.Tensor) else v for k, v in entry.items()}
            side.optimizer.state = new

        self.both(act)

    def hold(self):
        """Somebody keeps a reference, changes state through it some steps later, or lets go of it."""
        i, what = self.random.randrange(len(self.subject.params)), self.random.choice([*GRIPS])
        self.note("held on to:", what, "of", i)

        def act(side):
            if side.entry(i):
                side.grips.append((what, GRIPS[what][0](side.optimizer.state, side.params[i])))

        self.both(act)
        if self.chance(0.4):  # while nobody asks for the state
            for _ in range(3):
                self.step("all")
            self.note("what is held is changed")
            self.change_what_is_held()
            self.step("all")

    def change_what_is_held(self):
        def act(side):
            for what, grip in side.grips:
                GRIPS[what][1](grip)

        self.both(act, raises=True)  # an iterator over a dict that has changed

    def let_go(self):
        for side in self.sides:
            side.grips.clear(), side.left.clear()

    # --- Events: saving and copying -----------------------------------------------------------------------------------

    def save(self):
        form = self.random.choice(("itself", "deepcopy", "file"))
        self.note("state_dict kept:", form)

        def act(side):
            state = side.optimizer.state_dict()
            side.saved = state if form == "itself" else copy.deepcopy(state) if form == "deepcopy" else through_file(state)

        self.both(act, raises=True)  # torch has no state_dict where a parameter without a group has state

    def load(self):
        if self.subject.saved is None or self.chance(0.3):
            self.save()
        if self.subject.saved is None:
            return
        before = [side.snapshot() for side in self.sides]
        error, _ = self.both(lambda side: side.optimizer.load_state_dict(side.saved), raises=True)  # groups may be others now
        if error:
            self.note("  refused:", error)
            self.unchanged(before)
        self.compare()

    def copied(self):
        """Optimizer and parameters together, as a checkpoint of everything or a copy of a trainer has them."""
        how = self.random.choice((copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))))
        self.note("copied by", "pickle" if how is not copy.deepcopy else "deepcopy")
        self.let_go()

        def act(side):
            for p in side.params:
                if p.grad is not None and p.grad.dtype != p.dtype:  # torch does not copy those
                    p.grad = None
            side.params, side.optimizer = how((side.params, side.optimizer))

        self.both(act)

    # --- Events: parameters -------------------------------------------------------------------------------------------

    def new_data(self):
        which, form, keep = self.some(), self.random.choice(("clone", "dtype", "layout", "shared", "piece")), self.chance(0.3)
        dtype, (layout, stride) = self.dtype(), self.layout("negated")
        self.note(
            "p.data of", which, form, dtype if form == "dtype" else layout if form == "layout" else "", "kept" if keep else ""
        )

        def act(side):
            for i in which:
                p = side.params[i]
                old = p.data
                if form == "shared":
                    if not p.is_neg() and not p.is_conj():
                        p.share_memory_()
                    continue
                if keep:
                    side.left.append((old, old.clone()))
                cast = form == "dtype" and not p.is_complex() and not dtype.is_complex
                p.data = laid_out(old.resolve_neg().to(dtype) if cast else old, layout if form == "layout" else form, stride)

        self.both(act)

    def cast_module(self):
        """Module.to, which swaps tensors or assigns data."""
        dtype, swap = (
            self.random.choice(self.floats()),
            self.chance(0.5) and "swap" not in self.without,
        )
        self.note("Module.to", dtype, "by swapping" if swap else "")

        def act(side):
            module = torch.nn.Module()
            for i, p in enumerate(side.params):
                if isinstance(p, torch.nn.Parameter) and not p.is_complex() and p.dtype != dtype and not p.is_neg():
                    p.grad_dtype = None
                    module.register_parameter(f"p{i}", p)
            torch.__future__.set_swap_module_params_on_conversion(swap)
            try:
                module.to(dtype)
            finally:
                torch.__future__.set_swap_module_params_on_conversion(False)

        self.both(act)

    def swap_tensors(self):
        which, dtype, (layout, stride) = self.some(), self.dtype(), self.layout()
        self.note("swap_tensors", which, dtype, layout)

        def act(side):
            for i in which:
                p = side.params[i]
                same_kind = p.is_complex() == dtype.is_complex
                new = laid_out(p.detach().resolve_neg().resolve_conj().to(dtype if same_kind else p.dtype), layout, stride)
                new = torch.nn.Parameter(new) if type(p) is torch.nn.Parameter else new.as_subclass(type(p)).requires_grad_()
                torch.utils.swap_tensors(p, new)

        self.both(act)

    def add_group(self):
        first, n = len(self.subject.params), self.random.choice((1, 1, 2))
        for _ in range(n):
            shape = self.subject.params[0].shape if self.many != "few" else self.random.choice(SHAPES)
            self.make_parameter(shape, plain=self.many != "few")
        lr = self.random.choice((1e-2, 1e-3))
        self.both(lambda side: side.optimizer.add_param_group({"params": side.params[first:], "lr": lr}))

    def drop(self):
        """Removed from its group, with its state, and let go of: nobody else may hold it."""
        if len(self.subject.params) < 2:
            return
        i, forget = self.random.randrange(len(self.subject.params)), self.chance(0.7)
        self.note("dropped:", i, "and forgotten" if forget else "but for its state")
        self.let_go()

        def act(side):
            p = side.params[i]
            leave_group(side.optimizer, p)
            if not forget:
                return True
            side.optimizer.state.pop(p, None)
            side.saved = None
            ref = weakref.ref(side.params.pop(i))
            del p
            return ref() is None

        _, (gone, expected) = self.both(act)
        if gone != expected:
            raise Found(f"a dropped parameter is kept alive: {not gone}; the referee's: {not expected}")

    def regroup(self):
        """Reordered, moved to another group, put back, or a tuple for a list."""
        how = self.random.choice(("reverse", "shuffle", "move", "back", *([] if "tuple" in self.without else ["tuple"]), "list"))
        order, i = self.random.random(), self.random.randrange(len(self.subject.params))
        self.note("groups:", how, i if how in ("move", "back") else "")

        def act(side):
            groups, p = side.optimizer.param_groups, side.params[i]
            if how == "move" or (how == "back" and not any(p is q for g in groups for q in g["params"])):
                leave_group(side.optimizer, p)
                groups[int(order * len(groups))]["params"] = [*groups[int(order * len(groups))]["params"], p]
            for group in groups:
                params = list(group["params"])
                if how == "reverse" and isinstance(group["params"], list):
                    group["params"].reverse()
                if how == "shuffle":
                    random.Random(order).shuffle(params)
                    group["params"] = params
                if how in ("tuple", "list"):
                    group["params"] = {"tuple": tuple, "list": list}[how](params)

        self.both(act)

    # --- Events: the rest ---------------------------------------------------------------------------------------------

    def options(self):
        g, draw = self.random.randrange(len(self.subject.optimizer.param_groups)), self.random
        decays = ("betas", (0.8, 0.9)), ("weight_decay", 0.2)
        name, value = draw.choice((("lr", 0.0), ("lr", 5e-3), *decays, ("maximize", True), ("batch_size", 4)))
        if name == "lr" and self.chance(0.2):
            value = torch.tensor(value)
        self.note(name, "of group", g, "is", value)
        self.both(lambda side: side.optimizer.param_groups[g].__setitem__(name, copy.copy(value)))
        if self.chance(0.1):
            self.both(lambda side: side.optimizer.set_batch_size(16))

    def policy(self):
        norm, skip = self.random.choice((0.1, math.inf, None)) if self.clipped else None, self.chance(0.5)
        self.note("max_grad_norm", norm, "skip_nonfinite", skip)
        for side in self.sides:
            side.optimizer.max_grad_norm, side.optimizer.skip_nonfinite = norm, skip

    def canary(self):
        """Memory that others ask for where ours may have been let go of."""
        self.canaries[:-100] = []
        self.canaries += [
            torch.full((self.random.choice((1024, 1000, 500, 16, 3)),), FILLER) for _ in range(10 if self.many == "few" else 80)
        ]

    def wrong(self):
        """A step that has to be refused, and change nothing."""
        members = [p for group in self.referee.optimizer.param_groups for p in group["params"]]
        in_groups = [i for i, p in enumerate(self.referee.params) if any(p is q for q in members)]
        if not in_groups:
            return
        i, kind = self.random.choice(in_groups), self.random.choice([*WRONG])
        self.gradients(self.some())
        self.note("wrong:", kind, "of", i)
        before = [side.snapshot() for side in self.sides]
        fits = [WRONG[kind][0](side, i) for side in self.sides]
        error = None
        if all(fits):
            error, _ = self.both(lambda side: side.optimizer.step(), raises=True)
        for side in self.sides:
            WRONG[kind][1](side, i)
            side.spoiled = None
            if kind in ("sparse", "integers", "complex"):
                side.params[i].grad = None
        if error:
            self.unchanged(before)
        elif all(fits):
            raise Found(f"a step with {kind} was not refused")

    def unchanged(self, before):
        for whose, side, (weights, state) in zip(("the subject's", "the referee's"), self.sides, before, strict=True):
            now, entries = side.snapshot()
            for i, (w, n) in enumerate(zip(weights, now, strict=True)):
                if not same(w, n):
                    raise Found(f"refused, and yet {whose} weight {i} was {short(w)} and is {short(n)}")
                if state[i].keys() != entries[i].keys():
                    raise Found(f"refused, and yet {whose} state of {i} had {[*state[i]]} and has {[*entries[i]]}")
                for name, value in state[i].items():
                    if not same(value, entries[i][name]):
                        raise Found(f"refused, and yet {whose} {name} of {i} was {short(value)} and is {short(entries[i][name])}")


def short(t):
    return str(t.detach().reshape(-1)[:6].tolist()) + f" {tuple(t.shape)}"


def through_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


def leave_group(optimizer, p):
    for group in optimizer.param_groups:
        if any(q is p for q in group["params"]):
            group["params"] = [q for q in group["params"] if q is not p]


def in_form(entry, name, form):
    value = entry[name]
    if form == "clone" or (form in ("transposed", "gapped") and value.dim() == 0):
        entry[name] = value.clone()
    elif form == "number":
        entry[name] = float(value) if name == "step" else value.clone()
    elif form in ("double", "bfloat16"):
        wide = {"double": F64, "bfloat16": BF16}[form]
        entry[name] = value.clone() if value.is_complex() else value.to(wide, copy=True)
    elif form in ("transposed", "gapped"):
        entry[name] = laid_out(value, form)
    elif form == "shared":
        value.share_memory_()
    elif form == "data":
        value.data = value.data.clone()
    elif form == "swapped":
        torch.utils.swap_tensors(value, value.clone())


def renew(entry):
    for name, value in entry.items():
        if isinstance(value, torch.Tensor):
            entry[name] = value.clone()


def move(entry):
    for value in entry.values():
        if isinstance(value, torch.Tensor):
            value.data = value.data.clone()


def halve(tensors):
    for t in tensors:
        if isinstance(t, torch.Tensor):
            t.mul_(0.5)


GRIPS = {  # what somebody holds on to, and what is done to it later
    "the state": (lambda state, p: state, lambda state: [renew(entry) for entry in state.values()]),
    "the state, to clear it": (lambda state, p: state, lambda state: state.clear()),
    "a view of it": (lambda state, p: state.values(), lambda view: [renew(entry) for entry in view]),
    "an iterator": (lambda state, p: iter(state.values()), lambda it: [move(entry) for entry in it]),
    "an entry": (lambda state, p: state[p], renew),
    "an entry, to empty it": (lambda state, p: state[p], lambda entry: entry.clear()),
    "its tensors": (lambda state, p: dict(state[p]), move),
    "its averages": (lambda state, p: [state[p].get("exp_avg")], halve),
    "a view of its averages": (lambda state, p: [state[p]["exp_avg"][...]], halve),
    "its data": (
        lambda state, p: [v.data for v in state[p].values() if isinstance(v, torch.Tensor)],
        lambda ts: [t.share_memory_() for t in ts],
    ),
    "its large storages": (  # a slab that moved would have all state looked at
        lambda state, p: [v.untyped_storage() for v in state[p].values() if isinstance(v, torch.Tensor) and v.numel() > 16_384],
        lambda storages: [storage.share_memory_() for storage in storages],
    ),
    "weak references": (
        lambda state, p: [weakref.ref(v) for v in state[p].values() if isinstance(v, torch.Tensor)],
        lambda references: [setattr(v(), "data", v().data.clone()) for v in references if v() is not None],
    ),
}


def spoil_gradient(make):
    def spoil(side, i):
        p = side.params[i]
        p.grad = None
        p.grad_dtype = None
        p.grad = make(p)
        return True

    return spoil, lambda side, i: None


def spoil_data(make, fits):
    def spoil(side, i):
        p = side.params[i]
        side.spoiled = p.data
        if not fits(p):
            return False
        p.grad = torch.zeros(p.shape, dtype=p.dtype)
        p.data = make(p)
        return True

    def mend(side, i):
        if side.spoiled is not None:
            side.params[i].data = side.spoiled
            side.params[i].grad = None

    return spoil, mend


def spoil_slot(change):
    def spoil(side, i):
        p, entry = side.params[i], side.optimizer.state.get(side.params[i])
        side.spoiled = entry and entry.get("exp_avg")
        if side.spoiled is None:
            return False
        p.grad = torch.zeros(p.shape, dtype=p.dtype)
        change(entry)
        return True

    def mend(side, i):
        if side.spoiled is not None:
            side.optimizer.state[side.params[i]]["exp_avg"] = side.spoiled

    return spoil, mend


def spoil_option(name, value):
    def spoil(side, i):
        group = side.optimizer.param_groups[-1]
        side.spoiled = group[name]
        group[name] = value
        return True

    def mend(side, i):
        side.optimizer.param_groups[-1][name] = side.spoiled

    return spoil, mend


def spoil_policy(name, value):
    def spoil(side, i):
        side.spoiled = getattr(side.optimizer, name)
        setattr(side.optimizer, name, value)
        return True

    return spoil, lambda side, i: setattr(side.optimizer, name, side.spoiled)


WRONG = {  # how a step is spoilt, and how it is mended afterwards
    "sparse": spoil_gradient(lambda p: torch.zeros(p.shape, dtype=p.dtype).to_sparse()),
    "integers": spoil_gradient(lambda p: torch.ones(p.shape, dtype=torch.int32)),
    "complex": spoil_gradient(lambda p: torch.ones(p.shape, dtype=F32 if p.is_complex() else C64)),
    "resized": spoil_data(lambda p: torch.zeros(p.numel() + 1, dtype=p.dtype), lambda p: True),
    "expanded parameter": spoil_data(lambda p: torch.zeros((), dtype=p.dtype).expand(p.shape), lambda p: p.numel() > 1),
    "state lacks a slot": spoil_slot(lambda entry: entry.pop("exp_avg")),
    "state of another shape": spoil_slot(lambda entry: entry.update(exp_avg=torch.ones(2, 9, 4))),
    "lr": spoil_option("lr", math.nan),
    "betas": spoil_option("betas", (0.9, 1.0)),
    "weight_decay": spoil_option("weight_decay", -1.0),
    "max_grad_norm": spoil_policy("max_grad_norm", -1.0),
    "skip_nonfinite": spoil_policy("skip_nonfinite", "yes"),
}

EVENTS = {
    "delete_state": Walk.delete_state,
    "clear_state": Walk.clear_state,
    "ask": Walk.ask,
    "replace_state": Walk.replace_state,
    "edit_state": Walk.edit_state,
    "new_state_dict": Walk.new_state_dict,
    "hold": Walk.hold,
    "change_what_is_held": Walk.change_what_is_held,
    "let_go": Walk.let_go,
    "save": Walk.save,
    "load": Walk.load,
    "copied": Walk.copied,
    "new_data": Walk.new_data,
    "cast_module": Walk.cast_module,
    "swap": Walk.swap_tensors,  # --without swap: cast_module does not swap either
    "add_group": Walk.add_group,
    "drop": Walk.drop,
    "regroup": Walk.regroup,
    "options": Walk.options,
    "policy": Walk.policy,
    "canary": Walk.canary,
    "wrong": Walk.wrong,
}
ALSO_WITHOUT = ("lazy", "empty", "tuple")


def one(seed, without=(), subject=None, verbose=False):
    """Walks one seed; what was found, or None."""
    walk = None
    try:
        walk = Walk(seed, without, subject)
        walk.walk()
        found = None
    except Exception as error:
        found = f"{'' if isinstance(error, Found) else type(error).__name__ + ': '}{error}"
        if verbose and not isinstance(error, Found):
            raise
    if walk and (found or verbose):
        print(*(f"  {event}" for event in walk.events), sep="\n")
    if found:
        print(f"seed {seed}: {found}\n    python tests/walk.py --seed {seed}", flush=True)
    return found


def in_child(work, *arguments):
    """Calls ``work(tell, *arguments)`` in a child process. Returns what was told last, and how the child died, or None: a crash
    too has its case told."""
    told = mmap.mmap(-1, 1 << 16)

    def tell(what):
        data = repr(what).encode()
        told[:4], told[4 : 4 + len(data)] = len(data).to_bytes(4, "little"), data

    child = os.fork()
    if not child:
        try:
            work(tell, *arguments)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        sys.stdout.flush()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    last = told[4 : 4 + int.from_bytes(told[:4], "little")].decode()
    how = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else f"exit status {os.WEXITSTATUS(status)}"
    return last, how if status else None


def seeds_in_turn(tell, seeds, options):
    torch.set_num_threads(1)
    found = 0
    for seed in seeds:
        tell((seed, found))
        found += one(seed, options.without, options.subject, options.seed is not None) is not None
        tell((seed, found))
        if found >= options.stop:
            return


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--seed", type=int, help="walk this one alone and print its events")
    parser.add_argument("--subject", help="its backend; foreach tries the walk itself")
    parser.add_argument("--stop", type=int, default=5, help="end after so many seeds that found something")
    parser.add_argument("--without", action="append", default=[], choices=[*EVENTS, *ALSO_WITHOUT])
    options = parser.parse_args(arguments)
    begin, found = time.perf_counter(), 0
    seed, end = (options.seed, options.seed + 1) if options.seed is not None else (options.first, options.first + options.cases)
    first = seed
    while seed < end and found < options.stop:
        told, death = in_child(seeds_in_turn, range(seed, end), options)
        last, more = ast.literal_eval(told)
        if death:
            print(f"seed {last}: the process died of {death}\n    python tests/walk.py --seed {last}", flush=True)
        found, seed = found + more + (death is not None), last + 1
    seconds = time.perf_counter() - begin
    print(f"{seed - first} cases in {seconds:.1f} s ({(seed - first) / seconds:.0f} a second), {found} found something")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
