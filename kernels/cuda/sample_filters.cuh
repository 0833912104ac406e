// Top-k, top-p and min-p of one row, by a block. SPDX-License-Identifier: Apache-2.0
//
// A filter becomes a bracket of scores. Tokens above it are kept for sure: only their masses are added up, by chunks;
// tokens in it go to shared memory, in the order of their ids, and are sorted there. Only chunks whose largest score
// reaches the bracket are read again. A first bracket comes from the chunks' maxima or the bound of top-p; if it has
// too many tokens, for top-p from a sum over an eighth of the row; if that was misleading, from histograms, each of
// which narrows the bracket 2048 times, three for float32. So the worst case is bounded: top-k and top-p each read the
// row of float32 scores at most three times for histograms and four times to collect; top-p once more for a total in
// double and three times where so many tokens tie at its edge that they do not fit.
#pragma once
#include "sample_brackets.cuh"

namespace rlhf_fast::cuda {
namespace {

constexpr double MARGIN = .04;     // and so far off may it be, in terms of what top-p drops
constexpr double LOOSE = 0x1p-19;  // the error of masses that were added up in float

// What the search for the kept tokens has just collected.
enum class Step {
  k_bracket,   // where the k-th largest score is
  k_kept,      // what top-k keeps
  total,       // the mass of all that top-p looks at, in double
  p_bracket,   // where top-p ends, by its bound
  p_guess,     // the same, by a part of the row
  p_narrow,    // the same, by histograms
  p_higher,    // the mass above tokens that all tie at the edge
  p_ties,      // how many those are
  min_p_kept,  // what min-p keeps
  all_kept     // the masses of what is kept
};

template <class A, bool BARE>
struct Filters : Brackets<A, BARE> {
  using Base = Brackets<A, BARE>;
  using Base::NONE, Base::ANY, Base::tiles, Base::scale, Base::shared, Base::line, Base::max_finite;
  using typename Base::I, typename Base::U;

  double top_p_number, temperature, total, error;
  int64_t k;
  bool top_k, top_p;
  A min_least;
  Kept<A> kept;
  // What to collect next, and why.
  Step step;
  A least, most;
  bool counting = false, misled = false;
  // The top-k or top-p edge lies between low and high; `rest` is what of the mass up to it is not above that.
  A low, high;
  double rest, reach;

  __device__ Filters(const Base& row, const Knobs& knobs, A min_least, int64_t finite, double total)
      : Base(row),
        top_p_number(knobs.top_p),
        temperature(knobs.temperature),
        total(total),
        error(sizeof(A) == 8 ? 0 : LOOSE),
        k(knobs.top_k),
        top_k(k > 0 && k < finite),
        top_p(knobs.top_p < 1),
        min_least(min_least) {}

  __device__ Found<A> search() {
    high = static_cast<A>(scale.top), most = ANY;
    if (top_k) {
      step = Step::k_bracket, least = low = bound_of_chunks();
    } else if (top_p) {
      ask_top_p();
    } else {
      step = Step::min_p_kept, least = kept.least = min_least;
    }
    while (true) {
      const Found<A> found = this->collect(least, most, kept, counting);
      if (settled(found)) return found;
    }
  }

 private:
  __device__ void ask(Step next, A from, A to) { step = next, least = from, most = to; }
  // The tokens that are kept so far, without looking at each.
  __device__ void ask_all(Step next) {
    const A from = max(kept.least, -max_finite(A()));
    ask(next, from, Base::below(from));
  }
  __device__ void ask_top_p() {
    // V tokens of less weigh together less than half of what is dropped.
    const double bound = scale.top + scale.temperature * log((1 - top_p_number) * total / (2.0 * double(tiles.size)));
    low = max(max(static_cast<A>(bound - 1e-6 * fabs(bound)), -max_finite(A())), kept.least);
    high = static_cast<A>(scale.top);
    ask(Step::p_bracket, low, ANY);
  }

