"""release_gradients(): updates within backward() have the bits of step(); gradients are gone; what cannot work says so."""

import copy
import gc
import io
import itertools
import pickle
import sys
import threading
import warnings
import weakref

import pytest
import torch
from runs import CASES, FUSED, LR, MAIN, gradients, learning_rate, make_params
from torch import nn

from adabayes_fused import AdaBayes, AdaBayesFP, release_gradients

OPTIONS = {"AdaBayes": dict(batch_size=8), "AdaBayesFP": {}}


def backward(params, grads):
    """Leaves exactly these gradients, None for none."""
    pairs = [(p, g.to(p.device)) for p, g in zip(params, grads, strict=True) if g is not None]
    torch.autograd.backward([p for p, _ in pairs], [g for _, g in pairs])


def assert_same(optimizer, expected):
    """Weights, state and options, bit for bit."""
    for group, other in zip(optimizer.param_groups, expected.param_groups, strict=True):
        for p, q in zip(group["params"], other["params"], strict=True):
            assert torch.equal(p, q)
    one, other = optimizer.state_dict(), expected.state_dict()
    assert one["param_groups"] == other["param_groups"]
    assert one["state"].keys() == other["state"].keys()
    for key, entry in one["state"].items():
        assert entry.keys() == other["state"][key].keys()
        for name, value in entry.items():
            assert torch.equal(value, other["state"][key][name]), (key, name)
            assert value.dtype == other["state"][key][name].dtype


STORED = {
    "full": {},
    "lean": dict(lean=True),
    "bfloat16": dict(state_dtype="bfloat16", weight_rounding="32bit"),
    "8bit": dict(lean=True, state_dtype="8bit", weight_rounding="stochastic"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("case", MAIN)
def test_same_bits_as_step(case, stored, dtype, target, interpreted):
    """A schedule that begins at 0, two groups, missing gradients, an empty parameter."""
    backend, device = target
    name, options = CASES[case]
    steps = 3 if interpreted else 24

    def make():
        params = make_params(dtype, device)
        groups = [{"params": params[::2]}, {"params": params[1::2], "weight_decay": 0.3, "betas": (0.5, 0.8)}]
        return params, FUSED[name](groups, lr=LR, backend=backend, **options, **STORED[stored])

    (params, optimizer), (expected_params, expected) = make(), make()
    release_gradients(nn.ParameterList(params), optimizer)
    for t, grads in enumerate(gradients(steps, dtype)):
        for o in (optimizer, expected):
            for k, group in enumerate(o.param_groups):
                group["lr"] = learning_rate(t, steps) / (1 + k)
        backward(params, grads)
        assert all(p.grad is None for p in params)
        optimizer.step()
        optimizer.zero_grad()
        backward(expected_params, grads)
        expected.step()
        expected.zero_grad()
    assert_same(optimizer, expected)


@pytest.mark.parametrize("first", [0, 1])
def test_a_first_step_at_lr_0(first):
    """Whichever of the gradients, of which one is zero, comes first: at lr 0 the averages go on."""
    made = []
    for _ in range(2):
        params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))]
        made.append((params, AdaBayes([{"params": [p]} for p in params], lr=1e-3, batch_size=8)))
        for group in made[-1][1].param_groups:
            group["lr"] = 0.0
    (params, optimizer), (expected_params, expected) = made
    grads = [torch.zeros(3), torch.ones(3)]
    release_gradients(nn.ParameterList(params), optimizer)
    for k in (first, 1 - first):
        params[k].backward(grads[k])
    backward(expected_params, grads)
    expected.step()
    assert_same(optimizer, expected)
    assert [float(optimizer.state[p]["step"]) for p in params] == [1.0, 1.0]


