"""Table 1 and what it says, from the JSON of a results folder alone."""

from __future__ import annotations

import csv
import itertools
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from scipy import stats

from ..machine import caption
from . import reported
from .compare import ERROR, LOSS, Comparison, Difference, Measure, Pair, binomial, comparison, pairs, rows
from .runs import OURS, Group, groups, original, read

SOURCE = "Each run's JSON holds its machine, versions, commit and command."
LEVELS = {2: "by more than two standard errors", 1: "by one to two standard errors", 0: "within one standard error"}


def protocol(group: Group) -> str:
    """What was done, and what of it is not as in the paper."""
    p = group.protocol
    did = (
        f"{p['epochs']} epochs, learning rates times {p['factor']:g} after epoch {p['drop']}, batches of {p['batch_size']}, "
        f"{p['train_images']:,} training and {p['test_images']:,} test images, {p['augmentation']}, {p['precision']}; "
        f"{group.title}, {group.first['parameters']:,} parameters"
    )
    theirs = dict(reported.PROTOCOL, data=reported.DATA[group.paper[0]], title=reported.NETWORKS[group.paper[1]])
    ours = p | {key: group.first[key] for key in ("data", "title")}
    names = {"drop": "drop after epoch", "train_images": "training images", "title": "network"}
    bounded = {"AdaBound", "AMSBound"} & group.complete.keys() and p["epochs"] * p["steps_per_epoch"] != reported.STEPS
    changed = [
        f"{names.get(key, key).replace('_', ' ')} {_plain(ours[key])} ({_plain(value)})"
        for key, value in theirs.items()
        if ours[key] != value
    ]
    changed += ["AdaBound's gamma (so that gamma x steps stays the paper's)"] if bounded else []
    scaled = f"Scaled down or changed, in brackets the paper's: {', '.join(changed)}." if changed else "As in the paper."
    return f"Protocol: {did}. {scaled}"


