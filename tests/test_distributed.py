"""Several processes over gloo on the CPU: parameters in parts, whole in each, and both; checkpoints between their numbers.

``distributed/worker.py`` runs in each process; here are the launches, one for each number of processes, and the judgement.
"""

import json
from pathlib import Path

import pytest
import torch
from processes import run_script

WORKER = Path(__file__).parent / "distributed" / "worker.py"
CASES = {
    2: "fsdp2 overflow warm_up_from_zero mixed_precision mixed_meshes scaler ddp fsdp1 zero tensor_parallel "
    "load_parts reading no_trace save load whole_from_first",
    3: "fsdp2 overflow load",
    1: "load load_plain",
    4: "hsdp mixed_paths two_dimensions",
}
CODED = ("AdaBayes-8bit", "AdaBayesFP-bfloat16")
ROUNDING = 2e-6  # of float32, over some twenty steps

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason="this torch has no gloo"
)


def launch(processes, folder):
    """Runs these processes' cases; returns {case: what each process found}, and what they said."""
    _, _, said = run_script(WORKER, folder, *CASES[processes].split(), group=processes, CUDA_VISIBLE_DEVICES="")
    found = {}
    for case in CASES[processes].split():
        files = [folder / f"{case}.{processes}.{rank}.json" for rank in range(processes)]
        if all(file.exists() for file in files):
            found[case] = [json.loads(file.read_text()) for file in files]
    return found, said


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """What ``processes`` found in a case, from each of them. Two come first: they save what others load."""
    folder = tmp_path_factory.mktemp("distributed")
    kept = {}

    def of(case, processes):
        for n in dict.fromkeys((2 if case.startswith("load") else processes, processes)):
            if n not in kept:
                kept[n] = launch(n, folder)
        found, said = kept[processes]
        if case not in found:
            pytest.fail(f"{case} did not end in {processes} processes; they said: ...{said[-3000:]}")
        for rank, result in enumerate(found[case]):
            if isinstance(result, dict) and "raised" in result:
                pytest.fail(f"process {rank} of {processes}: {result['raised']}")
        return found[case]

    return of


def check_followed(result, coded=False):
    """Against a run over the whole gradients, bit for bit but for the rounding of a norm; and one process's training."""
    assert result["placed"]
    assert result["first"] == result["later"] == []  # operations on DTensors
    assert result["norm"] < 1e-12
    if result["clipped"]:
        assert result["twin"] < ROUNDING
    else:
        assert result["bits"] == 0
    assert result["single"] < (ROUNDING if not coded else 2e-2)  # whose gradients are rounded otherwise, and so its codes
    assert result["moved"] > 1e-2


@pytest.mark.parametrize("processes", [2, 3])
def test_fsdp2_gives_one_process_s_weights(processes, launched):
    results = launched("fsdp2", processes)
    for result in results:
        assert len(result) == 10
        for name, run in result.items():
            assert run["clipped"] == name.endswith("clipped")
            check_followed(run, coded=name in CODED)
    # Most hold nothing of the first, the middle or the last; 5 rows of 3 x 5 and the like are in uneven parts.
    assert [run["AdaBayes"]["shapes"][-1] for run in results] == [[1]] + [[0]] * (processes - 1)
    assert len({tuple(run["AdaBayes"]["shapes"][4]) for run in results}) == 2


@pytest.mark.parametrize("processes", [2, 3])
def test_a_nan_in_one_process_skips_the_step_in_all(processes, launched):
    for result in launched("overflow", processes):
        assert len(result) == processes
        for changed, skipped, changed_by_the_next, skipped_then in result:
            assert (changed, skipped, skipped_then) == (0, 1, 1)
            assert changed_by_the_next > 8


def test_a_first_step_at_lr_0_counts_where_the_gradients_are_zero(launched):
    assert launched("warm_up_from_zero", 2) == [[1.0] * 8] * 2


def test_mixed_precision(launched):
    for result in launched("mixed_precision", 2):
        assert len(result) == 2
        for run in result.values():
            assert run["bits"] == 0
            assert run["state"] == "torch.float32"
            assert run["moved"] > 1e-2


def test_meshes_side_by_side_and_plain_parameters(launched):
    for result in launched("mixed_meshes", 2):
        assert result["clipped False"]["twin"] == 0.0
        for run in result.values():
            assert run["twin"] < ROUNDING
            assert run["norm"] < 1e-12
            assert run["dispatched"] == []


