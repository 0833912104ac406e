// What the host functions of logprobs and of its gradient, on the CPU and on CUDA, ask of their arguments.
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "rows.h"

namespace rlhf_fast {

inline Dtype float_result(const View& logits) {
  return logits.dtype == Dtype::float64 ? Dtype::float64 : Dtype::float32;
}

inline RowChecks check_scaled_rows(const View& logits, const View& ids, const View& mask, double temperature,
                                   std::optional<double> softcap) {
  const RowChecks checks("logprobs", logits);
  checks.require(bool(ids) || count_rows(logits) == 0, "ids must be a tensor");
  checks.choices(ids, mask);
  checks.require(checks.positive(temperature), "temperature must be finite and above 0");
  checks.require(!softcap || checks.positive(*softcap), "softcap must be finite and above 0");
  return checks;
}

inline void check_logprobs(const View& logits, const View& ids, const View& mask, double temperature,
                           std::optional<double> softcap, const View& logprobs, const View& entropy, const View& lse) {
  const RowChecks checks = check_scaled_rows(logits, ids, mask, temperature, softcap);
  checks.per_row({{logprobs, "logprobs"}, {entropy, "entropy"}, {lse, "lse"}}, float_result(logits));
  require_contiguous("logprobs", {&logprobs, &entropy, &lse});
}

inline void check_logprobs_backward(const View& grad_logprobs, const View& grad_entropy, const View& grad_lse,
                                    const View& logits, const View& ids, const View& entropy, const View& lse,
                                    const View& mask, double temperature, std::optional<double> softcap,
                                    const View& grad) {
  const RowChecks checks = check_scaled_rows(logits, ids, mask, temperature, softcap);
  checks.per_row({{grad_logprobs, "grad_logprobs"},
                  {grad_entropy, "grad_entropy"},
                  {grad_lse, "grad_lse"},
                  {entropy, "entropy"},
                  {lse, "lse"}},
                 float_result(logits));
  checks.like_logits(grad, "the gradient");
  checks.require(grad.dtype == logits.dtype, "the gradient must have the dtype of logits");
  require_contiguous("logprobs", {&grad});
}

}  // namespace rlhf_fast
