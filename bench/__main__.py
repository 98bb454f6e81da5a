"""``python -m bench``: whole ``optimizer.step()`` calls on the wall clock, as ratios of medians.

Each case runs in a process of its own, and a fused optimizer is timed only after its weights have equalled the slow
path's. Contenders alternate within a run (A B C A B C ...), so that what else the machine does falls on all of them.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import adabayes_fused

from .cases import CONTENDERS, JUDGES, QUICK, SHAPES, parameters


def check(shapes, device):
    """Raises AssertionError, naming the element, where three fused steps and three slow ones disagree."""
    for name, judge in JUDGES.items():
        fused, slow = parameters(shapes, device), parameters(shapes, device)
        for optimizer in (CONTENDERS[name](fused), CONTENDERS[judge](slow)):
            for _ in range(3):
                optimizer.step()
        for i, (p, q) in enumerate(zip(fused, slow, strict=True)):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6, msg=lambda m, i=i, name=name: f"{name}, tensor {i}: {m}")


def measure(shapes, contenders, device, rounds):
    """Seconds of each ``step()``, per contender."""
    check([shape if shape[0] < 1 << 16 else (1 << 16,) for shape in shapes[:50]], device)
    optimizers = {name: CONTENDERS[name](parameters(shapes, device)) for name in contenders}
    times = {name: [] for name in contenders}
    for round_ in range(rounds + 3):
        for name, optimizer in optimizers.items():
            start = time.perf_counter()
            optimizer.step()
            if device == "cuda":
                torch.cuda.synchronize()
            if round_ >= 3:  # the first create state and warm up
                times[name].append(time.perf_counter() - start)
    return times


def in_a_process(case, args):
    """``measure`` for one case, apart from the others: large temporaries of one case slow the next one's steps down."""
    command = [sys.executable, "-m", "bench", "--case", case, "--device", args.device, "--rounds", str(args.rounds)]
    done = subprocess.run([*command, "--contenders", *args.contenders], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"bench: {case}: not timed, see above")
    return json.loads(done.stdout)


def show(console, case, times):
    table = Table("optimizer", "median ms", "p20", "p80", *(f"/ {name}" for name in list(times)[:1]), title=case)
    first = statistics.median(next(iter(times.values())))
    for name, seconds in times.items():
        p20, _, _, p80 = statistics.quantiles(seconds, n=5)
        median = statistics.median(seconds)
        table.add_row(name, f"{median * 1e3:.3f}", f"{p20 * 1e3:.3f}", f"{p80 * 1e3:.3f}", f"{median / first:.3f}")
    console.print(table)


def main():
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small cases, under a minute")
    parser.add_argument("--rounds", type=int, default=20, help="timed rounds of each case")
    parser.add_argument(
        "--contenders",
        nargs="+",
        choices=CONTENDERS,
        default=list(CONTENDERS),
        metavar="NAME",
        help=f"first is what the others are compared with; of {', '.join(CONTENDERS)}",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path("bench.json"))
    parser.add_argument("--case", choices=SHAPES | QUICK, help="measure one case in this process; prints JSON")
    args = parser.parse_args()
    if args.case:
        print(json.dumps(measure((SHAPES | QUICK)[args.case], args.contenders, args.device, args.rounds)))
        return
    console, cases = Console(), QUICK if args.quick else SHAPES
    with Progress(console=console) as bar:
        results = {case: in_a_process(case, args) for case in bar.track(cases, description="measuring")}
    for case, times in results.items():
        show(console, case, times)
    about = dict(
        adabayes_fused=adabayes_fused.__version__,
        torch=torch.__version__,
        python=platform.python_version(),
        machine=platform.machine(),
        cores=torch.get_num_threads(),
        device=args.device,
    )
    args.output.write_text(json.dumps(dict(about=about, seconds=results), indent=1))
    console.print(f"written: {args.output}")


if __name__ == "__main__":
    main()
