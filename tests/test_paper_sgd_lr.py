"""The study of lr and sgd_lr: its grid is whole, it trains what it says, and its table and picture come from JSON alone."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.colors
import pytest
import torch
from processes import run_script

from adabayes_fused import AdaBayes, posterior
from bench import trainings
from bench.paper import data, sgd_lr, sgd_lr_report
from bench.paper.reported import eq_20
from bench.paper.runs import BrokenRun
from bench.paper.train import WrongRun

pytest.importorskip("sklearn")
HERE = Path(__file__).parents[1]


# --- What is trained


def test_the_grid_is_whole():
    """Every point once; the first seed's whole grid stands before anything else, and what is extra stands last."""
    every = sgd_lr.jobs(sgd_lr.TASKS, [0, 1, 1])
    assert len({job.name for job in every}) == len(every) == 2 * 2 * 5 * (1 + 4 + 4 + 3 + 3 + 1)
    lrs = sorted({job.lr for job in every})
    assert [math.log10(b / a) for a, b in zip(lrs, lrs[1:], strict=False)] == pytest.approx([0.5] * 4, abs=0.025)
    whole = [("AdamW", None), *((name, x) for name in ("AdaBayes", "AdaBayes-FP") for x in (0.1, 1, 10, 100))]
    whole += [("AdaBayes, fixed point", x) for x in (1, 10, 100)]
    for n, seed in enumerate((0, 1)):
        some = every[120 * n : 120 * (n + 1)]
        assert {job.seed for job in some} == {seed}
        expected = {(task, *curve, lr) for task in ("image", "text") for curve in whole for lr in lrs}
        assert {(job.task, job.optimizer, job.sgd_lr, job.lr) for job in some} == expected
        assert [job.optimizer for job in some[:90]].count("AdaBayes, fixed point") == 0
    assert {(job.optimizer, job.sgd_lr) for job in every[240:]}.isdisjoint(whole)
    assert ("AdaBayes-FP", math.inf) in {(job.optimizer, job.sgd_lr) for job in every[240:]}


def options(optimizer, x, lr=1e-3, examples=1024):
    return sgd_lr.options_of(sgd_lr.Job("text", optimizer, x, lr, 0, 1), examples)


def test_the_options_are_table_1_s_but_for_the_grid():
    common = dict(lr=1e-3, betas=(0.9, 0.999), weight_decay=0.05)
    assert options("AdamW", None) == common
    assert options("AdaBayes-FP", math.inf) == common | dict(sgd_lr=math.inf)
    assert options("AdaBayes", 10.0) == common | dict(sgd_lr=10.0, batch_size=1024)
    assert options("AdaBayes, fixed point", 10.0) == options("AdaBayes", 10.0)
    short = options("AdaBayes, memory of 1,000", 10.0, lr=3e-3)
    assert short["sgd_lr"] / (short["lr"] ** 2 * short["batch_size"]) == pytest.approx(1000)


@pytest.mark.parametrize(("lr", "transition"), [(9e-3, None), (1e-2, "exact")])
def test_a_memory_below_a_step_has_the_exact_transition(lr, transition):
    """With 1,024 examples and sgd_lr = 0.1 it is below one from lr = 0.00988."""
    found = options("AdaBayes", 0.1, lr=lr)
    assert found.get("transition") == transition
    AdaBayes([torch.nn.Parameter(torch.zeros(2))], **found)


