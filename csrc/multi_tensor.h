// What one thread of the CUDA kernels does. Host and device code: a C++ test runs it thread by thread on the host.
#pragma once
#include <type_traits>
#include "codes.h"
#include "decision.h"
#include "dispatch.h"

#ifdef __CUDACC__
#define THREAD_FN __host__ __device__ inline
#else
#define THREAD_FN inline
#endif
#ifdef __CUDA_ARCH__
#define UNROLL _Pragma("unroll")
#else
#define UNROLL
#endif

// Macros, for bench/tune.py alone to vary.
#ifndef ADABAYES_CHUNK
#define ADABAYES_CHUNK 16384
#define ADABAYES_THREADS 256
#define ADABAYES_PACKS 1
#define ADABAYES_STREAMING 0
#endif

constexpr int64_t kChunk = ADABAYES_CHUNK;  // elements a block takes
constexpr int kThreads = ADABAYES_THREADS;
constexpr int kPacks = ADABAYES_PACKS;  // a thread's loads of each stream before its first store

// Chunk map: one word a block, the row's index above the number of the chunk in its tensor.
RULE_FN int64_t row_of(int64_t entry) { return entry >> 32; }
RULE_FN int64_t chunk_of(int64_t entry) { return entry & 0xffffffff; }

// What a launch reads in device memory. `tickets`: one word a row, zero between launches; `decision`: null where the host has made it.
struct Table {
  const Row* rows;
  const int64_t* chunks;
  unsigned long long* tickets;
  const double* numbers;
  const Decision* decision;

  RULE_FN const Row& row(int64_t block) const { return rows[row_of(chunks[block])]; }
  RULE_FN bool skipped() const { return decision && decision->skip != 0; }
};

// The i-th coefficient of a block's tensor.
RULE_FN double coefficient(const Table& table, int64_t block, int i) {
  const Row& row = table.row(block);
  return coefficient(table.numbers + row.group * kNumbers, i, *reinterpret_cast<const float*>(row.step), table.decision ? table.decision->factor : 1.0);
}

// Raises the step count of a block's tensor, once every block of that tensor has read it: the last to ask does so.
RULE_FN void count_step(const Table& table, int64_t block) {
  const Row& row = table.row(block);
  unsigned long long* ticket = table.tickets + row_of(table.chunks[block]);
  if (row.numel > kChunk) {
    const auto blocks = static_cast<unsigned long long>((row.numel + kChunk - 1) / kChunk);
#ifdef __CUDA_ARCH__
    __threadfence();
    if (atomicAdd(ticket, 1ull) + 1 < blocks) return;
#else
    if (++*ticket < blocks) return;
#endif
    *ticket = 0;
  }
  *reinterpret_cast<float*>(row.step) += 1;
}

// N values moved by the widest accesses their alignment allows.
template <class T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack { T value[N]; };

// Gradients of another dtype than the parameters': which one is looked up at run time, alike in a whole block.
struct AnyGrad {};

#if defined(__CUDA_ARCH__) && ADABAYES_STREAMING
// 16 bytes at a time, marked as not needed again.
template <class P>
RULE_FN P read(const P* from) {
  if constexpr (sizeof(P) % 16) return *from;
  else {
    P pack;
    UNROLL
    for (int k = 0; k < int(sizeof(P) / 16); ++k) reinterpret_cast<int4*>(&pack)[k] = __ldcs(reinterpret_cast<const int4*>(from) + k);
    return pack;
  }
}
template <class P>
RULE_FN void write(P* to, const P& pack) {
  if constexpr (sizeof(P) % 16) *to = pack;
  else {
    UNROLL
    for (int k = 0; k < int(sizeof(P) / 16); ++k) __stcs(reinterpret_cast<int4*>(to) + k, reinterpret_cast<const int4*>(&pack)[k]);
  }
}
#else
template <class P> RULE_FN P read(const P* from) { return *from; }
template <class P> RULE_FN void write(P* to, const P& pack) { *to = pack; }
#endif

