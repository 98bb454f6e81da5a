"""The benchmark: what it steps over, what it counts, that it refuses a wrong kernel, and a small run from end to end."""

import argparse
import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import adabayes_fused

for needed in ("matplotlib", "psutil", "rich"):
    pytest.importorskip(needed)

from bench import __main__ as main  # noqa: E402
from bench import case, contenders, floor, kernels, memory, overview, shapes, step, timing, tune, verdict  # noqa: E402

ROOT = Path(__file__).parents[1]
needs_compiler = pytest.mark.skipif(floor.shutil.which("c++") is None, reason="needs a C++ compiler")


def options(*names, **others):
    defaults = dict(
        device="cpu", contenders=list(names), rounds=3, budget=0, compile_at_most=0, floor=(None, "no floor in this test")
    )
    return argparse.Namespace(**defaults | others)


def rows_of(*names, cases="3x100", **others):
    rows = step.measure("step", cases, options(*names, **others), lambda *_: None)
    return {row["contender"]: row for row in rows}


@pytest.mark.parametrize(
    ("name", "tensors", "parameters"),
    [("resnet34", 110, 21_282_122), ("densenet121", 362, 6_956_298), ("gpt2", 148, 124_439_808), ("llama1b", 146, 1_235_814_400),
     ("24x1M", 24, 24_000_000), ("1000x16", 1000, 16_000), ("1x256M:bfloat16", 1, 256_000_000)],
)  # fmt: skip
def test_shapes_are_the_networks(name, tensors, parameters):
    _, found, dtype, _ = shapes.case_of(name)
    assert (len(found), shapes.count(found)) == (tensors, parameters)
    assert dtype == (torch.bfloat16 if name.endswith("bfloat16") else torch.float32)


@pytest.mark.parametrize("name", ["resnet35", "24x", "0x16", "1x16:int32", "1x16:float33"])
def test_an_unknown_case_is_refused(name):
    with pytest.raises(ValueError, match=r"no case .* \(allowed: resnet34"):
        shapes.case_of(name)


@pytest.mark.parametrize(
    ("name", "moved", "kept"),
    [(contenders.ANCHOR, 28, 8), ("torch AdamW for-loop", 28, 8), ("AdaBayes", 40, 16), ("AdaBayes lean", 28, 8),
     ("AdaBayes-FP", 32, 12), ("AdaBayes-FP lean", 28, 8), ("slow path AdaBayes", 40, 16), ("AdaBayes lean bfloat16", 20, 4),
     ("AdaBayes lean 8bit", 16, 2), ("AdaBayes-FP lean 8bit", 18, 3)],
)  # fmt: skip
def test_bytes_of_a_parameter(name, moved, kept):
    """Weights and state are read and written, gradients read, post_var written: 4 bytes each time."""
    params = shapes.random_parameters([(100,), (7, 3)], "cpu")
    optimizer = contenders.contenders("cpu")[name].make(params)
    optimizer.step()
    assert memory.traffic(optimizer, params).moved == moved * 121
    assert memory.state_bytes(optimizer) == kept * 121


@pytest.mark.parametrize(
    ("name", "moved", "kept"),
    [("AdaBayes lean 8bit with stochastic weights", 10, 2), ("AdaBayes lean 8bit with 24bit weights", 12, 3),
     ("AdaBayes lean bfloat16 with 32bit weights", 18, 6)],
)  # fmt: skip
def test_bytes_of_a_bfloat16_parameter(name, moved, kept):
    params = shapes.random_parameters([(100,), (7, 3)], "cpu", torch.bfloat16)
    optimizer = contenders.contenders("cpu")[name].make(params)
    optimizer.step()
    assert memory.traffic(optimizer, params).moved == moved * 121
    assert memory.state_bytes(optimizer) == kept * 121


def test_peak_is_that_of_what_lives_at_once():
    def three_tensors():
        first, second = torch.empty(1000), torch.empty(500)
        del first
        return second + torch.ones(500)  # 3 x 500 floats by now

    assert memory.peak_extra(three_tensors, "cpu") == pytest.approx(4 * 1500, abs=16)


class Wrong(adabayes_fused.AdaBayes):
    """One element of the second tensor goes the wrong way."""

    def step(self, closure=None):
        p = self.param_groups[0]["params"][1]
        before = p.detach()[42].item()
        super().step(closure)
        with torch.no_grad():
            p[42] = 2 * before - p[42]


