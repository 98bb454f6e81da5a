"""Saving and loading: bit for bit, on any backend, in our dtypes whatever the parameters'."""

import copy
import gc
import io
import warnings
import weakref

import pytest
import torch
from runs import FUSED

OPTIONS = {"AdaBayes": dict(batch_size=8), "AdaBayesFP": {}}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64)


def model(device="cpu"):
    generator = torch.Generator().manual_seed(5)
    shapes = [(4, 3), (), (70,), (0, 2), (2, 3, 4, 4)]
    params = [torch.nn.Parameter(torch.randn(s, generator=generator).to(DTYPES[i]).to(device)) for i, s in enumerate(shapes)]
    params.append(
        torch.nn.Parameter(torch.randn(2, 3, 4, 4, generator=generator).contiguous(memory_format=torch.channels_last).to(device))
    )
    return params


def train(optimizer, params, steps, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for i, p in enumerate(params):
            drawn = torch.randn(p.shape, generator=generator).to(p)
            p.grad = None if i == seed % 3 else drawn
        optimizer.step()


def make(name, params, backend, **policy):
    return FUSED[name](params, lr=1e-2, backend=backend, **OPTIONS[name], **policy)


def saved(state_dict):
    """Through a file, as torch.load with weights_only gives it back."""
    file = io.BytesIO()
    torch.save(state_dict, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("name", FUSED)
def test_saved_state_goes_on_bit_for_bit_on_any_backend(name, lean, target):
    backend, device = target
    params = model()
    optimizer = make(name, params, "auto", lean=lean)
    train(optimizer, params, 3, seed=1)
    state, weights = saved(optimizer.state_dict()), [p.detach().clone() for p in params]
    train(optimizer, params, 3, seed=2)

    again = model(device)
    with torch.no_grad():
        for p, w in zip(again, weights, strict=True):
            p.copy_(w)
    resumed = make(name, again, backend, lean=lean)
    resumed.load_state_dict(state)
    for i, p in enumerate(again):
        for key, value in state["state"].get(i, {}).items():
            assert torch.equal(resumed.state[p][key].cpu(), value), (i, key)
            assert resumed.state[p][key].dtype == value.dtype, (i, key)
    train(resumed, again, 3, seed=2)
    for p, q in zip(params, again, strict=True):
        if backend == "foreach" and name == "AdaBayesFP":  # torch.sqrt is not correctly rounded on CPUs
            torch.testing.assert_close(q.cpu(), p, rtol=1e-5 if p.dtype != torch.bfloat16 else 1e-2, atol=1e-6)
        else:
            assert torch.equal(q.cpu(), p)


@pytest.mark.parametrize("name", FUSED)
def test_float32_state_of_bfloat16_weights_survives(name):
    p = torch.nn.Parameter(torch.randn(64).bfloat16())
    optimizer = make(name, [p], "auto")
    train(optimizer, [p], 5, seed=0 + 1)
    again = make(name, [torch.nn.Parameter(p.detach().clone())], "auto")
    again.load_state_dict(optimizer.state_dict())
    (q,) = again.param_groups[0]["params"]
    for key, value in optimizer.state[p].items():
        assert value.dtype == torch.float32
        assert torch.equal(again.state[q][key], value)
        assert again.state[q][key].dtype == torch.float32
        assert again.state[q][key].data_ptr() != value.data_ptr()


@pytest.mark.parametrize("name", FUSED)
def test_state_that_a_loader_put_in_place_in_another_form(name, target):
    """Another dtype, layout or kind of step count is brought to ours, values kept; replaced tensors are noticed."""
    backend, device = target
    p = torch.nn.Parameter(torch.randn(2, 3, 4, 4, device=device))
    q = torch.nn.Parameter(p.detach().clone())
    optimizer, other = make(name, [p], backend), make(name, [q], backend)
    train(optimizer, [p], 2, seed=1)
    train(other, [q], 2, seed=1)
    for form in ("channels_last", "double", "same"):
        state = other.state[q]
        state["step"] = {"channels_last": int(state["step"]), "double": state["step"].double(), "same": state["step"].clone()}[
            form
        ]
        for key in other.algorithm.slots:
            value = state[key]
            state[key] = {
                "channels_last": value.contiguous(memory_format=torch.channels_last),
                "double": value.double(),
                "same": value.clone(),
            }[form]
        train(optimizer, [p], 2, seed=1)
        train(other, [q], 2, seed=1)
        assert torch.equal(p, q)
        assert int(other.state[q]["step"]) == int(optimizer.state[p]["step"])
        assert all(other.state[q][key].dtype == torch.float32 for key in ("step", *other.algorithm.slots))


@pytest.mark.parametrize("name", FUSED)
def test_lean_and_full_load_each_other(name):
    params = model()
    full = make(name, params, "auto")
    train(full, params, 2, seed=1)
    for lean in (True, False):
        others = [torch.nn.Parameter(p.detach().clone()) for p in params]
        start = make(name, others, "auto", lean=lean)
        start.load_state_dict(full.state_dict())
        back = [torch.nn.Parameter(p.detach().clone()) for p in params]
        end = make(name, back, "auto", lean=not lean)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            end.load_state_dict(start.state_dict())
        told = [w.filename for w in caught if "exp_avg_sq" in str(w.message)]
        assert told == [__file__] * (name == "AdaBayes" and lean)
        assert end.lean == (not lean)
        reference = [torch.nn.Parameter(p.detach().clone()) for p in params]
        direct = make(name, reference, "auto")
        direct.load_state_dict(full.state_dict())
        train(end, back, 2, seed=2)
        train(direct, reference, 2, seed=2)
        assert all(torch.equal(a, b) for a, b in zip(back, reference, strict=True))


@pytest.mark.parametrize("name", FUSED)
def test_a_checkpoint_changes_hyper_parameters_but_not_how_we_run(name):
    p = torch.nn.Parameter(torch.randn(5))
    first = make(name, [p], "foreach", lean=True, fused_unscale=False, capturable=True)
    train(first, [p], 1, seed=1)
    first.param_groups[0]["weight_decay"] = 0.7
    second = make(name, [torch.nn.Parameter(torch.randn(5))], "auto")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        second.load_state_dict(first.state_dict())
    group = second.param_groups[0]
    assert (second.backend, second.lean, second.fused_unscale, group["capturable"]) == ("auto", False, True, False)
    assert (group["weight_decay"], group["r"]) == (0.7, first.param_groups[0]["r"])


@pytest.mark.parametrize("name", FUSED)
def test_users_load_hooks_see_tensors(name):
    p = torch.nn.Parameter(torch.randn(5))
    optimizer = make(name, [p], "auto")
    train(optimizer, [p], 1, seed=1)
    state = copy.deepcopy(optimizer.state_dict())
    seen = []
    optimizer.register_load_state_dict_pre_hook(lambda o, sd: seen.append(sd["state"][0]["exp_avg"].clone()))
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append(o.state[p]["exp_avg"].clone()))
    optimizer.load_state_dict(state)
    assert all(torch.equal(value, state["state"][0]["exp_avg"]) for value in seen)
    assert len(seen) == 2


def test_state_holds_plain_tensors_shaped_like_the_parameter():
    for name in FUSED:
        params = model()
        optimizer = make(name, params, "auto")
        train(optimizer, params, 1, seed=7)
        assert set(optimizer.state) <= set(params)
        for p, state in optimizer.state.items():
            assert state["step"].shape == ()
            assert state["step"].dtype == torch.float32
            assert all(type(value) is torch.Tensor and value.shape == p.shape for key, value in state.items() if key != "step")


@pytest.mark.parametrize("name", FUSED)
def test_state_moved_by_assigning_data_is_noticed(name, target):
    backend, device = target
    p = torch.nn.Parameter(torch.randn(5, 3, device=device))
    q = torch.nn.Parameter(p.detach().clone())
    optimizer, other = make(name, [p], backend), make(name, [q], backend)
    for seed in (1, 2, 4, 5):
        train(optimizer, [p], 1, seed)
        train(other, [q], 1, seed)
        left_behind = {key: value.data for key, value in other.state[q].items()}
        for value in other.state[q].values():
            value.data = value.data.clone()
        kept = {key: value.clone() for key, value in left_behind.items()}
        train(optimizer, [p], 1, seed)
        train(other, [q], 1, seed)
        assert torch.equal(p, q)
        assert all(torch.equal(value, kept[key]) for key, value in left_behind.items())
        assert all(torch.equal(value, optimizer.state[p][key]) for key, value in other.state[q].items())


@pytest.mark.parametrize("name", FUSED)
def test_state_whose_memory_is_replaced_is_noticed(name):
    """share_memory_ swaps the memory under the same tensor and storage; so does sending it to another process."""
    p = torch.nn.Parameter(torch.randn(50))
    q = torch.nn.Parameter(p.detach().clone())
    optimizer, other = make(name, [p], "auto"), make(name, [q], "auto")
    for key in ("step", *optimizer.algorithm.slots):
        train(optimizer, [p], 1, seed=1)
        train(other, [q], 1, seed=1)
        other.state[q][key].share_memory_()
        train(optimizer, [p], 2, seed=1)
        train(other, [q], 2, seed=1)
        assert torch.equal(p, q), key
        assert all(torch.equal(value, optimizer.state[p][k]) for k, value in other.state[q].items()), key


def replaced(state, p):
    state[p] = {key: value.clone() for key, value in state[p].items()}


def moved(entry):
    for value in entry.values():
        value.data = value.data.clone()


LARGE = torch.Size((130, 130))  # whose state, of 8 bit too, lies in no slab
OF_LARGE = ("memory that is no slab's", "a storage that is no slab's")
GRIPS = {  # what somebody may hold on to, and how the state can be changed by it without asking for optimizer.state again
    "the state": (lambda state, p: state, replaced),
    "a view of it": (lambda state, p: state.values(), lambda view, p: [moved(entry) for entry in view]),
    "an iterator": (lambda state, p: iter(state.values()), lambda it, p: moved(next(it))),
    "an entry": (lambda state, p: state[p], lambda entry, p: entry.update({key: v.clone() for key, v in entry.items()})),
    "its averages": (lambda state, p: {"exp_avg": state[p]["exp_avg"]}, lambda entry, p: moved(entry)),
    "its step": (lambda state, p: {"step": state[p]["step"]}, lambda entry, p: moved(entry)),
    "their memory": (
        lambda state, p: [v.data for v in state[p].values()],
        lambda tensors, p: [t.share_memory_() for t in tensors],
    ),
    "a large one's memory": (
        lambda state, p: [v.data for v in state[p].values() if v.numel() == 3000],
        lambda tensors, p: [t.share_memory_() for t in tensors],
    ),
    "memory that is no slab's": (
        lambda state, p: [v.data for v in state[p].values() if v.numel() == LARGE.numel()],
        lambda tensors, p: [t.share_memory_() for t in tensors],
    ),
    "a storage that is no slab's": (
        lambda state, p: [v.untyped_storage() for v in state[p].values() if v.numel() == LARGE.numel()],
        lambda storages, p: [storage.share_memory_() for storage in storages],
    ),
    "weak references": (
        lambda state, p: [weakref.ref(v) for v in state[p].values()],
        lambda references, p: [setattr(v(), "data", v().data.clone()) for v in references],
    ),
}


@pytest.mark.parametrize("grip", GRIPS)
@pytest.mark.parametrize("policy", [{}, dict(state_dtype="8bit", lean=True)], ids=["float32", "8bit"])
@pytest.mark.parametrize("name", FUSED)
def test_state_changed_through_a_reference_kept_from_before_is_noticed(name, policy, grip, target, interpreted):
    if interpreted and (policy or grip in OF_LARGE):
        pytest.skip("interpreted: float32 and small parameters alone")
    backend, device = target
    take, change = GRIPS[grip]
    shapes = [(6, 5), (7,), (50, 60), *([] if interpreted else [LARGE])]
    params = [torch.nn.Parameter(torch.randn(shape, device=device)) for shape in shapes]
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    optimizer, other = make(name, params, backend, **policy), make(name, others, backend, **policy)
    for seed in (1,) if interpreted else (1, 2, 3):
        for draw in (seed, seed + 1):
            train(optimizer, params, 3, draw)
            train(other, others, 3, draw)
        kept = [take(other.state, p) for p in others]
        train(optimizer, params, 3, seed)
        train(other, others, 3, seed)
        for grip, p in zip(kept, others, strict=True):
            change(grip, p)
        train(optimizer, params, 3, seed)
        train(other, others, 3, seed)
        del kept, grip
        assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))
        for p, q in zip(params, others, strict=True):
            assert all(torch.equal(value, optimizer.state[p][key]) for key, value in other.state[q].items())


