"""What Triton makes of the kernel that ships, for GPUs this machine need not have: wide accesses, no spills, no contraction.

Run as a script, this file compiles (see ``compile_all``): other tests' processes interpret Triton instead.
"""

import collections
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "sm_100": ("cuda", 100, 32), "gfx942": ("hip", "gfx942", 64)}
F32, F64, F16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16
# algorithm, lean, param dtype, grad dtype, skippable
CASES = [(a, lean, dtype, dtype, False) for a, lean, dtype in itertools.product((0, 1), (False, True), (F32, BF16, F16))]
CASES += [(0, False, F64, F64, False), (1, False, F64, F64, False), (0, False, F32, BF16, False), (1, True, BF16, F32, True)]


def compile_case(target, index, lean, param, grad, skippable):
    """The compiled kernel, how wide each stream is in bytes a thread, loaded and stored, and the elements of a thread."""
    import triton
    from adabayes_fused.triton_kernels.multi_tensor import multi_tensor
    from triton.compiler import ASTSource

    from adabayes_fused.algorithms import ALGORITHMS
    from adabayes_fused.backends import triton as backend
    from adabayes_fused.backends.launch import Launch

    found_inf = torch.zeros(()) if skippable else None
    launch = Launch(ALGORITHMS[index], lean, torch.device("cuda"), param, grad, torch.empty(1, 8), found_inf=found_inf)
    constants = backend.constants(launch)
    at = {name: i for i, name in enumerate(multi_tensor.arg_names)}
    pointers = dict(rows="*i64", chunks="*i64", coefficients="*fp64", found_inf="*fp32" if skippable else "*fp64")
    source = ASTSource(
        multi_tensor,
        pointers | {name: "constexpr" for name in constants},
        {(at[name],): value for name, value in constants.items()},
        {(at[name],): [["tt.divisibility", 16]] for name in pointers},
    )
    kernel = triton.compile(source, target=target, options=backend.OPTIONS)
    elements = max(backend.BLOCK // (backend.OPTIONS["num_warps"] * target.warp_size), 1)
    state = max(param.itemsize, 4)
    reads = launch.algorithm.lean if lean else launch.algorithm.reads
    loads = [elements * size for size in (param.itemsize, grad.itemsize, *[state] * reads)]
    stores = [elements * size for size in (param.itemsize, *[state] * launch.slots)]
    return kernel, dict(elements=elements, loads=loads, stores=stores)


def compile_all(target_name, folder):
    """Compiles every case for a target; writes what the tests look at as JSON."""
    from triton import knobs
    from triton.backends.compiler import GPUTarget

    out = {}
    for case in CASES:
        kernel, facts = compile_case(GPUTarget(*TARGETS[target_name]), *case)
        facts |= dict(ttgir=kernel.asm["ttgir"], asm=kernel.asm.get("ptx") or kernel.asm["amdgcn"], usage="")
        if "cubin" in kernel.asm:
            (folder / "cubin").write_bytes(kernel.asm["cubin"])
            command = [knobs.nvidia.cuobjdump.path, "-res-usage", folder / "cubin"]
            facts["usage"] = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        out[", ".join(map(str, case))] = facts
    (folder / "kernels.json").write_text(json.dumps(out))


@pytest.fixture(scope="module", params=TARGETS)
def compiled(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(folder / "cache")}
    done = subprocess.run([sys.executable, __file__, request.param, str(folder)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return request.param, json.loads((folder / "kernels.json").read_text())


def accesses(asm, what):
    """Bytes a thread moves in global memory, by the width of the access; everything wider than 16 bytes as 16."""
    widths = collections.Counter()
    ptx = {"load": "ld", "store": "st"}[what]
    for lanes, bits in re.findall(rf"\b{ptx}\.global\S*?(?:\.v(\d))?\.b(\d+)\b", asm):
        width = int(lanes or 1) * int(bits) // 8
        widths[min(width, 16)] += width
    for words in re.findall(rf"\b(?:buffer|global|flat)_{what}_dwordx(\d)\b", asm):
        widths[int(words) * 4] += int(words) * 4
    return widths


@pytest.mark.parametrize("what", ["load", "store"])
def test_aligned_accesses_are_wide(what, compiled):
    # Each stream moves in accesses of 16 bytes, or of all a thread has of it where that is less. More is fine: the
    # compiler may join loads of the table.
    _, kernels = compiled
    for case, kernel in kernels.items():
        found, expected = accesses(kernel["asm"], what), collections.Counter()
        for size in kernel[what + "s"]:
            expected[min(size, 16)] += size
        assert expected[16] >= sum(kernel[what + "s"][-2:]), case  # the state's at least
        assert found >= expected, (case, found, expected)


def test_nothing_spills(compiled):
    target, kernels = compiled
    for case, kernel in kernels.items():
        if target.startswith("sm"):
            usage = re.search(r"REG:\d+ STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", kernel["usage"])
            assert usage, kernel["usage"]
            assert usage.groups() == ("0", "0"), (case, usage[0])
        else:
            counts = dict(re.findall(r"\.(vgpr_spill_count|sgpr_spill_count|private_segment_fixed_size):\s+(\d+)", kernel["asm"]))
            assert counts == dict(vgpr_spill_count="0", sgpr_spill_count="0", private_segment_fixed_size="0"), case


def test_rule_is_not_contracted(compiled):
    # NVIDIA: an add or mul without .rn is one ptxas may fuse. Divisions and roots are single instructions in PTX.
    # AMD: they are expanded into fma, so count that none of the rule's additions has gone into one.
    target, kernels = compiled
    contractible = r"\bfma\.\S+|\b(?:add|sub|mul)\.(?:ftz\.)?f(?:32|64)\S*|\b(?:div|sqrt|rcp)\.(?:approx|full)\S+"
    one = r"\b(?:v_(?:add|sub|subrev)_f(?:32|64)|(?:add|sub)\.rn\.f(?:32|64)\b)"
    two = r"\b(?:v_pk_add_f32|(?:add|sub)\.rn\.f32x2)"
    for case, kernel in kernels.items():
        asm = kernel["asm"]
        additions = len(re.findall(one, asm)) + 2 * len(re.findall(two, asm))
        in_the_rule = len(re.findall(r"arith\.(?:addf|subf) .*tensor<", kernel["ttgir"]))
        assert in_the_rule > 0, case
        assert additions >= kernel["elements"] * in_the_rule, case
        if target.startswith("sm"):
            assert not re.findall(contractible, asm), case
            assert len(re.findall(r"\bdiv\.rn\.f", asm)) >= kernel["elements"], case


if __name__ == "__main__":
    compile_all(sys.argv[1], Path(sys.argv[2]))
