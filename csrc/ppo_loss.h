// What both host functions of ppo_loss, on the CPU and on CUDA, ask of their arguments. SPDX-License-Identifier:
// Apache-2.0
#pragma once
#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>

#include "ops.h"

namespace rlhf_fast {

// The arguments of the schema, in its order, and the outputs.
struct PPOLossTensors {
  View logprobs, old_logprobs, advantages, mask, values, old_values, returns, entropy, ref_logprobs, denominator;
  View loss, stats, grad_logprobs, grad_values, grad_entropy;
};

enum class KL : int { k1, k2, k3, abs };
enum class Aggregate : int { token_mean, token_sum, seq_mean_token_mean, seq_mean_token_sum };

// policy_loss value_loss entropy kl approx_kl clipfrac value_clipfrac ratio_mean are sums; then ratio_max.
constexpr int ppo_loss_sums = 8, ppo_loss_stats = 9;

// The numbers of the schema.
struct PPOLossNumbers {
  double cliprange_low, cliprange_high, cliprange_value, vf_coef, entropy_coef, kl_coef;
  KL kl;
  double dual_clip;  // 0 for none
  double log_ratio_clamp;
  Aggregate aggregate;

  bool by_sequence() const { return aggregate >= Aggregate::seq_mean_token_mean; }
};

inline void require_ppo_loss(bool holds, const char* rule) {
  if (!holds) throw std::invalid_argument(std::string("ppo_loss: ") + rule);
}

template <size_t N>
int choice(const std::string& word, const char* const (&words)[N], const char* rule) {
  const auto found = std::find(words, words + N, word);
  require_ppo_loss(found != words + N, rule);
  return static_cast<int>(found - words);
}

inline PPOLossNumbers ppo_loss_numbers(double cliprange_low, double cliprange_high, double cliprange_value,
                                       double vf_coef, double entropy_coef, double kl_coef, const std::string& kl,
                                       std::optional<double> dual_clip, double log_ratio_clamp,
                                       const std::string& aggregate) {
  const char* const kls[] = {"k1", "k2", "k3", "abs"};
  const char* const aggregates[] = {"token_mean", "token_sum", "seq_mean_token_mean", "seq_mean_token_sum"};
  require_ppo_loss(!dual_clip || *dual_clip >= 1, "dual_clip must be at least 1");
  return {cliprange_low,
          cliprange_high,
          cliprange_value,
          vf_coef,
          entropy_coef,
          kl_coef,
          static_cast<KL>(choice(kl, kls, "kl must be k1, k2, k3 or abs")),
          dual_clip.value_or(0),
          log_ratio_clamp,
          static_cast<Aggregate>(choice(aggregate, aggregates, "aggregate must be token_* or seq_mean_token_*"))};
}

inline bool same_shape(const View& a, const View& b) {
  return a.dims == b.dims && std::equal(a.shape, a.shape + a.dims, b.shape);
}

// Throws std::invalid_argument, Python's ValueError: a wrong dtype or shape would be a wrong address.
inline void check_ppo_loss(const PPOLossTensors& t, const PPOLossNumbers& numbers) {
  const auto given = [](const View& view) { return !view.absent(); };
  require_ppo_loss(t.logprobs.dims == 1 || t.logprobs.dims == 2, "logprobs must be [B, T] or [N]");
  require_ppo_loss(t.logprobs.dtype == Dtype::float32 || t.logprobs.dtype == Dtype::float64,
                   "logprobs must be float32 or float64");
  // What stands in the place of a gradient that there is none of is not written to.
  const View none, &grad_values = given(t.values) ? t.grad_values : none;
  const View& grad_entropy = given(t.entropy) ? t.grad_entropy : none;
  require_ppo_loss(given(t.values) == given(grad_values) && given(t.entropy) == given(grad_entropy),
                   "values and entropy need a gradient each");
  for (const View* view : {&t.old_logprobs, &t.advantages, &t.values, &t.old_values, &t.returns, &t.entropy,
                           &t.ref_logprobs, &t.grad_logprobs, &grad_values, &grad_entropy}) {
    const bool optional = view != &t.old_logprobs && view != &t.advantages && view != &t.grad_logprobs;
    if (optional && !given(*view)) continue;
    require_ppo_loss(same_shape(*view, t.logprobs), "all tensors must have the shape of logprobs");
    require_ppo_loss(view->dtype == t.logprobs.dtype, "all tensors must have the dtype of logprobs");
  }
  require_ppo_loss(t.mask.dtype == Dtype::boolean, "mask must be bool");
  require_ppo_loss(same_shape(t.mask, t.logprobs), "mask must have the shape of logprobs");
  require_ppo_loss(given(t.values) == given(t.returns), "values and returns must be given together");
  require_ppo_loss(!t.denominator || (t.denominator.dims == 0 && t.denominator.dtype == t.logprobs.dtype),
                   "denominator must be 0-d and have the dtype of logprobs");
  require_ppo_loss(t.loss && t.loss.dims == 0 && t.loss.dtype == t.logprobs.dtype,
                   "loss must be 0-d and have the dtype of logprobs");
  require_ppo_loss(t.stats.dims == 1 && t.stats.shape[0] == ppo_loss_stats && t.stats.dtype == t.logprobs.dtype,
                   "stats must be [9] and have the dtype of logprobs");
  require_contiguous("ppo_loss", {&t.stats, &t.grad_logprobs, &grad_values, &grad_entropy});
  require_ppo_loss(!numbers.by_sequence() || t.logprobs.dims == 2, "seq_mean_* needs [B, T]");
}

// What ppo_loss_backward asks of its arguments.
inline void check_ppo_loss_backward(const View& grad_loss, const View* const (&grads)[3],
                                    const View* const (&outputs)[3]) {
  const auto require = [](bool holds, const char* rule) {
    if (!holds) throw std::invalid_argument(std::string("ppo_loss_backward: ") + rule);
  };
  require(grad_loss && grad_loss.dims == 0, "grad_loss must be 0-d");
  require(grad_loss.dtype == Dtype::float32 || grad_loss.dtype == Dtype::float64,
          "grad_loss must be float32 or float64");
  for (int i = 0; i < 3; i++) {
    require(grads[i]->dims == 1 || grads[i]->dims == 2, "the gradients must be [B, T] or [N]");
    require(grads[i]->dtype == grad_loss.dtype, "the gradients must have the dtype of grad_loss");
    require(same_shape(*grads[i], *outputs[i]), "outputs must have the shape of the gradients");
    require(outputs[i]->dtype == grad_loss.dtype, "outputs must have the dtype of grad_loss");
    require_contiguous("ppo_loss_backward", {outputs[i]});
  }
}

}  // namespace rlhf_fast
