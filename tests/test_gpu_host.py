"""What a step has a GPU do, and never asks of it: launches, copies and waits in each case of real training, on a GPU or on the
stand-in for one (tests/fakecuda); and that the kernels give the CPU's weights there."""

import contextlib
import os
import subprocess
import sys

import pytest
import torch
from conftest import HAS_GPU
from runs import FUSED
from test_gpu import waiting_is_an_error

from adabayes_fused import backends
from adabayes_fused.codes import STATE_DTYPES, WEIGHT_ROUNDINGS

pytestmark = pytest.mark.skipif(not HAS_GPU, reason="needs an NVIDIA GPU, or 'make test-gpu-host'")

try:
    from fakecuda import record
except ImportError:  # a real one
    record = None

OPTIONS = {"AdaBayes": dict(batch_size=8), "AdaBayesFP": {}}
# By case: policy, and how many launches a step of one bucket takes.
CASES = {
    "plain": ({}, 1),
    "capturable": (dict(capturable=True), 1),
    "scaler": ({}, 2),
    "clip": (dict(max_grad_norm=1.0), 3),
    "skip": (dict(skip_nonfinite=True), 3),
    "scaler, clip and skip": (dict(max_grad_norm=1.0, skip_nonfinite=True), 3),
    "lr tensor": ({}, 3 + 12),
    "bfloat16": (dict(state_dtype="bfloat16"), 1),
    "8bit": (dict(lean=True, state_dtype="8bit", seed=3), 1),
    "8bit, scaler, clip and skip": (dict(lean=True, state_dtype="8bit", max_grad_norm=1.0, skip_nonfinite=True), 3),
}


def lists():
    pytest.importorskip("psutil")
    from bench.shapes import densenet121, gpt2

    small = [tuple(min(size, 40) for size in shape) for shape in gpt2()]
    return {"1000x16": [(16,)] * 1000, "densenet121": densenet121(), "gpt2": small, "one": [(3_000_000,)]}


@pytest.fixture(params=["cuda", "triton"])
def backend(request):
    if (reason := backends.BACKENDS[request.param].unavailable(torch.device("cuda"))) is not None:
        pytest.skip(f"backend {request.param}: {reason}")
    return request.param


def make(name, shapes, case, backend, device="cuda"):
    generator = torch.Generator().manual_seed(3)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(device)) for shape in shapes]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(device)
    optimizer = FUSED[name](params, lr=1e-2, backend=backend, **OPTIONS[name], **CASES[case][0])
    if "scaler" in case:  # as torch.amp.GradScaler does
        optimizer.grad_scale, optimizer.found_inf = torch.full((), 4.0, device=device), torch.zeros((), device=device)
    if "lr" in case:
        optimizer.param_groups[0]["lr"] = torch.tensor(1e-2, dtype=torch.float64, device=device)
    return optimizer, params


@contextlib.contextmanager
def seen():
    """Launches, copies to the device and waits of the block, once it is over: a list of three numbers."""
    pytest.importorskip("psutil")
    from bench import host

    found = []
    with host.seen() as numbers, waiting_is_an_error():
        yield found
    found += [numbers[name] for name in ("launches", "copies", "waits")]


