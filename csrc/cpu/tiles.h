// A row of logits, a tile at a time: summed as it is read, or scaled into the L1 cache.
// SPDX-License-Identifier: Apache-2.0
//
// The tiles of a row and the tree of each sum follow from V alone. Against what a tile is summed follows from the tiles
// before it, so from the row alone.
#pragma once
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "lanes.h"

namespace rlhf_fast::cpu {

constexpr int tile = 4096;  // logits; 16 KB as float
constexpr int step = 32;    // a tile in the cache is filled up to whole steps

enum class Scale { none, temperature, softcap };

// z = softcap * tanh(x / softcap) / temperature, without the cap where it is 0.
struct Scaling {
  float softcap, per_softcap, per_temperature;
  Scaling(double softcap, double temperature)
      : softcap(static_cast<float>(softcap)),
        per_softcap(softcap > 0 ? static_cast<float>(1 / softcap) : 0),
        per_temperature(static_cast<float>(1 / temperature)) {}
  INLINE bool identity() const { return softcap == 0 && per_temperature == 1; }
  INLINE Scale kind() const { return softcap != 0 ? Scale::softcap : identity() ? Scale::none : Scale::temperature; }
  template <int L, Scale SCALE, class V>
  INLINE V apply(V x) const {
    if constexpr (SCALE == Scale::none) return x;
    if constexpr (SCALE == Scale::temperature) return Lanes<L>::rounded(x * per_temperature);
    return Lanes<L>::rounded(softcap * Lanes<L>::tanh(x * per_softcap) * per_temperature);
  }
  template <int L, class V>
  INLINE V apply(V x) const {
    return softcap == 0 ? apply<L, Scale::temperature>(x) : apply<L, Scale::softcap>(x);
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

// Elements [at, at + count) of the row side by side, in `buffer` if they are not so already.
template <class T>
INLINE const T* tile_at(const Row<T>& row, int64_t at, int64_t count, T* buffer) {
  const T* from = row.data + at * row.stride;
  if (row.stride == 1) return from;
  gather(from, row.stride, count, buffer);
  return buffer;
}

// Up to L elements; what is beyond `count` is 0.
template <int L, class T>
INLINE auto load_some(const T* from, int64_t stride, int64_t count) {
  T x[L] = {};
  gather(from, stride, count, x);
  return Lanes<L>::load(x);
}

// Logits [at, at + tile) of the row, scaled; at the end of the row filled up with -inf to whole steps. `buffer` may
// stay unused.
template <int L, class T>
INLINE const float* load_tile(const Row<T>& row, int64_t at, const Scaling& scaling, float* buffer) {
  using N = Lanes<L>;
  const int64_t count = std::min<int64_t>(tile, row.size - at);
  const T* from = row.data + at * row.stride;
  const bool identity = scaling.identity();
  if constexpr (sizeof(T) == 4)
    if (row.stride == 1 && count == tile && identity) return from;
  const int64_t whole = row.stride == 1 ? count / L * L : 0, padded = (count + step - 1) / step * step;
  int64_t i = 0;
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

// Of some logits: about their maximum m, sum of exp(z - m) and of exp(z - m) * (z - m).
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

// ---- A row that is read once: no pass for the maximum of a tile, but for the first.

// How far a logit may lie above the maximum of the tiles before it. The sums are in float32: what they lose in the
// entropy grows with it, 4 * 2^-24 here.
constexpr float drift = 4;

// Vectors taken at once, one instruction of all before the next one, so that none waits for another.
template <int L>
constexpr int together = L == 16 ? 4 : 2;
template <int L>
using Group = typename Lanes<L>::Floats[together<L>];

// Calls `take` on all logits of a tile, `together` scaled vectors at once, filled up with -inf. They may change places.
template <int L, Scale SCALE, class T, class F>
INLINE void each_group(const T* from, int64_t count, const Scaling& scaling, F take) {
  using N = Lanes<L>;
  constexpr int size = together<L> * L;
  Group<L> z;
  int64_t i = 0;
  for (; i + size <= count; i += size) {
    for (int k = 0; k < together<L>; k += 2) N::load_two(from + i + k * L, z[k], z[k + 1]);
    for (auto& x : z) x = scaling.apply<L, SCALE>(x);
    take(z);
  }
  if (i == count) return;
  T rest[size] = {};
  std::memcpy(static_cast<void*>(rest), from + i, (count - i) * sizeof(T));
  for (int k = 0; k < together<L>; k++) {
    const int64_t valid = std::clamp<int64_t>(count - i - k * L, 0, L);
    z[k] = N::first(scaling.apply<L, SCALE>(N::load(rest + k * L)), valid, -infinity);
  }
  take(z);
}

template <int L, Scale SCALE, class T>
INLINE float top_of(const T* from, int64_t count, const Scaling& scaling) {
  using N = Lanes<L>;
  Group<L> top;
  for (auto& t : top) t = N::fill(-infinity);
  each_group<L, SCALE>(from, count, scaling, [&](const Group<L>& z) __attribute__((always_inline)) {
    for (int k = 0; k < together<L>; k++) top[k] = N::larger(z[k], top[k]);
  });
  for (int k = 1; k < together<L>; k++) top[0] = N::larger(top[0], top[k]);
  return N::maximum(top[0]);
}

// The sums of a tile with `reference` in the place of its maximum; `above`: how far that one lies above it. Where it is
// above `drift`, the sums are of no use.
template <int L, Scale SCALE, class T>
INLINE Softmax sums_of(const T* from, int64_t count, const Scaling& scaling, float reference, float& above) {
  using N = Lanes<L>;
  constexpr int vectors = together<L>;
  const auto low = N::bound();
  const auto zero = N::fill(0);
  typename N::Floats top = low, total[] = {zero, zero}, dot[] = {zero, zero};  // more would not fit the registers
  each_group<L, SCALE>(from, count, scaling, [&](const Group<L>& z) __attribute__((always_inline)) {
    Group<L> d, e;
    for (int k = 0; k < vectors; k++) d[k] = N::clamp(z[k] - reference, low);  // no 0 * -inf
    for (int k = 0; k < vectors; k++) top = N::larger(d[k], top);
    N::exp_within(d, e);
    for (int k = 0; k < vectors; k++) total[k % 2] += e[k];
    for (int k = 0; k < vectors; k++) dot[k % 2] += e[k] * d[k];
  });
  above = N::maximum(top);
  const double sum = N::sum(total[0] + total[1]);
  return {sum == 0 ? -infinity : reference, sum, N::sum(dot[0] + dot[1])};
}

template <int L, Scale SCALE, class T>
INLINE Softmax row_softmax(const Row<T>& row, const Scaling& scaling) {
  T buffer[tile];
  Softmax softmax;
  float reference = 0;
  for (int64_t at = 0; at < row.size; at += tile) {
    const int64_t count = std::min<int64_t>(tile, row.size - at);
    const T* from = tile_at(row, at, count, buffer);
    Softmax part;
    float above;
    for (int looked = softmax.total == 0; looked < 2; looked++) {
      if (looked) reference = top_of<L, SCALE>(from, count, scaling);
      part = sums_of<L, SCALE>(from, count, scaling, reference == -infinity ? 0 : reference, above);
      if (above <= drift) break;
    }
    softmax.merge(part);
  }
  return softmax;
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
