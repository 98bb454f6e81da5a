"""The language model example, in processes of its own: it learns, it tells what is wrong, and however it is killed it ends
with the weights of a run that nobody disturbed."""

import contextlib
import importlib.util
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from processes import run_script, words
from torch.distributed.checkpoint.api import CheckpointException

import adabayes_fused

for needed in ("rich", "tensorboard"):
    pytest.importorskip(needed)
pytestmark = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the processes it kills in /proc")

SCRIPT = Path(__file__).parents[1] / "examples" / "train_lm.py"
SMALL = {"warmup": 5, "batch-size": 4, "sequence-length": 16, "width": 32, "depth": 1, "lr": 5e-3, "log-every": 1}
KILLED = {**SMALL, "steps": 40, "save-every": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("lm")


@pytest.fixture(scope="module")
def text(folder):
    """Words in random order, 20,000 characters."""
    words = random.Random(0).choices(["one", "two", "three", "four", "five", "six", "seven", "eight"], k=5000)
    path = folder / "text.txt"
    path.write_text(" ".join(words)[:20000])
    return path


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("train_lm_example", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def sha256_in(printed):
    return re.search("sha256 of the weights ([0-9a-f]{64})", printed)[1]


def ended(*arguments, group=2, **options):
    """What a run printed to which nothing happens."""
    status, out, err = run_script(SCRIPT, *arguments, *words(**options), group=group)
    assert status == 0, err
    return out


class Job:
    """torchrun over the example, in two processes."""

    def __init__(self, *arguments, restarts=0, **options):
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", f"--max-restarts={restarts}"]
        command = [sys.executable, *launch, SCRIPT, *arguments, *words(**options)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[1])}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(list(map(str, command)), stdout=pipe, stderr=pipe, text=True, env=environment)

    def end(self, timeout=300):
        try:
            self.out, self.err = self.process.communicate(timeout=timeout)
        finally:
            if self.process.poll() is None:
                for pid in self.workers().values():
                    os.kill(pid, signal.SIGKILL)
                self.process.kill()
        return self.process.returncode

    def sha256(self):
        assert self.end() == 0, self.err
        return sha256_in(self.out)

    def workers(self):
        """Rank -> process id, of torchrun's children."""
        found = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                if int(stat.read_text().rpartition(")")[2].split()[1]) == self.process.pid:
                    found[int(re.search(rb"\0RANK=(\d+)", stat.with_name("environ").read_bytes())[1])] = int(stat.parent.name)
            except (OSError, TypeError):  # it has ended meanwhile, or is no worker
                continue
        return found

    def kill(self, *ranks):
        workers = self.workers()
        for rank in ranks:
            os.kill(workers[rank], signal.SIGKILL)


def wait_for(job, condition, timeout=300):
    """Polls as fast as others let it: what it waits for lasts for milliseconds."""
    until = time.monotonic() + timeout
    while not condition():
        assert job.process.poll() is None, job.process.communicate()
        assert time.monotonic() < until
        time.sleep(0.0005)


def newest(output):
    """The step of the checkpoint to go on from; 0 before there is one."""
    latest = output / "checkpoints" / "latest"
    return int(latest.read_text().removeprefix("step-")) if latest.exists() else 0


def saving(output):
    with contextlib.suppress(FileNotFoundError):  # it was there when the folder was listed
        return any((output / "checkpoints").glob(".unfinished-*/*"))
    return False


def state_of(output):
    """The last checkpoint, whole, in this process."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    latest = output / "checkpoints" / (output / "checkpoints" / "latest").read_text()
    dcp_to_torch_save(latest, output / "whole.pt")
    return torch.load(output / "whole.pt", weights_only=False)


def curves(output):
    """Tensorboard's: tag -> [(step, value), ...]."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(output / "logs")).Reload()
    return {tag: [(e.step, e.value) for e in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


@pytest.fixture(scope="module")
def undisturbed(folder, text):
    """(where, the sha256 of its weights), of a run of two processes."""
    return folder / "undisturbed", sha256_in(ended(text, output=folder / "undisturbed", **KILLED))


# --- It learns


def test_ddp_and_fsdp2_learn_the_same(folder, text):
    kinds = [("ddp", "adabayes"), ("fsdp2", "adabayes"), ("fsdp2", "adamw")]
    options = {**SMALL, "steps": 60, "save-every": 30, "accumulate": 2}
    outputs = [folder / "-".join(kind) for kind in kinds]
    for (parallel, optimizer), output in zip(kinds, outputs, strict=True):
        printed = ended(text, output=output, parallel=parallel, optimizer=optimizer, **options)
        losses = [value for _, value in curves(output)["loss"]]
        assert len(losses) == 60
        assert losses[0] > 2.8  # ln(16 characters) = 2.77
        assert sum(losses[-5:]) / 5 < 2.3
        assert float(re.search("validation loss (.*)", printed)[1]) < 2.3
        assert printed.count("step ") == 60
    shares = [curves(output)["regime/sgd_like"] for output in outputs[:2]]
    for (step, one), (_, other) in zip(*shares, strict=True):
        assert one == pytest.approx(other, abs=0.01), step
    ddp, fsdp2 = (state_of(output)["model"] for output in outputs[:2])
    assert ddp.keys() == fsdp2.keys()
    for name in ddp:
        torch.testing.assert_close(ddp[name], fsdp2[name], rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


# --- It survives


def check_undisturbed(output, undisturbed):
    """Nothing is left over, and the curves are those of the undisturbed run: no step twice, none missing."""
    straight, _ = undisturbed
    assert sorted(p.name for p in (output / "checkpoints").iterdir()) == ["latest", "step-00000039", "step-00000040"]
    found, expected = curves(output), curves(straight)
    assert found.keys() == expected.keys()
    assert found.keys() >= {"loss", "lr", "grad_norm", "regime/sgd_like", "regime/adam_like", "regime/distance"}
    for tag in found.keys() - {"tokens_per_second"}:
        assert found[tag] == expected[tag], tag


def test_torchrun_restarts_it(folder, text, undisturbed):
    """One worker or both killed at a random moment or while they save: with --max-restarts the job heals itself."""
    output, moments = folder / "healed", random.Random(1)
    job = Job(text, output=output, restarts=4, **KILLED)
    for ranks, while_saving in (((0,), False), ((1,), True), ((0, 1), False), ((0,), True)):
        at = newest(output) + moments.randrange(1, 5)
        wait_for(job, lambda at=at: newest(output) >= at)
        if while_saving:
            wait_for(job, lambda: saving(output))
        else:
            time.sleep(moments.uniform(0, 0.1))
        job.kill(*ranks)
        assert newest(output) < 40
    assert job.sha256() == undisturbed[1]
    check_undisturbed(output, undisturbed)


def test_the_same_command_goes_on(folder, text, undisturbed):
    """Torchrun ends when a worker is killed. Killed itself it leaves its workers, who go on; the folder stays theirs."""
    output, moments = folder / "again", random.Random(2)
    for ranks in ((1,), (0, 1)):
        job, before = Job(text, output=output, **KILLED), newest(output)
        wait_for(job, lambda before=before: newest(output) > before + 2)
        time.sleep(moments.uniform(0, 0.2))
        job.kill(*ranks)
        assert job.end() == 1
    job, before = Job(text, output=output, **{**KILLED, "save-every": 7}), newest(output)
    wait_for(job, lambda: newest(output) > before)
    workers = job.workers().values()
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)
    job.process.kill()
    second = Job(text, output=output, **KILLED)
    assert second.end() == 1
    assert "another run is writing into" in second.err
    for pid in workers:
        os.kill(pid, signal.SIGKILL)
    assert newest(output) < 40
    assert Job(text, output=output, **KILLED).sha256() == undisturbed[1]
    check_undisturbed(output, undisturbed)
    assert sha256_in(ended(text, output=output, **KILLED)) == undisturbed[1]  # there is nothing left to do


def test_three_processes_go_on_with_the_same_sums(folder, text):
    """A sum of three depends on its order, and DDP's order on the passes before."""
    options = {**SMALL, "steps": 12, "save-every": 5, "depth": 3}
    output = folder / "three"
    straight = sha256_in(ended(text, output=output, group=3, **options))
    (output / "checkpoints" / "latest").write_text("step-00000010")
    assert sha256_in(ended(text, output=output, group=3, **options)) == straight


class Killed(BaseException):
    pass


def test_killed_before_each_operation_on_a_file(example, tmp_path):
    """From one moment of saving on nothing reaches a file any more. ``latest`` then names a checkpoint with that step's
    weights, the last or the new one; saving again succeeds, and two checkpoints are kept."""
    operations = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")  # os.replace is an os.rename too
    left = float("inf")  # operations until the kill

    def count(event, args):
        nonlocal left
        if left < float("inf") and event in operations and str(tmp_path) in str(args[0]):
            left -= 1
            if left == -1 and event == "open" and args[2] & os.O_TRUNC and os.path.exists(args[0]):
                os.truncate(args[0], 0)  # killed after it was opened, before it was written
            if left < 0:
                raise Killed

    def run_at(step):
        model = torch.nn.Linear(3, 2)
        optimizer = adabayes_fused.AdaBayes(model.parameters(), batch_size=4)
        torch.nn.init.constant_(model.weight, step)
        return example.Run(model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0))

    sys.addaudithook(count)  # for good, but it counts only here
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        steps, operation = set(), 0
        while True:
            folder = tmp_path / str(operation)
            folder.mkdir()
            example.save(folder, 1, run_at(1), {})
            example.save(folder, 2, run_at(2), {})
            left = operation
            with contextlib.suppress(Killed, CheckpointException):
                example.save(folder, 3, run_at(3), {})
            killed, left = left < 0, float("inf")
            for name in sorted(path.name for path in folder.glob("step-*")):
                run = run_at(0)
                assert example.load(folder / name, run) == int(name[5:])
                assert run.model.weight.eq(int(name[5:])).all()
            found = int(example.newest(folder, {}).name[5:])
            assert found in (2, 3)
            steps.add(found)
            if not killed:
                break
            example.save(folder, 3, run_at(3), {})
            assert example.newest(folder, {}) == folder / "step-00000003"
            assert [path.name for path in sorted(folder.glob("step-*"))] == ["step-00000002", "step-00000003"]
            operation += 1
    finally:
        torch.distributed.destroy_process_group()
    assert steps == {2, 3}
    assert operation > 8


# --- It tells what is wrong


def test_what_is_wrong_is_told_and_ends_it(folder, text, tmp_path):
    """Once, whether one process or two; none hangs."""
    output, small = tmp_path / "run", {**SMALL, "steps": 2}
    short, binary = tmp_path / "short.txt", tmp_path / "binary"
    short.write_text("too short")
    binary.write_bytes(bytes(range(256)))
    ended(text, output=output, group=0, **small)
    for arguments, options, group, message in (
        ([tmp_path / "missing.txt"], small, 2, "No such file"),
        ([text], {**small, "width": 64}, 0, "other settings (width was 32, now 64)"),
        ([short], {**small, "output": tmp_path / "a"}, 0, "too short: the last tenth of its 9 characters"),
        ([binary], {**small, "output": tmp_path / "b"}, 0, "is not UTF-8 text"),
        ([text], {**small, "output": text}, 0, "Not a directory"),
        ([text, "--lr", "0"], {}, 0, "--lr 0.0 is not above 0"),
        ([text, "--optimiser=adamw"], {}, 0, "unrecognized arguments: --optimiser=adamw"),
    ):
        status, _, err = run_script(SCRIPT, *arguments, *words(**{"output": output, **options}), group=group)
        assert status == 2
        assert_told(err, message)
    job = Job(text, "--width=33", output=output)
    assert job.end() == 1  # torchrun's
    assert_told(job.err.partition("torch/distributed")[0], "--width 33 is not a multiple of 32")


def assert_told(err, message):
    assert err.count("train_lm.py: error:") == 1, err
    assert message in err
    assert "Traceback" not in err
