"""One training: a network, an optimizer, a seed. Each epoch ends in a checkpoint and in the run's JSON, so that a run that is
killed goes on from its last epoch and ends, on a CPU, with the numbers of one that is not."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from time import monotonic, perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import MultiStepLR

from adabayes_fused import AdaBayes

from . import networks, optimizers
from .data import Augmented, Data
from .figure3 import figure3, rounded
from .runs import FIGURE3, OURS

Tell = Callable[[float, str], None]  # how much of the run is done, and what it says


class WrongRun(Exception):
    """What stands in the way of a run; its text says what to do."""


@dataclass(frozen=True)
class Job:
    """What one run is. ``drop``: the epochs after which lr is divided by ten."""

    network: str
    optimizer: str
    seed: int
    epochs: int
    drop: int
    batch_size: int = 128
    width: float = 1.0
    bfloat16: bool = False  # autocast
    graphs: bool = True  # on a GPU

    @property
    def name(self) -> str:
        return re.sub("[^a-z0-9]+", "-", self.optimizer.lower()) + f"-seed{self.seed}"


class Run:
    """A network and its optimizer over the images, and the record of their epochs."""

    def __init__(self, job: Job, images: Augmented, about: dict[str, Any]) -> None:
        self.job, self.images, self.data = job, images, images.data
        self.device = self.data.train_x.device
        torch.manual_seed(job.seed)
        model = networks.make(job.network, self.data.channels, self.data.classes, job.width)
        self.model = model.to(self.device, memory_format=torch.channels_last)
        steps = -(-len(self.data.train_y) // job.batch_size)
        self.options = optimizers.options_of(job.optimizer, job.network, job.epochs * steps, job.batch_size)
        self.recipe, self.graphs = optimizers.OPTIMIZERS[job.optimizer], job.graphs and self.device.type == "cuda"
        self.optimizer = optimizers.make(job.optimizer, self.model.parameters(), self.options, self.graphs)
        self.scheduler = MultiStepLR(self.optimizer, [job.drop], 0.1)
        self.sums = torch.zeros(2, dtype=torch.float64, device=self.device)  # of the losses, of the errors, of an epoch
        self.step: Callable[[Tensor], None] | None = Captured(self) if self.graphs else self.eager
        self.record: dict[str, Any] = dict(
            data=self.data.name,
            data_key=self.data.key,
            network=job.network,
            title=networks.TITLES[job.network],
            parameters=sum(p.numel() for p in self.model.parameters()),
            optimizer=job.optimizer,
            seed=job.seed,
            options=self.options,
            protocol=protocol(job, self.data, steps),
            machine=about,
            epochs=[],
        )

    # --- An epoch

    def epoch(self, tell: Tell) -> None:
        """One pass over the training images, then the test images; adds to the record."""
        began, number, size = perf_counter(), self.done + 1, self.job.batch_size
        lr = rounded(self.optimizer.param_groups[0]["lr"])
        rows = self.images.epoch(self.job.seed, number).split(size)
        self.model.train()
        self.sums.zero_()
        for i, some in enumerate(rows):
            self.step(some)
            if i % max(1, len(rows) // 50) == 0:
                tell((number - 1 + i / len(rows)) / self.job.epochs, "")
        train_loss, train_error = self.means(len(self.data.train_y))
        test_loss, test_error = self.test()
        figures = dict(train_loss=train_loss, train_error=train_error, test_loss=test_loss, test_error=test_error)
        if isinstance(self.optimizer, AdaBayes):
            self.points = figure3(self.optimizer, self.job.seed)
            figures |= dict(ratio=self.points["ratio_mean"], ratio_std=self.points["ratio_std"])
        self.record["epochs"].append(dict(epoch=number, lr=lr, **figures, seconds=round(perf_counter() - began, 3)))
        self.scheduler.step()
        if self.recipe.keeps_decay:
            optimizers.keep_decay(self.optimizer, self.options)

    def forward_backward(self, rows: Tensor) -> None:
        images, labels = self.images.batch(rows)
        self.optimizer.zero_grad()
        loss = self.loss_of(images, labels)
        loss.backward()

    def eager(self, rows: Tensor) -> None:
        self.forward_backward(rows)
        self.optimizer.step()

    def loss_of(self, images: Tensor, labels: Tensor) -> Tensor:
        """The mean loss; adds up losses and errors, without waiting for them."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.job.bfloat16, cache_enabled=False):
            logits = self.model(images).float()
        loss = cross_entropy(logits, labels)
        self.sums += torch.stack([loss.detach().double() * len(labels), (logits.argmax(1) != labels).sum()])
        return loss

    @torch.no_grad()
    def test(self) -> tuple[float, float]:
        self.model.eval()
        self.sums.zero_()
        for images, labels in zip(self.data.test_x.split(1000), self.data.test_y.split(1000), strict=True):
            self.loss_of(self.data.normalized(images).contiguous(memory_format=torch.channels_last), labels)
        return self.means(len(self.data.test_y))

    def means(self, n: int) -> tuple[float, float]:
        """Mean loss, and error in percent."""
        loss, errors = self.sums.tolist()
        return loss / n, 100 * errors / n

    # --- What is kept of it

    @property
    def done(self) -> int:
        return len(self.record["epochs"])

    def state(self) -> dict[str, Any]:
        parts = dict(model=self.model, optimizer=self.optimizer, scheduler=self.scheduler)
        return {"record": json.dumps(self.record)} | {name: part.state_dict() for name, part in parts.items()}

    def load(self, state: dict[str, Any], about: dict[str, Any]) -> None:
        self.record = json.loads(state["record"])
        if self.done < self.job.epochs:
            self.record.setdefault("continued", []).append({"epoch": self.done + 1, "machine": about})
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])


