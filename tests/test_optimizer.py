"""How the optimizers behave as torch.optim citizens: groups, schedules, closures, missing gradients, scaled gradients."""

import copy
import pickle

import pytest
import torch
from runs import FUSED, SLOW

from adabayes_fused import AdaBayes, AdaBayesFP

OPTIONS = {"AdaBayes": dict(batch_size=8), "AdaBayesFP": {}}


def make(name, params, **options):
    return FUSED[name](params, **OPTIONS[name] | options)


def parameter(*shape, device="cpu", dtype=torch.float32):
    p = torch.nn.Parameter(torch.randn(*shape, device=device, dtype=dtype))
    p.grad = torch.randn_like(p)
    return p


def twin(p):
    q = torch.nn.Parameter(p.detach().clone())
    q.grad = p.grad.clone() if p.grad is not None else None
    return q


@pytest.mark.parametrize("name", FUSED)
def test_groups_have_their_own_options(name, target):
    """As one optimizer for each group."""
    backend, device = target
    first, second = parameter(5, 3, device=device), parameter(70, device=device)
    per_group = [dict(lr=1e-2, weight_decay=0.0, betas=(0.5, 0.9)), dict(lr=1e-4, sgd_lr=7.0, maximize=True)]
    if name == "AdaBayes":
        per_group[0] |= dict(batch_size=2, transition="exact")
        per_group[1] |= dict(variance_follows_lr=False)
    alone = [twin(first), twin(second)]
    together = make(
        name, [dict(params=[p], **options) for p, options in zip((first, second), per_group, strict=True)], backend=backend
    )
    single = [make(name, [p], backend=backend, **options) for p, options in zip(alone, per_group, strict=True)]
    for _ in range(3):
        together.step()
        for optimizer in single:
            optimizer.step()
    assert torch.equal(first, alone[0])
    assert torch.equal(second, alone[1])


@pytest.mark.parametrize("name", FUSED)
def test_late_groups_and_missing_gradients_count_their_own_steps(name, target):
    backend, device = target
    early, resting, late = (parameter(33, device=device) for _ in range(3))
    fresh = twin(late)
    optimizer = make(name, [early, resting], backend=backend)
    optimizer.step()
    resting.grad, before = None, resting.detach().clone()
    optimizer.step()
    optimizer.add_param_group(dict(params=[late]))
    optimizer.step()
    assert [int(optimizer.state[p]["step"]) for p in (early, resting, late)] == [3, 1, 1]
    assert torch.equal(resting, before)
    make(name, [fresh], backend=backend).step()
    assert torch.equal(late, fresh)  # its first step, whatever the others' count


@pytest.mark.parametrize("name", FUSED)
def test_what_changes_between_steps_takes_effect(name, target):
    """lr, betas, weight_decay, r and batch_size are read afresh, float or tensor; the slow path as judge."""
    backend, device = target
    p = parameter(40, device=device, dtype=torch.float64)
    q = torch.nn.Parameter(p.detach().cpu().clone())
    fused, slow = make(name, [p], backend=backend), SLOW[name]([q], **OPTIONS[name])
    changes = [
        {},
        dict(lr=torch.tensor(3e-3, dtype=torch.float64)),
        dict(betas=(0.7, 0.9)),
        dict(weight_decay=1.0),
        dict(r=30.0),
        dict(batch_size=5),
        dict(lr=2e-4),
    ]
    for change in changes:
        p.grad = torch.randn_like(p)
        q.grad = p.grad.cpu()
        for optimizer in (fused, slow):
            optimizer.param_groups[0].update(change)
            optimizer.step()
        torch.testing.assert_close(p.detach().cpu(), q.detach(), rtol=1e-12, atol=1e-12)


def test_tensor_lr_is_the_groups_own_and_written_in_place():
    lr = torch.tensor(1e-2)
    p, q = parameter(4), parameter(4)
    optimizer = AdaBayesFP([dict(params=[p]), dict(params=[q])], lr=lr)
    optimizer.param_groups[0]["lr"].fill_(0.0)
    before_p, before_q = p.detach().clone(), q.detach().clone()
    optimizer.step()
    assert lr.item() == pytest.approx(1e-2)
    assert torch.equal(p, before_p)
    assert not torch.equal(q, before_q)


