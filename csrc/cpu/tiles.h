// A row of logits, a tile at a time: scaled into the L1 cache, then reduced. SPDX-License-Identifier: Apache-2.0
//
// The tiles of a row and the tree of each sum follow from V alone, and for all dtypes the same code reduces them.
#pragma once
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "lanes.h"

namespace rlhf_fast::cpu {

constexpr int tile = 4096;  // logits; 16 KB as float
constexpr int step = 32;    // a tile is filled up to whole steps, and a loop takes one of them at once

// z = softcap * tanh(x / softcap) / temperature, without the cap where it is 0.
struct Scaling {
  float softcap, per_softcap, per_temperature;
  Scaling(double softcap, double temperature)
      : softcap(static_cast<float>(softcap)),
        per_softcap(softcap > 0 ? static_cast<float>(1 / softcap) : 0),
        per_temperature(static_cast<float>(1 / temperature)) {}
  INLINE bool identity() const { return softcap == 0 && per_temperature == 1; }
  template <int L, class V>
  INLINE V apply(V x) const {
    return (softcap == 0 ? x : softcap * Lanes<L>::tanh(x * per_softcap)) * per_temperature;
  }
};

template <class T>
struct Row {
  const T* data;
  int64_t stride, size;
};

// Puts `count` elements, `stride` apart, side by side.
template <class T>
__attribute__((noinline)) void gather(const T* from, int64_t stride, int64_t count, T* to) {
  for (int64_t i = 0; i < count; i++) to[i] = from[i * stride];
}

// Up to L elements; what is beyond `count` is 0.
template <int L, class T>
INLINE auto load_some(const T* from, int64_t stride, int64_t count) {
  T x[L] = {};
  gather(from, stride, count, x);
  return Lanes<L>::load(x);
}

// Logits [at, at + tile) of the row, scaled; at the end of the row filled up with -inf to whole steps. `buffer` may
// stay unused. Unless `ORDERED`, they may change places.
template <int L, bool ORDERED = true, class T>
INLINE const float* load_tile(const Row<T>& row, int64_t at, const Scaling& scaling, float* buffer) {
  using N = Lanes<L>;
  const int64_t count = std::min<int64_t>(tile, row.size - at);
  const T* from = row.data + at * row.stride;
  const bool identity = scaling.identity();
  if constexpr (sizeof(T) == 4)
    if (row.stride == 1 && count == tile && identity) return from;
  const int64_t whole = row.stride == 1 ? count / L * L : 0, padded = (count + step - 1) / step * step;
  int64_t i = 0;
  if constexpr (std::is_same_v<T, bfloat16> && !ORDERED) {
    for (; i + 2 * L <= whole && identity; i += 2 * L) {
      typename N::Floats even, odd;
      N::load_pairs(from + i, even, odd);
      N::store(buffer + i, even), N::store(buffer + i + L, odd);
    }
  }
  if (identity)
    for (; i < whole; i += L) N::store(buffer + i, N::load(from + i));
  else
    for (; i < whole; i += L) N::store(buffer + i, scaling.apply<L>(N::load(from + i)));
  for (; i < padded; i += L) {
    const int64_t rest = std::clamp<int64_t>(count - i, 0, L);
    const auto z = load_some<L>(from + i * row.stride, row.stride, rest);
    N::store(buffer + i, N::first(identity ? z : scaling.apply<L>(z), rest, -infinity));
  }
  return buffer;
}

// One logit, scaled with the same bits as in its tile.
template <int L, class T>
INLINE float load_one(const Row<T>& row, int64_t id, const Scaling& scaling) {
  const auto z = load_some<L>(row.data + id * row.stride, 1, 1);
  return (scaling.identity() ? z : scaling.apply<L>(z))[0];
}

INLINE int64_t tile_steps(int64_t size, int64_t at) { return (std::min<int64_t>(tile, size - at) + step - 1) / step; }

// Asks for a step's bytes of the tile after this one; reading past the end of a row does no harm.
template <class T>
INLINE void prefetch(const Row<T>& row, int64_t i) {
  const char* from = reinterpret_cast<const char*>(row.data + i);
  for (size_t line = 0; line < step * sizeof(T); line += 64) __builtin_prefetch(from + line, 0, 3);
}

template <int L>
INLINE float tile_top(const float* z, int64_t steps) {
  using N = Lanes<L>;
  constexpr int vectors = step / L;
  typename N::Floats top[vectors];
  for (auto& t : top) t = N::fill(-infinity);
  for (int64_t i = 0; i < steps; i++)
    for (int k = 0; k < vectors; k++) top[k] = N::larger(N::load(z + i * step + k * L), top[k]);
  for (int k = 1; k < vectors; k++) top[0] = N::larger(top[0], top[k]);
  return N::maximum(top[0]);
}

// Of some logits: their maximum m, sum of exp(z - m) and of exp(z - m) * (z - m).
struct Softmax {
  double top = -infinity, total = 0, dot = 0;

  // Carries the sums over to another maximum.
  INLINE void lift(double to) {
    if (top == to || total == 0) return;
    const double shift = top - to, weight = std::exp(shift);
    dot = weight == 0 ? dot * weight : (dot + total * shift) * weight;
    total *= weight;
  }
  INLINE void merge(Softmax other) {
    const double to = std::max(top, other.top);
    lift(to), other.lift(to);
    top = to, total += other.total, dot += other.dot;
  }
  // A row of nothing but -inf has the logsumexp -inf and no entropy.
  double lse() const { return (total == 0 ? 0 : top) + std::log(total); }
  double entropy() const { return std::log(total) - dot / total; }
};

template <int L, class T>
INLINE Softmax tile_softmax(const Row<T>& row, int64_t at, const float* z) {
  using N = Lanes<L>;
  const int64_t steps = tile_steps(row.size, at);
  const float top = tile_top<L>(z, steps), shift = top == -infinity ? 0 : top;
  const auto low = N::bound();
  typename N::Floats total[2] = {}, dot[2] = {};
  for (int64_t i = 0; i < steps; i++) {
    if (row.stride == 1) prefetch(row, at + tile + i * step);
    for (int k = 0; k < step / L; k++) {
      const auto d = N::clamp(N::load(z + i * step + k * L) - shift, low), e = N::exp_within(d);  // no 0 * -inf
      total[k % 2] += e;
      dot[k % 2] += e * d;
    }
  }
  return {top, N::sum(total[0] + total[1]), N::sum(dot[0] + dot[1])};
}

// The same for float64, plainly.
struct DoubleScaling {
  double softcap, temperature;
  double operator()(double x) const { return (softcap == 0 ? x : softcap * std::tanh(x / softcap)) / temperature; }
};
inline Softmax double_softmax(const Row<double>& row, int64_t at, const DoubleScaling& scaling) {
  const int64_t end = std::min<int64_t>(at + tile, row.size);
  double top = -infinity, z[tile];
  for (int64_t i = at; i < end; i++) {
    z[i - at] = scaling(row.data[i * row.stride]);
    top = z[i - at] > top ? z[i - at] : top;
  }
  double total = 0, dot = 0;
  const double shift = top == -infinity ? 0 : top;
  for (int64_t i = at; i < end; i++) {
    if (z[i - at] == -infinity) continue;
    const double d = z[i - at] - shift, e = std::exp(d);
    total += e, dot += e * d;
  }
  return {top, total, dot};
}

}  // namespace rlhf_fast::cpu
