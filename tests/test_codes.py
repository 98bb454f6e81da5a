"""State and weights in codes: each against its definition, the same bits everywhere, unbiased, resumed and resharded exactly."""

import contextlib
import copy
import io
import itertools
import math
import pickle
import warnings
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from processes import FORKED
from runs import FUSED, SHAPES
from torch import nn

from adabayes_fused import codes, diagnostics, posterior
from adabayes_fused.sharding import place_of

OPTIONS = {"AdaBayes": dict(batch_size=8), "AdaBayesFP": {}}
STORAGES = [
    dict(state_dtype=state, lean=lean, weight_rounding=weights)
    for state, lean, weights in itertools.product(codes.STATE_DTYPES, (True, False), codes.WEIGHT_ROUNDINGS)
    if (state, weights) != ("float32", "nearest") and (lean or state != "8bit")
]
PRESETS = [s for s in STORAGES if s["lean"] and s["weight_rounding"] == "nearest"]


def named(storage):
    return "-".join((storage["state_dtype"], "lean" if storage["lean"] else "full", storage["weight_rounding"]))


each_storage = pytest.mark.parametrize("storage", STORAGES, ids=named)
each_preset = pytest.mark.parametrize("storage", PRESETS, ids=named)
each_name = pytest.mark.parametrize("name", FUSED)


# --- Codes ------------------------------------------------------------------------------------------------------------


