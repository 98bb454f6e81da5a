// One range of one tensor on the CPU. Compiled once per instruction set (ISA is its name, see CMakeLists.txt):
// the compiler vectorises the one scalar rule, so nothing here may have external linkage but what bears its name.
#include <algorithm>
#include <utility>
#include "codes.h"
#include "cpu.h"
#include "dispatch.h"
#ifdef __SSE2__
#include <emmintrin.h>
#endif

namespace {

constexpr int kBlock = 512;          // values of a block stay in the first-level cache
constexpr int kCoded = 128;          // and of codes
constexpr int kAhead = 6 * kCoded;   // elements: a processor prefetches no stream that is read in so short blocks
constexpr int64_t kStreamed = 65536; // elements of a range from which on memory that is only written is not read first

template <class T> constexpr DType dtype_of = std::is_same_v<T, float> ? DType::f32 : DType::f64;

// Values begin..begin+n of a tensor as T: the memory itself where it holds T, else widened into `block`.
template <class T>
T* read(DType dtype, int64_t address, int64_t begin, int n, T* block) {
  if (dtype == dtype_of<T>) return reinterpret_cast<T*>(address) + begin;
  with_dtype(dtype, [&](auto type) {
    const auto* from = reinterpret_cast<const typename decltype(type)::type*>(address) + begin;
    for (int i = 0; i < n; ++i) block[i] = T(widen(from[i]));
  });
  return block;
}

// Rounds a float block back to where `read` widened it from. (Double parameters are never widened.)
template <class T>
void write(DType dtype, int64_t address, int64_t begin, int n, const T* block) {
  if constexpr (std::is_same_v<T, float>) {
    auto round_to = [&](auto* to) { for (int i = 0; i < n; ++i) narrow(block[i], to[begin + i]); };
    if (dtype == DType::f16) round_to(reinterpret_cast<half_t*>(address));
    if (dtype == DType::bf16) round_to(reinterpret_cast<bfloat16_t*>(address));
  }
}

// Copies past the caches, which would otherwise read each line before it is overwritten.
template <class T>
void stream(const T* __restrict from, T* __restrict to, int64_t n) {
  int64_t i = 0;
#ifdef __SSE2__
  constexpr int64_t wide = sizeof(__m128i) / sizeof(T);
  if (reinterpret_cast<uintptr_t>(to) % sizeof(__m128i) == 0)
    for (; i + wide <= n; i += wide)
      _mm_stream_si128(reinterpret_cast<__m128i*>(to + i), _mm_load_si128(reinterpret_cast<const __m128i*>(from + i)));
#endif
  for (; i < n; ++i) to[i] = from[i];
}

template <class Rule, class T, bool full>
void sweep(const typename Rule::template Coefficients<T>& coefficients, int64_t n, const T* __restrict grad, T* __restrict param,
           T* __restrict s0, T* __restrict s1, T* __restrict s2, T* __restrict s3) {
  const auto c = coefficients;  // a copy no store can alias
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    T w = param[i], a = s0[i], b = s1[i], d = T(0), e = T(0);
    if constexpr (full && Rule::reads > 2) d = s2[i];
    Rule::update(c, grad[i], w, a, b, d, e);
    param[i] = w, s0[i] = a, s1[i] = b;
    if constexpr (full) s2[i] = d;
    if constexpr (full && Rule::slots > 3) s3[i] = e;
  }
}

template <class Rule, class T, bool full>
void update_range(const Bucket& bucket, const Row& row, const double* corrected, int64_t begin, int64_t end) {
  const auto c = coefficients<Rule, T>(corrected);
  const bool direct = bucket.param == dtype_of<T> && bucket.grad == dtype_of<T>;
  constexpr int last = Rule::slots - 1;  // of a full state: written, never read
  const bool streamed = full && direct && end - begin >= kStreamed;
  const int64_t step = direct && !streamed ? end - begin : kBlock;
  alignas(64) T grad_block[kBlock], param_block[kBlock], last_block[kBlock];
  for (int64_t i = begin; i < end; i += step) {
    const int64_t n = std::min(step, end - i);
    const T* grad = read(bucket.grad, row.grad, i, int(n), grad_block);
    T* param = read(bucket.param, row.param, i, int(n), param_block);
    T* slot[kMaxSlots];
    for (int k = 0; k < kMaxSlots; ++k) slot[k] = reinterpret_cast<T*>(row.slot[k]) + i;
    T* const kept = std::exchange(slot[last], streamed ? last_block : slot[last]);
    sweep<Rule, T, full>(c, n, grad, param, slot[0], slot[1], slot[2], slot[3]);
    if (streamed) stream(last_block, kept, n);
    write(bucket.param, row.param, i, int(n), param);
  }
#ifdef __SSE2__
  if (streamed) _mm_sfence();
#endif
}

// f(i) for each of n elements.
template <class F>
RULE_FN void each(int n, F f) {
#pragma omp simd
  for (int i = 0; i < n; ++i) f(i);
}

