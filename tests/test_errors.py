"""Wrong input: an error that says what was given, what is allowed and what to do, and nothing half-updated."""

import copy
import math
import warnings

import pytest
import torch
from runs import FUSED, SLOW

from adabayes_fused import AdaBayes, AdaBayesFP, stepper

OPTIONS = {"AdaBayes": dict(batch_size=8), "AdaBayesFP": {}}
nan, inf = math.nan, math.inf

BAD = [
    ("AdaBayes", dict(lr=-1e-3), ValueError, r"Invalid learning rate: -0.001 \(allowed"),
    ("AdaBayes", dict(lr=nan), ValueError, "Invalid learning rate: nan"),
    ("AdaBayes", dict(lr=inf), ValueError, "Invalid learning rate: inf"),
    ("AdaBayes", dict(lr=0.0), ValueError, "scheduler start from 0"),
    ("AdaBayes", dict(lr="fast"), TypeError, "lr must be a number or a one-element tensor, given 'fast'"),
    ("AdaBayes", dict(lr=torch.ones(2)), ValueError, r"Tensor lr must be 1-element, given shape \(2,\)"),
    ("AdaBayes", dict(sgd_lr=0.0), ValueError, "Invalid sgd_lr: 0.0"),
    ("AdaBayes", dict(sgd_lr=-1.0), ValueError, "Invalid sgd_lr"),
    ("AdaBayes", dict(sgd_lr=nan), ValueError, "Invalid sgd_lr: nan"),
    ("AdaBayes", dict(sgd_lr=inf), ValueError, "AdaBayesFP takes inf"),
    ("AdaBayesFP", dict(sgd_lr=nan), ValueError, "inf is AdamW"),
    ("AdaBayes", dict(betas=(1.0, 0.999)), ValueError, "Invalid beta parameter at index 0: 1.0"),
    ("AdaBayes", dict(betas=(0.9, -0.1)), ValueError, "Invalid beta parameter at index 1: -0.1"),
    ("AdaBayes", dict(betas=(0.9, nan)), ValueError, "index 1: nan"),
    ("AdaBayes", dict(betas=0.9), ValueError, "two numbers"),
    ("AdaBayes", dict(betas=(0.9, torch.ones(2))), ValueError, r"Tensor betas\[1\] must be 1-element"),
    ("AdaBayes", dict(weight_decay=-1.0), ValueError, "Invalid weight_decay value: -1.0"),
    ("AdaBayes", dict(weight_decay=nan), ValueError, "Invalid weight_decay value: nan"),
    ("AdaBayesFP", dict(eps=-1e-8), ValueError, "Invalid epsilon value: -1e-08"),
    ("AdaBayesFP", dict(eps=nan), ValueError, "Invalid epsilon value: nan"),
    ("AdaBayes", dict(batch_size=0), ValueError, r"Invalid batch_size: 0 \(allowed: a number >= 1"),
    ("AdaBayes", dict(batch_size=0.5), ValueError, "Invalid batch_size: 0.5"),
    ("AdaBayes", dict(batch_size=nan), ValueError, "Invalid batch_size: nan"),
    ("AdaBayes", dict(batch_size=None), ValueError, "micro-batch x accumulation x processes"),
    ("AdaBayesFP", dict(batch_size=0), ValueError, "Invalid batch_size: 0"),
    ("AdaBayes", dict(batch_size=True), TypeError, "given True"),
    ("AdaBayes", dict(transition="linear"), ValueError, r"Invalid transition: 'linear' \(allowed: 'paper', 'exact'\)"),
    ("AdaBayes", dict(variance_follows_lr="yes"), TypeError, "variance_follows_lr"),
    ("AdaBayes", dict(batch_size=200_000), ValueError, 'kappa.*transition="exact"'),
    ("AdaBayes", dict(maximize="no"), TypeError, "maximize"),
]
BAD_POLICY = [
    ("AdaBayes", dict(backend="metal"), ValueError, "Invalid backend: 'metal' .allowed: 'auto', 'cpp'"),
    ("AdaBayesFP", dict(lean=1), TypeError, "lean"),
    ("AdaBayesFP", dict(fused_unscale=None), TypeError, "fused_unscale"),
    ("AdaBayes", dict(weight_decya=0.5), TypeError, "weight_decya"),
    ("AdaBayes", dict(eps=1e-8), TypeError, "eps"),
]