class Tied(nn.Module):
    """An embedding that is the last layer too, a layer used every other time, buffers, a frozen weight, convolutions."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.embed = nn.Embedding(11, 6)
        self.conv = nn.Conv2d(1, 4, 3, padding=1).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm1d(24)
        self.sometimes = nn.Linear(24, 24)
        self.out = nn.Linear(24, 6)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)

    def forward(self, x, extra):
        h = self.embed(x).unsqueeze(1).unsqueeze(1)
        h = self.norm(self.conv(h).flatten(1))
        if extra:
            h = torch.tanh(self.sometimes(h))
        return self.frozen(self.out(h)) @ self.embed.weight.T


def train(model, optimizer, scheduler, steps, first=0, with_step=True):
    for t in range(first, first + steps):
        x = torch.randint(11, (8,), generator=torch.Generator().manual_seed(t))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x, t % 2), x).backward()
        if with_step:
            optimizer.step()
        scheduler.step()


def pair(name, **options):
    made = []
    for _ in range(2):
        model = Tied()
        optimizer = FUSED[name](model.parameters(), lr=3e-3, **OPTIONS[name], **options)
        made.append((model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)))
    return made


@pytest.mark.parametrize("lean", [False, True], ids=["full", "lean"])
@pytest.mark.parametrize("name", FUSED)
def test_a_loop_works_unchanged(name, lean):
    """Released, ordinary, released: what step() keeps between steps is not disturbed. No warning of the scheduler's."""
    released, ordinary = pair(name, lean=lean)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for first in (0, 5, 10):
            if first != 5:
                with release_gradients(released[0], released[1]):
                    train(*released, steps=5, first=first)
                    assert all(p.grad is None for p in released[0].parameters())
            else:
                train(*released, steps=5, first=first)
            train(*ordinary, steps=5, first=first)
            assert_same(released[1], ordinary[1])


def test_without_step_each_backward_is_one():
    released, ordinary = pair("AdaBayes")
    release_gradients(*released[:2])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the scheduler's, of a step() it has not seen
        train(*released, steps=6, with_step=False)
    train(*ordinary, steps=6)
    assert_same(released[1], ordinary[1])


def test_a_closure():
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    released, ordinary = AdaBayes([p], batch_size=8), AdaBayes([q], batch_size=8)
    release_gradients(nn.ParameterList([p]), released)

    def closure(of):
        loss = (of**2).sum()
        loss.backward()
        return loss

    for _ in range(3):
        ordinary.zero_grad()
        assert released.step(lambda: closure(p)) == ordinary.step(lambda: closure(q))
    assert_same(released, ordinary)


def peak(run):
    """The most bytes that were allocated at one time while this ran, beyond those at its beginning."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


def test_gradients_live_one_at_a_time():
    """Ten layers of 256 kB; activations take 1 kB each. A gradient is there beside the next one that is computed."""
    model = nn.Sequential(*[nn.Linear(256, 256, bias=False) for _ in range(10)])
    optimizer = AdaBayes(model.parameters(), batch_size=8)
    size = 256 * 256 * 4

    def run():
        optimizer.zero_grad()
        model(torch.ones(1, 256)).sum().backward()

    run()
    optimizer.step()
    optimizer.zero_grad()
    assert peak(run) >= 10 * size
    optimizer.zero_grad()
    held = []
    for p in model.parameters():  # these run before ours
        p.register_post_accumulate_grad_hook(lambda _: held.append(sum(q.grad is not None for q in model.parameters())))
    with release_gradients(model, optimizer):
        assert peak(run) <= 1.5 * size
    assert held == [1] * 10


def test_step_updates_what_has_a_gradient_left():
    """Outside of the model, frozen at first, added later, set by hand."""
    model = nn.ParameterList([torch.ones(3), torch.ones(2)])
    outside, late = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(5))
    model[1].requires_grad_(False)
    optimizer = AdaBayesFP([*model, outside])
    release_gradients(model, optimizer)
    model[1].requires_grad_(True)
    optimizer.add_param_group({"params": [late]})
    (model[0].sum() + model[1].sum() + outside.sum() + late.sum()).backward()
    assert (model[0] < 1).all()
    assert model[0].grad is None
    for p in (model[1], outside, late):
        assert (p == 1).all()
        assert p.grad is not None
    optimizer.step()
    for p in (model[0], model[1], outside, late):
        assert (p < 1).all()
        assert optimizer.state[p]["step"] == 1
    model[0].grad = torch.ones(3)
    optimizer.zero_grad()
    model[0].grad = torch.ones(3)
    optimizer.step()
    assert optimizer.state[model[0]]["step"] == 2


def test_parameters_of_others_are_left_alone():
    model = nn.ModuleDict({"ours": nn.Linear(2, 2), "theirs": nn.Linear(2, 2)})
    optimizer = AdaBayes(model["ours"].parameters(), batch_size=8)
    release_gradients(model, optimizer)
    before = model["theirs"].weight.clone()
    model["theirs"](model["ours"](torch.ones(1, 2))).sum().backward()
    assert torch.equal(model["theirs"].weight, before)
    assert all(p.grad is not None for p in model["theirs"].parameters())
    assert all(p.grad is None for p in model["ours"].parameters())


def test_a_group_that_goes_and_one_that_moves():
    """Positions are looked up anew; what is no longer the optimizer's keeps its weights and its gradient."""
    gone, kept = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = AdaBayesFP([{"params": [gone], "lr": 0.5}, {"params": [kept], "lr": 1e-3, "weight_decay": 0.0}], sgd_lr=1e9)
    release_gradients(nn.ParameterList([gone, kept]), optimizer)
    del optimizer.param_groups[0]
    (gone.sum() + kept.sum()).backward()
    assert torch.equal(gone, torch.ones(2))
    assert gone.grad is not None
    assert torch.allclose(kept, torch.ones(2) - 1e-3)
    assert kept.grad is None