template <int N, class S, class T>
RULE_FN void load(const S* from, int i, T* to) {
  const Pack<S, N> pack = read(reinterpret_cast<const Pack<S, N>*>(from + i));
  UNROLL
  for (int k = 0; k < N; ++k) to[k] = T(widen(pack.value[k]));
}

// code(k, out): what is stored of the k-th value
template <int N, class S, class F>
RULE_FN void store_codes(S* to, int i, F code) {
  Pack<S, N> pack;
  UNROLL
  for (int k = 0; k < N; ++k) code(k, pack.value[k]);
  write(reinterpret_cast<Pack<S, N>*>(to + i), pack);
}

template <int N, class S, class T>
RULE_FN void store(S* to, int i, const T* from) {
  store_codes<N>(to, i, [&](int k, S& out) { narrow(from[k], out); });
}

template <int N, class G, class T>
RULE_FN void load_grad(DType dtype, int64_t address, int i, T* to) {
  if constexpr (std::is_same_v<G, AnyGrad>) {
    switch (dtype) {
      case DType::f32: return load<N>(reinterpret_cast<const float*>(address), i, to);
      case DType::f64: return load<N>(reinterpret_cast<const double*>(address), i, to);
      case DType::f16: return load<N>(reinterpret_cast<const half_t*>(address), i, to);
      case DType::bf16: break;
    }
    load<N>(reinterpret_cast<const bfloat16_t*>(address), i, to);
  } else {
    load<N>(reinterpret_cast<const G*>(address), i, to);
  }
}

// What a launch updates, as types. `parts`: the weights' rounding is another than to nearest, which is looked up at run time.
template <class Rule_, class P_, class G_, bool full, State state_, bool parts_>
struct Kind {
  using Rule = Rule_;
  using P = P_;
  using G = G_;
  using T = typename Compute<P>::type;
  using Coefficients = typename Rule::template Coefficients<T>;
  static constexpr int slots = full ? Rule::slots : Rule::lean, reads = full ? Rule::reads : Rule::lean;
  static constexpr State state = state_;
  static constexpr bool parts = parts_, coded = parts || state != State::wide;
  using Slot = std::conditional_t<state == State::wide, T, std::conditional_t<state == State::bfloat16, bfloat16_t, m8_t>>;  // but the second's
  using SecondSlot = std::conditional_t<state == State::small, typename Second<Rule>::type, Slot>;
};

// What codes take, alike in a chunk.
struct Codes {
  DType grad;
  Weight weight;
  int unit;
  uint32_t from;  // the key, and where the tensor begins in the whole one
  int64_t begin, run, stride;

  RULE_FN Codes(const Row& row, int64_t begin, DType grad, Weight weight, bool coded)
      : grad(grad), weight(weight), unit(0), from(0), begin(begin), run(row.run), stride(row.stride) {
    if (!coded || !row.seed) return;
    const int64_t seed = *reinterpret_cast<const int64_t*>(row.seed);
    unit = int(seed >> 32), from = key(seed, *reinterpret_cast<const float*>(row.step)) + uint32_t(row.first);
  }

  // What the random numbers of the chunk's i-th element are made of.
  RULE_FN uint32_t at(int i) const {
    const int64_t e = begin + i;
    return from + uint32_t(e < run ? e : e / run * stride + e % run);
  }
};

template <class K, int N>
RULE_FN void load_state(const Row& row, int i, const Codes& codes, typename K::T (*slot)[N]) {
  if constexpr (K::state == State::small) {
    load<N>(reinterpret_cast<const typename K::SecondSlot*>(row.slot[1]), i, slot[1]);
    const Pack<m8_t, N> first = read(reinterpret_cast<const Pack<m8_t, N>*>(row.slot[0] + i));
    UNROLL
    for (int n = 0; n < N; ++n) slot[0][n] = widen(first.value[n], scale<typename K::Rule>(slot[1][n], codes.unit));
  } else {
    UNROLL
    for (int s = 0; s < K::reads; ++s) load<N>(reinterpret_cast<const typename K::Slot*>(row.slot[s]), i, slot[s]);
  }
}

