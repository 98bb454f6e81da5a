"""``python -m bench.tune``: the GPU kernels with other block sizes, chunks, packs and cache hints, timed beside a device copy.

Without a GPU the variants are compiled, and their registers and spills shown; under TRITON_INTERPRET=1 Triton's are also run,
on tiny cases. A variant whose weights are not those of the first is not timed, and makes the exit status 1.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch

from adabayes_fused import AdaBayes
from adabayes_fused.backends import native
from adabayes_fused.backends import triton as triton_backend

from . import kernels, machine, memory
from .shapes import case_of, copies, count, random_parameters
from .timing import now

SOURCE = Path(__file__).with_suffix(".cu")
BASE_CUDA = dict(CHUNK=16384, THREADS=256, PACKS=1, STREAMING=0)  # csrc/multi_tensor.h
BASE_TRITON = dict(CHUNK=8192, BLOCK=1024, WARPS=4, EVICT="")  # adabayes_fused/backends/triton.py
CUDA = [{}, dict(CHUNK=4096), dict(CHUNK=8192), dict(CHUNK=32768), dict(CHUNK=65536), dict(THREADS=128), dict(THREADS=512)]
CUDA += [dict(PACKS=2), dict(PACKS=4), dict(STREAMING=1), dict(PACKS=2, STREAMING=1), dict(PACKS=2, THREADS=128)]
CUDA += [dict(CHUNK=4096, PACKS=2, STREAMING=1), dict(CHUNK=4096, THREADS=128, STREAMING=1)]
TRITON = [
    {},
    dict(CHUNK=4096),
    dict(CHUNK=16384),
    dict(CHUNK=32768),
    dict(BLOCK=512),
    dict(BLOCK=2048),
    dict(BLOCK=2048, WARPS=8),
]
TRITON += [dict(CHUNK=1024), dict(CHUNK=2048, BLOCK=2048, WARPS=8), dict(BLOCK=4096, WARPS=8), dict(WARPS=8)]
TRITON += [dict(EVICT="evict_first"), dict(CHUNK=4096, EVICT="evict_first"), dict(CHUNK=4096, BLOCK=2048, WARPS=8)]


class Variant(NamedTuple):
    backend: str
    options: dict
    library: Path | None = None

    @property
    def name(self) -> str:
        return f"{self.backend} " + " ".join(f"{k}={v}" for k, v in self.options.items())


# --- Making and installing a variant ------------------------------------------------------------------------------------


def build(options: dict, folder: Path, arch: str) -> tuple[Path, str]:
    """The library, and what ptxas says of its kernels."""
    library = folder / ("_".join(map(str, options.values())) + ".so")
    macros = [f"-DADABAYES_{name}={value}" for name, value in options.items()]
    flags = ["-std=c++17", "-O3", "-fmad=false", f"-arch={arch}", "-Xptxas=-v", "-shared", "-Xcompiler=-fPIC"]
    done = subprocess.run(["nvcc", *flags, *macros, SOURCE, "-o", library], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-500:])
    return library, done.stderr


def cuda_variants(folder: Path, arch: str, some: list[dict]) -> Iterator[tuple[Variant, dict]]:
    full = [BASE_CUDA | options for options in some]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for options, (library, said) in zip(full, pool.map(lambda o: build(o, folder, arch), full), strict=True):
            pattern = r"updateI4KindI8AdaBayesffLb1EL5State0E.*?(\d+) bytes spill stores.*?Used (\d+) registers"
            found = re.search(pattern, said, re.DOTALL)
            yield Variant("cuda", options, library), dict(registers=int(found[2]), spilled_bytes=int(found[1]))


def triton_variants(folder: Path, arch: str, some: list[dict]) -> Iterator[tuple[Variant, dict]]:
    for options in (BASE_TRITON | options for options in some):
        options["BLOCK"] = min(options["BLOCK"], options["CHUNK"])
        variant = Variant("triton", options)
        with installed(variant):
            yield variant, {} if triton_backend.interpreted() else compiled(folder, arch)


def compiled(folder: Path, arch: str) -> dict:
    from triton import knobs
    from triton.backends.compiler import GPUTarget

    kernel, _ = kernels.compile_case(GPUTarget("cuda", int(arch[3:]), 32), 0, kernels.FULL, torch.float32, torch.float32, False)
    (folder / "cubin").write_bytes(kernel.asm["cubin"])
    command = [knobs.nvidia.cuobjdump.path, "-res-usage", folder / "cubin"]
    usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return dict(zip(("registers", "spilled_bytes"), kernels.usage_of(dict(usage=usage)), strict=True))


@contextmanager
def installed(variant: Variant) -> Iterator[None]:
    """The variant in its backend's place."""
    o, module, constants = (
        variant.options,
        native.module,
        {k: getattr(triton_backend, k) for k in ("CHUNK", "BLOCK", "EVICT", "OPTIONS")},
    )
    try:
        if variant.backend == "triton":
            triton_backend.CHUNK, triton_backend.BLOCK, triton_backend.EVICT = o["CHUNK"], o["BLOCK"], o["EVICT"]
            triton_backend.OPTIONS = constants["OPTIONS"] | dict(num_warps=o["WARPS"])
        else:
            parts = {name: getattr(module, name) for name in dir(module)}
            native.module = SimpleNamespace(**parts | dict(CUDA_CHUNK=o["CHUNK"], run_cuda=_caller(variant.library)))
        yield
    finally:
        native.module = module
        vars(triton_backend).update(constants)


