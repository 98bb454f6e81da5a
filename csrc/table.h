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
  // What codes take (codes.h), where the bucket has any:
  int64_t correction = 0;                // address: what a bfloat16 weight lacks
  int64_t seed = 0;                      // address of an int64: seed in the low half, the exponent of exp_avg's unit in the high
  int64_t first = 0, run = 1, stride = 0;  // element i lies at first + i / run * stride + i % run of the whole tensor
};
constexpr int kRowWords = 14;
static_assert(sizeof(Row) == kRowWords * sizeof(int64_t), "a row is fourteen words");

enum class DType : int { f32 = 0, f64 = 1, f16 = 2, bf16 = 3, u8 = 4, i8 = 5, i16 = 6, i64 = 7 };  // the last four: of state alone

enum class State : int { wide = 0, bfloat16 = 1, small = 2 };  // wide: float, or double for f64 parameters
enum class Weight : int { nearest = 0, stochastic = 1, plus8 = 2, plus16 = 3 };  // of bf16 parameters; others have the first

// What one launch updates: parameters of one dtype, gradients of one dtype, stored alike.
struct Bucket {
  int algorithm;  // adabayes_fused.algorithms: 0 AdaBayes, 1 AdaBayesFP
  bool full;      // every slot, or the lean ones only
  State state;
  Weight weight;
  DType param, grad;
  const Row* rows;
  int64_t n_rows;
  const double* numbers;
};

