// Codes: state and weights in fewer bits than the rule computes in, and the random numbers they are rounded with.
// The same names in the same order in triton_kernels/codes.py and adabayes_fused/codes.py; integers, and floats that are exact or
// rounded once, so that every backend gives the same bits.
//
// Rounding is stochastic: a step moves an average by less than half the distance of two codes, which rounding to nearest would lose
// every time. The random numbers are a function of the parameter's seed, the step and the element's place in the whole tensor, and
// of nothing else: not of the thread, the chunk or the process that holds it.
#pragma once
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

// NaN stays NaN. It has one code, in m8 one for each sign, in which backends may differ. Infinities stay in bfloat16, and are the largest
// value of the others.

RULE_FN bool is_nan(float x) { return x != x; }

// bfloat16, to one of the two neighbours, unbiased.
RULE_FN void encode(float x, uint32_t random, bfloat16_t& out) {
  out.bits = uint16_t(is_nan(x) ? 0x7fc0 : (bits_of(x) + (random >> 16)) >> 16);
}

// Where NaN stays NaN.
RULE_FN float at_most(float x, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm("min.NaN.f32 %0, %0, %1;" : "+f"(x) : "f"(high));
  return x;
#else
  return high < x ? high : x;
#endif
}
RULE_FN float at_least(float x, float low) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm("max.NaN.f32 %0, %0, %1;" : "+f"(x) : "f"(low));
  return x;
#else
  return low > x ? low : x;
#endif
}
RULE_FN uint32_t at_most(uint32_t x, uint32_t high) { return x < high ? x : high; }

// u8: of a variance within [2^-30, 3.5], eight codes an octave; 255 is NaN.
struct u8_t { uint8_t bits; };
constexpr uint32_t kSmallestU8 = 97 << 23;  // bits of 2^-30

RULE_FN float widen(u8_t x) { return float_of(x.bits == 255 ? 0x7fc00000 : (uint32_t(x.bits) << 20) + kSmallestU8); }
RULE_FN void encode(float x, uint32_t random, u8_t& out) {
  const uint32_t b = bits_of(at_least(at_most(x, 3.5f), 0x1p-30f));
  out.bits = uint8_t(at_most((b - kSmallestU8 + (random >> 12)) >> 20, 255u));  // of NaN more than that
}

// m8: a sign, and of what 2^exponent scales to units of the learning rate eight codes an octave from 2^-10 to 56, evenly spaced
// below; 127 is NaN.
struct m8_t { uint8_t bits; };
constexpr uint32_t kSmallestM8 = 117 << 23;  // bits of 2^-10

RULE_FN float widen(m8_t x, int exponent) {
  const uint32_t magnitude = x.bits & 127;
  const float value = (float_of((magnitude << 20) + kSmallestM8) - 0x1p-10f) * float_of(uint32_t(127 - exponent) << 23);
  return float_of((magnitude == 127 ? 0x7fc00000 : bits_of(value)) | uint32_t(x.bits & 128) << 24);
}
RULE_FN void encode(float x, uint32_t random, int exponent, m8_t& out) {
  const uint32_t b = bits_of(x);
  const float scaled = at_most(float_of(b & 0x7fffffff) * float_of(uint32_t(exponent + 127) << 23), 56 - 0x1p-10f);
  const uint32_t code = at_most((bits_of(scaled + 0x1p-10f) - kSmallestM8 + (random >> 12)) >> 20, 127u);
  out.bits = uint8_t(code | (b >> 24 & 128));
}

// What the second slot is stored in beside an m8, and the exponent that scales it, from that slot as it is stored and the
// parameter's `unit`, round(log2(r)): of AdaBayes r times the variance, of AdaBayes-FP 1 / sqrt(a^2 + v) but for its last bit.
template <class Rule> struct Second { using type = u8_t; };
template <> struct Second<AdaBayesFP> { using type = bfloat16_t; };

RULE_FN int scale(u8_t second, int unit) { return int(second.bits >> 3) - 30 + unit; }
RULE_FN int scale(bfloat16_t second, int unit) {
  const uint32_t b = bits_of(widen(second) + float_of(uint32_t(125 - 2 * unit) << 23));
  return -((int(b >> 23 & 255) - 127) >> 1);
}

// --- Codes of weights ---

// A float's upper half, the bfloat16 nearest to it, and its lower half, which is added to it as a whole number.
RULE_FN float joined(bfloat16_t high, int low) { return float_of((uint32_t(high.bits) << 16) + uint32_t(low)); }
RULE_FN int parted(float x, bfloat16_t& high) {
  const uint32_t b = is_nan(x) ? 0x7fc00000 : bits_of(x);
  high.bits = uint16_t((b + 0x8000) >> 16);
  return int(b - (uint32_t(high.bits) << 16));
}

// As `parted`, but that the lower eight bits are rounded away stochastically. An infinity may come of it.
RULE_FN int parted24(float x, uint32_t random, bfloat16_t& high) {
  return parted(float_of(((is_nan(x) ? 0x7fc00000 : bits_of(x)) + (random >> 24)) & ~255u), high);
}
