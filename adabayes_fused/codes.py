"""Codes: state and weights in fewer bits than the rule computes in, and the random numbers they are rounded with.

The same names in the same order as ``csrc/codes.h``, which says what each code is, here in plain PyTorch; before them, which
code each tensor has. Rounding is stochastic, by a function of the parameter's seed, its step and the element's place in the
whole tensor, so that every backend, chunking and sharding gives the same bits.

A float here is a float32 tensor; its bits, and random numbers of 32 bits, are int32 tensors.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .algorithms import Algorithm
from .table import DTYPES

STATE_DTYPES = ("float32", "bfloat16", "8bit")
WEIGHT_ROUNDINGS = ("nearest", "stochastic", "24bit", "32bit")
_SMALL = {"AdaBayes": (torch.uint8, torch.uint8), "AdaBayesFP": (torch.uint8, torch.bfloat16)}  # by slot
_CORRECTIONS = {"24bit": torch.int8, "32bit": torch.int16}


class Layout(NamedTuple):
    """How the state of parameters of one dtype is stored. ``state``, ``weight``: C++'s numbers. ``dtypes``: by slot."""

    slots: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    correction: torch.dtype | None
    random: bool
    state: int
    weight: int

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors shaped like the parameter."""
        return self.slots if self.correction is None else (*self.slots, "correction")

    @property
    def stored(self) -> tuple[torch.dtype, ...]:
        """Their dtypes."""
        return self.dtypes if self.correction is None else (*self.dtypes, self.correction)

    @property
    def numbers(self) -> tuple[str, ...]:
        """The 0-dim tensors."""
        return ("step", "seed") if self.random else ("step",)

    @property
    def coded(self) -> bool:
        return self.state > 0 or self.weight > 0

    def dtype_of(self, name: str) -> torch.dtype:
        return self.stored[self.names.index(name)]


class Storage(NamedTuple):
    """How an optimizer stores state and weights: options of the whole optimizer."""

    lean: bool
    state_dtype: str = "float32"
    weight_rounding: str = "nearest"

    def why_not(self, dtype: torch.dtype) -> str | None:
        """Why parameters of this dtype cannot be stored so, and what to do; None if they can."""
        if self.state_dtype != "float32" and dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f'state_dtype={self.state_dtype!r} is for float32, float16 and bfloat16 parameters; use "float32"'
        if self.weight_rounding != "nearest" and dtype == torch.float16:
            rounding = f"weight_rounding={self.weight_rounding!r}"
            return f'{rounding} is for bfloat16 parameters, and leaves float32 as they are; use "nearest"'
        return None

    def layout(self, algorithm: Algorithm, dtype: torch.dtype) -> Layout:
        return _layout(self, algorithm, dtype)


@functools.lru_cache(maxsize=None, typed=True)  # each step asks
def checked_storage(lean: bool, state_dtype: str, weight_rounding: str) -> Storage:
    """Raises for what is no option, or no combination of them."""
    storage = Storage(lean, state_dtype, weight_rounding)
    if not isinstance(lean, bool):
        raise TypeError(f"Invalid lean value: {lean!r} (allowed: True or False)")
    for name, allowed in (("state_dtype", STATE_DTYPES), ("weight_rounding", WEIGHT_ROUNDINGS)):
        if (given := getattr(storage, name)) not in allowed:
            raise ValueError(f"Invalid {name}: {given!r} (allowed: {', '.join(map(repr, allowed))})")
    if state_dtype == "8bit" and not lean:
        raise ValueError(
            'state_dtype="8bit" keeps only what the recursion needs: give lean=True with it. posterior() and diagnostics() '
            'read such state; state_dtype="bfloat16" may be full'
        )
    return storage


@functools.cache
def _layout(storage: Storage, algorithm: Algorithm, dtype: torch.dtype) -> Layout:
    slots = algorithm.stored(storage.lean)
    state = STATE_DTYPES.index(storage.state_dtype)
    wide, small = (torch.promote_types(dtype, torch.float32),) * len(slots), _SMALL[algorithm.name]
    dtypes = (wide, (torch.bfloat16,) * len(slots), small)[state]
    rounding = storage.weight_rounding if dtype == torch.bfloat16 else "nearest"
    random = state > 0 or rounding in ("stochastic", "24bit")
    return Layout(slots, dtypes, _CORRECTIONS.get(rounding), random, state, WEIGHT_ROUNDINGS.index(rounding))


def check_seed(seed: Any) -> None:
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 1 << 63:
        raise ValueError(f"Invalid seed: {seed!r} (allowed: a whole number, 0 <= seed < 2**63)")


def described(storage: Storage, algorithm: Algorithm) -> list[Any]:
    """The layouts of each of ``DTYPES`` as the reader in C++ takes them; None where there is none."""
    numbered = (*DTYPES, torch.uint8, torch.int8, torch.int16, torch.int64)  # csrc/table.h

    def entry(dtype: torch.dtype) -> Any:
        if storage.why_not(dtype) is not None:
            return None
        layout = storage.layout(algorithm, dtype)
        correction = -1 if layout.correction is None else numbered.index(layout.correction)
        return [numbered.index(d) for d in layout.dtypes], correction, layout.random

    return [entry(dtype) for dtype in DTYPES]


# --- Random numbers ---------------------------------------------------------------------------------------------------


def _signed(n: int) -> int:
    """32 bits as torch's int32 takes them."""
    return n - (n >> 31 << 32)


