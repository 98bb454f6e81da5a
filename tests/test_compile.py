"""``torch.compile`` of a step: one graph for any schedule, in place, with the bits of an eager step."""

import copy
import math
import re

import pytest
import torch
from runs import FUSED
from torch._dynamo.testing import CompileCounterWithBackend

from adabayes_fused.operators import look, step_

OPTIONS = {"AdaBayes": dict(batch_size=8), "AdaBayesFP": {}}


@pytest.fixture(autouse=True)
def _anew():
    torch.compiler.reset()


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(20, 300), torch.nn.Tanh(), torch.nn.Linear(300, 3), torch.nn.Linear(3, 1))


def make(name, model, lr=1e-2, **policy):
    matrices, biases = ([p for p in model.parameters() if (p.dim() > 1) == big] for big in (True, False))
    groups = [dict(params=matrices), dict(params=biases, weight_decay=0.0)]
    return FUSED[name](groups, lr=lr, **OPTIONS[name], **policy)


def backward(model, optimizer, t):
    generator = torch.Generator().manual_seed(t)
    optimizer.zero_grad()
    model(torch.randn(8, 20, generator=generator)).square().mean().backward()


def assert_same(model, optimizer, other, eager):
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
        assert optimizer.state[p].keys() == eager.state[q].keys()
        for name, value in eager.state[q].items():
            assert torch.equal(optimizer.state[p][name], value), name


@pytest.mark.parametrize("stored", [{}, dict(lean=True, state_dtype="8bit")], ids=["float32", "8bit"])
@pytest.mark.parametrize("schedule", ["scheduler", "by hand", "tensor"])
@pytest.mark.parametrize("name", FUSED)
def test_one_graph_for_twenty_steps_of_a_schedule(name, schedule, stored):
    model, other = network(), network()
    lr = torch.tensor(1e-2, dtype=torch.float64) if schedule == "tensor" else 1e-2
    policy = dict(max_grad_norm=0.5, **stored)
    optimizer, eager = make(name, model, lr, **policy), make(name, other, **policy)
    factors = [(t + 1) / 5 if t < 5 else 1 - t / 25 for t in range(21)]
    graphs = CompileCounterWithBackend("aot_eager")
    if schedule == "scheduler":
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: factors[t])
    step = torch.compile(lambda: optimizer.step(), backend=graphs)
    for t in range(20):
        for group in optimizer.param_groups:
            if schedule == "by hand":
                group["lr"] = 1e-2 * factors[t]
            elif schedule == "tensor":
                group["lr"].fill_(1e-2 * factors[t])
        for group in eager.param_groups:
            group["lr"] = 1e-2 * factors[t]
        backward(model, optimizer, t)
        backward(other, eager, t)
        step()
        if schedule == "scheduler":
            scheduler.step()
        eager.step()
    assert graphs.frame_count == 1
    assert_same(model, optimizer, other, eager)


@pytest.mark.parametrize("name", FUSED)
def test_a_training_step_takes_the_graphs_of_its_forward_and_of_its_step(name):
    model, other = network(), network()
    optimizer, eager = make(name, model), make(name, other)

    def train(t, model=model, optimizer=optimizer):
        loss = model(torch.full((8, 20), 0.1) * t).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(train, backend=graphs)
    for t in range(1, 21):
        compiled(torch.tensor(t))
        train(torch.tensor(t), other, eager)
        for group in (*optimizer.param_groups, *eager.param_groups):
            group["lr"] *= 0.9
    assert graphs.frame_count == 2  # backward is not traced by torch: torch.optim.AdamW takes two as well
    assert_same(model, optimizer, other, eager)


@pytest.mark.parametrize("name", FUSED)
def test_compiled_code_changes_state_in_place(name):
    """No clone, copy or buffer in what the compiler writes: the operator is called on parameters and state themselves."""
    from torch._inductor.utils import fresh_cache, run_and_get_code

    model = network()
    optimizer = make(name, model)
    backward(model, optimizer, 0)
    with fresh_cache():
        _, (code,) = run_and_get_code(torch.compile(lambda: optimizer.step()))
    body = code[code.index("def call(") : code.index("return ()")]
    assert body.count("torch.ops.adabayes_fused.step_") == 1
    assert not re.findall(r"clone|copy|empty_strided|cpp_fused|buf\d", body)


def test_state_that_is_replaced_between_steps_is_the_one_that_changes():
    model, other = network(), network()
    optimizer, eager = make("AdaBayes", model), make("AdaBayes", other)
    step = torch.compile(lambda: optimizer.step(), backend="aot_eager")
    saved = None
    for t in range(6):
        backward(model, optimizer, t)
        backward(other, eager, t)
        step()
        eager.step()
        if t == 1:
            saved = copy.deepcopy(eager.state_dict())
        if t == 3:  # back to the state after step 1, in tensors of its own
            optimizer.load_state_dict(saved)
            eager.load_state_dict(saved)
        if t == 4:
            for p, q in zip(model.parameters(), other.parameters(), strict=True):
                optimizer.state[p]["prior_var"] = optimizer.state[p]["prior_var"].double() * 0.5
                eager.state[q]["prior_var"] *= 0.5
    assert_same(model, optimizer, other, eager)


