"""``python -m bench.paper sgd_lr``: which lr and sgd_lr train well, beside AdamW, on images and on text.

Every run is a short training (:mod:`bench.trainings`). A run that was killed begins anew; those that have ended stay.
"""

from __future__ import annotations

import hashlib
import math
import platform
import re
import sysconfig
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.optim import Adam, Optimizer

from adabayes_fused import diagnostics

from .. import trainings
from . import data, optimizers
from .runs import original, read_json
from .train import Tell, same, write

LRS = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
TASKS = {"image": 1500, "text": 2000}  # steps
ADABAYES, FP = "AdaBayes", "AdaBayes-FP"
FIXED_POINT = "AdaBayes, fixed point"  # each variance begins where the first gradient's square would lead it
MEMORY = "AdaBayes, memory of 1,000"  # steps, as <g^2>'s; batch_size is what gives it at the full lr
PARTS: tuple[dict[str, tuple[float | None, ...]], ...] = (  # sgd_lr by optimizer; the first part is trained first
    {"AdamW": (None,), ADABAYES: (0.1, 1.0, 10.0, 100.0), FP: (0.1, 1.0, 10.0, 100.0), FIXED_POINT: (1.0, 10.0, 100.0)},
    {MEMORY: (1.0, 10.0, 100.0)},
    {FP: (math.inf,)},
)
TESTS = 1000  # windows of the text


@dataclass(frozen=True)
class Job:
    task: str
    optimizer: str
    sgd_lr: float | None
    lr: float
    seed: int
    steps: int

    @property
    def name(self) -> str:
        sgd_lr = "" if self.sgd_lr is None else f"-sgd-lr-{self.sgd_lr:g}"
        return f"{self.task}-{re.sub('[^a-z0-9]+', '-', self.optimizer.lower())}{sgd_lr}-lr-{self.lr:g}-seed{self.seed}"


class Study(NamedTuple):
    """What is trained: a :class:`bench.paper.jobs.Work`."""

    key: str  # of the images
    folder: Path | None
    output: Path
    about: dict[str, Any]
    jobs: list[Job]

    def prepare(self) -> dict[str, Task]:
        """Raises: data.WrongData where the images cannot be read."""
        return {key: TASK[key](self) for key in dict.fromkeys(job.task for job in self.jobs)}

    def train(self, job: Job, shared: dict[str, Task], about: dict[str, Any], tell: Tell) -> None:
        """Raises: train.WrongRun where the folder holds a run of that name with other settings."""
        task, path = shared[job.task], self.output / "runs" / f"{job.name}.json"
        torch.manual_seed(job.seed)
        model = task.source.model()
        options = options_of(job, task.source.examples)
        record = asdict(job) | dict(
            sgd_lr=None if job.sgd_lr is None else f"{job.sgd_lr:g}",  # JSON has no infinity
            data=task.data,
            parameters=sum(p.numel() for p in model.parameters()),
            examples=task.source.examples,
            options={name: str(value) if value == math.inf else value for name, value in options.items()},
        )
        if path.exists():
            same(path, read_json(path), record)
            return
        optimizer = optimizers.make(original(job.optimizer), model.parameters(), options)

        def step() -> None:
            if job.optimizer == FIXED_POINT and not optimizer.state:
                begin_at_fixed_point(optimizer)
            optimizer.step()

        generator = torch.Generator().manual_seed(job.seed)
        found = trainings.fit(task.source, model, optimizer, step, job.steps, generator, lambda part: tell(part, ""))
        adam_like = None if job.optimizer == "AdamW" else diagnostics(optimizer).overall.adam_like
        figures = {name: value if math.isfinite(value) else None for name, value in found._asdict().items()}
        write(path, record | figures | dict(adam_like=adam_like, machine=about))
        tell(1.0, f"training loss {found.train_loss:.4f}, test loss {found.test_loss:.4f}")


class Task(NamedTuple):
    source: trainings.Source
    data: str  # the title of what it learns from


def images(study: Study) -> Task:
    found = data.load(study.key, study.folder)
    return Task(trainings.Images(found), found.name)


def text(study: Study) -> Task:
    """The top-level modules of the Python standard library, in the order of their names."""
    content = b"".join(path.read_bytes() for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")))
    title = f"sources of Python {platform.python_version()}'s standard library, {len(content):,} bytes"
    return Task(trainings.Text(content, TESTS), f"{title}, sha256 {hashlib.sha256(content).hexdigest()[:12]}")


TASK = {"image": images, "text": text}


def jobs(tasks: Iterable[str], seeds: Iterable[int], steps: int | None = None, lrs: Iterable[float] = LRS) -> list[Job]:
    """Every point of the grid with the first seed, then with the others, so that a stop leaves a whole; what is extra last."""
    return [
        Job(task, optimizer, sgd_lr, lr, seed, steps or TASKS[task])
        for part in PARTS
        for seed in dict.fromkeys(seeds)
        for optimizer, sgd_lrs in part.items()
        for sgd_lr in sgd_lrs
        for lr in lrs
        for task in tasks
    ]


def options_of(job: Job, examples: int) -> dict[str, Any]:
    """Table 1's options of this optimizer, but for lr, sgd_lr and the batch size. Where the filter would remember less than a
    step, which its default refuses, the transition is the exact one."""
    options = dict(optimizers.OPTIMIZERS[original(job.optimizer)].options, lr=job.lr)
    if job.sgd_lr is None:
        return options
    options["sgd_lr"] = job.sgd_lr
    if "batch_size" in options:
        options["batch_size"] = job.sgd_lr / (job.lr**2 * 1000) if job.optimizer == MEMORY else examples
        if job.lr**2 * options["batch_size"] > job.sgd_lr:
            options["transition"] = "exact"
    return options


def begin_at_fixed_point(optimizer: Optimizer) -> None:
    """Gives AdaBayes, before its first step, the variances that steady gradients of the present one's square would lead to
    (Eq. 20, and a drift). The averages begin at 0, as ever."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    adam = Adam(params, lr=0.0)
    adam.step()  # after one step its mean square, corrected for its beginning, is the gradient's square
    optimizer.load_adam_state_dict(adam.state_dict())
    for state in optimizer.state.values():
        for name in ("step", "exp_avg", "exp_avg_sq"):
            state[name].zero_()
