"""The update rules, one jit function each: the same names in the same order as ``csrc/rule.h``.

A rule takes its coefficients as a tuple, then gradient, parameter and state slots, and returns the parameter and the
slots after the step. Divisions and roots are the correctly rounded ones, and launches turn contraction into fused
multiply-adds off, so that every backend gives the same bits.
"""

import triton
import triton.language as tl


@triton.jit
def divide(x, y):
    return tl.div_rn(x, y) if x.dtype == tl.float32 else x / y


@triton.jit
def square_root(x):
    return tl.sqrt_rn(x) if x.dtype == tl.float32 else tl.sqrt(x)


@triton.jit
def lerp(average, value, weight, FAR: tl.constexpr):
    """``average`` moved towards ``value``: by a weight of 1 - beta from the average, or of -beta, maybe -0, from the value. The
    latter only where FAR, as it costs registers."""
    if not FAR:
        return average + (value - average) * weight
    sign_bit = weight.to(tl.int64 if weight.dtype == tl.float64 else tl.int32, bitcast=True) < 0
    return tl.where(sign_bit, value, average) + (value - average) * weight


@triton.jit
def adabayes(coefficients, grad, param, exp_avg, prior_var, exp_avg_sq, post_var, FAR: tl.constexpr):
    grad_scale, weight1, weight2, keep, step_size, fisher, forget, drift = coefficients
    g = grad * grad_scale
    g_sq = g * g
    exp_avg = lerp(exp_avg, g, weight1, FAR)  # Eq. 2
    exp_avg_sq = lerp(exp_avg_sq, g_sq, weight2, FAR)  # Eq. 4
    post_var = divide(prior_var, 1.0 + prior_var * fisher * g_sq)  # Eq. 17a
    prior_var = post_var + (drift - post_var * forget)  # Eq. 16b
    param = param * keep - exp_avg * step_size * post_var  # Eq. 18
    return param, exp_avg, prior_var, exp_avg_sq, post_var


@triton.jit
def adabayes_fp(coefficients, grad, param, exp_avg, exp_avg_sq, post_var, unused, FAR: tl.constexpr):
    grad_scale, weight1, weight2, keep, step_size, a, debias2, eps = coefficients
    g = grad * grad_scale
    g_sq = g * g
    exp_avg = lerp(exp_avg, g, weight1, FAR)  # Eq. 2
    exp_avg_sq = lerp(exp_avg_sq, g_sq, weight2, FAR)  # Eq. 4
    denom = a + square_root(a * a + exp_avg_sq * debias2) + eps  # Eq. 20
    post_var = divide(a + a, denom)
    param = param * keep - divide(exp_avg * step_size, denom)  # Eq. 18
    return param, exp_avg, exp_avg_sq, post_var, unused


RULES = {"AdaBayes": adabayes, "AdaBayesFP": adabayes_fp}