@pytest.mark.parametrize("of", ["1000x16", "densenet121", "gpt2", "one"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", FUSED)
@pytest.mark.counted
def test_a_step_is_few_launches_and_no_copy_or_wait(name, case, of, backend):
    optimizer, params = make(name, lists()[of], case, backend)
    for _ in range(2):
        optimizer.step()
        torch._foreach_mul_([p.grad for p in params], 1.5)  # in place: where it lies is what the table holds
    with seen() as found:
        optimizer.step()
    launches, copies, waits = found
    assert 0 < launches <= CASES[case][1]
    assert (copies, waits) == (0, 0)


@pytest.mark.parametrize("case", ["plain", "clip"])
@pytest.mark.parametrize("name", FUSED)
def test_what_changes_is_copied_once(name, case, backend):
    """A learning rate alone: the groups' numbers. A gradient elsewhere: the table. Then nothing again."""
    optimizer, params = make(name, [(16,)] * 5, case, backend)
    optimizer.step()

    def copies():
        with seen() as found:
            optimizer.step()
        assert found[2] == 0
        return found[1]

    assert copies() == 0
    optimizer.param_groups[0]["lr"] = 1e-3
    assert [copies(), copies()] == [1, 0]
    params[0].grad = params[0].grad.clone()
    assert [copies(), copies()] == [1, 0]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", FUSED)
def test_nothing_waits_by_torchs_own_watch(name, case, backend):
    optimizer, _ = make(name, [(300, 70), (5,), (), (0, 3)], case, backend)
    with waiting_is_an_error():
        for _ in range(3):
            optimizer.step()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", FUSED)
def test_the_kernels_give_the_cpus_weights(name, case, backend):
    """By turns beyond a norm of 1 and below, one step overflowing: every bit, but where a norm is summed in another order."""
    shapes = [(300, 70), (5,), (), (0, 3), (1100,), (40_000,)]
    (optimizer, params), (judge, others) = make(name, shapes, case, backend), make(name, shapes, case, "auto", "cpu")
    for t in range(7):
        generator = torch.Generator().manual_seed(100 + t)
        for p, q in zip(params, others, strict=True):
            q.grad = torch.randn(p.shape, generator=generator) * (10.0 if t % 2 else 1e-3)
            p.grad.copy_(q.grad)
        if "skip" in case and t == 3:
            for p in (params[4], others[4]):
                p.grad[-1] = float("inf")
        if "scaler" in case:
            for one in (optimizer, judge):
                one.found_inf.fill_(t == 5)
        optimizer.step()
        judge.step()
    exact = {} if "clip" in case else dict(rtol=0, atol=0)
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p.cpu(), q, **exact)
        for key, value in judge.state[q].items():
            torch.testing.assert_close(optimizer.state[p][key].cpu(), value, **exact)
    assert int(optimizer.skipped_steps) == int(judge.skipped_steps) == ("skip" in case) + ("scaler" in case)
    if "clip" in case:
        torch.testing.assert_close(optimizer.grad_norm.cpu(), judge.grad_norm)


@pytest.mark.parametrize("weights", WEIGHT_ROUNDINGS)
@pytest.mark.parametrize("state", STATE_DTYPES)
@pytest.mark.parametrize("name", FUSED)
def test_bfloat16_weights_have_the_cpus_bits_in_every_way_of_storing(name, state, weights, backend):
    """State and corrections too."""
    for lean in (True, False) if state != "8bit" else (True,):
        found = []
        for device, by in (("cuda", backend), ("cpu", "auto")):
            generator = torch.Generator().manual_seed(3)
            params = [torch.nn.Parameter(torch.randn(n, generator=generator).bfloat16().to(device)) for n in (20_000, 7)]
            options = dict(OPTIONS[name], lean=lean, state_dtype=state, weight_rounding=weights, seed=5)
            optimizer = FUSED[name](params, lr=1e-2, backend=by, **options)
            for _ in range(2):
                for p in params:
                    p.grad = (torch.randn(p.shape, generator=generator) * 0.1).bfloat16().to(device)
                optimizer.step()
            found.append([t.cpu() for p in params for t in (p.detach(), *optimizer.state[p].values())])
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("case", ["plain", "clip", "lr tensor", "bfloat16", "8bit"])
@pytest.mark.parametrize("name", FUSED)
def test_a_graph_keeps_what_it_reads(name, case, backend):
    """Also when later steps have had the optimizer forget it, and others would get the memory."""
    (captured, params), (eager, others) = (make(name, [(40_000,), (5,)], case, backend) for _ in range(2))
    for optimizer in (captured, eager):
        optimizer.param_groups[0]["capturable"] = True
    first = [[p.grad for p in some] for some in (params, others)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for optimizer in (captured, eager):
            optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    for _ in range(2):
        for some, optimizer in ((params, captured), (others, eager)):
            for p in some:
                p.grad = p.grad * 0.5
            optimizer.step()
    sizes = [n for n in (1, 3, 16, 24, 64, 100, 1000) for _ in range(20)]
    with torch.cuda.stream(stream):  # whose memory is used again by those on it
        garbage = [torch.full((n,), -1, dtype=torch.int64, device="cuda") for n in sizes]
    torch.cuda.synchronize()
    for some, grads in zip((params, others), first, strict=True):
        for p, grad in zip(some, grads, strict=True):
            p.grad = grad
    for _ in range(2):
        graph.replay()
        eager.step()
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p.cpu(), q.cpu())
        assert all(torch.equal(captured.state[p][key].cpu(), value.cpu()) for key, value in eager.state[q].items())
    assert all((t.cpu() == -1).all() for t in garbage)


@contextlib.contextmanager
def one_of_two_processes():
    """As far as torch.distributed knows; nobody answers."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.skipif(record is None, reason="one process cannot be two on a real GPU")
@pytest.mark.parametrize("name", FUSED)
def test_launches_that_are_alike_have_tables_of_their_own(name, backend):
    """Replicated DTensors beside plain tensors: with a norm, two launches of one device, of the same dtypes, spread over none."""
    from torch.distributed.tensor import DTensor, Replicate

    with one_of_two_processes():
        mesh = torch.distributed.device_mesh.init_device_mesh("cuda", (2,))
        shapes = [(300, 7), (5,), (1100,), (64,)]
        optimizer, params = make(name, shapes, "clip", backend)
        mixed = []
        for i, p in enumerate(params):
            weight, grad = p.detach().clone(), p.grad.clone()
            if i % 2:
                weight, grad = (DTensor.from_local(t, mesh, [Replicate()], run_check=False) for t in (weight, grad))
            mixed.append(torch.nn.Parameter(weight))
            mixed[-1].grad = grad
        other = FUSED[name](mixed, lr=1e-2, backend=backend, **OPTIONS[name], **CASES["clip"][0])
        for _ in range(3):
            optimizer.step()
            other.step()
        for p, q in zip(params, mixed, strict=True):
            q = q.to_local() if isinstance(q, DTensor) else q
            torch.testing.assert_close(p.cpu(), q.cpu())
        torch.testing.assert_close(optimizer.grad_norm.cpu(), other.grad_norm.cpu())


@pytest.mark.skipif(record is None, reason="one process cannot be two on a real GPU")
@pytest.mark.parametrize("case", ["plain", "clip", "skip", "capturable"])
@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("name", FUSED)
def test_offloaded_parameters_have_their_state_beside_them(name, lean, case):
    """FSDP2's CPUOffloadPolicy: parts on the CPU of a mesh of GPUs. Steps, and going on from a checkpoint, touch no GPU."""
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

    with one_of_two_processes():
        mesh = torch.distributed.device_mesh.init_device_mesh("cuda", (2,))
        model = fully_shard(torch.nn.Linear(8, 8), mesh=mesh, offload_policy=CPUOffloadPolicy())
        optimizer = FUSED[name](model.parameters(), lr=1e-2, lean=lean, **OPTIONS[name], **CASES[case][0])
        for t in range(4):
            for p in model.parameters():
                p.grad = torch.full_like(p, 0.1)
            optimizer.step()
            if t == 1:
                optimizer.load_state_dict(optimizer.state_dict())
        for entry in optimizer.state.values():
            assert {getattr(value, "_local_tensor", value).device.type for value in entry.values()} == {"cpu"}
            assert float(entry["step"]) == 4


LOADS = r"""
import warnings, torch
from adabayes_fused import AdaBayes, backends
with warnings.catch_warnings(record=True) as found:
    warnings.simplefilter("always")
    p = torch.nn.Parameter(torch.ones(4, device="cuda"))
    optimizer = AdaBayes([p], batch_size=8)
    for _ in range(2):
        p.grad = torch.ones(4, device="cuda")
        optimizer.step()
    found = [str(w.message) for w in found if "adabayes" in str(w.filename) or "updated by" in str(w.message)]
print(backends.choose("auto", p.device), len(found), *found, sep="\n")
"""


@pytest.mark.skipif(record is None, reason="a real GPU loads them")
@pytest.mark.parametrize(
    ("unloadable", "chosen", "named"),
    [("", "cuda", []), ("6updateI", "triton", ["cuda"]), ("6updateI,decide", "foreach", ["cuda", "triton"])],
)
def test_auto_goes_on_to_what_loads(unloadable, chosen, named):
    """With one warning, before anything has changed; and a backend that was asked for says why it cannot run."""
    pytest.importorskip("triton")
    environment = os.environ | dict(FAKECUDA_UNLOADABLE=unloadable)
    done = subprocess.run([sys.executable, "-c", LOADS], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    backend, count, *messages = done.stdout.splitlines()
    assert (backend, int(count)) == (chosen, bool(named))
    assert all(f"{name}: its kernels cannot be loaded there" in messages[0] for name in named)
    for name in named:
        code = f"import torch; from adabayes_fused import backends; backends.choose({name!r}, torch.device('cuda', 0))"
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert f"backend='{name}' cannot run on cuda:0: its kernels cannot be loaded there" in done.stderr


@pytest.mark.skipif(record is None, reason="needs the record of every call")
def test_steps_on_the_cpu_leave_the_gpu_alone():
    """Whoever trains on the CPU of a machine with a GPU takes no memory there, as kernels do."""
    code = "import torch, fakecuda\nfrom adabayes_fused import AdaBayes\np = torch.nn.Parameter(torch.ones(4))\n"
    code += "p.grad = torch.ones(4)\nwith fakecuda.record() as log: AdaBayes([p], batch_size=8).step()\n"
    code += "print({'cudaFuncGetAttributes', 'cudaMalloc', 'cuModuleLoadData'} & log.names.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["set()"], done.stdout + done.stderr