template <class K, int N>
RULE_FN void store_state(const Row& row, int i, const Codes& codes, const typename K::T (*slot)[N]) {
  if constexpr (K::state == State::wide) {
    UNROLL
    for (int s = 0; s < K::slots; ++s) store<N>(reinterpret_cast<typename K::Slot*>(row.slot[s]), i, slot[s]);
  } else {
    auto at = [&](int s) { return reinterpret_cast<typename K::Slot*>(row.slot[s]); };
    uint32_t random[N];
    UNROLL
    for (int n = 0; n < N; ++n) random[n] = word<0>(codes.at(i + n));
    typename K::SecondSlot second[N];
    store_codes<N>(reinterpret_cast<typename K::SecondSlot*>(row.slot[1]), i, [&](int n, auto& out) { encode(slot[1][n], random[n], out), second[n] = out; });
    store_codes<N>(at(0), i, [&](int n, auto& out) {
      if constexpr (K::state == State::small) encode(slot[0][n], turned(random[n]), scale<typename K::Rule>(widen(second[n]), codes.unit), out);
      else encode(slot[0][n], turned(random[n]), out);
    });
    if constexpr (K::slots > 2) store_codes<N>(at(2), i, [&](int n, auto& out) { encode(slot[2][n], turned(word<1>(codes.at(i + n))), out); });
    if constexpr (K::slots > 3) store_codes<N>(at(3), i, [&](int n, auto& out) { encode(slot[3][n], turned(word<2>(codes.at(i + n))), out); });
  }
}

// Weights of which `load` has read the upper half: the correction is added.
template <int N>
RULE_FN void join(const Row& row, int i, const Codes& codes, float* param) {
  auto add = [&](int k, int low) { param[k] = joined({uint16_t(bits_of(param[k]) >> 16)}, low); };
  if (codes.weight == Weight::plus8) {
    const auto low = read(reinterpret_cast<const Pack<int8_t, N>*>(row.correction + i));
    UNROLL
    for (int k = 0; k < N; ++k) add(k, low.value[k] * 256);
  } else if (codes.weight == Weight::plus16) {
    const auto low = read(reinterpret_cast<const Pack<int16_t, N>*>(row.correction + 2 * i));
    UNROLL
    for (int k = 0; k < N; ++k) add(k, low.value[k]);
  }
}

template <int N>
RULE_FN void store_weights(const Row& row, int i, const Codes& codes, const float* param) {
  auto* const high = reinterpret_cast<bfloat16_t*>(row.param);
  auto random = [&](int n) { return word<1>(codes.at(i + n)); };
  if (codes.weight == Weight::stochastic) return store_codes<N>(high, i, [&](int n, auto& out) { encode(param[n], random(n), out); });
  int low[N];
  store_codes<N>(high, i, [&](int n, auto& out) { low[n] = codes.weight == Weight::plus8 ? parted24(param[n], random(n), out) : parted(param[n], out); });
  if (codes.weight == Weight::plus8) store_codes<N>(reinterpret_cast<int8_t*>(row.correction), i, [&](int n, int8_t& out) { out = int8_t(low[n] >> 8); });
  else store_codes<N>(reinterpret_cast<int16_t*>(row.correction), i, [&](int n, int16_t& out) { out = int16_t(low[n]); });
}

