"""Trains many runs, several at a time in processes that read the images once, under one progress bar."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import queue
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from . import data
from .train import Job, Run, Tell, WrongRun, checkpoint_of, train, write


class Work(Protocol):
    """Runs to be made, each job with a ``name``."""

    @property
    def output(self) -> Path: ...

    @property
    def about(self) -> dict[str, Any]: ...

    @property
    def jobs(self) -> list[Any]: ...

    def prepare(self) -> Any:
        """What the runs share, made once in each process."""

    def train(self, job: Any, shared: Any, about: dict[str, Any], tell: Tell) -> None:
        """Brings the run to its end, if it is not there."""


class Plan(NamedTuple):
    """What is trained, and at the end of which run Appendix A and B are measured, if that."""

    key: str
    folder: Path | None
    name: str | None
    images: int | None  # of each part at most so many
    device: str
    output: Path
    about: dict[str, Any]
    jobs: list[Job]
    measured: Job | None
    save_every: float

    def load(self) -> data.Data:
        found = data.load(self.key, self.folder, self.name)
        if self.images is not None:
            train, test = (spread(len(labels), self.images) for labels in (found.train_y, found.test_y))
            found = found._replace(
                train_x=found.train_x[train], train_y=found.train_y[train], test_x=found.test_x[test], test_y=found.test_y[test],
                name=f"{found.name}, {self.images:,} images",
            )  # fmt: skip
        return found.to(torch.device(self.device))

    def prepare(self) -> data.Augmented:
        return data.Augmented(self.load())

    def train(self, job: Job, shared: data.Augmented, about: dict[str, Any], tell: Tell) -> None:
        train(job, shared, self.output, about, tell, self.save_every, keep=job == self.measured)


def spread(n: int, at_most: int) -> torch.Tensor:
    """Indices of so many of n, evenly spaced: the files may be in the order of their labels."""
    kept = min(n, at_most)
    return torch.arange(kept) * n // kept


def run_all(plan: Work, at_once: int, console: Console) -> None:
    """Raises: WrongRun, or what else a run ended with; the others of its turn are ended too, and go on at the next call."""
    with Progress(*COLUMNS, console=console) as progress:
        whole = progress.add_task("all runs", total=len(plan.jobs), says="")
        bars: dict[str, Any] = {}
        there = 0
        for name, part, says in told(plan, at_once):
            if name not in bars:
                bars[name] = progress.add_task(name, total=1.0, says="")
            progress.update(bars[name], completed=part, **({"says": says} if says else {}))
            if part == ENDED:
                progress.remove_task(bars[name])
                progress.advance(whole)
                there += not says
                if says:
                    console.print(f"{name}: {says}")
    if there:
        console.print(f"{there} of {len(plan.jobs)} runs were there already, in {plan.output}", soft_wrap=True)


def measure_gradients(plan: Plan, images: data.Data, console: Console) -> None:
    """Appendix A and B, once the run is at its end."""
    written = plan.output / "gradients.json"
    if plan.measured is None:
        return
    if not (checkpoint := checkpoint_of(plan.measured, plan.output)).exists():
        if not written.exists():
            again = plan.output / "runs" / f"{plan.measured.name}.json"
            console.print(f"No Appendix A and B: the network is gone; delete {again}, and the same command trains it anew")
        return
    from .gradients import measure

    run = Run(plan.measured, data.Augmented(images), plan.about)
    run.load(torch.load(checkpoint, map_location=run.device, weights_only=True), plan.about)
    with Progress(*COLUMNS, console=console) as progress:
        bar = progress.add_task("gradients of Appendix A and B", total=1.0, says="")
        found = measure(run.model, images, plan.measured.batch_size, plan.measured.seed, device=run.device,
                        tell=lambda part: progress.update(bar, completed=part))  # fmt: skip
    write(
        written, {"run": plan.measured.name, "data": images.name, "network": run.record["title"], "machine": plan.about, **found}
    )
    checkpoint.unlink(missing_ok=True)


ENDED = 2.0
COLUMNS = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(), TextColumn("{task.fields[says]}"))


def told(plan: Work, at_once: int) -> Iterator[tuple[str, float, str]]:
    """(run, how much of it is done, what it says) as it comes, ENDED for how much at the last."""
    context = multiprocessing.get_context("spawn")
    messages, threads = context.Queue(), max(1, torch.get_num_threads() // at_once)
    with ProcessPoolExecutor(at_once, context, _prepare, (plan, threads, messages)) as pool:
        pending = {job.name: pool.submit(_train, job) for job in plan.jobs}
        try:
            while pending:
                with suppress(queue.Empty):
                    message = messages.get(timeout=0.2)
                    if message[0] in pending:
                        yield message
                for name in [name for name, future in pending.items() if future.done()]:
                    yield name, ENDED, pending.pop(name).result()
        except BaseException:
            for process in (pool._processes or {}).values():  # until 3.14's terminate_workers
                process.terminate()
            raise


# --- In the processes -------------------------------------------------------------------------------------------------

_tell: Callable[[tuple[str, float, str]], None]
_plan: Work
_shared: Any


def _prepare(plan: Work, threads: int, messages: Any) -> None:
    global _plan, _shared, _tell
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    messages.cancel_join_thread()  # what nobody reads any more keeps no process
    torch.backends.cudnn.benchmark = True
    warnings.filterwarnings("ignore", message="This instance was constructed with capturable=True")  # the first steps are eager
    _plan, _shared, _tell = plan, plan.prepare(), messages.put


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _train(job: Any) -> str:
    """Returns the last that it said."""
    last = ""

    def tell(part: float, says: str) -> None:
        nonlocal last
        last = says or last
        _tell((job.name, part, says))

    _plan.train(job, _shared, _plan.about | {"threads": torch.get_num_threads()}, tell)
    return last


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """The folder is this process's until it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise WrongRun(f"another process is training into {folder}: wait for it, or give another --output") from None
    try:
        yield
    finally:
        os.close(handle)
