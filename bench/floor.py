"""The floor: the least time that memory allows for the bytes of a step, measured in the same run as the steps.

On a GPU, a copy of as many bytes within the device. On the CPU, ``floor.cpp``: a sweep over as many streams of float32 as
the optimizer has. What has other streams (8-bit state, say) is given the bandwidth of AdamW's sweep.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch

from .memory import Traffic
from .shapes import random_tensors

SOURCE = Path(__file__).with_name("floor.cpp")
COMPILE = ("c++", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")
ADAMW = (3, 0)  # streams changed, streams only written
AT_MOST = 1 << 25  # elements a stream holds; beyond, time is proportional


class Floor(NamedTuple):
    name: str
    step: Callable[[], None]
    moved: int  # bytes


def build(folder: Path) -> tuple[Path | None, str]:
    """The compiled sweep, or None and why there is none."""
    if shutil.which(COMPILE[0]) is None:
        return None, "no CPU floor: there is no C++ compiler"
    library = folder / "floor.so"
    done = subprocess.run([*COMPILE, SOURCE, "-o", library], capture_output=True, text=True)
    return (library, "") if done.returncode == 0 else (None, f"no CPU floor: {' '.join(done.stderr.split())[:200]}")


def streams_of(traffic: Traffic) -> tuple[int, int]:
    """How many float32 streams as long as the gradient are changed, and only written; AdamW's where they are not such."""
    (changed, rest), (written, rest2) = divmod(traffic.changed, traffic.read), divmod(traffic.written, traffic.read)
    return ADAMW if rest or rest2 or changed > 4 or written > 1 else (changed, written)


def cpu_floors(traffics: Iterable[Traffic], library: Path) -> dict[Traffic, Floor]:
    traffics = list(traffics)
    kinds = {t: streams_of(t) for t in traffics}
    n = min(traffics[0].read // 4, AT_MOST)
    tensors = random_tensors([(n,)] * (1 + max(map(sum, kinds.values()))), "cpu", torch.float32)
    addresses = (ctypes.c_void_p * len(tensors))(*(t.data_ptr() for t in tensors))
    run, threads = ctypes.CDLL(str(library)).run, torch.get_num_threads()

    def floor(changed: int, written: int) -> Floor:
        def step(kept_alive=tensors):
            run(addresses, changed, written, ctypes.c_int64(n), threads)

        moved = 4 * n * (1 + 2 * changed + written)
        return Floor(f"floor: sweep of {moved // n} B/parameter", step, moved)

    of_kind = {kind: floor(*kind) for kind in {ADAMW, *kinds.values()}}
    return {t: of_kind[kind] for t, kind in kinds.items()}


def gpu_floors(traffics: Iterable[Traffic], device: str, parameters: int) -> dict[Traffic, Floor]:
    traffics = list(traffics)
    limit = 40 * AT_MOST
    size = min(max(t.moved for t in traffics), limit) // 2
    source = random_tensors([(size // 4 + 1,)], device, torch.float32)[0].view(torch.uint8)
    target = torch.empty_like(source).copy_(source)

    def floor(traffic: Traffic) -> Floor:
        half = min(traffic.moved, limit) // 2
        into, origin = target[:half], source[:half]
        return Floor(f"floor: copy of {traffic.moved / parameters:.3g} B/parameter", lambda: into.copy_(origin), 2 * half)

    return {t: floor(t) for t in traffics}