@pytest.mark.parametrize("name", FUSED)
def test_schedulers(name):
    p = parameter(8)
    optimizer = make(name, [p], lr=1e-2)
    scheduler = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: t / 3), torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)],
        [3],
    )
    start = p.detach().clone()
    optimizer.step()
    assert torch.equal(p, start)  # warm-up begins at lr = 0
    for _ in range(6):
        scheduler.step()
        optimizer.step()
    assert p.isfinite().all()
    assert not torch.equal(p, start)
    p, optimizer = parameter(8), None
    optimizer = make(name, [p], lr=1e-2)
    one_cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=5)  # writes betas
    optimizer.step()
    one_cycle.step()
    optimizer.step()
    assert optimizer.param_groups[0]["betas"][0] != 0.9


@pytest.mark.parametrize("name", FUSED)
def test_closure(name):
    p = parameter(6)

    def closure():
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    optimizer = make(name, [p])
    expected = (p.detach() ** 2).sum()
    assert optimizer.step(closure) == expected
    assert optimizer.step(closure=closure) < expected


def test_gradients_are_never_written(target):
    backend, device = target
    for name in FUSED:
        p = parameter(100, device=device)
        grad, kept = p.grad, p.grad.clone()
        make(name, [p], backend=backend).step()
        assert p.grad is grad
        assert torch.equal(p.grad, kept)


def test_the_last_smaller_batch_can_be_told():
    p, q = parameter(50), None
    q = twin(p)
    told, untold = AdaBayes([p], batch_size=64), AdaBayes([q], batch_size=64)
    told.param_groups[0]["batch_size"] = 3
    told.step()
    untold.step()
    assert not torch.equal(p, q)


def test_cpu_parameters_of_several_dtypes_and_layouts_step_without_copies():
    """No parameter-sized temporary on the C++ path."""
    params = [parameter(1 << 20) for _ in range(4)] + [parameter(1 << 20, dtype=torch.bfloat16)]
    optimizer = AdaBayes(params, batch_size=8)
    optimizer.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        optimizer.step()
    assert sum(max(event.cpu_memory_usage, 0) for event in profile.events()) < 1 << 16


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("policy", [dict(backend="foreach", lean=True, fused_unscale=False), {}])
def test_pickle_and_deepcopy_go_on_alike(name, policy):
    p = parameter(40)
    optimizer = make(name, [p], **policy)
    optimizer.step()
    for again in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert [getattr(again, k) for k in ("backend", "lean", "fused_unscale")] == [
            getattr(optimizer, k) for k in ("backend", "lean", "fused_unscale")
        ]
        (q,) = again.param_groups[0]["params"]
        q.grad, r = p.grad.clone(), twin(p)
        again.step()
        other = make(name, [r], **policy)
        other.load_state_dict(optimizer.state_dict())
        other.step()
        assert torch.equal(q, r)


# --- torch.amp.GradScaler ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("fused_unscale", [True, False])
def test_grad_scaler(name, fused_unscale, target):
    """The weights of an unscaled run; an overflow changes nothing, step counts included."""
    backend, device = target
    p = parameter(64, device=device)
    q = twin(p)
    scaled, plain = make(name, [p], backend=backend, fused_unscale=fused_unscale), make(name, [q], backend=backend)
    scaler = torch.amp.GradScaler(device.type, init_scale=1024.0)
    for t in range(4):
        grad = torch.randn_like(p)
        scaler.scale(torch.ones((), device=device))
        p.grad = grad * scaler.get_scale()
        if t == 2:
            p.grad[3] = float("inf")
        else:
            q.grad = grad
            plain.step()
        before = p.detach().clone()
        if t == 3:
            scaler.unscale_(scaled)
        scaler.step(scaled)
        scaler.update()
        if t == 2:
            assert torch.equal(p, before)
    assert float(scaled.state[p]["step"]) == 3
    torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
    assert scaler.get_scale() == 512.0


@pytest.mark.parametrize("name", FUSED)
def test_found_inf_and_grad_scale_in_any_form(name, target):
    backend, device = target
    for found_inf, grad_scale in [
        (0, None),
        (torch.zeros(1), torch.full((1,), 4.0)),
        (torch.zeros(()), torch.tensor(4.0)),
        (None, torch.tensor(4.0)),
    ]:
        p = parameter(9, device=device)
        q = twin(p)
        optimizer = make(name, [p], backend=backend)
        if grad_scale is not None:
            p.grad.mul_(4.0)
            optimizer.grad_scale = grad_scale.to(device)
        optimizer.found_inf = found_inf.to(device) if isinstance(found_inf, torch.Tensor) else found_inf
        optimizer.step()
        make(name, [q], backend=backend).step()
        assert torch.equal(p, q)