// A bfloat16 parameter from its weights and their correction, and back.
void read_weights(Weight weight, const Row& row, int64_t begin, int n, float* __restrict block) {
  const auto* high = reinterpret_cast<const bfloat16_t*>(row.param) + begin;
  const auto *low8 = reinterpret_cast<const int8_t*>(row.correction) + begin;
  const auto *low16 = reinterpret_cast<const int16_t*>(row.correction) + begin;
  if (weight == Weight::plus8) each(n, [&](int i) { block[i] = joined(high[i], low8[i] * 256); });
  else if (weight == Weight::plus16) each(n, [&](int i) { block[i] = joined(high[i], low16[i]); });
  else each(n, [&](int i) { block[i] = widen(high[i]); });
}

void write_weights(Weight weight, const Row& row, int64_t begin, int n, const float* __restrict block, uint32_t at) {
  auto* __restrict high = reinterpret_cast<bfloat16_t*>(row.param) + begin;
  auto* __restrict low8 = reinterpret_cast<int8_t*>(row.correction) + begin;
  auto* __restrict low16 = reinterpret_cast<int16_t*>(row.correction) + begin;
  switch (weight) {
    case Weight::nearest: return each(n, [&](int i) { narrow(block[i], high[i]); });
    case Weight::stochastic: return each(n, [&](int i) { encode(block[i], word<1>(at + i), high[i]); });
    case Weight::plus8: return each(n, [&](int i) { low8[i] = int8_t(parted24(block[i], word<1>(at + i), high[i]) >> 8); });
    case Weight::plus16: return each(n, [&](int i) { low16[i] = int16_t(parted(block[i], high[i])); });
  }
}

// Asks for the memory of a block that is swept soon.
void fetch_block(int64_t address, int64_t size, int64_t begin) {
  const char* from = reinterpret_cast<const char*>(address) + (begin + kAhead) * size;
  for (int64_t line = 0; line < kCoded * size; line += 64) __builtin_prefetch(from + line, 1);
}

template <class Rule, State state, bool full>
struct Stored {
  static constexpr int slots = full ? Rule::slots : Rule::lean;

  // Asks for the memory of slots that are read soon.
  static void fetch(const Row& row, int64_t begin) {
    constexpr int64_t size = state == State::wide ? 4 : state == State::bfloat16 ? 2 : 1;
    for (int s = 0; s < slots; ++s) fetch_block(row.slot[s], state == State::small && s ? sizeof(typename Second<Rule>::type) : size, begin);
  }

  template <class S>
  static S* at(const Row& row, int slot, int64_t begin) { return reinterpret_cast<S*>(row.slot[slot]) + begin; }

  // Slots as floats: in `blocks`, unless the memory holds floats itself.
  static void read(const Row& row, int64_t begin, int n, int unit, float (*blocks)[kCoded], float** slot) {
    for (int s = 0; s < slots; ++s) slot[s] = state == State::wide ? at<float>(row, s, begin) : blocks[s];
    if constexpr (state == State::bfloat16)
      for (int s = 0; s < slots && s < Rule::reads; ++s) widen_all(at<bfloat16_t>(row, s, begin), n, blocks[s]);
    if constexpr (state == State::small) {
      const auto* first = at<m8_t>(row, 0, begin);
      const auto* second = at<typename Second<Rule>::type>(row, 1, begin);
      float *__restrict values0 = blocks[0], *__restrict values1 = blocks[1];
      each(n, [&](int i) {
        values0[i] = widen(first[i], scale(second[i], unit));
        values1[i] = widen(second[i]);
      });
    }
  }

  static void write(const Row& row, int64_t begin, int n, int unit, float (*blocks)[kCoded], uint32_t at_first) {
    if constexpr (state == State::bfloat16) {
      auto *__restrict first = at<bfloat16_t>(row, 0, begin), *__restrict second = at<bfloat16_t>(row, 1, begin);
      const float *__restrict values0 = blocks[0], *__restrict values1 = blocks[1];
      each(n, [&](int i) {
        const uint32_t random = word<0>(at_first + i);
        encode(values0[i], turned(random), first[i]);
        encode(values1[i], random, second[i]);
      });
      if constexpr (slots > 2) encode_turned<1>(blocks[2], n, at_first, at<bfloat16_t>(row, 2, begin));
      if constexpr (slots > 3) encode_turned<2>(blocks[3], n, at_first, at<bfloat16_t>(row, 3, begin));
    }
    if constexpr (state == State::small) {
      auto* __restrict first = at<m8_t>(row, 0, begin);
      auto* __restrict second = at<typename Second<Rule>::type>(row, 1, begin);
      const float *__restrict values0 = blocks[0], *__restrict values1 = blocks[1];
      each(n, [&](int i) {
        const uint32_t random = word<0>(at_first + i);
        typename Second<Rule>::type code;
        encode(values1[i], random, code);
        encode(values0[i], turned(random), scale(code, unit), first[i]);
        second[i] = code;
      });
    }
  }

 private:
  template <class S>
  static void widen_all(const S* __restrict from, int n, float* __restrict to) {
    each(n, [&](int i) { to[i] = widen(from[i]); });
  }

