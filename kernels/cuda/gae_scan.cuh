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
  bool zero;  // what holes do: discount, not skip
};

// x -> a * x + b. Where a is 0 the argument is not looked at: 0 * inf would leak.
template <class T>
struct Affine {
  T a, b;
  __device__ T operator()(T x) const {
    const T y = fma(a, x, b);  // before the choice: a select costs less than a branch
    return a == T(0) ? b : y;
  }
  __device__ Affine then(Affine next) const { return {next.a * a, next(b)}; }
};

// One sequence's row. UNIT says at compile time that tokens lie side by side, as they nearly always do: items are then
// at constant offsets from one address.
template <class D, bool UNIT>
struct Row {
  D* data;
  int64_t stride_t;
  __device__ Row(Rows<D> rows, int64_t b) : data(rows.data + b * rows.stride_b), stride_t(rows.stride_t) {}
  __device__ int64_t stride() const { return UNIT ? 1 : stride_t; }
  __device__ D& operator[](int64_t t) const { return data[t * stride()]; }
};

template <class T>
__device__ int64_t offset(const Arguments<T>& args, int64_t b) {
  const int64_t i = b * args.cu_seqlens_stride;
  const int64_t t = args.cu_seqlens_wide ? static_cast<const int64_t*>(args.cu_seqlens)[i]
                                         : static_cast<const int32_t*>(args.cu_seqlens)[i];
  return min(max(t, int64_t(0)), args.tokens);
}

// Sequence b: its tokens are [start, end) of its rows.
template <class T, bool UNIT>
struct Sequence {
  Row<const T, UNIT> rewards, values;
  Row<const uint8_t, UNIT> mask;
  Row<T, UNIT> advantages, returns;
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
  const Row<T, false> advantages(args.advantages, b), returns(args.returns, b);
#pragma unroll 1
  for (int64_t t = from + threadIdx.x; t < to; t += blockDim.x) advantages[t] = returns[t] = T(0);
}

__device__ int lane() { return threadIdx.x % WARP; }
__device__ int warp() { return threadIdx.x / WARP; }
__device__ int warps() { return blockDim.x / WARP; }

// A thread's first item in the chunk whose last token is `top`. Item k is k * WARP tokens before it: lanes side by
// side, so that loads and stores coalesce.
__device__ int64_t first_item(int64_t top) { return top - warp() * SPAN - lane(); }

// How many tokens of the sequence there are from `t` down, as far as a thread's items go; <= 0 if there is none.
__device__ int tokens_from(int64_t t, int64_t start) { return max(min(t - start + 1, int64_t(SPAN)), int64_t(0)); }

// Position of the last valid token of the sequence, start - 1 if there is none; every thread gets it.
template <class T, bool UNIT>
__device__ int64_t last_valid(const Sequence<T, UNIT>& seq) {
  __shared__ int nearest[WARPS];
  const int chunk = blockDim.x * ITEMS;
#pragma unroll 1
  for (int64_t top = seq.end - 1; top >= seq.start; top -= chunk) {
    const int64_t t = first_item(top);
    const int room = tokens_from(t, seq.start);
    const uint8_t* mask = &seq.mask[t];
    bool valid[ITEMS];
#pragma unroll
    for (int k = 0; k < ITEMS; k++) valid[k] = k * WARP < room && mask[-k * WARP * seq.mask.stride()] != 0;
    int distance = chunk;
#pragma unroll
    for (int k = ITEMS - 1; k >= 0; k--) {
      const unsigned ballot = __ballot_sync(ALL, valid[k]);
      if (ballot != 0) distance = warp() * SPAN + k * WARP + __ffs(ballot) - 1;
    }
    if (lane() == 0) nearest[warp()] = distance;
    __syncthreads();
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
      if (w < warps()) distance = min(distance, nearest[w]);
    }
    __syncthreads();
    if (distance < chunk) return top - distance;
  }
  return seq.start - 1;
}

// A thread's share of the chunk whose last token is `top`, as it comes from memory: nothing here waits for the loads.
template <class T>
struct Items {
  T rewards[ITEMS], values[ITEMS];
  unsigned mask[ITEMS];
  int room;

  template <bool UNIT>
  __device__ void load(const Sequence<T, UNIT>& seq, int64_t top) {
    const int64_t t = first_item(top);
    room = tokens_from(t, seq.start);
    const T *reward = &seq.rewards[t], *value = &seq.values[t];
    const uint8_t* valid = &seq.mask[t];
#pragma unroll
    for (int k = 0; k < ITEMS; k++) {
      rewards[k] = inside(k) ? reward[-k * WARP * seq.rewards.stride()] : T(0);
      values[k] = inside(k) ? value[-k * WARP * seq.values.stride()] : T(0);
      mask[k] = inside(k) ? valid[-k * WARP * seq.mask.stride()] : 0u;
    }
  }
  __device__ bool inside(int k) const { return k * WARP < room; }
  __device__ bool valid(int k) const { return mask[k] != 0; }
  __device__ T surprise(int k) const { return rewards[k] - values[k]; }
};

