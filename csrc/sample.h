// What both host functions of sample, on the CPU and on CUDA, ask of their arguments, and the knobs of one row.
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cmath>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "ops.h"
#include "philox.h"

namespace rlhf_fast {

// The arguments of sample in their order; each knob is [B] or absent.
struct Sampling {
  View logits, seeds, positions, temperature, top_k, top_p, min_p, repetition, presence, frequency;
  View counts, bias, allowed;
  View ids, logprobs, policy_logprobs, kept_logmass, entropy, kept, status;
};

// Throws std::invalid_argument, Python's ValueError. The public function has seen to all of this already, but
// torch.ops.rlhf_fast.sample and users without torch come here directly, and a wrong dtype would be a wrong address.
inline void check_sample(const Sampling& s) {
  const auto require = [](bool holds, const char* rule) {
    if (!holds) throw std::invalid_argument(std::string("sample: ") + rule);
  };
  const auto real = [](const View& view) { return view.dtype <= Dtype::float16; };
  const auto integer = [](const View& view) { return view.dtype == Dtype::int32 || view.dtype == Dtype::int64; };
  require(s.logits.dims == 2 && s.logits.shape[1] > 0, "logits must be [B, V] with V at least 1");
  require(real(s.logits), "logits must be float32, float64, bfloat16 or float16");
  require(s.logits.shape[1] < 0x7fffff00, "logits must have less than 2^31 columns");
  const int64_t rows = s.logits.shape[0], size = s.logits.shape[1];
  const auto is_row = [&](const View& view, bool optional) {
    return (optional && view.absent()) || (view.dims == 1 && view.shape[0] == rows);
  };
  for (const View* view : {&s.seeds, &s.positions})
    require(is_row(*view, false) && view->dtype == Dtype::int64, "seeds and positions must be [B], int64");
  for (const View* view : {&s.temperature, &s.top_p, &s.min_p, &s.repetition, &s.presence, &s.frequency})
    require(is_row(*view, true) && (!*view || view->dtype == Dtype::float64), "knobs must be [B], float64");
  require(is_row(s.top_k, true) && (!s.top_k || s.top_k.dtype == Dtype::int64), "top_k must be [B], int64");
  for (const View* view : {&s.counts, &s.bias, &s.allowed})
    require(view->absent() || (view->dims == 2 && view->shape[0] == rows && view->shape[1] == size),
            "token_counts, logit_bias and allowed must be [B, V]");
  require(!s.counts || integer(s.counts), "token_counts must be int64 or int32");
  require(!s.bias || real(s.bias), "logit_bias must be a float");
  require(!s.allowed || s.allowed.dtype == Dtype::boolean, "allowed must be bool");
  const Dtype dtype = s.logits.dtype == Dtype::float64 ? Dtype::float64 : Dtype::float32;
  for (const View* view : {&s.logprobs, &s.policy_logprobs, &s.kept_logmass, &s.entropy})
    require(is_row(*view, false) && view->dtype == dtype, "logprobs and entropy must be [B], float32 or float64");
  for (const View* view : {&s.ids, &s.kept})
    require(is_row(*view, false) && view->dtype == Dtype::int64, "ids and kept must be [B], int64");
  require(is_row(s.status, false) && s.status.dtype == Dtype::int8, "status must be [B], int8");
  require_contiguous("sample",
                     {&s.ids, &s.logprobs, &s.policy_logprobs, &s.kept_logmass, &s.entropy, &s.kept, &s.status});
}

}  // namespace rlhf_fast
