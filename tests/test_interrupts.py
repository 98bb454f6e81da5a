"""Ctrl-C at every line of a step: afterwards nothing has changed, or everything has, and the next step goes on from there."""

import contextlib
import itertools
import os
import signal
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

import adabayes_fused
from adabayes_fused import AdaBayes
from adabayes_fused.backends import cpp

PACKAGE = Path(adabayes_fused.__file__).parent
NATIVE = pytest.mark.skipif(cpp.unavailable(torch.device("cpu")) is not None, reason="the compiled module is not there")
KINDS = ("one dtype", "two dtypes", "one dtype, gapped", "two dtypes, gapped")
CASES = [*itertools.product(KINDS, (0, 2), (None,)), *itertools.product((KINDS[0], KINDS[3]), (0, 2), (0.5,))]


START = {"step": 0, "exp_avg": 0, "prior_var": 1}


def begun(backend, kind, steps, max_grad_norm):
    """An optimizer after so many steps, and gradients for the next."""
    generator = torch.Generator().manual_seed(0)
    starts = [torch.randn(4, 3, generator=generator)]  # one of each, and lean: a first step has a hundred lines for each more
    if "gapped" in kind:
        starts.append(torch.randn(8, 6, generator=generator)[:, ::2])
    if "two" in kind:
        starts.append(torch.randn(3, generator=generator).bfloat16())
    params = [torch.nn.Parameter(start) for start in starts]
    optimizer = AdaBayes(params, lr=1e-2, batch_size=8, backend=backend, lean=True, max_grad_norm=max_grad_norm)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
    for _ in range(steps):
        optimizer.step()
    return params, optimizer


def values(params, optimizer):
    """Of each parameter: its weight and state, as they are now. What is new and at its start is no state."""
    found = []
    for p in params:
        entry = {name: value.clone() for name, value in (optimizer._kept_state.get(p) or {}).items()}
        if all(name in entry and bool((entry[name] == value).all()) for name, value in START.items()):
            entry = {}
        found.append({"weight": p.detach().clone(), **entry})
    return found


def differences(found, expected):
    """The first few of what is not as expected."""
    wrong = []
    for i, (now, then) in enumerate(zip(found, expected, strict=True)):
        wrong += [f"{i}.{k}" for k in {**now, **then} if k not in now or k not in then or not torch.equal(now[k], then[k])]
    return wrong


class Interrupt:
    """Interrupts what runs in it, before its ``at``-th line (or bytecode instruction): by raising KeyboardInterrupt right
    there, or by a signal, whose handler Python runs when it sees fit."""

    def __init__(self, at, how, event="line"):
        self.at, self.how, self.event, self.where, self.raised = at, how, event, None, False
        self.seen = Counter()

    def __enter__(self):
        self.before, self.handler = sys.gettrace(), signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.settrace(self.trace)
        return self

    def trace(self, frame, event, _):
        if self.where or not frame.f_code.co_filename.startswith(str(PACKAGE)):
            return None
        frame.f_trace_opcodes = self.event == "opcode"
        place = frame.f_code, frame.f_lineno
        self.seen[place] += event == self.event
        if event == self.event and (event == "opcode" or self.seen[place] <= 2):  # of a loop, two rounds
            self.at -= 1
            if not self.at:
                code = frame.f_code
                name = code.co_filename.removeprefix(f"{PACKAGE.parent}/")
                self.where = f"{name}:{frame.f_lineno} in {code.co_name}"
                if self.how == "signal":
                    signal.raise_signal(signal.SIGINT)
                else:
                    raise KeyboardInterrupt
        return self.trace

    def __exit__(self, kind, error, traceback):
        sys.settrace(self.before)
        signal.signal(signal.SIGINT, self.handler)
        self.raised = kind is KeyboardInterrupt
        return self.raised


def half_updated(how, case, event="line", backend="cpp", every=1, refused=lambda on: None):
    """Where an interrupt leaves a step half taken, and what is not as before it then (or not as after it)."""
    params, optimizer = begun(backend, *case)
    whole = [values(params, optimizer)]  # before the step, after it, after the next
    for _ in range(2):
        optimizer.step()
        whole.append(values(params, optimizer))
    wrong = []
    for at in itertools.count(1, every):
        params, optimizer = begun(backend, *case)
        refused(True)
        with Interrupt(at, how, event) as interrupt, contextlib.suppress(ValueError):
            optimizer.step()
        refused(False)
        if interrupt.where is None:
            return wrong, at
        found = values(params, optimizer)
        of_nothing, of_all = differences(found, whole[0]), differences(found, whole[1])
        if not interrupt.raised:
            wrong.append(f"{interrupt.where}: the interrupt is lost")
        if of_nothing and of_all:
            wrong.append(f"{interrupt.where}: changed {of_nothing[:6]}, and not {of_all[:6]}")
            continue
        optimizer.step()
        if later := differences(values(params, optimizer), whole[2 if of_nothing else 1]):
            wrong.append(f"{interrupt.where}: the step after it differs in {later[:6]}")


def report(wrong, lines):
    assert lines > 50  # it has been interrupted at all
    assert not wrong, f"half a step at {len(wrong)} of {lines} places:\n" + "\n".join(wrong)


@NATIVE
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("how", ["exception", "signal"])
def test_a_step_is_taken_whole_or_not_at_all(how, case):
    report(*half_updated(how, case))


@NATIVE
@pytest.mark.parametrize("steps", [0, 2])
def test_between_two_instructions(steps):
    """A signal's handler runs after calls too, in the middle of a line. Every 37th instruction, as there are thousands."""
    report(*half_updated("signal", ("two dtypes, gapped", steps, None), "opcode", every=37))


@NATIVE
@pytest.mark.parametrize("steps", [0, 2])
def test_while_a_refused_step_is_cleaned_up(steps):
    def refused(on):
        os.environ.update({"ADABAYES_FUSED_ISA": "mmx"} if on else {"ADABAYES_FUSED_ISA": ""})

    report(*half_updated("exception", ("two dtypes, gapped", steps, None), refused=refused))


@pytest.mark.parametrize("case", [case for case in CASES[:8] if case[0] in (KINDS[0], KINDS[3])], ids=str)
def test_foreach_holds_back_signals(case):
    """An exception raised in it, as opposed to a signal's, may leave half of its many operations done."""
    report(*half_updated("signal", case, backend="foreach"))


def test_the_interrupt_finds_what_is_half_updated(monkeypatch):
    code = 'def step(self):\n for p in self.param_groups[0]["params"]:\n  p.detach().add_(1.0)\n'
    scope = {}
    exec(compile(code, str(PACKAGE / "wrong.py"), "exec"), scope)
    monkeypatch.setattr(AdaBayes, "_step", scope["step"])
    wrong, _ = half_updated("exception", (KINDS[1], 0, None), backend="foreach")
    assert "adabayes_fused/wrong.py:3 in step: changed ['0.weight'], and not ['1.weight']" in wrong