def parameter(*shape):
    p = torch.nn.Parameter(torch.randn(*shape))
    p.grad = torch.randn_like(p)
    return p


@pytest.mark.parametrize(("name", "options", "error", "words"), BAD + BAD_POLICY)
def test_constructor(name, options, error, words):
    with pytest.raises(error, match=words):
        FUSED[name]([parameter(3)], **OPTIONS[name] | options)


@pytest.mark.parametrize(("name", "options", "error", "words"), BAD)
def test_slow_path_constructor(name, options, error, words):
    with pytest.raises(error, match=words):
        SLOW[name]([parameter(3)], **OPTIONS[name] | options)


@pytest.mark.parametrize(("name", "options", "error", "words"), BAD)
def test_parameter_group(name, options, error, words):
    optimizer = FUSED[name]([parameter(3)], **OPTIONS[name])
    with pytest.raises(error, match=words):
        optimizer.add_param_group(dict(params=[parameter(4)], **options))
    assert len(optimizer.param_groups) == 1


def test_batch_size_is_required():
    with pytest.raises(TypeError, match="batch_size"):
        AdaBayes([parameter(3)])


@pytest.mark.parametrize("option", ["lean", "backend", "fused_unscale", "max_grad_norm", "skip_nonfinite"])
def test_an_option_of_the_whole_optimizer_in_a_group(option):
    with pytest.raises(ValueError, match=f"{option} is an option of the whole optimizer, not of a parameter group"):
        FUSED["AdaBayesFP"]([{"params": [torch.nn.Parameter(torch.ones(2))], option: "other"}])


def test_memory_that_runs_out_while_state_is_made(monkeypatch):
    params = [torch.nn.Parameter(torch.ones(2)) for _ in range(3)]
    optimizer = FUSED["AdaBayes"](params, batch_size=8)
    for p in params:
        p.grad = torch.ones(2)
    make = stepper.new_state

    def new_state(algorithm, lean, p, *others):
        if p is params[1]:
            raise torch.cuda.OutOfMemoryError("no memory")
        return make(algorithm, lean, p, *others)

    monkeypatch.setattr(stepper, "new_state", new_state)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        optimizer.step()
    assert not any(optimizer.state[p] for p in params)
    monkeypatch.undo()
    optimizer.step()
    assert [float(optimizer.state[p]["step"]) for p in params] == [1.0, 1.0, 1.0]


