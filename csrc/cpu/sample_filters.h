// Top-k, top-p and min-p of one row on the CPU: each becomes a smallest score that stays, and only the tokens above it
// are ever collected. SPDX-License-Identifier: Apache-2.0
#pragma once
#include <utility>

#include "sample_softmax.h"

namespace rlhf_fast::cpu {
namespace {

// What one thread needs for one row after another, allocated for the worst case: every token is a candidate.
template <class T>
struct Scratch {
  static constexpr int bins = 2048;
  template <class X>
  struct Buffer {
    std::unique_ptr<X[]> data;
    explicit Buffer(int64_t n) : data(new X[n]) {}  // not cleared: the system gives pages when they are written
    operator X*() const { return data.get(); }
  };
  int64_t room, chunks;
  Buffer<T> raw, scores, maxima, values;
  Buffer<double> policy_masses, masses, z, weights, block_masses, bin_masses;
  Buffer<int32_t> ids;
  Buffer<std::pair<double, double>> edge;

  explicit Scratch(int64_t size)
      : room((size + chunk) / chunk * chunk + chunk),
        chunks(room / chunk),
        raw(room),
        scores(room),
        maxima(chunks),
        values(room),
        policy_masses(chunks),
        masses(chunks),
        z(room),
        weights(room),
        block_masses(chunks),
        bin_masses(bins),
        ids(room),
        edge(room) {}
};

// The tokens that are still in, in the order of their ids.
template <class T>
struct Candidates {
  T* scores;
  double *z, *weights, *block_masses;
  int32_t* ids;
  int64_t count;