def test_parameters_changed_between_steps_are_noticed(target):
    """Another layout of weights and gradient, another order in the group: as for an optimizer that asks for its state."""
    backend, device = target
    starts = [torch.randn(6, 5, device=device) for _ in range(3)]
    runs = []
    for asks in (True, False):
        params = [torch.nn.Parameter(start.clone()) for start in starts]
        optimizer = make("AdaBayes", params, backend)
        for step in range(8):
            if step == 3:
                params[1].data = params[1].data.t().contiguous().t()
            if step == 6:
                optimizer.param_groups[0]["params"].reverse()
            for i, p in enumerate(params):
                p.grad = torch.empty_like(p).copy_(starts[i] * (step - 4))
            if asks:
                assert optimizer.state is not None
            optimizer.step()
        runs.append((params, optimizer))
    (params, optimizer), (others, other) = runs
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)
        assert all(torch.equal(value, other.state[q][key]) for key, value in optimizer.state[p].items())


def test_state_made_anew_many_times_takes_no_more_memory():
    params = [torch.nn.Parameter(torch.randn(100)) for _ in range(20)]
    optimizer = make("AdaBayes", params, "auto")
    for seed in range(60):
        train(optimizer, params, 1, seed)
        optimizer.state.clear()
    assert sum(slab.nbytes for slab in optimizer._stepper.slabs.all) < 20 * sum(4 * p.nbytes for p in params)


