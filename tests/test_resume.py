"""Training that was interrupted goes on bit for bit as if it had not been, whichever way it is saved and loaded."""

import copy
import functools
import io
import pickle
import random
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from runs import FUSED
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

from adabayes_fused import backends, checkpoint, stepper

STEPS = 30
INTERRUPTED = sorted(random.Random(8).sample(range(1, STEPS), 10))
SHAPES = {
    "matrix": ((6, 5), torch.float32),
    "bf16": ((33,), torch.bfloat16),
    "empty": ((0, 4), torch.float32),
    "scalar": ((), torch.float32),
    "conv": ((2, 3, 4, 4), torch.float32),
    "bf16_matrix": ((7, 5), torch.bfloat16),
    "large": ((1100,), torch.float32),
    "float64": ((9,), torch.float64),
}
OPTIONS = {"AdaBayes": dict(batch_size=8), "AdaBayesFP": dict(eps=1e-6)}
OTHERS = {"AdaBayes": dict(batch_size=3, betas=(0.3, 0.4)), "AdaBayesFP": dict(eps=1e-2, sgd_lr=7.0)}  # to be overwritten


class Run:
    """A model, its optimizer, and a schedule that goes on from the groups' own ``lr`` and ``betas``."""

    def __init__(self, name, other=False, tensor_lr=False, **policy):
        generator = torch.Generator().manual_seed(5)
        self.kind = dict(name=name, tensor_lr=tensor_lr, **policy)
        self.model = torch.nn.Module()
        for key, (shape, dtype) in SHAPES.items():
            if dtype == torch.float64 and policy.get("state_dtype", "float32") != "float32":
                continue  # which take no codes
            p = torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
            if p.dim() == 4:
                p.data = p.data.contiguous(memory_format=torch.channels_last)
            self.model.register_parameter(key, p)
        params = list(self.model.parameters())
        options = OTHERS[name] if other else OPTIONS[name]
        decays = (0.9, 0.8) if other else (0.05, 0.4)
        groups = [dict(params=ps, weight_decay=decay) for ps, decay in zip((params[:3], params[3:]), decays, strict=True)]
        lr = 2e-2 if other else 1e-2
        lr = torch.tensor(lr, dtype=torch.float64) if tensor_lr else lr
        self.optimizer = FUSED[name](groups, lr=lr, **options, **policy)

    def step(self, t):
        generator = torch.Generator().manual_seed(t)
        for i, p in enumerate(self.model.parameters()):
            noise = torch.randn(p.shape, generator=generator) * 10.0 ** (i % 4 - 2)
            absent = (t + i) % 3 == 0 or (i == 5 and t < STEPS // 2)  # that one is unfrozen late
            p.grad = None if absent else (noise + 0.1 * p.detach()).to(p)
        self.optimizer.step()
        for group in self.optimizer.param_groups:
            factor = 1.2 if t < 8 else 0.93
            group["lr"] = group["lr"].mul_(factor) if isinstance(group["lr"], torch.Tensor) else group["lr"] * factor
            group["betas"] = (group["betas"][0] * 0.99, group["betas"][1])

    def snapshot(self):
        names = {p: name for name, p in self.model.named_parameters()}
        state = {names[p]: {k: v.clone() for k, v in entry.items()} for p, entry in self.optimizer.state.items()}
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}, state

    def again(self, **policy):
        """A run built anew, with other options and the same weights."""
        new = Run(other=True, **{**self.kind, **policy})
        new.model.load_state_dict(self.model.state_dict())
        return new


@functools.lru_cache
def uninterrupted(name, **kind):
    run = Run(name, **kind)
    seen = []
    for t in range(STEPS):
        run.step(t)
        seen.append(run.snapshot())
    return seen


def assert_same(run, expected):
    """The same bits and dtypes of weights and state; state that is not there yet may have been made, at step 0."""
    weights, state = run.snapshot()
    for key, p in expected[0].items():
        assert torch.equal(weights[key], p), key
        for slot, value in expected[1].get(key, {}).items():
            assert torch.equal(state[key][slot], value), (key, slot)
            assert state[key][slot].dtype == value.dtype, (key, slot)
        if key not in expected[1]:
            assert state.get(key, {}).get("step", 0) == 0, key


# --- Ways to stop and go on: each takes a run and gives one that is to go on alike ------------------------------------


def through_a_file(state_dict, **options):
    file = io.BytesIO()
    torch.save(state_dict, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True, **options)


def load(run, state_dict, **policy):
    new = run.again(**policy)
    new.optimizer.load_state_dict(state_dict)
    return new


