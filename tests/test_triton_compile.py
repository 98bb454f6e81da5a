"""What Triton makes of the kernel that ships, for GPUs this machine need not have: wide accesses, no spills, no contraction.

``bench/kernels.py`` compiles it, in a process of its own: other tests' processes interpret Triton instead.
"""

import collections
import re

import pytest

pytest.importorskip("triton")

from bench.kernels import TARGETS, accesses, compile_apart  # noqa: E402


@pytest.fixture(scope="module", params=TARGETS)
def compiled(request, tmp_path_factory):
    """All cases for one GPU of each maker, a spread of them for the others: each takes a second."""
    every = 1 if request.param in ("sm_90", "gfx942") else 4
    return request.param, compile_apart(request.param, tmp_path_factory.mktemp(request.param), every)


@pytest.mark.parametrize("what", ["load", "store"])
def test_aligned_accesses_are_wide(what, compiled):
    # Each stream moves in accesses of 16 bytes, or of all a thread has of it where that is less. More is fine: the
    # compiler may join loads of the table.
    _, kernels = compiled
    for case, kernel in kernels.items():
        found, expected = accesses(kernel["asm"], what), collections.Counter()
        for size in kernel[what + "s"]:
            expected[min(size, 16)] += size
        assert expected[16] >= max(kernel[what + "s"]), case  # the widest stream at least
        for width in expected:
            wide = [sum(size for w, size in sizes.items() if w >= width) for sizes in (found, expected)]
            assert wide[0] >= wide[1], (case, found, expected)


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
