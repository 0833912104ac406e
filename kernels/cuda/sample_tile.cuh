// What a warp does with a tile of sample.cu: 16-byte loads, exp in the precision of the logits and sums of a fixed
// shape. SPDX-License-Identifier: Apache-2.0
#pragma once
#include "sample_row.cuh"

namespace rlhf_fast::cuda {
namespace {

// The largest of a warp.
__device__ inline float largest(float x) { return real<float>(__reduce_max_sync(ALL, ordinal(x))); }
__device__ inline double largest(double x) {
#pragma unroll
  for (int distance = WARP / 2; distance > 0; distance /= 2) {
    const double other = __shfl_xor_sync(ALL, x, distance);
    x = max(x, other);
  }
  return x;
}
template <class A>
__device__ A sum_of_warp(A x) {
#pragma unroll
  for (int distance = WARP / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(ALL, x, distance);
  return x;
}

// exp(distance / temperature), and its exponent in units that add up to the entropy.
template <class A>
struct Weigher;
template <>
struct Weigher<float> {
  float high, low, lowest;  // 1 / temperature in units of log(2), in two parts; exp is 0 below `lowest`
  __device__ explicit Weigher(double temperature) {
    constexpr double most = 3.4028234663852886e38;
    const double reciprocal = temperature == 1 ? 1.4426950408889634 : min(1.4426950408889634 / temperature, most);
    high = static_cast<float>(reciprocal);
    low = static_cast<float>(reciprocal - high);
    lowest = max(-126.0f / high, -3.4028234663852886e38f);
  }
  // Of a finite distance.
  __device__ float operator()(float distance, float& exponent) const {
    distance = max(lowest, distance);
    exponent = distance * high;
    const float rest = fmaf(distance, low, fmaf(distance, high, -exponent)) * 0.6931471805599453f;
    const float power = power_of_2(exponent);
    return fmaf(power, rest, power);
  }
  __device__ static float spread(float dot) { return dot * 0.6931471805599453f; }
  __device__ static float power_of_2(float x) {
#ifdef RLHF_FAST_SIMT
    return exp2f(x);
#else
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
  }
};
template <>
struct Weigher<double> {
  double reciprocal;
  __device__ explicit Weigher(double temperature) : reciprocal(min(1 / temperature, 1.7976931348623157e308)) {}
  __device__ double operator()(double distance, double& exponent) const {
    exponent = max(-1e4, distance * reciprocal);
    return exp(exponent);
  }
  __device__ static double spread(double dot) { return dot; }
};

// A lane's tokens of a tile, in vectors of 16 bytes; -inf where the row has ended.
template <class T, class A, bool BARE>
__device__ void load(const Line<A, BARE>& line, int64_t first, A (&x)[TILE_ITEMS]) {
  constexpr int SIDE = 16 / sizeof(T);
  struct alignas(16) Pack {
    T x[SIDE];
  };
  const int64_t stride = line.s.logits.stride[1], size = line.size;
  const T* const row = line.template data<T>();
  const int64_t mine = first + my_lane() * SIDE;
  if (stride == 1 && first + TILE <= size && reinterpret_cast<uintptr_t>(row + first) % 16 == 0) {
    Pack packs[TILE_ITEMS / SIDE];
#pragma unroll
    for (int v = 0; v < TILE_ITEMS / SIDE; v++) packs[v] = *reinterpret_cast<const Pack*>(row + mine + v * WARP * SIDE);
#pragma unroll
    for (int k = 0; k < TILE_ITEMS; k++) x[k] = widen(packs[k / SIDE].x[k % SIDE]);
  } else {
#pragma unroll
    for (int k = 0; k < TILE_ITEMS; k++) {
      const int64_t i = mine + k / SIDE * WARP * SIDE + k % SIDE;
      x[k] = i < size ? widen(row[i * stride]) : A(-INFINITE);
    }
  }
}

template <class A>
__device__ Tile<A> summarize(const A (&x)[TILE_ITEMS], const Weigher<A>& weigh, int64_t size) {
  constexpr int PART = TILE_ITEMS / TILE_CHUNKS;
  Tile<A> tile;
  bool broken = false, none = false;
#pragma unroll
  for (int c = 0; c < TILE_CHUNKS; c++) {
    A most = A(-INFINITE);
#pragma unroll
    for (int k = c * PART; k < (c + 1) * PART; k++) {
      most = max(most, x[k]);
      broken |= !(x[k] < A(INFINITE));
      none |= x[k] == A(-INFINITE);
    }
    tile.tops[c] = largest(most);
  }
  const A top = tile.top();
  A mass = 0, dot = 0;
  tile.broken = __ballot_sync(ALL, broken) != 0;
  tile.finite = static_cast<int32_t>(size);
  if (__ballot_sync(ALL, none) == 0) {
#pragma unroll
    for (int c = 0; c < TILE_CHUNKS; c++) {
      A masses[2] = {}, dots[2] = {};
#pragma unroll
      for (int k = c * PART; k < (c + 1) * PART; k++) {
        A exponent;
        const A weight = weigh(x[k] - top, exponent);
        masses[k % 2] += weight;
        dots[k % 2] += weight * exponent;
      }
      mass += masses[0] + masses[1];
      dot += dots[0] + dots[1];
    }
  } else {
    int finite = 0;
#pragma unroll
    for (int c = 0; c < TILE_CHUNKS; c++) {
      A masses[2] = {}, dots[2] = {};
#pragma unroll
      for (int k = c * PART; k < (c + 1) * PART; k++) {
        A exponent;
        const bool counts = x[k] > A(-INFINITE);
        const A weight = weigh(counts ? x[k] - top : A(0), exponent);
        finite += counts;
        masses[k % 2] += counts ? weight : A(0);
        dots[k % 2] += counts ? weight * exponent : A(0);
      }
      mass += masses[0] + masses[1];
      dot += dots[0] + dots[1];
    }
    tile.finite = sum_of_warp(finite);
  }
  tile.mass = sum_of_warp(mass), tile.spread = Weigher<A>::spread(sum_of_warp(dot));
  return tile;
}

}  // namespace
}  // namespace rlhf_fast::cuda