@pytest.fixture
def wrong(monkeypatch):
    known = contenders.contenders("cpu")
    broken = known["AdaBayes"]._replace(make=lambda params: Wrong(params, batch_size=128))
    monkeypatch.setattr(case, "contenders", lambda *_: known | {"AdaBayes": broken})


def test_a_wrong_kernel_is_not_timed(wrong):
    rows = rows_of("AdaBayes", "AdaBayes lean")
    assert rows["AdaBayes"]["wrong"]
    assert "median_s" not in rows["AdaBayes"]
    for part in ("WRONG, not timed: AdaBayes against slow path AdaBayes, tensor 1", "(42,)", "Mismatched elements: 1 / 100"):
        assert part in rows["AdaBayes"]["note"]
    assert rows["AdaBayes lean"]["median_s"] > 0


def test_a_wrong_kernel_makes_the_exit_status_1(wrong, monkeypatch, tmp_path):
    monkeypatch.setattr(timing, "in_a_process", lambda job, arguments, tell, log: job(*arguments, tell))
    arguments = ["step", "--cases", "2x100", "--rounds", "3", "--budget", "0", "--device", "cpu", "--contenders"]
    assert main.main([*arguments, "AdaBayes", "--output", str(tmp_path / "wrong")]) == 1
    assert main.main([*arguments, "AdaBayes lean", "--output", str(tmp_path / "right")]) == 0


def test_one_that_stands_still_is_not_timed(monkeypatch):
    known = contenders.contenders("cpu")
    still = known["ivon-opt IVON"]._replace(make=lambda params: torch.optim.SGD(params, lr=0.0))
    monkeypatch.setattr(case, "contenders", lambda *_: known | {still.name: still})
    assert "tensor 0 stood still" in rows_of(still.name)[still.name]["note"]


def test_a_peer_that_is_not_installed_has_a_row(monkeypatch):
    for module in ("optimi", "ivon"):
        monkeypatch.setitem(sys.modules, module, None)
    rows = rows_of("torch-optimi AdamW", "ivon-opt IVON", "torch AdamW compiled")
    assert rows["torch-optimi AdamW"]["note"] == "not installed: pip install torch-optimi"
    assert rows["ivon-opt IVON"]["note"] == "not installed: pip install ivon-opt"
    assert rows["torch AdamW compiled"]["note"] == "not compiled: 3 tensors"
    assert rows["floor"]["note"] == "no floor in this test"
    assert not any(row["wrong"] for row in rows.values())


def test_what_does_not_fit_has_a_row(monkeypatch):
    monkeypatch.setattr(case, "available", lambda device: 0)
    rows = rows_of("AdaBayes")
    assert rows["AdaBayes"]["note"].startswith("not enough memory: ")
    assert rows["floor"]["note"] == "nothing was timed"


