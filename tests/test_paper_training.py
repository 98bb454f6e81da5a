"""The paper's trainings: each optimizer is the one Table 1 means, and a run that is killed ends as one that is not."""

import functools
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import run_script, words
from torch.nn.functional import gelu

from adabayes_fused import AdaBayes
from bench.paper import data, networks, optimizers, reported
from bench.paper import train as training
from bench.paper.figure3 import figure3
from bench.paper.jobs import Plan, spread
from bench.paper.reported import eq_20
from bench.paper.train import Job, Run, WrongRun, on_a_stream, train

for needed in ("sklearn", "pytorch_optimizer"):
    pytest.importorskip(needed)
HERE = Path(__file__).parents[1]
SMALL = Job("small", "AdaBayes", seed=0, epochs=5, drop=3, batch_size=32, width=0.25)


@functools.cache
def images():
    digits = data.load("digits")
    return data.Augmented(digits._replace(train_x=digits.train_x[:120], train_y=digits.train_y[:120]))


def job(**changes):
    return Job(**{**vars(SMALL), **changes})


def say(part, says):
    pass


def record(folder, job):
    return json.loads((folder / "runs" / f"{job.name}.json").read_text())


def numbers(record):
    return [{name: value for name, value in epoch.items() if name != "seconds"} for epoch in record["epochs"]]


# --- Optimizers


def bounded(grads, lrs, ams, gamma, l2=5e-4, base=1e-3, final=0.1, betas=(0.9, 0.999), eps=1e-8):
    """AdaBound's Algorithm 2 and AMSBound's Algorithm 3 (Luo et al., 2019) with Adam's corrections; a weight from 1."""
    p, m, v, largest = 1.0, 0.0, 0.0, 0.0
    for t, (grad, lr) in enumerate(zip(grads, lrs, strict=True), 1):
        g = grad + l2 * p
        m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g * g
        largest = max(largest, v) if ams else v
        size = lr * math.sqrt(1 - betas[1] ** t) / (1 - betas[0] ** t) / (math.sqrt(largest) + eps)
        lower, upper = (final * lr / base * bound for bound in (1 - 1 / (gamma * t + 1), 1 + 1 / (gamma * t)))
        p -= min(max(size, lower), upper) * m
    return p


