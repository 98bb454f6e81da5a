"""Codes: state and weights in fewer bits than the rule computes in, and the random numbers they are rounded with.

The same names in the same order as ``csrc/codes.h``, which says what each code is. Random numbers are uint32, bits int32.
"""

import triton
import triton.language as tl

# --- Random numbers ---


@triton.jit
def mix(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def key(seed, step):
    """``step``: the count of the steps before this one."""
    return mix(mix(seed.to(tl.uint32)) + step.to(tl.uint32) + 1)


@triton.jit
def word(at, j: tl.constexpr):
    return mix(at + (j * 0x9E3779B9) % 0x100000000)


@triton.jit
def turned(word):
    return (word << 16) | (word >> 16)


# --- Codes of state ---


@triton.jit
def bits(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def floats(b):
    return b.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _upper(b):
    """The bfloat16 that is the upper half of these bits."""
    return ((b >> 16) & 0xFFFF).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def encode_bfloat16(x, random):
    return _upper(tl.where(x != x, 0x7FC00000, bits(x) + (random >> 16).to(tl.int32)))


@triton.jit
def at_most(x, high):
    """Where NaN stays NaN."""
    return tl.minimum(x, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def at_least(x, low):
    return tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def decode_u8(code):
    code = code.to(tl.int32)
    return floats(tl.where(code == 255, 0x7FC00000, (code << 20) + (97 << 23)))


@triton.jit
def encode_u8(x, random):
    b = bits(at_least(at_most(x, 3.5), 2.0**-30)).to(tl.uint32, bitcast=True)
    return tl.minimum((b - (97 << 23) + (random >> 12)) >> 20, 255).to(tl.uint8)


@triton.jit
def decode_m8(code, exponent):
    code = code.to(tl.int32)
    magnitude = code & 127
    value = (floats((magnitude << 20) + (117 << 23)) - 0.0009765625) * floats((127 - exponent) << 23)
    return floats(tl.where(magnitude == 127, 0x7FC00000, bits(value)) | ((code & 128) << 24))


@triton.jit
def encode_m8(x, random, exponent):
    b = bits(x)
    scaled = at_most(floats(b & 0x7FFFFFFF) * floats((exponent + 127) << 23), 55.9990234375)
    code = (bits(scaled + 0.0009765625).to(tl.uint32, bitcast=True) - (117 << 23) + (random >> 12)) >> 20
    return (tl.minimum(code, 127) | ((b >> 24) & 128).to(tl.uint32)).to(tl.uint8)


@triton.jit
def scale(second, unit):
    """``second`` as it is stored."""
    if second.dtype == tl.uint8:
        return (second >> 3).to(tl.int32) - 30 + unit
    else:
        return -((((bits(second.to(tl.float32) + floats((125 - 2 * unit) << 23)) >> 23) & 255) - 127) >> 1)


# --- Codes of weights ---


@triton.jit
def joined(high, low):
    return floats((high.to(tl.int16, bitcast=True).to(tl.int32) << 16) + low)


@triton.jit
def parted(x):
    b = tl.where(x != x, 0x7FC00000, bits(x))
    return _upper(b + 0x8000), b - (((b + 0x8000) >> 16) << 16)


@triton.jit
def parted24(x, random):
    b = tl.where(x != x, 0x7FC00000, bits(x))
    return parted(floats((b + (random >> 24).to(tl.int32)) & ~255))