@needs_compiler
def test_floor_sweeps_each_stream(monkeypatch, tmp_path):
    library, note = floor.build(tmp_path)
    assert library, note
    n, kept = 100_000, []
    make = floor.random_tensors
    monkeypatch.setattr(floor, "random_tensors", lambda *arguments: kept.extend(make(*arguments)) or kept)
    traffics = [memory.Traffic(4 * n, 12 * n, 0), memory.Traffic(4 * n, 16 * n, 4 * n), memory.Traffic(4 * n, 6 * n, 0)]
    adamw, full, odd = floor.cpu_floors(traffics, library).values()
    assert [f.moved // n for f in (adamw, full, odd)] == [28, 40, 28]
    before = [t.clone() for t in kept]
    full.step()
    assert torch.equal(kept[0], before[0])
    assert all(torch.equal(t, was + before[0]) for t, was in zip(kept[1:5], before[1:5], strict=True))
    assert torch.equal(kept[5], before[0])


def test_kernels_without_a_compiler_have_a_row(monkeypatch):
    monkeypatch.setattr(kernels.shutil, "which", lambda name: None)
    (row,) = kernels.measure("cuda", "sm_90", options(), lambda *_: None)
    assert "there is no nvcc" in row["note"]


@needs_compiler
def test_a_small_run_from_end_to_end(tmp_path):
    names = ["AdaBayes", "AdaBayes lean", "slow path AdaBayes"]
    command = [sys.executable, "-m", "bench", "step", "memory", "scaling", "--device", "cpu", "--rounds", "3", "--budget", "0"]
    command += ["--cases", "1x1K", "10x100", "--contenders", *names, "--output", tmp_path / "out"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 2
    assert "holds results" in again.stderr

    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["about"]["versions"]["torch"] == torch.__version__
    rows = results["rows"]
    for what in ("step", "scaling"):
        for title in ("one tensor of 1 K", "10 tensors of 100"):
            found = {row["contender"]: row for row in rows if (row["what"], row["title"]) == (what, title)}
            assert set(names) | {contenders.ANCHOR} < set(found)
            floors = {row["moved_bytes"]: row["median_s"] for row in found.values() if row["family"] == "floor"}
            for name in names:
                row = found[name]
                assert row["p20_s"] <= row["median_s"] <= row["p80_s"]
                assert len(row["block_s"]) == len(row["first_s"]) == row["rounds"] == 3
                assert row["relative"] == pytest.approx(row["median_s"] / found[contenders.ANCHOR]["median_s"])
                assert row["percent_of_floor"] == pytest.approx(100 * row["floor_s"] / row["median_s"])
                assert row["floor_s"] == pytest.approx(floors[row["moved_bytes"]])
                assert row["host_s"] > 0
    with (tmp_path / "out/results.csv").open(newline="") as file:
        written = list(csv.DictReader(file))
    assert len(written) == len(rows)
    for line, row in zip(written, rows, strict=True):
        assert line == {key: "" if row.get(key) is None else str(row[key]) for key in line}
    for picture in ("step.png", "scaling.png"):
        assert (tmp_path / "out" / picture).read_bytes().startswith(b"\x89PNG")


# --- Targets ----------------------------------------------------------------------------------------------------------


def measured(case, **changed):
    """Rows of a run on a GPU in which every target holds by a little."""
    bounds = {"resnet34": (1 / 0.79, 15.1), "densenet121": (1 / 0.34, 50.5), "gpt2": (1 / 0.79, 3.1)}
    adamw, slow = bounds.get(case, (1 / 0.96, 2.8) if ":" not in case else (1 / 0.69, 2.8))
    names = {"AdaBayes": "cuda", "AdaBayes lean": "cuda", "AdaBayes, triton": "triton", "AdaBayes lean, triton": "triton"}
    row = dict(what="step", case=case, note="", median_s=1.0, percent_of_floor=95.5, launches=1.0, peak_extra_bytes=900_000)
    others = {contenders.ANCHOR: adamw, "slow path AdaBayes": slow, "slow path AdaBayes, compiled": 1.01}
    others |= {"torch-optimi AdamW": 1.1, "flashoptim AdamW": 1.1}
    rows = [row | dict(contender=n, backend=b) for n, b in names.items()]
    rows += [dict(what="step", case=case, note="", backend="", contender=n, median_s=s) for n, s in others.items()]
    return [r | changed if r["contender"] == "AdaBayes, triton" else r for r in rows]


def missed(rows):
    return {(t.case, shown, t.what) for t, shown, figure in verdict.judged(rows) if not verdict.holds(t, figure)}


def test_the_verdict_names_what_is_missed():
    good = [row for case in (verdict.LARGE, *verdict.NETWORKS, *verdict.REAL) for row in measured(case)]
    assert len(list(verdict.judged(good))) == 2 * (4 + 3 * 2 + 6 + 3 + 1 + 1 + 4 * 2 + 8 * 2 + 4 * 2)
    assert missed(good) == set()
    for changed, what in (
        (dict(percent_of_floor=91.9), "% of a device copy"),
        (dict(launches=2.0), "kernels and copies a step"),
        (dict(peak_extra_bytes=1_100_000), "extra MB at the peak"),
    ):
        rows = [row for row in good if row["case"] != verdict.LARGE] + measured(verdict.LARGE, **changed)
        assert missed(rows) == {(verdict.LARGE, "full, triton", what)}
    rows = [row for row in good if row["case"] != "densenet121"] + measured("densenet121", median_s=1.02)
    assert missed(rows) == {("densenet121", "full, triton", "/ slow path")}
    rows = [row for row in good if not row["case"].startswith("gpt2")]
    assert {case.partition(":")[0] for case, _, _ in missed(rows)} == {"gpt2"}
    rows = [row for row in good if row["contender"] != "flashoptim AdamW"]
    assert {what for _, _, what in missed(rows)} == {"/ flashoptim AdamW"}


def test_variants_are_compared_with_what_ships():
    macros = re.findall(r"#define ADABAYES_(\w+) (\d+)", (ROOT / "csrc/multi_tensor.h").read_text())
    assert {name: int(value) for name, value in macros} == tune.BASE_CUDA
    source = (ROOT / "adabayes_fused/backends/triton.py").read_text()
    shipped = {name: re.search(rf'^{name} = "?(\w*)"?', source, re.MULTILINE)[1] for name in ("CHUNK", "BLOCK", "EVICT")}
    shipped["WARPS"] = re.search(r'"num_warps": (\d+)', source)[1]
    assert {name: str(value) for name, value in tune.BASE_TRITON.items()} == shipped
    assert all(options.keys() <= tune.BASE_CUDA.keys() for options in tune.CUDA)
    assert all(options.keys() <= tune.BASE_TRITON.keys() for options in tune.TRITON)


# --- Loops and the host's time ---------------------------------------------------------------------------------------


def test_the_hosts_part_needs_a_gpu(capsys):
    with pytest.raises(SystemExit):
        main.parse(["host", "--device", "cpu"])
    assert "the stand-in for one" in capsys.readouterr().err


@pytest.mark.parametrize("words", ["", ":clipped", ":scaled", ":scaled:clipped"])
def test_a_loop_clips_and_scales(words):
    """By every contender: gradients that a norm of 1 is too small for move its weights less, and a scaler steps."""
    title, of, _, loop = shapes.case_of("3x5" + words)
    assert ("clipped" in title, "GradScaler" in title) == loop == ("clipped" in words, "scaled" in words)
    for name in ("AdaBayes", "torch AdamW fused", "torch AdamW foreach"):
        params = shapes.random_parameters(of, "cpu")
        before = [p.detach().clone() for p in params]
        for p in params:
            p.grad.fill_(100.0)
        optimizer = contenders.contenders("cpu", loop)[name].make(params)
        for _ in range(2):
            optimizer.step()
        assert all((p != old).all() for p, old in zip(params, before, strict=True)), name
        kept = optimizer.state[params[0]]["exp_avg"]
        assert (kept.abs() < 1.0).all() == loop.clipped, name


# --- What few bits cost ---------------------------------------------------------------------------------------------------


def test_trainings_are_made_once_and_more_are_added(tmp_path, capsys):
    from bench import precision

    arguments = ["train", str(Path(__file__).parents[1] / "README.md"), "--steps", "20", "--jobs", "1", "--tasks", "text"]
    arguments += ["--arms", "float32", "8bit", "--output", str(tmp_path)]
    found = []
    for seeds in (["0"], ["0", "1"]):
        assert precision.main([*arguments, "--seeds", *seeds]) == 0
        found.append(json.loads((tmp_path / "results.json").read_text())["rows"])
    assert len(found[0]) == 4
    assert found[1][:4] == found[0]
    assert [row["seed"] for row in found[1]] == [0] * 4 + [1] * 4
    loss = {tuple(row[name] for name in ("algorithm", "arm", "seed")): row["test_loss"] for row in found[1]}
    trainings = [key[:2] for key in loss if key[2] == 0]
    assert all(loss[(*key, 0)] != loss[(*key, 1)] for key in trainings)
    # So short a training may end at the same loss in few bits, by chance; not all four do.
    assert any(loss[algorithm, "8bit", seed] != loss[algorithm, "float32", seed] for algorithm, _, seed in loss)
    assert "8bit" in (tmp_path / "table.txt").read_text()


def test_the_overview_shows_what_was_measured():
    """Every bar of the README's picture: AdamW's is 1, and a parameter takes the bytes of its weight, gradient and state."""
    by_weights = {title: overview.bars(folders, overview.H200) for title, folders in overview.SHOWN.items()}
    for (title, bars), weight in zip(by_weights.items(), (4, 2), strict=True):
        relative = {bar.label: bar.relative for bar in bars}
        each = {bar.label: bar.each for bar in bars}
        assert relative["torch AdamW(fused=True)"] == 1, title
        assert each["torch AdamW(fused=True)"] == 4 * weight
    assert [round(bar.each, 2) for bar in by_weights["float32 weights"][1:4]] == [16, 12, 10]
    assert [round(bar.each, 2) for bar in by_weights["bfloat16 weights"][1:4]] == [2 + 2 + 4 + 2, 2 + 2 + 2 + 1, 2 + 2 + 2]
    texts = {text.get_text() for at in overview.picture().axes for text in at.texts}
    assert {f"{bar.relative:.2f}" for bars in by_weights.values() for bar in bars} <= texts


def test_the_overview_refuses_what_was_not_measured(monkeypatch):
    monkeypatch.setitem(overview.SHOWN["float32 weights"]["low-precision"], "torch SGD", "SGD")
    with pytest.raises(KeyError, match="torch SGD"):
        overview.picture()
