"""What the compilers make of the GPU kernels, for GPUs this machine need not have: registers, spills, width of accesses.

``python -m bench kernels`` shows it. As a script, ``python -m bench.kernels TARGET FOLDER N`` compiles every N-th of Triton's
cases for one target and writes FOLDER/kernels.json: a process that interprets Triton's kernels (TRITON_INTERPRET=1) cannot
compile them.
"""

from __future__ import annotations

import collections
import importlib.util
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from adabayes_fused.codes import STATE_DTYPES, WEIGHT_ROUNDINGS, Storage

from .timing import Tell

ROOT = Path(__file__).parent.parent
TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "sm_100": ("cuda", 100, 32), "gfx942": ("hip", "gfx942", 64)}
F32, F64, F16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16
FULL, LEAN = Storage(False), Storage(True)
# algorithm, storage, param dtype, grad dtype, whether the device decides
CASES = [(a, storage, dtype, dtype, False) for a, storage, dtype in itertools.product((0, 1), (FULL, LEAN), (F32, BF16, F16))]
CASES += [(0, FULL, F64, F64, False), (1, FULL, F64, F64, False), (0, FULL, F32, BF16, False), (1, LEAN, BF16, F32, True)]
CASES += [(a, Storage(lean, "bfloat16"), F32, F32, False) for a in (0, 1) for lean in (False, True)]
CASES += [(a, Storage(True, "8bit"), F32, F32, False) for a in (0, 1)]
CASES += [
    (a, Storage(True, state, weights), BF16, BF16, False)
    for a, state, weights in itertools.product((0, 1), ("bfloat16", "8bit"), ("stochastic", "24bit", "32bit"))
]


# --- Triton -----------------------------------------------------------------------------------------------------------