def test_a_plain_number_as_step_count_beside_many_slabs():
    params = [torch.nn.Parameter(torch.randn(1000)) for _ in range(40)]
    optimizer = make("AdaBayes", params, "auto")
    train(optimizer, params, 2, seed=1)
    optimizer.state[params[0]]["step"] = 2
    train(optimizer, params, 1, seed=1)
    assert optimizer.state[params[0]]["step"] == 3


def test_state_of_no_parameter_beside_many_slabs():
    params = [torch.nn.Parameter(torch.randn(1000)) for _ in range(40)]
    optimizer = make("AdaBayes", params[:-1], "auto")
    optimizer.state["test"] = 1
    train(optimizer, params, 1, seed=1)
    optimizer.add_param_group(dict(params=params[-1:]))
    train(optimizer, params, 1, seed=1)
    assert optimizer.state[params[-1]]["step"] == 1
    assert optimizer.state["test"] == 1


@pytest.mark.parametrize("lacks", ["maximize", "capturable"])
@pytest.mark.parametrize("name", FUSED)
def test_a_flag_that_an_older_state_dict_lacks_stays_as_it_is(name, lacks):
    optimizer = make(name, [torch.nn.Parameter(torch.randn(5))], "auto", maximize=True, capturable=True)
    older = optimizer.state_dict()
    del older["param_groups"][0][lacks]
    optimizer.load_state_dict(older)
    assert optimizer.param_groups[0][lacks] is True


