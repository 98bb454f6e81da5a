"""What a kernel may be given the address of: memory that holds the tensor's values, that is owned, and that nothing watches."""

import gc
import sys
import weakref

import numpy
import pytest
import torch
from runs import FUSED
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

from adabayes_fused import plain
from adabayes_fused.backends import native
from adabayes_fused.backends.launch import Launch

OPTIONS = {"AdaBayes": dict(batch_size=8), "AdaBayesFP": {}}
SIZES = [(), (1,), (1, 1), (5,), (3, 4), (70, 50)]


def make(name, params, backend="auto", **options):
    return FUSED[name](params, lr=1e-2, backend=backend, **OPTIONS[name] | options)


def updated(name, p, grad, backend, steps=2):
    """The weights after some steps, and the state, as plain values."""
    optimizer = make(name, [p], backend)
    for _ in range(steps):
        p.grad = grad
        optimizer.step()
    return p.detach().resolve_neg().resolve_conj().clone(), {k: v.clone() for k, v in optimizer.state[p].items()}


LAZY = {
    "negated": lambda t: torch._neg_view(-t),
    "an imaginary part": lambda t: torch.complex(torch.zeros_like(t), -t).conj().imag,
    "negated and transposed": lambda t: torch._neg_view(-t.t().contiguous()).t() if t.dim() == 2 else torch._neg_view(-t),
}


@pytest.mark.parametrize("which", ["gradient", "parameter"])
@pytest.mark.parametrize("how", LAZY)
@pytest.mark.parametrize("name", FUSED)
def test_lazily_negated_of_any_size(name, how, which, target):
    backend, device = target
    for size in SIZES:
        w, g = torch.randn(size, device=device), torch.randn(size, device=device)
        expected, state = updated(name, torch.nn.Parameter(w.clone()), g, backend)
        lazy = LAZY[how]
        p = torch.nn.Parameter(lazy(w) if which == "parameter" else w.clone())
        assert p.is_neg() == (which == "parameter")
        got, its = updated(name, p, lazy(g) if which == "gradient" else g, backend)
        assert torch.equal(got, expected), size
        assert all(torch.equal(its[key], value) for key, value in state.items()), size


@pytest.mark.parametrize("name", FUSED)
def test_lazily_conjugated_of_any_size(name, target):
    backend, device = target
    for size in SIZES:
        w, g = (torch.randn(size, dtype=torch.complex64, device=device) for _ in range(2))
        expected, _ = updated(name, torch.nn.Parameter(w.clone()), g, backend)
        for p, grad in ((w.clone(), g.conj_physical().conj()), (w.conj_physical().conj(), g)):
            assert p.is_conj() or grad.is_conj()
            got, _ = updated(name, torch.nn.Parameter(p), grad, backend)
            assert torch.equal(got, expected), size


@pytest.mark.parametrize("name", FUSED)
def test_a_gradient_that_turns_negated_where_it_lies(name):
    """The same addresses, step after step: what was plain in the last step need not be so in this one."""
    runs = []
    for backend in ("auto", "foreach"):
        params = [torch.nn.Parameter(torch.arange(1.0, 5.0)) for _ in range(3)]
        optimizer, memory = make(name, params, backend), [torch.ones(4) for _ in params]
        for t in range(6):
            for p, m in zip(params, memory, strict=True):
                p.grad = torch._neg_view(m) if t % 2 else m
            if t == 4:
                params[1].data = torch._neg_view(params[1].data)
            optimizer.step()
        runs.append([p.detach().resolve_neg() for p in params])
    assert all(torch.allclose(a, b, rtol=1e-6, atol=0) for a, b in zip(*runs, strict=True))


EMPTY = {
    "torch": lambda: torch.empty(2, 0),
    "numpy": lambda: torch.from_numpy(numpy.empty((2, 0), dtype=numpy.float32)),
    "stride 0": lambda: torch.empty(0).as_strided((3, 0), (0, 0)),
    "expanded": lambda: torch.empty(1, 0).expand(4, 0),
    "sliced": lambda: torch.ones(5, 3)[:, 3:],
    "transposed": lambda: torch.ones(0, 3).t(),
}