// Packs of N consecutive elements of one tensor, `stride` apart: all loads, the rule, all stores.
template <class K, int N, int packs>
RULE_FN void update_packs(const typename K::Coefficients& c, const Row& row, const Codes& codes, int i, int stride) {
  typename K::T grad[packs][N], param[packs][N], slot[packs][kMaxSlots][N] = {};
  UNROLL
  for (int k = 0; k < packs; ++k) {
    load_grad<N, typename K::G>(codes.grad, row.grad, i + k * stride, grad[k]);
    load<N>(reinterpret_cast<const typename K::P*>(row.param), i + k * stride, param[k]);
    if constexpr (K::parts) join<N>(row, i + k * stride, codes, param[k]);
    load_state<K, N>(row, i + k * stride, codes, slot[k]);
  }
  UNROLL
  for (int k = 0; k < packs; ++k) {
    UNROLL
    for (int n = 0; n < N; ++n)
      K::Rule::update(c, grad[k][n], param[k][n], slot[k][0][n], slot[k][1][n], slot[k][2][n], slot[k][3][n]);
    if constexpr (K::parts) store_weights<N>(row, i + k * stride, codes, param[k]);
    else store<N>(reinterpret_cast<typename K::P*>(row.param), i + k * stride, param[k]);
    store_state<K, N>(row, i + k * stride, codes, slot[k]);
  }
}

// Elements of a row, `begin` and the next `count`: those of the block's chunk.
struct Chunk {
  int64_t begin;
  int count;
  RULE_FN Chunk(const Row& row, int64_t entry)
      : begin(chunk_of(entry) * kChunk), count(int(row.numel - begin < kChunk ? row.numel - begin : kChunk)) {}
  // How many of them are moved N at a time.
  RULE_FN int packed(bool aligned, int N) const { return aligned ? count / N * N : 0; }
};

// One thread's part of the sum of a chunk's squared gradients. In double: float overflows at a norm of 1.8e19.
template <class G>
THREAD_FN double sum_of_squares(const Table& table, int64_t block, int thread, int threads) {
  constexpr int N = 16 / sizeof(G);
  const Row row = table.row(block);
  const Chunk chunk(row, table.chunks[block]);
  const int packed = chunk.packed((row.grad & 15) == 0, N);
  const G* grad = reinterpret_cast<const G*>(row.grad) + chunk.begin;
  double sum = 0, g[N];
  for (int i = thread * N; i < packed; i += threads * N) {
    load<N>(grad, i, g);
    UNROLL
    for (int k = 0; k < N; ++k) sum += g[k] * g[k];
  }
  for (int i = packed + thread; i < chunk.count; i += threads) {
    load<1>(grad, i, g);
    sum += g[0] * g[0];
  }
  return sum;
}

template <class K>
THREAD_FN void update_chunk(const Table& table, const typename K::Coefficients& c, DType grad_dtype, Weight weight, int64_t block, int thread, int threads) {
  // The parameter's type fills a 16-byte access; narrower gradients' and codes' are shorter.
  constexpr int N = 16 / sizeof(typename K::P);
  Row row = table.row(block);
  const Chunk chunk(row, table.chunks[block]);
  const bool aligned = ((row.param | row.grad | row.slot[0] | row.slot[1] | row.slot[2] | row.slot[3] | row.correction) & 15) == 0;
  const Codes codes(row, chunk.begin, grad_dtype, weight, K::coded);
  row.param += chunk.begin * int64_t(sizeof(typename K::P)), row.grad += chunk.begin * size_of(grad_dtype);
  UNROLL
  for (int s = 0; s < kMaxSlots; ++s) row.slot[s] += chunk.begin * int64_t(s == 1 ? sizeof(typename K::SecondSlot) : sizeof(typename K::Slot));
  if constexpr (K::parts) row.correction += chunk.begin * (weight == Weight::plus8 ? 1 : 2);
  const int packed = chunk.packed(aligned, N), stride = threads * N;
  int i = thread * N;
  if constexpr (kPacks > 1)
    for (; i + (kPacks - 1) * stride < packed; i += kPacks * stride) update_packs<K, N, kPacks>(c, row, codes, i, stride);
  for (; i < packed; i += stride) update_packs<K, N, 1>(c, row, codes, i, 0);
  for (i = packed + thread; i < chunk.count; i += threads) update_packs<K, 1, 1>(c, row, codes, i, 0);
}
