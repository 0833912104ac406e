// Which tokens of a row have scores in a bracket, by a block: collected and sorted in shared memory, or counted.
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "sample_row.cuh"

namespace rlhf_fast::cuda {
namespace {

constexpr int ROOM = 2048;  // candidates
constexpr int BINS = 2048;
constexpr int SAMPLED = 8;  // one chunk of so many tells about where top-p ends
constexpr int SAMPLE_UNITS = 1 << 20;
constexpr int WINDOW = 1024;  // chunks that are listed at a time

template <class A>
struct Shared {
  Meetings meet;
  union {
    struct {
      double z[ROOM];
      A scores[ROOM];
      int32_t ids[ROOM];
      uint16_t order[ROOM];
    } candidates;
    unsigned long long bins[BINS];
  };
  uint16_t list[WINDOW];
  int counts[2][ROW_WARPS];
};

// The tokens that are left: those from `least` on above the edge, and from this id on if they are at it.
template <class A>
struct Kept {
  A least = A(-INFINITE);
  double z = -INFINITE;
  int64_t id = 0;
  bool at_edge = false;  // no others, for once
  __device__ bool operator()(A score, double of_score, int64_t i) const {
    return score >= least && ((of_score > z && !at_edge) || (of_score == z && i >= id));
  }
};

// What collect() found: candidates from `least` to `most`, and tokens above that.
template <class A>
struct Found {
  A least, most;
  int count;  // of candidates; -1 if there was no room for all
  int64_t above_count;
  double above;
};

// Tokens of one row by their scores.
template <class A, bool BARE>
struct Brackets {
  using I = typename Whole<A>::type;
  using U = typename Whole<A>::distance;
  static constexpr int ITEMS = CHUNK / WARP;
  static constexpr A NONE = A(-INFINITE), ANY = A(INFINITE);

  const Line<A, BARE>& line;
  const Tiles<A>& tiles;
  const Scale& scale;
  Shared<A>& shared;
  double* above;  // per chunk

  __device__ static A below(A x) { return real<A>(ordinal(x) - 1); }

  // The chunks of a window whose largest score reaches `least`, in shared.list; how many.
  __device__ int list(int64_t window, A least) const {
    int filled = 0;
    for (int start = 0; start < WINDOW && window + start < tiles.chunks(); start += blockDim.x) {
      const int64_t c = window + start + threadIdx.x;
      const bool in = start + int(threadIdx.x) < WINDOW && c < tiles.chunks() && tiles.top(c) >= least;
      const unsigned which = __ballot_sync(ALL, in);
      __syncthreads();
      if (my_lane() == 0) shared.counts[0][my_warp()] = __popc(which);
      __syncthreads();
      int at = filled + __popc(which & ((1u << my_lane()) - 1));
      for (int w = 0; w < warps(); w++) {
        at += w < my_warp() ? shared.counts[0][w] : 0;
        filled += shared.counts[0][w];
      }
      if (in) shared.list[at] = static_cast<uint16_t>(c - window);
    }
    __syncthreads();
    return filled;
  }

