"""``python -m bench``: optimizer steps, their memory, their kernels, and how they scale, against peers and against the floor.

Every fused contender first has to give the slow path's weights; one that does not is not timed and makes the exit status 1.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from . import floor, host, kernels, machine, memory, report, scaling, shapes, step, timing
from .contenders import contenders

PARTS = ("step", "memory", "kernels", "scaling")  # and "host", where there is a GPU or the stand-in for one


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=(__doc__ or "").partition(": ")[2].partition("\n")[0])
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"what is measured, of {', '.join(PARTS)}, all if none is given; or host"
    )
    parser.add_argument("--quick", action="store_true", help="small cases, two minutes")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="folder; default: bench/results/DATE-DEVICE")
    parser.add_argument("--overwrite", action="store_true", help="even if the folder holds results")
    parser.add_argument(
        "--cases",
        nargs="+",
        metavar="CASE",
        help=f"{', '.join(shapes.NETWORKS)}, or 24x1M and the like; :bfloat16, :clipped and :scaled may follow",
    )
    parser.add_argument("--contenders", nargs="+", metavar="NAME", help="these alone, beside torch's fused AdamW")
    parser.add_argument("--rounds", type=int, default=100, help="at most so many turns of each contender")
    parser.add_argument("--budget", type=float, help="seconds of turns per case, once each has had three")
    parser.add_argument("--compile-at-most", type=int, metavar="TENSORS", help="longer lists are not given to torch.compile")
    options = parser.parse_args(argv)
    check_names(parser, options)
    if "host" in options.parts and options.device != "cuda":
        parser.error("host is of steps on a GPU; there is none here (allowed: a GPU, or tests/fakecuda, the stand-in for one)")
    now = datetime.datetime.now()
    options.output = options.output or Path(__file__).parent / "results" / f"{now:%Y-%m-%d-%H%M%S}-{options.device}"
    if (options.output / "results.json").exists() and not options.overwrite:
        parser.error(f"{options.output} holds results; name another --output, or say --overwrite")
    options.budget = options.budget if options.budget is not None else 3 if options.quick else 30
    options.compile_at_most = options.compile_at_most or (1 if options.quick else 24)
    return options


def check_names(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    known = contenders(options.device)
    for given, allowed in ((options.parts, (*PARTS, "host")), (options.contenders or (), known)):
        for name in given:
            if name not in allowed:
                parser.error(f"there is no {name!r} (allowed: {', '.join(allowed)})")
    try:
        for name in options.cases or ():
            shapes.case_of(name)
    except ValueError as error:
        parser.error(str(error))


def jobs(options: argparse.Namespace) -> Iterator[tuple]:
    """(what, case, function, its arguments) of everything asked for."""
    parts = options.parts or PARTS
    if "step" in parts:
        for case in options.cases or (shapes.QUICK if options.quick else shapes.default_cases(options.device)):
            yield "step", case, step.measure, ("step", case, options)
    if "memory" in parts:
        for case in options.cases or (["8x100K"] if options.quick else ["resnet34"]):
            yield "memory", case, memory.measure, (case, options)
    if "kernels" in parts:
        for target in ["sm_90"] if options.quick else kernels.TARGETS:
            for compiler in ("cuda", "triton") if target.startswith("sm") else ("triton",):
                yield "kernels", f"{compiler} {target}", kernels.measure, (compiler, target, options)
    if "host" in parts:
        for case in options.cases or host.LISTS:
            yield "host", case, host.measure, (case, options)
    if "scaling" in parts:
        small = argparse.Namespace(**vars(options) | dict(contenders=scaling.CONTENDERS, budget=options.budget / 3))
        for case in options.cases or scaling.points(options.quick):
            yield "scaling", case, step.measure, ("scaling", case, small)


def run(options: argparse.Namespace, console: Console, about: dict) -> list[dict]:
    """The rows of every job, shown and written as they come; a job that dies is a row that says so."""
    rows: list[dict] = []
    todo, log = list(jobs(options)), options.output / "log.txt"
    columns = (TextColumn("{task.description:24}"), BarColumn(), TimeElapsedColumn(), TextColumn("{task.fields[doing]}"))
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=len(todo), doing="")
        for done, (what, case, job, arguments) in enumerate(todo):
            progress.update(bar, completed=done, description=f"{what} {case}", doing="")

            def tell(part: float, doing: str, done=done) -> None:
                progress.update(bar, completed=done + part, doing=doing)

            try:
                found = timing.in_a_process(job, arguments, tell, log)
            except RuntimeError as error:
                found = [
                    dict(what=what, case=case, title=case, contender=case, note=str(error), wrong=True, family="", detail=True)
                ]
                found[0] |= dict(compiler=case, target="")
            report.show(found, console)
            rows += found
            report.write(options.output, about, rows)  # a run that is cut leaves what it has
        progress.update(bar, completed=len(todo), description="done", doing="")
    return rows


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    console = Console()
    if not console.is_terminal:
        console.width = 150
    options.output.mkdir(parents=True, exist_ok=True)
    about = machine.about(options.device)
    with TemporaryDirectory() as folder:
        options.floor = floor.build(Path(folder)) if options.device == "cpu" else (None, "")
        rows = run(options, console, about)
    from . import pictures  # here, as each job's process imports this file

    written = report.write(options.output, about, rows) + pictures.draw(options.output, machine.caption(about), rows)
    console.print("Written:", *written, sep="\n  ", soft_wrap=True)
    wrong = [row for row in rows if row["wrong"]]
    for row in wrong:
        console.print(f"[bold red]{row['what']} {row.get('case', '')}: {row['contender']}: {row['note']}", soft_wrap=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