def torch_save(run, _):
    return load(run, through_a_file(run.optimizer.state_dict()))


def map_location(run, _):
    return load(run, through_a_file(run.optimizer.state_dict(), map_location=lambda storage, where: storage.cpu()))


def memory_mapped(run, path):
    torch.save(run.optimizer.state_dict(), path / "optimizer.pt")
    return load(run, torch.load(path / "optimizer.pt", weights_only=True, map_location="cpu", mmap=True))


def pickled(run, _):
    run.model, run.optimizer = pickle.loads(pickle.dumps((run.model, run.optimizer)))
    return run


def deep_copied(run, _):
    run.model, run.optimizer = copy.deepcopy((run.model, run.optimizer))
    return run


def rolled_back(run, _):
    """Loaded into the same optimizer, after steps that are to be forgotten."""
    weights, state = copy.deepcopy(run.model.state_dict()), copy.deepcopy(run.optimizer.state_dict())
    for t in (1000, 1001, 1002):
        run.step(t)
    run.model.load_state_dict(weights)
    run.optimizer.load_state_dict(state)
    return run


def other_backend(run, _):
    return load(run, run.optimizer.state_dict(), backend="foreach" if run.optimizer.backend == "cpp" else "cpp")


def dcp_memory(run, _, **options):
    options = StateDictOptions(strict=False, **options)
    state = copy.deepcopy(get_optimizer_state_dict(run.model, run.optimizer, options=options))
    new = run.again()
    set_optimizer_state_dict(new.model, new.optimizer, state, options=options)
    return new


def dcp_files(run, path, **options):
    options = StateDictOptions(strict=False, **options)
    state = {"optimizer": get_optimizer_state_dict(run.model, run.optimizer, options=options)}
    dcp.save(state, checkpoint_id=path, no_dist=True)
    new = run.again()
    state = {"optimizer": get_optimizer_state_dict(new.model, new.optimizer, options=options)}
    partial = dcp.DefaultLoadPlanner(allow_partial_load=True)  # some parameters have had no gradient yet, and no state
    dcp.load(state, checkpoint_id=path, no_dist=True, planner=partial)
    set_optimizer_state_dict(new.model, new.optimizer, state["optimizer"], options=options)
    return new


WAYS = {
    "torch.save": torch_save,
    "map_location": map_location,
    "mmap": memory_mapped,
    "pickle": pickled,
    "deepcopy": deep_copied,
    "rolled back": rolled_back,
    "dcp": dcp_memory,
    "dcp flattened": functools.partial(dcp_memory, flatten_optimizer_state_dict=True),
    "dcp full": functools.partial(dcp_memory, full_state_dict=True, cpu_offload=True),
    "dcp files": dcp_files,
    "dcp files flattened": functools.partial(dcp_files, flatten_optimizer_state_dict=True),
}


def interrupted(run, way, path, expected):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(torch.distributed is |TypedStorage|single process)")
        for t in range(STEPS):
            if t in INTERRUPTED:
                (path / str(t)).mkdir()
                run = way(run, path / str(t))
                assert_same(run, expected[t - 1])
            run.step(t)
            assert_same(run, expected[t])


