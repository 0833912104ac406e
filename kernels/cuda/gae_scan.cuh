// The scan behind gae.cu: what a block does with one sequence and one chunk of it.
// SPDX-License-Identifier: Apache-2.0
//
// Token t hands u_t = gamma * lam * A_t + gamma * V_t to the token before it, so that one number is carried:
//
//   A_t = (r_t - V_t) + u_next,   u_t = gamma * lam * (r_t - V_t) + gamma * V_t + gamma * lam * u_next
//
// A masked token hands on what it got ("skip"), or is a token with r = V = 0 ("zero"). A token's place in the scan is
// its distance from the last valid token, and the shape of the scan depends on nothing else: padding on either side,
// packing and the batch change no bit.
#pragma once
#include <cstdint>

#include "launch.h"

namespace rlhf_fast::cuda {
namespace {

constexpr int WARP = 32;
constexpr unsigned ALL = 0xffffffffu;
constexpr int ITEMS = 4;            // tokens per thread
constexpr int SPAN = WARP * ITEMS;  // tokens per warp
constexpr int WARPS = 8;
constexpr int THREADS = WARPS * WARP;  // of a full block
constexpr int CHUNK = WARPS * SPAN;    // tokens per step of a full block

template <class D>
struct Rows {  // [B, T], or [N] with stride_b = 0
  D* data;
  int64_t stride_b, stride_t;
};

template <class T>
struct Arguments {
  Rows<const T> rewards, values;
  Rows<const uint8_t> mask;
  const T* last_values;  // [B] or null
  int64_t last_values_stride;
  const void* cu_seqlens;  // [B+1] or null
  int64_t cu_seqlens_stride;
  bool cu_seqlens_wide;  // int64, not int32
  Rows<T> advantages, returns;
  int64_t sequences, tokens;  // B and T, or B and N
  T gamma, gamma_lam;
};

// x -> a * x + b. Where a is 0 the argument is not looked at: 0 * inf would leak.
template <class T>
struct Affine {
  T a, b;
  __device__ T operator()(T x) const { return a == T(0) ? b : fma(a, x, b); }
  __device__ Affine then(Affine next) const { return {next.a * a, next(b)}; }
};

template <class D>
struct Row {
  D* data;
  int64_t stride;
  __device__ Row(Rows<D> rows, int64_t b) : data(rows.data + b * rows.stride_b), stride(rows.stride_t) {}
  __device__ D& operator[](int64_t t) const { return data[t * stride]; }
};

template <class T>
__device__ int64_t offset(const Arguments<T>& args, int64_t b) {
  const int64_t i = b * args.cu_seqlens_stride;
  const int64_t t = args.cu_seqlens_wide ? static_cast<const int64_t*>(args.cu_seqlens)[i]
                                         : static_cast<const int32_t*>(args.cu_seqlens)[i];
  return min(max(t, int64_t(0)), args.tokens);
}

// Sequence b: its tokens are [start, end) of its rows.
template <class T>
struct Sequence {
  Row<const T> rewards, values;
  Row<const uint8_t> mask;
  Row<T> advantages, returns;
  int64_t start, end;
  T first;  // what the last valid token is given

  __device__ Sequence(const Arguments<T>& args, int64_t b)
      : rewards(args.rewards, b),
        values(args.values, b),
        mask(args.mask, b),
        advantages(args.advantages, b),
        returns(args.returns, b),
        start(args.cu_seqlens ? offset(args, b) : 0),
        end(args.cu_seqlens ? offset(args, b + 1) : args.tokens),
        first(args.last_values ? args.gamma * args.last_values[b * args.last_values_stride] : T(0)) {}
};

// Zeroes [from, to) of row b, all threads together.
template <class T>
__device__ void clear(const Arguments<T>& args, int64_t b, int64_t from, int64_t to) {
  const Row<T> advantages(args.advantages, b), returns(args.returns, b);
  for (int64_t t = from + threadIdx.x; t < to; t += blockDim.x) advantages[t] = returns[t] = T(0);
}

// The place in the block's chunk of a thread's item k: lanes side by side, so that loads and stores coalesce.
__device__ int place(int k) { return threadIdx.x / WARP * SPAN + k * WARP + threadIdx.x % WARP; }

// Position of the last valid token of the sequence, start - 1 if there is none; every thread gets it.
template <class T>
__device__ int64_t last_valid(const Sequence<T>& seq) {
  __shared__ int nearest[WARPS];
  const int chunk = blockDim.x * ITEMS, warps = blockDim.x / WARP;
  for (int64_t top = seq.end - 1; top >= seq.start; top -= chunk) {
    bool valid[ITEMS];
    for (int k = 0; k < ITEMS; k++) valid[k] = top - place(k) >= seq.start && seq.mask[top - place(k)] != 0;
    int distance = chunk;
    for (int k = ITEMS - 1; k >= 0; k--) {
      const unsigned ballot = __ballot_sync(ALL, valid[k]);
      if (ballot != 0) distance = place(k) - static_cast<int>(threadIdx.x % WARP) + __ffs(ballot) - 1;
    }
    if (threadIdx.x % WARP == 0) nearest[threadIdx.x / WARP] = distance;
    __syncthreads();
    for (int w = 0; w < warps; w++) distance = min(distance, nearest[w]);
    __syncthreads();
    if (distance < chunk) return top - distance;
  }
  return seq.start - 1;
}

// A thread's share of the chunk whose last token is `top`.
template <class T>
struct Items {
  T rewards[ITEMS], values[ITEMS];
  bool valid[ITEMS], inside[ITEMS];

