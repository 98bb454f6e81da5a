// What one thread of the CUDA kernels does. Host and device code: a C++ test runs it thread by thread on the host.
#pragma once
#include <type_traits>
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

template <int N, class S, class T>
RULE_FN void store(S* to, int i, const T* from) {
  Pack<S, N> pack;
  UNROLL
  for (int k = 0; k < N; ++k) narrow(from[k], pack.value[k]);
  write(reinterpret_cast<Pack<S, N>*>(to + i), pack);
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

// K packs of N consecutive elements of one tensor, `stride` apart: all loads, the rule, all stores.
template <class Rule, class P, class G, bool full, int N, int K, class T = typename Compute<P>::type>
RULE_FN void update_packs(const typename Rule::template Coefficients<T>& c, const Row& row, DType grad_dtype, int i, int stride) {
  constexpr int slots = full ? Rule::slots : Rule::lean, reads = full ? Rule::reads : Rule::lean;
  T grad[K][N], param[K][N], slot[K][kMaxSlots][N] = {};
  UNROLL
  for (int k = 0; k < K; ++k) {
    load_grad<N, G>(grad_dtype, row.grad, i + k * stride, grad[k]);
    load<N>(reinterpret_cast<const P*>(row.param), i + k * stride, param[k]);
    UNROLL
    for (int s = 0; s < reads; ++s) load<N>(reinterpret_cast<const T*>(row.slot[s]), i + k * stride, slot[k][s]);
  }
  UNROLL
  for (int k = 0; k < K; ++k) {
    UNROLL
    for (int n = 0; n < N; ++n) Rule::update(c, grad[k][n], param[k][n], slot[k][0][n], slot[k][1][n], slot[k][2][n], slot[k][3][n]);
    store<N>(reinterpret_cast<P*>(row.param), i + k * stride, param[k]);
    UNROLL
    for (int s = 0; s < slots; ++s) store<N>(reinterpret_cast<T*>(row.slot[s]), i + k * stride, slot[k][s]);
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

template <class Rule, class P, class G, bool full, class T = typename Compute<P>::type>
THREAD_FN void update_chunk(const Table& table, const typename Rule::template Coefficients<T>& c, DType grad_dtype, int64_t block, int thread, int threads) {
  // The parameter's type fills a 16-byte access; a narrower gradient's is shorter.
  constexpr int N = 16 / sizeof(P);
  Row row = table.row(block);
  const Chunk chunk(row, table.chunks[block]);
  const bool aligned = ((row.param | row.grad | row.slot[0] | row.slot[1] | row.slot[2] | row.slot[3]) & 15) == 0;
  row.param += chunk.begin * int64_t(sizeof(P)), row.grad += chunk.begin * size_of(grad_dtype);
  UNROLL
  for (int s = 0; s < kMaxSlots; ++s) row.slot[s] += chunk.begin * int64_t(sizeof(T));
  const int packed = chunk.packed(aligned, N), stride = threads * N;
  int i = thread * N;
  if constexpr (kPacks > 1)
    for (; i + (kPacks - 1) * stride < packed; i += kPacks * stride) update_packs<Rule, P, G, full, N, kPacks>(c, row, grad_dtype, i, stride);
  for (; i < packed; i += stride) update_packs<Rule, P, G, full, N, 1>(c, row, grad_dtype, i, 0);
  for (i = packed + thread; i < chunk.count; i += threads) update_packs<Rule, P, G, full, 1, 1>(c, row, grad_dtype, i, 0);
}