@pytest.mark.parametrize("name", ["AdaBound", "AMSBound"])
def test_the_library_s_adabound_is_its_paper_s(name):
    steps, rng = 60, np.random.default_rng(0)
    scale, lrs = np.geomspace(1, 1e-3, steps), [1e-3] * 40 + [1e-4] * 20  # so that AMSBound's maximum matters
    columns = rng.normal(size=(steps, 8)) * scale[:, None] * np.geomspace(1e-3, 10, 8)
    p = torch.nn.Parameter(torch.ones(8, dtype=torch.float64))
    options = optimizers.options_of(name, "resnet34", reported.STEPS // 100, 128)
    optimizer = optimizers.make(name, [p], options)
    for lr, grads in zip(lrs, columns, strict=True):
        optimizer.param_groups[0]["lr"] = lr
        p.grad = torch.tensor(grads)
        optimizer.step()
    expected = [bounded(grads, lrs, name == "AMSBound", gamma=0.1) for grads in columns.T]
    torch.testing.assert_close(p.detach(), torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12)


def test_hyper_parameters_are_the_paper_s():
    """As in Luo et al.'s code for the first six, in the paper's Section 4 for the others."""

    def of(name, network="resnet34", steps=78_200):
        return optimizers.options_of(name, network, steps, 128)

    assert list(optimizers.TABLE1) == [
        "SGD",
        "Adam",
        "AdaGrad",
        "AMSGrad",
        "AdaBound",
        "AMSBound",
        "AdamW",
        "AdaBayes-FP",
        "AdaBayes",
    ]
    assert of("SGD") == dict(lr=0.1, momentum=0.9, weight_decay=5e-4)
    assert of("Adam") == dict(lr=1e-3, betas=(0.99, 0.999), weight_decay=5e-4)
    assert of("AMSGrad", "densenet121") == dict(lr=1e-3, betas=(0.9, 0.999), weight_decay=5e-4, amsgrad=True)
    assert of("AdaGrad") == dict(lr=0.01, weight_decay=5e-4)
    assert of("AdaBound")["gamma"] == 1e-3
    assert of("AdaBound", steps=19_550)["gamma"] == 4e-3
    assert not of("AMSBound")["weight_decouple"]
    for name in ("AdamW", "AdaBayes", "AdaBayes-FP"):
        assert of(name)["lr"] * of(name)["weight_decay"] == pytest.approx(5e-5)
    assert of("AdaBayes")["sgd_lr"] / of("AdaBayes")["batch_size"] == 7.8125e-4


def test_the_decay_that_is_kept_at_the_drop():
    """lambda = lr x weight_decay stays 5e-5 in the one, falls with lr in the other."""
    found = {}
    for name in ("AdaBayes-FP", "AdaBayes-FP, as released"):
        run = Run(job(optimizer=name, drop=1), images(), {})
        products = []
        for _ in range(2):
            run.epoch(say)
            (group,) = run.optimizer.param_groups
            products.append((group["lr"], group["lr"] * group["weight_decay"]))
        found[name] = products
    assert found["AdaBayes-FP"] == [pytest.approx((1e-4, 5e-6))] * 2
    assert found["AdaBayes-FP, as released"] == [pytest.approx((1e-4, 5e-5))] * 2


# --- Runs


def losses(name, steps):
    run, found, epoch = Run(job(optimizer=name, seed=1), images(), {}), [], 0
    run.model.train()
    while len(found) < steps:
        epoch += 1
        for rows in run.images.epoch(1, epoch).split(32):
            run.sums.zero_()
            run.step(rows)
            found.append(run.sums[0].item() / len(rows))
    return torch.tensor(found[:steps], dtype=torch.float64)


@pytest.mark.parametrize("name", ["AdaBayes", "AdaBayes-FP"])
@pytest.mark.parametrize(("smooth", "steps"), [(True, 100), (False, 30)])
def test_the_slow_path_trains_alike(name, smooth, steps, monkeypatch):
    """To float32's rounding, which the steps add up: 2e-6. Where a rectifier's input is rounded to the other side of 0 a
    gradient jumps, which soon happens somewhere; a smooth one shows all of the first hundred steps."""
    if smooth:
        monkeypatch.setattr(networks, "relu", gelu)
    fused = losses(name, steps)
    torch.testing.assert_close(fused, losses(f"{name}, slow path", steps), rtol=2e-6, atol=0)
    assert fused[-1] < 0.9 * fused[0]


def test_an_epoch_s_figures(monkeypatch):
    """Against losses and errors that are summed up here, image by image."""
    run = Run(job(epochs=1, optimizer="SGD"), images(), {})
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    run.epoch(say)
    (found,) = run.record["epochs"]
    again = Run(job(epochs=1, optimizer="SGD"), images(), {})
    assert all(torch.equal(value, before[name]) for name, value in again.model.state_dict().items())
    loss, wrong, model = 0.0, 0, again.model.train()
    for rows in images().epoch(0, 1).split(32):
        x, y = images().batch(rows)
        logits = model(x)
        again.optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits, y).backward()
        again.optimizer.step()
        loss -= logits.detach().double().log_softmax(1)[range(len(y)), y].sum().item()
        wrong += int((logits.argmax(1) != y).sum())
    assert found["train_loss"] == pytest.approx(loss / 120, rel=1e-5)
    assert found["train_error"] == pytest.approx(100 * wrong / 120)
    digits = images().data
    logits = model.eval()(digits.normalized(digits.test_x)).detach()
    expected = torch.nn.functional.cross_entropy(logits, digits.test_y).item()
    assert found["test_loss"] == pytest.approx(expected, rel=1e-5)
    assert found["test_error"] == pytest.approx(100 * (logits.argmax(1) != digits.test_y).double().mean().item())


