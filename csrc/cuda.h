// The CUDA driver: one launch a bucket. Rows and numbers of a bucket lie in device memory, like everything that has an address
// here. Each throws std::runtime_error with CUDA's words where CUDA refuses.
#pragma once
#include <cstdint>
#include <string>
#include "table.h"

// `chunks`: the chunk map, of `n_chunks` words, then a ticket for each row (multi_tensor.h); `decision`: a Decision, or 0.
void run_cuda(const Bucket& bucket, int64_t chunks, int64_t n_chunks, int64_t decision, int device, int64_t stream);

// Writes the sum of each chunk's squared gradients to `sums`, n_chunks doubles.
void sum_of_squares_cuda(const Bucket& bucket, int64_t chunks, int64_t n_chunks, int64_t sums, int device, int64_t stream);

// Makes a Decision of `n` sums at `sums` and of floats at `grad_scale` (or 0: `known_scale` is the scale) and `found_inf` (or 0),
// and counts at `skipped`, an int64, if it is to skip.
void decide_cuda(int64_t sums, int64_t n, int64_t grad_scale, double known_scale, int64_t found_inf, double max_norm, bool skip_nonfinite,
                 int64_t decision, int64_t skipped, int device, int64_t stream);

// Empty, or in CUDA's words why the update of such a bucket cannot run on `device`.
std::string why_not_cuda(const Bucket& bucket, int device);