def _upper(x: Tensor, bits: int) -> Tensor:
    """The upper bits of 32, as a number without a sign."""
    return x >> 32 - bits & (1 << bits) - 1


def mix(x: Tensor) -> Tensor:
    x = (x ^ _upper(x, 16)).mul(0x7FEB352D)
    x = (x ^ _upper(x, 17)).mul(_signed(0x846CA68B))
    return x ^ _upper(x, 16)


def key(seed: Tensor, step: Tensor) -> Tensor:
    """``step``: the count of the steps before this one."""
    return mix(mix(seed.to(torch.int32)) + step.to(torch.int32) + 1)


def word(at: Tensor, j: int) -> Tensor:
    return mix(at + _signed(j * 0x9E3779B9 & 0xFFFFFFFF))


def turned(word: Tensor) -> Tensor:
    return word << 16 | _upper(word, 16)


def new_seed(seed: int, position: int, r: float) -> int:
    """What ``state[p]["seed"]`` begins as: the seed of the parameter at this position in the optimizer's groups in the low
    half; in the high one the exponent of the unit of an 8-bit ``exp_avg``, from the group's ``r``."""
    unit = 60 if r == math.inf else round(min(max(math.log2(r), -60.0), 60.0))
    low, high = (torch.tensor(_signed(half), dtype=torch.int32, device="cpu") for half in (seed & 0xFFFFFFFF, seed >> 32))
    return unit << 32 | int(mix(mix(low) + high + position)) & 0xFFFFFFFF


def unit_of(seed: Any) -> Any:
    return seed >> 32