@pytest.mark.parametrize("name", FUSED)
def test_a_saved_small_state_is_small(name):
    p = torch.nn.Parameter(torch.randn(5))
    optimizer = make(name, [p], "auto")
    train(optimizer, [p], 1, seed=1)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    assert len(file.getvalue()) < 20_000


def test_loading_keeps_what_others_put_into_the_state():
    p = torch.nn.Parameter(torch.randn(5))
    optimizer = make("AdaBayesFP", [p], "auto")
    train(optimizer, [p], 1, seed=1)
    optimizer.state[p]["average"] = torch.ones(5)
    optimizer.load_state_dict(optimizer.state_dict())
    assert torch.equal(optimizer.state[p]["average"], torch.ones(5))


def test_state_that_nobody_else_holds_is_looked_at_once():
    """What makes a thousand small tensors fast; ``bench`` has the figure."""
    params = [torch.nn.Parameter(torch.ones(16)) for _ in range(50)]
    optimizer = make("AdaBayes", params, "cpp")
    found = []
    for t in range(9):
        for p in params:
            p.grad = torch.ones(16)
        if t == 3:
            assert len(optimizer.state) == 50
        if t == 6:
            optimizer.load_state_dict(optimizer.state_dict())
        held = optimizer.state[params[0]] if t == 4 else None
        optimizer.step()
        found.append(optimizer._stepper._reader[1].looked_at())
    assert held is None
    assert found == [50, 50, 0, 50, 50, 1, 50, 0, 0]  # made; first seen; asked for; asked for and one held; that one; loaded


