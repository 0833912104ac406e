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
#pragma unroll 1
    for (int64_t t = threadIdx.x; t < tiles.count; t += blockDim.x) {
      const Tile<A> tile = tiles.tiles[t];
      most = max(most, double(tile.top()));
      found += tile.finite, any |= tile.broken;
    }
    top = static_cast<A>(combine(meet, most, Max()));
    finite = combine(meet, found + (any << 40), Add());
    broken = finite >> 40, finite &= (int64_t(1) << 40) - 1;
    const Scale scale = {double(top), temperature};
#pragma unroll 1
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

template <class A, bool BARE>
struct Drawing {
  const Knobs& knobs;
  const Merged<A>& all;
  double u;
  Filters<A, BARE> filters;

  __device__ Drawing(const Brackets<A, BARE>& row, const Knobs& knobs, const Merged<A>& all, double u)
      : knobs(knobs), all(all), u(u), filters(row, knobs, A(-INFINITE), all.finite, all.mass) {}
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
    return c * CHUNK + first(CHUNK, [&](int64_t i) { return filters.line.score(c * CHUNK + i) == all.top; });
  }

  template <bool PLAIN>
  __device__ Drawn draw() {
    if constexpr (PLAIN) return unfiltered();
    if (knobs.min_p > 0)
      filters.min_least = lowest_that(
          all.top, [&](A x) { return static_cast<A>(filters.scale.weight(x)) >= static_cast<A>(knobs.min_p); });
    if (!filters.top_k && !filters.top_p && filters.min_least == A(-INFINITE)) return unfiltered();
    const Found<A> found = filters.search();
    return found.most == A(INFINITE) ? from_candidates(found) : from_chunks(found);
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
      const A x = filters.line.score(t * TILE + i);
      return x > A(-INFINITE) ? filters.scale.weight(x) : 0.0;
    };
    double sum = 0;
#pragma unroll 1
    for (int i = threadIdx.x; i < TILE; i += blockDim.x) sum += weight(i);
    target *= combine(meet(), sum, Add()) / mass(t);
    const int64_t id = t * TILE + invert(meet(), TILE, target, weight);
    return {id, all.finite, filters.scale(filters.line.score(id)) - log(all.mass)};
  }

  __device__ double candidate(int64_t i) const {
    const auto& in = filters.shared.candidates;
    return filters.kept(in.scores[i], in.z[i], in.ids[i]) ? exp(in.z[i]) : 0.0;
  }
  __device__ void add_up(const Found<A>& found, double& total, int64_t& count) const {
    const auto& in = filters.shared.candidates;
    double sum = 0;
    int64_t mine = 0;
#pragma unroll 1
    for (int i = threadIdx.x; i < found.count; i += blockDim.x)
      sum += candidate(i), mine += filters.kept(in.scores[i], in.z[i], in.ids[i]);
    total = found.above + combine(meet(), sum, Add());
    count = found.above_count + combine(meet(), mine, Add());
  }

  __device__ Drawn from_candidates(const Found<A>& found) const {
    double total;
    int64_t count;
    add_up(found, total, count);
    double target = u * total;
    const int64_t i = invert(meet(), found.count, target, [&](int64_t i) { return candidate(i); });
    const auto& in = filters.shared.candidates;
    return {in.ids[i], count, in.z[i] - log(total)};
  }

  // There are tokens above the candidates too.
  __device__ Drawn from_chunks(const Found<A>& found) const {
    double total;
    int64_t count;
    add_up(found, total, count);
    const int32_t* const ids = filters.shared.candidates.ids;
    const auto place = [&](int64_t id) {  // of the first candidate from this id on
      int low = 0, high = max(found.count, 0);
      while (low < high) {
        const int middle = (low + high) / 2;
        if (ids[middle] < id)
          low = middle + 1;
        else
          high = middle;
      }
      return low;
    };
    const auto mass = [&](int64_t c) {
      double sum = filters.above_of(c, found.most);
#pragma unroll 1
      for (int i = place(c * CHUNK); i < found.count && ids[i] < (c + 1) * CHUNK; i++) sum += candidate(i);
      return sum;
    };
    double target = u * total;
    const int64_t first = invert(meet(), filters.tiles.chunks(), target, mass) * CHUNK;
    const int64_t id = first + invert(meet(), CHUNK, target, [&](int64_t i) {
                         const A x = filters.line.score(first + i);
                         const double z = filters.scale(x);
                         return x > A(-INFINITE) && filters.kept(x, z, first + i) ? exp(z) : 0.0;
                       });
    return {id, count, filters.scale(filters.line.score(id)) - log(total)};
  }
};

}  // namespace
}  // namespace rlhf_fast::cuda