STORED = {
    "full": {},
    "lean": dict(lean=True),
    "bfloat16": dict(state_dtype="bfloat16", weight_rounding="stochastic"),
    "8bit": dict(lean=True, state_dtype="8bit", weight_rounding="24bit"),
    "32bit weights": dict(lean=True, weight_rounding="32bit"),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("name", FUSED)
def test_goes_on_bit_for_bit(name, stored, way, tmp_path):
    kind = STORED[stored]
    interrupted(Run(name, **kind), WAYS[way], tmp_path, uninterrupted(name, **kind))


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("way", ["torch.save", "pickle", "deepcopy", "rolled back", "dcp", "dcp files flattened"])
@pytest.mark.parametrize("name", FUSED)
def test_goes_on_with_a_tensor_lr(name, way, capturable, tmp_path):
    kind = dict(tensor_lr=True, capturable=capturable)
    interrupted(Run(name, **kind), WAYS[way], tmp_path, uninterrupted(name, **kind))


@pytest.mark.parametrize("lean", [False, True], ids=["full", "lean"])
def test_goes_on_where_the_backend_changes_in_between(lean, tmp_path):
    """From cpp to foreach and back. AdaBayesFP is left out: torch.sqrt, which its foreach takes, is an ulp off on CPUs."""
    if reason := backends.BACKENDS["cpp"].unavailable(torch.device("cpu")):
        pytest.skip(reason)
    run = Run("AdaBayes", lean=lean, backend="cpp")
    interrupted(run, other_backend, tmp_path, uninterrupted("AdaBayes", lean=lean))


# --- The step that torch.distributed.checkpoint makes for the sake of the state ---------------------------------------


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("lean", [False, True], ids=["full", "lean"])
@pytest.mark.parametrize("name", FUSED)
def test_asking_for_the_state_before_the_first_step_leaves_no_trace(name, lean, tensor_lr, capturable, flatten):
    kind = dict(lean=lean, tensor_lr=tensor_lr, capturable=capturable)
    run, expected = Run(name, **kind), uninterrupted(name, **kind)
    weights, lrs = run.snapshot()[0], [group["lr"] for group in run.optimizer.param_groups]
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    get_optimizer_state_dict(run.model, run.optimizer, options=options)
    assert all(group["lr"] is lr for group, lr in zip(run.optimizer.param_groups, lrs, strict=True))
    assert_same(run, (weights, {}))
    initial = {"step": 0.0, **dict(zip(run.optimizer.algorithm.slots, run.optimizer.algorithm.initial, strict=True))}
    for p in run.model.parameters():
        assert set(run.optimizer.state[p]) == {"step", *run.optimizer.algorithm.stored(lean)}
        assert all((value == initial[slot]).all() for slot, value in run.optimizer.state[p].items())
    for t in range(10):
        run.step(t)
        assert_same(run, expected[t])


def small(name, lrs, grads, **policy):
    params = [torch.nn.Parameter(torch.ones(3)) for _ in grads]
    optimizer = FUSED[name]([dict(params=[p]) for p in params], lr=1e-2, **OPTIONS[name], **policy)
    for p, group, lr, grad in zip(params, optimizer.param_groups, lrs, grads, strict=True):
        p.grad, group["lr"] = torch.full_like(p, grad), lr
    return optimizer, params


@pytest.mark.parametrize("policy", [{}, dict(backend="foreach"), dict(capturable=True)], ids=str)
@pytest.mark.parametrize(
    ("lrs", "grads", "counted"),
    [
        ((0.0, 0.0), (0.0, -0.0), 0),
        ((torch.tensor(0.0), torch.zeros(1)), (0.0, 0.0), 0),
        ((0.0, 0.0), (0.0, 1e-30), 1),  # a warm-up from 0
        ((0.0, 0.0), (0.0, float("nan")), 1),
        ((0.0, 1e-3), (0.0, 0.0), 1),
        ((0.0, torch.tensor(1e-3)), (0.0, 0.0), 1),
    ],
)
@pytest.mark.parametrize("name", FUSED)
def test_only_a_step_of_lr_0_and_zero_gradients_is_not_counted(name, lrs, grads, counted, policy):
    optimizer, params = small(name, lrs, grads, **policy)
    optimizer.step()
    assert [optimizer.state[p]["step"] for p in params] == [counted] * 2
    if grads[1] == 1e-30:
        assert optimizer.state[params[1]]["exp_avg"].all()
    optimizer.step()  # the state is there: this one counts
    assert [optimizer.state[p]["step"] for p in params] == [counted + 1] * 2


def test_a_parameter_that_joins_later_counts():
    optimizer, params = small("AdaBayes", (0.0, 0.0), (1.0, 0.0))
    params[1].grad = None
    optimizer.step()
    params[0].grad, params[1].grad = None, torch.zeros(3)
    optimizer.step()
    assert optimizer.state[params[1]]["step"] == 1


def test_a_step_under_capture_counts(monkeypatch):
    """A graph of a step that does nothing would be of no use, and a captured stream cannot be waited for."""
    optimizer, params = small("AdaBayes", (0.0, 0.0), (0.0, 0.0))
    monkeypatch.setattr(stepper, "capturing", lambda: True)
    optimizer.step()
    assert [optimizer.state[p]["step"] for p in params] == [1, 1]


def test_ordinary_steps_are_not_asked(monkeypatch):
    """Neither one without new state, nor the gradients where the learning rate is not 0."""
    optimizer, params = small("AdaBayes", (1e-3, 0.0), (1.0, 1.0))
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "any", None)
        optimizer.step()
    monkeypatch.setattr(stepper, "_only_makes_state", None)
    for _ in range(2):
        optimizer.step()
    assert [optimizer.state[p]["step"] for p in params] == [3, 3]


# --- Tensors that stay where they are ---------------------------------------------------------------------------------