def test_remove_restores_ordinary_behaviour():
    model = nn.Linear(2, 2)
    optimizer = AdaBayes(model.parameters(), batch_size=8)
    before = model.weight.clone()

    def leaves_gradients():
        model(torch.ones(1, 2)).sum().backward()
        left = model.weight.grad is not None and torch.equal(model.weight, before)
        optimizer.zero_grad()
        return left

    handle = release_gradients(model, optimizer)
    handle.remove()
    handle.remove()
    assert leaves_gradients()
    with pytest.raises(KeyError), release_gradients(model, optimizer):
        raise KeyError
    assert leaves_gradients()
    second = release_gradients(model, optimizer)
    handle.remove()  # the first one's has nothing to do with the second
    assert not leaves_gradients()
    second.remove()
    optimizer.max_grad_norm = 1.0  # allowed again
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert optimizer.state[model.weight]["step"] == 2


@pytest.mark.parametrize("name", FUSED)
def test_checkpoints_and_copies_know_nothing_of_it(name):
    released, ordinary = pair(name)
    train(*ordinary, steps=3)
    handle = release_gradients(*released[:2])
    train(*released, steps=3)
    files = []
    for model, optimizer, _ in (released, ordinary):
        files.append(io.BytesIO())
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, files[-1])
    assert abs(len(files[0].getvalue()) - len(files[1].getvalue())) < 1024  # state lies in memory in another order

    model, optimizer = copy.deepcopy(released[:2])
    again, other = pickle.loads(pickle.dumps(released[:2]))
    assert not {"_stepper", "_before_updates"} & optimizer.__getstate__().keys()
    for m, o in ((model, optimizer), (again, other)):
        assert o._before_updates is None
        m(torch.arange(4), True).sum().backward()
        assert m.out.weight.grad is not None  # the copies have no hooks
        assert_same(o, ordinary[1])
    handle.remove()

    files[0].seek(0)
    saved = torch.load(files[0])
    fresh = pair(name)[0]
    release_gradients(*fresh[:2])
    fresh[0].load_state_dict(saved["model"])
    fresh[1].load_state_dict(saved["optimizer"])
    fresh[2].load_state_dict(ordinary[2].state_dict())
    train(*fresh, steps=3, first=3)
    train(*ordinary, steps=3, first=3)
    assert_same(fresh[1], ordinary[1])


def test_nothing_is_kept_alive():
    """The handle lasts as long as the optimizer without being held, and holds neither it nor the model for ever."""
    model = nn.Linear(2, 2)
    optimizer = AdaBayes(model.parameters(), batch_size=8)
    release_gradients(model, optimizer)
    gc.collect()
    model(torch.ones(1, 2)).sum().backward()
    assert model.weight.grad is None
    weight, alive = weakref.ref(model.weight), weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert alive() is None
    model(torch.ones(1, 2)).sum().backward()
    assert model.weight.grad is not None
    optimizer = AdaBayes(model.parameters(), batch_size=8)
    release_gradients(model, optimizer)
    del model, optimizer
    gc.collect()
    assert weight() is None


def test_backwards_in_several_threads():
    """As with parameters on several devices: each has a thread of autograd's."""
    sides = [[nn.Parameter(torch.ones(5)) for _ in range(20)] for _ in range(2)]
    expected = [nn.Parameter(torch.ones(5)) for _ in range(40)]
    released, ordinary = AdaBayes(sum(sides, []), batch_size=8), AdaBayes(expected, batch_size=8)
    release_gradients(nn.ParameterList(sum(sides, [])), released)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(10):
            threads = [threading.Thread(target=backward, args=(side, [torch.ones(5)] * 20)) for side in sides]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            backward(expected, [torch.ones(5)] * 40)
            released.step()
            ordinary.step()
            ordinary.zero_grad()
    finally:
        sys.setswitchinterval(interval)
    assert_same(released, ordinary)


