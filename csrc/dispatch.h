// From a bucket's numbers to types: the only lists of algorithms and of dtypes in C++.
#pragma once
#include "dtype.h"
#include "rule.h"
#include "table.h"

template <class T> struct Type { using type = T; };

// f(Type<Rule>)
template <class F>
void with_rule(int algorithm, F&& f) {
  algorithm == 0 ? f(Type<AdaBayes>{}) : f(Type<AdaBayesFP>{});
}

// f(Type<storage>)
template <class F>
void with_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32: return f(Type<float>{});
    case DType::f64: return f(Type<double>{});
    case DType::f16: return f(Type<half_t>{});
    default: return f(Type<bfloat16_t>{});
  }
}

// The type the rule computes and keeps its state in, for parameters stored as P.
template <class P> struct Compute { using type = float; };
template <> struct Compute<double> { using type = double; };

// base^exponent by repeated squaring: multiplications alone, which every language and device rounds alike.
RULE_FN double power(double base, int64_t exponent) {
  double result = 1;
  for (; exponent > 0; exponent >>= 1, base *= base)
    if (exponent & 1) result *= base;
  return result;
}

// The i-th coefficient, from a group's numbers, of the step that follows `step` others: without the bias of an average that
// began at zero, and of gradients times `grad_factor`.
RULE_FN double coefficient(const double* numbers, int i, float step, double grad_factor) {
  const double value = i == 0 ? numbers[i] * grad_factor : numbers[i], decay = numbers[kCoefficients + i];
  return decay == 0 ? value : value / (1 - power(decay, int64_t(step) + 1));
}

template <class Rule, class T, class S>
RULE_FN typename Rule::template Coefficients<T> coefficients(const S* row) {
  static_assert(sizeof(typename Rule::template Coefficients<T>) == kCoefficients * sizeof(T), "eight coefficients");
  T c[kCoefficients];
  for (int i = 0; i < kCoefficients; ++i) c[i] = T(row[i]);
  typename Rule::template Coefficients<T> out;
  memcpy(&out, c, sizeof(out));
  return out;
}
