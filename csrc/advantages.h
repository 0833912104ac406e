// What both host functions of advantages, on the CPU and on CUDA, ask of their arguments, and the arithmetic that they
// share. SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cmath>
#include <limits>

#include "ppo_loss_token.h"

namespace rlhf_fast {

// The tensors of the schema, in its order, and the outputs.
struct AdvantagesTensors {
  View scores, logprobs, ref_logprobs, values, mask, last_values, price;
  View advantages, returns, rewards;

  bool dense() const { return scores.dims == 2; }
  int64_t rows() const { return logprobs.shape[0]; }
  int64_t width() const { return logprobs.shape[1]; }
};

// The numbers of the schema.
struct AdvantagesNumbers {
  double kl_coef;
  KL kl;
  bool next;           // the score lands behind the last valid token
  double clip_scores;  // infinity for none
  double gamma, lam;
  bool zero_holes, whiten, shift_mean, unbiased;
};

inline void require_advantages(bool holds, const char* rule) {
  if (!holds) throw std::invalid_argument(std::string("advantages: ") + rule);
}

inline AdvantagesNumbers advantages_numbers(double kl_coef, const std::string& kl, const std::string& at,
                                            std::optional<double> clip_scores, double gamma, double lam,
                                            const std::string& holes, bool whiten, bool shift_mean, bool unbiased) {
  const char* const kls[] = {"k1", "k2", "k3", "abs"};
  const auto found = std::find(kls, kls + 4, kl);
  require_advantages(found != kls + 4, "kl must be k1, k2, k3 or abs");
  require_advantages(at == "last" || at == "next", "at must be last or next");
  require_advantages(holes == "skip" || holes == "zero", "holes must be skip or zero");
  const double clip = clip_scores.value_or(std::numeric_limits<double>::infinity());
  require_advantages(clip > 0, "clip_scores must be above 0");
  return {kl_coef, static_cast<KL>(found - kls), at == "next", clip, gamma, lam, holes == "zero", whiten, shift_mean,
          unbiased};
}

// Throws std::invalid_argument, Python's ValueError: a wrong dtype or shape would be a wrong address.
inline void check_advantages(const AdvantagesTensors& t) {
  require_advantages(t.logprobs.dims == 2, "logprobs must be [B, T]");
  require_advantages(t.logprobs.dtype == Dtype::float32 || t.logprobs.dtype == Dtype::float64,
                     "logprobs must be float32 or float64");
  const int64_t rows = t.rows();
  require_advantages((t.scores.dims == 1 && t.scores.shape[0] == rows) || same_shape(t.scores, t.logprobs),
                     "scores must be [B] or [B, T]");
  for (const View* view : {&t.ref_logprobs, &t.values, &t.mask, &t.advantages, &t.returns, &t.rewards})
    require_advantages(same_shape(*view, t.logprobs), "tokens and outputs must have the shape of logprobs");
  require_advantages(!t.last_values || (t.last_values.dims == 1 && t.last_values.shape[0] == rows),
                     "last_values must be [B]");
  require_advantages(!t.price || t.price.dims == 0, "price must be 0-d");
  for (const View* view :
       {&t.scores, &t.ref_logprobs, &t.values, &t.last_values, &t.price, &t.advantages, &t.returns, &t.rewards})
    require_advantages(!*view || view->dtype == t.logprobs.dtype, "all tensors must have the dtype of logprobs");
  require_advantages(t.mask.dtype == Dtype::boolean, "mask must be bool");
  require_contiguous("advantages", {&t.advantages, &t.returns, &t.rewards});
}

// A token's KL as it enters its reward. A price of 0 is none, even of an infinite KL.
template <class Math, KL kl, class T>
RLHF_FAST_TOKEN T kl_reward(T difference, T price) {
  return choose(price != 0, -price * kl_term<Math, kl>(difference).estimate, T(0));
}

// Of some of the valid advantages: how many, their mean and the sum of squares around it.
struct Moments {
  double count, mean, squares;
};

// x becomes (x - mean) * scale + shift. The mean in two parts, so that float is enough: where x is near the mean the
// first difference is exact.
template <class T>
struct Whitening {
  T mean, rest, scale, shift;
  RLHF_FAST_TOKEN T operator()(T x) const { return ((x - mean) - rest) * scale + shift; }
};

// From the moments of the whole batch.
template <class T>
RLHF_FAST_TOKEN Whitening<T> whitening_of(Moments all, bool shift_mean, bool unbiased) {
  const double degrees = all.count - unbiased, variance = all.squares / (degrees > 1 ? degrees : 1);
  const T mean = static_cast<T>(all.mean);
  const T rest = static_cast<T>(all.mean - static_cast<double>(mean));
  return {mean, rest, static_cast<T>(1 / sqrt(variance + 1e-8)), shift_mean ? T(0) : mean};
}

}  // namespace rlhf_fast