def unchanged_by(optimizer, error, words):
    """step() raises, and weights, state and step counts are as before."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    weights = [p.detach().clone() for p in params]
    state = copy.deepcopy([dict(optimizer.state.get(p, {})) for p in params])
    with pytest.raises(error, match=words):
        optimizer.step()
    assert all(torch.equal(p, w) for p, w in zip(params, weights, strict=True))
    for p, entry in zip(params, state, strict=True):
        now = optimizer.state.get(p, {})
        assert now.keys() == entry.keys()
        assert all(torch.equal(now[key], value) for key, value in entry.items())


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("backend", ["auto", "foreach"])
@pytest.mark.parametrize("name", FUSED)
def test_sparse_gradient(name, backend, begun):
    dense, embedding, last = parameter(5), torch.nn.Embedding(10, 4, sparse=True), parameter(7)
    optimizer = FUSED[name]([dict(params=[dense]), dict(params=[last, embedding.weight])], backend=backend, **OPTIONS[name])
    if begun:
        optimizer.step()
    embedding(torch.tensor([1, 2])).sum().backward()
    unchanged_by(optimizer, RuntimeError, r"parameter 1 of group 1, shape \(10, 4\), has a sparse gradient.*SparseAdam")


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (dict(lr=1.0), ValueError, 'kappa = lr \\* batch_size / r = 1 \\* 128 / 100 = 1.28 is above 1.*transition="exact"'),
        (dict(lr=nan), ValueError, "Invalid learning rate: nan"),
        (dict(batch_size=0), ValueError, "Invalid batch_size: 0"),
        (dict(betas=(0.9, 1.0)), ValueError, "index 1: 1.0"),
    ],
)
def test_option_that_went_wrong_between_steps(change, error, words, begun):
    first, second = parameter(5), parameter(6)
    optimizer = AdaBayes([dict(params=[first]), dict(params=[second])], batch_size=128)
    if begun:
        optimizer.step()
    optimizer.param_groups[1].update(change)
    unchanged_by(optimizer, error, words)


def test_exact_transition_is_stable_for_any_kappa():
    p = parameter(50)
    optimizer = AdaBayes([p], lr=1.0, sgd_lr=0.1, batch_size=1e6, transition="exact")
    for _ in range(20):
        optimizer.step()
    assert p.isfinite().all()
    assert 0 < optimizer.state[p]["prior_var"].min() <= optimizer.state[p]["prior_var"].max() <= 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="here there is a GPU")
def test_backend_that_cannot_run_here():
    optimizer = AdaBayesFP([parameter(3)], backend="cuda")
    unchanged_by(optimizer, RuntimeError, "backend='cuda' cannot run on cpu: .*backend='auto'")


def test_parameters_no_kernel_takes():
    shared = torch.randn(1, 5).expand(4, 5).requires_grad_()
    shared.grad = torch.randn(4, 5)
    unchanged_by(AdaBayesFP([parameter(3), shared]), RuntimeError, r"parameter 1 of group 0, shape \(4, 5\), is an expanded view")
    small = torch.nn.Parameter(torch.randn(4).to(torch.float8_e5m2))
    small.grad = torch.randn(4).to(torch.float8_e5m2)
    unchanged_by(AdaBayesFP([small]), TypeError, "float8_e5m2.*allowed: torch.float32")


def test_a_launch_that_fails_leaves_no_state(monkeypatch):
    from adabayes_fused.backends import foreach

    def refuse(launches, copies):
        raise RuntimeError("out of memory, say")

    monkeypatch.setattr(foreach, "prepare", refuse)
    unchanged_by(AdaBayesFP([parameter(3)], backend="foreach"), RuntimeError, "out of memory")


@pytest.mark.parametrize("backend", ["foreach", "triton"])
def test_a_launch_that_fails_is_not_counted(backend, monkeypatch):
    """Only the launch itself tells that the driver has no kernel for the device, say."""
    from adabayes_fused.backends import foreach, triton

    if triton.unavailable(torch.device("cpu")) and backend == "triton":
        pytest.skip("Triton's interpreter is not here")

    def fail(*args, **kwargs):
        raise RuntimeError("no kernel image")

    p = parameter(3)
    optimizer = AdaBayesFP([p], backend=backend)
    optimizer.step()
    if backend == "foreach":
        monkeypatch.setattr(foreach, "RULES", dict.fromkeys(foreach.RULES, fail))
    else:
        from adabayes_fused.triton_kernels import multi_tensor

        monkeypatch.setattr(multi_tensor, "multi_tensor", {(1,): fail})
    unchanged_by(optimizer, RuntimeError, "no kernel image")


def test_foreach_in_place_of_a_kernel_is_said_once(monkeypatch):
    from adabayes_fused import backends
    from adabayes_fused.backends import native

    caches = (backends.choose, backends.warn_of_foreach)
    monkeypatch.setattr(native, "module", None)
    monkeypatch.setattr(native, "missing", "the compiled extension is not there; install a compiler")
    for cache in caches:
        cache.cache_clear()
    try:
        optimizer = AdaBayesFP([parameter(3)])
        words = "are updated by the slow backend 'foreach'.*cpp: the compiled extension is not there; install a compiler"
        with pytest.warns(UserWarning, match=words) as found:
            optimizer.step()
        assert found[0].filename == __file__
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer.step()
            AdaBayesFP([parameter(3)]).step()
            AdaBayesFP([parameter(3)], backend="foreach").step()
    finally:
        for cache in caches:
            cache.cache_clear()


@pytest.mark.parametrize("name", FUSED)
def test_state_of_another_optimizer_or_model(name):
    p = parameter(4, 3)
    optimizer = FUSED[name]([p], **OPTIONS[name])
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    adamw = torch.optim.AdamW([parameter(4, 3)])
    adamw.step()
    other = {"AdaBayes": "AdaBayesFP", "AdaBayesFP": "AdaBayes"}[name]
    sibling = FUSED[other]([parameter(4, 3)], **OPTIONS[other])
    sibling.step()
    larger = FUSED[name]([parameter(4, 4)], **OPTIONS[name])
    larger.step()
    several = FUSED[name]([parameter(4, 3), parameter(2)], **OPTIONS[name])
    half = copy.deepcopy(before)
    del half["state"][0]["exp_avg"]
    for bad, words in [
        (adamw.state_dict(), f"not of {name}.*lacks r .*; load_adam_state_dict takes over"),
        (sibling.state_dict(), f"not of {name}.*(lacks|has)"),
        (larger.state_dict(), r"exp_avg of parameter 0 has shape \(4, 4\), the parameter \(4, 3\)"),
        (several.state_dict(), "doesn't match the size"),
        (half, "the state of parameter 0 lacks exp_avg"),
    ]:
        with pytest.raises(ValueError, match=words):
            optimizer.load_state_dict(bad)
        after = optimizer.state_dict()
        assert after["param_groups"] == before["param_groups"]
        assert all(torch.equal(after["state"][0][key], value) for key, value in before["state"][0].items())
    assert not optimizer._optimizer_load_state_dict_pre_hooks
    assert not optimizer._optimizer_load_state_dict_post_hooks


@pytest.mark.parametrize("backend", ["auto", "foreach"])
def test_resized_parameter(backend):
    """A state, or a gradient, of another shape is never swept over."""
    p = parameter(20, 3)
    optimizer = AdaBayes([parameter(4), p], batch_size=8, backend=backend)
    optimizer.step()
    p.grad = None
    p.data = torch.zeros(4000, 3)
    p.grad = torch.ones_like(p)
    unchanged_by(optimizer, RuntimeError, r"parameter 1 of group 0, shape \(4000, 3\), has exp_avg of shape \(20, 3\)")
    p = parameter(20, 3)
    optimizer = AdaBayes([p], batch_size=8, backend=backend)
    optimizer.step()
    optimizer.state[p]["prior_var"] = torch.ones(2, 3)
    unchanged_by(optimizer, RuntimeError, r"has prior_var of shape \(2, 3\)")
    del optimizer.state[p]["prior_var"]
    unchanged_by(optimizer, RuntimeError, "lacks prior_var in its state")


def test_gradients_that_do_not_fit():
    for dtype, grad_dtype in ((torch.complex64, torch.float32), (torch.float32, torch.complex64), (torch.float32, torch.int32)):
        p = torch.nn.Parameter(torch.zeros(3, dtype=dtype))
        p.grad_dtype = None
        p.grad = torch.ones(3, dtype=grad_dtype)
        unchanged_by(AdaBayesFP([p]), TypeError, "allowed: both floating, or both complex")


@pytest.mark.parametrize("wrong", ["lr", "step", "seed", "slot"])
def test_a_bad_checkpoint_changes_nothing(wrong):
    p = parameter(5)
    optimizer = AdaBayesFP([p], state_dtype="bfloat16")
    optimizer.step()
    bad = copy.deepcopy(optimizer.state_dict())
    if wrong == "lr":
        bad["param_groups"][0]["lr"] = -1.0
    else:
        bad["state"][0]["exp_avg" if wrong == "slot" else wrong] = torch.zeros(2) if wrong == "step" else "nothing"
    state, group = copy.deepcopy(optimizer.state[p]), dict(optimizer.param_groups[0])
    with pytest.raises(ValueError, match="-1.0|must be"):
        optimizer.load_state_dict(bad)
    assert optimizer.param_groups[0] == group
    assert all(torch.equal(optimizer.state[p][key], value) for key, value in state.items())
    optimizer.step()


def test_unknown_instruction_set(monkeypatch):
    monkeypatch.setenv("ADABAYES_FUSED_ISA", "mmx")
    optimizer = AdaBayesFP([parameter(3)], backend="cpp")
    unchanged_by(optimizer, ValueError, "ADABAYES_FUSED_ISA=mmx .allowed here: .*baseline")
