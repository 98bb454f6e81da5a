// The update rules: pure functions of registers, the same on the host and on the device.
// Each stands once more in triton_kernels/rules.py and adabayes_fused/backends/foreach.py, same names, same order.
// Built without contraction of a*b+c: every backend then rounds alike and gives the same bits.
#pragma once
#include <cmath>

#ifdef __CUDACC__
#define RULE_FN __host__ __device__ __forceinline__
#else
#define RULE_FN inline __attribute__((always_inline))
#endif

// `average` moved towards `value`. It starts from whichever of the two keeps most, since a result much smaller than where it
// started would be lost to cancellation: from the average by a weight of 1 - beta, or, where the sign bit is set, from the value
// by one of -beta (adabayes_fused/algorithms.py).
template <class T>
RULE_FN T lerp(T average, T value, T weight) {
  return (std::signbit(weight) ? value : average) + (value - average) * weight;
}

// A rule has `lean` state slots its recursion needs, then those kept for the user, `slots` in all;
// it reads the first `reads` of them and writes every one it is given.

struct AdaBayes {  // Algorithm 1; variances in units of the prior's sigma^2, gradients of the mean loss
  static constexpr int lean = 2, reads = 3, slots = 4;

  template <class T>
  struct Coefficients {
    T grad_scale, weight1, weight2, keep, step_size, fisher, forget, drift;
  };

  template <class T>
  static RULE_FN void update(const Coefficients<T>& c, T grad, T& param,
                             T& exp_avg, T& prior_var, T& exp_avg_sq, T& post_var) {
    const T g = grad * c.grad_scale;
    const T g_sq = g * g;
    exp_avg = lerp(exp_avg, g, c.weight1);           // Eq. 2
    exp_avg_sq = lerp(exp_avg_sq, g_sq, c.weight2);  // Eq. 4
    post_var = prior_var / (T(1) + prior_var * c.fisher * g_sq);  // Eq. 17a
    prior_var = post_var + (c.drift - post_var * c.forget);  // Eq. 16b
    param = param * c.keep - exp_avg * c.step_size * post_var;  // Eq. 18
  }
};

struct AdaBayesFP {  // Algorithm 2: the posterior variance at its fixed point
  static constexpr int lean = 2, reads = 2, slots = 3;

  template <class T>
  struct Coefficients {
    T grad_scale, weight1, weight2, keep, step_size, a, debias2, eps;
  };

  template <class T>
  static RULE_FN void update(const Coefficients<T>& c, T grad, T& param,
                             T& exp_avg, T& exp_avg_sq, T& post_var, T&) {
    const T g = grad * c.grad_scale;
    const T g_sq = g * g;
    exp_avg = lerp(exp_avg, g, c.weight1);           // Eq. 2
    exp_avg_sq = lerp(exp_avg_sq, g_sq, c.weight2);  // Eq. 4
    const T denom = c.a + std::sqrt(c.a * c.a + exp_avg_sq * c.debias2) + c.eps;  // Eq. 20
    post_var = (c.a + c.a) / denom;
    param = param * c.keep - exp_avg * c.step_size / denom;  // Eq. 18
  }
};
