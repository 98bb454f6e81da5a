#include <cuda_runtime.h>
#include <stdexcept>
#include <string>
#include "cuda.h"
#include "multi_tensor.h"

namespace {

template <class K>
__global__ void __launch_bounds__(kThreads, sizeof(typename K::P) == 4 ? 3 : 2) update(const Table table, DType grad_dtype) {
  using T = typename K::T;
  __shared__ T c[kCoefficients];
  __shared__ uint32_t random;
  if (table.skipped()) return;
  if (threadIdx.x < kCoefficients) c[threadIdx.x] = T(coefficient(table, blockIdx.x, threadIdx.x));
  if (K::coded && threadIdx.x == kCoefficients) random = key(table, blockIdx.x);
  __syncthreads();  // after which the step count may be raised
  update_chunk<K>(table, coefficients<typename K::Rule, T>(c), K::coded ? random : 0, grad_dtype, blockIdx.x, threadIdx.x, kThreads);
  if (threadIdx.x == 0) count_step(table, blockIdx.x);
}

// The sum of a value of each of a block's threads, for the first of them. Of doubles in a fixed order: the same bits each time.
template <int threads>
__device__ double sum_of_block(double value) {
  __shared__ double part[threads];
  part[threadIdx.x] = value;
  for (int half = threads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) part[threadIdx.x] += part[threadIdx.x + half];
  }
  return part[0];
}

template <class G>
__global__ void __launch_bounds__(kThreads) sum_squares(const Table table, double* sums) {
  const double sum = sum_of_block<kThreads>(sum_of_squares<G>(table, blockIdx.x, threadIdx.x, kThreads));
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

constexpr int kDeciding = 1024;  // threads

__global__ void __launch_bounds__(kDeciding)
make_decision(const double* sums, int64_t n, const float* grad_scale, double known_scale, const float* found_inf, double max_norm,
              bool skip_nonfinite, Decision* decision, unsigned long long* skipped) {
  double sum = 0;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < n; i += kDeciding) sum += sums[i];
  sum = sum_of_block<kDeciding>(sum);
  if (threadIdx.x > 0) return;
  *decision = decide(sum, grad_scale ? double(*grad_scale) : known_scale, found_inf && *found_inf != 0, max_norm, skip_nonfinite);
  if (decision->skip != 0) ++*skipped;
}

void check(cudaError_t status, const char* doing) {
  if (status != cudaSuccess) throw std::runtime_error(std::string("adabayes_fused, ") + doing + ": " + cudaGetErrorString(status));
}

// Makes `device` current for a scope.
struct DeviceGuard {
  int previous = 0;
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&previous), "asking for the current device");
    if (device != previous) check(cudaSetDevice(device), "choosing a device");
  }
  ~DeviceGuard() { cudaSetDevice(previous); }
};

template <class T>
T* at(int64_t address) { return reinterpret_cast<T*>(address); }

Table table_of(const Bucket& bucket, int64_t chunks, int64_t n_chunks, int64_t decision) {
  return {bucket.rows, at<int64_t>(chunks), at<unsigned long long>(chunks) + n_chunks, bucket.numbers, at<Decision>(decision)};
}

template <class Rule, class P, Weight weight, class F>
void with_coded(const Bucket& bucket, F f) {
  if (bucket.state == State::small) return f(update<Kind<Rule, P, AnyGrad, false, State::small, weight>>);
  if (bucket.state == State::bfloat16)
    return bucket.full ? f(update<Kind<Rule, P, AnyGrad, true, State::bfloat16, weight>>) : f(update<Kind<Rule, P, AnyGrad, false, State::bfloat16, weight>>);
  if constexpr (weight != Weight::nearest)
    bucket.full ? f(update<Kind<Rule, P, AnyGrad, true, State::wide, weight>>) : f(update<Kind<Rule, P, AnyGrad, false, State::wide, weight>>);
}

template <class Rule, class P, class G, class F>
void with_wide(const Bucket& bucket, F f) {
  bucket.full ? f(update<Kind<Rule, P, G, true, State::wide, Weight::nearest>>) : f(update<Kind<Rule, P, G, false, State::wide, Weight::nearest>>);
}

template <class Rule, class P, class F>
void with_storage(const Bucket& bucket, F f) {
  if constexpr (std::is_same_v<P, bfloat16_t>) switch (bucket.weight) {
    case Weight::nearest: break;
    case Weight::stochastic: return with_coded<Rule, P, Weight::stochastic>(bucket, f);
    case Weight::plus8: return with_coded<Rule, P, Weight::plus8>(bucket, f);
    case Weight::plus16: return with_coded<Rule, P, Weight::plus16>(bucket, f);
  }
  if constexpr (!std::is_same_v<P, double>)
    if (bucket.state != State::wide) return with_coded<Rule, P, Weight::nearest>(bucket, f);
  bucket.param == bucket.grad ? with_wide<Rule, P, P>(bucket, f) : with_wide<Rule, P, AnyGrad>(bucket, f);
}

// f(the update of such a bucket)
template <class F>
void with_update(const Bucket& bucket, F f) {
  with_rule(bucket.algorithm, [&](auto rule) {
    with_dtype(bucket.param, [&](auto param) { with_storage<typename decltype(rule)::type, typename decltype(param)::type>(bucket, f); });
  });
}

}  // namespace

void run_cuda(const Bucket& bucket, int64_t chunks, int64_t n_chunks, int64_t decision, int device, int64_t stream) {
  const DeviceGuard guard(device);
  const Table table = table_of(bucket, chunks, n_chunks, decision);
  with_update(bucket, [&](auto kernel) { kernel<<<unsigned(n_chunks), kThreads, 0, at<CUstream_st>(stream)>>>(table, bucket.grad); });
  check(cudaGetLastError(), "launching the update");
}

void sum_of_squares_cuda(const Bucket& bucket, int64_t chunks, int64_t n_chunks, int64_t sums, int device, int64_t stream) {
  const DeviceGuard guard(device);
  const Table table = table_of(bucket, chunks, n_chunks, 0);
  with_dtype(bucket.grad, [&](auto grad) {
    sum_squares<typename decltype(grad)::type><<<unsigned(n_chunks), kThreads, 0, at<CUstream_st>(stream)>>>(table, at<double>(sums));
  });
  check(cudaGetLastError(), "launching the sum of squares");
}

void decide_cuda(int64_t sums, int64_t n, int64_t grad_scale, double known_scale, int64_t found_inf, double max_norm, bool skip_nonfinite,
                 int64_t decision, int64_t skipped, int device, int64_t stream) {
  const DeviceGuard guard(device);
  make_decision<<<1, kDeciding, 0, at<CUstream_st>(stream)>>>(at<double>(sums), n, at<float>(grad_scale), known_scale, at<float>(found_inf), max_norm,
                                                            skip_nonfinite, at<Decision>(decision), at<unsigned long long>(skipped));
  check(cudaGetLastError(), "launching the decision");
}

std::string why_not_cuda(const Bucket& bucket, int device) {
  const DeviceGuard guard(device);
  cudaError_t status = cudaSuccess;
  with_update(bucket, [&](auto kernel) {
    cudaFuncAttributes attributes;
    status = cudaFuncGetAttributes(&attributes, kernel);
  });
  cudaGetLastError();  // which would else be found by whoever asks next
  return status == cudaSuccess ? "" : cudaGetErrorString(status);
}
