"""The options of a group: numbers of any kind, edited at any time, in the very dict that was given."""

import collections
import copy
import decimal
import fractions
import inspect
import io
import math
import pickle
import warnings
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from runs import FUSED, SLOW

from adabayes_fused import AdaBayes, AdaBayesFP, posterior
from adabayes_fused.algorithms import ALGORITHMS, meant

OPTIONS = {"AdaBayes": dict(batch_size=8), "AdaBayesFP": {}}
BACKENDS = ["cpp", "foreach"]


def parameter(seed=0, numel=5):
    p = torch.nn.Parameter(torch.randn(numel, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    p.grad = torch.randn(numel, generator=torch.Generator().manual_seed(seed + 100), dtype=torch.float64)
    return p


def make(name, params, **options):
    return FUSED[name](params, **OPTIONS[name] | options)


def through_a_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


# --- Numbers of any kind ----------------------------------------------------------------------------------------------


class ListConfig(Sequence):
    """As omegaconf's: a sequence that is neither list nor tuple."""

    def __init__(self, values):
        self.values = values

    def __getitem__(self, i):
        return self.values[i]

    def __len__(self):
        return len(self.values)


BETAS = {
    "list": lambda: [0.75, 0.875],
    "ListConfig": lambda: ListConfig([0.75, 0.875]),
    "deque": lambda: collections.deque([0.75, 0.875]),
    "array": lambda: np.array([0.75, 0.875]),
    "float32 array": lambda: np.array([0.75, 0.875], dtype=np.float32),
    "tensor": lambda: torch.tensor([0.75, 0.875]),
    "tensor that requires grad": lambda: torch.tensor([0.75, 0.875], requires_grad=True),
    "numpy numbers": lambda: (np.float32(0.75), np.float64(0.875)),
    "0-dim arrays": lambda: (np.array(0.75), np.array(0.875)),
    "one-element tensors": lambda: (torch.tensor([0.75]), torch.tensor(0.875)),
    "fractions": lambda: [fractions.Fraction(3, 4), decimal.Decimal("0.875")],
}
NUMBERS = {  # of 2^-7, which each holds exactly
    "float16": np.float16,
    "float32": np.float32,
    "float64": np.float64,
    "0-dim array": np.array,
    "array of one": lambda x: np.array([x]),
    "Fraction": fractions.Fraction,
    "Decimal": decimal.Decimal,
    "tensor": torch.tensor,
    "tensor of shape (1,)": lambda x: torch.tensor([x]),
    "bfloat16 tensor": lambda x: torch.tensor(x, dtype=torch.bfloat16),
    "tensor that requires grad": lambda x: torch.tensor(x, requires_grad=True),
}


def gone_on(optimizer, p, steps=2):
    for _ in range(steps):
        optimizer.step()
    return p.detach().clone()


def takes(name, policy, given, plain):
    """Given to the constructor or written between steps, ``given`` is ``plain``; the state_dict loads with weights_only."""
    p, q, r = parameter(), parameter(), parameter()
    constructed, edited, expected = make(name, [p], **given(), **policy), make(name, [q], **policy), make(name, [r], **policy)
    reference = parameter()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(gone_on(constructed, p), gone_on(make(name, [reference], **plain, **policy), reference))
        edited.step()
        expected.step()
        edited.param_groups[0].update(given())
        expected.param_groups[0].update(plain)
        assert torch.equal(gone_on(edited, q), gone_on(expected, r))
        for optimizer, weight in ((constructed, p), (edited, q)):
            again = torch.nn.Parameter(weight.detach().clone())
            again.grad = weight.grad.clone()
            loaded = make(name, [again], **policy)
            loaded.load_state_dict(through_a_file(optimizer.state_dict()))
            assert torch.equal(gone_on(loaded, again), gone_on(optimizer, weight))


@pytest.mark.parametrize("policy", [dict(backend="cpp"), dict(backend="foreach"), dict(capturable=True)], ids=str)
@pytest.mark.parametrize("kind", BETAS)
@pytest.mark.parametrize("name", FUSED)
def test_betas(name, kind, policy):
    takes(name, policy, lambda: dict(betas=BETAS[kind]()), dict(betas=(0.75, 0.875)))


@pytest.mark.parametrize("policy", [dict(backend="cpp"), dict(backend="foreach"), dict(capturable=True)], ids=str)
@pytest.mark.parametrize("kind", NUMBERS)
@pytest.mark.parametrize("name", FUSED)
def test_numbers(name, kind, policy):
    plain = dict(lr=2**-7, weight_decay=2**-6, sgd_lr=0.25, batch_size=4.0) | (dict(eps=2**-9) if name == "AdaBayesFP" else {})
    takes(name, policy, lambda: {key: NUMBERS[kind](value) for key, value in plain.items()}, plain)


@pytest.mark.parametrize("name", FUSED)
def test_flags_of_numpy(name):
    p, q = parameter(), parameter()
    given = {key: np.bool_(True) for key in ("maximize", "capturable")}
    optimizer = make(name, [p], **given)
    assert torch.equal(gone_on(optimizer, p), gone_on(make(name, [q], **dict.fromkeys(given, True)), q))
    through_a_file(optimizer.state_dict())


@pytest.mark.parametrize("name", SLOW)
def test_the_slow_path_takes_them_too(name):
    p, q = parameter(), parameter()
    odd = SLOW[name]([p], lr=np.array(2**-7), betas=np.array([0.75, 0.875]), **OPTIONS[name])
    even = SLOW[name]([q], lr=2**-7, betas=(0.75, 0.875), **OPTIONS[name])
    assert torch.equal(gone_on(odd, p), gone_on(even, q))


@pytest.mark.parametrize("name", FUSED)
def test_tensors_stay_tensors(name):
    betas = torch.tensor([0.75, 0.875])
    group = make(name, [parameter()], lr=torch.tensor([1e-2]), betas=betas, batch_size=torch.tensor(4)).param_groups[0]
    assert isinstance(group["lr"], torch.Tensor)
    assert isinstance(group["batch_size"], torch.Tensor)
    assert isinstance(group["betas"], tuple)
    assert all(isinstance(beta, torch.Tensor) for beta in group["betas"])


@pytest.mark.parametrize(
    "betas",
    ["ab", {0: 0.9, 1: 0.99}, {0.9, 0.99}, 0.9, np.array(0.9), [0.9], np.ones((2, 2)), torch.ones(2, 2), (0.9, "b")],
    ids=str,
)
@pytest.mark.parametrize("name", FUSED)
def test_what_are_no_betas(name, betas):
    with pytest.raises((ValueError, TypeError), match=r"Invalid betas|betas\[1\] must be a number"):
        make(name, [parameter()], betas=betas)
    optimizer = make(name, [parameter()])
    optimizer.param_groups[0]["betas"] = betas
    with pytest.raises((ValueError, TypeError), match=r"Invalid betas|betas\[1\] must be a number"):
        optimizer.step()
    assert not optimizer.state


@pytest.mark.parametrize(
    "lr", [np.ones(2), np.array([]), 1j, np.complex64(1), np.bool_(True), torch.tensor(True), object], ids=str
)
def test_what_is_no_number(lr):
    for cls in (FUSED["AdaBayesFP"], SLOW["AdaBayesFP"]):
        with pytest.raises(TypeError, match="lr must be a"):
            cls([parameter()], lr=lr)


@pytest.mark.parametrize("option", ["lr", "batch_size"])
def test_a_tensor_without_a_number(option):
    with pytest.raises(ValueError, match=f"{option} is a tensor on the meta device, which holds no number"):
        make("AdaBayes", [parameter()], **{option: torch.tensor(2.0, device="meta")})


def test_set_batch_size_in_a_tensor_that_requires_grad():
    optimizer = make("AdaBayes", [parameter()], batch_size=torch.tensor(4.0, requires_grad=True))
    optimizer.set_batch_size(np.array(6))
    assert optimizer.param_groups[0]["batch_size"] == 6


# --- Keys that are no options -----------------------------------------------------------------------------------------

# fmt: off
KEYS = [
    "wd_mult", "lr_mult", "lr_scale", "use_weight_decay", "base_weight_decay", "weight_decay_mult", "no_weight_decay",
    "weight_decays", "l2_weight_decay", "mini_batch_size", "micro_batch_size", "batch_sizes", "patch_size", "grad_norm",
    "grad_clip", "max_norm", "initial_lr", "max_lr", "min_lr", "base_lr", "lr2", "lrs", "layer_decay", "layer_id", "name",
    "names", "group_name", "mean", "lead", "learn", "clean", "step", "steps", "beta1", "beta2", "beta3", "eps2",
    "epsilon", "momentum", "nesterov", "base_momentum", "max_momentum", "foreach", "fused", "differentiable", "amsgrad",
    "decoupled_weight_decay", "minimize", "trust_ratio", "is_expert_parallel", "default_config", "weight_lr_power", "rho",
    "k", "r_max", "transitions", "translation", "norm_type", "apply_decay", "wd_ratio", "swa_lr", "lookahead",
]
# fmt: on
SLIPS = dict(
    weight_decya="weight_decay",
    weigth_decay="weight_decay",
    weightdecay="weight_decay",
    Weight_Decay="weight_decay",
    wieght_decay="weight_decay",
    batch_siz="batch_size",
    bacth_size="batch_size",
    batchSize="batch_size",
    maximise="maximize",
    captureable="capturable",
    sgdlr="sgd_lr",
    sdg_lr="sgd_lr",
    beta="betas",
    LR="lr",
    max_grad_nrom="max_grad_norm",
)


@pytest.mark.parametrize("name", FUSED)
def test_keys_of_frameworks_pass(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = make(name, [{"params": [parameter()], **dict.fromkeys(KEYS, 1.0), 5: "five"}])
        optimizer.step()
    assert all(optimizer.param_groups[0][key] == 1.0 for key in KEYS)


@pytest.mark.parametrize(("key", "option"), SLIPS.items())
@pytest.mark.parametrize("name", FUSED)
def test_a_slip_warns(name, key, option):
    p, q = parameter(), parameter()
    with pytest.warns(UserWarning, match=f"the key '{key}', which no step reads; did you mean '{option}'") as found:
        optimizer = FUSED[name]([{"params": [p], key: 0.5}], **OPTIONS[name])
    assert found[0].filename == __file__
    assert torch.equal(gone_on(optimizer, p), gone_on(make(name, [q]), q))


def test_no_option_is_a_slip_of_another():
    names = {*inspect.signature(AdaBayes).parameters, *inspect.signature(AdaBayesFP).parameters}
    assert not [name for name in names if meant(name, names - {name})]


# --- Edits ------------------------------------------------------------------------------------------------------------

EDITS = [
    dict(lr=3e-3),
    dict(batch_size=3),
    dict(sgd_lr=0.7),
    dict(betas=(0.5, 0.6)),
    dict(weight_decay=0.7),
    dict(transition="exact"),
    dict(variance_follows_lr=False),
    dict(maximize=True),
    dict(capturable=True),
    dict(eps=0.3),
    dict(r=31.0),
]


def edits(name):
    known = inspect.signature(FUSED[name]).parameters
    return [edit for edit in EDITS if edit.keys() <= {*known, "r"}]


def test_every_option_of_a_group_is_edited():
    for name, cls in FUSED.items():
        options = make(name, [parameter()]).param_groups[0].keys() - {"params", "first_prior"}
        assert options == {key for edit in edits(name) for key in edit}
        assert options - {"r"} <= inspect.signature(cls).parameters.keys()


@pytest.mark.parametrize("given", [False, True], ids=["group", "the dict that was given"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "edit"), [(name, edit) for name in FUSED for edit in edits(name)], ids=str)
def test_an_edit_acts_at_the_next_step_as_in_a_fresh_group(name, edit, backend, given):
    p, q, r = parameter(), parameter(), parameter()
    dicts = [{"params": [x]} for x in (p, r)]
    edited, left = (make(name, [d], backend=backend) for d in dicts)
    edited.step()
    left.step()
    (dicts[0] if given else edited.param_groups[0]).update(edit)
    with torch.no_grad():
        q.copy_(p)
    fresh = make(name, [q], backend=backend, **{key: value for key, value in edit.items() if key != "r"})
    state = edited.state_dict()
    state["param_groups"] = fresh.state_dict()["param_groups"]
    if "lr" in edit or "r" in edit:  # r stays where lr is scheduled
        state["param_groups"][0]["r"] = edit.get("r", edited.param_groups[0]["r"])
    state["param_groups"][0]["first_prior"] = edited.param_groups[0].get("first_prior")
    fresh.load_state_dict(state)
    for optimizer in (edited, fresh, left):
        optimizer.step()
    assert torch.equal(p, q)
    assert all(torch.equal(value, fresh.state[q][key]) for key, value in edited.state[p].items())
    unchanged = torch.equal(p, r) and all(torch.equal(value, left.state[r][key]) for key, value in edited.state[p].items())
    no_effect = {"capturable", "variance_follows_lr"} | ({"batch_size"} if name == "AdaBayesFP" else set())  # at a constant lr
    assert unchanged == (edit.keys() <= no_effect)


@pytest.mark.parametrize(
    ("key", "value"), [("sgd_lr", 0.0), ("sgd_lr", math.nan), ("sgd_lr", "a"), ("r", -1.0), ("r", math.nan), ("r", 0.0)]
)
@pytest.mark.parametrize("name", FUSED)
def test_a_bad_edit_changes_nothing(name, key, value):
    p = parameter()
    optimizer = make(name, [{"params": [parameter(1)]}, {"params": [p]}])
    optimizer.step()
    before, r = p.detach().clone(), optimizer.param_groups[0]["r"]
    optimizer.param_groups[0]["sgd_lr"] = 0.2
    good = optimizer.param_groups[1][key]
    optimizer.param_groups[1][key] = value
    with pytest.raises((ValueError, TypeError), match=f"Invalid {key}|{key} must be a number"):
        optimizer.step()
    assert torch.equal(p, before)
    assert optimizer.param_groups[0]["r"] == r
    optimizer.param_groups[1][key] = good
    optimizer.step()
    assert optimizer.param_groups[0]["r"] == pytest.approx(2 * r)


def test_an_sgd_lr_too_small_for_the_transition():
    optimizer = AdaBayes([parameter()], batch_size=8)
    optimizer.param_groups[0]["sgd_lr"] = 1e-6
    for refused in (optimizer.step, lambda: optimizer.set_batch_size(4)):
        with pytest.raises(ValueError, match="kappa"):
            refused()
    assert optimizer.param_groups[0]["r"] == 100
    optimizer.param_groups[0]["sgd_lr"] = 0.1
    optimizer.step()
    assert optimizer.param_groups[0]["r"] == 100


KEPT = {
    "as it is": lambda o, p: (o, p),
    "deepcopy": lambda o, p: (again := copy.deepcopy(o), again.param_groups[0]["params"][0]),
    "pickle": lambda o, p: (again := pickle.loads(pickle.dumps(o)), again.param_groups[0]["params"][0]),
    "checkpoint": lambda o, p: (reloaded(o, q := torch.nn.Parameter(p.detach().clone())), q),
    "its groups": lambda o, p: (again := type(o)(o.param_groups, **o.defaults), again.load_state_dict(o.state_dict()), p)[::2],
}


def reloaded(optimizer, q):
    again = make(type(optimizer).__name__, [q], sgd_lr=5.0)
    again.load_state_dict(through_a_file(optimizer.state_dict()))
    return again


@pytest.mark.parametrize("tensor", [False, True], ids=["", "r a tensor"])
@pytest.mark.parametrize("way", KEPT)
@pytest.mark.parametrize("name", FUSED)
def test_an_edit_of_sgd_lr_acts_once_however_it_is_kept(name, way, tensor):
    """0.1 to 0.3 and then to 0.6, saved before the step that takes it up or after."""
    p, q = parameter(), parameter()
    optimizer, expected = make(name, [p]), make(name, [q])
    if tensor:
        optimizer.param_groups[0]["r"] = kept = torch.tensor(100.0, dtype=torch.float64)
    optimizer.step()
    expected.step()
    grad = p.grad
    for sgd_lr in (0.3, 0.6):
        optimizer.param_groups[0]["sgd_lr"] = sgd_lr
        expected.param_groups[0]["r"] = sgd_lr / 1e-3
        for _ in range(2):
            optimizer, p = KEPT[way](optimizer, p)
            p.grad = grad
            optimizer.step()
            expected.step()
            torch.testing.assert_close(p, q, rtol=1e-13, atol=1e-13)
    assert optimizer.param_groups[0]["r"] == pytest.approx(600)
    assert not tensor or way != "as it is" or optimizer.param_groups[0]["r"] is kept


@pytest.mark.parametrize("name", FUSED)
def test_old_checkpoints_and_groups_put_in_place(name):
    optimizer = make(name, [parameter()], sgd_lr=0.7)
    saved = make(name, [parameter()]).state_dict()
    assert saved["param_groups"][0].keys() == optimizer.param_groups[0].keys()  # torch.distributed.checkpoint relies on it
    optimizer.load_state_dict(saved)
    optimizer.step()
    assert optimizer.param_groups[0]["r"] == 100
    optimizer.param_groups = [dict(optimizer.param_groups[0])]
    optimizer.step()
    optimizer.param_groups[0]["sgd_lr"] = 0.2
    optimizer.step()
    assert optimizer.param_groups[0]["r"] == 200


@pytest.mark.parametrize("name", FUSED)
def test_an_edit_survives_a_load_that_fails(name):
    optimizer = make(name, [parameter()])
    optimizer.param_groups[0]["sgd_lr"] = 0.2
    bad = optimizer.state_dict()
    bad["param_groups"][0]["r"] = -1.0
    with pytest.raises(ValueError, match="Invalid r"):
        optimizer.load_state_dict(bad)
    assert optimizer.param_groups[0]["r"] == 100
    optimizer.step()
    assert optimizer.param_groups[0]["r"] == 200


@pytest.mark.parametrize("name", FUSED)
def test_a_group_that_was_taken_away_is_not_kept(name):
    kept = parameter()
    optimizer = make(name, [{"params": [kept]}, {"params": [parameter(1)]}])
    optimizer.step()
    del optimizer.param_groups[1]
    optimizer.step()
    assert {id(group) for group in optimizer.param_groups} == optimizer._known_sgd_lrs.keys()


@pytest.mark.parametrize("name", FUSED)
def test_sgd_lr_under_a_scheduler_is_as_from_the_start(name):
    """During a warm-up, from 0 too: not sgd_lr over the present lr, which would be huge afterwards."""
    for at in range(4):
        p, q = parameter(), parameter()
        edited, begun = make(name, [p]), make(name, [q], sgd_lr=0.7)
        schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda t: t / 10) for o in (edited, begun)]
        for t in range(8):
            if t == at:
                edited.param_groups[0]["sgd_lr"] = 0.7
            edited.step()
            begun.step()
            if t < at:  # the first steps went with another sgd_lr: begin again from the same weights and state
                with torch.no_grad():
                    q.copy_(p)
                begun.state[q] = copy.deepcopy(edited.state[p])
            for schedule in schedules:
                schedule.step()
        torch.testing.assert_close(p, q, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", FUSED)
def test_lr_and_sgd_lr_edited_by_hand(name):
    optimizer = make(name, [parameter()])
    optimizer.param_groups[0].update(lr=1e-2, sgd_lr=0.2)
    optimizer.step()
    assert optimizer.param_groups[0]["r"] == 0.2 / 1e-2
    optimizer.param_groups[0].update(lr=0.0, sgd_lr=0.4)
    optimizer.step()
    assert optimizer.param_groups[0]["r"] == 0.4 / 1e-2


def test_sgd_lr_to_infinity_and_back():
    optimizer = AdaBayesFP([parameter()], sgd_lr=math.inf)
    group = optimizer.param_groups[0]
    for sgd_lr, r in ((0.1, 100.0), (math.inf, math.inf), (torch.tensor(0.5), 500.0)):
        group["sgd_lr"] = sgd_lr
        optimizer.step()
        assert group["r"] == pytest.approx(r)
        assert type(group["sgd_lr"]) is float
    group.update(sgd_lr=math.inf)
    optimizer.step()
    group.update(sgd_lr=0.1, lr=0.0)
    with pytest.raises(ValueError, match="from inf to 0.1 where lr is 0"):
        optimizer.step()
    group["lr"] = 1e-2
    optimizer.step()
    assert group["r"] == pytest.approx(10.0)


@pytest.mark.parametrize("name", FUSED)
def test_reading_sees_an_edit_and_changes_nothing(name):
    p = parameter()
    optimizer = make(name, [p], batch_size=8)
    optimizer.step()
    optimizer.param_groups[0]["sgd_lr"] = 0.7
    read = posterior(optimizer, p).variance
    assert optimizer.param_groups[0]["r"] == 100
    optimizer.param_groups[0]["r"] = 700.0
    optimizer.param_groups[0]["sgd_lr"] = 0.1
    torch.testing.assert_close(read, posterior(optimizer, p).variance)


@pytest.mark.parametrize("name", FUSED)
def test_sgd_lr_in_the_slow_path(name):
    p, q = parameter(), parameter()
    fused, slow = make(name, [p]), SLOW[name]([q], **OPTIONS[name])
    for sgd_lr in (0.1, 0.5, 0.05):
        for optimizer in (fused, slow):
            optimizer.param_groups[0]["sgd_lr"] = sgd_lr
            optimizer.step()
    torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


# --- The very dict ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FUSED)
def test_the_dict_that_was_given_is_the_group(name):
    first, second = {"params": parameter()}, collections.OrderedDict(params=[parameter(1)], lr=1e-2)
    optimizer = make(name, [first])
    optimizer.add_param_group(second)
    assert optimizer.param_groups[0] is first
    assert optimizer.param_groups[1] is second
    assert optimizer.param_groups[0].keys() >= {"lr", "r", "betas"}
    assert second["r"] == 10


@pytest.mark.parametrize(
    "bad",
    [
        dict(lr=-1.0),
        dict(lean=True),
        dict(params=["text"]),
        dict(params={torch.ones(1)}),
        dict(params=[torch.ones(2) + 1]),
        dict(sgd_lr=0),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", FUSED)
def test_a_group_that_is_refused_is_left_as_it_was(name, bad):
    if "params" in bad and isinstance(bad["params"], list) and isinstance(bad["params"][0], torch.Tensor):
        bad = dict(params=[parameter() + 1])  # no leaf
    good, group = {"params": [parameter()]}, {"params": [parameter(1)], **bad}
    given = [dict(good), dict(group)]
    optimizer = make(name, [parameter(2)])
    with pytest.raises((ValueError, TypeError)):
        optimizer.add_param_group(group)
    assert group == given[1]
    assert len(optimizer.param_groups) == 1
    if "params" not in bad:
        with pytest.raises((ValueError, TypeError)):
            make(name, [good, group])
        assert [good, group] == given


# --- Built anew -------------------------------------------------------------------------------------------------------

POLICY = dict(lean=True, backend="foreach", max_grad_norm=0.3, skip_nonfinite=True, fused_unscale=False)


def rebuilt(optimizer, params, filtered):
    names = inspect.signature(type(optimizer)).parameters
    return type(optimizer)(params, **{k: v for k, v in optimizer.defaults.items() if not filtered or k in names})


@pytest.mark.parametrize("by", ["signature", "defaults"])
@pytest.mark.parametrize("when", ["new", "pickled", "loaded", "attributes"])
@pytest.mark.parametrize("name", FUSED)
def test_built_anew_from_its_defaults(name, when, by):
    """Everything that the constructor takes is there, also after a load, and as the attributes were set since."""
    p, q = parameter(), parameter()
    given = dict(lr=3e-3, sgd_lr=0.2, betas=(0.5, 0.9), weight_decay=0.3, batch_size=4, maximize=True, capturable=True)
    optimizer = make(name, [p], **given, **({} if when == "attributes" else POLICY))
    if when == "pickled":
        optimizer = pickle.loads(pickle.dumps(optimizer))
    if when == "loaded":
        optimizer.load_state_dict(optimizer.state_dict())
    if when == "attributes":
        for key, value in POLICY.items():
            setattr(optimizer, key, value)
    again = rebuilt(optimizer, [q], by == "signature")
    assert optimizer.defaults.keys() == inspect.signature(FUSED[name]).parameters.keys() - {"params"}
    assert again.defaults == optimizer.defaults
    assert {key: getattr(again, key) for key in POLICY} == POLICY
    assert {key: again.param_groups[0][key] for key in given} == given
    again.step()
    grad, p = p.grad, optimizer.param_groups[0]["params"][0]
    p.grad = grad
    optimizer.step()
    assert torch.equal(p, q)


@pytest.mark.parametrize("name", FUSED)
def test_groups_and_checkpoints_hold_no_run_policy(name):
    """A checkpoint cannot flip what it does not hold; nor what it is made to hold."""
    optimizer, other = make(name, [parameter()], **POLICY), make(name, [parameter()])
    optimizer.step()
    saved = optimizer.state_dict()
    for group in (optimizer.param_groups[0], saved["param_groups"][0]):
        assert not group.keys() & POLICY.keys()
    saved["param_groups"][0].update(POLICY)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other.load_state_dict(saved)
    assert other.defaults == make(name, [parameter()]).defaults
    other.step()


def test_pickled_before_there_were_the_options():
    optimizer = make("AdaBayes", [parameter()], lean=True)
    state = optimizer.__getstate__()
    for key in POLICY:
        state["defaults"].pop(key)
    for key in ("max_grad_norm", "skip_nonfinite"):
        state.pop(key)
    state["defaults"]["differentiable"] = False
    state.pop("_known_sgd_lrs")
    old = AdaBayes.__new__(AdaBayes)
    old.__setstate__(state)
    assert old.defaults == make("AdaBayes", [parameter()], lean=True).defaults
    assert (old.lean, old.max_grad_norm, old.skip_nonfinite) == (True, None, False)
    old.step()


class _Distributed(torch.optim.Optimizer):
    """Horovod's way: a subclass made on the fly takes over another optimizer's groups, and nothing else."""

    def __init__(self, params):
        super(self.__class__, self).__init__(params)


def horovod(optimizer):
    cls = type(optimizer.__class__.__name__, (optimizer.__class__,), dict(_Distributed.__dict__))
    return cls(optimizer.param_groups)


@pytest.mark.parametrize("name", FUSED)
def test_built_anew_from_its_groups_alone(name):
    p, q = parameter(), parameter()
    optimizer, expected = (make(name, [x], lr=3e-3, sgd_lr=0.2, batch_size=4, betas=(0.5, 0.9)) for x in (p, q))
    again = horovod(optimizer)
    assert again.param_groups[0] is optimizer.param_groups[0]
    assert torch.equal(gone_on(again, p), gone_on(expected, q))
    assert again.defaults["batch_size"] == (4 if name == "AdaBayes" else None)


@pytest.mark.parametrize("name", FUSED)
def test_what_groups_do_not_hold_is_not_lost_silently(name):
    optimizer = make(name, [parameter()], **POLICY)
    with pytest.warns(UserWarning, match=r"an optimizer with .*lean=True.*\*\*optimizer.defaults") as found:
        horovod(optimizer)
    assert found[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = type(optimizer)(optimizer.param_groups, **optimizer.defaults)
        horovod(make(name, [parameter()]))
    assert {key: getattr(again, key) for key in POLICY} == POLICY


def test_batch_size_may_be_left_out_where_every_group_has_it():
    sizes = [torch.tensor(3.0), 4]
    optimizer = AdaBayes([{"params": [parameter(i)], "batch_size": size} for i, size in enumerate(sizes)])
    optimizer.step()
    with pytest.raises(TypeError, match="batch_size"):
        AdaBayes([{"params": [parameter()], "batch_size": 3}, {"params": [parameter(1)]}])
    with pytest.raises(TypeError, match="batch_size"):
        AdaBayes(parameter(i) for i in range(2))


def test_algorithms_have_no_option_that_is_not_tested():
    assert {algorithm.name for algorithm in ALGORITHMS} == FUSED.keys()
