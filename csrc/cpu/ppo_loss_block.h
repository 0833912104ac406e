// A block of tokens of ppo_loss on the CPU: loops that become vectors. SPDX-License-Identifier: Apache-2.0
#pragma once
#include <algorithm>

#include "ppo_loss_exp.h"

namespace rlhf_fast::cpu {
namespace {

constexpr int64_t block = 256;  // tokens in L1

// One input, [B, T] or [N] with any strides.
template <class T>
struct Input {
  const T* data = nullptr;
  int64_t stride_b = 0, stride_t = 0, width = 1;

  Input() = default;
  explicit Input(const View& view) : data(view.as<const T>()) {
    const int last = view.dims - 1;
    if (last < 0) return;
    width = view.shape[last], stride_t = view.stride[last];
    if (last == 1) stride_b = view.stride[0];
    if (last == 0 || view.shape[0] == 1) stride_b = width * stride_t;  // of the only row
    if (stride_b == 0 && stride_t == 0) width = int64_t(1) << 62;      // one token for all
  }

  // Tokens [from, from + count) of the flattened batch: where they lie, or copied to `room` with 0 behind them.
  INLINE const T* tokens(int64_t from, int64_t count, T* room) const {
    if (data == nullptr) return room;
    if (stride_t == 1 && stride_b == width && count == block) return data + from;
    int64_t b = from / width, t = from % width;
    for (int64_t i = 0; i < count; b++, t = 0) {
      const int64_t here = std::min(width - t, count - i);
      const T* row = data + b * stride_b + t * stride_t;
      if (stride_t == 1) {
        std::memcpy(room + i, row, here * sizeof(T));
      } else if (stride_t == 0) {
        std::fill(room + i, room + i + here, *row);
      } else {
        for (int64_t j = 0; j < here; j++) room[i + j] = row[j * stride_t];
      }
      i += here;
    }
    std::memset(room + count, 0, (block - count) * sizeof(T));
    return room;
  }
};

constexpr int inputs = 9;  // in this order; the last is the weight of a token's row
enum { LOGPROBS, OLD_LOGPROBS, ADVANTAGES, VALUES, OLD_VALUES, RETURNS, ENTROPY, REF_LOGPROBS, WEIGHT };
enum { POLICY_LOSS, VALUE_LOSS, ENTROPIES, KLS, APPROX_KL, CLIPFRAC, VALUE_CLIPFRAC, RATIO };  // the sums

struct Partial {
  double sums[ppo_loss_sums] = {};
  double ratio_max = 0;
};

// A block on its way: every loop below is over its tokens and becomes vectors.
template <class T>
struct Block {
  const T* in[inputs];
  const PPOLossBounds<T> bounds;
  alignas(64) T weight[block];  // 0 where masked; aligned, or else the loops begin and end token by token
  alignas(64) T terms[ppo_loss_sums][block];
  alignas(64) T d_logprobs[block], d_values[block], d_entropy[block];

  // Loaded before it is asked whether it counts: a load that depends on that is no vector's.
  INLINE T valid(int input, int64_t i) const {
    const T x = in[input][i];
    return choose(weight[i] != 0, x, T(0));
  }
  INLINE T difference(int input, int other, int64_t i) const {
    const T x = in[input][i] - in[other][i];
    return choose(weight[i] != 0, x, T(0));
  }

  INLINE void weigh(const uint8_t* mask) {
    for (int64_t i = 0; i < block; i++) {
      const T given = in[WEIGHT][i];
      weight[i] = choose(mask[i] != 0, given, T(0));
    }
  }
  template <bool DUAL>
  INLINE void policy() {
#pragma omp simd
    for (int64_t i = 0; i < block; i++) {
      const PolicyTerm<T> term =
          policy_term<Math, DUAL>(difference(LOGPROBS, OLD_LOGPROBS, i), valid(ADVANTAGES, i), bounds);
      terms[POLICY_LOSS][i] = term.loss, terms[APPROX_KL][i] = term.approx_kl, terms[CLIPFRAC][i] = term.clipped;
      terms[RATIO][i] = choose(weight[i] != 0, term.ratio, T(0)), d_logprobs[i] = term.slope;
    }
  }
  INLINE void value(int old_values) {
#pragma omp simd
    for (int64_t i = 0; i < block; i++) {
      const ValueTerm<T> term = value_term(valid(VALUES, i), valid(old_values, i), valid(RETURNS, i), bounds);
      terms[VALUE_LOSS][i] = term.loss, terms[VALUE_CLIPFRAC][i] = term.clipped;
      d_values[i] = bounds.vf_coef * term.slope;
    }
  }
  template <KL kl>
  INLINE void estimate() {
    const T coef = bounds.kl_coef;
#pragma omp simd
    for (int64_t i = 0; i < block; i++) {
      const KLTerm<T> term = kl_term<Math, kl>(difference(LOGPROBS, REF_LOGPROBS, i));
      terms[KLS][i] = term.estimate;
      d_logprobs[i] += choose(coef != 0, coef * term.slope, T(0));  // without a weight it may be infinite
    }
  }
  INLINE void estimate() {
    if (bounds.kl == KL::k1) estimate<KL::k1>();
    if (bounds.kl == KL::k2) estimate<KL::k2>();
    if (bounds.kl == KL::k3) estimate<KL::k3>();
    if (bounds.kl == KL::abs) estimate<KL::abs>();
  }
  INLINE void entropy() {
    for (int64_t i = 0; i < block; i++) terms[ENTROPIES][i] = valid(ENTROPY, i);
  }
  INLINE void gradient(const T* slopes, T scale, T* to) const {
    for (int64_t i = 0; i < block; i++) {
      const T gradient = weight[i] * scale * slopes[i];
      to[i] = choose(weight[i] != 0, gradient, T(0));  // the scale may be infinite
    }
  }
};

// Sums lane by lane: four tokens in T, then in double.
template <class T>
struct Sums {
  static constexpr int lanes = 16;
  alignas(64) double wide[ppo_loss_sums][lanes] = {};
  alignas(64) T largest[lanes] = {};

  INLINE void add(int which, const T* weight, const T* x) {
    for (int64_t i = 0; i < block; i += 4 * lanes) {
      for (int l = 0; l < lanes; l++) {
        const auto at = [&](int64_t j) __attribute__((always_inline)) { return weight[i + j + l] * x[i + j + l]; };
        wide[which][l] += static_cast<double>((at(0) + at(lanes)) + (at(2 * lanes) + at(3 * lanes)));
      }
    }
  }
  INLINE void add_largest(const T* ratio) {
    alignas(64) T top[lanes];
    std::copy(largest, largest + lanes, top);
    for (int64_t i = 0; i < block; i += lanes) {
#pragma omp simd
      for (int l = 0; l < lanes; l++) top[l] = larger(ratio[i + l], top[l]);
    }
    std::copy(top, top + lanes, largest);
  }
  INLINE Partial merged() {
    Partial partial;
    for (int s = 0; s < ppo_loss_sums; s++) {
      for (int width = lanes / 2; width > 0; width /= 2) {
        for (int l = 0; l < width; l++) wide[s][l] += wide[s][l + width];
      }
      partial.sums[s] = wide[s][0];
    }
    for (const T x : largest) partial.ratio_max = larger(partial.ratio_max, static_cast<double>(x));
    return partial;
  }
};

}  // namespace
}  // namespace rlhf_fast::cpu
