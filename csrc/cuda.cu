#include <cuda_runtime.h>
#include <stdexcept>
#include <string>
#include "cuda.h"
#include "multi_tensor.h"

namespace {

template <class Rule, class P, class G, bool full>
__global__ void __launch_bounds__(kThreads)
update(const Row* rows, const int64_t* chunks, const double* coefficients, DType grad_dtype, const float* found_inf) {
  if (found_inf && *found_inf != 0.0f) return;
  update_chunk<Rule, P, G, full>(rows, chunks, coefficients, grad_dtype, blockIdx.x, threadIdx.x, kThreads);
}

// Block by block in a fixed order: no atomics, the same bits each time.
template <class G>
__global__ void __launch_bounds__(kThreads) sum_squares(const Row* rows, const int64_t* chunks, double* sums) {
  __shared__ double part[kThreads];
  part[threadIdx.x] = sum_of_squares<G>(rows, chunks, blockIdx.x, threadIdx.x, kThreads);
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) part[threadIdx.x] += part[threadIdx.x + half];
  }
  if (threadIdx.x == 0) sums[blockIdx.x] = part[0];
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

}  // namespace

void run_cuda(const Bucket& bucket, int64_t chunks, int64_t n_chunks, int64_t found_inf, int device, int64_t stream) {
  const DeviceGuard guard(device);
  auto launch = [&](auto rule, auto param, auto grad, auto full) {
    using P = typename decltype(param)::type;
    using G = typename decltype(grad)::type;
    update<typename decltype(rule)::type, P, G, decltype(full)::value><<<unsigned(n_chunks), kThreads, 0, reinterpret_cast<cudaStream_t>(stream)>>>(
        bucket.rows, reinterpret_cast<const int64_t*>(chunks), bucket.coefficients, bucket.grad, reinterpret_cast<const float*>(found_inf));
  };
  with_rule(bucket.algorithm, [&](auto rule) {
    with_dtype(bucket.param, [&](auto param) {
      auto with_grad = [&](auto grad) { bucket.full ? launch(rule, param, grad, std::true_type{}) : launch(rule, param, grad, std::false_type{}); };
      bucket.param == bucket.grad ? with_grad(param) : with_grad(Type<AnyGrad>{});
    });
  });
  check(cudaGetLastError(), "launching the update");
}

void sum_of_squares_cuda(const Bucket& bucket, int64_t chunks, int64_t n_chunks, int64_t sums, int device, int64_t stream) {
  const DeviceGuard guard(device);
  with_dtype(bucket.grad, [&](auto grad) {
    sum_squares<typename decltype(grad)::type><<<unsigned(n_chunks), kThreads, 0, reinterpret_cast<cudaStream_t>(stream)>>>(
        bucket.rows, reinterpret_cast<const int64_t*>(chunks), reinterpret_cast<double*>(sums));
  });
  check(cudaGetLastError(), "launching the sum of squares");
}