def _caller(library: Path) -> Callable[..., None]:
    call, word = ctypes.CDLL(str(library)).run, ctypes.c_int64
    call.restype = ctypes.c_char_p
    call.argtypes = [*[ctypes.c_int] * 6, *[word] * 6, ctypes.c_int, word]

    def run_cuda(bucket, *arguments) -> None:
        if (error := call(*map(int, (*bucket, *arguments)))) is not None:
            raise RuntimeError(error.decode())

    return run_cuda


# --- Measuring ----------------------------------------------------------------------------------------------------------


STORED: dict[str, dict[str, Any]] = {"lean": dict(lean=True), "full": {}, "8bit": dict(lean=True, state_dtype="8bit")}


class Bench:
    """The cases, stored in each way, whose steps are timed with whatever is installed."""

    def __init__(self, device: str, cases: list[str]) -> None:
        self.device, self.steps = device, {}
        for case in cases:
            _, shapes, dtype, _ = case_of(case)
            params = random_parameters(shapes, device, dtype)
            for stored in STORED:
                self.steps[case, stored] = (params, {}, count(shapes))
        self.small = random_parameters([(300, 7), (5,), (), (33_001,), (3, 50_001)], device)

    def optimizer(self, case: str, stored: str, backend: str):
        params, made, _ = self.steps[case, stored]
        if not made:
            made["one"] = AdaBayes(params, batch_size=128, backend=backend, **STORED[stored])
        made["one"].backend = backend
        return made["one"]

    def weights(self, backend: str) -> list[torch.Tensor]:
        """After two steps: what each variant must give."""
        found = []
        for stored in STORED.values():
            params = copies(self.small)
            optimizer = AdaBayes(params, batch_size=128, backend=backend, **stored)
            for _ in range(2):
                optimizer.step()
            found += [p.detach() for p in params]
        return found

    def seconds(self, step: Callable[[], None], large: bool) -> float:
        """Of a step: between events on the GPU where it is large, else by the wall clock over a block of steps."""
        for _ in range(2):
            step()
        if self.device == "cpu" or not large:
            steps, times = 50 if self.device == "cuda" else 1, []
            for _ in range(3):
                begin = now()
                for _ in range(steps):
                    step()
                times.append((now() - begin) / steps)
            return float(np.median(times))
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(21)]
        marks[0].record()
        for mark in marks[1:]:
            step()
            mark.record()
        torch.cuda.synchronize()
        return 1e-3 * float(np.median([a.elapsed_time(b) for a, b in zip(marks, marks[1:], strict=False)]))

    def copy_gb_per_s(self) -> float:
        """Bytes read and written by a device copy, a GB long where there is a GPU."""
        n = 1 << (28 if self.device == "cuda" else 16)
        source = torch.empty(n, device=self.device).normal_()
        target = torch.empty_like(source)
        return 8 * n / self.seconds(lambda: target.copy_(source), True) / 1e9

    def rows(self, variant: Variant, copy: float) -> Iterator[dict]:
        for (case, stored), (params, _, _) in self.steps.items():
            optimizer = self.optimizer(case, stored, variant.backend)
            large = sum(p.nbytes for p in params) > 1 << 29
            seconds = self.seconds(optimizer.step, large)
            speed = memory.traffic(optimizer, params).moved / seconds / 1e9
            yield dict(case=case, stored=stored, seconds=seconds, gb_per_s=speed, percent_of_copy=100 * speed / copy)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=(__doc__ or "").partition(": ")[2])
    parser.add_argument("--output", type=Path, required=True, help="folder of tune.json")
    parser.add_argument("--cases", nargs="+", default=["1x256M", "resnet34", "densenet121", "gpt2"])
    parser.add_argument("--backends", nargs="+", default=["cuda", "triton"], choices=("cuda", "triton"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--variants", type=int, help="only so many of each backend")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    has_gpu, start = torch.cuda.is_available(), time.monotonic()
    device = "cuda" if has_gpu else "cpu"
    arch = "sm_" + "".join(map(str, torch.cuda.get_device_capability() if has_gpu else (9, 0)))
    options.output.mkdir(parents=True, exist_ok=True)
    everyone: list[tuple[Variant, dict]] = []
    made = TemporaryDirectory()
    for backend, make, some in (("cuda", cuda_variants, CUDA), ("triton", triton_variants, TRITON)):
        if backend in options.backends:
            everyone += make(Path(made.name), arch, some[: options.variants])
    print(f"{len(everyone)} variants made in {time.monotonic() - start:.0f} s", flush=True)
    rows = [dict(variant=v.name, options=v.options, wrong=False, **about) for v, about in everyone]
    runs = {v.name: v for v, _ in everyone if has_gpu or v.backend == "triton" and triton_backend.interpreted()}
    for row in rows:
        print(f"{row['variant']}: {row.get('registers')} registers, {row.get('spilled_bytes')} bytes spilled")
    if runs:
        measure(Bench(device, options.cases), runs, rows, options)
    about = machine.about(device, "bench.tune")
    (options.output / "tune.json").write_text(json.dumps(dict(about=about, rows=rows), indent=1) + "\n")
    return 1 if any(row["wrong"] for row in rows) else 0


def measure(bench: Bench, runs: dict[str, Variant], rows: list[dict], options: argparse.Namespace) -> None:
    """Fills the rows: each variant once a round, a copy before it; medians over the rounds. Writes what there is after each."""
    expected = bench.weights("auto")
    for done in range(options.rounds):
        for row in rows:
            variant = runs.get(row["variant"])
            if variant is None or row["wrong"]:
                continue
            with installed(variant):
                row["wrong"] = not all(map(torch.equal, expected, bench.weights(variant.backend)))
                if not row["wrong"]:
                    copy = bench.copy_gb_per_s()
                    row.setdefault("rounds", []).append([dict(copy_gb_per_s=copy), *bench.rows(variant, copy)])
            (options.output / "tune.json").write_text(json.dumps(dict(rows=rows), indent=1) + "\n")
        print(f"round {done + 1} of {options.rounds}", flush=True)
    show(rows, [f"{case}, {stored}" for case, stored in bench.steps])


def show(rows: list[dict], cases: list[str]) -> None:
    """Adds each row's medians over the rounds, and prints them, the fastest first."""
    timed = [row for row in rows if row.get("rounds")]
    for k, case in enumerate(cases, start=1):
        for row in timed:
            row.setdefault("medians", {})[case] = {
                key: float(np.median([found[k][key] for found in row["rounds"]]))
                for key in ("seconds", "gb_per_s", "percent_of_copy")
            }
        print(f"\n{case}")
        for row in sorted(timed, key=lambda row: row["medians"][case]["seconds"]):
            m = row["medians"][case]
            print(f"  {1e3 * m['seconds']:9.4f} ms {m['gb_per_s']:7.0f} GB/s {m['percent_of_copy']:6.1f} %  {row['variant']}")
    for row in rows:
        if row["wrong"]:
            print(f"WRONG, not timed: {row['variant']}")


if __name__ == "__main__":
    sys.exit(main())
