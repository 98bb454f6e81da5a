"""``python -m bench.paper``: the paper's experiments, from the data to tables and pictures.

    python -m bench.paper digits                                   minutes on two cores
    python -m bench.paper fashion --jobs 2                         an hour
    python -m bench.paper cifar10 --folder cifar-10-batches-bin    ResNet-34, on a GPU
    python -m bench.paper report FOLDER                            tables and pictures again, from the JSON alone
    python -m bench.paper theory                                   Section 2 and Appendix C, from numbers
    python -m bench.paper sgd_lr --jobs 2                          an hour: which lr and sgd_lr train well, beside AdamW

Killed at any moment, the same command goes on. What the data's commands train: every row of Table 1, unless --optimizers
names some.
"""

from __future__ import annotations

import argparse
import importlib.util
import shlex
import sys
from collections.abc import Callable, Iterable
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NoReturn

import torch
from rich.console import Console
from rich.markup import escape

from bench import machine

from . import data, networks, runs, sgd_lr
from .jobs import Plan, claimed, measure_gradients, run_all
from .optimizers import OPTIMIZERS, ORDER, TABLE1, VARIANTS
from .train import Job, WrongRun

RUNS = Path("runs")
# Network, epochs, seeds, where nothing else is said; CIFAR's are the paper's. lr drops after three quarters, as there.
DEFAULTS = {
    "digits": ("small", 60, [0, 1, 2]),
    "fashion": ("small", 12, [0, 1, 2]),
    "cifar10": ("resnet34", 200, [0]),
    "cifar100": ("resnet34", 200, [0]),
}


PACKAGES = ("matplotlib", "pytorch_optimizer", "scipy", "sklearn")  # else it would show after hours


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.paper", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for key, title in data.NAMES.items():
        add_training(commands.add_parser(key, help=f"train on {title}"), key)
    report = commands.add_parser("report", help="tables and pictures of what a folder holds")
    report.add_argument("output", type=Path, metavar="FOLDER")
    commands.add_parser("theory", help="Section 2 and Appendix C").add_argument(
        "--output", type=Path, default=RUNS / "paper-theory", metavar="FOLDER"
    )
    add_study(commands.add_parser("sgd_lr", help="a grid of lr and sgd_lr on images and on text, beside AdamW"))
    options = parser.parse_args(argv)
    if options.command in data.NAMES:
        complete(options, parser.error)
    if options.command == "sgd_lr":
        above_0(options, parser.error, "steps", "jobs")
    return options


def quoted(names: Iterable[str]) -> str:
    return ", ".join(map(shlex.quote, names))


def add_training(parser: argparse.ArgumentParser, key: str) -> None:
    network, epochs, seeds = DEFAULTS[key]
    add = parser.add_argument
    if key != "digits":
        where = data.DEBIAN if key == "fashion" else None
        add("--folder", type=Path, default=where, required=where is None, help=data.WHERE[key])
    add("--name", help="what the tables call the data, if they are no originals")
    add("--network", choices=networks.TITLES, default=network, help=f"{network}, if not given")
    add("--width", type=float, default=1.0, help="of the network's channels; 1 is the paper's")
    add(
        "--optimizers",
        nargs="+",
        choices=OPTIMIZERS,
        default=list(TABLE1),
        metavar="NAME",
        help=f"of {quoted(OPTIMIZERS)}; all of Table 1, if not given",
    )
    add("--variants", action="store_true", help=f"too: {quoted(VARIANTS)}")
    add("--seeds", nargs="+", type=int, default=seeds, metavar="N", help=f"{' '.join(map(str, seeds))}, if not given")
    add("--epochs", type=int, default=epochs, help=f"{epochs}, if not given")
    add("--drop", type=int, help="epochs after which lr is divided by ten; three quarters of all, if not given")
    add("--images", type=int, help="of training and of testing at most so many, evenly spaced; else all")
    add("--no-appendix", action="store_true", help="without Appendix A and B, at the end of AdaBayes's first run")
    add("--jobs", type=int, default=1, help="runs at a time, each with its share of the threads; 1, if not given")
    add("--save-every", type=float, default=30, metavar="SECONDS", help="between a run's checkpoints; 30, if not given")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--eager", action="store_true", help="on a GPU too, where training steps are CUDA graphs")
    add("--float32", action="store_true", help="on a GPU too, where bfloat16 autocast is usual here")
    add("--output", type=Path, help="folder; runs/paper-DATA-NETWORK, if not given")