  INLINE void set(int64_t to, int64_t from) {
    scores[to] = scores[from], z[to] = z[from], weights[to] = weights[from], ids[to] = ids[from];
  }
  // The weights in blocks of a chunk, and their sum.
  INLINE double add_up() {
    for (int64_t i = count; i < count + chunk; i++) weights[i] = 0;
    double sum = 0;
    for (int64_t start = 0; start < count; start += chunk) {
      Doubles mass = {};
      for (int i = 0; i < chunk; i += wide) mass += Vector<double>::load(weights + start + i);
      sum += block_masses[start / chunk] = added(mass);
    }
    return sum;
  }
  INLINE int64_t draw(double target) const {
    const int64_t block = invert(block_masses, (count + chunk - 1) / chunk, target);
    return block * chunk + invert(weights + block * chunk, std::min<int64_t>(chunk, count - block * chunk), target);
  }
};

template <class T>
INLINE bool any_from(const T* scores, int n, T least) {
  auto most = Vector<T>::load(scores);
  for (int i = Vector<T>::lanes; i < n; i += Vector<T>::lanes) most = larger(most, Vector<T>::load(scores + i));
  return largest<T>(most) >= least;
}

// The tokens from `least` on, in chunks and parts of them that have one.
template <class T>
INLINE int64_t collect(const Row<T>& row, const Scratch<T>& s, T least) {
  constexpr int part = 64;
  T* const scores = s.values;
  int32_t* const ids = s.ids;
  int64_t n = 0;
  for (int64_t c = 0; c < row.chunks(); c++) {
    if (!(s.maxima[c] >= least)) continue;
    const T* from = row[c];
    const int length = static_cast<int>(row.length(c));
    for (int start = 0; start < length; start += part) {
      if (!any_from(from + start, part, least)) continue;
      for (int i = start; i < std::min(length, start + part); i++) {
        ids[n] = static_cast<int32_t>(c * chunk + i);
        n += from[i] >= least;
      }
    }
  }
  for (int64_t i = 0; i < n; i++) scores[i] = row.data[ids[i]];
  return n;
}

template <class T>
INLINE Candidates<T> candidates(const Row<T>& row, const Scratch<T>& s, T least, const Scale& scale) {
  const int64_t n = collect<T>(row, s, std::max(least, std::numeric_limits<T>::lowest()));  // -inf is none
  double* const all = s.z;
  double* const weights = s.weights;
  for (int64_t i = 0; i < n; i += wide) {
    const Doubles z = (widened(s.values + i) - scale.top) / scale.temperature;
    const Doubles weight = exponential(z);
    std::memcpy(all + i, &z, sizeof z);
    std::memcpy(weights + i, &weight, sizeof weight);
  }
  return {s.values, s.z, s.weights, s.block_masses, s.ids, n};
}

// The smallest float for which `holds`, which is true of `high` and of all between.
template <class T, class Predicate>
INLINE T lowest_that(T high, Predicate holds) {
  using Int = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  const auto ordinal = [](T x) {  // rises with x
    Int bits;
    std::memcpy(&bits, &x, sizeof x);
    return bits < 0 ? bits ^ std::numeric_limits<Int>::max() : bits;
  };
  const auto real = [](Int i) {
    const Int bits = i < 0 ? i ^ std::numeric_limits<Int>::max() : i;
    T x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
  };
  if (holds(T(-infinite))) return T(-infinite);
  Int no = ordinal(T(-infinite)), yes = ordinal(high);
  while (yes - 1 > no) {
    const Int middle = (no & yes) + ((no ^ yes) >> 1);
    (holds(real(middle)) ? yes : no) = middle;
  }
  return real(yes);
}

// Top-k compares after the division, in the precision of the scores: different ones may tie there.
template <class T>
INLINE T top_k_least(const Row<T>& row, const Scratch<T>& s, int64_t k, double temperature) {
  const auto kth = [&](T* values, int64_t n) {
    std::nth_element(values, values + (k - 1), values + n, std::greater<T>());
    return values[k - 1];
  };
  T least = T(-infinite);
  if (k <= row.chunks()) {  // k chunks reach this far, so the k-th largest token does
    std::copy_n(static_cast<T*>(s.maxima), row.chunks(), static_cast<T*>(s.values));
    least = kth(s.values, row.chunks());
  }
  const int64_t n = collect<T>(row, s, least);
  const T divisor = static_cast<T>(temperature), last = kth(s.values, n);
  return lowest_that(last, [&](T score) { return score / divisor >= last / divisor; });
}

// Min-p compares in the precision of the scores too.
template <class T>
INLINE T min_p_least(double min_p, const Scale& scale) {
  if (!(min_p > 0)) return T(-infinite);
  return lowest_that(static_cast<T>(scale.top), [&](T score) {
    return static_cast<T>(std::exp(scale(static_cast<double>(score)))) >= static_cast<T>(min_p);
  });
}

// All that top-p can keep is at least this likely: V tokens of less weigh together less than half of what it drops.
template <class T>
INLINE T top_p_bound(double top_p, double total, int64_t size, const Scale& scale) {
  const double bound = scale.top + scale.temperature * std::log((1 - top_p) * total / (2.0 * size));
  return static_cast<T>(bound - 1e-6 * std::abs(bound));  // if it was rounded up
}

// About where a bit less than that is dropped, by the tokens of some chunks: to be verified.
template <class T>
INLINE T top_p_guess(const Row<T>& row, const Scratch<T>& s, double top_p, double total, const Scale& scale) {
  constexpr double per_bin = 0.02;
  const int64_t step = row.chunks() / 32;
  if (step < 2) return T(-infinite);
  const double per_score = std::min(scale.reciprocal<double>() / per_bin, std::numeric_limits<double>::max());
  double* const masses = s.bin_masses;
  std::fill_n(masses, s.bins, 0.0);
  for (int64_t c = 0; c < row.chunks(); c += step) {
    const T* from = row[c];
    weigh(from, scale, s.weights);
    for (int i = 0; i < chunk; i++) {
      const double bin = (scale.top - static_cast<double>(from[i])) * per_score;
      masses[static_cast<int>(std::min(s.bins - 1.0, bin))] += s.weights[i];
    }
  }
  int bin = s.bins - 1;
  for (double left = 0.8 * (1 - top_p) * total / step; bin > 0 && left >= masses[bin]; bin--) left -= masses[bin];
  return bin == s.bins - 1 ? T(-infinite) : static_cast<T>(scale.top - (bin + 1) * per_bin * scale.temperature);
}

struct Edge {
  double z;      // the least that is kept
  int64_t ties;  // so many of the tokens there are kept, the last ones
};

// The token at which the sum from the top exceeds `reach`: bins by z, then the bins of that bin, and so on; each pass
// narrows the range by their number, so that a few are enough for any numbers.
template <class T>
INLINE Edge find_edge(const Candidates<T>& from, const Scratch<T>& s, double reach) {
  std::pair<double, double>* const active = s.edge;
  double* const masses = s.bin_masses;
  double above = 0;
  // Token i of n is one(i); those of the bin that decides become active.
  const auto narrow = [&](int64_t n, auto one) __attribute__((always_inline)) {
    double low = infinite, high = -infinite;
    for (int64_t i = 0; i < n; i++) low = std::min(low, one(i).first), high = std::max(high, one(i).first);
    const double scale = (s.bins - 1) / (high - low);
    const bool flat = !(scale > 0 && scale < infinite);
    const auto bin = [&](double z) { return flat ? 0 : static_cast<int>((high - z) * scale); };
    std::fill_n(masses, s.bins, 0.0);
    for (int64_t i = 0; i < n; i++) masses[bin(one(i).first)] += one(i).second;
    int at = 0;
    for (const int last = bin(low); at < last && above + masses[at] <= reach; at++) above += masses[at];
    int64_t inside = 0;
    for (int64_t i = 0; i < n; i++) {
      const auto each = one(i);
      active[inside] = each;
      inside += bin(each.first) == at;
    }
    return inside;
  };
  int64_t n = from.count, before;
  n = narrow(n, [&](int64_t i) { return std::pair(from.z[i], from.weights[i]); });
  do {
    before = n;
    if (n > 64) n = narrow(n, [&](int64_t i) { return active[i]; });
  } while (n < before);
  std::sort(active, active + n, [](const auto& a, const auto& b) { return a.first > b.first; });
  Edge edge = {-infinite, 0};
  for (int64_t i = 0; i < n; i++) {
    edge = {active[i].first, active[i].first == edge.z ? edge.ties + 1 : 1};
    if ((above += active[i].second) > reach) break;
  }
  return edge;
}

// What is added from the top up to the last token that top-p keeps: it drops the longest tail, lightest first, whose
// mass is at most 1 - top_p. The threshold lies between two floats, as the reference says.
template <class T>
INLINE double top_p_reach(double top_p, double total) {
  const T rounded = static_cast<T>(1 - top_p);
  double tail = rounded;
  if (sizeof(T) == 4) tail = (tail + static_cast<double>(std::nextafter(rounded, T(infinite)))) / 2;
  return std::nextafter(total * (1 - tail), -infinite);
}

// Leaves of the candidates those above the edge and, of equals there, the last.
template <class T>
INLINE void keep_nucleus(Candidates<T>& from, const Scratch<T>& s, double reach) {
  const Edge edge = find_edge(from, s, reach);
  int64_t first_tie = from.count;
  for (int64_t missing = edge.ties; missing > 0; missing -= from.z[first_tie] == edge.z) first_tie--;
  int64_t n = 0;
  for (int64_t i = 0; i < from.count; i++) {
    from.set(n, i);
    n += (from.z[n] > edge.z) | ((from.z[n] == edge.z) & (i >= first_tie));
  }
  from.count = n;
}

}  // namespace
}  // namespace rlhf_fast::cpu