def test_missing_gradients_and_a_late_group():
    model, other = network(), network()
    late, late_too = (torch.nn.Parameter(torch.ones(5)) for _ in range(2))
    optimizer, eager = make("AdaBayesFP", model), make("AdaBayesFP", other)
    step = torch.compile(lambda: optimizer.step(), backend="aot_eager")
    for t in range(6):
        backward(model, optimizer, t)
        backward(other, eager, t)
        if t == 2:
            model[0].bias.grad = other[0].bias.grad = None
        if t == 4:
            optimizer.add_param_group(dict(params=[late], lr=1e-3))
            eager.add_param_group(dict(params=[late_too], lr=1e-3))
        if t >= 4:
            late.grad, late_too.grad = torch.ones(5), torch.ones(5)
        step()
        eager.step()
    assert_same(model, optimizer, other, eager)
    assert torch.equal(late, late_too)
    assert not torch.equal(late, torch.ones(5))


@pytest.mark.parametrize("policy", [dict(), dict(max_grad_norm=1.0, skip_nonfinite=True)])
def test_grad_scaler_with_a_compiled_step(policy):
    model, other = network(), network()
    optimizer, eager = make("AdaBayes", model, **policy), make("AdaBayes", other, **policy)
    step = torch.compile(lambda: optimizer.step(), backend="aot_eager")
    for t in range(5):
        for some, one, update in ((model, optimizer, step), (other, eager, eager.step)):
            backward(some, one, t)
            if t == 2:
                next(iter(some.parameters())).grad[0, 0] = math.inf
            one.grad_scale = torch.tensor([4.0 ** (t + 1)])
            one.found_inf = torch.tensor(float(t == 3))
            update()
            del one.grad_scale, one.found_inf
    assert int(optimizer.skipped_steps) == int(eager.skipped_steps) == 1 + len(policy) // 2
    if policy:  # else the inf has gone into the weights
        assert_same(model, optimizer, other, eager)


@pytest.mark.parametrize("inside", ["lr", "tensor lr", "batch_size", "groups", "parameters", "nothing"])
def test_what_a_compiled_function_writes_before_the_step_is_written_and_what_it_reads_after_is_there(inside):
    model, other = network(), network()
    optimizer, eager = (
        make("AdaBayes", m, torch.tensor(1e-2) if inside == "tensor lr" else 1e-2, max_grad_norm=0.5) for m in (model, other)
    )

    def train(optimizer, t):
        if inside == "lr":
            for group in optimizer.param_groups:
                group["lr"] = t * 1e-3
        if inside == "tensor lr":
            for group in optimizer.param_groups:
                group["lr"].mul_(0.7)
        if inside == "batch_size":
            optimizer.set_batch_size(t)
        optimizer.step()
        return optimizer.grad_norm

    compiled = torch.compile(train, backend="aot_eager")
    for t in range(1, 5):
        backward(model, optimizer, t)
        backward(other, eager, t)
        if inside == "groups":
            optimizer.param_groups.reverse()
            eager.param_groups.reverse()
        if inside == "parameters" and t == 3:
            for one in (optimizer, eager):
                one.param_groups[0]["params"] = one.param_groups[0]["params"][:1]
        assert torch.equal(compiled(optimizer, t), train(eager, t))
        assert_same(model, optimizer, other, eager)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_complex_parameters(backend):
    p, q = (torch.nn.Parameter(torch.full((5,), 1 + 2j)) for _ in range(2))
    real, real_too = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer, eager = (FUSED["AdaBayes"](params, batch_size=8) for params in ([p, real], [q, real_too]))
    step = torch.compile(optimizer.step, backend=backend)
    for _ in range(3):
        for one in (p, q, real, real_too):
            one.grad = one.detach() * 0.1
        step()
        eager.step()
    assert torch.equal(p, q)
    assert torch.equal(real, real_too)


def test_a_compiled_step_without_gradients_or_that_fails_is_an_eager_one():
    model = network()
    optimizer = make("AdaBayes", model, max_grad_norm=1.0, skip_nonfinite=True)
    step = torch.compile(optimizer.step, backend="aot_eager")
    backward(model, optimizer, 0)
    next(model.parameters()).grad[0, 0] = math.nan
    step()
    assert not optimizer.state
    optimizer.zero_grad()
    optimizer.param_groups[0]["lr"] = -1.0
    with pytest.raises(ValueError, match="Invalid learning rate: -1"):
        step()


def test_many_tensors_compile_in_seconds():
    """State is not in the graph: what is traced grows with the parameters alone."""
    params = [torch.nn.Parameter(torch.ones(4)) for _ in range(100)]
    optimizer = FUSED["AdaBayes"](params, batch_size=8)
    graphs = CompileCounterWithBackend("aot_eager")
    for p in params:
        p.grad = torch.ones(4)
    torch.compile(optimizer.step, backend=graphs)()
    (graph,) = graphs.graphs
    assert sum(node.op == "placeholder" for node in graph.graph.nodes) == 200


@pytest.mark.parametrize("name", FUSED)
def test_the_operator_is_what_it_says(name):
    """Schema, mutation marks and fake implementation, by torch's own check."""
    model = network()
    optimizer = make(name, model)
    backward(model, optimizer, 0)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    torch.library.opcheck(step_, ([p.detach() for p in params], [p.grad for p in params], look(optimizer)[1]))
