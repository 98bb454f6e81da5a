"""One launch over a table of addresses (csrc/table.h): each program updates one chunk of one tensor.

The rule comes in as a constexpr function; everything that changes between steps is data, so a new learning rate or a
new list of tensors compiles nothing.
"""

import os

import triton
import triton.language as tl

ROW_WORDS = tl.constexpr(9)
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
def _pointer(row, word: tl.constexpr, dtype: tl.constexpr, begin, ALIGNED: tl.constexpr):
    pointer = tl.load(row + word).to(tl.pointer_type(dtype)) + begin
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def _load(pointer, offsets, left, dtype: tl.constexpr, FULL: tl.constexpr, EVICT: tl.constexpr = ""):
    if FULL:
        value = tl.load(pointer + offsets, eviction_policy=EVICT)
    else:
        value = tl.load(pointer + offsets, mask=offsets < left, other=0.0, eviction_policy=EVICT)
    return value.to(dtype)


@triton.jit
def _chunk(rows, chunks, CHUNK: tl.constexpr):
    """The program's row, the first element of its chunk, and how many are left from there on."""
    entry = tl.load(chunks + tl.program_id(0))
    row = rows + (entry >> 32) * ROW_WORDS
    begin = (entry & 0xFFFFFFFF) * CHUNK
    return row, begin, tl.load(row + 6) - begin


@triton.jit
def _store(pointer, offsets, left, value, FULL: tl.constexpr, EVICT: tl.constexpr):
    value = narrow(value, pointer.dtype.element_ty)
    if FULL:
        tl.store(pointer + offsets, value, eviction_policy=EVICT)
    else:
        tl.store(pointer + offsets, value, mask=offsets < left, eviction_policy=EVICT)


@triton.jit
def _update_chunk(
    row,
    c,
    begin,
    left,
    RULE: tl.constexpr,
    READS: tl.constexpr,
    SLOTS: tl.constexpr,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    STATE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    EVICT: tl.constexpr,
    FAR: tl.constexpr,
    FULL: tl.constexpr,
):
    param_ptr = _pointer(row, 0, PARAM, begin, FULL)
    grad_ptr = _pointer(row, 1, GRAD, begin, FULL)
    ptr0 = _pointer(row, 2, STATE, begin, FULL)
    ptr1 = _pointer(row, 3, STATE, begin, FULL)
    ptr2 = _pointer(row, 4, STATE, begin, FULL)
    ptr3 = _pointer(row, 5, STATE, begin, FULL)
    for start in range(0, CHUNK, BLOCK):
        i = start + tl.arange(0, BLOCK)
        grad = _load(grad_ptr, i, left, STATE, FULL, EVICT)
        param = _load(param_ptr, i, left, STATE, FULL, EVICT)
        slot0 = _load(ptr0, i, left, STATE, FULL, EVICT)
        slot1 = _load(ptr1, i, left, STATE, FULL, EVICT)
        slot2 = _load(ptr2, i, left, STATE, FULL, EVICT) if READS > 2 else tl.zeros_like(param)
        param, slot0, slot1, slot2, slot3 = RULE(c, grad, param, slot0, slot1, slot2, tl.zeros_like(param), FAR)
        _store(param_ptr, i, left, param, FULL, EVICT)
        _store(ptr0, i, left, slot0, FULL, EVICT)
        _store(ptr1, i, left, slot1, FULL, EVICT)
        if SLOTS > 2:
            _store(ptr2, i, left, slot2, FULL, EVICT)
        if SLOTS > 3:
            _store(ptr3, i, left, slot3, FULL, EVICT)


@triton.jit
def multi_tensor(
    rows,
    chunks,
    coefficients,
    found_inf,
    RULE: tl.constexpr,
    READS: tl.constexpr,
    SLOTS: tl.constexpr,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    STATE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    EVICT: tl.constexpr,
    SKIPPABLE: tl.constexpr,
    FAR: tl.constexpr,
):
    """``found_inf``: one float; where SKIPPABLE and it is not zero, nothing changes. FAR: some average moves far."""
    row, begin, left = _chunk(rows, chunks, CHUNK)
    if SKIPPABLE:
        left = tl.where(tl.load(found_inf) != 0, 0, left)
    k = coefficients + tl.load(row + 7) * 8
    c = (
        tl.load(k).to(STATE),
        tl.load(k + 1).to(STATE),
        tl.load(k + 2).to(STATE),
        tl.load(k + 3).to(STATE),
        tl.load(k + 4).to(STATE),
        tl.load(k + 5).to(STATE),
        tl.load(k + 6).to(STATE),
        tl.load(k + 7).to(STATE),
    )
    addresses = tl.load(row) | tl.load(row + 1) | tl.load(row + 2) | tl.load(row + 3) | tl.load(row + 4) | tl.load(row + 5)
    if (left >= CHUNK) & (addresses % 16 == 0):
        _update_chunk(row, c, begin, left, RULE, READS, SLOTS, PARAM, GRAD, STATE, CHUNK, BLOCK, EVICT, FAR, True)
    else:
        _update_chunk(row, c, begin, left, RULE, READS, SLOTS, PARAM, GRAD, STATE, CHUNK, BLOCK, EVICT, FAR, False)


@triton.jit
def _sum_chunk(row, begin, left, GRAD: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr):
    pointer = _pointer(row, 1, GRAD, begin, FULL)
    sums = tl.zeros([BLOCK], tl.float64)
    for start in range(0, CHUNK, BLOCK):
        grad = _load(pointer, start + tl.arange(0, BLOCK), left, tl.float64, FULL)
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
