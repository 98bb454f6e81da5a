// The table every backend reads: one row of addresses per tensor, and one row of numbers per parameter group.
// 64-bit words only, so that Python, Triton, C++ and CUDA index it alike.
#pragma once
#include <cstdint>

constexpr int kMaxSlots = 4;
constexpr int kCoefficients = 8;
constexpr int kNumbers = 2 * kCoefficients;  // of a group: its coefficients, then the decay each of them is corrected for, or 0

struct Row {
  int64_t param, grad, slot[kMaxSlots];  // addresses
  int64_t numel;
  int64_t group;                         // which row of numbers
  int64_t step;                          // address of the step count, a float, which the update raises by one
};
constexpr int kRowWords = 9;
static_assert(sizeof(Row) == kRowWords * sizeof(int64_t), "a row is nine words");

enum class DType : int { f32 = 0, f64 = 1, f16 = 2, bf16 = 3 };

// What one launch updates: parameters of one dtype, gradients of one dtype; state is float, or double for f64.
struct Bucket {
  int algorithm;  // adabayes_fused.algorithms: 0 AdaBayes, 1 AdaBayesFP
  bool full;      // every slot, or the lean ones only
  DType param, grad;
  const Row* rows;
  int64_t n_rows;
  const double* numbers;
};