class Killed(Exception):
    pass


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_a_run_goes_on_bit_for_bit(name, tmp_path):
    """Left in the middle of its second and of its fifth epoch, before and after the drop of lr."""
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    its = job(optimizer=name)
    train(its, images(), straight, {}, say)
    for moment in (0.3, 0.9):

        def kill(part, says, moment=moment):
            if part > moment:
                raise Killed

        with pytest.raises(Killed):
            train(its, images(), killed, {}, kill)
    train(its, images(), killed, {}, say)
    assert numbers(record(killed, its)) == numbers(record(straight, its))
    assert [c["epoch"] for c in record(killed, its)["continued"]] == [2, 5]
    lrs = [epoch["lr"] for epoch in record(straight, its)["epochs"]]
    assert lrs == pytest.approx([lrs[0]] * 3 + [lrs[0] / 10] * 2)
    assert not list((killed / "checkpoints").iterdir())
    if name == "AdaBayes":
        points = [(folder / "runs" / f"{its.name}.figure3.json").read_text() for folder in (straight, killed)]
        assert points[0] == points[1]
        assert json.loads(points[0])["epoch"] == 3


def test_a_checkpoint_in_a_while(tmp_path):
    """A run that has saved nothing for long begins anew, and ends the same; its last state is kept if asked for."""
    for folder, seconds in ((tmp_path / "often", 0), (tmp_path / "rarely", 1000)):

        def kill(part, says, folder=folder, seconds=seconds):
            if part > 0.9:
                assert (folder / "checkpoints").exists() == (seconds == 0)
                raise Killed

        with pytest.raises(Killed):
            train(SMALL, images(), folder, {}, kill, seconds)
        train(SMALL, images(), folder, {}, say, seconds, keep=True)
    often, rarely = (record(tmp_path / name, SMALL) for name in ("often", "rarely"))
    assert numbers(often) == numbers(rarely)
    assert "continued" not in rarely
    state = torch.load(tmp_path / "rarely" / "checkpoints" / "adabayes-seed0.pt", weights_only=True)
    assert json.loads(state["record"])["epochs"] == rarely["epochs"]


def test_killed_between_the_last_checkpoint_and_the_last_json(tmp_path, monkeypatch):
    write = training.write

    def kill(path, content):
        if len(content.get("epochs", ())) == 5:
            raise Killed
        write(path, content)

    monkeypatch.setattr(training, "write", kill)
    with pytest.raises(Killed):
        train(SMALL, images(), tmp_path, {}, say, keep=True)
    monkeypatch.undo()
    assert len(record(tmp_path, SMALL)["epochs"]) == 4
    train(SMALL, images(), tmp_path, {}, say, keep=True)
    assert len(record(tmp_path, SMALL)["epochs"]) == 5


def test_a_checkpoint_of_other_settings(tmp_path):
    """Killed after its first checkpoint, before its first JSON."""

    def kill(part, says):
        if part > 0.3:
            raise Killed

    with pytest.raises(Killed):
        train(SMALL, images(), tmp_path, {}, kill)
    (tmp_path / "runs" / "adabayes-seed0.json").unlink()
    with pytest.raises(WrongRun, match="adabayes-seed0.pt is of a run of other settings"):
        train(job(epochs=7), images(), tmp_path, {}, say)


def test_what_is_done_is_left_alone(tmp_path):
    train(SMALL, images(), tmp_path, {}, say)
    written = tmp_path / "runs" / "adabayes-seed0.json"
    before = written.stat().st_mtime_ns

    def never(part, says):
        raise AssertionError

    train(SMALL, images(), tmp_path, {}, never)
    assert written.stat().st_mtime_ns == before
    with pytest.raises(WrongRun, match="is of a run of other settings .protocol was .*: give those, or another --output"):
        train(job(epochs=6), images(), tmp_path, {}, never)


