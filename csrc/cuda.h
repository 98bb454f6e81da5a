// The CUDA driver: one launch a bucket. The table lies in device memory.
#pragma once
#include <cstdint>
#include "table.h"

// `chunks`: device address of the chunk map (multi_tensor.h); `found_inf`: device address of a float that, when not
// zero, makes the launch change nothing, or 0. Throws std::runtime_error with CUDA's words when the launch is refused.
void run_cuda(const Bucket& bucket, int64_t chunks, int64_t n_chunks, int64_t found_inf, int device, int64_t stream);

// Writes, for every chunk, the sum of its gradients' squares to `sums`, device address of n_chunks doubles.
void sum_of_squares_cuda(const Bucket& bucket, int64_t chunks, int64_t n_chunks, int64_t sums, int device, int64_t stream);
