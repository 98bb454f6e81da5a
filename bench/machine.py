"""What a measurement belongs to: the machine, the versions, the commit, the command."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import psutil

PACKAGES = [
    *("adabayes_fused", "torch", "triton", "numpy", "matplotlib"),
    *("torch-optimi", "flashoptim", "torchao", "bitsandbytes", "apex", "ivon-opt", "pytorch-optimizer", "scikit-learn", "scipy"),
]


def about(device: str, module: str = "bench") -> dict:
    import torch  # here, as a caption is made of results alone

    gpu = _first_line("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader") if device == "cuda" else ""
    return dict(
        cpu=cpu_model(),
        cores=psutil.cpu_count(logical=False) or psutil.cpu_count(),
        threads=torch.get_num_threads(),
        memory_gb=round(psutil.virtual_memory().total / 2**30),
        gpu=torch.cuda.get_device_name() if device == "cuda" else "",
        gpu_memory_gb=round(torch.cuda.get_device_properties(0).total_memory / 2**30) if device == "cuda" else 0,
        driver=gpu.rpartition(",")[2].strip(),
        cuda=torch.version.cuda or "",
        cpu_capability=torch.backends.cpu.get_cpu_capability(),
        system=platform.platform(),
        python=platform.python_version(),
        versions={name: version for name in PACKAGES if (version := installed(name))},
        commit=commit(),
        command=shlex.join(["python", "-m", module, *sys.argv[1:]]),
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    )


def installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str:
    """Of the source tree this file lies in; "+" where files differ from it."""
    root = str(Path(__file__).parent)
    changed = _first_line("git", "-C", root, "status", "--porcelain", "--untracked-files=no")
    return _first_line("git", "-C", root, "rev-parse", "--short=12", "HEAD") + ("+" if changed else "")


def caption(machine: dict) -> str:
    """One line for a picture."""
    where = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} threads"
    return f"{where}; torch {machine['versions']['torch']}; {machine['date'][:10]}"


def _first_line(*command: str) -> str:
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip().splitlines()
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return lines[0].strip() if lines else ""
