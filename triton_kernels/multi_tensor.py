"""One launch over a table of addresses (csrc/table.h): each program updates one chunk of one tensor.

The rule comes in as a constexpr function; everything that changes between steps is data, so a new learning rate or a
new list of tensors compiles nothing.
"""

import os

import triton
import triton.language as tl

from . import codes

ROW_WORDS = tl.constexpr(14)
COEFFICIENTS = tl.constexpr(8)
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """Rounds to the nearest even of ``dtype``, as GPUs convert; Triton's interpreter truncates bfloat16."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = tl.where(x == x, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, 0x7FC0)
        x = rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def widen(x, dtype: tl.constexpr):
    """To a wider ``dtype``, as GPUs convert; Triton's interpreter takes a subnormal bfloat16 for another number."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        x = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def _pointer(row, word: tl.constexpr, dtype: tl.constexpr, begin, ALIGNED: tl.constexpr):
    pointer = tl.load(row + word).to(tl.pointer_type(dtype)) + begin
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def _load_codes(pointer, offsets, left, FULL: tl.constexpr, EVICT: tl.constexpr):
    if FULL:
        return tl.load(pointer + offsets, eviction_policy=EVICT)
    else:
        return tl.load(pointer + offsets, mask=offsets < left, other=0, eviction_policy=EVICT)


@triton.jit
def _load(pointer, offsets, left, dtype: tl.constexpr, FULL: tl.constexpr, EVICT: tl.constexpr):
    return widen(_load_codes(pointer, offsets, left, FULL, EVICT), dtype)


@triton.jit
def _chunk(rows, chunks, CHUNK: tl.constexpr):
    """The program's row, the first element of its chunk, and how many are left from there on."""
    entry = tl.load(chunks + tl.program_id(0))
    row = rows + (entry >> 32) * ROW_WORDS
    begin = (entry & 0xFFFFFFFF) * CHUNK
    return row, begin, tl.load(row + 6) - begin


@triton.jit
def _store(pointer, offsets, left, value, FULL: tl.constexpr, EVICT: tl.constexpr):
    _store_codes(pointer, offsets, left, narrow(value, pointer.dtype.element_ty), FULL, EVICT)


@triton.jit
def _store_codes(pointer, offsets, left, value, FULL: tl.constexpr, EVICT: tl.constexpr):
    if FULL:
        tl.store(pointer + offsets, value, eviction_policy=EVICT)
    else:
        tl.store(pointer + offsets, value, mask=offsets < left, eviction_policy=EVICT)


@triton.jit
def _load_state(
    pointers, i, left, unit, READS: tl.constexpr, STATE: tl.constexpr, CODE: tl.constexpr, FULL: tl.constexpr, EVICT: tl.constexpr
):
    if CODE == 2:
        second = _load_codes(pointers[1], i, left, FULL, EVICT)
        slot1 = codes.decode_u8(second) if second.dtype == tl.uint8 else widen(second, STATE)
        slot0 = codes.decode_m8(_load_codes(pointers[0], i, left, FULL, EVICT), codes.scale(second, unit))
    else:
        slot0 = _load(pointers[0], i, left, STATE, FULL, EVICT)
        slot1 = _load(pointers[1], i, left, STATE, FULL, EVICT)
    slot2 = _load(pointers[2], i, left, STATE, FULL, EVICT) if READS > 2 else tl.zeros_like(slot0)
    return slot0, slot1, slot2


