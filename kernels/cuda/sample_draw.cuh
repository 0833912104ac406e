// The draw of one row from what the first launch left, by a block. SPDX-License-Identifier: Apache-2.0
#pragma once
#include "sample_filters.cuh"

namespace rlhf_fast::cuda {
namespace {

struct Drawn {
  int64_t id = -1, kept = 0;
  double logprob = __builtin_nan("");
};

// The softmax of a whole row.
template <class A>
struct Merged {
  A top;
  bool broken;
  int64_t finite;
  double mass, spread;

  __device__ static double weight(const Tile<A>& tile, const Scale& scale, double& z) {
    z = scale(tile.top());
    return tile.mass > A(0) ? exp(z) : 0;
  }
  __device__ Merged(Meetings& meet, const Tiles<A>& tiles, double temperature) : mass(0), spread(0) {
    int64_t found = 0, any = 0;
    double most = -INFINITE;
    for (int64_t t = threadIdx.x; t < tiles.count; t += blockDim.x) {
      const Tile<A> tile = tiles.tiles[t];
      most = max(most, double(tile.top()));
      found += tile.finite, any |= tile.broken;
    }
    top = static_cast<A>(combine(meet, most, Max()));
    finite = combine(meet, found + (any << 40), Add());
    broken = finite >> 40, finite &= (int64_t(1) << 40) - 1;
    const Scale scale = {double(top), temperature};
    for (int64_t t = threadIdx.x; t < tiles.count; t += blockDim.x) {
      const Tile<A> tile = tiles.tiles[t];
      double z;
      const double w = weight(tile, scale, z);
      mass += w * tile.mass;
      spread += w > 0 ? w * (tile.spread + tile.mass * z) : 0;
    }
    mass = combine(meet, mass, Add());
    spread = combine(meet, spread, Add());
  }
};

template <class T>
struct Drawing {
  using A = typename Wide<T>::type;
  const Filters<T>& filters;
  const Knobs& knobs;
  const Merged<A>& all;
  double u;

  __device__ Meetings& meet() const { return filters.shared.meet; }

  // The first of the largest.
  __device__ int64_t likeliest() const {
    const auto first = [&](int64_t n, auto is) {
      int64_t found = n;
      for (int64_t i = threadIdx.x; i < n && found == n; i += blockDim.x)
        if (is(i)) found = i;
      return -combine(meet(), -found, Max());
    };
    const int64_t c = first(filters.tiles.chunks(), [&](int64_t i) { return filters.tiles.top(i) == all.top; });
    return c * CHUNK + first(CHUNK, [&](int64_t i) { return filters.token(c * CHUNK + i) == all.top; });
  }

  // From all tokens. The mass of a tile was added up less precisely than the masses of its tokens.
  __device__ Drawn unfiltered() const {
    double target = u * all.mass;
    const auto mass = [&](int64_t t) {
      double z;
      const Tile<A> tile = filters.tiles.tiles[t];
      return Merged<A>::weight(tile, filters.scale, z) * tile.mass;
    };
    const int64_t t = invert(meet(), filters.tiles.count, target, mass);
    const auto weight = [&](int64_t i) {
      const A x = filters.token(t * TILE + i);
      return x > A(-INFINITE) ? filters.scale.weight(x) : 0.0;
    };
    double sum = 0;
    for (int i = threadIdx.x; i < TILE; i += blockDim.x) sum += weight(i);
    target *= combine(meet(), sum, Add()) / mass(t);
    const int64_t id = t * TILE + invert(meet(), TILE, target, weight);
    return {id, all.finite, filters.scale(filters.token(id)) - log(all.mass)};
  }

  // From the candidates and the tokens above them.
  __device__ Drawn from(const Found<A>& found, const Kept<A>& kept) const {
    const auto& in = filters.shared.candidates;
    const auto keeps = [&](int i) { return kept(in.scores[i], in.z[i], in.ids[i]); };
    double sum = 0;
    int64_t count = 0;
    for (int i = threadIdx.x; i < found.count; i += blockDim.x)
      if (keeps(i)) sum += exp(in.z[i]), count++;
    const double total = found.above + combine(meet(), sum, Add());
    count = found.above_count + combine(meet(), count, Add());
    const auto candidate = [&](int64_t i) { return keeps(i) ? exp(in.z[i]) : 0.0; };
    double target = u * total;
    if (found.most == A(INFINITE)) {
      const int64_t i = invert(meet(), found.count, target, candidate);
      return {in.ids[i], count, in.z[i] - log(total)};
    }
    const auto place = [&](int64_t id) {  // of the first candidate from this id on
      int low = 0, high = found.count;
      while (low < high) (in.ids[(low + high) / 2] < id ? low : high) = (low + high) / 2 + (in.ids[(low + high) / 2] < id);
      return low;
    };
    const auto mass = [&](int64_t c) {
      double sum = filters.above_of(c, found.most);
      for (int i = place(c * CHUNK), end = place((c + 1) * CHUNK); i < end; i++) sum += candidate(i);
      return sum;
    };
    const int64_t first = invert(meet(), filters.tiles.chunks(), target, mass) * CHUNK;
    const int64_t id = first + invert(meet(), CHUNK, target, [&](int64_t i) {
                         const A x = filters.token(first + i);
                         const double z = filters.scale(x);
                         return x > A(-INFINITE) && kept(x, z, first + i) ? exp(z) : 0.0;
                       });
    return {id, count, filters.scale(filters.token(id)) - log(total)};
  }

  __device__ A min_p_least() const {
    if (!(knobs.min_p > 0)) return A(-INFINITE);
    return lowest_that(all.top, [&](A x) {
      return static_cast<A>(filters.scale.weight(x)) >= static_cast<A>(knobs.min_p);
    });
  }

  __device__ Drawn filtered() const {
    constexpr A none = A(-INFINITE);
    const bool top_k = knobs.top_k > 0 && knobs.top_k < all.finite, top_p = knobs.top_p < 1;
    const A min_least = min_p_least();
    if (!top_k && !top_p && min_least == none) return unfiltered();
    Kept<A> kept;
    Found<A> found = {none, none, -1, 0, 0};
    if (top_k) found = filters.top_k(knobs.top_k, knobs.temperature, kept.least);
    if (top_p && found.count >= 0) {
      const double total = filters.sum_of(found, kept.least), tail = filters.tail(knobs.top_p);
      filters.edge_of(found, filters.reach(total, tail), filters.reach(total, tail), kept);
    } else if (top_p) {
      const double total = top_k ? filters.collect(none, filters.below(kept.least)).above : all.mass;
      found = filters.top_p(knobs.top_p, total, top_k || sizeof(A) == 8 ? 0 : LOOSE, kept);
    }
    if (min_least > kept.least) kept.least = min_least;
    if (!top_p && (!top_k || found.count < 0)) found = filters.collect(kept.least);
    if (found.count < 0 || kept.least > found.most)
      found = filters.collect(none, filters.below(kept.least), false, kept);
    return from(found, kept);
  }
};

}  // namespace
}  // namespace rlhf_fast::cuda
