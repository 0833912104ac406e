// Top-k, top-p and min-p of one row, by a block. SPDX-License-Identifier: Apache-2.0
//
// A filter becomes a bracket of scores. Tokens above it are kept for sure: only their masses are added up, by chunks;
// tokens in it go to shared memory, in the order of their ids, and are sorted there. Only chunks whose largest score
// reaches the bracket are read again. A first bracket comes from the chunks' maxima; if it has too many tokens, from a
// histogram over an eighth of the row; if that was misleading, from exact histograms, each of which narrows the bracket
// 2048 times: two of them for float32, and one for each 11 bits in any case.
#pragma once
#include "sample_brackets.cuh"

namespace rlhf_fast::cuda {
namespace {

constexpr int SAMPLED = 8;         // one chunk of so many tells about where top-p ends
constexpr double MARGIN = .04;     // and so far off may it be, in terms of what top-p drops
constexpr double LOOSE = 0x1p-19;  // the error of masses that were added up in float

template <class T>
struct Filters : Brackets<T> {
  using Base = Brackets<T>;
  using typename Base::A, typename Base::I, typename Base::U;
  using Base::NONE, Base::ANY, Base::tiles, Base::scale, Base::shared;
  using Base::above_of, Base::collect, Base::histogram, Base::lower, Base::mass, Base::max_finite, Base::shift_of,
      Base::sort, Base::sum_of, Base::token, Base::upper, Base::weight;

  // At most the k-th largest of the chunks' largest scores, and so of all.
  __device__ A bound_of_chunks(int64_t k) const {
    if (k > tiles.chunks()) return -max_finite(A());
    double least = -scale.top;
    for (int64_t c = threadIdx.x; c < tiles.chunks(); c += blockDim.x)
      if (tiles.top(c) > NONE) least = max(least, -double(tiles.top(c)));
    const A high = static_cast<A>(scale.top), low = static_cast<A>(-combine(shared.meet, least, Max()));
    const int shift = shift_of(low, high);
    for (int b = threadIdx.x; b < BINS; b += blockDim.x) shared.bins[b] = 0;
    __syncthreads();
    for (int64_t c = threadIdx.x; c < tiles.chunks(); c += blockDim.x)
      if (tiles.top(c) > NONE)
        atomicAdd(&shared.bins[(static_cast<U>(ordinal(high)) - static_cast<U>(ordinal(tiles.top(c)))) >> shift], 1ull);
    __syncthreads();
    double before = static_cast<double>(k) - .5;
    const int64_t bin = invert(shared.meet, BINS, before, [&](int64_t b) { return double(shared.bins[b]); });
    const A bound = before < double(shared.bins[bin]) ? lower(low, high, bin, shift) : -max_finite(A());
    __syncthreads();
    return bound;
  }

  // The smallest score that top-k keeps, and the candidates from there on if there is room. It compares after the
  // division, in the precision of the scores: different ones may tie there.
  __device__ Found<A> top_k(int64_t k, double temperature, A& least) const {
    A low = bound_of_chunks(k), high = static_cast<A>(scale.top), last;
    Found<A> found = collect(low);
    while (true) {
      if (found.count >= 0) {
        const A* const scores = shared.candidates.scores;
        sort(found.count, [&](int a, int b) { return scores[a] > scores[b]; });
        last = scores[shared.candidates.order[k - 1 - found.above_count]];
        break;
      }
      const int shift = shift_of(low, high);
      histogram(low, high, shift, 1, true, low);
      double before = static_cast<double>(k) - .5;
      const int64_t bin = invert(shared.meet, BINS, before, [&](int64_t b) { return double(shared.bins[b]); });
      k = static_cast<int64_t>(before + .5);
      const A end = upper(high, bin, shift);
      low = lower(low, high, bin, shift), high = end;
      if (low == high) {
        last = low;
        break;
      }
      found = collect(low, high);
      found.above_count = 0;  // k is now among the candidates
    }
    const A divisor = static_cast<A>(temperature);
    least = lowest_that(last, [&](A score) { return score / divisor >= last / divisor; });
    return found.count >= 0 && found.most == ANY && found.least <= least ? found : collect(least);
  }

  // Where the sum from the top exceeds `low`, if it exceeds `high` there too: the number may be any between.
  __device__ bool edge_of(const Found<A>& found, double low, double high, Kept<A>& kept) const {
    const A floor = kept.least;
    double sum = 0;
    for (int i = threadIdx.x; i < found.count; i += blockDim.x) sum += weight(i, floor);
    sum = combine(shared.meet, sum, Add());
    if (found.above > low || !(found.above + sum > high)) return false;
    const double* const z = shared.candidates.z;
    sort(found.count, [&](int a, int b) { return z[a] > z[b] || (z[a] == z[b] && a > b); });
    double rest = low - found.above;
    const uint16_t* const order = shared.candidates.order;
    const int64_t at = invert(shared.meet, found.count, rest, [&](int64_t i) { return weight(order[i], floor); });
    kept.z = z[order[at]], kept.id = shared.candidates.ids[order[at]];
    return !(weight(order[at], floor) - rest <= high - low);
  }