@triton.jit
def _store_state(
    pointers, i, left, slots, at, unit, SLOTS: tl.constexpr, CODE: tl.constexpr, FULL: tl.constexpr, EVICT: tl.constexpr
):
    slot0, slot1, slot2, slot3 = slots
    if CODE > 0:
        random = codes.word(at, 0)
        if pointers[1].dtype.element_ty == tl.uint8:
            slot1 = codes.encode_u8(slot1, random)
        else:
            slot1 = codes.encode_bfloat16(slot1, random)
        if CODE == 2:
            slot0 = codes.encode_m8(slot0, codes.turned(random), codes.scale(slot1, unit))
        else:
            slot0 = codes.encode_bfloat16(slot0, codes.turned(random))
        if SLOTS > 2:
            slot2 = codes.encode_bfloat16(slot2, codes.turned(codes.word(at, 1)))
        if SLOTS > 3:
            slot3 = codes.encode_bfloat16(slot3, codes.turned(codes.word(at, 2)))
    _store_codes(pointers[0], i, left, slot0, FULL, EVICT)
    _store_codes(pointers[1], i, left, slot1, FULL, EVICT)
    if SLOTS > 2:
        _store_codes(pointers[2], i, left, slot2, FULL, EVICT)
    if SLOTS > 3:
        _store_codes(pointers[3], i, left, slot3, FULL, EVICT)


@triton.jit
def _load_weights(pointer, low, i, left, STATE: tl.constexpr, WEIGHT: tl.constexpr, FULL: tl.constexpr, EVICT: tl.constexpr):
    if WEIGHT > 1:
        correction = _load(low, i, left, tl.int32, FULL, EVICT) * (256 if WEIGHT == 2 else 1)
        return codes.joined(_load_codes(pointer, i, left, FULL, EVICT), correction)
    else:
        return _load(pointer, i, left, STATE, FULL, EVICT)


@triton.jit
def _store_weights(pointer, low, i, left, value, at, WEIGHT: tl.constexpr, FULL: tl.constexpr, EVICT: tl.constexpr):
    if WEIGHT == 0:
        _store(pointer, i, left, value, FULL, EVICT)
    elif WEIGHT == 1:
        _store_codes(pointer, i, left, codes.encode_bfloat16(value, codes.word(at, 1)), FULL, EVICT)
    else:
        if WEIGHT == 2:
            high, correction = codes.parted24(value, codes.word(at, 1))
            correction = (correction >> 8).to(tl.int8)
        else:
            high, correction = codes.parted(value)
            correction = correction.to(tl.int16)
        _store_codes(pointer, i, left, high, FULL, EVICT)
        _store_codes(low, i, left, correction, FULL, EVICT)


@triton.jit
def _update_chunk(
    row,
    c,
    start_key,
    unit,
    begin,
    left,
    RULE: tl.constexpr,
    READS: tl.constexpr,
    SLOTS: tl.constexpr,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    STATE: tl.constexpr,
    STORED: tl.constexpr,
    CODE: tl.constexpr,
    WEIGHT: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    EVICT: tl.constexpr,
    FAR: tl.constexpr,
    FULL: tl.constexpr,
):
    param_ptr = _pointer(row, 0, PARAM, begin, FULL)
    grad_ptr = _pointer(row, 1, GRAD, begin, FULL)
    low_ptr = _pointer(row, 9, tl.int8 if WEIGHT == 2 else tl.int16, begin, FULL)
    pointers = (
        _pointer(row, 2, STORED[0], begin, FULL),
        _pointer(row, 3, STORED[1], begin, FULL),
        _pointer(row, 4, STORED[0], begin, FULL),
        _pointer(row, 5, STORED[0], begin, FULL),
    )
    for start in range(0, CHUNK, BLOCK):
        i = start + tl.arange(0, BLOCK)
        grad = _load(grad_ptr, i, left, STATE, FULL, EVICT)
        param = _load_weights(param_ptr, low_ptr, i, left, STATE, WEIGHT, FULL, EVICT)
        slot0, slot1, slot2 = _load_state(pointers, i, left, unit, READS, STATE, CODE, FULL, EVICT)
        param, slot0, slot1, slot2, slot3 = RULE(c, grad, param, slot0, slot1, slot2, tl.zeros_like(param), FAR)
        at = start_key + _places(row, begin, i, CODE, WEIGHT)
        _store_weights(param_ptr, low_ptr, i, left, param, at, WEIGHT, FULL, EVICT)
        _store_state(pointers, i, left, (slot0, slot1, slot2, slot3), at, unit, SLOTS, CODE, FULL, EVICT)