  // Of the tokens above `most` those that are kept are counted and, by chunks, weighed, or `counting` counted there
  // too; those from `least` to `most` become candidates. Stops where there is no room for them.
  __device__ Found<A> collect(A least, A most, const Kept<A>& kept, bool counting) const {
    Found<A> found = {least, most, 0, 0, 0};
    const A lowest = max(-max_finite(A()), least);
    double mine = 0;
    int64_t counted = 0;
    int turn = 0;
#pragma unroll 1
    for (int64_t window = 0; window < tiles.chunks(); window += WINDOW) {
      const int listed = list(window, lowest);
#pragma unroll 1
      for (int first = 0; first < listed; first += warps(), turn ^= 1) {
        const bool some = first + my_warp() < listed;
        const int64_t c = window + (some ? shared.list[first + my_warp()] : 0);
        A x[ITEMS];
        line.read(some ? c * CHUNK + my_lane() : tiles.size, x);
        int inside = 0;
#pragma unroll
        for (int j = 0; j < ITEMS; j++) inside += __popc(__ballot_sync(ALL, x[j] >= lowest && x[j] <= most));
        if (most < ANY && some) {
          const bool each = kept.z > -INFINITE || kept.at_edge;  // may be kept or not
          const double mass = each ? weigh_kept(c, most, kept, counting, counted) : weigh_above(x, most, counted);
          if (my_lane() == 0) above[c] = mass, mine += mass;
        }
        if (my_lane() == 0) shared.counts[turn][my_warp()] = inside;
        __syncthreads();
        int at = found.count;
        for (int w = 0; w < warps(); w++) {
          at += w < my_warp() ? shared.counts[turn][w] : 0;
          found.count += shared.counts[turn][w];
        }
        if (found.count > ROOM) break;
        if (inside == 0) continue;
#pragma unroll
        for (int j = 0; j < ITEMS; j++) {
          const bool in = x[j] >= lowest && x[j] <= most;
          const unsigned which = __ballot_sync(ALL, in);
          const int to = at + __popc(which & ((1u << my_lane()) - 1));
          if (in) {
            shared.candidates.scores[to] = x[j];
            shared.candidates.ids[to] = static_cast<int32_t>(c * CHUNK + j * WARP + my_lane());
          }
          at += __popc(which);
        }
      }
      if (found.count > ROOM) break;
    }
    __syncthreads();
    if (found.count > ROOM) found.count = -1;
    for (int i = threadIdx.x; i < found.count; i += blockDim.x)
      shared.candidates.z[i] = scale(shared.candidates.scores[i]);
    if (most < ANY) {
      found.above = combine(shared.meet, mine, Add());
      found.above_count = combine(shared.meet, counted, Add());
    }
    __syncthreads();
    return found;
  }
  // The sum over a warp's tokens above `most`, side by side in what will be the candidates' z: few lanes have one.
  __device__ double weigh_above(const A (&x)[ITEMS], A most, int64_t& counted) const {
    A* const heavy = reinterpret_cast<A*>(shared.candidates.z) + my_warp() * CHUNK;
    static_assert(sizeof(float) * ROW_WARPS * CHUNK <= sizeof(shared.candidates.z));
    const double reciprocal = min(1 / scale.temperature, max_finite(0.0));
    int count = 0;
#pragma unroll
    for (int j = 0; j < ITEMS; j++) {
      const unsigned which = __ballot_sync(ALL, x[j] > most);
      if (x[j] > most) heavy[count + __popc(which & ((1u << my_lane()) - 1))] = x[j];
      count += __popc(which);
    }
    __syncwarp();
    double mass = 0;
#pragma unroll 1
    for (int i = my_lane(); i < count; i += WARP) mass += exp((heavy[i] - scale.top) * reciprocal);
    __syncwarp();
    if (my_lane() == 0) counted += count;
    return of_warp(mass);
  }
  // By one warp. The chunk is in the L1 cache by now.
  __device__ double weigh_kept(int64_t c, A most, const Kept<A>& kept, bool counting, int64_t& counted) const {
    double mass = 0;
#pragma unroll 1
    for (int64_t i = c * CHUNK + my_lane(); i < (c + 1) * CHUNK; i += WARP) {
      const A score = line.score(i);
      if (!(score > most)) continue;
      const double z = scale(score);
      if (!kept(score, z, i)) continue;
      mass += counting ? 1.0 : exp(z);
      counted++;
    }
    return of_warp(mass);
  }
  __device__ static double of_warp(double mass) {
#pragma unroll
    for (int distance = WARP / 2; distance > 0; distance /= 2) mass += __shfl_xor_sync(ALL, mass, distance);
    return mass;
  }
  __device__ static float max_finite(float) { return 3.402823466e38f; }
  __device__ static double max_finite(double) { return 1.7976931348623157e308; }

  __device__ double weight(int i, A least) const {
    return shared.candidates.scores[i] >= least ? exp(shared.candidates.z[i]) : 0.0;
  }

  // Sorts shared.order, the places of the candidates.
  template <class Before>
  __device__ void sort(int n, Before before) const {
    uint16_t* const order = shared.candidates.order;
    int room = 2;
    while (room < n) room *= 2;
    for (int i = threadIdx.x; i < room; i += blockDim.x) order[i] = static_cast<uint16_t>(i);
    __syncthreads();
#pragma unroll 1
    for (int size = 2; size <= room; size *= 2)
#pragma unroll 1
      for (int stride = size / 2; stride > 0; stride /= 2) {
        for (int i = threadIdx.x; i < room / 2; i += blockDim.x) {
          const int low = 2 * i - (i & (stride - 1)), high = low + stride;
          const int a = order[low], b = order[high];
          const bool sorted = b >= n || (a < n && before(a, b));
          if (sorted == ((low & size) != 0)) order[low] = b, order[high] = a;
        }
        __syncthreads();
      }
  }

