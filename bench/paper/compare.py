"""The numbers of Table 1, and how far apart two optimizers are.

Standard errors. The binomial error of an error rate p, sqrt(p (1 - p) / n) over n test images, is what another draw of test
images would change. It is the same for one run and for the mean over seeds: all seeds saw the same images, so more seeds do not
average it away; nor does it hold what another training would change, which is the spread between seeds. The difference between
two optimizers has the variance ``s^2 (1 / k1 + 1 / k2) + (p1 (1 - p1) + p2 (1 - p2)) / n``: k1 and k2 are the numbers of seeds,
s^2 is the variance between seeds, pooled over all optimizers of the table since three seeds alone say little of a variance. The
second part takes the two as if they had seen different images. It is an upper bound: networks err together on the same images,
how much only a record of which images were wrong could tell. The first part alone is the lower bound, right where both
optimizers' networks find the same images hard. Losses have only that, and no standard error where each optimizer has one seed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from . import reported
from .runs import Group


class Measure(NamedTuple):
    """Its key in an epoch, its place in Table 1's pair, the digits it is shown with."""

    key: str
    place: int
    digits: int


ERROR = Measure("test_error", 0, 2)
LOSS = Measure("test_loss", 1, 4)


class Sample(NamedTuple):
    """An optimizer's complete runs: the minimum over the epochs and the last epoch's, each (seeds,)."""

    least: np.ndarray
    last: np.ndarray

    @property
    def mean(self) -> float:
        return float(self.least.mean())

    @property
    def spread(self) -> float | None:
        """Standard deviation between seeds."""
        return float(self.least.std(ddof=1)) if len(self.least) > 1 else None


def sample(runs: Iterable[Mapping[str, Any]], measure: Measure) -> Sample:
    curves = [np.array([epoch[measure.key] for epoch in run["epochs"]], dtype=float) for run in runs]
    return Sample(np.array([np.fmin.reduce(curve) for curve in curves]), np.array([curve[-1] for curve in curves]))


def binomial(percent: float, images: int) -> float:
    """Standard error, in percent points, of an error in percent on so many images."""
    return math.sqrt(percent * (100 - percent) / images)


def pooled_variance(samples: Iterable[Sample]) -> float | None:
    """Within the samples; none where all have one seed."""
    several = [s.least for s in samples if len(s.least) > 1]
    freedom = sum(len(least) - 1 for least in several)
    return sum(float(((least - least.mean()) ** 2).sum()) for least in several) / freedom if freedom else None


class Difference(NamedTuple):
    """``second`` less ``first``, and its standard error."""

    first: str
    second: str
    value: float
    error: float

    @property
    def level(self) -> int:
        """2, 1, 0: it exceeds two, one, no standard error."""
        return (abs(self.value) > self.error) + (abs(self.value) > 2 * self.error)


class Comparison(NamedTuple):
    """Samples of one measure, by optimizer, with what makes their standard errors; ``images`` is 0 where they are not counted."""

    samples: dict[str, Sample]
    pooled: float | None
    images: int

    def difference(self, first: str, second: str) -> Difference | None:
        """None where there is no standard error."""
        a, b = self.samples[first], self.samples[second]
        seeds = [] if self.pooled is None else [self.pooled * (1 / len(a.least) + 1 / len(b.least))]
        images = [binomial(x.mean, self.images) ** 2 for x in (a, b)] if self.images else []
        return Difference(first, second, b.mean - a.mean, math.sqrt(sum(seeds + images))) if seeds + images else None

    def alone(self) -> Comparison:
        """Without the test images' part."""
        return self._replace(images=0)

    @property
    def counted(self) -> str:
        """What the standard errors hold; empty where there are none."""
        seeds, images = self.pooled is not None, self.images > 0
        return "Seeds and test images" if seeds and images else "Seeds alone" if seeds else "Test images alone" if images else ""

    def ways(self) -> list[Comparison]:
        """Whole and, where that is something else, with seeds alone; empty where there are no standard errors."""
        return [way for way in ([self, self.alone()] if self.images else [self]) if way.counted]


def comparison(group: Group, measure: Measure) -> Comparison:
    """Without optimizers that have a run where the measure is never finite."""
    samples = {name: sample(runs, measure) for name, runs in group.complete.items()}
    samples = {name: found for name, found in samples.items() if math.isfinite(found.mean)}
    return Comparison(samples, pooled_variance(samples.values()), group.protocol["test_images"] if measure is ERROR else 0)


def rows(group: Group) -> list[dict[str, Any]]:
    """A row per optimizer that has a complete run; None where there is no number."""
    return [_row(group, name, runs) for name, runs in group.complete.items()]


def _row(group: Group, name: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    error, loss = sample(runs, ERROR), sample(runs, LOSS)
    paper = reported.TABLE_1.get((*group.paper, name), (None, None))
    return dict(
        data=group.first["data"],
        network=group.first["network"],
        optimizer=name,
        seeds=len(runs),
        error=error.mean,
        error_sd=error.spread,
        error_binomial=binomial(error.mean, group.protocol["test_images"]),
        error_last=float(error.last.mean()),
        loss=loss.mean,
        loss_sd=loss.spread,
        loss_last=float(loss.last.mean()),
        paper_of=group.paper_title,
        paper_error=paper[0],
        paper_loss=paper[1],
    )


class Pair(NamedTuple):
    """Two optimizers, the one that is lower here first, and the paper's difference.

    ``way`` is 1 where the paper has them in the same order, -1 in the other, 0 where either ties them.
    """

    ours: Difference
    paper: float

    @property
    def way(self) -> int:
        return int(np.sign(self.ours.value * self.paper))


def pairs(found: Comparison, ranked: list[str], paper: Mapping[str, float]) -> list[Pair]:
    """All pairs of the ranked that have a standard error."""
    differences = [found.difference(*two) for two in itertools.combinations(ranked, 2)]
    return [Pair(d, paper[d.second] - paper[d.first]) for d in differences if d]