def eight_an_octave(lowest, n):
    """The first n values of a code of three bits of mantissa, from a power of two on."""
    return torch.tensor([lowest * 2.0 ** (k // 8) * (1 + k % 8 / 8) for k in range(n)])


def test_u8_holds_variances():
    values = codes.decode_u8(torch.arange(256, dtype=torch.uint8))
    assert torch.equal(values[:255], eight_an_octave(2.0**-30, 255))
    assert values[254] == 3.5
    assert values[255].isnan()


@pytest.mark.parametrize("exponent", [-3, 0, 13])
def test_m8_holds_a_sign_and_units_of_the_learning_rate(exponent):
    values = codes.decode_m8(torch.arange(256, dtype=torch.uint8), torch.tensor(exponent))
    expected = (eight_an_octave(2.0**-10, 127) - 2.0**-10) * 2.0**-exponent
    assert torch.equal(values[:127], expected)
    assert torch.equal(values[128:255], -expected)
    assert values[0] == 0
    assert values[127].isnan()
    assert values[255].isnan()
    assert expected[1] == 2.0**-13 * 2.0**-exponent


ENCODERS = {
    "bfloat16": (lambda x, r: codes.encode_bfloat16(x, r).float(), 16, torch.tensor([1.0, -3.14159, 1e-30, 6e4, -1e-3])),
    "u8": (lambda x, r: codes.decode_u8(codes.encode_u8(x, r)), 20, torch.tensor([1.0, 0.7, 2.0**-30, 3.4, 1e-6, 0.999])),
    "m8": (
        lambda x, r: codes.decode_m8(codes.encode_m8(x, r, torch.tensor(2)), torch.tensor(2)),
        20,
        torch.tensor([0.0, 1e-5, -1e-5, 0.3, -13.0, 2.0**-15]),
    ),
}


@pytest.mark.parametrize("code", ENCODERS)
def test_rounding_is_unbiased(code):
    """The mean over every random number there is, is the value, but for the bits that a float32 has below the code's last."""
    encode, bits, values = ENCODERS[code]
    random = (torch.arange(1 << bits, dtype=torch.int64) << 32 - bits).to(torch.int32)
    for x in values:
        mean = encode(x.expand(len(random)).contiguous(), random).double().mean()
        added = 2.0**-36 if code == "m8" else 0.0  # half an ulp of the 2^-10 that is added, in this unit
        assert abs(mean - x) <= 2.0 ** -(bits + 1) * abs(x) + added, (x, mean)


@pytest.mark.parametrize("code", ENCODERS)
def test_what_was_decoded_encodes_to_itself(code):
    """So that a step with a learning rate of 0 changes nothing, whatever the random numbers."""
    encode, _, values = ENCODERS[code]
    for random in (0, -1, 0x12345678):
        random = torch.full_like(values, random, dtype=torch.int32)
        once = encode(values, random)
        for other in (0, -1, 0x12345678):
            assert torch.equal(encode(once, torch.full_like(random, other)), once)


@pytest.mark.parametrize("code", ENCODERS)
def test_what_is_not_finite_shows(code):
    """NaN stays NaN; an infinity, which makes the weights NaN at once, is the largest there is."""
    for random in (0, -1):
        odd = torch.tensor([math.nan, -math.nan, math.inf, -math.inf])
        found = ENCODERS[code][0](odd, torch.full((4,), random, dtype=torch.int32))
        assert found[:2].isnan().all()
        largest = {"bfloat16": [math.inf, -math.inf], "u8": [3.5, 2.0**-30], "m8": [(56 - 2.0**-10) / 4, -(56 - 2.0**-10) / 4]}
        assert found[2:].tolist() == largest[code]


def some_floats(n=100_000):
    bits = torch.randint(-(2**31), 2**31, (n,)).to(torch.int32)
    return torch.cat([bits.view(torch.float32), torch.tensor([0.0, -0.0, 3.4028234e38, -3.4028234e38, 1e-45])])


def test_a_bfloat16_and_16_bits_are_a_float32():
    x = some_floats()
    high, low = codes.parted(x)
    joined = codes.joined(high, low.to(torch.int16))
    finite = x.isfinite()
    assert torch.equal(joined[finite].view(torch.int32), x[finite].view(torch.int32))
    assert torch.equal(joined[~finite].isnan(), x[~finite].isnan())
    small = finite & (x.abs() < 3e38)
    assert ((high[small].double() - x[small].double()).abs() <= (x[small].bfloat16().double() - x[small].double()).abs()).all()


def test_a_bfloat16_and_8_bits_are_rounded_unbiased():
    random = (torch.arange(256, dtype=torch.int64) << 24).to(torch.int32)
    for x in some_floats(200):
        if not x.isfinite() or x.abs() > 3e38 or x.abs() < 1e-30:
            continue
        high, low = codes.parted24(x.expand(256).contiguous(), random)
        low = (low >> 8).to(torch.int8)
        joined = codes.joined(high, low.to(torch.int32) * 256)
        assert abs(joined.double().mean() - x) <= 2.0**-24 * abs(x)


def test_random_numbers_are_what_the_formula_gives():
    """lowbias32 in Python's integers; neighbours and steps have nothing in common."""

    def mix(x):
        x = (x ^ x >> 16) * 0x7FEB352D % 2**32
        x = (x ^ x >> 15) * 0x846CA68B % 2**32
        return x ^ x >> 16

    seed, count, at = 0x123456789ABCDEF0, 6, torch.arange(1000, dtype=torch.int32)
    key = mix((mix(seed % 2**32) + count + 1) % 2**32)
    found = codes.word(at + codes.key(torch.tensor(seed), torch.tensor(float(count))), 1)
    assert (found.long() & 0xFFFFFFFF).tolist() == [mix((key + i + 0x9E3779B9) % 2**32) for i in range(1000)]
    places, keys = torch.arange(1 << 16, dtype=torch.int32), [codes.key(torch.tensor(5), torch.tensor(t)) for t in (1, 2)]
    words = [codes.word(places + key, j) for key in keys for j in (0, 1)]
    draws = [codes._upper(half, 16).double() for word in words for half in (word, codes.turned(word))]
    assert torch.corrcoef(torch.stack(draws)).fill_diagonal_(0.0).abs().max() < 0.02
    for draw in draws:
        assert abs(draw.mean() / 2**16 - 0.5) < 0.005


# --- A step -----------------------------------------------------------------------------------------------------------


def make(name, storage, device="cpu", backend="auto", shapes=SHAPES, dtypes=(torch.float32, torch.bfloat16), **options):
    generator = torch.Generator().manual_seed(1)
    params = [
        nn.Parameter(torch.randn(shape, generator=generator).to(dtype).to(device)) for dtype in dtypes for shape in shapes
    ]
    options = dict(lr=1e-2, weight_decay=0.1, seed=7, backend=backend, **OPTIONS[name]) | storage | options
    return FUSED[name](params, **options), params


def steps(optimizer, params, count, start=0):
    for t in range(start, start + count):
        generator = torch.Generator().manual_seed(100 + t)
        for i, p in enumerate(params):
            grad = torch.randn(p.shape, generator=generator) * 10.0 ** (i % 4 - 3)
            p.grad = None if (t + i) % 5 == 0 else grad.to(p.dtype).to(p.device)
        optimizer.step()


def bits_of(optimizer, params):
    """Weights and state as integers, on the CPU."""
    found = []
    for p in params:
        for t in (p.detach(), *optimizer.state[p].values()):
            t = getattr(t, "_local_tensor", t).cpu()
            found.append(t.contiguous().reshape(-1).view(torch.uint8))
    return found


def same(a, b):
    assert len(a) == len(b)
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@each_storage
@each_name
def test_every_backend_gives_the_same_bits(name, storage, target, interpreted):
    backend, device = target
    few = dict(shapes=SHAPES[:3] if interpreted else SHAPES)
    (optimizer, params), (judge, others) = make(name, storage, device, backend, **few), make(name, storage, **few)
    for one in ((optimizer, params), (judge, others)):
        steps(*one, 3 if interpreted else 12)
    if backend == "foreach" and name == "AdaBayesFP" and device.type == "cpu":  # whose roots torch does not round correctly
        for p, q in zip(params, others, strict=True):
            torch.testing.assert_close(p, q)
            assert {k: v.dtype for k, v in optimizer.state[p].items()} == {k: v.dtype for k, v in judge.state[q].items()}
        return
    assert same(bits_of(optimizer, params), bits_of(judge, others))


@each_storage
@each_name
def test_threads_and_layouts_change_nothing(name, storage):
    found = []
    for threads, backend in ((1, "auto"), (2, "auto"), (7, "auto"), (1, "foreach")):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            optimizer, params = make(name, storage, backend=backend, shapes=[(5, 7, 3, 3), (200_000,), (3,), (4, 2, 3, 3)])
            for p in params:
                if p.dim() == 4:
                    p.data = p.data.contiguous(memory_format=torch.channels_last)
            steps(optimizer, params, 3)
        finally:
            torch.set_num_threads(before)
        if backend == "auto" or name == "AdaBayes":  # whose roots torch rounds correctly
            found.append(bits_of(optimizer, params))
    assert all(same(found[0], other) for other in found[1:])


@each_name
def test_32bit_weights_train_as_float32(name):
    """Exactly, on the same gradients."""
    storage = dict(state_dtype="float32", lean=True, weight_rounding="32bit")
    optimizer, params = make(name, storage, dtypes=[torch.bfloat16])
    judge, others = make(name, dict(lean=True), dtypes=[torch.float32])
    with torch.no_grad():
        for p, q in zip(params, others, strict=True):
            q.copy_(p)
    for _ in range(20):
        for p, q in zip(params, others, strict=True):
            p.grad = (torch.randn(p.shape) * 0.1).bfloat16()
            q.grad = p.grad.float()
        optimizer.step()
        judge.step()
    for p, q in zip(params, others, strict=True):
        assert torch.equal(codes.joined(p.detach(), optimizer.state[p]["correction"]), q)


@each_storage
@each_name
def test_a_step_of_no_learning_rate_and_a_skipped_one_change_nothing(name, storage):
    optimizer, params = make(name, storage, skip_nonfinite=True)
    steps(optimizer, params, 4)
    before = bits_of(optimizer, params)
    for p in params:
        p.grad = torch.full_like(p, math.nan)
    optimizer.step()
    assert same(bits_of(optimizer, params), before)
    weights = [p.detach().clone() for p in params]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    steps(optimizer, params, 3)
    assert all(torch.equal(p, w) for p, w in zip(params, weights, strict=True))


@each_preset
@each_name
def test_clipping_and_a_scaler_work(name, storage):
    """As float32's, within what the codes resolve."""
    found = []
    for kind in (storage, dict(lean=True)):
        optimizer, params = make(name, kind, shapes=[(1000,)], dtypes=[torch.float32], max_grad_norm=1.0)
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(0.0)
        steps(optimizer, params, 5)
        found.append(params[0].detach())
    torch.testing.assert_close(*found, rtol=0.0, atol=0.02)


# --- The seed and the place ---------------------------------------------------------------------------------------------


@each_preset
def test_parameters_seeds_and_steps_have_random_numbers_of_their_own(storage):
    def rounded(seed=7, copies=1):
        params = [nn.Parameter(torch.ones(4000)) for _ in range(copies)]
        optimizer = FUSED["AdaBayes"](params, lr=1e-2, batch_size=8, seed=seed, **storage)
        found = []
        for _ in range(2):
            for p in params:
                p.grad = torch.full((4000,), 0.1)
            optimizer.step()
            found.append([optimizer.state[p]["prior_var"].float().clone() for p in params])
        return found

    (first,), (second,) = rounded()
    assert len(first.unique()) == 2  # to the one or the other
    assert not torch.equal(first.sort().values, first)
    one, two = rounded(copies=2)[0]
    assert torch.equal(one, first)
    assert not torch.equal(one, two)
    assert not torch.equal(rounded(seed=8)[0][0], first)
    assert not torch.equal((first == first.max()), (second == second.max()))


@contextlib.contextmanager
def process(rank, world):
    """As far as torch.distributed knows, one of so many; nobody answers."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def placements(kind):
    from torch.distributed.tensor import Replicate, Shard

    return {
        "rows": ((3,), [Shard(0)]),
        "columns": ((3,), [Shard(1)]),
        "replicas of rows": ((2, 2), [Replicate(), Shard(0)]),
        "rows and columns": ((2, 2), [Shard(0), Shard(1)]),
        "rows of rows": ((2, 2), [Shard(0), Shard(0)]),
        "last": ((2,), [Shard(2)]),
    }[kind]


SHARDED = [STORAGES[0], *PRESETS]


def shards_of(kind, rank, world):
    """In one process of a mesh: what differs from the part of a run on whole tensors, and how many elements there were."""
    from torch.distributed.tensor import DTensor, distribute_tensor, init_device_mesh

    mesh_shape, placed = placements(kind)
    shapes = [(5, 7, 4), (8, 6, 2), (2, 3, 3)] if kind == "last" else [(10, 9), (6, 8), (1, 5)]
    kinds = dict(shapes=shapes, dtypes=[torch.bfloat16])
    differ, checked = [], 0
    with process(rank, world):
        mesh = init_device_mesh("cpu", mesh_shape)

        def part(t):
            return distribute_tensor(t.detach().clone(), mesh, placed, src_data_rank=None)

        for storage, backend in itertools.product(SHARDED, ("auto", "foreach")):
            judge, others = make("AdaBayes", storage, **kinds)
            optimizer, params = make("AdaBayes", storage, backend=backend, **kinds)
            shards = [nn.Parameter(part(p)) for p in params]
            optimizer.param_groups[0]["params"] = shards
            for t in range(4):
                steps(judge, others, 1, t)
                for shard, q in zip(shards, others, strict=True):
                    shard.grad = None if q.grad is None else part(q.grad)
                optimizer.step()
            for shard, q in zip(shards, others, strict=True):
                for key, value in (("weights", q.detach()), *judge.state[q].items()):
                    found = shard.detach() if key == "weights" else optimizer.state[shard][key]
                    if isinstance(found, DTensor) != (value.dim() > 0):
                        differ.append(f"{key} is a {type(found)}")
                    expected = part(value).to_local() if value.dim() else value
                    if not torch.equal(getattr(found, "_local_tensor", found), expected):
                        differ.append(f"{key} of {tuple(q.shape)}, {named(storage)}, {backend}, process {rank}")
                    checked += expected.numel()
    return differ, checked


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
@pytest.mark.parametrize("kind", ["rows", "columns", "replicas of rows", "rows and columns", "rows of rows", "last"])
def test_shards_are_rounded_as_the_whole(kind):
    """Even, uneven and empty ones. Each in a Python of its own: torch remembers what it was told of a mesh."""
    world = math.prod(placements(kind)[0])
    with ProcessPoolExecutor(world, FORKED) as pool:
        for differ, checked in pool.map(shards_of, [kind] * world, range(world), [world] * world):
            assert not differ
            assert checked


def lies_evenly(places):
    """Whether elements at these places are runs of one length at one distance."""
    after_first = (places.diff() != 1).nonzero()
    run = int(after_first[0]) + 1 if len(after_first) else len(places)
    stride = int(places[run] - places[0]) if run < len(places) else 0
    return torch.equal(codes.places(0, len(places), (int(places[0]), run, stride), places.device), places)


def wrong_places(rank):
    """As this process of several meshes: splits whose elements have other places than they should, or are refused although they
    lie evenly; how many were right, and how many refused."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh
    from torch.distributed.tensor.placement_types import _StridedShard

    wrong, right, refused = [], 0, 0
    for mesh_shape in [(3,), (2, 2), (2, 3), (2, 2, 2)]:
        if rank >= math.prod(mesh_shape):
            continue
        with process(rank, math.prod(mesh_shape)):
            mesh = init_device_mesh("cpu", mesh_shape)
            for shape in [(7,), (8, 3), (4, 2, 6), (2, 3, 2, 5), (6, 2, 1, 4)]:
                places = torch.arange(math.prod(shape), dtype=torch.int32).view(shape)
                splits = [Replicate(), *map(Shard, range(len(shape))), _StridedShard(0, split_factor=2)]
                for placed in itertools.product(splits, repeat=len(mesh_shape)):
                    part = distribute_tensor(places, mesh, placed, src_data_rank=None)
                    local = part.to_local().reshape(-1)
                    try:
                        place = place_of(part._spec)
                    except ValueError:
                        refused += 1
                        if lies_evenly(local) and not any(hasattr(at, "split_factor") for at in placed):
                            wrong.append((mesh_shape, shape, placed, "refused"))
                        continue
                    if torch.equal(codes.places(0, len(local), place, local.device), local):
                        right += 1
                    else:
                        wrong.append((mesh_shape, shape, placed, local.tolist()))
    return wrong, right, refused


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
@pytest.mark.parametrize("rank", [0, 1, 3, 7])
def test_every_split_has_its_elements_places_or_is_refused(rank):
    with ProcessPoolExecutor(1, FORKED) as pool:
        wrong, right, refused = pool.submit(wrong_places, rank).result()
    assert not wrong
    assert right > 100
    assert refused > 10


# --- Checkpoints --------------------------------------------------------------------------------------------------------


def saved_and_loaded(how, optimizer, fresh):
    if how == "state_dict":
        fresh.load_state_dict(optimizer.state_dict())
    elif how == "weights_only":
        buffer = io.BytesIO()
        torch.save(optimizer.state_dict(), buffer)
        buffer.seek(0)
        fresh.load_state_dict(torch.load(buffer, weights_only=True))
    return fresh


@pytest.mark.parametrize("how", ["state_dict", "weights_only"])
@each_storage
@each_name
def test_a_checkpoint_goes_on_exactly(name, storage, how):
    optimizer, params = make(name, storage)
    steps(optimizer, params, 5)
    fresh, others = make(name, storage, seed=99)
    with torch.no_grad():
        for p, q in zip(params, others, strict=True):
            q.copy_(p)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        saved_and_loaded(how, optimizer, fresh)
    assert same(bits_of(optimizer, params), bits_of(fresh, others))
    steps(optimizer, params, 4, 5)
    steps(fresh, others, 4, 5)
    assert same(bits_of(optimizer, params), bits_of(fresh, others))


@pytest.mark.parametrize("how", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
@each_storage
def test_a_copy_goes_on_exactly(storage, how):
    optimizer, params = make("AdaBayes", storage)
    steps(optimizer, params, 3)
    fresh, others = how((optimizer, params))
    steps(optimizer, params, 3, 3)
    steps(fresh, others, 3, 3)
    assert same(bits_of(optimizer, params), bits_of(fresh, others))


@each_preset
@each_name
def test_state_of_another_kind_is_converted_with_one_warning(name, storage):
    """Float32 state into codes and back again: the values, to the nearest; weights go on."""
    wide = dict(lean=True)
    only = dict(dtypes=[torch.float32])
    (optimizer, params), (coded, _), (back, _) = make(name, wide, **only), make(name, storage, **only), make(name, wide, **only)
    steps(optimizer, params, 6)
    with pytest.warns(UserWarning, match="float32 became") as found:
        coded.load_state_dict(optimizer.state_dict())
    assert [w.filename for w in found] == [__file__]
    with pytest.warns(UserWarning, match="became torch.float32") as found:
        back.load_state_dict(coded.state_dict())
    assert [w.filename for w in found] == [__file__]
    slots = optimizer.algorithm.slots[:2]
    for p, q, r in zip(*(o.param_groups[0]["params"] for o in (optimizer, coded, back)), strict=True):
        values = codes.decoded([coded.state[q][s] for s in slots], codes.unit_of(coded.state[q]["seed"]))
        for slot, value in zip(slots, values, strict=True):
            exact = optimizer.state[p][slot]
            assert torch.equal(value, back.state[r][slot])
            resolution = 2.0**-8 if coded.state[q][slot].dtype == torch.bfloat16 else 2.0**-4
            assert ((value - exact).abs() <= resolution * exact.abs() + 2.0**-10).all()


@each_preset
def test_state_from_adam_is_taken_up(storage):
    optimizer, params = make("AdaBayes", storage, dtypes=[torch.float32])
    adam = torch.optim.AdamW([p.detach().clone().requires_grad_() for p in params], lr=1e-2)
    for p in adam.param_groups[0]["params"]:
        p.grad = torch.randn_like(p)
    adam.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.load_adam_state_dict(adam.state_dict())
    steps(optimizer, params, 2)
    assert all(p.isfinite().all() for p in params)


@each_preset
@each_name
def test_variances_are_read_from_codes(name, storage):
    options = dict(shapes=[(2000,)], dtypes=[torch.float32], batch_size=8)
    (optimizer, params), (judge, others) = (make(name, kind, **options) for kind in (storage, dict(lean=True)))
    for one in ((optimizer, params), (judge, others)):
        steps(*one, 6)
    found, expected = (posterior(o, ps[0]).variance.log() for o, ps in ((optimizer, params), (judge, others)))
    assert abs((found - expected).mean()) < 0.05
    assert (found - expected).abs().max() < 1.5
    diagnostics(optimizer)


# --- Options ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(state_dtype="int8"), "Invalid state_dtype: 'int8' .allowed: 'float32', 'bfloat16', '8bit'"),
        (dict(weight_rounding="up"), "Invalid weight_rounding: 'up' .allowed: 'nearest', 'stochastic', '24bit', '32bit'"),
        (dict(state_dtype="8bit"), "give lean=True"),
        (dict(seed=-1), "Invalid seed: -1"),
        (dict(seed=0.5), "Invalid seed: 0.5"),
    ],
)
@each_name
def test_what_is_no_option_is_refused(name, options, words):
    with pytest.raises(ValueError, match=words):
        make(name, options)


@pytest.mark.parametrize(
    ("dtype", "storage", "words"),
    [
        (torch.float64, dict(state_dtype="bfloat16"), "is of torch.float64: state_dtype='bfloat16' is for"),
        (torch.complex64, dict(state_dtype="8bit", lean=True), "is of torch.complex64: state_dtype='8bit' is for"),
        (torch.float16, dict(weight_rounding="24bit"), "is of torch.float16: weight_rounding='24bit' is for bfloat16"),
    ],
)
@each_name
def test_what_cannot_be_stored_so_is_refused_by_name(name, dtype, storage, words):
    optimizer, params = make(name, storage, shapes=[(3,)], dtypes=[dtype])
    params[0].grad = torch.ones_like(params[0])
    with pytest.raises(TypeError, match=f"parameter 0 of group 0, shape .3,., {words}"):
        optimizer.step()
    assert not optimizer.state.get(params[0])


@each_name
def test_an_option_that_is_changed_takes_the_state_along(name):
    """``optimizer.state_dtype = ...`` between steps: the state is converted where the next step finds it."""
    optimizer, params = make(name, dict(lean=True), dtypes=[torch.float32])
    judge, others = make(name, dict(lean=True), dtypes=[torch.float32])
    for one in ((optimizer, params), (judge, others)):
        steps(*one, 6)
    optimizer.state_dtype = "bfloat16"
    for one in ((optimizer, params), (judge, others)):
        steps(*one, 2, 6)
    for p, q in zip(params, others, strict=True):
        assert optimizer.state[p]["exp_avg"].dtype == torch.bfloat16
        torch.testing.assert_close(p, q, rtol=0.0, atol=1e-2)


# --- Unbiased over time -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("state_dtype", "bound"), [("bfloat16", 0.01), ("8bit", 0.03)])
def test_the_filter_has_no_bias(state_dtype, bound):
    """After five times its memory, beside float64; rounded to nearest it is off."""
    pytest.importorskip("psutil")
    from bench.precision import follow

    rows = [row for row in follow(1e-3) if row["kind"] == "gaussian" and row["who"].startswith(f"AdaBayes {state_dtype}")]
    bias = {row["who"]: abs(row["second_bias"]) for row in rows}
    assert bias[f"AdaBayes {state_dtype}"] <= bound
    assert bias[f"AdaBayes {state_dtype}, to nearest"] > bound