  // About where top-p, which drops so much, ends.
  __device__ Found<A> guess(A low, double drop, A floor) const {
    const A high = static_cast<A>(scale.top);
    const int shift = shift_of(low, high);
    histogram(low, high, shift, SAMPLED, false, floor);
    const int64_t chunks = (tiles.chunks() + SAMPLED - 1) / SAMPLED;
    const double share = double(min(chunks * CHUNK, tiles.size)) / double(tiles.size);
    const auto tail = [&](int64_t b) { return mass(shared.bins[BINS - 1 - b]); };
    double less = (1 - MARGIN) * share * drop, more = (1 + MARGIN) * share * drop;
    const int64_t last = BINS - 1 - invert(shared.meet, BINS, less, tail);
    const int64_t first = BINS - 1 - invert(shared.meet, BINS, more, tail);
    const A from = lower(low, high, last, shift), to = upper(high, first, shift);
    __syncthreads();
    return collect(from, to);
  }

  // What share of the mass top-p may drop: the threshold lies between two floats, as the reference says.
  __device__ static double tail(double top_p) {
    const A rounded = static_cast<A>(1 - top_p);
    return sizeof(A) == 8 ? double(rounded) : (double(rounded) + double(real<A>(ordinal(rounded) + 1))) / 2;
  }
  // What the sum from the top to the last token that is kept exceeds.
  __device__ static double reach(double total, double dropped) {
    return real<double>(ordinal(total * (1 - dropped)) - 1);
  }

  // Which tokens from kept.least on top-p leaves, of all those whose masses add up to `total`, give or take `error`.
  __device__ Found<A> top_p(double top_p, double total, double error, Kept<A>& kept) const {
    const double dropped = tail(top_p);
    // V tokens of less weigh together less than half of what is dropped.
    const double lightest = scale.top + scale.temperature * log((1 - top_p) * total / (2.0 * double(tiles.size)));
    const A low = max(max(static_cast<A>(lightest - 1e-6 * fabs(lightest)), -max_finite(A())), kept.least);
    Found<A> found;
    while (true) {
      found = collect(low);
      if (found.count < 0) found = guess(low, dropped * total, kept.least);
      const bool room = found.count >= 0;
      if (room && edge_of(found, reach(total * (1 - error), dropped), reach(total * (1 + error), dropped), kept)) return found;
      if (error == 0) break;
      total = collect(NONE, NONE).above, error = 0;
    }
    return narrow(low, reach(total, dropped), kept);
  }

  // The same for any numbers.
  __device__ Found<A> narrow(A low, double reach, Kept<A>& kept) const {
    A high = static_cast<A>(scale.top);
    double rest = reach;
    while (low < high) {
      const int shift = shift_of(low, high);
      histogram(low, high, shift, 1, false, low);
      const int64_t bin = invert(shared.meet, BINS, rest, [&](int64_t b) { return mass(shared.bins[b]); });
      const A end = upper(high, bin, shift);
      low = lower(low, high, bin, shift), high = end;
      __syncthreads();
      const Found<A> found = collect(low, high);
      if (found.count < 0) continue;
      const double bounded = max(found.above, min(reach, found.above + sum_of(found, kept.least) * (1 - 0x1p-50)));
      edge_of(found, bounded, bounded, kept);
      return found;
    }
    return ties(scale(low), reach, kept);
  }
  // Of the tokens at the edge the last are kept, as many as it takes to exceed `reach`.
  __device__ Found<A> ties(double z, double reach, Kept<A>& kept) const {
    const auto higher = [&](A score, double of_score, int64_t) { return score >= kept.least && of_score > z; };
    const auto tie = [&](A score, double of_score, int64_t) { return score >= kept.least && of_score == z; };
    const double heavier = collect(NONE, NONE, false, higher).above;
    const double count = collect(NONE, NONE, true, tie).above;
    const double weight = exp(z), needed = weight > 0 ? floor((reach - heavier) / weight) + 1 : count;
    double skipped = count - min(max(needed, 1.0), count);
    const int64_t c = invert(shared.meet, tiles.chunks(), skipped, [&](int64_t i) { return above_of(i, NONE); });
    kept.id = c * CHUNK + invert(shared.meet, CHUNK, skipped, [&](int64_t i) {
                const A x = token(c * CHUNK + i);
                return x > NONE && tie(x, scale(x), 0) ? 1.0 : 0.0;
              });
    kept.z = z;
    return collect(NONE, NONE, false, kept);
  }
};

}  // namespace
}  // namespace rlhf_fast::cuda