@triton.jit
def _places(row, begin, i, CODE: tl.constexpr, WEIGHT: tl.constexpr):
    """Where elements lie in the whole tensor, modulo 2**32, but for where it begins."""
    places = begin.to(tl.uint32) + i.to(tl.uint32)
    if CODE > 0 or WEIGHT > 0:
        run = tl.load(row + 12)
        if run < tl.load(row + 6):
            e = begin + i
            places = (e // run * tl.load(row + 13) + e % run).to(tl.uint32)
    return places


@triton.jit
def _power(base, exponent):
    """By repeated squaring, as in ``csrc/dispatch.h``."""
    result = base * 0.0 + 1.0
    while exponent > 0:
        result = tl.where((exponent & 1) != 0, result * base, result)
        base = base * base
        exponent = exponent >> 1
    return result


@triton.jit
def _coefficient(numbers, i: tl.constexpr, exponent, decision, DECIDED: tl.constexpr, CORRECTED: tl.constexpr):
    """The i-th of a group's coefficients at step ``exponent``; bits of CORRECTED tell which of them are for an average that began
    at zero."""
    value = tl.load(numbers + i)
    if DECIDED and i == 0:
        value = value * tl.load(decision)
    if (CORRECTED >> i) & 1:
        value = value / (1.0 - _power(tl.load(numbers + COEFFICIENTS + i), exponent))
    return value


@triton.jit
def _count_step(rows, chunks, tickets, CHUNK: tl.constexpr):
    """Raises the step count once all programs of its tensor have read it: the last to ask does so."""
    tl.debug_barrier()  # this program has
    at = tl.load(chunks + tl.program_id(0)) >> 32
    blocks = tl.cdiv(tl.load(rows + at * ROW_WORDS + 6), CHUNK)
    before = blocks - 1
    if blocks > 1:
        before = tl.atomic_add(tickets + at, 1)
    if before == blocks - 1:
        if blocks > 1:
            tl.store(tickets + at, 0)
        step = tl.load(rows + at * ROW_WORDS + 8).to(tl.pointer_type(tl.float32))
        tl.store(step, tl.load(step) + 1.0)


@triton.jit
def multi_tensor(
    rows,
    chunks,
    tickets,
    numbers,
    decision,
    RULE: tl.constexpr,
    CORRECTED: tl.constexpr,
    READS: tl.constexpr,
    SLOTS: tl.constexpr,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    STATE: tl.constexpr,
    STORED: tl.constexpr,
    CODE: tl.constexpr,
    WEIGHT: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    EVICT: tl.constexpr,
    DECIDED: tl.constexpr,
    FAR: tl.constexpr,
):
    """``tickets``: one word a row, zero between launches; ``decision``: factor, norm and skip (csrc/decision.h), where DECIDED
    on the device. FAR: some average moves far."""
    row, begin, left = _chunk(rows, chunks, CHUNK)
    if DECIDED:
        left = tl.where(tl.load(decision + 2) != 0, 0, left)
    addresses = tl.load(row) | tl.load(row + 1) | tl.load(row + 2) | tl.load(row + 3) | tl.load(row + 4) | tl.load(row + 5)
    addresses |= tl.load(row + 9)
    wide = (left >= CHUNK) & (addresses % 16 == 0)
    k = numbers + tl.load(row + 7) * 2 * COEFFICIENTS
    t = tl.load(tl.load(row + 8).to(tl.pointer_type(tl.float32))).to(tl.int32) + 1
    c = (
        _coefficient(k, 0, t, decision, DECIDED, CORRECTED).to(STATE),
        _coefficient(k, 1, t, decision, DECIDED, CORRECTED).to(STATE),
        _coefficient(k, 2, t, decision, DECIDED, CORRECTED).to(STATE),
        _coefficient(k, 3, t, decision, DECIDED, CORRECTED).to(STATE),
        _coefficient(k, 4, t, decision, DECIDED, CORRECTED).to(STATE),
        _coefficient(k, 5, t, decision, DECIDED, CORRECTED).to(STATE),
        _coefficient(k, 6, t, decision, DECIDED, CORRECTED).to(STATE),
        _coefficient(k, 7, t, decision, DECIDED, CORRECTED).to(STATE),
    )
    start_key = (begin * 0).to(tl.uint32)
    unit = t * 0
    if CODE > 0 or WEIGHT > 0:  # noqa: SIM102 (known when it is compiled)
        if tl.load(row + 10) != 0:
            seed = tl.load(tl.load(row + 10).to(tl.pointer_type(tl.int64)))
            start_key = codes.key(seed, t - 1) + tl.load(row + 11).to(tl.uint32)
            unit = (seed >> 32).to(tl.int32)
    if wide:
        _update_chunk(
            row, c, start_key, unit, begin, left,
            RULE, READS, SLOTS, PARAM, GRAD, STATE, STORED, CODE, WEIGHT, CHUNK, BLOCK, EVICT, FAR, True,
        )  # fmt: skip
    else:
        _update_chunk(
            row, c, start_key, unit, begin, left,
            RULE, READS, SLOTS, PARAM, GRAD, STATE, STORED, CODE, WEIGHT, CHUNK, BLOCK, EVICT, FAR, False,
        )  # fmt: skip
    if DECIDED:
        if tl.load(decision + 2) == 0:
            _count_step(rows, chunks, tickets, CHUNK)
    else:
        _count_step(rows, chunks, tickets, CHUNK)


@triton.jit
def _sum_chunk(row, begin, left, GRAD: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr):
    pointer = _pointer(row, 1, GRAD, begin, FULL)
    sums = tl.zeros([BLOCK], tl.float64)
    for start in range(0, CHUNK, BLOCK):
        grad = _load(pointer, start + tl.arange(0, BLOCK), left, tl.float64, FULL, "")
        sums += grad * grad
    return tl.sum(sums, 0)


@triton.jit
def sum_of_squares(rows, chunks, sums, GRAD: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """Writes each chunk's sum of squared gradients, in float64: float32 overflows at a norm of 1.8e19."""
    row, begin, left = _chunk(rows, chunks, CHUNK)
    if (left >= CHUNK) & (tl.load(row + 1) % 16 == 0):
        total = _sum_chunk(row, begin, left, GRAD, CHUNK, BLOCK, True)
    else:
        total = _sum_chunk(row, begin, left, GRAD, CHUNK, BLOCK, False)
    tl.store(sums + tl.program_id(0), total)


@triton.jit(do_not_specialize=["n", "known_scale", "max_norm"])
def decide(
    sums,
    n,
    grad_scale,
    known_scale,
    found_inf,
    max_norm,
    decision,
    skipped,
    SCALED: tl.constexpr,
    CHECKED: tl.constexpr,
    CLIPS: tl.constexpr,
    SKIPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Makes a decision of the sums, as ``csrc/decision.h`` does, and counts it if it is to skip. ``grad_scale`` where SCALED,
    ``found_inf`` where CHECKED; ``known_scale``, ``max_norm``: the bits of float64s, since floats come as float32."""
    parts = tl.zeros([BLOCK], tl.float64)
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        parts += tl.load(sums + i, mask=i < n, other=0.0)
    total = tl.sum(parts, 0)
    scale = known_scale.to(tl.float64, bitcast=True)
    if SCALED:
        scale = tl.load(grad_scale).to(tl.float64)
    norm = tl.sqrt(total) / scale
    if CLIPS:
        limit = max_norm.to(tl.float64, bitcast=True) / (norm + 1e-6)
        clip = tl.where(limit > 1.0, 1.0, limit)
    else:
        clip = scale * 0.0 + 1.0
    skip = False
    if CHECKED:
        skip = tl.load(found_inf) != 0
    if SKIPS:
        skip = skip | (total - total != 0.0)
    tl.store(decision, clip / scale)
    tl.store(decision + 1, norm)
    tl.store(decision + 2, tl.where(skip, 1.0, 0.0).to(tl.float64))
    tl.store(skipped, tl.load(skipped) + tl.where(skip, 1, 0))
