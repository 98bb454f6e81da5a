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
    case DType::bf16: return f(Type<bfloat16_t>{});
  }
}

// The type the rule computes and keeps its state in, for parameters stored as P.
template <class P> struct Compute { using type = float; };
template <> struct Compute<double> { using type = double; };

template <class Rule, class T>
RULE_FN typename Rule::template Coefficients<T> coefficients(const double* row) {
  static_assert(sizeof(typename Rule::template Coefficients<T>) == kCoefficients * sizeof(T), "eight coefficients");
  T c[kCoefficients];
  for (int i = 0; i < kCoefficients; ++i) c[i] = T(row[i]);
  typename Rule::template Coefficients<T> out;
  memcpy(&out, c, sizeof(out));
  return out;
}