@pytest.mark.parametrize("how", EMPTY)
@pytest.mark.parametrize("name", FUSED)
def test_without_elements_strides_mean_nothing(name, how, target):
    backend, device = target
    p, other = torch.nn.Parameter(EMPTY[how]().to(device)), torch.nn.Parameter(torch.ones(3, device=device))
    optimizer = make(name, [p, other], backend)
    for grad in (torch.empty(p.shape, device=device), EMPTY[how]().to(device), torch.empty(p.shape, device=device)):
        p.grad, other.grad = grad, torch.ones(3, device=device)
        optimizer.step()
    assert float(optimizer.state[p]["step"]) == 3
    assert (other != 1).all()


@pytest.mark.parametrize("strides", [(7, 1), (0, 1), (99, 1)])
@pytest.mark.parametrize("name", FUSED)
def test_a_dimension_of_one_element_may_have_any_stride(name, strides, target):
    backend, device = target
    expected, _ = updated(name, torch.nn.Parameter(torch.ones(1, 5, device=device)), torch.ones(1, 5, device=device), backend)
    odd = torch.ones(5, device=device).as_strided((1, 5), strides)
    assert torch.equal(updated(name, torch.nn.Parameter(odd), torch.ones(1, 5, device=device), backend)[0], expected)
    odd = torch.ones(5, device=device).as_strided((1, 5), strides)
    assert torch.equal(updated(name, torch.nn.Parameter(torch.ones(1, 5, device=device)), odd, backend)[0], expected)


@pytest.mark.parametrize("backend", ["auto", "foreach"])
@pytest.mark.parametrize("name", FUSED)
def test_a_zero_tensor_for_a_gradient(name, backend):
    expected, _ = updated(name, torch.nn.Parameter(torch.ones(4)), torch.zeros(4), backend)
    assert torch.equal(updated(name, torch.nn.Parameter(torch.ones(4)), torch._efficientzerotensor(4), backend)[0], expected)


@pytest.mark.parametrize("options", [{}, dict(capturable=True), dict(max_grad_norm=1.0, skip_nonfinite=True)])
@pytest.mark.parametrize("backend", ["auto", "foreach"])
@pytest.mark.parametrize("name", FUSED)
def test_fake_tensors_are_stepped_without_values(name, backend, options):
    """As memory estimators do, and a real optimizer afterwards finds nothing of them."""
    with FakeTensorMode():
        model = torch.nn.Linear(4, 3)
        optimizer = make(name, model.parameters(), backend, **options)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.ones(2, 4)).sum().backward()
            optimizer.step()
        assert optimizer.state[model.weight]["exp_avg"].shape == (3, 4)
    updated(name, torch.nn.Parameter(torch.ones(3)), torch.ones(3), backend)


@pytest.mark.parametrize("backend", ["auto", "foreach"])
@pytest.mark.parametrize("name", FUSED)
def test_parameters_of_the_meta_device_beside_others(name, backend):
    with torch.device("meta"):
        model = torch.nn.Linear(4, 3)
    here = torch.nn.Parameter(torch.ones(3))
    optimizer = make(name, [*model.parameters(), here], backend)
    for _ in range(3):
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert [float(optimizer.state[p]["step"]) for p in optimizer.param_groups[0]["params"]] == [3.0] * 3
    assert optimizer.state[model.weight]["exp_avg"].is_meta
    alone = torch.nn.Parameter(torch.ones(3))
    expected, _ = updated(name, alone, torch.ones(3), backend, steps=3)
    assert torch.equal(here, expected)


@pytest.mark.parametrize("backend", ["auto", "foreach"])
@pytest.mark.parametrize("name", FUSED)
def test_a_traced_step_is_recorded(name, backend):
    """What traces the operations of a step sees them: a step that moved weights unseen would be lost in the trace."""
    from torch.fx.experimental.proxy_tensor import make_fx

    start = torch.randn(6)
    p = torch.nn.Parameter(start.clone())
    optimizer = make(name, [p], backend)
    p.grad = torch.ones(6)
    optimizer.step()
    before = p.detach().clone()

    def step(grad):
        p.grad = grad
        optimizer.step()
        return p.detach().clone()

    graph = make_fx(step)(torch.ones(6))
    assert sum(node.op == "call_function" for node in graph.graph.nodes) > 10
    assert not torch.equal(p, before)
    twin = torch.nn.Parameter(start.clone())
    expected, _ = updated(name, twin, torch.ones(6), backend, steps=2)
    torch.testing.assert_close(p.detach(), expected, rtol=1e-6, atol=1e-7)