  template <int j>
  static void encode_turned(const float* __restrict from, int n, uint32_t at_first, bfloat16_t* __restrict to) {
    each(n, [&](int i) { encode(from[i], turned(word<j>(at_first + i)), to[i]); });
  }
};

// As `update_range`, where state or weights are codes.
template <class Rule, State state, bool full>
void update_coded(const Bucket& bucket, const Row& row, const double* corrected, int64_t begin, int64_t end) {
  using Slots = Stored<Rule, state, full>;
  const auto c = coefficients<Rule, float>(corrected);
  const int64_t seed = row.seed ? *reinterpret_cast<const int64_t*>(row.seed) : 0;
  const uint32_t from = key(seed, *reinterpret_cast<const float*>(row.step)) + uint32_t(row.first);
  const int unit = int(seed >> 32);
  alignas(64) float grad_block[kCoded], param_block[kCoded], blocks[kMaxSlots][kCoded];
  float* slot[kMaxSlots] = {};
  for (int64_t i = begin; i < end;) {
    const int64_t in_run = i % row.run;  // places follow each other up to the end of a run
    const int n = int(std::min<int64_t>({kCoded, end - i, row.run - in_run}));
    const uint32_t at = from + uint32_t(i / row.run * row.stride + in_run);
    if (i + kAhead < end) {
      fetch_block(row.grad, size_of(bucket.grad), i), fetch_block(row.param, size_of(bucket.param), i), Slots::fetch(row, i);
      if (row.correction) fetch_block(row.correction, bucket.weight == Weight::plus8 ? 1 : 2, i);
    }
    const float* grad = read(bucket.grad, row.grad, i, n, grad_block);
    float* param = param_block;
    if (bucket.param == DType::bf16) read_weights(bucket.weight, row, i, n, param);
    else param = read(bucket.param, row.param, i, n, param_block);
    Slots::read(row, i, n, unit, blocks, slot);
    sweep<Rule, float, full>(c, n, grad, param, slot[0], slot[1], slot[2], slot[3]);
    Slots::write(row, i, n, unit, blocks, at);
    if (bucket.param == DType::bf16) write_weights(bucket.weight, row, i, n, param, at);
    else write(bucket.param, row.param, i, n, param);
    i += n;
  }
}

template <class Rule>
__attribute__((noinline)) void update_any_code(const Bucket& bucket, const Row& row, const double* c, int64_t begin, int64_t end) {
  switch (bucket.state) {
    case State::small: return update_coded<Rule, State::small, false>(bucket, row, c, begin, end);
    case State::bfloat16:
      return bucket.full ? update_coded<Rule, State::bfloat16, true>(bucket, row, c, begin, end) : update_coded<Rule, State::bfloat16, false>(bucket, row, c, begin, end);
    case State::wide:
      return bucket.full ? update_coded<Rule, State::wide, true>(bucket, row, c, begin, end) : update_coded<Rule, State::wide, false>(bucket, row, c, begin, end);
  }
}

// Sixteen sums side by side, whatever the registers: every instruction set adds in the same order.
constexpr int kWide = 4, kSums = 4;
template <class T> struct Wide { typedef T type __attribute__((vector_size(kWide * sizeof(T)))); };

template <class T>
double squares(DType dtype, int64_t address, int64_t begin, int64_t end) {
  typename Wide<double>::type sums[kSums] = {};
  T grad_block[kBlock];
  double rest = 0;
  for (int64_t i = begin; i < end; i += kBlock) {
    const int n = int(std::min<int64_t>(kBlock, end - i));
    const T* grad = read(dtype, address, i, n, grad_block);
    int k = 0;
    for (; k + kSums * kWide <= n; k += kSums * kWide)
      for (int s = 0; s < kSums; ++s) {
        typename Wide<T>::type loaded;
        memcpy(&loaded, grad + k + s * kWide, sizeof(loaded));
        const auto g = __builtin_convertvector(loaded, typename Wide<double>::type);
        sums[s] += g * g;
      }
    for (; k < n; ++k) rest += double(grad[k]) * double(grad[k]);
  }
  const auto sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  return rest + ((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

}  // namespace

#define NAMED_(name, isa) name##_##isa
#define NAMED(name, isa) NAMED_(name, isa)
double NAMED(sum_of_squares, ISA)(DType dtype, int64_t address, int64_t begin, int64_t end) {
  return dtype == DType::f64 ? squares<double>(dtype, address, begin, end) : squares<float>(dtype, address, begin, end);
}

void NAMED(update, ISA)(const Bucket& bucket, const Row& row, const double* c, int64_t begin, int64_t end) {
  with_rule(bucket.algorithm, [&](auto rule) {
    using Rule = typename decltype(rule)::type;
    const bool f64 = bucket.param == DType::f64;
    if (bucket.state != State::wide || bucket.weight != Weight::nearest) return update_any_code<Rule>(bucket, row, c, begin, end);
    if (bucket.full) f64 ? update_range<Rule, double, true>(bucket, row, c, begin, end) : update_range<Rule, float, true>(bucket, row, c, begin, end);
    else f64 ? update_range<Rule, double, false>(bucket, row, c, begin, end) : update_range<Rule, float, false>(bucket, row, c, begin, end);
  });
}
