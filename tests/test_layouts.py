"""Any dense layout of parameter and gradient, matching or not, any dtype of either: right, never refused, never misread."""

import itertools

import pytest
import torch
from runs import FUSED

OPTIONS = {"AdaBayes": dict(batch_size=8), "AdaBayesFP": {}}
SHAPE = (4, 6, 5, 3)


def contiguous(x):
    return x.contiguous()


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


def transposed(x):
    return x.transpose(0, 2).contiguous().transpose(0, 2)


def sliced(x):
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), 7.0, dtype=x.dtype, device=x.device)
    wide[..., ::2] = x
    return wide[..., ::2]


def every_other(x):
    tall = torch.full((2 * x.shape[0], *x.shape[1:]), 7.0, dtype=x.dtype, device=x.device)
    tall[::2] = x
    return tall[::2]


def offset(x):
    """Contiguous, at an address that no wide access may use."""
    flat = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)[1:]
    return flat.copy_(x.reshape(-1)).view(x.shape)


def size_one_strides(x):
    return x.contiguous().as_strided((*x.shape, 1), (*x.contiguous().stride(), 17))[..., 0]


LAYOUTS = {f.__name__: f for f in (contiguous, channels_last, transposed, sliced, offset, size_one_strides)}


def two_steps(name, start, grads, backend, layout=contiguous, grad_layout=contiguous, **policy):
    p = torch.nn.Parameter(layout(start.clone()))
    optimizer = FUSED[name]([p], lr=1e-2, backend=backend, **OPTIONS[name], **policy)
    for grad in grads:
        p.grad = None
        grad = grad_layout(grad)
        if grad.dtype != p.dtype:
            p.grad_dtype = grad.dtype
        p.grad = grad
        optimizer.step()
        assert p.grad is grad
    return p, optimizer


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize(("layout", "grad_layout"), list(itertools.product(LAYOUTS, LAYOUTS)))
def test_layouts(name, layout, grad_layout, target, interpreted):
    if interpreted and layout != grad_layout and "contiguous" not in (layout, grad_layout):
        pytest.skip("interpreted: fewer pairs")
    backend, device = target
    start, grads = torch.randn(SHAPE, device=device), [torch.randn(SHAPE, device=device) for _ in range(2)]
    expected, expected_optimizer = two_steps(name, start, grads, backend)
    p, optimizer = two_steps(name, start, grads, backend, LAYOUTS[layout], LAYOUTS[grad_layout])
    assert torch.equal(p, expected)
    for slot, value in expected_optimizer.state[expected].items():
        assert torch.equal(optimizer.state[p][slot], value), slot


@pytest.mark.parametrize("name", FUSED)
def test_expanded_and_negated_gradients(name, target):
    backend, device = target
    for lazy in (
        torch.randn(1, 5, device=device).expand(6, 5),
        torch.randn((), device=device).expand(6, 5),
        torch.randn(6, 5, dtype=torch.complex64, device=device).conj().imag,
        torch.randn(6, 5, dtype=torch.complex64, device=device)[:1, :1].conj().imag,
    ):
        start = torch.randn(lazy.shape, device=device)
        expected, _ = two_steps(name, start, [lazy.clone().contiguous()] * 2, backend)
        p, _ = two_steps(name, start, [lazy] * 2, backend, grad_layout=lambda g: g)
        assert torch.equal(p, expected)


def test_gap_between_a_sliced_parameters_elements_is_not_touched(target):
    backend, device = target
    whole = torch.zeros(6, 10, device=device)
    p = whole[:, ::2].requires_grad_()
    p.grad = torch.ones(6, 5, device=device)
    FUSED["AdaBayesFP"]([p], backend=backend).step()
    assert (whole[:, 1::2] == 0).all()
    assert (whole[:, ::2] != 0).all()