  // How many tokens, or what mass in whole numbers, there is in each bin of scores from `low` up to `high`.
  __device__ void histogram(A low, A high, int shift, bool counting) const {
    const double per_unit = ldexp(1.0, 62 - (64 - __clzll(tiles.size)));
    const U from = static_cast<U>(ordinal(high));
    __syncthreads();
    for (int b = threadIdx.x; b < BINS; b += blockDim.x) shared.bins[b] = 0;
    __syncthreads();
#pragma unroll 1
    for (int64_t c = my_warp(); c < tiles.chunks(); c += warps()) {
      if (!(tiles.top(c) >= low)) continue;
      A x[ITEMS];
      line.read(c * CHUNK + my_lane(), x);
      bool some = false;  // nothing to wait for in the loop below
#pragma unroll
      for (int j = 0; j < ITEMS; j++) some |= x[j] >= low && x[j] <= high;
      if (!some) continue;
#pragma unroll 1
      for (int64_t i = c * CHUNK + my_lane(); i < (c + 1) * CHUNK; i += WARP) {
        const A score = line.score(i);
        if (score > high || score < low) continue;
        atomicAdd(&shared.bins[(from - static_cast<U>(ordinal(score))) >> shift],
                  counting ? 1ull : static_cast<unsigned long long>(scale.weight(score) * per_unit + .5));
      }
    }
    __syncthreads();
  }

  // The mass per bin, roughly and no token more than SAMPLE_UNITS, of one chunk in SAMPLED; the last bin is for all
  // from `floor` on. In 32 bits, which shared memory adds up at once; heavy bins may wrap around.
  __device__ const unsigned* sample(A low, A high, int shift, A floor, double per_unit) const {
    unsigned* const bins = reinterpret_cast<unsigned*>(shared.bins);
    const float units = static_cast<float>(min(per_unit, double(max_finite(0.0f))));
    const A reciprocal = static_cast<A>(min(1 / scale.temperature, double(max_finite(A()))));
    const U from = static_cast<U>(ordinal(high));
    __syncthreads();
    for (int b = threadIdx.x; b < BINS; b += blockDim.x) bins[b] = 0;
    __syncthreads();
#pragma unroll 1
    for (int64_t c = int64_t(my_warp()) * SAMPLED; c < tiles.chunks(); c += warps() * SAMPLED) {
      A x[ITEMS];
      line.read(c * CHUNK + my_lane(), x);
#pragma unroll
      for (int j = 0; j < ITEMS; j++) {
        const U bin = (from - static_cast<U>(ordinal(x[j]))) >> shift;
        const float z = static_cast<float>((x[j] - high) * reciprocal);
        const float weight = min(expf(z) * units, float(SAMPLE_UNITS));
        if (x[j] >= floor) atomicAdd(&bins[bin < BINS ? bin : BINS - 1], static_cast<unsigned>(weight + .5f));
      }
    }
    __syncthreads();
    return bins;
  }
  __device__ double mass(unsigned long long bin) const {
    return double(bin) * ldexp(1.0, (64 - __clzll(tiles.size)) - 62);
  }
  __device__ static int shift_of(A low, A high) {
    U width = static_cast<U>(ordinal(high)) - static_cast<U>(ordinal(low));
    int shift = 0;
    while (width >= BINS) width >>= 1, shift++;
    return shift;
  }
  // The ends of a bin.
  __device__ static A upper(A high, int64_t bin, int shift) {
    return real<A>(static_cast<I>(static_cast<U>(ordinal(high)) - (static_cast<U>(bin) << shift)));
  }
  __device__ static A lower(A low, A high, int64_t bin, int shift) {
    return max(low, real<A>(static_cast<I>(static_cast<U>(ordinal(high)) - (static_cast<U>(bin + 1) << shift) + 1)));
  }
  __device__ double sum_of(const Found<A>& found, A floor) const {
    double sum = 0;
#pragma unroll 1
    for (int i = threadIdx.x; i < found.count; i += blockDim.x) sum += weight(i, floor);
    return combine(shared.meet, sum, Add());
  }
  __device__ double above_of(int64_t chunk, A most) const { return tiles.top(chunk) > most ? above[chunk] : 0.0; }
};

}  // namespace
}  // namespace rlhf_fast::cuda
