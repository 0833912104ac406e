// One row of sample.cu: its knobs and scores, what the first launch leaves of it, and sums over a block in one order.
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>

#include "rows.cuh"
#include "sample.h"

namespace rlhf_fast::cuda {
namespace {

constexpr int CHUNK = 256;      // tokens that are read again or not at all
constexpr int TILE_CHUNKS = 4;  // chunks that a warp sums up at once
constexpr int TILE = CHUNK * TILE_CHUNKS;
constexpr int TILE_ITEMS = TILE / WARP;
constexpr int TILE_WARPS = 4;  // of a block of the first launch
constexpr int ROW_WARPS = 16;  // of a block of the second one, at most
constexpr double INFINITE = __builtin_huge_val();

// What the first launch finds in a tile; mass and spread, the sums of exp(z) and of z exp(z), are relative to its top.
template <class A>
struct alignas(16) Tile {
  A tops[TILE_CHUNKS];
  A mass, spread;
  int32_t finite, broken;  // tokens above -inf; was there a NaN or +inf?
  __device__ A top() const {
    A most = tops[0];
    for (int i = 1; i < TILE_CHUNKS; i++) most = max(most, tops[i]);
    return most;
  }
};

// Of one row, in global memory.
template <class A>
struct Tiles {
  const Tile<A>* tiles;
  int64_t count, size;  // of tiles; of tokens
  __device__ int64_t chunks() const { return (size + CHUNK - 1) / CHUNK; }
  __device__ A top(int64_t chunk) const { return tiles[chunk / TILE_CHUNKS].tops[chunk % TILE_CHUNKS]; }
};

struct Knobs {
  double temperature, top_p, min_p, repetition, presence, frequency;
  int64_t top_k;

  __device__ static double knob(const View& view, int64_t row, double off) {
    return view.data ? static_cast<const double*>(view.data)[row * view.stride[0]] : off;
  }
  __device__ static int64_t whole(const View& view, int64_t row) {
    return view.data ? static_cast<const int64_t*>(view.data)[row * view.stride[0]] : 0;
  }
  __device__ Knobs(const Sampling& s, int64_t row)
      : temperature(knob(s.temperature, row, 1)),
        top_p(knob(s.top_p, row, 1)),
        min_p(knob(s.min_p, row, 0)),
        repetition(knob(s.repetition, row, 1)),
        presence(knob(s.presence, row, 0)),
        frequency(knob(s.frequency, row, 0)),
        top_k(whole(s.top_k, row)) {}
  __device__ bool in_range() const {
    return temperature >= 0 && temperature < INFINITE && top_p == top_p && min_p >= 0 && min_p <= 1 && repetition > 0 &&
           repetition < INFINITE && fabs(presence) < INFINITE && fabs(frequency) < INFINITE;
  }
  __device__ double divisor() const { return temperature == 0 ? 1 : temperature; }
};

// Element `at` of a tensor of any dtype.
template <class A>
__device__ A element(const void* data, Dtype dtype, int64_t at) {
  switch (dtype) {
    case Dtype::float32:
      return static_cast<A>(static_cast<const float*>(data)[at]);
    case Dtype::float64:
      return static_cast<A>(static_cast<const double*>(data)[at]);
    case Dtype::bfloat16:
      return static_cast<A>(widen(static_cast<const bfloat16*>(data)[at]));
    case Dtype::float16:
      return static_cast<A>(widen(static_cast<const float16*>(data)[at]));
    case Dtype::int32:
      return static_cast<A>(static_cast<const int32_t*>(data)[at]);
    case Dtype::int64:
      return static_cast<A>(static_cast<const int64_t*>(data)[at]);
    default:
      return static_cast<A>(static_cast<const int8_t*>(data)[at]);
  }
}

// The logits of one row, A the type in which they are compared; BARE: without bias, penalties and forbidden tokens.
template <class A, bool BARE>
struct Line {
  const Sampling& s;
  int64_t row, size;
  A repetition, presence, frequency;