@pytest.mark.parametrize("name", FUSED)
def test_capturable_gives_the_same_bits(name, target):
    """All scalars as tensors on the device; on CPUs too, where nothing is captured, so that it can be tested there."""
    backend, device = target
    p, q = parameter(300, device=device), None
    q = twin(p)
    lr = torch.tensor(1e-3, dtype=torch.float64, device=device)
    captured, plain = make(name, [p], backend=backend, capturable=True, lr=lr), make(name, [q], backend=backend, lr=1e-3)
    for t in range(5):
        captured.param_groups[0]["lr"].fill_(1e-3 * (t + 1))
        plain.param_groups[0]["lr"] = 1e-3 * (t + 1)
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
        captured.step()
        plain.step()
        assert captured.state[p]["step"].device.type == device.type
    torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", FUSED)
def test_found_inf_on_the_device_skips_without_being_read(name, target):
    """capturable makes the CPU take the path where found_inf is data of the kernel."""
    backend, device = target
    p = parameter(300, device=device)
    optimizer = make(name, [p], backend=backend, capturable=True)
    optimizer.step()
    before, state = p.detach().clone(), copy.deepcopy(optimizer.state[p])
    optimizer.found_inf = torch.ones((), device=device)
    p.grad = torch.full_like(p, float("nan"))
    optimizer.step()
    assert torch.equal(p, before)
    assert all(torch.equal(value, state[key]) for key, value in optimizer.state[p].items())


def test_a_default_device_is_not_ours(target):
    """Tables and coefficients stay on the CPU whatever torch's default device is."""
    backend, device = target
    p = parameter(50, device=device)
    q = twin(p)
    optimizer, other = make("AdaBayes", [p], backend=backend), make("AdaBayes", [q], backend=backend)
    for _ in range(2):
        optimizer.step()
        with torch.device("meta"):
            other.step()
    assert torch.equal(p, q)


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
@pytest.mark.parametrize("name", FUSED)
def test_instruction_sets_give_the_same_bits(name, isa, monkeypatch):
    native = pytest.importorskip("adabayes_fused._native")
    if isa not in native.cpu_isas():
        pytest.skip(f"this processor has no {isa}")
    p = parameter(1001)
    q = twin(p)
    make(name, [p], backend="cpp").step()
    monkeypatch.setenv("ADABAYES_FUSED_ISA", isa)
    make(name, [q], backend="cpp").step()
    assert torch.equal(p, q)


def test_a_parameter_twice_in_a_group_steps_once():
    p = parameter(7)
    q = twin(p)
    with pytest.warns(UserWarning, match="duplicate"):
        doubled = make("AdaBayesFP", [p, p])
    doubled.step()
    make("AdaBayesFP", [q]).step()
    assert torch.equal(p, q)
    with pytest.warns(UserWarning, match="duplicate"):
        named = make("AdaBayesFP", [("p", p), ("p", p), ("q", q)])
    assert named.state_dict()["param_groups"][0]["param_names"] == ["p", "q"]


def test_numpy_numbers_are_computed_with_in_float64():
    np = pytest.importorskip("numpy")
    p = parameter(30, dtype=torch.float64)
    q = twin(p)
    lr = np.float16(1e-3)
    make("AdaBayes", [p], lr=lr).step()
    make("AdaBayes", [q], lr=float(lr)).step()
    assert torch.equal(p, q)


def test_negated_view_as_a_parameter():
    whole = torch.tensor([[1.0, 2.0]])
    p = torch.nn.Parameter(torch.view_as_complex(whole).conj().imag)
    q = torch.nn.Parameter(p.detach().clone().resolve_neg())
    assert p.is_neg()
    optimizers = AdaBayesFP([p]), AdaBayesFP([q])
    for _ in range(3):
        p.grad, q.grad = torch.ones(1), torch.ones(1)
        for optimizer in optimizers:
            optimizer.step()
    assert p.item() == q.item()
