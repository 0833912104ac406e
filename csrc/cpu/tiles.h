// A row of logits, a tile at a time: scaled into the L1 cache, then reduced. SPDX-License-Identifier: Apache-2.0
//
// The tiles of a row and the tree of each sum follow from V alone, and for all dtypes the same code reduces them.
#pragma once
#include <algorithm>
#include <cmath>

#include "lanes.h"

namespace rlhf_fast::cpu {

constexpr int tile = 4096;       // logits; 16 KB as float
constexpr int step = 2 * lanes;  // logits that a loop takes at once
constexpr int ahead = 2;         // prefetched lines ahead of a float, in units of `tile`

// z = softcap * tanh(x / softcap) / temperature, without the cap where it is 0.
struct Scaling {
  float softcap, per_softcap, per_temperature;
  Scaling(double softcap, double temperature)
      : softcap(static_cast<float>(softcap)),
        per_softcap(softcap > 0 ? static_cast<float>(1 / softcap) : 0),
        per_temperature(static_cast<float>(1 / temperature)) {}
  INLINE bool identity() const { return softcap == 0 && per_temperature == 1; }
  INLINE Floats operator()(Floats x) const {
    return (softcap == 0 ? x : softcap * tanh(x * per_softcap)) * per_temperature;
  }
};

template <class T>
struct Row {
  const T* data;
  int64_t stride, size;
};

// Up to 16 elements, -inf (0xff80, 0xfc00) where there are none.
template <class T>
INLINE Floats load_some(const T* from, int64_t stride, int64_t count) {
  T x[lanes];
  for (int i = 0; i < lanes; i++) {
    if constexpr (sizeof(T) == 4)
      x[i] = i < count ? from[i * stride] : -infinity;
    else
      x[i] = i < count ? from[i * stride] : T{0};
  }
  Floats y = load(x);
  if constexpr (sizeof(T) == 2)
    for (int i = 0; i < lanes; i++) y[i] = i < count ? y[i] : -infinity;
  return y;
}

// Logits [at, at + tile) of the row, scaled; at the end of the row filled up with -inf to whole steps. `buffer` may
// stay unused.
template <class T>
INLINE const float* load_tile(const Row<T>& row, int64_t at, const Scaling& scaling, float* buffer) {
  const int64_t count = std::min<int64_t>(tile, row.size - at);
  const T* from = row.data + at * row.stride;
  if constexpr (sizeof(T) == 4)
    if (row.stride == 1 && count == tile && scaling.identity()) return from;
  const int64_t whole = row.stride == 1 ? count / lanes * lanes : 0, padded = (count + step - 1) / step * step;
  if (scaling.identity())
    for (int64_t i = 0; i < whole; i += lanes) store(buffer + i, load(from + i));
  else
    for (int64_t i = 0; i < whole; i += lanes) store(buffer + i, scaling(load(from + i)));
  for (int64_t i = whole; i < padded; i += lanes) {
    const int64_t rest = std::max<int64_t>(0, count - i);
    Floats z = load_some(from + i * row.stride, row.stride, rest);
    if (!scaling.identity()) z = scaling(z);
    for (int k = 0; k < lanes; k++) z[k] = k < rest ? z[k] : -infinity;  // the cap makes -inf finite
    store(buffer + i, z);
  }
  return buffer;
}

INLINE int64_t tile_steps(int64_t size, int64_t at) { return (std::min<int64_t>(tile, size - at) + step - 1) / step; }

// Asks for the bytes that the tile after this one will read; reading past the end of a row does no harm.
template <class T>
INLINE void prefetch(const Row<T>& row, int64_t i) {
  const char* from = reinterpret_cast<const char*>(row.data + i);
  for (size_t line = 0; line < step * sizeof(T); line += 64) __builtin_prefetch(from + line, 0, 3);
}

INLINE float tile_top(const float* z, int64_t steps) {
  Floats a = fill(-infinity), b = a;
  for (int64_t i = 0; i < steps; i++) {
    a = larger(load(z + i * step), a);
    b = larger(load(z + i * step + lanes), b);
  }
  return maximum(larger(a, b));
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

template <class T>
INLINE Softmax tile_softmax(const Row<T>& row, int64_t at, const float* z) {
  const int64_t steps = tile_steps(row.size, at);
  const float top = tile_top(z, steps), shift = top == -infinity ? 0 : top;
  Floats total_a{}, total_b{}, dot_a{}, dot_b{};
  const Floats low = fill(-1e30f);  // 0 * -inf
  for (int64_t i = 0; i < steps; i++) {
    if (row.stride == 1) prefetch(row, at + tile + i * step);
    const Floats a = larger(low, load(z + i * step) - shift), b = larger(low, load(z + i * step + lanes) - shift);
    const Floats e = exp(a), f = exp(b);
    total_a += e, total_b += f;
    dot_a += e * a, dot_b += f * b;
  }
  return {top, sum(total_a + total_b), sum(dot_a + dot_b)};
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