def test_large_state_that_nobody_else_holds_is_looked_at_twice():
    params = [torch.nn.Parameter(torch.ones(LARGE)) for _ in range(3)]
    optimizer = make("AdaBayes", params, "cpp")
    found = []
    for t in range(11):
        for p in params:
            p.grad = torch.ones(LARGE)
        if t == 4:
            assert len(optimizer.state) == 3
        held = optimizer.state[params[0]]["prior_var"].data if t == 7 else None
        optimizer.step()
        found.append(optimizer._stepper._reader[1].looked_at())
    assert held is None
    assert found == [3, 3, 3, 0, 3, 3, 0, 3, 3, 0, 0]  # made, seen twice; asked for; asked for and one held


@pytest.mark.parametrize("shape", [(5,), LARGE], ids=["small", "large"])
def test_state_that_is_taken_away_is_let_go_of_at_once(shape):
    p = torch.nn.Parameter(torch.ones(shape))
    optimizer = make("AdaBayes", [p], "auto")
    train(optimizer, [p], 5, seed=1)
    state = [weakref.ref(t) for t in optimizer.state.pop(p).values()]
    assert [t() for t in state] == [None] * len(state)


def test_state_that_leads_to_its_optimizer_is_collected_with_it():
    p = torch.nn.Parameter(torch.ones(LARGE))
    optimizer = make("AdaBayes", [p], "auto")
    train(optimizer, [p], 1, seed=1)
    optimizer.state[p]["exp_avg"].optimizer = optimizer
    train(optimizer, [p], 5, seed=1)
    collected = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert collected() is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.complex64])
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", FUSED)
def test_what_others_keep_in_the_state_is_moved_as_torch_moves_it(name, device, dtype):
    """Tensors of other names, in containers too, follow the parameter's device and dtype; ours keep their own dtype."""

    def loaded(make_one):
        p, q = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3, device=device, dtype=dtype))
        first, second = make_one(p), make_one(q)
        p.grad = torch.ones(3)
        first.step()
        first.state[p].update(
            slow_buffer=torch.ones(3),
            nested={"step": torch.tensor(3), "values": [torch.ones(2), torch.arange(2)]},
            count=7,
            ids=torch.arange(3),
            double=torch.ones((), dtype=torch.float64),
        )
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        state = second.state[q]
        leaves = [state["slow_buffer"], *state["nested"]["values"], state["nested"]["step"], state["ids"], state["double"]]
        return [(t.dtype, t.device.type) for t in leaves], state["count"], type(state["nested"]["values"]), state["exp_avg"].dtype

    ours, theirs = loaded(lambda p: make(name, [p], "foreach")), loaded(lambda p: torch.optim.AdamW([p]))
    assert ours[:3] == theirs[:3]
    assert ours[3] == torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize("name", FUSED)
def test_a_tensor_that_two_groups_share_takes_no_other_groups_value(name):
    """Both groups had the very tensor; the checkpoint gives each its own value."""
    decay = torch.tensor(0.05)
    groups = [{"params": [torch.nn.Parameter(torch.ones(2))], "weight_decay": value} for value in (0.1, 0.2)]
    saved = FUSED[name](groups, **OPTIONS[name]).state_dict()
    optimizer = FUSED[name](
        [{"params": [torch.nn.Parameter(torch.ones(2))]} for _ in range(2)], weight_decay=decay, **OPTIONS[name]
    )
    optimizer.load_state_dict(saved)
    assert [float(group["weight_decay"]) for group in optimizer.param_groups] == pytest.approx([0.1, 0.2])