@pytest.mark.parametrize("first", [0.0, 1e-5, 1e-3])
def test_variances_that_begin_at_the_fixed_point(first):
    """Under steady gradients they are Eq. 20's from the first step that moves a weight, after a warm-up from 0 too; that equation
    is the limit of small steps, here of lr x batch_size x gradient = 5e-5."""
    lr, x, batch_size = 1e-3, 10.0, 50
    p = torch.nn.Parameter(torch.zeros(4, dtype=torch.float64))
    grad = torch.tensor([1e-6, 1e-4, 1e-3, -1e-3], dtype=torch.float64)
    optimizer = AdaBayes([p], lr=lr, sgd_lr=x, batch_size=batch_size)
    optimizer.param_groups[0]["lr"] = first
    p.grad = grad.clone()
    sgd_lr.begin_at_fixed_point(optimizer)
    state = optimizer.state[p]
    assert (state["step"].item(), state["exp_avg"].abs().max().item(), state["exp_avg_sq"].max().item()) == (0, 0, 0)
    for _ in range(2):
        optimizer.step()
        optimizer.param_groups[0]["lr"] = lr
    expected = eq_20(lr / (batch_size * grad.abs()), x / batch_size)
    torch.testing.assert_close(posterior(optimizer, p)[1], expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(state["exp_avg_sq"], (1 - 0.999**2) * grad**2)


def study(folder, jobs, key="digits"):
    return sgd_lr.Study(key, None, folder, {"cpu": "some"}, jobs)


def say(part, says):
    pass


def trained(folder, *jobs):
    """The JSON of each."""
    work = study(folder, list(jobs))
    shared = work.prepare()
    for job in jobs:
        work.train(job, shared, {"cpu": "some"}, say)
    return [json.loads((folder / "runs" / f"{job.name}.json").read_text()) for job in jobs]


def test_text_and_fp_s_infinite_sgd_lr_is_adamw(tmp_path):
    adamw, fp, other = trained(
        tmp_path,
        sgd_lr.Job("text", "AdamW", None, 1e-2, 0, 8),
        sgd_lr.Job("text", "AdaBayes-FP", math.inf, 1e-2, 0, 8),
        sgd_lr.Job("text", "AdaBayes-FP", 1.0, 1e-2, 0, 8),
    )
    assert fp["test_loss"] == pytest.approx(adamw["test_loss"], rel=1e-4)
    assert fp["train_loss"] == pytest.approx(adamw["train_loss"], rel=1e-4)
    assert abs(other["test_loss"] / adamw["test_loss"] - 1) > 0.01
    assert adamw["test_loss"] < math.log(128)  # it has learnt that there are few characters
    assert (adamw["examples"], fp["sgd_lr"], fp["options"]["sgd_lr"], adamw["sgd_lr"]) == (16 * 64, "inf", "inf", None)
    assert fp["adam_like"] == 1
    assert "standard library" in adamw["data"]


def test_a_run_s_figures(tmp_path, monkeypatch):
    """Against losses that are summed up here over a training of the same steps; a step has the scheduled lr."""
    job = sgd_lr.Job("image", "AdamW", None, 1e-2, 3, 40)
    (found,) = trained(tmp_path, job)
    digits = data.load("digits")
    source, generator = trainings.Images(digits), torch.Generator().manual_seed(3)
    torch.manual_seed(3)
    model = source.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.999), weight_decay=0.05, fused=True)
    losses = []
    for t in range(40):
        optimizer.param_groups[0]["lr"] = 1e-2 * min(t / 2, 0.55 + 0.45 * math.cos(math.pi * t / 40))
        x, y = source.some(generator)
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    logits = model.eval()(digits.normalized(digits.test_x)).detach()
    assert found["train_loss"] == pytest.approx(sum(losses[-4:]) / 4, rel=1e-4)
    assert found["test_loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, digits.test_y).item(), rel=1e-4)
    assert found["test_error"] == pytest.approx(100 * (logits.argmax(1) != digits.test_y).double().mean().item())
    assert found["examples"] == 64


def test_the_variants_train_otherwise(tmp_path):
    every = ("AdaBayes", "AdaBayes, fixed point", "AdaBayes, memory of 1,000")
    plain, fixed_point, memory = trained(tmp_path, *(sgd_lr.Job("image", name, 100.0, 1e-2, 0, 20) for name in every))
    assert fixed_point["train_loss"] < 0.9 * plain["train_loss"]  # whose first steps are of the size of sgd_lr
    assert fixed_point["options"] == plain["options"]
    assert memory["options"] == plain["options"] | dict(batch_size=pytest.approx(1000))
    assert memory["train_loss"] != plain["train_loss"]


def test_a_loss_that_is_no_number_is_null(tmp_path):
    (found,) = trained(tmp_path, sgd_lr.Job("image", "AdamW", None, 1e30, 0, 5))
    assert (found["test_loss"], found["train_loss"]) == (None, None)


def test_what_is_done_is_left_alone(tmp_path):
    job = sgd_lr.Job("image", "AdaBayes, fixed point", 1.0, 1e-2, 0, 3)
    trained(tmp_path, job)
    path = tmp_path / "runs" / f"{job.name}.json"
    before = path.stat().st_mtime_ns
    trained(tmp_path, job)
    assert path.stat().st_mtime_ns == before
    with pytest.raises(WrongRun, match="other settings .steps was 3, now 4.: give those, or another --output"):
        trained(tmp_path, sgd_lr.Job("image", "AdaBayes, fixed point", 1.0, 1e-2, 0, 4))


# --- The command


def command(*words):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    words = [sys.executable, "-m", "bench.paper", *map(str, words)]
    return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_killed_at_any_moment_the_same_command_goes_on(tmp_path):
    words = ["sgd_lr", "--tasks", "image", "--data", "digits", "--seeds", 0, "--lr", 0.01, "--steps", 12, "--output", tmp_path]
    process, until = command(*words), time.monotonic() + 120
    while len(list((tmp_path / "runs").glob("[!.]*.json"))) < 3:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()  # its own processes have the same pipe: they have ended too
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("[!.]*.json")}
    assert 3 <= len(before) < 16
    again = command(*words, "--jobs", 2)
    out, _ = again.communicate(timeout=120)
    assert again.returncode == 0, out
    jobs = sgd_lr.jobs(["image"], [0], 12, [0.01])
    assert {path.name for path in (tmp_path / "runs").glob("[!.]*.json")} == {f"{job.name}.json" for job in jobs}
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert {"table.md", "loss.png"} <= {path.name for path in tmp_path.iterdir()}
    assert f"{len(before)} of 16 runs were there already" in " ".join(out.split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sgd_lr", "--steps", "0"], "--steps 0 is not above 0"),
        (["sgd_lr", "--jobs", "0"], "--jobs 0 is not above 0"),
        (["sgd_lr", "--tasks", "sound"], "invalid choice: 'sound' (choose from 'image', 'text')"),
        (["sgd_lr", "--lr", "0.002"], "invalid choice: 0.002 (choose from 0.0003, 0.001"),
        (["sgd_lr", "--data", "fashion", "--folder", "nowhere"], "nowhere is no folder: name the one that holds four files"),
    ],
)
def test_what_is_wrong_is_told(words, message, tmp_path):
    status, *said = run_script("bench.paper", *words, "--output", tmp_path / "out")
    assert status == 2
    assert message in " ".join("".join(said).split())
    assert "Traceback" not in "".join(said)
    assert not (tmp_path / "out").exists()