  // Takes one step; true if `found` has all that is kept.
  __device__ bool settled(const Found<A>& found) {
    if (step == Step::k_bracket && !find_k(found)) return false;
    if (step <= Step::k_kept) {
      if (top_p && found.count < 0) return ask_all(Step::total), false;
      if (top_p) total = this->sum_of(found, kept.least), error = 0;
    }
    if (step == Step::total) return total = found.above, error = 0, ask_top_p(), false;
    if (top_p && step <= Step::p_narrow && !find_p(found)) return false;
    if (step == Step::p_higher) {
      total = found.above, kept.id = 0, kept.at_edge = counting = true;
      return ask_all(Step::p_ties), false;
    }
    if (step == Step::p_ties) {
      find_first(found);
      kept.least = max(kept.least, min_least);
      return ask_all(Step::all_kept), false;
    }
    if (step == Step::all_kept) return true;
    if (min_least > kept.least) kept.least = min_least;
    if (found.count >= 0 && kept.least <= found.most) return true;
    return ask_all(Step::all_kept), false;
  }

  // The smallest score that top-k keeps. It compares after the division, in the precision of the scores: different ones
  // may tie there.
  __device__ bool find_k(const Found<A>& found) {
    A last;
    if (found.count >= 0) {
      const A* const scores = shared.candidates.scores;
      this->sort(found.count, [&](int a, int b) { return scores[a] > scores[b]; });
      last = scores[shared.candidates.order[k - 1]];
    } else {
      rest = static_cast<double>(k) - .5;
      narrow(true);
      k = static_cast<int64_t>(rest + .5);
      if (low < high) return ask(Step::k_bracket, low, high), false;
      last = low;
    }
    const A divisor = static_cast<A>(temperature);
    kept.least = lowest_that(last, [&](A score) { return score / divisor >= last / divisor; });
    if (found.count >= 0 && found.most == ANY && found.least <= kept.least) return true;
    return ask(Step::k_kept, kept.least, ANY), false;
  }

  // Where the sum from the top exceeds what top-p reaches.
  __device__ bool find_p(const Found<A>& found) {
    const A rounded = static_cast<A>(1 - top_p_number);
    double tail = rounded;  // what share it may drop: a threshold between two floats, as the reference says
    if (sizeof(A) == 4) tail = (tail + double(real<A>(ordinal(rounded) + 1))) / 2;
    if (found.count >= 0) {
      const double sum = found.above + this->sum_of(found, kept.least);
      double from = reach_of(total * (1 - error), tail), to = reach_of(total * (1 + error), tail);
      // A histogram's whole numbers may be off by a hair.
      if (step == Step::p_narrow) from = to = max(found.above, min(from, sum * (1 - 0x1p-50)));
      const bool inside = found.above <= from && sum > to;
      if (inside && (edge(found, from, to) || error == 0)) return true;
      misled |= !inside;
    } else if (step == Step::p_bracket && !misled) {
      return guess(tail * total), false;
    }
    misled |= found.count < 0;
    kept.z = -INFINITE, kept.id = 0;
    if (error > 0) return ask_all(Step::total), false;
    if (step != Step::p_narrow) rest = reach = reach_of(total, tail), low = max(low, kept.least);
    narrow(false);
    if (low < high) return ask(Step::p_narrow, low, high), false;
    kept.z = scale(low), kept.id = INT64_MAX;
    return ask_all(Step::p_higher), false;
  }
  __device__ static double reach_of(double total, double tail) {
    return max(real<double>(ordinal(total * (1 - tail)) - 1), 0.0);
  }

  // Is the token at which the sum exceeds `from` that at which it exceeds `to`?
  __device__ bool edge(const Found<A>& found, double from, double to) {
    const double* const z = shared.candidates.z;
    this->sort(found.count, [&](int a, int b) { return z[a] > z[b] || (z[a] == z[b] && a > b); });
    double target = from - found.above;
    const uint16_t* const order = shared.candidates.order;
    const auto weight = [&](int64_t i) { return this->weight(order[i], kept.least); };
    const int at = order[invert(shared.meet, found.count, target, weight)];
    kept.z = z[at], kept.id = shared.candidates.ids[at];
    return this->weight(at, kept.least) - target > to - from;
  }