class Seen(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count = getattr(self, "count", 0) + 1
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("name", FUSED)
def test_a_mode_sees_the_step_and_the_next_one_is_ordinary(name):
    p, q = (torch.nn.Parameter(torch.arange(1.0, 9.0)) for _ in range(2))
    watched, plainly = make(name, [p]), make(name, [q])
    for t in range(4):
        p.grad, q.grad = torch.ones(8), torch.ones(8)
        if t == 2:
            with Seen() as seen:
                watched.step()
            assert seen.count > 10
        else:
            watched.step()
        plainly.step()
    torch.testing.assert_close(p, q, rtol=1e-6, atol=0)
    assert float(watched.state[p]["step"]) == 4


def test_a_default_device_is_no_such_mode():
    with torch.device("cpu"):
        assert not plain.watched()
    with torch.overrides.TorchFunctionMode():
        assert plain.watched()
    assert not plain.watched()


class Offloaded(torch.nn.Parameter):
    """Keeps its gradient elsewhere, as fairscale's parameters on an SSD do."""

    @property
    def grad(self):
        return self.__dict__.get("elsewhere")

    @grad.setter
    def grad(self, value):
        self.__dict__["elsewhere"] = value


class Counted(torch.Tensor):
    """Has a say in each of its operations."""

    seen = 0

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        Counted.seen += 1
        return super().__torch_function__(function, types, args, kwargs or {})


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("name", FUSED)
def test_a_parameter_with_a_gradient_of_its_own_kind(name, first, target):
    backend, device = target
    params = [torch.nn.Parameter(torch.ones(3, device=device)), Offloaded(torch.ones(3, device=device))]
    optimizer = make(name, [params[first], params[1 - first]], backend)
    for _ in range(2):
        for p in params:
            p.grad = torch.ones(3, device=device)
        optimizer.step()
    assert torch.equal(*params)
    assert (params[0] != 1).all()


@pytest.mark.parametrize("name", FUSED)
def test_a_parameter_that_overrides_torch_functions_is_asked(name):
    p = torch.ones(3).as_subclass(Counted).requires_grad_()
    optimizer = make(name, [p])
    for _ in range(2):
        p.grad = torch.ones(3)
        before = Counted.seen
        optimizer.step()
    assert Counted.seen > before
    assert (p.detach().as_subclass(torch.Tensor) != 1).all()


@pytest.fixture
def processes():
    """Of torch.distributed, two that are pretended."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    torch.distributed.destroy_process_group()


def dtensor(part, mesh):
    """One of which ``part`` is the half that is here, wherever it lies."""
    meta = TensorMeta(torch.Size([2 * len(part)]), (1,), part.dtype)
    return DTensor(part, DTensorSpec(mesh, (Shard(0),), tensor_meta=meta), requires_grad=False)


@pytest.mark.parametrize("backend", ["auto", "foreach"])
@pytest.mark.parametrize("name", FUSED)
def test_dtensors_made_of_tensors_made_of_others(name, backend, processes):
    """As FSDP2 with float8 all-gathers has them: two tensors under one, neither of which has the memory of both."""
    mesh = DeviceMesh("cpu", torch.arange(2))
    p = torch.nn.Parameter(dtensor(TwoTensor(torch.ones(4), torch.full((4,), 2.0)), mesh))
    optimizer = make(name, [p], backend)
    for _ in range(2):
        p.grad = dtensor(torch.ones(4), mesh)
        optimizer.step()
    part = p._local_tensor
    expected, _ = updated(name, torch.nn.Parameter(torch.ones(4)), torch.ones(4), backend)
    torch.testing.assert_close(part.a, expected, rtol=1e-6, atol=0)
    assert not torch.equal(part.b, torch.full((4,), 2.0))


@pytest.mark.parametrize("backend", ["auto", "foreach"])
@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("name", FUSED)
def test_state_lies_where_the_part_does_and_not_where_the_mesh_is(name, lean, backend, processes):
    """FSDP2 with CPUOffloadPolicy: parts on the CPU, a mesh of GPUs, or here of another device."""
    mesh = DeviceMesh("meta", torch.arange(2), _init_backend=False)
    try:
        p = torch.nn.Parameter(dtensor(torch.ones(4), mesh))
    except RuntimeError as error:
        if "device_count" not in str(error):
            raise
        pytest.skip("this torch counts the devices of a mesh, and a mesh of another device than the part's cannot be made up")
    optimizer = make(name, [p], backend, lean=lean)
    for t in range(4):
        p.grad = dtensor(torch.ones(4), mesh)
        optimizer.step()
        if t == 1:
            optimizer.load_state_dict(optimizer.state_dict())
        entry = optimizer.state[p]
        assert all(entry[key].to_local().device.type == "cpu" for key in entry.keys() - {"step"})
    expected, _ = updated(name, torch.nn.Parameter(torch.ones(4)), torch.ones(4), backend, steps=4)
    assert torch.equal(p._local_tensor, expected)


@pytest.mark.parametrize("n", [5000, 30])  # the state of the small ones lies in a slab, here each in another
@pytest.mark.parametrize("what", ["weights", "its gradient", "exp_avg"])
@pytest.mark.parametrize("name", FUSED)
def test_memory_that_was_freed_is_refused(name, what, n, target):
    backend, device = target
    p, q = torch.nn.Parameter(torch.ones(5000, device=device)), torch.nn.Parameter(torch.ones(n, device=device))
    optimizer = make(name, [p, q], backend)
    for t in (p, q):
        t.grad = torch.ones_like(t)
    optimizer.step()
    before = p.detach().clone()
    freed = {"weights": q, "its gradient": q.grad, "exp_avg": optimizer.state[q]["exp_avg"]}[what]
    freed.untyped_storage().resize_(0)
    del freed
    with pytest.raises(RuntimeError, match=rf"parameter 1 of group 0, shape \({n},\), has {what} whose storage was freed"):
        optimizer.step()
    assert torch.equal(p, before)
    assert float(optimizer.state[p]["step"]) == 1


@pytest.mark.parametrize("name", FUSED)
def test_state_made_in_inference_mode_is_used_outside(name, target):
    backend, device = target
    p = torch.nn.Parameter(torch.ones(5, device=device))
    optimizer = make(name, [p], backend)
    for inside in (True, False, True, False):
        p.grad = torch.ones(5, device=device)
        with torch.inference_mode(inside):
            optimizer.step()
    expected, _ = updated(name, torch.nn.Parameter(torch.ones(5, device=device)), torch.ones(5, device=device), backend, steps=4)
    assert torch.equal(p, expected)
    with torch.inference_mode():
        optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    assert not any(t.is_inference() for t in optimizer.state[p].values())


@pytest.mark.parametrize("form", [torch.Tensor.double, torch.Tensor.bfloat16], ids=["double", "bfloat16"])
@pytest.mark.parametrize("name", FUSED)
def test_state_of_another_form_is_replaced_in_inference_mode_and_changed_outside(name, form, target):
    backend, device = target
    p = torch.nn.Parameter(torch.ones(3, device=device))
    p.grad = torch.ones_like(p)
    optimizer = make(name, [p], backend)
    optimizer.step()
    for slot, value in optimizer.state[p].items():
        optimizer.state[p][slot] = form(value)
    with torch.inference_mode():
        optimizer.step()
    for value in optimizer.state[p].values():
        value.mul_(1.0)
    optimizer.step()


@pytest.mark.parametrize("stepped", [False, True])
@pytest.mark.parametrize("backend", ["auto", "foreach"])
def test_a_parameter_made_in_inference_mode_is_refused_outside(backend, stepped):
    with torch.inference_mode():
        p = torch.ones(3)
    q = torch.nn.Parameter(torch.ones(3))
    p.grad, q.grad = torch.ones(3), torch.ones(3)
    optimizer = make("AdaBayesFP", [q, p], backend)
    with torch.inference_mode():
        for _ in range(stepped):  # it may be changed here
            optimizer.step()
    weights, counts = q.detach().clone(), [int(entry["step"]) for entry in optimizer.state.values()]
    with pytest.raises(RuntimeError, match="was made in inference mode"):
        optimizer.step()
    assert torch.equal(q, weights)
    assert [int(entry["step"]) for entry in optimizer.state.values()] == counts == [1, 1] * stepped


def test_a_kernel_is_given_no_foreign_address():
    fields = dict.fromkeys(("algorithm", "storage", "backend"))
    where = dict(device=torch.device("cpu"), param_dtype=torch.float32, grad_dtype=torch.float32)
    for t in (torch.empty(3, device="meta"), torch.empty(3)):
        if not t.is_meta:
            t.untyped_storage().resize_(0)
        with pytest.raises(RuntimeError, match=f"a kernel on cpu was to be given a tensor on {t.device}"):
            Launch(**fields, **where)._address(t)
    assert Launch(**fields, **where)._address(torch.empty(0)) == 0


@pytest.mark.skipif(native.module is None, reason="needs the compiled module")
@pytest.mark.parametrize("found", [True, False])
def test_the_compiled_module_and_python_agree_on_what_is_plain(found):
    """Whether or not it finds out, from samples, where torch keeps a tensor's keys."""
    samples = plain.samples() if found else []
    known = native.module.plain_tensors(samples, plain.PLAIN, plain.DEVICE_BITS, plain.is_plain)
    t = torch.randn(3, 4)
    with torch.inference_mode():
        of_inference = torch.ones(3)
    kinds = [t, torch.nn.Parameter(t), t[:, ::2], t.bfloat16()]
    kinds += [torch._neg_view(t), t.to(torch.complex64).conj(), t.to("meta")]
    kinds += [torch._efficientzerotensor(3), torch._to_functional_tensor(t), of_inference, t.to_sparse()]
    kinds += [torch.empty(0), t.to(int)]
    answers = [known.contains(kind) for kind in kinds]
    assert answers == [plain.is_plain(kind) for kind in kinds]
    assert answers == [True] * 4 + [False] * 7 + [True] * 2


# --- Who holds what -------------------------------------------------------------------------------------------------------


LEADS = {  # what somebody may have made of a tensor, through which its memory can be reached or replaced
    "a reference": lambda t: t,
    "a weak reference": weakref.ref,
    "a detached tensor": lambda t: t.data,
    "a view": lambda t: t[3:],
    "its storage": lambda t: t.untyped_storage(),
    "a weak reference to its storage": lambda t: weakref.ref(t.untyped_storage()),
    "an array": lambda t: t.numpy(),
    "a capsule": lambda t: t.__dlpack__(),
    "a tensor by DLPack": torch.from_dlpack,
    "a graph that saved it": lambda t: torch.ones_like(t).requires_grad_() * t,
    "an attribute": lambda t: setattr(t, "owner", LEADS),
}


@pytest.mark.parametrize("lead", LEADS)
def test_what_leads_to_a_tensors_memory_is_noticed(lead):
    """By the references, which the reader counts itself, or by ``alone``."""
    t = torch.ones(20_000)
    references = sys.getrefcount(t), weakref.getweakrefcount(t)
    assert plain.alone([t])
    held = LEADS[lead](t)
    assert not (plain.alone([t]) and (sys.getrefcount(t), weakref.getweakrefcount(t)) == references)
    del held
    vars(t).clear()
    assert plain.alone([t])
    assert (sys.getrefcount(t), weakref.getweakrefcount(t)) == references


@pytest.mark.parametrize("name", FUSED)
def test_modules_convert_by_swapping_tensors_after_a_step(name):
    model = torch.nn.Linear(3, 3)
    optimizer = make(name, model.parameters())
    for _ in range(3):
        model(torch.ones(2, 3)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.to(torch.float64)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    before = model.weight.detach().clone()
    model(torch.ones(2, 3, dtype=torch.float64)).sum().backward()
    optimizer.step()
    assert not torch.equal(model.weight, before)


@pytest.mark.parametrize("name", FUSED)
def test_a_model_that_reaches_its_optimizer_is_collected(name):
    model = torch.nn.Linear(3, 3)
    model.optimizer = make(name, model.parameters())
    model.register_forward_hook(lambda module, given, got, model=model: None)
    model(torch.ones(2, 3)).sum().backward()
    for _ in range(3):
        model.optimizer.step()
    alive = [weakref.ref(model), weakref.ref(model.weight), weakref.ref(model.optimizer)]
    del model
    gc.collect()
    assert not any(ref() for ref in alive)


@pytest.mark.parametrize("name", FUSED)
def test_a_parameter_that_was_taken_away_is_let_go_of(name):
    params = [torch.nn.Parameter(torch.ones(5)) for _ in range(3)]
    optimizer = make(name, params)
    for t in range(4):
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.ones(5)
        if t == 2:
            gone = params.pop()
            optimizer.param_groups[0]["params"] = list(params)
            del optimizer.state[gone]
            alive = weakref.ref(gone)
            del gone, p
            gc.collect()
            assert alive() is None
        optimizer.step()


@pytest.mark.parametrize("change", ["deleted", "replaced", "cleared"])
@pytest.mark.parametrize("name", FUSED)
def test_state_changed_while_its_parameter_has_no_gradient(name, change, target):
    """The step that would look at it finds no gradient there, and the next one must look."""
    backend, device = target
    runs = []
    for by in (backend, "foreach"):
        params = [torch.nn.Parameter(torch.zeros(3, device=device)) for _ in range(2)]
        optimizer = make(name, params, by)

        def step(*grads, params=params, optimizer=optimizer):
            for p, grad in zip(params, grads, strict=True):
                p.grad = None if grad is None else torch.full_like(p, grad)
            optimizer.step()

        for _ in range(3):
            step(1.0, 1.0)
        if change == "deleted":
            del optimizer.state[params[1]]
        elif change == "replaced":
            entry = {key: value.clone() + 1 for key, value in optimizer.state[params[1]].items()}
            optimizer.state[params[1]] = entry
            del entry
        else:
            optimizer.state.clear()
        step(1.0, None)
        step(1.0, -1.0)
        runs.append((params, optimizer))
    (params, optimizer), (others, other) = runs
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=0)
        assert optimizer.state[p].keys() == other.state[q].keys()
        assert optimizer.state[p]["step"] == other.state[q]["step"]
        assert torch.equal(optimizer.state[p]["exp_avg"], other.state[q]["exp_avg"])


def test_state_changed_by_who_held_it_in_the_step_before_and_lets_go(target):
    """The step that looks at the state while somebody holds it cannot know what they do with it afterwards."""
    backend, device = target
    runs = []
    for by in (backend, "foreach"):
        params = [torch.nn.Parameter(torch.zeros(3, device=device)) for _ in range(2)]
        optimizer = make("AdaBayes", params, by)
        for t in range(5):
            for p in params:
                p.grad = torch.full_like(p, 1.0 + t)
            held = optimizer.state if t == 2 else None
            optimizer.step()
            if held is not None:
                held[params[0]] = {key: value.clone() + 1 for key, value in held[params[0]].items()}
            del held
        runs.append((params, optimizer))
    (params, optimizer), (others, other) = runs
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)
        assert all(torch.equal(value, other.state[q][key]) for key, value in optimizer.state[p].items())


