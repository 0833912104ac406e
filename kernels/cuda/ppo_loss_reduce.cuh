// What the kernels of ppo_loss.cu share: their arguments, the scratch between them, sums over a block.
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "launch.h"
#include "ppo_loss_exp.cuh"
#include "ppo_loss_token.h"

namespace rlhf_fast::cuda {
namespace {

constexpr int WARP = 32;
constexpr unsigned ALL = 0xffffffffu;
constexpr int WARPS = 8;
constexpr int THREADS = WARPS * WARP;
constexpr int ITEMS = 4;                // tokens per thread
constexpr int CHUNK = ITEMS * THREADS;  // tokens per block; 1024 is also in _scratch of rlhf_fast/ops/ppo_loss.py
constexpr int COUNT_BLOCKS = 1024;      // so is this 1024

template <class D>
struct Rows {  // [B, T] or [N] with any strides
  D* data;
  int64_t stride_b, stride_t;
  bool flat;  // all tokens are stride_t apart, so that no division must find the row

  __device__ D& at(int64_t b, int64_t t, int64_t width) const {
    return data[flat ? (b * width + t) * stride_t : b * stride_b + t * stride_t];
  }
  __device__ D& at(int64_t i, int64_t width) const {
    if (flat) return data[i * stride_t];
    const int64_t b = i / width;
    return data[b * stride_b + (i - b * width) * stride_t];
  }
};

template <class D>
Rows<D> rows_of(const View& view) {
  if (view.dims == 0) return {nullptr, 0, 0, true};
  const int64_t stride_t = view.stride[view.dims - 1];
  const bool single = view.dims == 1 || view.shape[0] == 1;
  const int64_t stride_b = single ? 0 : view.stride[0];
  return {static_cast<D*>(view.data), stride_b, stride_t, single || stride_b == view.shape[1] * stride_t};
}

template <class T>
struct Arguments {
  Rows<const T> logprobs, old_logprobs, advantages;
  Rows<const uint8_t> mask;
  Rows<const T> values, old_values, returns, entropy, ref_logprobs;
  const T* denominator;  // or null
  T *grad_logprobs, *grad_values, *grad_entropy;
  PPOLossBounds<T> bounds;
  int64_t rows, width, tokens;
  bool by_sequence, row_weights;
  int count_blocks;  // 0 if the denominator needs no count
  double* scratch;   // the denominator, the counts of the blocks, of the rows, and the partial sums

  __device__ double* counts() const { return scratch + 1; }
  __device__ double* row_counts() const { return scratch + 1 + COUNT_BLOCKS; }
  __device__ double* partials() const { return scratch + 1 + COUNT_BLOCKS + rows; }
  int64_t scratch_size(int64_t blocks) const { return 1 + COUNT_BLOCKS + rows + blocks * ppo_loss_stats; }
};

template <class T>
Arguments<T> arguments(const PPOLossTensors& t, const PPOLossNumbers& numbers, const View& scratch) {
  const bool padded = t.logprobs.dims == 2;
  const int64_t rows = padded ? t.logprobs.shape[0] : 1, width = t.logprobs.shape[padded];
  return {rows_of<const T>(t.logprobs),
          rows_of<const T>(t.old_logprobs),
          rows_of<const T>(t.advantages),
          rows_of<const uint8_t>(t.mask),
          rows_of<const T>(t.values),
          rows_of<const T>(t.old_values),
          rows_of<const T>(t.returns),
          rows_of<const T>(t.entropy),
          rows_of<const T>(t.ref_logprobs),
          t.denominator.as<const T>(),
          t.grad_logprobs.as<T>(),
          t.grad_values.as<T>(),
          t.grad_entropy.as<T>(),
          ppo_loss_bounds<T>(numbers),
          rows,
          width,
          rows * width,
          numbers.by_sequence(),
          numbers.aggregate == Aggregate::seq_mean_token_mean,
          !t.denominator && numbers.aggregate != Aggregate::token_sum,
          scratch.as<double>()};
}

__device__ inline int lane() { return threadIdx.x % WARP; }
__device__ inline int warp() { return threadIdx.x / WARP; }

// The sum over all threads of a block, in every thread.
__device__ inline int64_t block_sum(int64_t x) {
  __shared__ int64_t warps[WARPS];
  for (int bits = WARP / 2; bits > 0; bits /= 2) x += __shfl_xor_sync(ALL, x, bits);
  __syncthreads();  // the warps have read what they had before
  if (lane() == 0) warps[warp()] = x;
  __syncthreads();
  x = 0;
  for (int w = 0; w < WARPS; w++) x += warps[w];
  return x;
}

// Sums, and of the last number the largest, over all threads of a block, in a fixed tree; threads 0 to 8 write them.
__device__ inline void block_merge(double (&wide)[ppo_loss_stats], double* to) {
  __shared__ double warps[WARPS][ppo_loss_stats];
#pragma unroll
  for (int s = 0; s < ppo_loss_stats; s++) {
#pragma unroll
    for (int bits = WARP / 2; bits > 0; bits /= 2) {
      const double other = __shfl_xor_sync(ALL, wide[s], bits);
      wide[s] = s < ppo_loss_sums ? wide[s] + other : larger(wide[s], other);
    }
    if (lane() == 0) warps[warp()][s] = wide[s];
  }
  __syncthreads();
  const int s = threadIdx.x;
  if (s >= ppo_loss_stats) return;
  double all = warps[0][s];
  for (int w = 1; w < WARPS; w++) all = s < ppo_loss_sums ? all + warps[w][s] : larger(all, warps[w][s]);
  to[s] = all;
}

}  // namespace
}  // namespace rlhf_fast::cuda