def _plain(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def notes(group: Group) -> list[str]:
    """How the table is to be read."""
    return [
        "Minimal: the minimum over the epochs on the test set, of error and loss apart, as the paper takes it; then the mean "
        "over seeds. A minimum flatters, the more the noisier the curve; the last epoch stands beside it. Best in bold.",
        "sd: between seeds, what another training changes (- with one seed). Binomial: sqrt(p (1 - p) / n) over n test images, "
        "what another draw of test images changes. It is the same for one run and for the mean over seeds, as all seeds saw the "
        "same images, and holds nothing of what another training changes.",
        "In three things the authors' code differs from the rows AdaBayes and AdaBayes-FP: it has the exact transition instead "
        "of Eq. 16b, a posterior variance that is not rescaled where the learning rate drops, and for AdaBayes-FP a decay that "
        "does not fall with it. The variants take these choices. "
        "And the paper dampens its averages: eta_SGD = 0.1 moves a weight a tenth as far as the row SGD does, whose lr is 0.1 "
        "without; with sgd_lr=1 it goes as far.",
        _note_on_differences(*(comparison(group, measure).pooled for measure in (ERROR, LOSS))),
    ]


def _note_on_differences(error: float | None, loss: float | None) -> str:
    if error is None:
        return (
            "± is the standard error of a difference. With one seed each, the spread between seeds is unknown: the error has the "
            "binomial one of both, which holds nothing of what another training changes; the loss has none."
        )
    seeds = f"{math.sqrt(error):.2f} %" + ("" if loss is None else f" and {math.sqrt(loss):.4f}")
    return (
        "± is the standard error of a difference: the variance between seeds, pooled over all optimizers "
        f"(sd {seeds}), over the number of seeds of each, and for the error the binomial variance of both. The latter is an "
        "upper bound, as networks err together on the same images; seeds alone is the lower bound. Of pairs that do not "
        "differ, about 5 % are more than two of the latter apart all the same, more where few runs tell the variance."
    )


def figure3(group: Group) -> list[str]:
    """How far AdaBayes's variances are from Eq. 20 before the learning rate drops."""
    p, runs = group.protocol, group.complete.get(OURS, [])
    ratios = [run["epochs"][min(p["drop"], p["epochs"]) - 1].get("ratio") for run in runs]
    found = [ratio for ratio in ratios if ratio is not None and math.isfinite(ratio)]
    if not found:
        return []
    mean, steps = sum(found) / len(found), min(p["drop"], p["epochs"]) * p["steps_per_epoch"]
    options = runs[0]["options"]
    memory = options["sgd_lr"] / (options["lr"] ** 2 * options["batch_size"])  # sigma^2 / eta^2, of Eq. 16b
    return [
        f"sigma^2_post over Eq. 20, the mean over all weights, before the learning rate drops: {mean:.4f} "
        f"({', '.join(f'{ratio:.4f}' for ratio in found)} by seed), {'within' if abs(mean - 1) <= 0.05 else 'not within'} 5 %. "
        f"Eq. 20 is for steady gradients; the filter's memory is {memory:,.0f} steps, <g^2>'s 1,000, and {steps:,} had passed."
    ]


def leftovers(group: Group) -> list[str]:
    """Runs that are not in the table, and those that are missing."""
    lines = [
        f"{run['optimizer']}, seed {run['seed']}: not complete, {len(run['epochs'])} of {run['protocol']['epochs']} epochs."
        for run in group.incomplete
    ]
    begun = {(run["optimizer"], run["seed"]) for run in group.incomplete}
    ended = {(name, run["seed"]) for name, runs in group.complete.items() for run in runs}
    seeds = {seed for _, seed in ended}
    for name in group.complete:
        missing = [seed for seed in sorted(seeds) if (name, seed) not in begun | ended]
        lines += [f"{name}, seed {seed}: no run." for seed in missing]
    absent = [name for name in reported.ORDER if name not in {other for other, _ in begun | ended}]
    return lines + ([f"No run: {', '.join(absent)}."] if absent else [])


def sentences(group: Group, measure: Measure) -> list[str]:
    """What the table says of one measure."""
    found = comparison(group, measure)
    ranked = sorted((name for name in found.samples if name in reported.ORDER), key=lambda name: found.samples[name].mean)
    diverged = [name for name in group.complete if name not in found.samples]
    lines = [f"Not finite, and left out: {', '.join(diverged)}."] if diverged else []
    if not found.ways():
        lines.append("With one seed each there is no standard error: no difference can be told from chance.")
    if OURS in ranked:
        lines += [f"{way.counted}: {_by_level(way, ranked, measure)}." for way in found.ways() if len(ranked) > 1]
    lines += _neighbours(found, ranked, measure)
    lines += _agreement(found, ranked, measure, group)
    return lines + [_variant(found, name, measure) for name in found.samples if name != original(name) in found.samples]


def _by_level(found: Comparison, ranked: list[str], measure: Measure) -> str:
    """Which differ from AdaBayes."""
    differences = [d for d in (found.difference(OURS, name) for name in ranked if name != OURS) if d]
    parts = []
    for level, sign in ((2, -1), (1, -1), (0, 0), (1, 1), (2, 1)):
        some = [f"{d.second} ({_shown(d, measure)})" for d in differences if d.level == level and d.value * sign >= 0]
        where = f"{'higher' if sign > 0 else 'lower'} than {OURS} {LEVELS[level]}" if sign else f"{LEVELS[level]} of {OURS}"
        parts += [f"{where}: {', '.join(some)}"] if some else []
    return "; ".join(parts)


def _shown(d: Difference, measure: Measure) -> str:
    return f"{d.value:+.{measure.digits}f} ± {d.error:.{measure.digits}f}"


def _variant(found: Comparison, name: str, measure: Measure) -> str:
    before, after = (found.samples[one].mean for one in (original(name), name))
    by_way = [(way.counted, way.difference(original(name), name)) for way in found.ways()]
    verdicts = [f"± {d.error:.{measure.digits}f}, {LEVELS[d.level]} ({counted.lower()})" for counted, d in by_way if d]
    return f"{name}, against {original(name)}: {after - before:+.{measure.digits}f}" + "; ".join(["", *verdicts])[1:] + "."


def _neighbours(found: Comparison, ranked: list[str], measure: Measure) -> list[str]:
    line = "In order: " + ", ".join(f"{name} {found.samples[name].mean:.{measure.digits}f}" for name in ranked) + "."
    differences = [d for d in (found.difference(a, b) for a, b in itertools.pairwise(ranked)) if d]
    apart = {level: [f"{d.first} and {d.second}" for d in differences if d.level == level] for level in LEVELS}
    if differences:
        line += (
            f" Neighbours more than two standard errors apart: {', '.join(apart[2]) or 'none'}; one to two: "
            f"{', '.join(apart[1]) or 'none'}; within one: {len(apart[0])} of {len(differences)}."
        )
    return [line] if ranked else []


def _agreement(found: Comparison, ranked: list[str], measure: Measure, group: Group) -> list[str]:
    """Our order beside the paper's."""
    if len(ranked) < 3:
        return []
    paper = {name: reported.TABLE_1[(*group.paper, name)][measure.place] for name in ranked}
    tau = stats.kendalltau([found.samples[name].mean for name in ranked], [paper[name] for name in ranked])
    lines = [f"The paper's order ({group.paper_title}): Kendall's tau {tau.statistic:.2f} (p = {tau.pvalue:.2g})."]
    lines += [f"{way.counted}: {_standing(pairs(way, ranked, paper))}." for way in found.ways()]
    for level in (2, 1) if found.ways() else ():
        turned = [
            _turned(pair, paper, measure) for pair in pairs(found, ranked, paper) if pair.way < 0 and pair.ours.level == level
        ]
        lines += [f"The other way round {LEVELS[level]}: {'; '.join(turned)}."] if turned else []
    return lines


def _standing(every: list[Pair]) -> str:
    counts = {(way, level): sum(p.way == way and p.ours.level >= level for p in every) for way in (1, -1) for level in (1, 2)}
    close = sum(not pair.ours.level for pair in every)
    tied = len(every) - close - counts[1, 1] - counts[-1, 1]
    return (
        f"of {len(every)} pairs {counts[1, 1]} stand as in the paper ({counts[1, 2]} of them by more than two standard errors), "
        f"{counts[-1, 1]} the other way round ({counts[-1, 2]}), {close} are within one standard error, not distinguishable here"
        + (f", {tied} are tied in the paper" if tied else "")
    )


def _turned(pair: Pair, paper: Mapping[str, float], measure: Measure) -> str:
    """A pair that stands the other way round; the paper has one run of each."""
    first, second = pair.ours.first, pair.ours.second
    chance = math.hypot(*(binomial(paper[name], reported.TEST_IMAGES) for name in (first, second))) if measure is ERROR else 0
    itself = ", itself within one binomial standard error" if abs(pair.paper) <= chance else ""
    return (
        f"{first} below {second} ({-pair.ours.value:.{measure.digits}f} ± {pair.ours.error:.{measure.digits}f}; "
        f"the paper {-pair.paper:+.{measure.digits}f}{itself})"
    )


def captions(found: Iterable[Group]) -> str:
    """The machine of the first run, and how many others there are."""
    every = [run for group in found for runs in (*group.complete.values(), group.incomplete) for run in runs]
    lines = list(dict.fromkeys(caption(run["machine"]) for run in every))
    return lines[0] + (f", and {len(lines) - 1} more (machines, versions or days)" if len(lines) > 1 else "")


# --- What is shown and written ----------------------------------------------------------------------------------------

COLUMNS = {  # heading: where it stands in a row, how it is shown
    "seeds": ("seeds", "{}"),
    "minimal\ntest\nerror, %": ("error", "{:.2f}"),
    "sd": ("error_sd", "{:.2f}"),
    "bino-\nmial": ("error_binomial", "{:.2f}"),
    "last\nepoch's\nerror, %": ("error_last", "{:.2f}"),
    "minimal\ntest\nloss": ("loss", "{:.4f}"),
    "sd ": ("loss_sd", "{:.4f}"),
    "last\nepoch's\nloss": ("loss_last", "{:.4f}"),
    "paper's\nerror, %": ("paper_error", "{:.2f}"),
    "paper's\nloss": ("paper_loss", "{:.3f}"),
}
WIDE, NARROW = 130, ("optimizer", "seeds", "minimal", "sd", "last")  # a narrower screen shows the columns that begin so
BEST = ("error", "error_last", "loss", "loss_last", "paper_error", "paper_loss")  # the lowest is bold


def cells(found: list[dict[str, Any]], bold: str) -> list[list[str]]:
    """The rows as text; ``bold`` is a pattern for what is best in its column."""
    lines = [["-" if row[key] is None else form.format(row[key]) for key, form in COLUMNS.values()] for row in found]
    for at, (key, form) in enumerate(COLUMNS.values()):
        values = [row[key] for row in found if row[key] is not None and math.isfinite(row[key])]
        for line in lines if key in BEST and values else []:
            if line[at] == form.format(min(values)):
                line[at] = bold.format(line[at])
    return [[row["optimizer"], *line] for row, line in zip(found, lines, strict=True)]


def headings(group: Group) -> list[str]:
    """The paper's columns are headed by what they are of."""
    data, network = group.paper_title.split(" ")
    return ["optimizer", *(f"{name}\n{data}\n{network}" if name.startswith("paper's") else name for name in COLUMNS)]


def order_only(group: Group) -> list[str]:
    """Said where the paper's columns are of other data, or of another network, than the group's."""
    same = group.title == group.paper_title
    return [] if same else [f"The paper's numbers are of {group.paper_title}: only the order of the optimizers can be compared."]


def paragraphs(group: Group) -> dict[str, list[str]]:
    """What stands beneath the table, by heading."""
    parts = {
        "": [protocol(group), *order_only(group), *notes(group), f"{captions([group])}. {SOURCE}"],
        "Not in the table": leftovers(group),
        "Figure 3": figure3(group),
        "Minimal test error": sentences(group, ERROR),
        "Minimal test loss": sentences(group, LOSS),
    }
    return {heading: lines for heading, lines in parts.items() if lines}


def markdown(group: Group) -> str:
    names = [" ".join(name.replace("-\n", "").split()) for name in headings(group)]
    table = [names, ["---", *["--:"] * (len(names) - 1)], *cells(rows(group), "**{}**")]
    lines = ["| " + " | ".join(line) + " |" for line in table]
    for heading, some in paragraphs(group).items():
        lines += ["", *([f"### {heading}", ""] if heading else []), *(f"- {line}" for line in some)]
    return "\n".join([f"## {group.title}", "", *lines, ""])


def write(folder: Path) -> list[Path]:
    """Writes table.md and table.csv; returns their paths. Raises what ``read`` and ``groups`` do."""
    found = groups(read(folder))
    written = [folder / "table.md", folder / "table.csv"]
    written[0].write_text("\n".join(["# Table 1", "", *map(markdown, found)]))
    with written[1].open("w", newline="") as file:
        every = [row for group in found for row in rows(group)]
        writer = csv.DictWriter(file, list(every[0]) if every else [])
        writer.writeheader()
        writer.writerows(every)
    return written


def show(folder: Path, console: Console) -> None:
    for group in groups(read(folder)):
        table = Table(title=escape(group.title), title_justify="left", padding=0)
        columns = list(zip(headings(group), *cells(rows(group), "[bold]{}[/bold]"), strict=True))
        if console.width < WIDE:
            columns = [column for column in columns if column[0].startswith(NARROW)]
        for name, *_ in columns:
            first = name == "optimizer"
            table.add_column(name, justify="left" if first else "right", no_wrap=not first)
        for line in zip(*(column[1:] for column in columns), strict=True):
            table.add_row(*line)
        console.print(table)
        for heading, lines in paragraphs(group).items():
            console.print(f"\n[bold]{heading}[/bold]" if heading else "")
            for line in lines:
                console.print(Padding(escape(line), (0, 0, 0, 2)), highlight=False)