# --- What cannot work -------------------------------------------------------------------------------------------------


def linear(**options):
    model = nn.Linear(2, 2)
    return model, AdaBayes(model.parameters(), **{"batch_size": 8} | options)


@pytest.mark.parametrize(
    ("option", "message"), [({"max_grad_norm": 1.0}, "max_grad_norm=1.0"), ({"skip_nonfinite": True}, "skip_")]
)
def test_the_norm_of_all_gradients(option, message):
    model, optimizer = linear(**option)
    with pytest.raises(ValueError, match=f"{message}.*all gradients before.*allowed with released gradients: (None|False)"):
        release_gradients(model, optimizer)
    assert not model.weight._post_accumulate_grad_hooks
    model, optimizer = linear()
    release_gradients(model, optimizer)
    vars(optimizer).update(option)
    before = model.weight.clone()
    with pytest.raises(ValueError, match=message):
        model(torch.ones(1, 2)).sum().backward()
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert torch.equal(model.weight, before)


def test_a_second_handle():
    model, optimizer = linear()
    handle = release_gradients(model, optimizer)
    with pytest.raises(RuntimeError, match="released already.*remove.*ModuleList"):
        release_gradients(model, optimizer)
    handle.remove()
    release_gradients(model, optimizer).remove()


def test_wrong_arguments():
    model, optimizer = linear()
    with pytest.raises(ValueError, match="none of whose 2 parameters is of this AdaBayes"):
        release_gradients(nn.Linear(2, 2), optimizer)
    with pytest.raises(TypeError, match="given a generator for the model"):
        release_gradients(model.parameters(), optimizer)
    with pytest.raises(TypeError, match="AdamW .allowed: adabayes_fused's"):
        release_gradients(model, torch.optim.AdamW(model.parameters()))
    assert not model.weight._post_accumulate_grad_hooks
    release_gradients(model, optimizer)


def test_grad_scaler():
    model, optimizer = linear()
    release_gradients(model, optimizer)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(torch.ones(1, 2)).sum()).backward()
    with pytest.raises(RuntimeError, match="GradScaler.*allowed.*enabled=False.*bfloat16"):
        scaler.step(optimizer)
    del optimizer.grad_scale, optimizer.found_inf
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    scaler.scale(model(torch.ones(1, 2)).sum()).backward()
    scaler.step(optimizer)
    assert optimizer.state[model.weight]["step"] == 2


def test_accumulation():
    model, optimizer = linear()
    handle = release_gradients(model, optimizer)
    for _ in range(2):
        model(torch.ones(1, 2)).sum().backward()
    with pytest.raises(
        RuntimeError, match=r"parameter . of group 0, shape .* more than once .*one backward.* a step.*remove\(\)"
    ):
        optimizer.step()
    optimizer.step()
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    handle.remove()


def test_a_gradient_that_comes_back():
    """As DistributedDataParallel writes it once it has reduced."""
    model, optimizer = linear()
    release_gradients(model, optimizer)
    model(torch.ones(1, 2)).sum().backward()
    model.bias.grad = torch.zeros(2)
    before = model.bias.clone()
    with pytest.raises(RuntimeError, match="parameter 1 of group 0.*gradient again.*DistributedDataParallel"):
        optimizer.step()
    assert torch.equal(model.bias, before)


def test_a_graph_that_needs_what_has_moved():
    model, optimizer = linear()
    release_gradients(model, optimizer)
    x = torch.ones(1, 2, requires_grad=True)
    loss = (model(x) ** 2).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_an_update_that_fails_changes_nothing_of_its_parameter():
    model, optimizer = linear()
    release_gradients(model, optimizer)
    before = [p.clone() for p in model.parameters()]
    optimizer.param_groups[0]["lr"] = 1e3
    with pytest.raises(ValueError, match="kappa"):
        model(torch.ones(1, 2)).sum().backward()
    assert all(map(torch.equal, model.parameters(), before))
    assert not optimizer.state
    optimizer.param_groups[0]["lr"] = 1e-3
    optimizer.zero_grad()
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert optimizer.state[model.weight]["step"] == 1