class Captured:
    """Forward, backward and, where the optimizer can, its step as one CUDA graph for each length of a batch.

    A length's first steps are eager: they are steps of the training, allocate what the later ones need, and let cuDNN choose.
    """

    EAGER = 3

    def __init__(self, run: Run) -> None:
        self.run, self.seen = run, dict[int, int]()
        self.graphs = dict[int, tuple[torch.cuda.CUDAGraph, Tensor, list[Tensor | None]]]()

    def __call__(self, rows: Tensor) -> None:
        n = len(rows)
        self.seen[n] = self.seen.get(n, 0) + 1
        if self.seen[n] <= self.EAGER:
            return self.run.eager(rows)
        if n not in self.graphs:
            self.graphs[n] = self.capture(rows)
        graph, static, grads = self.graphs[n]
        static.copy_(rows)
        graph.replay()
        if not self.run.recipe.captured:
            for p, grad in zip(self.run.model.parameters(), grads, strict=True):
                p.grad = grad
            self.run.optimizer.step()

    def capture(self, rows: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor, list[Tensor | None]]:
        graph, static, run = torch.cuda.CUDAGraph(), rows.clone(), self.run
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            (run.eager if run.recipe.captured else run.forward_backward)(static)
        return graph, static, [p.grad for p in run.model.parameters()]


def protocol(job: Job, data: Data, steps_per_epoch: int) -> dict[str, Any]:
    kept = {name: value for name, value in asdict(job).items() if name in ("epochs", "drop", "batch_size", "width")}
    return kept | dict(
        factor=0.1,
        train_images=len(data.train_y),
        test_images=len(data.test_y),
        steps_per_epoch=steps_per_epoch,
        augmentation=data.augmentation,
        precision="bfloat16 autocast" if job.bfloat16 else "float32",
    )


# --- A run from its beginning, or from where it was killed ------------------------------------------------------------


def train(
    job: Job, images: Augmented, folder: Path, about: dict[str, Any], tell: Tell, save_every: float = 0, keep: bool = False
) -> None:
    """Brings the run to its end, if it is not there. A checkpoint is written after the first epoch that ends ``save_every``
    seconds after the last one, and at the end too with ``keep``.

    Raises: WrongRun where the folder holds a run of that name with other settings.
    """
    written, checkpoint = folder / "runs" / f"{job.name}.json", checkpoint_of(job, folder)
    run, saved = Run(job, images, about), monotonic()
    complete = written.exists() and len(same(written, json.loads(written.read_text()), run.record)["epochs"]) == job.epochs
    if checkpoint.exists() and not complete:
        state = torch.load(checkpoint, map_location=run.device, weights_only=True)
        same(checkpoint, json.loads(state["record"]), run.record)
        run.load(state, about)
        write(written, run.record)  # it may have been killed between the two
    with on_a_stream(run):
        while run.done < job.epochs and not complete:
            run.epoch(tell)
            if job.optimizer == OURS and run.done == min(job.drop, job.epochs):
                write(written.with_suffix(FIGURE3), {"epoch": run.done, **run.points})
            ended = run.done == job.epochs
            if (ended and keep) or (not ended and monotonic() >= saved + save_every):
                with replaced(checkpoint) as path:
                    torch.save(run.state(), path)
                saved = monotonic()
            write(written, run.record)  # after the checkpoint: where it says that all is done, all is there
            last = run.record["epochs"][-1]
            tell(run.done / job.epochs, f"test error {last['test_error']:.2f} %, loss {last['test_loss']:.4f}")
    run.step = None  # or the cycle keeps the graphs' memory
    unfinished(checkpoint).unlink(missing_ok=True)
    if not keep:
        checkpoint.unlink(missing_ok=True)


def checkpoint_of(job: Job, folder: Path) -> Path:
    return folder / "checkpoints" / f"{job.name}.pt"


def same(path: Path, found: dict[str, Any], expected: dict[str, Any]) -> dict[str, Any]:
    """The run that is there. Raises: WrongRun where it is one of other settings."""
    expected = json.loads(json.dumps(expected))
    other = [
        f"{k} was {found.get(k)}, now {expected[k]}"
        for k in expected
        if k not in ("machine", "epochs") and found.get(k) != expected[k]
    ]
    if other:
        raise WrongRun(f"{path} is of a run of other settings ({'; '.join(other)}): give those, or another --output")
    return found


@contextmanager
def on_a_stream(run: Run) -> Iterator[None]:
    """A stream that is not the default one, which cannot be captured."""
    if not run.graphs:
        yield
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A path to write to, which takes the place of the file in one move: a kill leaves the old or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    yield unfinished(path)
    os.replace(unfinished(path), path)


def unfinished(path: Path) -> Path:
    return path.with_name(f".{path.name}")


def write(path: Path, content: dict[str, Any]) -> None:
    with replaced(path) as there:
        there.write_text(json.dumps(content) + "\n")
