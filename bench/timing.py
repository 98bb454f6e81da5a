"""How time is taken: contenders in turn, and each case in a process of its own."""

from __future__ import annotations

import math
import multiprocessing
import os
import time
import timeit
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.benchmark.utils.timer import timer as now  # waits for the GPU

BLOCK = 0.02  # seconds a block of steps lasts at least
LEAST_ROUNDS = 3
Tell = Callable[[float, str], None]  # how far a job is, and with what


class Turns:
    """A contender's turns: each one step on its own, whose data the others have driven out of the caches, then a block."""

    def __init__(self, step: Callable[[], Any]) -> None:
        self.step = step
        self.timer = timeit.Timer("step()", timer=now, globals=dict(step=step))  # torch's Timer would warm up each time
        for _ in range(3):  # state, memory pages, compilation
            step()
        self.number = max(1, math.ceil(BLOCK / self.timer.timeit(1)))
        self.first: list[float] = []
        self.block: list[float] = []

    def take(self) -> None:
        self.first.append(self.timer.timeit(1))
        self.block.append(self.timer.timeit(self.number) / self.number)

    def summary(self) -> dict[str, Any]:
        """Seconds; the raw times last."""
        numbers: dict[str, Any] = dict(steps_per_block=self.number, rounds=len(self.block))
        for name, times in (("", self.block), ("first_", self.first)):
            p20, median, p80 = np.percentile(times, (20, 50, 80)).tolist()
            numbers |= {f"{name}median_s": median, f"{name}p20_s": p20, f"{name}p80_s": p80}
        return numbers | dict(block_s=self.block, first_s=self.first)


def alternate(turns: Mapping[str, Turns], rounds: int, budget: float, tell: Tell) -> None:
    """A B C A B C ..., until the rounds are done or the seconds are over; what else the machine does falls on all."""
    start = time.monotonic()
    for done in range(rounds):
        spent = time.monotonic() - start
        if done >= LEAST_ROUNDS and spent >= budget:
            break
        for name, one in turns.items():
            tell(min(1.0, max(done / rounds, spent / (budget or 1))), name)
            one.take()


def quick_median(step: Callable[[], Any]) -> float:
    """Seconds a step, of one contender alone."""
    turns = Turns(step)
    for _ in range(LEAST_ROUNDS):
        turns.take()
    return float(np.median(turns.block))


def gpu_times(step: Callable[[], Any]) -> dict[str, Any]:
    """Kernels launched by a step and the time they take, by the profiler; and a step's time between two events on the
    stream, the L2 cache emptied before it."""
    from torch.profiler import ProfilerActivity, profile
    from triton.testing import do_bench

    steps = 5
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as run:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    kernels = gpu_events(run)
    p20, median, p80 = (1e-3 * ms for ms in do_bench(step, quantiles=[0.2, 0.5, 0.8]))
    return dict(
        launches=len(kernels) / steps,
        kernels_s=1e-6 * sum(e.time_range.elapsed_us() for e in kernels) / steps,
        events_median_s=median,
        events_p20_s=p20,
        events_p80_s=p80,
    )


def gpu_events(run: Any) -> list[Any]:
    """Of a profile, what the GPU did: kernels, copies and fills, not the spans that optimizers name."""
    return [e for e in run.events() if e.device_type == torch.autograd.DeviceType.CUDA and not e.is_user_annotation]


# --- A process per job ------------------------------------------------------------------------------------------------


def in_a_process(job: Callable[..., list[dict]], arguments: tuple, tell: Tell, log: Path) -> list[dict]:
    """``job(*arguments, tell)``, apart from the others: large temporaries of one case slow the next one's steps down.

    Raises RuntimeError where the process ends without a result; what it printed is in ``log``.
    """
    context = multiprocessing.get_context("spawn" if torch.cuda.is_available() or os.name == "nt" else "forkserver")
    if context.get_start_method() == "forkserver":
        context.set_forkserver_preload(["torch._dynamo", "bench.step"])  # imported once, not for each job
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(there, log, job, arguments))
    process.start()
    there.close()
    try:
        while True:
            kind, value = here.recv()
            if kind == "done":
                return value
            tell(*value)
    except EOFError:
        process.join()
        raise RuntimeError(f"its process ended with exit status {process.exitcode}; see {log}") from None
    finally:
        process.join()


def _run(pipe: Any, log: Path, job: Callable[..., list[dict]], arguments: tuple) -> None:
    with log.open("a") as file:  # compilers and peers print what would tear the progress bar
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    pipe.send(("done", job(*arguments, lambda part, what: pipe.send(("progress", (part, what))))))