def test_a_path_taken_in_one_process_alone_keeps_nobody_waiting(launched):
    for result in launched("mixed_paths", 4):
        assert result["twin"] < ROUNDING
        assert result["norm"] < 1e-12


def test_hsdp_counts_each_part_once(launched):
    for result in launched("hsdp", 4):
        for name, run in result.items():
            assert run["clipped"] == (name not in CODED)
            check_followed(run, coded=name in CODED)
            assert all(run["replicas"])


def test_grad_scaler_skips_and_unscales_in_all_processes(launched):
    for result in launched("scaler", 2):
        for run in result.values():
            assert run["single"] < ROUNDING
            assert run["scale"] == 512.0  # halved once
            assert run["steps"] == [5.0] * 8
            assert run["skipped"] == 1


def test_ddp_keeps_replicas_the_same(launched):
    for result in launched("ddp", 2):
        assert len(result) == 6
        for name, run in result.items():
            assert run["replicas"]
            assert run["single"] < (2e-2 if "8bit" in name else ROUNDING)
            if name.endswith("views True"):
                assert sum(offset % 8 == 4 for offset in run["offsets"]) >= len(run["offsets"]) / 2  # odd, in float32s


def test_fsdp1(launched):
    for result in launched("fsdp1", 2):
        for name, run in result.items():
            rounding = 2e-2 if "bfloat16" in name else ROUNDING  # of numbers that are by place in the process's flat tensor
            assert run["single"] < rounding
            assert "clip_grad_norm_" in run["refused"]
            if "continued" in run:
                assert run["state"] < rounding
                assert run["continued"] == 0
        assert sum("continued" in run for run in result.values()) == 2


def test_zero_redundancy_optimizer(launched):
    results = launched("zero", 2)
    for result in results:
        for name, run in result.items():
            assert run["single"] < (2e-2 if "8bit" in name else ROUNDING)  # whose seeds are by position in the process's share
            assert run["lr"] == [1e-3]
            assert run["saved"] == 8
            assert (run["continued"], run["state"]) == (0, 0)
    assert sum(result["AdaBayes, view False"]["here"] for result in results) == 8


def test_tensor_parallelism(launched):
    for result in launched("tensor_parallel", 2):
        for run in result.values():
            assert "(Partial(sum),)" in run["gradients"]
            assert "(Replicate(),)" in run["placements"]
            check_block(run)
        assert result["clipped False"]["bits"] == 0


def check_block(run):
    assert run["placed"]
    assert run["first"] == run["later"] == []
    assert max(run["twin"], run["single"]) < ROUNDING
    assert run["norm"] < 1e-12


def test_tensor_parallelism_within_fsdp2(launched):
    for result in launched("two_dimensions", 4):
        check_loaded(result.pop("loaded"))
        for run in result.values():
            assert any("_StridedShard" in at for at in run["placements"])
            check_block(run)
        assert result["clipped False"]["bits"] == 0


def check_loaded(result):
    """State given whole and in parts: loaded, and put into ``optimizer.state`` as it is; then one step."""
    assert result == {form: [0, True, True, True, 0, 0] for form in ("whole", "part")}


def test_plain_state_whole_or_in_parts_is_placed(launched):
    for result in launched("load_parts", 2):
        check_loaded(result)


@pytest.mark.parametrize(("case", "processes", "forms"), [("load", 2, 4), ("load", 3, 4), ("load", 1, 4), ("load_plain", 1, 3)])
def test_what_two_processes_saved(case, processes, forms, launched):
    """Same bits wherever it is loaded; and, by two processes again, as they went on."""
    for result in launched(case, processes):
        assert len(result) == 4 * forms
        for form, run in result.items():
            assert run == {"at_save": 0, "placed": True, "after": 0}, form


def test_the_whole_state_from_the_first_process(launched):
    assert launched("whole_from_first", 2) == [{"at_save": 0}] * 2


def test_asking_for_the_state_before_the_first_step_leaves_no_trace(launched):
    assert launched("no_trace", 2) == [{"bits": 0, "steps": [0.0] * 8}] * 2


def test_posterior_and_diagnostics_are_over_all_parts(launched):
    for result in launched("reading", 2):
        assert result["posterior"] == 0
        ours, theirs = result["diagnostics"]
        for row, expected in zip(ours, theirs, strict=True):
            assert row == pytest.approx(expected, rel=1e-9)