# --- Figure 3


def test_figure_3_s_points():
    """State that is set by hand: a weight at Eq. 20, one at twice its value, one without any gradient."""
    eta, batch_size, sigma_sq, t = 2e-3, 50, 0.3 / 50, 7
    mean_sq = torch.tensor([4.0, 4.0, 0.0], dtype=torch.float64)  # of the summed loss's gradient
    x = eta / mean_sq.sqrt()
    post = 1 / ((1 + (1 + 4 * (sigma_sq / x) ** 2).sqrt()) / (2 * sigma_sq))  # Eq. 20 as the paper prints it
    p = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = AdaBayes([p], lr=eta, sgd_lr=0.3, batch_size=batch_size, betas=(0.9, 0.99))
    p.grad = torch.zeros_like(p)
    optimizer.step()
    state = optimizer.state[p]
    state["step"].fill_(t)
    state["exp_avg_sq"].copy_(mean_sq / batch_size**2 * (1 - 0.99**t))
    state["post_var"].copy_(post * torch.tensor([1.0, 2.0, 1.0]) / sigma_sq)
    found = figure3(optimizer, seed=0)
    assert (found["weights"], found["left_out"], found["adam_side"]["weights"]) == (2, 1, 2)
    assert sorted(found["post"]) == pytest.approx([post[0].item(), 2 * post[0].item()], rel=1e-4)
    assert found["x"] == pytest.approx([eta / 2] * 2, rel=1e-4)
    assert found["sigma_sq"] == pytest.approx(sigma_sq)
    assert found["ratio_mean"] == pytest.approx(1.5)
    assert found["ratio_std"] == pytest.approx(0.5)


def test_eq_20_s_limits():
    x = torch.tensor([1e-9, 1e3], dtype=torch.float64)
    assert eq_20(x, 0.01).tolist() == pytest.approx([1e-9, 0.01], rel=1e-6)


# --- The command


def command(*arguments, **options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-m", "bench.paper", *map(str, arguments), *words(**options)],
        env=environment,
        stdout=pipe,
        stderr=subprocess.STDOUT,
        text=True,
    )


DIGITS = dict(epochs=8, images=200, width=0.25, seeds=[3], optimizers=["AdaBayes", "SGD", "AdaBound"], device="cpu")
DIGITS |= {"save-every": 0}


def test_killed_at_any_moment_the_same_command_goes_on(tmp_path):
    straight, killed, moments = tmp_path / "straight", tmp_path / "killed", random.Random(0)
    status, *said = run_script("bench.paper", "digits", "--no-appendix", *words(output=straight, **DIGITS))
    assert status == 0, said
    for least in (1, 6):
        process = command("digits", output=killed, jobs=2, **DIGITS)
        until = time.monotonic() + 200
        while sum(len(json.loads(p.read_text())["epochs"]) for p in (killed / "runs").glob("[!.]*seed3.json")) < least:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < until
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.05))
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()  # its own processes have the same pipe: they have ended too
    last = command("digits", output=killed, jobs=2, **DIGITS)
    assert last.wait(300) == 0, last.communicate()
    for name in ("adabayes", "sgd", "adabound"):
        found, expected = (json.loads((folder / "runs" / f"{name}-seed3.json").read_text()) for folder in (killed, straight))
        assert len(found["epochs"]) == 8
        assert numbers(found) == numbers(expected)
    assert json.loads((killed / "gradients.json").read_text())["run"] == "adabayes-seed3"
    made = {"table.md", "table.csv", "figure3.png", "figure4.png"}
    assert made <= {path.name for path in straight.iterdir()}
    assert made | {"gradients.png"} <= {path.name for path in killed.iterdir()}