def places(begin: int, numel: int, place: Sequence[int], device: torch.device) -> Tensor:
    """Where elements of a part lie in the whole tensor, modulo 2**32; ``place``: first, run, stride (csrc/table.h)."""
    first, run, stride = place
    i = torch.arange(begin, begin + numel, dtype=torch.int64, device=device)
    return (first + (i if begin + numel <= run else i // run * stride + i % run)).to(torch.int32)


# --- Codes of state ---------------------------------------------------------------------------------------------------


def _bits(x: Tensor) -> Tensor:
    return x.view(torch.int32)


def _float(bits: Tensor) -> Tensor:
    return bits.to(torch.int32).view(torch.float32)


_NAN = 0x7FC00000


def encode_bfloat16(x: Tensor, random: Tensor) -> Tensor:
    code = _bits(x) + _upper(random, 16) >> 16
    return torch.where(x.isnan(), _NAN >> 16, code).to(torch.int16).view(torch.bfloat16)


_SMALLEST_U8 = 97 << 23  # bits of 2^-30


def decode_u8(code: Tensor) -> Tensor:
    code = code.to(torch.int32)
    return _float(torch.where(code == 255, _NAN, (code << 20) + _SMALLEST_U8))


def encode_u8(x: Tensor, random: Tensor) -> Tensor:
    code = _bits(x.clamp(2.0**-30, 3.5)) - _SMALLEST_U8 + _upper(random, 20) >> 20
    return torch.where(x.isnan(), 255, code).to(torch.uint8)


_SMALLEST_M8 = 117 << 23  # bits of 2^-10


def decode_m8(code: Tensor, exponent: Tensor) -> Tensor:
    code = code.to(torch.int32)
    magnitude = code & 127
    value = (_float((magnitude << 20) + _SMALLEST_M8) - 2.0**-10) * _float(127 - exponent << 23)
    return _float(torch.where(magnitude == 127, _NAN, _bits(value)) | (code & 128) << 24)


def encode_m8(x: Tensor, random: Tensor, exponent: Tensor) -> Tensor:
    scaled = (x.abs() * _float(exponent + 127 << 23)).clamp(max=56 - 2.0**-10)
    code = _bits(scaled + 2.0**-10) - _SMALLEST_M8 + _upper(random, 20) >> 20
    return (torch.where(x.isnan(), 127, code) | (_bits(x) >> 24 & 128)).to(torch.uint8)


def scale(second: Tensor, unit: Any) -> Tensor:
    """``second`` as it is stored."""
    if second.dtype == torch.uint8:
        exponent: Tensor = (second.to(torch.int32) >> 3) - 30 + unit
        return exponent
    smallest = _float(torch.as_tensor(125 - 2 * unit, device=second.device) << 23)
    return -((_bits(second.float() + smallest) >> 23 & 255) - 127 >> 1)


# --- Codes of weights -------------------------------------------------------------------------------------------------


def joined(high: Tensor, low: Tensor) -> Tensor:
    return _float((high.view(torch.int16).to(torch.int32) << 16) + low)


def parted(x: Tensor) -> tuple[Tensor, Tensor]:
    b = torch.where(x.isnan(), _NAN, _bits(x))
    high = b + 0x8000 >> 16
    return high.to(torch.int16).view(torch.bfloat16), b - (high << 16)


def parted24(x: Tensor, random: Tensor) -> tuple[Tensor, Tensor]:
    b = torch.where(x.isnan(), _NAN, _bits(x))
    return parted(_float(b + _upper(random, 8) & ~255))


# --- A parameter's tensors --------------------------------------------------------------------------------------------

_CODES = (torch.uint8, torch.bfloat16)  # dtypes of state that are codes


def _nearest(device: torch.device | str) -> Tensor:
    """Half of all, in place of a random number."""
    return torch.tensor(-1 << 31, dtype=torch.int32, device=device)


def decoded(slots: Sequence[Tensor], unit: Any) -> list[Tensor]:
    """The first slots as numbers: new tensors where they are codes, else themselves."""

    def value(i: int, t: Tensor) -> Tensor:
        if t.dtype == torch.uint8:
            return decode_u8(t) if i else decode_m8(t, scale(slots[1], unit))
        return t.float() if t.dtype == torch.bfloat16 else t

    return [value(i, t) for i, t in enumerate(slots)]


def encoded(dtypes: Sequence[torch.dtype], values: Sequence[Tensor], unit: Any, at: Tensor | None) -> list[Tensor]:
    """Numbers as they are stored; ``at``: the key plus the elements' places, None to round to nearest."""

    def random(slot: int) -> Tensor:  # whose word is whose: csrc/codes.h
        if at is None:
            return _nearest(values[0].device)
        drawn = word(at, (0, 0, 1, 2)[slot])
        return drawn if slot == 1 else turned(drawn)

    stored = list(values)
    for i, dtype in reversed([*enumerate(dtypes)]):  # the first slot's code takes the second's
        if dtype == torch.bfloat16:
            stored[i] = encode_bfloat16(values[i], random(i))
        elif dtype == torch.uint8:
            stored[i] = encode_u8(values[i], random(i)) if i else encode_m8(values[i], random(i), scale(stored[1], unit))
    return stored


def decoded_weights(param: Tensor, correction: Tensor | None) -> Tensor:
    if correction is None:
        return param.float()
    return joined(param, correction.to(torch.int32) * (256 if correction.dtype == torch.int8 else 1))


def encoded_weights(rounding: int, value: Tensor, at: Any) -> list[Tensor]:
    """A bfloat16 parameter, and its correction if there is one; ``rounding``: of WEIGHT_ROUNDINGS."""
    if rounding == 1:
        return [encode_bfloat16(value, word(at, 1))]
    high, low = parted24(value, word(at, 1)) if rounding == 2 else parted(value)
    return [high, (low >> 8).to(torch.int8) if rounding == 2 else low.to(torch.int16)]


def constant(value: float, dtype: torch.dtype) -> float:
    """What a slot is filled with that is ``value`` everywhere."""
    if dtype != torch.uint8 or value == 0.0:
        return value
    return int(encode_u8(torch.tensor(value, dtype=torch.float32, device="cpu"), _nearest("cpu")))


def stored_as(layout: Layout, tensors: Mapping[str, Tensor], seed: Tensor | None) -> dict[str, Tensor]:
    """State, by name, as ``layout`` stores it: itself where it is stored so, or where no code is involved; else rounded to
    nearest. What is lacking, and what the layout does not have, is left out. ``seed``: whose unit an 8-bit ``exp_avg`` has."""
    found = {name: tensors[name] for name in layout.names if name in tensors}
    slots = [name for name in layout.slots if name in found]
    wanted, given = [layout.dtype_of(name) for name in slots], [found[name].dtype for name in slots]
    if any(a != b and (a in _CODES or b in _CODES) for a, b in zip(wanted, given, strict=True)):
        unit = 0 if seed is None else unit_of(seed.to(found[slots[0]].device))
        values = decoded([found[name] for name in slots], unit)
        if any(dtype in _CODES for dtype in wanted):
            values = [t.to(torch.float32) for t in values]
        found.update(zip(slots, encoded(wanted, values, unit, None), strict=True))
    if layout.correction is not None and "correction" in found and found["correction"].dtype != layout.correction:
        kept = found["correction"].to(torch.int16)
        found["correction"] = kept << 8 if layout.correction == torch.int16 else (kept >> 8).to(torch.int8)
    return found
