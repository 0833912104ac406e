// Every host function of the compiled side, and the one type in which tensors reach it.
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <stdexcept>
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
  bool absent() const { return data == nullptr && dims == 0; }  // Python's None; one without elements is not
};

// Outputs are written without their strides. Throws std::invalid_argument, Python's ValueError.
inline void require_contiguous(const char* op, std::initializer_list<const View*> outputs) {
  for (const View* view : outputs) {
    int64_t step = 1;
    bool contiguous = true;
    for (int d = view->dims - 1; d >= 0; d--) {
      contiguous = contiguous && (view->shape[d] == 1 || view->stride[d] == step);
      step *= view->shape[d];
    }
    if (!contiguous && step > 0) throw std::invalid_argument(std::string(op) + ": outputs must be contiguous");
  }
}

namespace cpu {
void advantages(View scores, View logprobs, View ref_logprobs, View values, View mask, View last_values, View price,
                double kl_coef, const std::string& kl, const std::string& at, std::optional<double> clip_scores,
                double gamma, double lam, const std::string& holes, bool whiten, bool shift_mean, bool unbiased,
                View advantages, View returns, View rewards);
void gae(View rewards, View values, View mask, View last_values, View cu_seqlens, double gamma, double lam,
         const std::string& holes, View advantages, View returns);
void kl(View logits, View ref_logits, View ids, View mask, double temperature, View kl, View logprobs,
        View ref_logprobs, View entropy, View lse, View ref_lse);
void kl_backward(View grad_kl, View grad_logprobs, View grad_entropy, View logits, View ref_logits, View kl,
                 View entropy, View lse, View ref_lse, View ids, View mask, double temperature, View grad);
void logprobs(View logits, View ids, View mask, double temperature, std::optional<double> softcap, View logprobs,
              View entropy, View lse);
void logprobs_backward(View grad_logprobs, View grad_entropy, View grad_lse, View logits, View ids, View entropy,
                       View lse, View mask, double temperature, std::optional<double> softcap, View grad);
void ppo_loss(View logprobs, View old_logprobs, View advantages, View mask, View values, View old_values, View returns,
              View entropy, View ref_logprobs, View denominator, double cliprange_low, double cliprange_high,
              double cliprange_value, double vf_coef, double entropy_coef, double kl_coef, const std::string& kl,
              std::optional<double> dual_clip, double log_ratio_clamp, const std::string& aggregate, View loss,
              View stats, View grad_logprobs, View grad_values, View grad_entropy);
void ppo_loss_backward(View grad_loss, View grad_logprobs, View grad_values, View grad_entropy, View logprobs,
                       View values, View entropy);
void sample(View logits, View seeds, View positions, View temperature, View top_k, View top_p, View min_p,
            View repetition_penalty, View presence_penalty, View frequency_penalty, View token_counts, View logit_bias,
            View allowed, View ids, View logprobs, View policy_logprobs, View kept_logmass, View entropy, View kept,
            View status);
}  // namespace cpu

namespace cuda {
int device_count();  // 0 where there is no driver
void advantages(View scores, View logprobs, View ref_logprobs, View values, View mask, View last_values, View price,
                double kl_coef, const std::string& kl, const std::string& at, std::optional<double> clip_scores,
                double gamma, double lam, const std::string& holes, bool whiten, bool shift_mean, bool unbiased,
                View advantages, View returns, View rewards, View scratch, int device, uintptr_t stream);
void gae(View rewards, View values, View mask, View last_values, View cu_seqlens, double gamma, double lam,
         const std::string& holes, View advantages, View returns, int device, uintptr_t stream);
void kl(View logits, View ref_logits, View ids, View mask, double temperature, View kl, View logprobs,
        View ref_logprobs, View entropy, View lse, View ref_lse, int device, uintptr_t stream);
void kl_backward(View grad_kl, View grad_logprobs, View grad_entropy, View logits, View ref_logits, View kl,
                 View entropy, View lse, View ref_lse, View ids, View mask, double temperature, View grad, int device,
                 uintptr_t stream);
void logprobs(View logits, View ids, View mask, double temperature, std::optional<double> softcap, View logprobs,
              View entropy, View lse, int device, uintptr_t stream);
void logprobs_backward(View grad_logprobs, View grad_entropy, View grad_lse, View logits, View ids, View entropy,
                       View lse, View mask, double temperature, std::optional<double> softcap, View grad, int device,
                       uintptr_t stream);
void ppo_loss(View logprobs, View old_logprobs, View advantages, View mask, View values, View old_values, View returns,
              View entropy, View ref_logprobs, View denominator, double cliprange_low, double cliprange_high,
              double cliprange_value, double vf_coef, double entropy_coef, double kl_coef, const std::string& kl,
              std::optional<double> dual_clip, double log_ratio_clamp, const std::string& aggregate, View loss,
              View stats, View grad_logprobs, View grad_values, View grad_entropy, View scratch, int device,
              uintptr_t stream);
void ppo_loss_backward(View grad_loss, View grad_logprobs, View grad_values, View grad_entropy, View logprobs,
                       View values, View entropy, int device, uintptr_t stream);
void sample(View logits, View seeds, View positions, View temperature, View top_k, View top_p, View min_p,
            View repetition_penalty, View presence_penalty, View frequency_penalty, View token_counts, View logit_bias,
            View allowed, View ids, View logprobs, View policy_logprobs, View kept_logmass, View entropy, View kept,
            View status, View scratch, int device, uintptr_t stream);
}  // namespace cuda

}  // namespace rlhf_fast