  __device__ Line(const Sampling& s, int64_t row, const Knobs& knobs)
      : s(s),
        row(row),
        size(s.logits.shape[1]),
        repetition(static_cast<A>(knobs.repetition)),
        presence(static_cast<A>(knobs.presence)),
        frequency(static_cast<A>(knobs.frequency)) {}
  __device__ A other(const View& view, int64_t i) const {
    return element<A>(view.data, view.dtype, row * view.stride[0] + i * view.stride[1]);
  }
  __device__ bool allowed(int64_t i) const { return !s.allowed.data || other(s.allowed, i) != A(0); }
  // After bias and penalties.
  __device__ A changed(A x, int64_t i) const {
    if (s.bias.data) x += other(s.bias, i);
    if (s.counts.data) {
      const A count = other(s.counts, i);
      if (count > A(0)) x = x < A(0) ? product(x, repetition) : x / repetition;
      x -= product(frequency, count);
      if (count > A(0)) x -= presence;
    }
    return x;
  }
  template <class T>
  __device__ const T* data() const {
    return static_cast<const T*>(s.logits.data) + row * s.logits.stride[0];
  }
  // Calls with(pointer to the first logit).
  template <class With>
  __device__ void typed(With with) const {
    if constexpr (sizeof(A) == 8)
      with(data<double>());
    else if (s.logits.dtype == Dtype::float32)
      with(data<float>());
    else if (s.logits.dtype == Dtype::bfloat16)
      with(data<bfloat16>());
    else
      with(data<float16>());
  }
  __device__ A raw(int64_t i) const {
    A x;
    typed([&](auto* from) { x = widen(from[i * s.logits.stride[1]]); });
    return x;
  }
  // -inf behind the end.
  __device__ A score(int64_t i) const {
    if (i >= size) return A(-INFINITE);
    if constexpr (BARE) return raw(i);
    return allowed(i) ? changed(raw(i), i) : A(-INFINITE);
  }
  // A lane's scores of a chunk.
  __device__ void read(int64_t first, A (&x)[CHUNK / WARP]) const {
    const int64_t stride = s.logits.stride[1];
    typed([&](auto* from) {
#pragma unroll
      for (int j = 0; j < CHUNK / WARP; j++)
        x[j] = first + j * WARP < size ? widen(from[(first + j * WARP) * stride]) : A(-INFINITE);
    });
    if constexpr (!BARE) {
#pragma unroll
      for (int j = 0; j < CHUNK / WARP; j++) x[j] = score(first + j * WARP);
    }
  }
};

// z = (score - top) / temperature.
struct Scale {
  double top, temperature;
  __device__ double operator()(double score) const { return (score - top) / temperature; }
  __device__ double weight(double score) const { return exp((*this)(score)); }
};

__device__ inline int warps() { return blockDim.x / WARP; }
__device__ inline int my_warp() { return threadIdx.x / WARP; }
__device__ inline int my_lane() { return threadIdx.x % WARP; }

struct Add {
  template <class X>
  __device__ X operator()(X a, X b) const {
    return a + b;
  }
};
struct Max {
  template <class X>
  __device__ X operator()(X a, X b) const {
    return a > b ? a : b;
  }
};

// Where the warps of a block meet.
struct Meetings {
  double numbers[ROW_WARPS], before[ROW_WARPS];
  int64_t counts[ROW_WARPS], found[ROW_WARPS], positive[ROW_WARPS];
  __device__ double* parts(double) { return numbers; }
  __device__ int64_t* parts(int64_t) { return counts; }
};

// Of all threads; each gets it.
template <class X, class Both>
__device__ X combine(Meetings& meet, X x, Both both) {
#pragma unroll
  for (int distance = WARP / 2; distance > 0; distance /= 2) {
    const X other = __shfl_xor_sync(ALL, x, distance);
    x = both(x, other);
  }
  X* const parts = meet.parts(x);
  __syncthreads();
  if (my_lane() == 0) parts[my_warp()] = x;
  __syncthreads();
  X all = parts[0];
  for (int w = 1; w < warps(); w++) all = both(all, parts[w]);
  return all;
}

// The first index whose cumulative weight exceeds `target`, which becomes what is left of it there; never one of
// weight 0, and the last one if none does.
template <class Weight>
__device__ int64_t invert(Meetings& meet, int64_t n, double& target, Weight weight) {
  double carried = 0, before_last = 0;
  int64_t last = 0;
#pragma unroll 1
  for (int64_t start = 0; start < n; start += blockDim.x) {
    const int64_t i = start + threadIdx.x;
    const double own = i < n ? weight(i) : 0.0;
    double sum = own;
#pragma unroll
    for (int offset = 1; offset < WARP; offset *= 2) {
      const double left = __shfl_up_sync(ALL, sum, offset);
      if (my_lane() >= offset) sum += left;
    }
    double before = __shfl_up_sync(ALL, sum, 1);
    if (my_lane() == 0) before = 0;
    __syncthreads();
    if (my_lane() == WARP - 1) meet.numbers[my_warp()] = sum;
    __syncthreads();
    double base = carried;
    for (int w = 0; w < my_warp(); w++) base += meet.numbers[w];
    const unsigned beyond = __ballot_sync(ALL, own > 0 && base + sum > target), some = __ballot_sync(ALL, own > 0);
    const int first = __ffs(static_cast<int>(beyond)) - 1, latest = WARP - 1 - __clz(static_cast<int>(some));
    const int lane = beyond ? first : latest < 0 ? 0 : latest;
    before = base + __shfl_sync(ALL, before, lane);
    if (my_lane() == 0) {
      meet.found[my_warp()] = beyond ? i + lane : -1;
      meet.positive[my_warp()] = some ? i + lane : -1;
      meet.before[my_warp()] = before;
    }
    __syncthreads();
    for (int w = 0; w < warps(); w++) {
      if (meet.positive[w] >= 0) last = meet.positive[w], before_last = meet.before[w];
      if (meet.found[w] >= 0) return target -= before_last, last;
      carried += meet.numbers[w];
    }
  }
  target -= before_last;
  return last;
}

template <class A>
struct Whole;
template <>
struct Whole<float> {
  using type = int32_t;
  using distance = uint32_t;
};
template <>
struct Whole<double> {
  using type = int64_t;
  using distance = uint64_t;
};
// Whole numbers that rise with the floats.
template <class I>
constexpr I LOWEST = sizeof(I) == 4 ? static_cast<I>(INT32_MIN) : static_cast<I>(INT64_MIN);
template <class A>
__device__ typename Whole<A>::type ordinal(A x) {
  using I = typename Whole<A>::type;
  const I i = bits<I>(x);
  return i < 0 ? LOWEST<I> - i : i;
}
template <class A>
__device__ A real(typename Whole<A>::type i) {
  using I = typename Whole<A>::type;
  return bits<A>(i < 0 ? LOWEST<I> - i : i);
}

// The smallest float for which `holds`, which is true of `high` and of all between; each warp tries 32 at a time.
template <class A, class Predicate>
__device__ A lowest_that(A high, Predicate holds) {
  using U = typename Whole<A>::distance;
  if (holds(A(-INFINITE))) return A(-INFINITE);
  U no = static_cast<U>(ordinal(A(-INFINITE))), yes = static_cast<U>(ordinal(high));
#pragma unroll 1
  while (yes - no > 1) {
    const U width = yes - no, step = width / (WARP + 1) + 1, mine = step * (my_lane() + 1);
    const bool there = mine >= width || holds(real<A>(static_cast<typename Whole<A>::type>(no + mine)));
    const unsigned where = __ballot_sync(ALL, there);
    const U first = where ? __ffs(static_cast<int>(where)) - 1 : WARP;
    if (where && step * (first + 1) < width) yes = no + step * (first + 1);
    no += step * first;
  }
  return real<A>(static_cast<typename Whole<A>::type>(yes));
}

}  // namespace
}  // namespace rlhf_fast::cuda