# --- From the JSON alone

LOSSES = {  # optimizer, sgd_lr: lr, and the test losses of seeds 0 and 1
    ("AdamW", None): {0.001: (0.5, 0.6), 0.01: (0.4, 0.5)},
    ("AdaBayes", "1"): {0.001: (0.41, 0.53), 0.01: (0.3, None)},
    ("AdaBayes", "10"): {0.001: (0.7, 0.8), 0.01: (0.46, 0.52)},
    ("AdaBayes", "100"): {0.001: (None, None)},
    ("AdaBayes, fixed point", "10"): {0.001: (0.43, 0.53)},
    ("AdaBayes-FP", "1"): {0.01: (0.9, 1.1)},
    ("AdaBayes-FP", "inf"): {0.001: (0.5, 0.6), 0.01: (0.4, 0.5)},
}


@pytest.fixture
def folder(tmp_path):
    runs = tmp_path / "runs"
    runs.mkdir()
    machine = dict(cpu="A CPU", gpu="", threads=1, versions={"torch": "2.9"}, date="2026-01-02T03:04:05+00:00")
    for (optimizer, x), by_lr in LOSSES.items():
        for lr, losses in by_lr.items():
            for seed, loss in enumerate(losses):
                run = dict(task="image", optimizer=optimizer, sgd_lr=x, lr=lr, seed=seed, steps=70, data="dots, sha256 12ab",
                           parameters=1234, examples=64, options=dict(weight_decay=0.05, betas=[0.9, 0.999]), machine=machine,
                           train_loss=None if loss is None else loss / 2, test_loss=loss)  # fmt: skip
                (runs / f"{optimizer}-{x}-{lr}-{seed}.json").write_text(json.dumps(run))
    return tmp_path


