// Storage types and their way to and from the type the rule computes in. On the host in integer arithmetic
// without branches, which vectorises everywhere; on the device by its own instructions. Round to nearest even.
#pragma once
#include <cstdint>
#include <cstring>
#include "rule.h"
#include "table.h"
#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

RULE_FN int64_t size_of(DType dtype) {
  return 0x82112284u >> 4 * int(dtype) & 15;  // a digit each, the first one last: a GPU would keep an array on its stack
}

struct half_t { uint16_t bits; };
struct bfloat16_t { uint16_t bits; };

RULE_FN uint32_t bits_of(float x) { uint32_t b; memcpy(&b, &x, 4); return b; }
RULE_FN float float_of(uint32_t b) { float x; memcpy(&x, &b, 4); return x; }

RULE_FN float widen(float x) { return x; }
RULE_FN double widen(double x) { return x; }

RULE_FN float widen(bfloat16_t x) { return float_of(uint32_t(x.bits) << 16); }

RULE_FN float widen(half_t x) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(x.bits));
#else
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, magnitude = uint32_t(x.bits & 0x7fff) << 13;
  const uint32_t normal = magnitude + (112u << 23);
  const uint32_t subnormal = bits_of(float_of(magnitude + (113u << 23)) - 0x1p-14f);  // no float here is subnormal itself
  const uint32_t finite = magnitude < 1u << 23 ? subnormal : normal;
  return float_of(sign | (magnitude >= 0x7c00u << 13 ? magnitude | 0x7f800000 : finite));
#endif
}

RULE_FN void narrow(float x, float& out) { out = x; }
RULE_FN void narrow(double x, double& out) { out = x; }

RULE_FN void narrow(float x, bfloat16_t& out) {
#ifdef __CUDA_ARCH__
  out.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
#else
  const uint32_t b = bits_of(x), nan = (b & 0x7fffffff) > 0x7f800000;
  out.bits = uint16_t(nan ? 0x7fc0 : (b + 0x7fff + ((b >> 16) & 1)) >> 16);
#endif
}

RULE_FN void narrow(float x, half_t& out) {
#ifdef __CUDA_ARCH__
  out.bits = __half_as_ushort(__float2half_rn(x));
#else
  const uint32_t b = bits_of(x), sign = (b >> 16) & 0x8000, magnitude = b & 0x7fffffff;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);  // the sum's ulp is half's smallest
  uint32_t h = magnitude < 113u << 23 ? subnormal : normal;
  h = magnitude >= 143u << 23 ? 0x7c00 : h;  // 65536 and above; what rounds up to it carried into 0x7c00 by itself
  h = magnitude > 0x7f800000 ? 0x7e00 : h;
  out.bits = uint16_t(sign | h);
#endif
}
