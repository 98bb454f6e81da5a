// What a GPU alone knows of a step before it is made: AMP's scale and overflow, and the norm of all gradients.
#pragma once
#include "rule.h"

struct Decision {
  double factor;  // of every gradient
  double norm;    // of the unscaled gradients
  double skip;    // not zero where nothing may change
};

// From the sum of all squared gradients as they are. `max_norm`: infinite where nothing is clipped. The formulas stand once more
// in triton_kernels/multi_tensor.py and adabayes_fused/clipping.py. A norm that is not finite goes into the factor, as in
// torch.nn.utils.clip_grad_norm_.
RULE_FN Decision decide(double total, double grad_scale, bool overflow, double max_norm, bool skip_nonfinite) {
  const double norm = std::sqrt(total) / grad_scale, limit = max_norm / (norm + 1e-6);
  const double clip = std::isinf(max_norm) || limit > 1 ? 1 : limit;
  return {clip / grad_scale, norm, double(overflow || (skip_nonfinite && !std::isfinite(total)))};
}