def trained(name, steps, **kind):
    run = Run(name, **kind)
    for t in range(steps):
        run.step(t)
    return run


def addresses(optimizer):
    return {p: {key: value.data_ptr() for key, value in entry.items()} for p, entry in optimizer.state.items()}


@pytest.mark.parametrize("lean", [False, True], ids=["full", "lean"])
@pytest.mark.parametrize("saved_lean", [False, True], ids=["from full", "from lean"])
@pytest.mark.parametrize("name", FUSED)
def test_capturable_state_is_copied_into(name, lean, saved_lean):
    saved, run = trained(name, 9, lean=saved_lean, capturable=True), trained(name, 4, lean=lean, capturable=True)
    before, entries = addresses(run.optimizer), {p: dict(entry) for p, entry in run.optimizer.state.items()}
    state = through_a_file(saved.optimizer.state_dict())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the loaded state is lean")
        run.optimizer.load_state_dict(state)
    assert addresses(run.optimizer) == before
    params = list(run.model.parameters())
    for i, loaded in state["state"].items():
        for key, value in entries[params[i]].items():
            assert run.optimizer.state[params[i]][key] is value
            expected = loaded.get(key, torch.zeros_like(value) if key == "exp_avg_sq" else torch.ones_like(value))
            assert torch.equal(value, expected), (i, key)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU; this machine has none")
@pytest.mark.parametrize("name", FUSED)
def test_a_captured_step_goes_on_from_what_is_loaded(name):
    p = torch.nn.Parameter(torch.randn(300, device="cuda"))
    p.grad = torch.randn_like(p)
    optimizer = FUSED[name]([p], lr=torch.tensor(1e-2, device="cuda"), capturable=True, **OPTIONS[name])
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        optimizer.step()
    torch.cuda.current_stream().wait_stream(side)
    weights, state = p.detach().clone(), copy.deepcopy(optimizer.state_dict())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    ends = []
    for _ in range(2):
        for _ in range(3):
            graph.replay()
        ends.append((p.detach().clone(), float(optimizer.state[p]["step"])))
        p.data.copy_(weights)
        optimizer.load_state_dict(state)
    assert torch.equal(ends[0][0], ends[1][0])
    assert [step for _, step in ends] == [4, 4]


def test_other_state_is_made_anew():
    """Without capturable, or where what is there is of another dtype or shape."""
    for capturable in (False, True):
        saved, run = trained("AdaBayesFP", 9, capturable=capturable), trained("AdaBayesFP", 4, capturable=capturable)
        p = run.model.matrix
        run.optimizer.state[p]["exp_avg"] = wide = torch.ones(p.shape, dtype=torch.float64)
        run.optimizer.state[p]["exp_avg_sq"] = flat = torch.ones(p.numel())
        step = run.optimizer.state[p]["step"]
        run.optimizer.load_state_dict(saved.optimizer.state_dict())
        entry, expected = run.optimizer.state[p], saved.optimizer.state[saved.model.matrix]
        assert (entry["step"] is step) == capturable
        assert all(torch.equal(entry[key], value) for key, value in expected.items())
        assert entry["exp_avg"].dtype == torch.float32
        assert (wide == 1).all()
        assert (flat == 1).all()


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("saved_lr", [3e-3, torch.tensor(3e-3), torch.tensor([3e-3], dtype=torch.float64)], ids=str)
@pytest.mark.parametrize("name", FUSED)
def test_a_tensor_lr_stays_that_tensor(name, saved_lr, capturable):
    saved = trained(name, 2)
    for group in saved.optimizer.param_groups:
        group["lr"] = saved_lr
    run = Run(name, tensor_lr=True, capturable=capturable)
    decay = run.optimizer.param_groups[1]["weight_decay"] = torch.tensor(0.9)
    lrs = [group["lr"] for group in run.optimizer.param_groups]
    run.optimizer.load_state_dict(saved.optimizer.state_dict())
    for group, lr in zip(run.optimizer.param_groups, lrs, strict=True):
        assert group["lr"] is lr
        assert lr == pytest.approx(3e-3, rel=1e-7)
        assert lr.shape == ()
    assert run.optimizer.param_groups[1]["weight_decay"] is decay
    assert decay == torch.tensor(0.4)


def test_a_float_lr_becomes_what_was_loaded():
    for saved_lr in (3e-3, torch.tensor(3e-3)):
        saved, run = Run("AdaBayesFP"), Run("AdaBayesFP")
        saved.optimizer.param_groups[0]["lr"] = saved_lr
        run.optimizer.load_state_dict(saved.optimizer.state_dict())
        lr = run.optimizer.param_groups[0]["lr"]
        assert type(lr) is type(saved_lr)
        assert lr == saved_lr
        assert lr is not saved_lr or isinstance(lr, float)


