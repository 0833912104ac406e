// One row of logits on the CPU: its scores, their maxima and the masses of a softmax, all by chunks of one size, so
// that the bits follow from the row and V alone. SPDX-License-Identifier: Apache-2.0
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>

#include "../sample.h"

#define INLINE inline __attribute__((always_inline))
#define CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))

namespace rlhf_fast::cpu {
namespace {

constexpr int chunk = 256;  // tokens; a multiple of what a register holds
constexpr double infinite = std::numeric_limits<double>::infinity();

template <class T>
struct Vector {
  static constexpr int lanes = 64 / sizeof(T);
  typedef T type __attribute__((vector_size(64)));
  static INLINE type load(const T* from) {
    type x;
    std::memcpy(&x, from, sizeof x);
    return x;
  }
  static INLINE type fill(T value) { return value - type{}; }
};
using Doubles = Vector<double>::type;
using Floats = Vector<float>::type;
typedef int32_t Halves __attribute__((vector_size(64)));
typedef int64_t Words __attribute__((vector_size(64)));
constexpr int wide = 8;  // lanes of Doubles

template <class T>
INLINE Doubles widened(const T* from) {
  typedef T Narrow __attribute__((vector_size(wide * sizeof(T))));
  Narrow x;
  std::memcpy(&x, from, sizeof x);
  return __builtin_convertvector(x, Doubles);
}

// The sum of all lanes, always in this order.
INLINE double added(Doubles x) {
  for (int half = wide / 2; half > 0; half /= 2)
    for (int i = 0; i < half; i++) x[i] += x[i + half];
  return x[0];
}
INLINE double added(Floats x) {
  float lanes[2 * wide];
  std::memcpy(lanes, &x, sizeof x);
  return added(widened(lanes) + widened(lanes + wide));
}

// exp of numbers that are not positive, to about one unit in the last place; 0 below -708, where no draw reaches.
INLINE Doubles exponential(Doubles z) {
  const Doubles magic = Vector<double>::fill(0x1.8p52);  // rounds to a whole number and shows it in the last bits
  const auto counts = z >= -708.0;
  Doubles n = z * 0x1.71547652b82fep0 + magic;
  const Words exponent = reinterpret_cast<Words>(n) << 52;
  n -= magic;
  const Doubles r = (z - n * 0x1.62e42fefa3800p-1) - n * 0x1.ef35793c76730p-45;
  constexpr double taylor[] = {
      1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040, 1.0 / 720,
      1.0 / 120,       1.0 / 24,       1.0 / 6,       0.5,          1.0,         1.0};
  Doubles p = Vector<double>::fill(1.0 / 6227020800);
  for (double coefficient : taylor) p = p * r + coefficient;
  return reinterpret_cast<Doubles>((reinterpret_cast<Words>(p) + exponent) & counts);
}

// z = (score - top) / temperature, without its infinities: 0 * inf.
struct Scale {
  double top, temperature;
  INLINE double operator()(double score) const { return (score - top) / temperature; }
  template <class T>
  INLINE T reciprocal() const {
    return static_cast<T>(std::min(1 / temperature, static_cast<double>(std::numeric_limits<T>::max())));
  }
};

// exp of z = distance * (high + low) in float, to two units in the last place of exp and half of one of the distance;
// 0 below -87. `z` is for sums.
struct FloatScale {
  float top, high, low;
  explicit FloatScale(const Scale& scale)
      : top(static_cast<float>(scale.top)),
        high(scale.reciprocal<float>()),
        low(high < std::numeric_limits<float>::max() ? static_cast<float>(1 / scale.temperature - high) : 0) {}
  INLINE Floats operator()(Floats scores, Floats& z) const {
    const Floats distance = scores - top;
    z = distance * high;
    const auto counts = z >= -87.0f;
    Floats n = z * 0x1.715476p0f + 0x1.8p23f;
    const Halves exponent = reinterpret_cast<Halves>(n) << 23;
    n -= 0x1.8p23f;
    Floats r = distance * high - n * 0x1.62e4p-1f;  // z is not rounded here
    r = r + distance * low - n * 0x1.7f7d1cp-20f;
    Floats p = r * 0x1.6a232ep-10f + 0x1.123a7p-7f;  // minimax, error 3e-9
    p = p * r + 0x1.5558f6p-5f;
    p = p * r + 0x1.55549p-3f;
    p = p * r + 0x1.fffffcp-2f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    z = reinterpret_cast<Floats>(reinterpret_cast<Halves>(z) & counts);
    return reinterpret_cast<Floats>((reinterpret_cast<Halves>(p) + exponent) & counts);
  }
};

template <class V>
INLINE V larger(V a, V b) {
  return a > b ? a : b;
}
template <class T>
INLINE T largest(typename Vector<T>::type x) {
  typedef T Half __attribute__((vector_size(32)));
  typedef T Quarter __attribute__((vector_size(16)));
  Half halves[2];
  std::memcpy(halves, &x, sizeof x);
  const Half half = larger(halves[0], halves[1]);
  Quarter quarters[2];
  std::memcpy(quarters, &half, sizeof half);
  const Quarter quarter = larger(quarters[0], quarters[1]);
  T most = quarter[0];
  for (int i = 1; i < 16 / static_cast<int>(sizeof(T)); i++) most = std::max(most, quarter[i]);
  return most;
}

// A row of T (float, or double for double logits), contiguous. The last chunk is read from a copy that -inf fills up.
template <class T>
struct Row {
  const T* data;
  int64_t size;
  T last[chunk];