def rows(text, corner):
    _, _, rest = text.partition(f"| {corner} |")
    lines = [line for line in rest.partition("\n\n")[0].splitlines()[2:]]
    return {cells[0]: cells[1:] for cells in ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)}


def test_the_table_s_figures(folder):
    """Gaps to AdamW's best, by seed: 0.01, 0.03; 0.06, 0.02; 0.03, 0.03; 0, 0. Of these the pooled variance is
    (2 x 0.01^2 + 2 x 0.02^2) / 4 = 0.00025, and its root over that of two seeds is 0.0112. One row is far, and not among them."""
    sgd_lr_report.write(folder)
    text = (folder / "table.md").read_text()
    tests = rows(text, "test loss")
    assert tests["AdamW"] == ["0.5500", "**0.4500**", "-", "-", "2"]
    assert tests["AdaBayes, `sgd_lr=1`"] == ["**0.4700**", "diverged", "+0.0200 ± 0.0112", "15,625", "2"]
    assert tests["AdaBayes, `sgd_lr=10`"] == ["0.7500", "**0.4900**", "+0.0400 ± 0.0112", "1,562", "2"]
    assert tests["AdaBayes, `sgd_lr=100`"] == ["**diverged**", "-", "-", "1,562,500", "-"]
    assert tests["AdaBayes, begun at the fixed point, `sgd_lr=10`"] == ["**0.4800**", "-", "+0.0300 ± 0.0112", "156,250", "2"]
    assert tests["AdaBayes-FP, `sgd_lr=inf`"] == ["0.5500", "**0.4500**", "+0.0000 ± 0.0112", "-", "2"]
    assert tests["AdaBayes-FP, `sgd_lr=1`"] == ["-", "**1.0000**", "+0.5500", "-", "2"]
    assert rows(text, "training loss")["AdaBayes, `sgd_lr=10`"] == ["0.3750", "**0.2450**"]
    beside = "begun at the fixed point, `sgd_lr=10`, beside AdaBayes with this `sgd_lr`, each at its best `lr`"
    assert f"{beside}: -0.0100 ± 0.0112." in text
    assert "## Images: dots\n" in text
    assert "1,234 parameters, 70 steps, `batch_size=64`, `weight_decay=0.05`, `betas=(0.9, 0.999)`" in text
    assert "A CPU" in text


def test_the_picture_s_lines(folder):
    (grid,) = sgd_lr_report.read(folder)
    figure = sgd_lr_report.draw([grid], ("AdaBayes", "AdaBayes-FP", "AdaBayes, memory of 1,000"))
    assert [at.get_title(loc="left") for at in figure.axes] == [
        "Images, AdaBayes\nbest: 0.470 at sgd_lr = 1, lr = 0.001; AdamW 0.450",
        "Images, AdaBayes-FP\nbest: 0.450 at sgd_lr = inf, lr = 0.01; AdamW 0.450",
    ]
    first = {line.get_label(): line.get_xydata().tolist() for line in figure.axes[0].lines}
    assert first.keys() == {"sgd_lr = 1", "sgd_lr = 10", "sgd_lr = 100", "AdamW"}
    assert first["sgd_lr = 100"] == []
    assert first["sgd_lr = 1"] == [pytest.approx([0.001, 0.47])]  # the other diverged
    assert first["sgd_lr = 10"] == [pytest.approx([0.001, 0.75]), pytest.approx([0.01, 0.49])]
    for at in figure.axes:
        (adamw,) = (line for line in at.lines if line.get_label() == "AdamW")
        assert adamw.get_xydata()[1].tolist() == pytest.approx([0.01, 0.45])
    colours = {matplotlib.colors.to_hex(colour) for colour in sgd_lr_report.COLOURS.values()}
    assert len(colours) == len(sgd_lr_report.COLOURS) == 5