def test_entries_that_change_places_are_not_mixed_up():
    p, q = (torch.nn.Parameter(torch.ones(4)) for _ in range(2))
    optimizer = FUSED["AdaBayes"]([p, q], batch_size=8, capturable=True)
    p.grad, q.grad = torch.ones(4), 2 * torch.ones(4)
    optimizer.step()
    state = optimizer.state_dict()
    first, second = copy.deepcopy(state["state"][0]), copy.deepcopy(state["state"][1])
    state["state"] = {0: state["state"][1], 1: state["state"][0]}
    optimizer.load_state_dict(state)
    assert all(torch.equal(optimizer.state[p][key], value) for key, value in second.items())
    assert all(torch.equal(optimizer.state[q][key], value) for key, value in first.items())


def bad_slot(state):
    state["state"][7]["exp_avg"] = torch.zeros(2)


def bad_step(state):
    state["state"][7]["step"] = torch.zeros(2)


def bad_lr(state):
    state["param_groups"][1]["lr"] = -1.0


def bad_first_prior(state):
    state["param_groups"][1]["first_prior"] = "large"


@pytest.mark.parametrize("spoil", [bad_slot, bad_step, bad_lr, bad_first_prior])
@pytest.mark.parametrize("capturable", [False, True])
def test_nothing_is_written_before_all_is_checked(capturable, spoil):
    kind = dict(tensor_lr=True, capturable=capturable)
    run, saved = trained("AdaBayes", 4, **kind), trained("AdaBayes", 9, **kind)
    for group in run.optimizer.param_groups:
        group["first_prior"] = torch.tensor(group["first_prior"])
    state = copy.deepcopy(saved.optimizer.state_dict())
    spoil(state)
    before, groups = run.snapshot(), copy.deepcopy([{**group, "params": None} for group in run.optimizer.param_groups])
    objects = [group["lr"] for group in run.optimizer.param_groups]
    with pytest.raises((ValueError, TypeError)):
        run.optimizer.load_state_dict(state)
    assert_same(run, before)
    assert [{**group, "params": None} for group in run.optimizer.param_groups] == groups
    assert all(group["lr"] is lr for group, lr in zip(run.optimizer.param_groups, objects, strict=True))


@pytest.mark.parametrize("tensor_lr", [False, True])
def test_memory_that_runs_out_while_state_is_restored_changes_nothing(monkeypatch, tensor_lr):
    """torch has then put the loaded groups and state in place already."""
    run, saved = trained("AdaBayes", 4, tensor_lr=tensor_lr), trained("AdaBayes", 9, tensor_lr=tensor_lr)
    optimizer, state = run.optimizer, copy.deepcopy(saved.optimizer.state_dict())
    state["param_groups"][0].update(weight_decay=0.7, sgd_lr=0.3)
    optimizer.param_groups[0]["sgd_lr"] = 0.2  # an edit that the next step takes up
    before, groups, make, made = run.snapshot(), list(optimizer.param_groups), checkpoint.own_copy, []
    options = [dict(group) for group in groups]

    def own_copy(*arguments):
        made.append(arguments)
        if len(made) > 3:
            raise MemoryError("no memory")
        return make(*arguments)

    monkeypatch.setattr(checkpoint, "own_copy", own_copy)
    with pytest.raises(MemoryError):
        optimizer.load_state_dict(state)
    assert_same(run, before)
    assert all(now is group for now, group in zip(optimizer.param_groups, groups, strict=True))
    assert [dict(group) for group in groups] == options
    monkeypatch.undo()
    r = groups[0]["r"]
    optimizer.step()
    assert groups[0]["r"] != r


def test_a_hook_that_fails_after_loading_leaves_what_was_loaded():
    """As with torch's own optimizers; state that was copied into cannot be had back."""
    for capturable in (False, True):
        run, saved = trained("AdaBayes", 4, capturable=capturable), trained("AdaBayes", 9, capturable=capturable)
        run.model.load_state_dict(saved.model.state_dict())

        def fail(optimizer):
            raise RuntimeError("no")

        run.optimizer.register_load_state_dict_post_hook(fail)
        with pytest.raises(RuntimeError, match="no"):
            run.optimizer.load_state_dict(saved.optimizer.state_dict())
        assert_same(run, saved.snapshot())
