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

// The key of a block's tensor; 0 where nothing is random.
RULE_FN uint32_t key(const Table& table, int64_t block) {
  const Row& row = table.row(block);
  return row.seed ? key(*reinterpret_cast<const int64_t*>(row.seed), *reinterpret_cast<const float*>(row.step)) : 0;
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

template <int N, class G, class T>
RULE_FN void load_grad(DType dtype, int64_t address, int i, T* to) {
  if constexpr (std::is_same_v<G, AnyGrad>) {
    switch (dtype) {
      case DType::f32: return load<N>(reinterpret_cast<const float*>(address), i, to);
      case DType::f64: return load<N>(reinterpret_cast<const double*>(address), i, to);
      case DType::f16: return load<N>(reinterpret_cast<const half_t*>(address), i, to);
      default: break;
    }
    load<N>(reinterpret_cast<const bfloat16_t*>(address), i, to);
  } else {
    load<N>(reinterpret_cast<const G*>(address), i, to);
  }
}

// What a launch updates, as types.
template <class Rule_, class P_, class G_, bool full, State state_, Weight weight_>
struct Kind {
  using Rule = Rule_;
  using P = P_;
  using G = G_;
  using T = typename Compute<P>::type;
  using Coefficients = typename Rule::template Coefficients<T>;
  static constexpr int slots = full ? Rule::slots : Rule::lean, reads = full ? Rule::reads : Rule::lean;
  static constexpr State state = state_;
  static constexpr Weight weight = weight_;
  static constexpr bool coded = weight != Weight::nearest || state != State::wide, corrected = weight == Weight::plus8 || weight == Weight::plus16;
  using Slot = std::conditional_t<state == State::wide, T, std::conditional_t<state == State::bfloat16, bfloat16_t, m8_t>>;  // but the second's
  using SecondSlot = std::conditional_t<state == State::small, typename Second<Rule>::type, Slot>;
  using Low = std::conditional_t<weight == Weight::plus8, int8_t, int16_t>;
};

// What codes take, alike in a chunk.
struct Codes {
  int unit = 0;
  uint32_t from = 0;       // of the chunk's first element, where it is part of a run
  int64_t begin, run, stride;
  bool whole;              // one run, as but for shards

  RULE_FN Codes(const Row& row, int64_t begin, uint32_t key) : begin(begin), run(row.run), stride(row.stride), whole(row.numel <= row.run) {
    if (row.seed) unit = int(*reinterpret_cast<const int64_t*>(row.seed) >> 32);
    from = key + uint32_t(row.first) + (whole ? uint32_t(begin) : 0);
  }

  // Whether N elements that are accessed at once follow each other in the whole tensor.
  RULE_FN bool packed(int N) const { return whole || run % N == 0; }

  // What the random numbers of the chunk's i-th element are made of; of the next ones of a pack, that and how far they are.
  RULE_FN uint32_t at(int i) const {
    const int64_t e = begin + i;
    return from + uint32_t(whole ? i : e / run * stride + e % run);
  }
};

// Consecutive elements of a tensor as they are stored, and each as it is computed with.
template <class K, int N>
struct Elements {
  using T = typename K::T;
  typename K::T grad[N];
  Pack<typename K::P, N> param;
  Pack<typename K::Slot, N> first, third, fourth;
  Pack<typename K::SecondSlot, N> second;
  Pack<typename K::Low, N> low;

  template <class S>
  static RULE_FN Pack<S, N>* in(int64_t address, int i) { return reinterpret_cast<Pack<S, N>*>(reinterpret_cast<S*>(address) + i); }

  RULE_FN void load(const Row& row, DType grad_dtype, int i) {
    load_grad<N, typename K::G>(grad_dtype, row.grad, i, grad);
    param = read(in<typename K::P>(row.param, i));
    first = read(in<typename K::Slot>(row.slot[0], i));
    second = read(in<typename K::SecondSlot>(row.slot[1], i));
    if constexpr (K::reads > 2) third = read(in<typename K::Slot>(row.slot[2], i));
    if constexpr (K::corrected) low = read(in<typename K::Low>(row.correction, i));
  }

  RULE_FN void store(const Row& row, int i) const {
    write(in<typename K::P>(row.param, i), param);
    write(in<typename K::Slot>(row.slot[0], i), first);
    write(in<typename K::SecondSlot>(row.slot[1], i), second);
    if constexpr (K::slots > 2) write(in<typename K::Slot>(row.slot[2], i), third);
    if constexpr (K::slots > 3) write(in<typename K::Slot>(row.slot[3], i), fourth);
    if constexpr (K::corrected) write(in<typename K::Low>(row.correction, i), low);
  }

  RULE_FN void update(const typename K::Coefficients& c, int n, int unit, uint32_t at) {
    T w = weight(n), m, u = T(widen(second.value[n])), v = T(0), post = T(0);
    if constexpr (K::state == State::small) m = widen(first.value[n], scale(second.value[n], unit));
    else m = T(widen(first.value[n]));
    if constexpr (K::reads > 2) v = T(widen(third.value[n]));
    K::Rule::update(c, grad[n], w, m, u, v, post);
    keep_weight(n, w, at);
    keep_state(n, m, u, v, post, unit, at);
  }

 private:
  RULE_FN T weight(int n) const {
    if constexpr (K::weight == Weight::plus8) return joined(param.value[n], low.value[n] * 256);
    else if constexpr (K::weight == Weight::plus16) return joined(param.value[n], low.value[n]);
    else return T(widen(param.value[n]));
  }

  RULE_FN void keep_weight(int n, T w, uint32_t at) {
    if constexpr (K::weight == Weight::stochastic) encode(w, word<1>(at), param.value[n]);
    else if constexpr (K::weight == Weight::plus8) low.value[n] = int8_t(parted24(w, word<1>(at), param.value[n]) >> 8);
    else if constexpr (K::weight == Weight::plus16) low.value[n] = int16_t(parted(w, param.value[n]));
    else narrow(w, param.value[n]);
  }

  RULE_FN void keep_state(int n, T m, T u, T v, T post, int unit, uint32_t at) {
    if constexpr (K::state == State::wide) {
      first.value[n] = m, second.value[n] = u, third.value[n] = v, fourth.value[n] = post;
    } else {
      const uint32_t random = word<0>(at);
      encode(u, random, second.value[n]);
      if constexpr (K::state == State::small) encode(m, turned(random), scale(second.value[n], unit), first.value[n]);
      else encode(m, turned(random), first.value[n]);
      if constexpr (K::slots > 2) encode(v, turned(word<1>(at)), third.value[n]);
      if constexpr (K::slots > 3) encode(post, turned(word<2>(at)), fourth.value[n]);
    }
  }
};

// Packs of N consecutive elements of one tensor, `stride` apart: all loads, the rule, all stores.
template <class K, int N, int packs>
RULE_FN void update_packs(const typename K::Coefficients& c, const Row& row, DType grad_dtype, const Codes& codes, int i, int stride) {
  Elements<K, N> elements[packs];
  UNROLL
  for (int k = 0; k < packs; ++k) elements[k].load(row, grad_dtype, i + k * stride);
  UNROLL
  for (int k = 0; k < packs; ++k) {
    const uint32_t at = codes.at(i + k * stride);
    UNROLL
    for (int n = 0; n < N; ++n) elements[k].update(c, n, codes.unit, at + n);
    elements[k].store(row, i + k * stride);
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

// `c` and `key` were read by then: the step count may have been raised.
template <class K>
THREAD_FN void update_chunk(const Table& table, const typename K::Coefficients& c, uint32_t key, DType grad_dtype, int64_t block, int thread, int threads) {
  // The parameter's type fills a 16-byte access; narrower gradients' and codes' are shorter.
  constexpr int N = 16 / sizeof(typename K::P);
  Row row = table.row(block);
  const Chunk chunk(row, table.chunks[block]);
  const bool aligned = ((row.param | row.grad | row.slot[0] | row.slot[1] | row.slot[2] | row.slot[3] | row.correction) & 15) == 0;
  const Codes codes(K::coded ? row : Row{}, chunk.begin, key);
  row.param += chunk.begin * int64_t(sizeof(typename K::P)), row.grad += chunk.begin * size_of(grad_dtype);
  UNROLL
  for (int s = 0; s < kMaxSlots; ++s) row.slot[s] += chunk.begin * int64_t(s == 1 ? sizeof(typename K::SecondSlot) : sizeof(typename K::Slot));
  row.correction += chunk.begin * int64_t(sizeof(typename K::Low));
  const int packed = chunk.packed(aligned && codes.packed(N), N), stride = threads * N;
  int i = thread * N;
  if constexpr (kPacks > 1)
    for (; i + (kPacks - 1) * stride < packed; i += kPacks * stride) update_packs<K, N, kPacks>(c, row, grad_dtype, codes, i, stride);
  for (; i < packed; i += stride) update_packs<K, N, 1>(c, row, grad_dtype, codes, i, 0);
  for (i = packed + thread; i < chunk.count; i += threads) update_packs<K, 1, 1>(c, row, grad_dtype, codes, i, 0);
}
