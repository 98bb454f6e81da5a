"""Unscaling, clipping and skipping within the step, against the sequence of passes they replace."""

import math

import numpy as np
import pytest
import torch
from runs import FUSED
from torch.utils._python_dispatch import TorchDispatchMode

from adabayes_fused import AdaBayes, backends

OPTIONS = {"AdaBayes": dict(batch_size=8), "AdaBayesFP": {}}
SHAPES = [(60, 70), (5,), (), (0, 3), (16, 16), (2, 3, 4)]


def make_params(device, dtypes=(torch.float32,)):
    generator = torch.Generator().manual_seed(3)
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtypes[i % len(dtypes)]).to(device))
        for i, shape in enumerate(SHAPES)
    ]


def set_gradients(params, t, scale=1.0):
    """Norms far above and far below 1 by turns; every fifth gradient is missing."""
    generator = torch.Generator().manual_seed(100 + t)
    for i, p in enumerate(params):
        drawn = torch.randn(p.shape, generator=generator) * (10.0 if t % 2 else 1e-3) * scale
        p.grad = None if (t + i) % 5 == 0 else drawn.to(p)


def make(name, params, backend, **policy):
    return FUSED[name](params, lr=1e-2, backend=backend, **OPTIONS[name], **policy)


def weights_and_state(optimizer, params):
    return [t.detach().clone() for p in params for t in (p, *optimizer.state[p].values())]


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("name", FUSED)
def test_clipping_gives_the_weights_of_clip_grad_norm(name, capturable, target):
    backend, device = target
    params, others = make_params(device), make_params(device)
    optimizer = make(name, params, backend, max_grad_norm=1.0, capturable=capturable)
    plain = make(name, others, backend)
    for t in range(6):
        set_gradients(params, t)
        set_gradients(others, t)
        before = [None if p.grad is None else p.grad.clone() for p in params]
        optimizer.step()
        norm = torch.nn.utils.clip_grad_norm_(others, 1.0)
        plain.step()
        torch.testing.assert_close(optimizer.grad_norm.float(), norm)
        for p, grad in zip(params, before, strict=True):
            assert grad is None or torch.equal(p.grad, grad)  # read, not written
        for p, q in zip(params, others, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    assert int(optimizer.skipped_steps) == 0


@pytest.mark.parametrize("limit", [1e-6, 1e-3])
@pytest.mark.parametrize("name", FUSED)
def test_norms_around_the_epsilon_are_clipped_as_by_clip_grad_norm(name, limit, target):
    """``max_norm / (norm + 1e-6)``: of a norm of 1e-6 the half is left, one a little below 1e-3 is clipped already."""
    backend, device = target
    for norm in (limit, limit * (1.0 - 1e-4), limit * 3.0):
        params = [torch.nn.Parameter(torch.ones(3, dtype=torch.float64, device=device)) for _ in range(2)]
        for p in params:
            p.grad = torch.tensor([norm, 0.0, 0.0], dtype=torch.float64, device=device)
        torch.nn.utils.clip_grad_norm_(params[1:], limit)
        clipped = make(name, params[:1], backend, max_grad_norm=limit)
        plain = make(name, params[1:], backend)
        clipped.step()
        plain.step()
        averages = (optimizer.state[p]["exp_avg"] for optimizer, p in zip((clipped, plain), params, strict=True))
        torch.testing.assert_close(*averages, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("backend", ["cpp", "foreach", "triton"])
def test_the_norm_is_exact_for_any_dtype_and_size(backend):
    """In float64, one norm over dtypes, groups and layouts; squares of float16's and float32's largest do not overflow."""
    if (reason := backends.BACKENDS[backend].unavailable(torch.device("cpu"))) is not None:
        pytest.skip(reason)
    params = make_params("cpu", (torch.float32, torch.bfloat16, torch.float64, torch.float16))
    params.append(torch.nn.Parameter(torch.randn(7, 5, dtype=torch.complex64)))
    params.append(torch.nn.Parameter(torch.randn(9, 4).t()[:, ::2]))  # with gaps
    params.append(torch.nn.Parameter(torch.randn(3, 4)))
    groups = [dict(params=params[:4]), dict(params=params[4:], weight_decay=0.0)]
    optimizer = make("AdaBayesFP", groups, backend, max_grad_norm=math.inf)
    set_gradients(params, 1)
    params[-1].grad = torch.randn(4, 3).t()
    params[0].grad[0, 0] = 3e38
    if params[3].numel():
        params[3].grad.fill_(60000)
    optimizer.step()
    expected = math.sqrt(sum(p.grad.to(torch.complex128).abs().square().sum().item() for p in params if p.grad is not None))
    assert expected > 1e38
    assert optimizer.grad_norm.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_norm_has_the_same_bits_for_any_threads_and_instruction_set(threads, monkeypatch):
    from adabayes_fused.backends import cpp, native

    found = set()
    before = torch.get_num_threads()
    for isa in native.module.cpu_isas():
        monkeypatch.setenv(cpp.ISA_VARIABLE, isa)
        torch.set_num_threads(threads)
        for dtype in (torch.float32, torch.bfloat16):
            p = torch.nn.Parameter(torch.zeros(500_003, dtype=dtype))
            p.grad = torch.randn(500_003, generator=torch.Generator().manual_seed(0)).to(dtype)
            q = torch.nn.Parameter(torch.zeros(5))
            q.grad = torch.ones(5)
            optimizer = make("AdaBayesFP", [q, p], "cpp", max_grad_norm=1.0)
            optimizer.step()
            found.add((dtype, optimizer.grad_norm.item()))
    torch.set_num_threads(before)
    assert len(found) == 2


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("name", FUSED)
def test_one_bad_gradient_skips_the_whole_step(name, capturable, bad, target):
    backend, device = target
    params = make_params(device)
    optimizer = make(name, params, backend, skip_nonfinite=True, capturable=capturable)
    set_gradients(params, 0)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    for skipped, p in enumerate((q for q in params if q.numel()), start=1):
        before = weights_and_state(optimizer, params)
        good = p.grad.clone()
        p.grad.reshape(-1)[-1] = bad
        optimizer.step()
        assert all(map(torch.equal, before, weights_and_state(optimizer, params)))
        assert int(optimizer.skipped_steps) == skipped
        p.grad = good
    optimizer.step()
    assert all(float(optimizer.state[p]["step"]) == 2 for p in params)


@pytest.mark.parametrize("name", FUSED)
def test_a_first_step_that_is_skipped_leaves_no_state(name):
    params = make_params("cpu")
    optimizer = make(name, params, "auto", skip_nonfinite=True, max_grad_norm=1.0)
    set_gradients(params, 1)
    params[0].grad[3, 3] = math.nan
    optimizer.step()
    assert not optimizer.state
    assert math.isnan(optimizer.grad_norm)


def test_without_skipping_a_bad_norm_spreads_as_in_torch():
    for bad in (math.inf, math.nan):
        params, others = make_params("cpu"), make_params("cpu")
        optimizer, plain = make("AdaBayesFP", params, "auto", max_grad_norm=1.0), make("AdaBayesFP", others, "auto")
        for some in (params, others):
            set_gradients(some, 1)
            some[0].grad[0, 0] = bad
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        plain.step()
        optimizer.step()
        for p, q in zip(params, others, strict=True):
            torch.testing.assert_close(p, q, equal_nan=True)


@pytest.mark.parametrize("fused_unscale", [True, False])
@pytest.mark.parametrize("name", FUSED)
def test_amp_clip_and_step_are_the_unfused_sequence(name, fused_unscale):
    """Scaled gradients, an overflow on each parameter in turn, one norm for all: GradScaler's unscale_, torch's clipping and
    the slow order of passes on one side, scaler.step alone on the other."""
    params, others = make_params("cpu"), make_params("cpu")
    optimizer = make(name, params, "auto", max_grad_norm=1.0)
    plain = make(name, others, "auto", fused_unscale=False)
    optimizer.fused_unscale = fused_unscale
    scalers = [torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3) for _ in range(2)]
    skipped = 0
    for t in range(12):
        for some, scaler in zip((params, others), scalers, strict=True):
            scaler.scale(torch.zeros(()))  # as in loss.backward(): the scaler's scale comes to be
            set_gradients(some, t, scaler.get_scale())
            if t % 2 and some[t % 6].numel() and some[t % 6].grad is not None:
                some[t % 6].grad.reshape(-1)[0] = math.inf
        before = [p.detach().clone() for p in params]
        overflow = any(not p.grad.isfinite().all() for p in params if p.grad is not None)
        scalers[0].step(optimizer)
        scalers[1].unscale_(plain)
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        scalers[1].step(plain)
        for scaler in scalers:
            scaler.update()
        skipped += overflow
        if overflow:
            assert all(map(torch.equal, before, params))
        for p, q in zip(params, others, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
            assert float(optimizer.state[p].get("step", 0) if p in optimizer.state else 0) == float(
                plain.state[q].get("step", 0) if q in plain.state else 0
            )
    assert skipped > 2
    assert int(optimizer.skipped_steps) == (skipped if fused_unscale else 0)  # else the scaler does not call step
    assert scalers[0].get_scale() == scalers[1].get_scale()


def test_measuring_changes_nothing_where_the_norm_is_infinite():
    p = torch.nn.Parameter(torch.ones(4))
    optimizer = make("AdaBayesFP", [p], "auto", max_grad_norm=math.inf)
    p.grad = torch.tensor([1.0, math.inf, 1.0, 1.0])
    optimizer.step()
    assert p.isfinite().tolist() == [True, False, True, True]
    assert optimizer.grad_norm == math.inf


def test_norm_and_count_are_of_their_step():
    p = torch.nn.Parameter(torch.ones(4))
    optimizer = make("AdaBayesFP", [p], "auto", max_grad_norm=np.float32(0.5), skip_nonfinite=True)
    p.grad = torch.ones(4)
    optimizer.step()
    assert optimizer.grad_norm == 2.0
    counted = optimizer.skipped_steps
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert (int(counted), int(optimizer.skipped_steps), optimizer.grad_norm) == (0, 1, None)
    del optimizer.found_inf
    optimizer.max_grad_norm, optimizer.skip_nonfinite = None, False
    optimizer.step()
    assert optimizer.grad_norm is None


class Copies(TorchDispatchMode):
    """Whether each copy from the CPU to another device lets the host go on, in order."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if function in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            source, *rest = args[1:] if function is torch.ops.aten.copy_.default else args
            if source.device.type == "cpu" != result.device.type:
                self.found.append(kwargs.get("non_blocking", rest[0] if rest else False))
        return result


@pytest.mark.parametrize("without", ["extension", "none"])
def test_a_norm_on_an_accelerator_is_not_waited_for(without, monkeypatch):
    """Tensors of the meta device raise where the host would read them. Nor does the host wait for a copy of its own, or a
    later step, which a CUDA graph may capture, copy from memory that is not pinned."""
    from adabayes_fused import prepare
    from adabayes_fused.backends import native

    monkeypatch.setattr(prepare, "step_device", lambda p: p.device)  # as on an accelerator
    p = torch.nn.Parameter(torch.ones(4, device="meta"))
    p.grad = torch.ones(4, device="meta")
    if without == "extension":
        monkeypatch.setattr(native, "module", None)
        backends.choose.cache_clear()
    optimizer = make("AdaBayesFP", [p], "foreach", max_grad_norm=1.0, skip_nonfinite=True)
    with Copies() as first:
        optimizer.step()
    assert all(first.found)
    with Copies() as later:
        optimizer.step()
    assert not later.found
    assert optimizer.grad_norm.device.type == "meta"
    assert optimizer.skipped_steps.device.type == "meta"
    backends.choose.cache_clear()


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (dict(max_grad_norm=0.0), ValueError, "Invalid max_grad_norm: 0.0"),
        (dict(max_grad_norm=math.nan), ValueError, "max_grad_norm"),
        (dict(max_grad_norm="1"), ValueError, "max_grad_norm: '1'"),
        (dict(skip_nonfinite=1), TypeError, "skip_nonfinite value: 1"),
    ],
)
def test_wrong_options(options, error, words):
    p = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(error, match=words):
        make("AdaBayesFP", [p], "auto", **options)
    optimizer = make("AdaBayesFP", [p], "auto")
    p.grad = torch.ones(3)
    vars(optimizer).update(options)
    with pytest.raises(error, match=words):
        optimizer.step()
    assert torch.equal(p, torch.ones(3))
    assert not optimizer.state


def test_gradients_are_read_once_and_swept_once():
    """No pass but the norm's and the update's: no operator of torch touches a gradient, nothing as large as one is allocated."""
    from torch.profiler import ProfilerActivity, profile

    params = [torch.nn.Parameter(torch.randn(1000, 1000)) for _ in range(3)]
    optimizer = make("AdaBayes", params, "cpp", max_grad_norm=1.0, skip_nonfinite=True, lean=True)
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, record_shapes=True) as run:
        optimizer.step()
    events = run.events()
    assert events
    assert not [e.name for e in events if [1000, 1000] in (e.input_shapes or []) and e.name != "aten::detach"]
    assert max((e.self_cpu_memory_usage for e in events), default=0) < 10_000


@pytest.mark.parametrize("backend", ["auto", "foreach"])
@pytest.mark.parametrize("how", ["skipped", "refused"])
def test_state_of_another_form_stays_as_it_is(how, backend):
    """A step brings state to the form it stores, but not one that is skipped or refused."""
    params = [torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16)) for _ in range(2)]
    optimizer = AdaBayes(params, batch_size=8, skip_nonfinite=True, weight_rounding="stochastic", backend=backend)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    state = optimizer.state[params[0]]
    del state["seed"]
    state["exp_avg"] = state["exp_avg"].double()
    before = dict(state)
    if how == "skipped":
        params[1].grad = torch.full_like(params[1], float("inf"))
        optimizer.step()
        assert optimizer.skipped_steps == 1
    else:
        params[1].untyped_storage().resize_(0)
        with pytest.raises(RuntimeError, match="storage was freed"):
            optimizer.step()
    assert state.keys() == before.keys()
    assert all(state[name] is value for name, value in before.items())
