// Rows of two models side by side: the sums of the exact KL divergence. SPDX-License-Identifier: Apache-2.0
#pragma once
#include "tiles.h"

namespace rlhf_fast::cpu {

// Of some logits z and w of the two models, m and n being their maxima.
struct Pair {
  Softmax policy;                             // of z
  double ref_top = -infinity, ref_total = 0;  // n, sum of exp(w - n)
  double cross = 0;                           // sum of exp(z - m) * ((z - m) - (w - n))
  bool infinite = false;                      // a token that only the reference excludes

  INLINE void lift(double to, double ref_to) {
    const double shift = policy.total == 0 ? 0 : policy.top - to, ref_shift = ref_total == 0 ? 0 : ref_top - ref_to;
    if (shift != ref_shift) cross += policy.total * (shift - ref_shift);
    if (shift != 0) cross *= std::exp(shift);
    policy.lift(to);
    if (ref_shift != 0) ref_total *= std::exp(ref_shift);
  }
  INLINE void merge(Pair other) {
    const double to = std::max(policy.top, other.policy.top), ref_to = std::max(ref_top, other.ref_top);
    lift(to, ref_to), other.lift(to, ref_to);
    policy.top = to, policy.total += other.policy.total, policy.dot += other.policy.dot;
    ref_top = ref_to, ref_total += other.ref_total;
    cross += other.cross;
    infinite |= other.infinite;
  }
  double ref_lse() const { return (ref_total == 0 ? 0 : ref_top) + std::log(ref_total); }
  double kl() const {
    const double finite = cross / policy.total - std::log(policy.total) + std::log(ref_total);
    return infinite ? finite + double(infinity) : finite;  // NaN stays
  }
};

// Calls `take` on all logits of two tiles, two scaled vectors of each at once, filled up with -inf. They may change
// places, but go side by side.
template <int L, class T, class U, class F>
INLINE void each_pair(const T* from, const U* ref_from, int64_t count, const Scaling& scaling, F take) {
  using N = Lanes<L>;
  const auto scaled = [&](auto x) __attribute__((always_inline)) { return scaling.apply<L, Scale::temperature>(x); };
  typename N::Floats z[2], w[2];
  int64_t i = 0;
  for (; i + 2 * L <= count; i += 2 * L) {
    if constexpr (std::is_same_v<T, U>) {
      N::load_two(from + i, z[0], z[1]), N::load_two(ref_from + i, w[0], w[1]);
    } else {
      for (int k = 0; k < 2; k++) z[k] = N::load(from + i + k * L), w[k] = N::load(ref_from + i + k * L);
    }
    for (int k = 0; k < 2; k++) z[k] = scaled(z[k]), w[k] = scaled(w[k]);
    take(z, w);
  }
  if (i == count) return;
  T rest[2 * L] = {};
  U ref_rest[2 * L] = {};
  std::memcpy(static_cast<void*>(rest), from + i, (count - i) * sizeof(T));
  std::memcpy(static_cast<void*>(ref_rest), ref_from + i, (count - i) * sizeof(U));
  for (int k = 0; k < 2; k++) {
    const int64_t valid = std::clamp<int64_t>(count - i - k * L, 0, L);
    z[k] = N::first(scaled(N::load(rest + k * L)), valid, -infinity);
    w[k] = N::first(scaled(N::load(ref_rest + k * L)), valid, -infinity);
  }
  take(z, w);
}

// The sums of two tiles with references in the places of their maxima; `above`: how far one of these lies above its
// own.
template <int L, class T, class U>
INLINE Pair sums_of(const T* from, const U* ref_from, int64_t count, const Scaling& scaling, float reference,
                    float ref_reference, float& above) {
  using N = Lanes<L>;
  using V = typename N::Floats;
  const V low = N::bound(), lowest_ratio = N::fill(-1e30f), zero = N::fill(0);
  V top = low, total = zero, dot = zero, ref_total = zero, cross = zero;
  typename N::Words infinite = {};
  each_pair<L>(from, ref_from, count, scaling, [&](const V(&z)[2], const V(&w)[2]) __attribute__((always_inline)) {
    const V ref_d[] = {w[0] - ref_reference, w[1] - ref_reference};
    const V d[] = {N::clamp(z[0] - reference, low), N::clamp(z[1] - reference, low), N::clamp(ref_d[0], low),
                   N::clamp(ref_d[1], low)};
    V e[4];
    N::exp_within(d, e);
    for (int k = 0; k < 4; k++) top = N::larger(d[k], top);
    for (int k = 0; k < 2; k++) {
      total += e[k];
      dot += e[k] * d[k];
      ref_total += e[k + 2];
      cross += e[k] * (d[k] - N::larger(lowest_ratio, ref_d[k]));  // no 0 * inf
      infinite |= reinterpret_cast<typename N::Words>(w[k] == -infinity) &
                  reinterpret_cast<typename N::Words>(z[k] != -infinity);
    }
  });
  above = N::maximum(top);
  const double sum = N::sum(total), ref_sum = N::sum(ref_total);
  Pair pair{{sum == 0 ? -infinity : reference, sum, N::sum(dot)},
            ref_sum == 0 ? -infinity : ref_reference,
            ref_sum,
            N::sum(cross)};
  for (int i = 0; i < L; i++) pair.infinite |= infinite[i] != 0;
  return pair;
}

// As row_softmax does it: the maxima of the tiles before are the references. They never fall: a tile whose terms of the
// reference model all underflow has no reference of its own, and its cross terms are made against the last one.
template <int L, class T, class U>
INLINE Pair row_pair(const Row<T>& row, const Row<U>& ref_row, const Scaling& scaling) {
  T buffer[tile];
  U ref_buffer[tile];
  Pair pair;
  float top = -infinity, ref_top = -infinity;
  for (int64_t at = 0; at < row.size; at += tile) {
    const int64_t count = std::min<int64_t>(tile, row.size - at);
    const T* from = tile_at(row, at, count, buffer);
    const U* ref_from = tile_at(ref_row, at, count, ref_buffer);
    Pair part;
    float above;
    for (int looked = pair.policy.total == 0 || pair.ref_total == 0; looked < 2; looked++) {
      if (looked) {
        top = std::max(top, top_of<L, Scale::temperature>(from, count, scaling));
        ref_top = std::max(ref_top, top_of<L, Scale::temperature>(ref_from, count, scaling));
      }
      part = sums_of<L>(from, ref_from, count, scaling, top == -infinity ? 0 : top, ref_top == -infinity ? 0 : ref_top,
                        above);
      if (above <= drift) break;
    }
    pair.merge(part);
  }
  return pair;
}

}  // namespace rlhf_fast::cpu
