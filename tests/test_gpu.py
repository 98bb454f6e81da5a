"""What only a GPU can show: nothing waits, streams and graphs are kept to, huge tensors, one launch, no memory taken.

That every backend gives the paper's weights there is the other tests' business: their ``target`` runs on GPUs too.
"""

import contextlib
import itertools

import pytest
import torch
from conftest import HAS_GPU
from runs import FUSED

from adabayes_fused import backends

pytestmark = pytest.mark.skipif(not HAS_GPU, reason="needs an NVIDIA GPU; this machine has none")

OPTIONS = {"AdaBayes": dict(batch_size=8), "AdaBayesFP": {}}
SHAPES = [(300, 70), (5,), (), (0, 3), (1100,)]
CLIPS = dict(max_grad_norm=1.0, skip_nonfinite=True)
A_WHILE = 400_000_000  # cycles of a GPU's clock: about 0.2 s
LIMIT = 1 << 31  # elements that 32 bits do not count


@pytest.fixture(params=["cuda", "triton", "foreach"])
def backend(request):
    if (reason := backends.BACKENDS[request.param].unavailable(torch.device("cuda"))) is not None:
        pytest.skip(f"backend {request.param}: {reason}")
    return request.param


@pytest.fixture
def fused(backend):
    return pytest.skip("foreach has temporaries and many kernels") if backend == "foreach" else backend


def parameters(device="cuda", shapes=SHAPES, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype)) for shape in shapes]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p)
    return params


def make(name, params, backend, lr=1e-2, **policy):
    return FUSED[name](params, lr=lr, backend=backend, **OPTIONS[name], **policy)


def draw(params, t):
    """Gradients on the CPU, by turns beyond a norm of 1 and below."""
    generator = torch.Generator().manual_seed(100 + t)
    return [torch.randn(p.shape, generator=generator) * (10.0 if t % 2 else 1e-3) for p in params]


def assert_same(params, optimizer, others, other):
    for i, (p, q) in enumerate(zip(params, others, strict=True)):
        assert torch.equal(p.cpu(), q.cpu()), f"weight {i}"
        for key, value in other.state[q].items():
            assert torch.equal(optimizer.state[p][key].cpu(), value.cpu()), (key, i)


# --- Nothing waits ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def waiting_is_an_error():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("scaled", [False, True], ids=["", "scaled"])
@pytest.mark.parametrize("policy", [{}, dict(max_grad_norm=1.0), CLIPS], ids=["", "clips", "clips and skips"])
@pytest.mark.parametrize("lr", ["float", "tensor"])
@pytest.mark.parametrize("lean", [False, True], ids=["full", "lean"])
@pytest.mark.parametrize("name", FUSED)
def test_no_step_waits(name, lean, lr, policy, scaled, backend):
    """From the first on, by torch's own watch and behind a long kernel."""
    params = parameters()
    rate = torch.tensor(1e-2, device="cuda") if lr == "tensor" else 1e-2
    optimizer = make(name, params, backend, rate, lean=lean, **policy)
    if scaled:  # as GradScaler hands them over
        optimizer.grad_scale, optimizer.found_inf = torch.full((1,), 4.0, device="cuda"), torch.zeros(1, device="cuda")
    with waiting_is_an_error():
        for _ in range(3):
            optimizer.step()
        with pytest.raises(RuntimeError, match="synchroniz"):
            params[0].sum().item()
    busy = torch.cuda.Event()
    torch.cuda._sleep(A_WHILE)
    busy.record()
    for _ in range(3):
        optimizer.step()
    assert not busy.query(), "the host has waited"
    assert all(p.isfinite().all() for p in params)