@pytest.mark.parametrize(("gapped", "shape"), [(sliced, SHAPE), (every_other, SHAPE), (sliced, (*SHAPE, *(1,) * 13))])
@pytest.mark.parametrize("kept", ["state and gradient", "state"])
def test_state_put_in_place_with_the_parameters_own_gaps(kept, gapped, shape, target):
    """Alike in shape and strides, and yet a sweep over their memory would take the gaps for elements."""
    backend, device = target
    start, grads = torch.randn(shape, device=device), [torch.randn(shape, device=device) for _ in range(2)]
    expected, _ = two_steps("AdaBayes", start, grads, backend)
    p, optimizer = two_steps("AdaBayes", start, grads[:1], backend, gapped)
    p.grad = gapped(grads[1]) if kept == "state and gradient" else grads[1]
    state = optimizer.state[p]
    given = {slot: gapped(state[slot]) for slot in optimizer.algorithm.slots}
    state.update(given)
    optimizer.step()
    assert torch.equal(p, expected)
    to_gap = p.stride()[-1] // 2 or p.stride()[0] // 2
    for t in (p.detach(), p.grad, *given.values()):
        if t.stride() == p.stride():
            assert (t.as_strided(shape, p.stride(), t.storage_offset() + to_gap) == 7.0).all()


DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@pytest.mark.parametrize(("dtype", "grad_dtype"), list(itertools.product(DTYPES, (*DTYPES, torch.float8_e4m3fn))), ids=str)
@pytest.mark.parametrize("name", FUSED)
def test_gradients_of_any_dtype(name, dtype, grad_dtype, target):
    """As if the gradient had been widened, exactly, to what the kernel computes in."""
    if dtype == grad_dtype:
        pytest.skip("every other test's case")
    backend, device = target
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    start = torch.randn(37, 41, device=device).to(dtype)
    grads = [torch.randn(37, 41, device=device).to(grad_dtype) for _ in range(2)]
    p, optimizer = two_steps(name, start, grads, backend)
    expected, _ = two_steps(name, start, [g.to(wide) for g in grads], "foreach")
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-12, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(p, expected, rtol=tolerance, atol=tolerance)
    assert all(v.dtype == wide for k, v in optimizer.state[p].items() if k != "step")


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
@pytest.mark.parametrize("name", FUSED)
def test_complex_is_a_pair_of_reals(name, dtype, target):
    backend, device = target
    start, grads = (
        torch.randn(11, 3, dtype=dtype, device=device),
        [torch.randn(11, 3, dtype=dtype, device=device) for _ in range(2)],
    )
    p, optimizer = two_steps(name, start, grads, backend)
    expected, other = two_steps(name, torch.view_as_real(start), [torch.view_as_real(g) for g in grads], backend)
    assert torch.equal(torch.view_as_real(p.detach()), expected)
    assert all(torch.equal(torch.view_as_real(optimizer.state[p][k]), v) for k, v in other.state[expected].items() if k != "step")
    conjugate, _ = two_steps(name, start, [g.conj().resolve_conj() for g in grads], backend)
    lazy, _ = two_steps(name, start, [g.conj() for g in grads], backend, grad_layout=lambda g: g)
    assert torch.equal(lazy, conjugate)


def test_many_tensors_of_many_kinds_in_one_group(target, interpreted):
    """Empty, 0-dim, tiny and ragged ones of every dtype together: as each alone."""
    backend, device = target
    shapes = [(0,), (), (1,), (3,), (0, 5), (65,), (1025,), (2, 0)] * (1 if interpreted else 40)
    starts = [torch.randn(shape, device=device).to(DTYPES[i % 4]) for i, shape in enumerate(shapes)]
    grads = [torch.randn_like(start) for start in starts]
    params = [torch.nn.Parameter(start.clone()) for start in starts]
    optimizer = FUSED["AdaBayes"](params, batch_size=2, backend=backend)
    for p, grad in zip(params, grads, strict=True):
        p.grad = grad
    optimizer.step()
    for p, start, grad in zip(params, starts, grads, strict=True):
        alone, _ = two_steps("AdaBayes", start, [], backend)
        alone.grad = grad
        FUSED["AdaBayes"]([alone], batch_size=2, backend=backend).step()
        assert torch.equal(p, alone)
        assert optimizer.state[p]["step"] == 1
