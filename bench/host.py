"""What a step costs the host, and what it has a GPU do: ``python -m bench host``, on a GPU or on the stand-in for one.

    make -C tests/fakecuda all; tests/fakecuda/fakecuda python -m bench host

Time is the thread's own, of steps that nobody waits for: on the stand-in kernels cost nothing, on a GPU its queue has room.
"""

from __future__ import annotations

import contextlib
import time
from argparse import Namespace
from collections.abc import Callable, Iterator

import numpy as np
import torch

from adabayes_fused import AdaBayes, backends

from .case import Row, reason
from .contenders import ADAM, ANCHOR, MAX_GRAD_NORM, WEIGHT_DECAY
from .shapes import case_of, count, random_parameters
from .timing import Tell, gpu_events

try:
    from fakecuda import record
except ImportError:  # a real GPU
    record = None

LISTS = ("1000x16", "densenet121", "gpt2", "1x32M")
KINDS = ("plain", "scaler", "clip", "skip", "capturable", "lr tensor")
STEPS, ROUNDS = 5, 30
SPAN = "what is seen"  # a span of the profiler's
Step = Callable[[], object]


def ours(params: list, kind: str, backend: str) -> Step:
    options = dict(max_grad_norm=MAX_GRAD_NORM) if kind == "clip" else {}
    optimizer = AdaBayes(
        params,
        batch_size=128,
        weight_decay=WEIGHT_DECAY,
        backend=backend,
        capturable=kind == "capturable",
        skip_nonfinite=kind == "skip",
        **options,
    )
    return told(optimizer, kind)


def adamw(params: list, kind: str) -> Step:
    """Doing the same; it skips no step but under a scaler."""
    optimizer = torch.optim.AdamW(params, **ADAM, fused=True, capturable=kind in ("capturable", "lr tensor"))
    step = told(optimizer, kind)

    def clipped() -> None:
        torch.nn.utils.clip_grad_norm_(params, MAX_GRAD_NORM)
        step()

    return clipped if kind == "clip" else step


def told(optimizer: torch.optim.Optimizer, kind: str) -> Step:
    device = optimizer.param_groups[0]["params"][0].device
    if kind == "lr tensor":
        optimizer.param_groups[0]["lr"] = torch.tensor(1e-3, device=device)
    if kind == "scaler":  # as torch.amp.GradScaler does
        optimizer.grad_scale, optimizer.found_inf = torch.ones((), device=device), torch.zeros((), device=device)
    return optimizer.step


def measure(name: str, options: Namespace, tell: Tell) -> list[Row]:
    """Rows of one list of shapes: every kind of step, by each contender, in turn."""
    title, shapes, *_ = case_of(name)
    about = dict(what="host", case=name, device=options.device, tensors=len(shapes), parameters=count(shapes), family="ours")
    about |= dict(title=f"{title}, {'stand-in' if record else torch.cuda.get_device_name()}", note="", wrong=False, detail=True)
    rows: list[Row] = []
    for i, kind in enumerate(KINDS):
        tell(i / len(KINDS), kind)
        steps: dict[str, Step] = {}
        found = {n: about | dict(contender=n, kind=kind) for n in ("AdaBayes, cuda", "AdaBayes, triton", ANCHOR)}
        for n, row in found.items():
            params = random_parameters(shapes, options.device)
            try:
                if n != ANCHOR:
                    backends.choose(n.split()[-1], torch.device(options.device))
                steps[n] = adamw(params, kind) if n == ANCHOR else ours(params, kind, n.split()[-1])
                for _ in range(4):
                    steps[n]()
            except Exception as error:
                steps.pop(n, None)
                row["note"] = f"{kind}: {reason(error)}"
        for n, seconds in medians(steps).items():
            found[n] |= dict(host_s=seconds, **doings(steps[n]))
        for row in found.values():
            anchor = found[ANCHOR].get("host_s")
            row["relative"] = row["host_s"] / anchor if anchor and "host_s" in row else None
        rows += found.values()
    return rows


def medians(steps: dict[str, Step]) -> dict[str, float]:
    """Seconds of the thread a step; A B C A B C ..."""
    seconds: dict[str, list[float]] = {n: [] for n in steps}
    for _ in range(ROUNDS):
        for n, step in steps.items():
            torch.cuda.synchronize()
            begin = time.thread_time()
            for _ in range(STEPS):
                step()
            seconds[n].append((time.thread_time() - begin) / STEPS)
    return {n: float(np.median(times)) for n, times in seconds.items()}


def doings(step: Step) -> dict[str, int]:
    with seen() as found:
        step()
    return found


@contextlib.contextmanager
def seen() -> Iterator[dict[str, int]]:
    """What the block has the GPU do; the numbers are there once it is over."""
    found: dict[str, int] = {}
    if record is not None:
        with record() as log:
            yield found
        found |= dict(launches=len(log.launches) + len(log.memsets), copies=log.copies.total(), waits=log.waits.total())
        return
    from torch.profiler import ProfilerActivity, profile, record_function

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as run:
        with record_function(SPAN):
            yield found
        torch.cuda.synchronize()
    done = gpu_events(run)
    copies = sum(e.name.startswith("Memcpy") for e in done)
    on_host = [e for e in run.events() if e.device_type == torch.autograd.DeviceType.CPU]
    (block,) = (e.time_range for e in on_host if e.name == SPAN)
    within = [e for e in on_host if block.start <= e.time_range.start <= block.end]  # neither our wait nor the profiler's own
    found |= dict(launches=len(done) - copies, copies=copies, waits=sum("Synchronize" in e.name for e in within))