@pytest.mark.parametrize("policy", [{}, CLIPS], ids=["", "clips"])
@pytest.mark.parametrize("name", FUSED)
def test_steps_that_wait_in_a_queue_keep_their_own_numbers(name, policy, fused):
    """Thirty steps behind a long kernel, each with its learning rate: no table is written over before it is read."""
    params, others = parameters(), parameters()
    queued, one_by_one = make(name, params, fused, **policy), make(name, others, fused, **policy)
    rates = [1e-2 / (1 + t % 7) for t in range(30)]
    for optimizer in (queued, one_by_one):
        optimizer.step()
    torch.cuda.synchronize()
    busy = torch.cuda.Event()
    torch.cuda._sleep(A_WHILE)
    busy.record()
    for rate in rates:
        queued.param_groups[0]["lr"] = rate
        queued.step()
    assert not busy.query(), "nothing was queued"
    for rate in rates:
        one_by_one.param_groups[0]["lr"] = rate
        one_by_one.step()
        torch.cuda.synchronize()
    assert_same(params, queued, others, one_by_one)


# --- Streams, scaler, compiler, devices -------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [{}, dict(max_grad_norm=1.0)], ids=["", "clips"])
@pytest.mark.parametrize("name", FUSED)
def test_a_step_is_on_the_current_stream(name, policy, backend):
    """Gradients that come late on a side stream are those the step there reads, and what follows there sees its weights."""
    params, others = parameters(), parameters()
    optimizer, other = make(name, params, backend, **policy), make(name, others, backend, **policy)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    for t in range(3):
        late = [grad.cuda() for grad in draw(params, t)]
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            torch.cuda._sleep(A_WHILE // 10)
            for p, grad in zip(params, late, strict=True):
                p.grad.copy_(grad)
            optimizer.step()
            after = [p.detach().clone() for p in params]
        for p, grad in zip(others, late, strict=True):
            p.grad = grad
        other.step()
        torch.cuda.synchronize()
        assert all(map(torch.equal, after, others)), f"step {t}"
    assert_same(params, optimizer, others, other)


@pytest.mark.parametrize("policy", [{}, dict(max_grad_norm=1.0)], ids=["", "clips"])
@pytest.mark.parametrize("name", FUSED)
def test_under_a_scaler(name, policy, backend):
    """Overflows by turns: the scaler's own unscaling and skipping give the same weights, scales and counts."""
    params, others = parameters(), parameters()
    optimizer, plain = make(name, params, backend, **policy), make(name, others, backend, fused_unscale=False, **policy)
    scalers = [torch.amp.GradScaler("cuda", init_scale=1024.0, growth_interval=2) for _ in range(2)]
    skipped = 0
    for t in range(9):
        overflows = t % 4 == 2
        before = [p.detach().clone() for p in params]
        for some, one, scaler in ((params, optimizer, scalers[0]), (others, plain, scalers[1])):
            scaler.scale(torch.zeros((), device="cuda"))  # as in loss.backward(): the scale comes to be
            for p, grad in zip(some, draw(some, t), strict=True):
                p.grad = (grad * scaler.get_scale()).cuda()
            if overflows:
                some[4].grad[-1] = float("inf")
            scaler.step(one)
            scaler.update()
        skipped += overflows
        assert all(map(torch.equal, before, params)) == overflows, t
    torch.cuda.synchronize()
    assert skipped == int(optimizer.skipped_steps) == 2
    assert scalers[0].get_scale() == scalers[1].get_scale()
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
        assert float(optimizer.state[p]["step"]) == float(plain.state[q]["step"]) == 7


@pytest.mark.parametrize("name", FUSED)
def test_a_compiled_step_is_an_eager_one(name, fused):
    torch.compiler.reset()
    params, others = parameters(), parameters()
    optimizer, eager = make(name, params, fused, **CLIPS), make(name, others, fused, **CLIPS)
    step = torch.compile(lambda: optimizer.step())
    for t in range(4):
        for some, one in ((params, optimizer), (others, eager)):
            one.param_groups[0]["lr"] = 1e-2 / (t + 1)
            for p, grad in zip(some, draw(some, t), strict=True):
                p.grad = grad.cuda()
        step()
        eager.step()
    assert_same(params, optimizer, others, eager)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("name", FUSED)
def test_parameters_on_another_device_than_the_current_one(name, backend):
    """Alone and beside those of the current device."""
    for devices in (("cuda:1",), ("cuda:0", "cuda:1")):
        params, others = [p for d in devices for p in parameters(d)], [p for d in devices for p in parameters("cuda:0")]
        optimizer, other = make(name, params, backend, **CLIPS), make(name, others, backend, **CLIPS)
        for _ in range(3):
            optimizer.step()
            other.step()
        assert_same(params, optimizer, others, other)
        assert torch.cuda.current_device() == 0


# --- Size, memory, launches -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FUSED)
def test_more_elements_than_32_bits_count(name, fused):
    """Both ends, around 2^29, 2^30 and 2^31, and a sample of the rest, against the CPU's steps on those alone."""
    n = LIMIT + 70_001
    torch.cuda.empty_cache()
    needed, free = n * (2 + 2 + 2 * 4) + (1 << 30), torch.cuda.mem_get_info()[0]
    if needed > free:
        pytest.skip(f"needs {needed >> 30} GiB of GPU memory; {free >> 30} are free")
    generator = torch.Generator("cuda").manual_seed(0)
    p = torch.nn.Parameter(torch.empty(n, dtype=torch.bfloat16, device="cuda").normal_(generator=generator))
    p.grad = torch.empty_like(p).normal_(generator=generator)
    windows = [torch.arange(max(at - 500, 0), min(at + 500, n)) for at in (0, LIMIT // 4, LIMIT // 2, LIMIT, n)]
    sample = torch.cat([*windows, torch.arange(0, n, 65_537)]).cuda()
    q = torch.nn.Parameter(p.detach()[sample].cpu())
    q.grad = p.grad[sample].cpu()
    optimizer, judge = make(name, [p], fused, lean=True), make(name, [q], "auto", lean=True)
    for _ in range(2):
        optimizer.step()
        judge.step()
    torch.testing.assert_close(p.detach()[sample].cpu(), q.detach(), rtol=0, atol=0)
    for key in optimizer.algorithm.stored(lean=True):
        torch.testing.assert_close(optimizer.state[p][key][sample].cpu(), judge.state[q][key], rtol=1e-6, atol=0)


def resnet34():
    pytest.importorskip("psutil")
    from bench.shapes import resnet34

    return parameters(shapes=resnet34())


@pytest.mark.parametrize("policy", [{}, dict(max_grad_norm=1.0)], ids=["", "clips"])
@pytest.mark.parametrize(("name", "lean"), list(itertools.product(FUSED, (False, True))))
def test_a_step_takes_less_than_a_megabyte(name, lean, policy, fused):
    params = resnet34()
    optimizer = make(name, params, fused, lean=lean, **policy)
    for _ in range(3):
        optimizer.step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    optimizer.step()
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 1 << 20
    assert torch.cuda.memory_allocated() - before < 1 << 20


def on_gpu(step):
    """Names of what the profiler sees of it on the GPU."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as run:
        step()
        torch.cuda.synchronize()
    events = [e for e in run.events() if e.device_type == torch.autograd.DeviceType.CUDA and not e.is_user_annotation]
    return [e.name for e in events]


@pytest.mark.parametrize(("name", "lean"), list(itertools.product(FUSED, (False, True))))
def test_one_kernel_a_bucket(name, lean, fused):
    """And no copy, as long as nothing changes but gradients."""
    params = resnet34()
    buckets = {"one": params, "two": [*params, *parameters(dtype=torch.bfloat16)]}
    for count, some in enumerate(buckets.values(), start=1):
        optimizer = make(name, some, fused, lean=lean)
        for _ in range(3):
            optimizer.step()
        found = on_gpu(optimizer.step)
        assert len(found) == count, found
        assert not any(n.startswith("Memcpy") for n in found), found


def test_the_cpus_backend_refuses_parameters_on_a_gpu_beside_others():
    """Its reader knows the CPU's; it leaves the GPU's to the error, rather than out."""
    params = [torch.nn.Parameter(torch.ones(3, device=device)) for device in ("cpu", "cuda")]
    optimizer = FUSED["AdaBayesFP"](params, backend="cpp")
    for p in params:
        p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="on the CPU only"):
        optimizer.step()
    assert all((p == 1).all() for p in params)
    assert not optimizer.state
