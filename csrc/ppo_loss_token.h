// What ppo_loss makes of one token, on the CPU and on CUDA. SPDX-License-Identifier: Apache-2.0
//
// Without a branch that depends on the token, so that a compiler turns a loop over it into vectors. NaN goes through as
// it does in PyTorch. `Math` has exp and expm1.
#pragma once
#include <cstring>
#include <type_traits>

#include "ppo_loss.h"

#ifdef __CUDACC__
#define RLHF_FAST_TOKEN __device__ __forceinline__
#else
#define RLHF_FAST_TOKEN inline __attribute__((always_inline))
#endif

namespace rlhf_fast {

// The numbers as the tokens need them.
template <class T>
struct PPOLossBounds {
  T low, high, cliprange_value, vf_coef, entropy_coef, kl_coef, dual_clip, clamp;
  KL kl;
};

template <class T>
PPOLossBounds<T> ppo_loss_bounds(const PPOLossNumbers& n) {
  return {T(1 - n.cliprange_low), T(1 + n.cliprange_high), T(n.cliprange_value), T(n.vf_coef), T(n.entropy_coef),
          T(n.kl_coef),           T(n.dual_clip),          T(n.log_ratio_clamp), n.kl};
}

// condition ? x : y by the bits: g++ turns `?:` into branches that it threads through a loop, which then stays scalar.
template <class T>
RLHF_FAST_TOKEN T choose(bool condition, T x, T y) {
#ifdef __CUDACC__
  return condition ? x : y;
#else
  using Bits = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  Bits a, b;
  std::memcpy(&a, &x, sizeof(T));
  std::memcpy(&b, &y, sizeof(T));
  const Bits all = -static_cast<Bits>(condition), chosen = (a & all) | (b & ~all);
  std::memcpy(&x, &chosen, sizeof(T));
  return x;
#endif
}

template <class T>
RLHF_FAST_TOKEN T larger(T a, T b) {
  return choose((a > b) | (a != a), a, b);
}

// Also where a bound is NaN.
template <class T>
RLHF_FAST_TOKEN T clamped(T x, T low, T high) {
  const T raised = choose((x < low) | (low != low), low, x);
  return choose((raised > high) | (high != high), high, raised);
}

// The share of the unclipped loss's derivative that the larger of the two has. Equal ones give half of theirs each, as
// torch.maximum has it, and inside of the range the clipped one has the same derivative.
template <class T>
RLHF_FAST_TOKEN T share_of_unclipped(T unclipped, T clipped, T x, T low, T high) {
  const T tied = choose((x >= low) & (x <= high), T(1), T(0.5));
  return choose(unclipped == clipped, tied, T(unclipped > clipped));
}

// Each with its derivative by the logprob or the value, and without the token's weight.
template <class T>
struct PolicyTerm {
  T loss, slope, ratio, approx_kl, clipped;
};
template <class T>
struct ValueTerm {
  T loss, slope, clipped;
};
template <class T>
struct KLTerm {
  T estimate, slope;
};

template <class Math, bool DUAL, class T>
RLHF_FAST_TOKEN PolicyTerm<T> policy_term(T log_ratio, T advantage, const PPOLossBounds<T>& bounds) {
  PolicyTerm<T> term;
  term.approx_kl = log_ratio * log_ratio * T(0.5);
  term.ratio = Math::exp(clamped(log_ratio, -bounds.clamp, bounds.clamp));
  const T unclipped = -advantage * term.ratio, clipped = -advantage * clamped(term.ratio, bounds.low, bounds.high);
  term.clipped = T(clipped > unclipped);
  term.loss = larger(unclipped, clipped);
  T share = share_of_unclipped(unclipped, clipped, term.ratio, bounds.low, bounds.high);
  if (DUAL) {
    const T bound = -advantage * bounds.dual_clip;
    const T kept = choose(term.loss == bound, share * T(0.5), choose(term.loss < bound, share, T(0)));
    share = choose(advantage < 0, kept, share);
    term.loss = choose((advantage < 0) & (bound < term.loss), bound, term.loss);
  }
  term.slope = choose((log_ratio >= -bounds.clamp) & (log_ratio <= bounds.clamp), unclipped * share, T(0));
  return term;
}

template <class T>
RLHF_FAST_TOKEN ValueTerm<T> value_term(T value, T old, T target, const PPOLossBounds<T>& bounds) {
  const T low = old - bounds.cliprange_value, high = old + bounds.cliprange_value;
  const T error = value - target, clipped_error = clamped(value, low, high) - target;
  const T unclipped = error * error, clipped = clipped_error * clipped_error;
  return {larger(unclipped, clipped) * T(0.5), error * share_of_unclipped(unclipped, clipped, value, low, high),
          T(clipped > unclipped)};
}

// Schulman's estimates of the KL divergence from difference = logprob - ref_logprob.
template <class Math, KL kl, class T>
RLHF_FAST_TOKEN KLTerm<T> kl_term(T difference) {
  if (kl == KL::k1) return {difference, T(1)};
  if (kl == KL::k2) return {difference * difference * T(0.5), difference};
  if (kl == KL::k3) {
    const T slope = -Math::expm1(-difference);
    return {difference - slope, slope};
  }
  const T falling = choose(difference < 0, T(-1), difference);
  return {choose(difference < 0, -difference, difference), choose(difference > 0, T(1), falling)};
}

// From the means to the loss: what has no weight may be infinite.
template <class T>
RLHF_FAST_TOKEN double ppo_loss_of(const double* means, const PPOLossBounds<T>& bounds) {
  double loss = means[0];
  if (bounds.vf_coef != 0) loss += bounds.vf_coef * means[1];
  if (bounds.entropy_coef != 0) loss -= bounds.entropy_coef * means[2];
  if (bounds.kl_coef != 0) loss += bounds.kl_coef * means[3];
  return loss;
}

// Of no token 0, whatever the denominator.
RLHF_FAST_TOKEN double ppo_loss_mean(double sum, double denominator) { return sum == 0 ? 0 : sum / denominator; }

}  // namespace rlhf_fast
