// What the host functions of kl and of its gradient, on the CPU and on CUDA, ask of their arguments.
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "rows.h"

namespace rlhf_fast {

// Of a pair: float64 if one of them is.
inline Dtype float_result(const View& logits, const View& ref_logits) {
  const bool wide = logits.dtype == Dtype::float64 || ref_logits.dtype == Dtype::float64;
  return wide ? Dtype::float64 : Dtype::float32;
}

inline RowChecks check_row_pairs(const View& logits, const View& ref_logits, const View& ids, const View& mask,
                                 double temperature) {
  const RowChecks checks("kl", logits);
  checks.like_logits(ref_logits, "ref_logits");
  checks.require(is_floating(ref_logits.dtype), "ref_logits must be float32, float64, bfloat16 or float16");
  checks.choices(ids, mask);
  checks.require(checks.positive(temperature), "temperature must be finite and above 0");
  return checks;
}

inline void check_kl(const View& logits, const View& ref_logits, const View& ids, const View& mask, double temperature,
                     const View& kl, const View& logprobs, const View& ref_logprobs, const View& entropy,
                     const View& lse, const View& ref_lse) {
  const RowChecks checks = check_row_pairs(logits, ref_logits, ids, mask, temperature);
  const Dtype dtype = float_result(logits, ref_logits);
  checks.per_row({{kl, "kl"}, {entropy, "entropy"}, {lse, "lse"}, {ref_lse, "ref_lse"}}, dtype);
  if (ids) checks.per_row({{logprobs, "logprobs"}, {ref_logprobs, "ref_logprobs"}}, dtype);
  require_contiguous("kl", {&kl, &logprobs, &ref_logprobs, &entropy, &lse, &ref_lse});
}

inline void check_kl_backward(const View& grad_kl, const View& grad_logprobs, const View& grad_entropy,
                              const View& logits, const View& ref_logits, const View& kl, const View& entropy,
                              const View& lse, const View& ref_lse, const View& ids, const View& mask,
                              double temperature, const View& grad) {
  const RowChecks checks = check_row_pairs(logits, ref_logits, ids, mask, temperature);
  const Dtype dtype = float_result(logits, ref_logits);
  checks.per_row({{grad_kl, "grad_kl"}, {grad_entropy, "grad_entropy"}}, dtype);
  if (ids) checks.per_row(grad_logprobs, "grad_logprobs", dtype);
  checks.per_row({{kl, "kl"}, {entropy, "entropy"}, {lse, "lse"}, {ref_lse, "ref_lse"}}, dtype);
  checks.like_logits(grad, "the gradient");
  checks.require(grad.dtype == logits.dtype, "the gradient must have the dtype of logits");
  require_contiguous("kl", {&grad});
}

}  // namespace rlhf_fast