  INLINE int64_t chunks() const { return (size + chunk - 1) / chunk; }
  INLINE int64_t length(int64_t c) const { return std::min<int64_t>(chunk, size - c * chunk); }
  INLINE const T* operator[](int64_t c) const { return length(c) == chunk ? data + c * chunk : last; }
  INLINE void set(const T* from, int64_t n) {
    data = from, size = n;
    std::fill(last, last + chunk, T(-infinite));
    const int64_t start = size / chunk * chunk;
    std::copy(data + start, data + size, last);
  }
};

struct Extremes {
  double top;
  int64_t finite;  // tokens above -inf
  bool nan;
};

// One read of the row: the largest of each chunk, of all, and whether there is a NaN.
template <class T>
INLINE Extremes extremes(const Row<T>& row, T* maxima) {
  using V = typename Vector<T>::type;
  const V none = Vector<T>::fill(0) - T(infinite);
  using Bits = decltype(none > none);
  Bits finite = {};
  V nan = {};
  Extremes found = {-infinite, 0, false};
  for (int64_t c = 0; c < row.chunks(); c++) {
    const T* from = row[c];
    V best[2] = {none, none};
#pragma GCC unroll 1
    for (int i = 0; i < chunk; i += 2 * Vector<T>::lanes)
      for (int j = 0; j < 2; j++) {
        const V x = Vector<T>::load(from + i + j * Vector<T>::lanes);
        best[j] = larger(x, best[j]);
        nan = x == x ? nan : x;  // `nan |= x != x` is compiled into a loop over the lanes
        finite -= x > none;
      }
    const T top = maxima[c] = largest<T>(larger(best[0], best[1]));
    found.top = std::max(found.top, static_cast<double>(top));
  }
  for (int i = 0; i < Vector<T>::lanes; i++) found.nan |= nan[i] != nan[i], found.finite += finite[i];
  return found;
}

struct Mass {
  double total = 0;   // of exp(z)
  double spread = 0;  // of z exp(z)
};

// The masses of the chunks, and their sums: to 2^-45 where `precise`, else to 2^-21, which is all that float can say.
template <class T>
INLINE Mass softmax(const Row<T>& row, const Scale& scale, bool precise, double* masses) {
  const double top = scale.top, reciprocal = scale.reciprocal<double>();
  const FloatScale in_float(scale);
  Mass sum;
  for (int64_t c = 0; c < row.chunks(); c++) {
    const T* from = row[c];
    if (sizeof(T) == 8 || precise) {
      Doubles mass[2] = {}, spread[2] = {};
      for (int i = 0; i < chunk; i += 2 * wide)
        for (int j = 0; j < 2; j++) {
          const Doubles z = (widened(from + i + j * wide) - top) * reciprocal;
          const Doubles weight = exponential(z);
          mass[j] += weight;
          spread[j] += weight * (z >= -708.0 ? z : Doubles{});
        }
      masses[c] = added(mass[0] + mass[1]);
      sum.spread += added(spread[0] + spread[1]);
    } else {
      Floats mass[2] = {}, spread[2] = {};
      for (int i = 0; i < chunk; i += 4 * wide)
        for (int j = 0; j < 2; j++) {
          Floats z, scores;
          std::memcpy(&scores, from + i + j * 2 * wide, sizeof scores);
          const Floats weight = in_float(scores, z);
          mass[j] += weight;
          spread[j] += weight * z;
        }
      masses[c] = added(mass[0]) + added(mass[1]);
      sum.spread += added(spread[0]) + added(spread[1]);
    }
    sum.total += masses[c];
  }
  return sum;
}

// The first index whose cumulative weight exceeds `target`, which becomes what is left of it there; never one of
// weight 0, and the last one if none does.
INLINE int64_t invert(const double* weights, int64_t n, double& target) {
  int64_t last = 0;
  double reached = 0, before = 0;
  for (int64_t i = 0; i < n; i++) {
    if (!(weights[i] > 0)) continue;
    last = i, before = reached, reached += weights[i];
    if (reached > target) break;
  }
  target -= before;
  return last;
}

// exp(z) for one chunk; returns the sum.
template <class T>
INLINE double weigh(const T* from, const Scale& scale, double* weights) {
  const double top = scale.top, reciprocal = scale.reciprocal<double>();
  Doubles sum = {};
  for (int i = 0; i < chunk; i += wide) {
    const Doubles weight = exponential((widened(from + i) - top) * reciprocal);
    std::memcpy(weights + i, &weight, sizeof weight);
    sum += weight;
  }
  return added(sum);
}

}  // namespace
}  // namespace rlhf_fast::cpu
