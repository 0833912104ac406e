// What a block does with a row of logits: 16-byte loads, softmax sums and their merge in a fixed tree.
// SPDX-License-Identifier: Apache-2.0
//
// Which thread takes which logit, and so the tree of every sum, follows from V alone.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "launch.h"
#include "rows.h"

namespace rlhf_fast::cuda {
namespace {

constexpr unsigned ALL = 0xffffffffu;
constexpr int WARP = 32;
constexpr int THREADS = 256;
constexpr int WARPS = THREADS / WARP;
constexpr int ITEMS = 16;              // logits per thread and step
constexpr int STEP = THREADS * ITEMS;  // logits per step of a block

template <class To, class From>
__device__ To bits(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  memcpy(&y, &x, sizeof y);
  return y;
}

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

// The type in which a dtype is computed, and results are returned.
template <class T>
struct Wide {
  using type = float;
};
template <>
struct Wide<double> {
  using type = double;
};

__device__ float widen(float x) { return x; }
__device__ double widen(double x) { return x; }
__device__ float widen(bfloat16 x) { return bits<float>(uint32_t(x.bits) << 16); }

// To nearest, ties to even.
__device__ void narrow(float x, float& to) { to = x; }
__device__ void narrow(double x, double& to) { to = x; }

#ifdef RLHF_FAST_SIMT
__device__ float widen(float16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16, rest = uint32_t(x.bits & 0x7fffu) << 13;
  const uint32_t scaled = bits<uint32_t>(bits<float>(rest) * 0x1p112f);  // the exponents' biases differ by 112
  return bits<float>((rest >= 0x0f800000u ? rest | 0x7f800000u : scaled) | sign);
}
__device__ void narrow(float x, bfloat16& to) {
  const uint32_t u = bits<uint32_t>(x);
  to.bits = x == x ? (u + 0x7fffu + (u >> 16 & 1u)) >> 16 : 0x7fffu;
}
__device__ void narrow(float x, float16& to) {
  const uint32_t u = bits<uint32_t>(x), sign = u & 0x80000000u, rest = u ^ sign;
  // Adding 0.5 leaves the 10 bits of a subnormal, rounded, at the end.
  uint32_t h = rest < (113u << 23) ? bits<uint32_t>(bits<float>(rest) + 0.5f) - 0x3f000000u
                                   : (rest - (112u << 23) + 0xfffu + (rest >> 13 & 1u)) >> 13;
  if (rest >= (143u << 23)) h = 0x7c00u;
  to.bits = rest > 0x7f800000u ? 0x7fffu : h | sign >> 16;
}
// 2^x, what is below the smallest normal number being 0.
__device__ float power_of_two(float x) {
  const float y = exp2f(x);
  return y < 0x1p-126f ? 0.0f : y;
}
#else  // the same in one instruction each; exp2f takes five to keep subnormal results
__device__ float widen(float16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
__device__ void narrow(float x, bfloat16& to) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to.bits) : "f"(x)); }
__device__ void narrow(float x, float16& to) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to.bits) : "f"(x)); }
__device__ float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
#endif

// A thread's share of a step: 16 bytes that lie side by side belong to one thread, whether they are loaded at once
// (VECTOR: unit stride, addresses of 16 bytes) or not.
template <class T, bool VECTOR>
struct Items {
  static constexpr int SIDE = 16 / sizeof(T), VECTORS = ITEMS / SIDE;
  struct alignas(16) Pack {
    T x[SIDE];
  };
  __device__ static int64_t place(int64_t at, int item) {
    return at + int64_t(item / SIDE) * THREADS * SIDE + threadIdx.x * SIDE + item % SIDE;
  }
  Pack packs[VECTORS];
  __device__ T& operator[](int item) { return packs[item / SIDE].x[item % SIDE]; }

  // A vector is in the row as a whole or not at all: V is a multiple of SIDE where VECTOR holds.
  __device__ void load(const T* row, int64_t stride, int64_t size, int64_t at) {
#pragma unroll
    for (int v = 0; v < VECTORS; v++) {
      const int64_t first = place(at, v * SIDE);
      if constexpr (VECTOR) {
        if (first < size) packs[v] = *reinterpret_cast<const Pack*>(row + first);
      } else {
#pragma unroll
        for (int j = 0; j < SIDE; j++)
          if (first + j < size) packs[v].x[j] = row[(first + j) * stride];
      }
    }
  }
  __device__ void store(T* row, int64_t size, int64_t at) const {
#pragma unroll
    for (int v = 0; v < VECTORS; v++) {
      const int64_t first = place(at, v * SIDE);
      if constexpr (VECTOR) {
        if (first < size) *reinterpret_cast<Pack*>(row + first) = packs[v];
      } else {
#pragma unroll
        for (int j = 0; j < SIDE; j++)
          if (first + j < size) row[first + j] = packs[v].x[j];
      }
    }
  }
};

__device__ float exponential(float x) { return power_of_two(x * 1.44269504088896341f); }
__device__ double exponential(double x) { return exp(x); }