  // About where top-p ends, which drops so much.
  __device__ void guess(double drop) {
    const int shift = Base::shift_of(low, high);
    const A floor = max(kept.least, -max_finite(A()));
    const int64_t chunks = (tiles.chunks() + SAMPLED - 1) / SAMPLED;
    const double share = double(min(chunks * CHUNK, tiles.size)) / double(tiles.size);
    const unsigned* const masses = this->sample(low, high, shift, floor, SAMPLE_UNITS / (share * drop));
    int64_t bins[2] = {};
#pragma unroll 1
    for (int i = 0; i < 2; i++) {
      double part = (i == 0 ? 1 - MARGIN : 1 + MARGIN) * SAMPLE_UNITS;
      const auto tail = [&](int64_t b) { return double(masses[BINS - 1 - b]); };
      const int64_t bin = BINS - 1 - invert(shared.meet, BINS, part, tail);
      (i == 0 ? bins[0] : bins[1]) = bin;
    }
    __syncthreads();
    ask(Step::p_guess, Base::lower(low, high, bins[0], shift), Base::upper(high, bins[1], shift));
  }

  // Moves low and high to the bin where the sum from high down exceeds `rest`, which becomes what is left of it there.
  __device__ void narrow(bool count) {
    const int shift = Base::shift_of(low, high);
    this->histogram(low, high, shift, count);
    const auto weight = [&](int64_t b) { return count ? double(shared.bins[b]) : this->mass(shared.bins[b]); };
    const int64_t bin = invert(shared.meet, BINS, rest, weight);
    const A end = Base::upper(high, bin, shift);
    low = Base::lower(low, high, bin, shift), high = end;
    __syncthreads();
  }

  // Of the tokens at the edge the last are kept, as many as it takes to exceed what top-p reaches.
  __device__ void find_first(const Found<A>& ties) {
    const double count = ties.above, weight = exp(kept.z);
    const double needed = weight > 0 ? floor((reach - total) / weight) + 1 : count;
    double skipped = count - min(max(needed, 1.0), count);
    const auto in_chunk = [&](int64_t c) { return this->above_of(c, ties.most); };
    const int64_t first = invert(shared.meet, tiles.chunks(), skipped, in_chunk) * CHUNK;
    kept.id = first + invert(shared.meet, CHUNK, skipped, [&](int64_t i) {
                const A x = line.score(first + i);
                return x > NONE && x >= kept.least && scale(x) == kept.z ? 1.0 : 0.0;
              });
    kept.at_edge = counting = false;
  }

  // At most the k-th largest of the chunks' largest scores, and so of all.
  __device__ A bound_of_chunks() {
    if (k > tiles.chunks()) return -max_finite(A());
    double least = -scale.top;
    for (int64_t c = threadIdx.x; c < tiles.chunks(); c += blockDim.x)
      if (tiles.top(c) > NONE) least = max(least, -double(tiles.top(c)));
    const A low = static_cast<A>(-combine(shared.meet, least, Max()));
    const int shift = Base::shift_of(low, high);
    for (int b = threadIdx.x; b < BINS; b += blockDim.x) shared.bins[b] = 0;
    __syncthreads();
    for (int64_t c = threadIdx.x; c < tiles.chunks(); c += blockDim.x)
      if (tiles.top(c) > NONE)
        atomicAdd(&shared.bins[(static_cast<U>(ordinal(high)) - static_cast<U>(ordinal(tiles.top(c)))) >> shift], 1ull);
    __syncthreads();
    double rest = static_cast<double>(k) - .5;
    const int64_t bin = invert(shared.meet, BINS, rest, [&](int64_t b) { return double(shared.bins[b]); });
    const A bound = rest < double(shared.bins[bin]) ? Base::lower(low, high, bin, shift) : -max_finite(A());
    __syncthreads();
    return bound;
  }
};

}  // namespace
}  // namespace rlhf_fast::cuda