def test_slabs_let_go_of_are_not_written_to():
    """State of frozen parameters is thrown away, its memory goes to others, and the parameters train again."""
    params = [torch.nn.Parameter(torch.ones(16)) for _ in range(2000)]  # enough for slabs to be let go of
    optimizer = make("AdaBayesFP", params, "auto")

    def step(some):
        for p in params:
            p.grad = None
        for p in some:
            p.grad = torch.ones(16)
        optimizer.step()

    for _ in range(3):
        step(params)
    for p in params[10:]:
        del optimizer.state[p]
    step(params[:10])
    new = torch.nn.Parameter(torch.ones(16))
    optimizer.add_param_group({"params": [new]})
    step([*params[:10], new])
    step([*params[:10], new])
    others = [torch.full((1024,), 7.0) for _ in range(300)]
    step([*params, new])
    assert all((t == 7).all() for t in others)
    assert all(p in optimizer.state for p in params)


@pytest.mark.parametrize("container", [tuple, torch.nn.ParameterList, list])
@pytest.mark.parametrize("name", FUSED)
def test_a_groups_params_may_be_any_sequence(name, container, target):
    backend, device = target
    params = [torch.nn.Parameter(torch.ones(3, device=device)) for _ in range(2)]
    optimizer = make(name, params, backend)
    optimizer.param_groups[0]["params"] = container(params)
    for _ in range(2):
        for p in params:
            p.grad = torch.ones(3, device=device)
        optimizer.step()
        optimizer.zero_grad()
    assert all((p != 1).all() for p in params)


@pytest.mark.parametrize("beta", [0.0, 1e-3, 0.1, 0.4, 0.499, 0.5, 0.501, 0.9, 0.999, 0.99999])
@pytest.mark.parametrize("average", ["exp_avg", "exp_avg_sq"])
def test_an_average_is_right_for_every_beta(average, beta, target):
    """Against float64, for gradients that rise and fall a thousandfold: what is left of a small average is not cancelled."""
    backend, device = target
    p = torch.nn.Parameter(torch.zeros(3, device=device))
    optimizer = make("AdaBayesFP", [p], backend, betas=(beta, beta), sgd_lr=float("inf"))
    exact = 0.0
    for t in range(12):
        g = float(torch.tensor((1.0, 1e-3, 3e-2)[t % 3]))
        p.grad = torch.full_like(p, g)
        optimizer.step()
        exact = beta * exact + (1 - beta) * (g * g if average == "exp_avg_sq" else g)
        got = optimizer.state[p][average][0].item()
        assert got == pytest.approx(exact, rel=1e-6), t