// A product as it is rounded: no fused operation swallows it. A logit and the logsumexp of its row, which is about that
// logit where a token is certain, would leave the rounding of the one for their gap.
__device__ inline float product(float a, float b) { return __fmul_rn(a, b); }
__device__ inline double product(double a, double b) { return __dmul_rn(a, b); }

// z = softcap * tanh(x / softcap) / temperature, without the cap where it is 0.
template <class A>
struct Scaling {
  A softcap, per_softcap, per_temperature;
  Scaling(double softcap, double temperature)
      : softcap(static_cast<A>(softcap)),
        per_softcap(softcap > 0 ? static_cast<A>(1 / softcap) : A(0)),
        per_temperature(static_cast<A>(1 / temperature)) {}
  // Where it is known when this is compiled that there is no cap, no logit asks for it.
  template <bool MAYBE_CAPPED>
  __device__ A capped(A x) const {
    return !MAYBE_CAPPED || softcap == 0 ? x : softcap * tanh(x * per_softcap);
  }
  template <bool MAYBE_CAPPED>
  __device__ A of(A x) const {
    return product(capped<MAYBE_CAPPED>(x), per_temperature);
  }
};

// Of some logits: their maximum m, sum of exp(z - m) and of exp(z - m) * (z - m).
template <class A>
struct Softmax {
  A top = -INFINITY, total = 0, dot = 0;

  __device__ void lift(A to) {
    // Never as far down as a token masked by the lowest float: infinite times a weight of 0.
    const A shift = total == A(0) || top == to ? A(0) : max(top - to, A(-1000)), weight = exponential(shift);
    dot = (dot + total * shift) * weight;
    total = product(total, weight);  // `kl` lifts two totals, whose bits are the same where the models are
    top = to;
  }
  __device__ void merge(Softmax other) {
    const A to = max(top, other.top);
    lift(to), other.lift(to);
    total += other.total;
    dot += other.dot;
  }
  __device__ void add(const A (&z)[ITEMS]) {
    A highest = top;
#pragma unroll
    for (int k = 0; k < ITEMS; k++) highest = max(highest, z[k]);
    lift(highest);
    const A shift = highest == A(-INFINITY) ? A(0) : highest;
#pragma unroll
    for (int k = 0; k < ITEMS; k++) {
      const A d = z[k] - shift, e = exponential(d);
      total += e;
      dot += e == A(0) ? A(0) : e * d;  // 0 * -inf
    }
  }
  // That of the thread whose lane differs in the bit `distance`.
  __device__ Softmax across(int distance) const {
    Softmax other;
    other.top = __shfl_xor_sync(ALL, top, distance);
    other.total = __shfl_xor_sync(ALL, total, distance);
    other.dot = __shfl_xor_sync(ALL, dot, distance);
    return other;
  }
  // A row of nothing but -inf has the logsumexp -inf and no entropy.
  __device__ A base() const { return total == A(0) ? A(0) : top; }
  __device__ A entropy() const { return log(total) - dot / total; }
};

// Of all threads of the block, in a fixed tree; each gets it.
template <class Sums>
__device__ void merge_block(Sums& sums) {
  __shared__ Sums warps[WARPS];
#pragma unroll
  for (int distance = WARP / 2; distance > 0; distance /= 2) sums.merge(sums.across(distance));
  if (threadIdx.x % WARP == 0) warps[threadIdx.x / WARP] = sums;
  __syncthreads();
  sums = warps[0];
#pragma unroll 1
  for (int w = 1; w < WARPS; w++) sums.merge(warps[w]);
}

template <class A>
struct Numbers {  // one per row
  const A* data;
  RowOffsets at;
  explicit Numbers(const View& view) : data(view.as<const A>()), at(view, view.dims) {}
  __device__ A operator[](int64_t row) const { return data[at[row]]; }
};

// ids and mask of all rows, on the device.
struct DeviceChoices {
  const void* ids;
  const uint8_t* mask;
  bool ids_wide;  // int64, not int32
  RowOffsets id_at, mask_at;
  DeviceChoices(const View& ids, const View& mask)
      : ids(ids.data),
        mask(mask.as<const uint8_t>()),
        ids_wide(ids.dtype == Dtype::int64),
        id_at(ids, ids.dims),
        mask_at(mask, mask.dims) {}
  __device__ bool counts(int64_t row) const { return mask == nullptr || mask[mask_at[row]] != 0; }
  __device__ int64_t id(int64_t row) const {
    const int64_t at = id_at[row];
    return ids_wide ? static_cast<const int64_t*>(ids)[at] : static_cast<const int32_t*>(ids)[at];
  }
};

// Does every row of the view allow 16-byte accesses?
inline bool vectorizable(const View& view, int bytes) {
  bool fits = reinterpret_cast<uintptr_t>(view.data) % 16 == 0 && view.stride[view.dims - 1] == 1;
  fits &= view.shape[view.dims - 1] * bytes % 16 == 0;
  for (int d = 0; d + 1 < view.dims; d++) fits &= view.shape[d] == 1 || view.stride[d] * bytes % 16 == 0;
  return fits;
}

}  // namespace
}  // namespace rlhf_fast::cuda