def add_study(parser: argparse.ArgumentParser) -> None:
    found = "fashion" if data.DEBIAN.is_dir() else "digits"
    add = parser.add_argument
    add("--data", choices=("fashion", "digits"), default=found, help=f"the images; {found}, if not given")
    add("--folder", type=Path, help=f"of fashion: {data.WHERE['fashion']}")
    add("--tasks", nargs="+", choices=sgd_lr.TASKS, default=list(sgd_lr.TASKS), metavar="TASK", help="image text, if not given")
    add("--seeds", nargs="+", type=int, default=[0, 1], metavar="N", help="0 1, if not given")
    add("--lr", nargs="+", type=float, choices=sgd_lr.LRS, default=list(sgd_lr.LRS), metavar="LR", help=f"of {sgd_lr.LRS}; all")
    steps = ", ".join(f"{steps} for {task}" for task, steps in sgd_lr.TASKS.items())
    add("--steps", type=int, help=f"of each run; {steps}, if not given")
    add("--jobs", type=int, default=1, help="runs at a time, each with its share of the threads; 1, if not given")
    add("--output", type=Path, default=RUNS / "sgd-lr", metavar="FOLDER", help="runs/sgd-lr, if not given")


def above_0(options: argparse.Namespace, error: Callable[[str], NoReturn], *names: str) -> None:
    for name in names:
        if (value := getattr(options, name)) is not None and value < 1:
            error(f"--{name} {value} is not above 0")


def complete(options: argparse.Namespace, error: Callable[[str], NoReturn]) -> None:
    above_0(options, error, "epochs", "jobs", "images", "drop")
    if not 0 < options.width <= 4:
        error(f"--width {options.width} is not in (0, 4]")
    if options.device == "cuda" and not torch.cuda.is_available():
        error("--device cuda: this torch sees no GPU")
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        error(f"not installed: {', '.join(missing)}; pip install -e '.[paper]'")
    options.drop = options.drop or max(1, options.epochs * 3 // 4)
    options.output = options.output or RUNS / f"paper-{options.command}-{options.network}"


def plan_of(options: argparse.Namespace) -> Plan:
    names = sorted({*options.optimizers, *(VARIANTS if options.variants else ())}, key=ORDER.index)
    jobs = [
        Job(options.network, name, seed, options.epochs, options.drop, width=options.width,
            bfloat16=options.device == "cuda" and not options.float32, graphs=not options.eager)
        for seed in dict.fromkeys(options.seeds) for name in names
    ]  # fmt: skip
    bayes = next((job for job in jobs if job.optimizer == runs.OURS and not options.no_appendix), None)
    return Plan(
        key=options.command,
        folder=getattr(options, "folder", None),
        name=options.name,
        images=options.images,
        device=options.device,
        output=options.output,
        about=machine.about(options.device, "bench.paper"),
        jobs=jobs,
        measured=bayes,
        save_every=options.save_every,
    )


def reproduce(options: argparse.Namespace, console: Console) -> list[Path]:
    plan = plan_of(options)
    images = plan.load()  # here too, so that what is wrong with it is told before a process is started
    if (last := len(images.train_y) % plan.jobs[0].batch_size) == 1:
        raise data.WrongData(f"--images {options.images}: the last batch would have {last} image, too few for BatchNorm")
    with claimed(plan.output):
        run_all(plan, min(options.jobs, len(plan.jobs)), console)
        measure_gradients(plan, images, console)
        return report(options, console)


def study(options: argparse.Namespace, console: Console) -> list[Path]:
    from . import sgd_lr_report

    jobs = sgd_lr.jobs(options.tasks, options.seeds, options.steps, options.lr)
    plan = sgd_lr.Study(options.data, options.folder, options.output, machine.about("cpu", "bench.paper"), jobs)
    plan.prepare()  # here too, so that what is wrong with it is told before a process is started
    with claimed(plan.output):
        run_all(plan, min(options.jobs, len(jobs)), console)
        return sgd_lr_report.write(options.output)


def report(options: argparse.Namespace, console: Console) -> list[Path]:
    from . import gradients, pictures, report, sgd_lr_report

    if sgd_lr_report.holds(options.output):
        return sgd_lr_report.write(options.output)

    report.show(options.output, console)
    written = report.write(options.output) + pictures.draw(options.output)
    return written + gradients.draw(options.output)


def theory(options: argparse.Namespace, console: Console) -> list[Path]:
    from . import theory

    return theory.write(options.output)


COMMANDS = {"report": report, "theory": theory, "sgd_lr": study}


def main(argv: list[str] | None = None) -> int:
    options, console = parse(argv), Console()
    if not console.is_terminal:
        console.width = 150
    try:
        written = COMMANDS.get(options.command, reproduce)(options, console)
    except (data.WrongData, WrongRun, runs.BrokenRun) as error:
        console.print(f"[red]{escape(str(error))}", soft_wrap=True)
        return 2
    except (OSError, BrokenProcessPool) as error:
        console.print(f"[red]{escape(str(error))}: that put right, the same command goes on", soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        console.print("Stopped; the same command goes on.")
        return 130
    console.print("Written:", *written, sep="\n  ", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