def test_a_picture_of_what_is_there(folder):
    assert {path.name for path in sgd_lr_report.write(folder)} == {"table.md", "loss.png", "variants.png"}
    for path in (folder / "runs").glob("*fixed point*"):
        path.unlink()
    assert {path.name for path in sgd_lr_report.write(folder)} == {"table.md", "loss.png"}


def test_one_seed_has_no_standard_error(folder):
    for path in (folder / "runs").glob("*-1.json"):
        path.unlink()
    sgd_lr_report.write(folder)
    found = rows((folder / "table.md").read_text(), "test loss")
    assert found["AdaBayes, `sgd_lr=10`"] == ["0.7000", "**0.4600**", "+0.0600", "1,562", "1"]


def test_without_adamw_there_is_no_gap(folder):
    for path in (folder / "runs").glob("AdamW*"):
        path.unlink()
    sgd_lr_report.write(folder)
    found = rows((folder / "table.md").read_text(), "test loss")
    assert found["AdaBayes, `sgd_lr=10`"] == ["0.7500", "**0.4900**", "-", "1,562", "-"]


def test_seeds_that_are_not_everywhere(folder):
    """The losses are seed 0's, which every point has. The gaps are of all seeds there are; a single one has the
    others' deviation, the root of (2 x 0.01^2 + 2 x 0.02^2) / 3."""
    (folder / "runs" / "AdaBayes, fixed point-10-0.001-1.json").unlink()
    sgd_lr_report.write(folder)
    found = rows((folder / "table.md").read_text(), "test loss")
    assert found["AdamW"] == ["0.5000", "**0.4000**", "-", "-", "2"]
    assert found["AdaBayes, `sgd_lr=10`"] == ["0.7000", "**0.4600**", "+0.0400 ± 0.0129", "1,562", "2"]
    assert found["AdaBayes, begun at the fixed point, `sgd_lr=10`"] == ["**0.4300**", "-", "+0.0300 ± 0.0183", "156,250", "1"]
    assert "the seeds that every point has (0)" in (folder / "table.md").read_text()
    (folder / "runs" / "AdamW-None-0.001-0.json").unlink()
    with pytest.raises(BrokenRun, match="no seed of image was trained at every point"):
        sgd_lr_report.write(folder)


def test_report_makes_both_anew(folder):
    process = command("report", folder)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    assert {"table.md", "loss.png"} <= {path.name for path in folder.iterdir()}
    assert (folder / "loss.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(steps=71), "differ in steps: they cannot be compared"),
        (dict(data="dots, sha256 12ac"), "differ in data: they cannot be compared"),
        (None, "holds no run of lr and sgd_lr: it lacks data"),
        ("{", "other.json is broken"),
    ],
)
def test_runs_that_are_not_alike_are_refused(folder, changes, message):
    run = json.loads(next((folder / "runs").glob("*.json")).read_text())
    if changes is None:
        del run["data"]
    content = changes if isinstance(changes, str) else json.dumps(run | (changes or {}))
    (folder / "runs" / "other.json").write_text(content)
    with pytest.raises(BrokenRun, match=message):
        sgd_lr_report.write(folder)
    assert not (folder / "table.md").exists()


def test_an_empty_folder_is_told(tmp_path):
    with pytest.raises(BrokenRun, match="there are no runs in"):
        sgd_lr_report.read(tmp_path)


def test_the_documentation_shows_what_is_committed(tmp_path):
    """The picture, byte for byte; the tables follow from the committed runs."""
    results = HERE / "bench" / "results" / "sgd-lr"
    if not results.exists():
        pytest.skip("needs the source tree")
    assert (HERE / "docs" / "images" / "sgd-lr.png").read_bytes() == (results / "loss.png").read_bytes()
    grids = sgd_lr_report.read(results)
    assert "\n".join(map(sgd_lr_report.markdown, grids)) in (results / "table.md").read_text()
