"""Two small trainings that studies repeat with other options: a transformer on the characters of a text, a convolutional network
on images."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from .paper import networks
from .paper.data import Data
from .paper.jobs import spread


class Source(Protocol):
    """A network and what it learns from. ``examples``: the terms that the mean loss of a batch averages over."""

    examples: int

    def model(self) -> nn.Module: ...

    def some(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """A batch: inputs, and labels (examples,)."""

    def all_tests(self) -> list[tuple[Tensor, Tensor]]: ...


class Characters(nn.Module):
    def __init__(self, vocabulary: int, length: int, width: int = 64, depth: int = 2) -> None:
        super().__init__()
        self.characters, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        layer = functools.partial(nn.TransformerEncoderLayer, width, 2, 4 * width, 0.0, batch_first=True, norm_first=True)
        self.blocks = nn.ModuleList(layer() for _ in range(depth))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, vocabulary))
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(length))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.characters(ids) + self.positions.weight
        for block in self.blocks:
            x = block(x, src_mask=self.mask, is_causal=True)
        return self.head(x).flatten(0, 1)


class Text:
    """Windows of 64 characters, 16 a batch. The last tenth of the text is for testing, or ``tests`` windows of it."""

    length, batch = 64, 16

    def __init__(self, content: bytes, tests: int | None = None) -> None:
        used, ids = torch.tensor(list(content)).unique(return_inverse=True)
        self.vocabulary, cut, self.tests = len(used), len(ids) * 9 // 10, tests
        self.train, self.test = ids[:cut], ids[cut:]
        self.examples = self.batch * self.length  # characters, of which the loss is the mean

    def model(self) -> nn.Module:
        return Characters(self.vocabulary, self.length)

    def _windows(self, ids: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        windows = ids[starts[:, None] + torch.arange(self.length + 1)]
        return windows[:, :-1], windows[:, 1:].flatten()

    def some(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return self._windows(self.train, torch.randint(len(self.train) - self.length, (self.batch,), generator=generator))

    def all_tests(self) -> list[tuple[Tensor, Tensor]]:
        starts = torch.arange(0, len(self.test) - self.length, self.length)
        some = starts[spread(len(starts), self.tests or len(starts))]  # neighbours are alike
        return [self._windows(self.test, part) for part in some.split(128)]


class Images:
    """Batches of 64 images, as they are."""

    examples = 64

    def __init__(self, data: Data) -> None:
        self.data, self.test = data, data.normalized(data.test_x)

    def model(self) -> nn.Module:
        return networks.make("small", self.data.channels, self.data.classes)

    def some(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(self.data.train_y), (self.examples,), generator=generator)
        return self.data.normalized(self.data.train_x[rows]), self.data.train_y[rows]

    def all_tests(self) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.test.split(1000), self.data.test_y.split(1000), strict=True))


class Fitted(NamedTuple):
    """Mean losses, of the last tenth of the steps' batches and of the tests; the part of the tests that is told wrongly, in %."""

    train_loss: float
    test_loss: float
    test_error: float


def fit(
    source: Source,
    model: nn.Module,
    optimizer: Optimizer,
    step: Callable[[], None],
    steps: int,
    generator: torch.Generator,
    tell: Callable[[float], None] = lambda part: None,
) -> Fitted:
    """Trains and tests. lr rises for a twentieth of the steps, then falls to a tenth as a cosine. ``step`` updates weights."""
    warmup = max(1, steps // 20)
    schedule = LambdaLR(optimizer, lambda t: min(t / warmup, 0.55 + 0.45 * math.cos(math.pi * t / steps)))
    losses = []
    for t in range(steps):
        x, y = source.some(generator)
        model.zero_grad()
        loss = cross_entropy(model(x), y)
        loss.backward()
        step()
        schedule.step()
        losses.append(loss.detach())
        if t % max(1, steps // 50) == 0:
            tell(t / steps)
    return Fitted(float(torch.stack(losses[-max(1, steps // 10) :]).mean()), *tested(source, model))


@torch.no_grad()
def tested(source: Source, model: nn.Module) -> tuple[float, float]:
    """Mean loss, and error in percent."""
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64)
    for x, y in source.all_tests():
        logits = model(x)
        sums += torch.tensor([float(cross_entropy(logits, y, reduction="sum")), int((logits.argmax(1) != y).sum()), len(y)])
    loss, errors, n = sums.tolist()
    return loss / n, 100 * errors / n
