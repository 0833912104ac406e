// Every host function of the compiled side, and the one type in which tensors reach it.
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <string>

namespace rlhf_fast {

// The codes of rlhf_fast/dispatch.py.
enum class Dtype : int { float32, float64, bfloat16, float16, int32, int64, boolean, int8 };

constexpr int max_dims = 8;

// A tensor as Python hands it over: (address, dtype code, shape, strides in elements); no owner, no copy.
// An absent tensor has no address.
struct View {
  void* data = nullptr;
  Dtype dtype = Dtype::float32;
  int dims = 0;
  int64_t shape[max_dims] = {};
  int64_t stride[max_dims] = {};

  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
  explicit operator bool() const { return data != nullptr; }
};

namespace cpu {
void gae(View rewards, View values, View mask, View last_values, View cu_seqlens, double gamma, double lam,
         const std::string& holes, View advantages, View returns);
void sample(View logits, View seeds, View positions, View temperature, View top_k, View top_p, View min_p,
            View repetition_penalty, View presence_penalty, View frequency_penalty, View token_counts, View logit_bias,
            View allowed, View ids, View logprobs, View policy_logprobs, View kept_logmass, View entropy, View kept,
            View status);
}  // namespace cpu

namespace cuda {
int device_count();  // 0 where there is no driver
void gae(View rewards, View values, View mask, View last_values, View cu_seqlens, double gamma, double lam,
         const std::string& holes, View advantages, View returns, int device, uintptr_t stream);
}  // namespace cuda

}  // namespace rlhf_fast