def test_cifar_s_layout_and_resnet_34_to_the_table(tmp_path):
    """All of it on a narrow network and a few images, as a GPU would run the whole."""
    rng = np.random.default_rng(0)
    files = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
    for name in files:
        records = rng.integers(0, 256, (20, 3073), np.uint8)
        records[:, 0] = np.arange(20) % 10
        (tmp_path / name).write_bytes(records.tobytes())
    # With 4 channels, at a width of 1/16, the backward convolution of torch 2.13 (oneDNN, AVX2 without AVX-512) ends the process.
    options = dict(network="resnet34", width=0.125, epochs=2, optimizers=["AdaBayes", "AdamW"], seeds=[0, 1], device="cpu")
    process = command("cifar10", "--no-appendix", folder=tmp_path, output=tmp_path / "out", name="noise", **options)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    found = json.loads((tmp_path / "out" / "runs" / "adamw-seed1.json").read_text())
    assert (found["data"], found["network"], len(found["epochs"])) == ("noise", "resnet34", 2)
    assert found["protocol"]["train_images"] == 100
    assert found["machine"]["command"].startswith("python -m bench.paper cifar10 --no-appendix --folder")
    assert "noise" in (tmp_path / "out" / "table.md").read_text()


def test_a_part_of_the_images_has_all_labels():
    """Of ten, four: the first of each quarter. Of the digits, each label as often as among all."""
    assert spread(10, 4).tolist() == [0, 2, 5, 7]
    assert spread(3, 9).tolist() == [0, 1, 2]
    plan = Plan("digits", None, None, 300, "cpu", Path(), {}, [], None, 0)
    found, everything = plan.load(), data.load("digits")
    assert found.name == "digits, 300 images"
    assert (len(found.train_y), len(found.test_y)) == (300, 300)
    assert (found.train_y.bincount() / 300 - everything.train_y.bincount() / 1438).abs().max() < 0.03
    for image, label in zip(found.test_x, found.test_y, strict=True):
        assert ((everything.test_x == image).flatten(1).all(1) & (everything.test_y == label)).any()


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["fashion", "--folder", "nowhere"], 2, "nowhere is no folder: name the one that holds four files"),
        (["cifar10"], 2, "the following arguments are required: --folder"),
        (["digits", "--optimizers", "Adamw"], 2, "invalid choice: 'Adamw'"),
        (["digits", "--epochs", "0"], 2, "--epochs 0 is not above 0"),
        (["digits", "--width", "0"], 2, "--width 0.0 is not in (0, 4]"),
        (["digits", "--images", "129"], 2, "--images 129: the last batch would have 1 image"),
        (["report", "nowhere"], 2, "there are no runs in nowhere"),
    ],
)
def test_what_is_wrong_is_told(arguments, status, message, tmp_path):
    ended, *said = run_script("bench.paper", *arguments)
    assert ended == status
    assert message in " ".join("".join(said).split())
    assert "Traceback" not in "".join(said)


def test_one_process_a_folder(tmp_path):
    import fcntl

    handle = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    status, out, _ = run_script("bench.paper", "digits", *words(output=tmp_path, **DIGITS))
    os.close(handle)
    assert status == 2
    assert "another process is training into" in out


# --- On a GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_captured_steps_train_as_eager_ones(name):
    """One CUDA graph a batch length; over two epochs, a last batch of another length and a drop of lr."""
    found = []
    for graphs in (True, False):
        there = data.Augmented(images().data.to(torch.device("cuda")))
        run = Run(job(optimizer=name, epochs=6, drop=5, graphs=graphs), there, {})
        with on_a_stream(run), torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            for _ in range(6):
                run.epoch(say)
        found.append([epoch["train_loss"] for epoch in run.record["epochs"]])
        if graphs:
            assert sorted(run.step.graphs) == [24, 32]
    assert found[0] == pytest.approx(found[1], rel=1e-3)