def compile_case(target, index, storage, param, grad, decided):
    """The compiled kernel, how wide each stream is in bytes a thread, loaded and stored, and the elements of a thread."""
    from adabayes_fused.triton_kernels.multi_tensor import multi_tensor

    from adabayes_fused.algorithms import ALGORITHMS
    from adabayes_fused.backends import triton as backend
    from adabayes_fused.backends.launch import Launch

    launch = Launch(ALGORITHMS[index], storage, "triton", torch.device("cuda"), param, grad)
    pointers = dict(rows="*i64", chunks="*i64", tickets="*i64", numbers="*fp64", decision="*fp64")
    constants = backend.constants(launch, target.warp_size)
    kernel = compile_kernel(target, multi_tensor, pointers, constants | dict(DECIDED=decided))
    elements = max(constants["BLOCK"] // (backend.OPTIONS["num_warps"] * target.warp_size), 1)
    layout = launch.layout
    reads = launch.algorithm.lean if storage.lean else launch.algorithm.reads
    correction = [] if layout.correction is None else [layout.correction]
    loads = [elements * dtype.itemsize for dtype in (param, grad, *layout.dtypes[:reads], *correction)]
    stores = [elements * dtype.itemsize for dtype in (param, *layout.dtypes, *correction)]
    return kernel, dict(elements=elements, loads=loads, stores=stores)


def compile_kernel(target, function, arguments: dict[str, str], constants: dict):
    """A kernel of Triton's for a target; ``arguments`` are the types of those that are no constants."""
    import triton
    from triton.compiler import ASTSource

    from adabayes_fused.backends.triton import OPTIONS

    at = {name: i for i, name in enumerate(function.arg_names)}
    source = ASTSource(
        function,
        arguments | {name: "constexpr" for name in constants},
        {(at[name],): value for name, value in constants.items()},
        {(at[name],): [["tt.divisibility", 16]] for name, kind in arguments.items() if kind.startswith("*")},
    )
    return triton.compile(source, target=target, options=OPTIONS)


def compile_deciding(target) -> None:
    """The kernels of a norm and of a decision, of which nothing is measured: that they compile."""
    import triton.language as tl
    from adabayes_fused.triton_kernels import multi_tensor

    for grad in (tl.float32, tl.float64, tl.float16, tl.bfloat16):
        constants = dict(GRAD=grad, CHUNK=8192, BLOCK=1024)
        compile_kernel(target, multi_tensor.sum_of_squares, dict(rows="*i64", chunks="*i64", sums="*fp64"), constants)
    numbers = dict(sums="*fp64", n="i32", grad_scale="*fp32", known_scale="i64", found_inf="*fp32", max_norm="i64")
    for yes in (False, True):
        constants = dict(SCALED=yes, CHECKED=yes, CLIPS=yes, SKIPS=yes, BLOCK=1024)
        compile_kernel(target, multi_tensor.decide, numbers | dict(decision="*fp64", skipped="*i64"), constants)


def compile_all(target_name: str, folder: Path, every: int) -> None:
    """Compiles every case, or every so many, for a target; writes its facts and its code as JSON."""
    from triton import knobs
    from triton.backends.compiler import GPUTarget

    out = {}
    compile_deciding(GPUTarget(*TARGETS[target_name]))
    for case in CASES[::every]:
        kernel, facts = compile_case(GPUTarget(*TARGETS[target_name]), *case)
        facts |= dict(ttgir=kernel.asm["ttgir"], asm=kernel.asm.get("ptx") or kernel.asm["amdgcn"], usage="")
        if "cubin" in kernel.asm:
            (folder / "cubin").write_bytes(kernel.asm["cubin"])
            command = [knobs.nvidia.cuobjdump.path, "-res-usage", folder / "cubin"]
            facts["usage"] = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        out[", ".join(map(str, case))] = facts
    (folder / "kernels.json").write_text(json.dumps(out))


def compile_apart(target_name: str, folder: Path, every: int = 1) -> dict[str, dict]:
    """``compile_all`` in a process of its own. Raises RuntimeError with what it printed."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(folder / "cache")}
    command = [sys.executable, "-m", "bench.kernels", target_name, str(folder), str(every)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads((folder / "kernels.json").read_text())


def accesses(asm: str, what: str) -> collections.Counter:
    """Bytes a thread moves in global memory, by the width of the access; everything wider than 16 bytes as 16."""
    widths: collections.Counter = collections.Counter()
    ptx = {"load": "ld", "store": "st"}[what]
    for lanes, bits in re.findall(rf"\b{ptx}\.global\S*?(?:\.v(\d))?\.b(\d+)\b", asm):
        width = int(lanes or 1) * int(bits) // 8
        widths[min(width, 16)] += width
    for words in re.findall(rf"\b(?:buffer|global|flat)_{what}_dwordx(\d)\b", asm):
        widths[int(words) * 4] += int(words) * 4
    return widths


def usage_of(kernel: dict) -> tuple[int, int]:
    """Registers of a thread, and bytes of it that are spilled."""
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", kernel["usage"])
    if found:
        return int(found[1]), int(found[2]) + int(found[3])
    amd = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count|sgpr_spill_count):\s+(\d+)", kernel["asm"]))
    return int(amd["vgpr_count"]), 4 * (int(amd["vgpr_spill_count"]) + int(amd["sgpr_spill_count"]))


def triton_rows(target: str, folder: Path) -> list[dict]:
    from adabayes_fused.algorithms import ALGORITHMS

    rows = []
    for (index, storage, param, grad, skippable), kernel in zip(CASES, compile_apart(target, folder).values(), strict=True):
        registers, spilled = usage_of(kernel)
        name = _name(ALGORITHMS[index].name, storage) + (", may skip" if skippable else "")
        dtypes = [str(dtype).removeprefix("torch.") for dtype in (param, grad)]
        rows.append(
            _row("triton", target, name, dtypes, registers, spilled, *(accesses(kernel["asm"], w) for w in ("load", "store")))
        )
    return rows


def _name(algorithm: str, storage: Storage) -> str:
    given = [x for x in (storage.state_dtype, f"{storage.weight_rounding} weights") if x not in ("float32", "nearest weights")]
    return ", ".join([algorithm + (" lean" if storage.lean else ""), *given])


# --- CUDA -------------------------------------------------------------------------------------------------------------


def find_cuobjdump() -> str | None:
    """NVIDIA's, from the CUDA toolkit or from Triton's package."""
    found = shutil.which("cuobjdump")
    if found is None and importlib.util.find_spec("triton"):
        found = next((str(f) for f in Path(importlib.util.find_spec("triton").origin).parent.rglob("bin/cuobjdump")), None)
    return found


def cuda_rows(target: str, folder: Path) -> list[dict]:
    tools = dict(nvcc=shutil.which("nvcc"), cuobjdump=find_cuobjdump(), **{"c++filt": shutil.which("c++filt")})
    missing = [name for name, path in tools.items() if path is None]
    if missing:
        raise RuntimeError(f"there is no {', no '.join(missing)}")
    cubin = folder / "cuda.cubin"
    _output(tools["nvcc"], "-cubin", f"-arch={target}", "-std=c++17", "-fmad=false", "-o", cubin, ROOT / "csrc" / "cuda.cu")
    beside = dict(PATH=os.pathsep.join([os.environ["PATH"], str(Path(tools["cuobjdump"]).parent)]))  # it calls nvdisasm
    usage = _output(tools["cuobjdump"], "-res-usage", cubin)
    sass = dict(
        re.findall(
            r"Function : (\S+)\n(.*?)(?=\n\s+Function : |\Z)", _output(tools["cuobjdump"], "-sass", cubin, **beside), re.DOTALL
        )
    )
    rows = []
    for symbol, line in re.findall(r"Function (\S+):\n\s+(REG:.*)", usage):
        kind = re.search(
            r"update<Kind<(\w+), (\w+), (\w+), (\w+), \(State\)(\d), \(Weight\)(\d)>", _output(tools["c++filt"], symbol)
        )
        if kind is None:  # a norm, a decision
            continue
        rule, param, grad, full, state, weight = kind.groups()
        registers, spilled = usage_of(dict(usage=line))
        name = _name(rule, Storage(full == "false", STATE_DTYPES[int(state)], WEIGHT_ROUNDINGS[int(weight)]))
        rows.append(
            _row("cuda", target, name, [param, grad], registers, spilled, *(sass_accesses(sass[symbol], w) for w in ("LD", "ST")))
        )
    return rows


def sass_accesses(sass: str, what: str) -> collections.Counter:
    """As ``accesses``; a thread's code holds the accesses of the aligned path beside the narrow ones of the tail."""
    widths: collections.Counter = collections.Counter()
    for suffixes in re.findall(rf"\b{what}G?\.E((?:\.\w+)*)", sass):
        bits = re.search(r"\.[US]?(8|16|64|128)\b", suffixes)
        widths[int(bits[1]) // 8 if bits else 4] += int(bits[1]) // 8 if bits else 4
    return widths


def _output(*command, **variables) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | variables)
    if done.returncode:
        raise RuntimeError(" ".join((done.stderr or done.stdout).split())[:300])
    return done.stdout


# --- The job ----------------------------------------------------------------------------------------------------------


def _row(compiler, target, kernel, dtypes, registers, spilled, loads, stores) -> dict:
    names = dict(float="float32", double="float64", half_t="float16", bfloat16_t="bfloat16", AnyGrad="any")
    param, grad = (names.get(dtype, dtype) for dtype in dtypes)
    return dict(
        what="kernels", compiler=compiler, target=target, kernel=kernel, param=param, grad=grad, note="", wrong=False,
        registers=registers, spilled_bytes=spilled, load_width=max(loads), store_width=max(stores),
        load_bytes=dict(sorted(loads.items())), store_bytes=dict(sorted(stores.items())),
    )  # fmt: skip


def measure(compiler: str, target: str, options: Namespace, tell: Tell) -> list[dict]:
    """The rows of one compiler and target; where it cannot be asked, one that says why."""
    tell(0.0, f"{compiler} for {target}")
    try:
        if compiler == "triton" and importlib.util.find_spec("triton") is None:
            raise RuntimeError("there is no triton: pip install triton")
        with TemporaryDirectory() as folder:
            return (triton_rows if compiler == "triton" else cuda_rows)(target, Path(folder))
    except RuntimeError as error:
        note = " ".join(str(error).split())[-300:]
        return [dict(what="kernels", compiler=compiler, target=target, kernel="", note=note, wrong=False)]


if __name__ == "__main__":
    compile_all(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