// gamma * lam to the power of the number of tokens from the warp's first lane to this one, as `scan_rows` rounds it.
template <class T>
__device__ T power_of_lane(T gamma_lam) {
  T power = gamma_lam;
  for (int step = 1; step < WARP; step *= 2) {
    const T before = __shfl_up_sync(ALL, power, step);
    if (lane() >= step) power *= before;
  }
  return power;
}

template <class T>
__device__ Affine<T> take(Affine<T> f, int from_lane) {
  return {__shfl_sync(ALL, f.a, from_lane), __shfl_sync(ALL, f.b, from_lane)};
}

// One step of an inclusive scan over the lanes.
template <class T>
__device__ Affine<T> scan_step(Affine<T> f, int step) {
  const Affine<T> before = {__shfl_up_sync(ALL, f.a, step), __shfl_up_sync(ALL, f.b, step)};
  const Affine<T> after = before.then(f);
  return {lane() >= step ? after.a : f.a, lane() >= step ? after.b : f.b};
}

// Inclusive scans over the lanes, one for each item. In a warp full of tokens, the usual case, `a` is the same in every
// lane and only `b` moves; the bits are those of the general case.
template <class T>
__device__ void scan_rows(Affine<T> (&f)[ITEMS], bool full, T gamma_lam, T power) {
  if (__all_sync(ALL, full)) {
    T a = gamma_lam;
#pragma unroll
    for (int step = 1; step < WARP; step *= 2, a *= a) {
#pragma unroll
      for (int k = 0; k < ITEMS; k++) {
        const T before = __shfl_up_sync(ALL, f[k].b, step);
        if (lane() >= step && a != T(0)) f[k].b = fma(a, before, f[k].b);
      }
    }
    for (int k = 0; k < ITEMS; k++) f[k].a = power;
    return;
  }
#pragma unroll
  for (int step = 1; step < WARP; step *= 2) {
#pragma unroll
    for (int k = 0; k < ITEMS; k++) f[k] = scan_step(f[k], step);
  }
}

// The scan of one chunk, short of what is handed in.
template <class T>
struct Scan {
  Affine<T> items[ITEMS];  // from the warp's first token up to the item
  Affine<T> before;        // all of the chunk before this warp
  Affine<T> all;           // the whole chunk
};

template <class T>
__device__ Scan<T> scan_chunk(const Items<T>& items, const Arguments<T>& args, T power) {
  __shared__ Affine<T> spans[WARPS];
  Scan<T> scan;
  bool full = true;
#pragma unroll
  for (int k = 0; k < ITEMS; k++) {
    const bool counts = items.valid(k) || (args.zero && items.inside(k));
    const T handed = Affine<T>{args.gamma_lam, args.gamma * items.values[k]}(items.surprise(k));
    scan.items[k] = {counts ? args.gamma_lam : T(1), items.valid(k) ? handed : T(0)};
    full &= counts;
  }
  scan_rows(scan.items, full, args.gamma_lam, power);
#pragma unroll
  for (int k = 1; k < ITEMS; k++) scan.items[k] = take(scan.items[k - 1], WARP - 1).then(scan.items[k]);
  if (lane() == WARP - 1) spans[warp()] = scan.items[ITEMS - 1];
  __syncthreads();
  Affine<T> f = lane() < warps() ? spans[lane()] : Affine<T>{T(1), T(0)};
  __syncthreads();
#pragma unroll
  for (int step = 1; step < WARPS; step *= 2) f = scan_step(f, step);
  scan.all = take(f, WARPS - 1);
  scan.before = take(f, max(warp() - 1, 0));
  if (warp() == 0) scan.before = {T(1), T(0)};
  return scan;
}

// Writes the chunk whose last token is `top` and which is handed `u`; `kept` gets the advantages too.
template <class T, bool UNIT>
__device__ void store(const Sequence<T, UNIT>& seq, int64_t top, const Items<T>& items, const Scan<T>& scan, T u,
                      T* kept = nullptr) {
  const int64_t t = first_item(top);
  T *to_advantages = &seq.advantages[t], *to_returns = &seq.returns[t];
  T row_before = scan.before(u);
#pragma unroll
  for (int k = 0; k < ITEMS; k++) {
    // What the lane before this one hands on; the first lane's is the last one's of the item before.
    const T turned = __shfl_sync(ALL, scan.items[k](scan.before(u)), (lane() + WARP - 1) % WARP);
    const T next = lane() == 0 ? row_before : turned;
    row_before = turned;
    const T advantage = items.surprise(k) + next;
    if (kept != nullptr) kept[k] = advantage;
    if (items.inside(k)) {
      to_advantages[-k * WARP * seq.advantages.stride()] = items.valid(k) ? advantage : T(0);
      to_returns[-k * WARP * seq.returns.stride()] = items.valid(k) ? advantage + items.values[k] : T(0);
    }
  }
}

}  // namespace
}  // namespace rlhf_fast::cuda