  __device__ void load(const Sequence<T>& seq, int64_t top) {
#pragma unroll
    for (int k = 0; k < ITEMS; k++) {
      const int64_t t = top - place(k);
      inside[k] = t >= seq.start;
      valid[k] = inside[k] && seq.mask[t] != 0;
      rewards[k] = inside[k] ? seq.rewards[t] : T(0);
      values[k] = inside[k] ? seq.values[t] : T(0);
    }
  }
};

// The product of gamma * lam over this lane and those before it, as `scan_warp` would round it.
template <class T>
__device__ T power_of_lane(T gamma_lam) {
  T power = gamma_lam;
  for (int step = 1; step < WARP; step *= 2) {
    const T before = __shfl_up_sync(ALL, power, step);
    if (int(threadIdx.x % WARP) >= step) power *= before;
  }
  return power;
}

// Inclusive scan over the lanes. A warp full of tokens, the usual case, has the same `a` in every lane and shuffles
// only `b`; the bits are those of the general case.
template <class T>
__device__ Affine<T> scan_warp(Affine<T> f, bool counts, T gamma_lam, T full) {
  const int lane = threadIdx.x % WARP;
  if (__all_sync(ALL, counts)) {
    T a = gamma_lam;
#pragma unroll
    for (int step = 1; step < WARP; step *= 2, a *= a) {
      const T before = __shfl_up_sync(ALL, f.b, step);
      if (lane >= step) f.b = Affine<T>{a, f.b}(before);
    }
    return {full, f.b};
  }
#pragma unroll
  for (int step = 1; step < WARP; step *= 2) {
    const Affine<T> before = {__shfl_up_sync(ALL, f.a, step), __shfl_up_sync(ALL, f.b, step)};
    if (lane >= step) f = before.then(f);
  }
  return f;
}

// The scan of one chunk, short of what is handed in.
template <class T>
struct Scan {
  Affine<T> items[ITEMS];  // from the start of the item's warp-wide row of tokens up to the item
  Affine<T> before;        // all of the chunk before this warp's span
  Affine<T> all;           // the whole chunk
};

template <class T, bool ZERO>
__device__ Scan<T> scan_chunk(const Items<T>& items, T gamma, T gamma_lam, T full) {
  __shared__ Affine<T> spans[WARPS];
  const int warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
  Scan<T> scan;
  Affine<T> span = {T(1), T(0)};
#pragma unroll
  for (int k = 0; k < ITEMS; k++) {
    const bool counts = ZERO ? items.inside[k] : items.valid[k];
    const T target = Affine<T>{gamma_lam, gamma * items.values[k]}(items.rewards[k] - items.values[k]);
    const Affine<T> token = {counts ? gamma_lam : T(1), items.valid[k] ? target : T(0)};
    scan.items[k] = scan_warp(token, counts, gamma_lam, full);
    const Affine<T> row = {__shfl_sync(ALL, scan.items[k].a, WARP - 1), __shfl_sync(ALL, scan.items[k].b, WARP - 1)};
    span = span.then(row);
  }
  if (threadIdx.x % WARP == 0) spans[warp] = span;
  __syncthreads();
  scan.all = {T(1), T(0)};
  for (int w = 0; w < warps; w++) {
    if (w == warp) scan.before = scan.all;
    scan.all = scan.all.then(spans[w]);
  }
  __syncthreads();
  return scan;
}

// Writes the chunk whose last token is `top` and which is handed `u`.
template <class T>
__device__ void store(const Sequence<T>& seq, int64_t top, const Items<T>& items, const Scan<T>& scan, T u) {
  u = scan.before(u);
#pragma unroll
  for (int k = 0; k < ITEMS; k++) {
    const T after = scan.items[k](u);
    T next = __shfl_up_sync(ALL, after, 1);
    if (threadIdx.x % WARP == 0) next = u;
    const T advantage = (items.rewards[k] - items.values[k]) + next;
    if (items.inside[k]) {
      seq.advantages[top - place(k)] = items.valid[k] ? advantage : T(0);
      seq.returns[top - place(k)] = items.valid[k] ? advantage + items.values[k] : T(0);
    }
    u = __shfl_sync(ALL, after, WARP - 1);
  }
}

}  // namespace
}  // namespace rlhf_fast::cuda
