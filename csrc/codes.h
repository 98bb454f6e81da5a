// Codes: state and weights in fewer bits than the rule computes in, and the random numbers they are rounded with.
// The same names in the same order in triton_kernels/codes.py and adabayes_fused/codes.py; integers, and floats that are exact or
// rounded once, so that every backend gives the same bits.
//
// Rounding is stochastic: a step moves an average by less than half the distance of two codes, which rounding to nearest would lose
// every time. The random numbers are a function of the parameter's seed, the step and the element's place in the whole tensor, and
// of nothing else: not of the thread, the chunk or the process that holds it.
#pragma once
#include <type_traits>
#include "dtype.h"
#include "rule.h"

// --- Random numbers ---

// A bijection of 32 bits in which every bit of `x` reaches every bit of the result (Wellons' lowbias32).
RULE_FN uint32_t mix(uint32_t x) {
  x = (x ^ x >> 16) * 0x7feb352du;
  x = (x ^ x >> 15) * 0x846ca68bu;
  return x ^ x >> 16;
}

// The parameter's part of it, in the step that follows `step` others.
RULE_FN uint32_t key(int64_t seed, float step) { return mix(mix(uint32_t(seed)) + uint32_t(step) + 1); }

// The part of an element, from the key plus its place. Two draws a word, each in the upper bits: `word` and `turned(word)`.
template <int j>
RULE_FN uint32_t word(uint32_t at) { return mix(at + j * 0x9e3779b9u); }
RULE_FN uint32_t turned(uint32_t word) { return word << 16 | word >> 16; }

// Which word is whose: exp_avg turned(0), the second slot 0, the third turned(1), the weight 1, the fourth turned(2).

// --- Codes of state ---

RULE_FN bool finite(float x) { return (bits_of(x) & 0x7fffffff) < 0x7f800000; }

// bfloat16, to one of the two neighbours, unbiased; infinities and NaN stay.
RULE_FN void encode(float x, uint32_t random, bfloat16_t& out) {
  const uint32_t b = bits_of(x), special = (b & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : b >> 16;
  out.bits = uint16_t(finite(x) ? (b + (random >> 16)) >> 16 : special);
}

RULE_FN float clamped(float x, float low, float high) { return x > low ? (x < high ? x : high) : low; }

// u8: of a variance within [2^-30, 3.5], eight codes an octave; 255 is what is not finite.
struct u8_t { uint8_t bits; };
constexpr uint32_t kLowestU8 = 97 << 3;

RULE_FN float widen(u8_t x) { return float_of(x.bits == 255 ? 0x7fc00000 : (x.bits + kLowestU8) << 20); }
RULE_FN void encode(float x, uint32_t random, u8_t& out) {
  const uint32_t code = ((bits_of(clamped(x, 0x1p-30f, 3.5f)) + (random >> 12)) >> 20) - kLowestU8;
  out.bits = uint8_t(finite(x) ? code : 255);
}

// m8: a sign, and of what `exponent` scales to units of the learning rate eight codes an octave from 2^-10 to 56, evenly spaced
// below; 127 is what is not finite.
struct m8_t { uint8_t bits; };
constexpr uint32_t kSmallestM8 = 117 << 23;  // bits of 2^-10

RULE_FN float widen(m8_t x, int exponent) {
  const uint32_t magnitude = x.bits & 127;
  const float scaled = float_of((magnitude << 20) + kSmallestM8) - 0x1p-10f;
  const float value = scaled * float_of(uint32_t(127 - exponent) << 23);
  return float_of((magnitude == 127 ? 0x7fc00000 : bits_of(value)) | uint32_t(x.bits & 128) << 24);
}
RULE_FN void encode(float x, uint32_t random, int exponent, m8_t& out) {
  const uint32_t b = bits_of(x);
  const float scaled = clamped(float_of(b & 0x7fffffff) * float_of(uint32_t(exponent + 127) << 23), 0, 56 - 0x1p-10f);
  const uint32_t code = (bits_of(scaled + 0x1p-10f) - kSmallestM8 + (random >> 12)) >> 20;
  out.bits = uint8_t((finite(x) ? code : 127) | (b >> 31) << 7);
}

// What the second slot is stored in beside an m8, and the exponent that scales it, from that slot as it is stored and the
// parameter's `unit`, round(log2(r)): of AdaBayes r times the variance, of AdaBayes-FP 1 / sqrt(a^2 + v) but for its last bit.
template <class Rule> struct Second { using type = u8_t; };
template <> struct Second<AdaBayesFP> { using type = bfloat16_t; };

RULE_FN int exponent_of(float x) { return int(bits_of(x) >> 23 & 255) - 127; }

template <class Rule>
RULE_FN int scale(float second, int unit) {
  if constexpr (std::is_same_v<Rule, AdaBayes>) {
    const int exponent = exponent_of(second) + unit;
    return exponent > 126 ? 126 : exponent;
  } else {
    return -(exponent_of(second + float_of(uint32_t(125 - 2 * unit) << 23)) >> 1);
  }
}

// --- Codes of weights ---

// A float's upper half, the bfloat16 nearest to it, and its lower half, which is added to it as a whole number.
RULE_FN float joined(bfloat16_t high, int low) { return float_of((uint32_t(high.bits) << 16) + uint32_t(low)); }
RULE_FN int parted(float x, bfloat16_t& high) {
  const uint32_t b = bits_of(x);
  if (!finite(x)) {
    encode(x, 0, high);
    return 0;
  }
  high.bits = uint16_t((b + 0x8000) >> 16);
  return int(b - (uint32_t(high.bits) << 16));
}

// As `parted`, but that the lower eight bits are rounded away stochastically. An infinity may come of it.
RULE_FN int parted24(float x, uint32_t random, bfloat16_t& high) {
  return parted(finite(x) ? float_of((bits_of(x) + (random >> 24)) & ~255u) : x, high);
}
