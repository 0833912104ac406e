// KL-shaped rewards, GAE and whitening. SPDX-License-Identifier: Apache-2.0
//
// First launch: a block per row makes the rewards of a chunk, scans it as gae.cu does, to the same bits, and sums up
// the moments of the row. Second launch: every block puts the moments of all rows together, in the same order, and
// whitens its chunk; where there are many rows one block does so for all, in a launch between the two. A few very long
// rows leave most of the GPU idle in the first launch.
#include "advantages.h"
#include "gae_scan.cuh"
#include "ppo_loss_exp.cuh"

namespace rlhf_fast::cuda {
namespace {

constexpr int64_t MANY_ROWS = 1024;

// What shapes the rewards, beside the arguments of the scan, whose `rewards` are the logprobs here.
template <class T>
struct Shaping {
  Rows<const T> ref_logprobs, dense_scores;  // the latter null with one score per row
  const T* scores;
  int64_t scores_stride;
  const T* price;  // or null
  T kl_coef, clip;
  KL kl;
  bool next;
  Rows<T> rewards;
  Moments* moments;  // of each row, or null
};

template <class T>
__device__ T kl_reward_of(KL kl, T difference, T price) {
  if (kl == KL::k1) return kl_reward<Math, KL::k1>(difference, price);
  if (kl == KL::k2) return kl_reward<Math, KL::k2>(difference, price);
  if (kl == KL::k3) return kl_reward<Math, KL::k3>(difference, price);
  return kl_reward<Math, KL::abs>(difference, price);
}

// A thread's share of a chunk. PLAIN says at compile time that tokens lie side by side and that a row has one score.
template <class T, bool PLAIN>
struct Tokens {
  Items<T> items;  // with logprobs for rewards, until they are shaped
  T ref_logprobs[ITEMS], scores[ITEMS];

  __device__ void load(const Sequence<T, PLAIN>& seq, const Row<const T, PLAIN>& refs, const Row<const T, false>& dense,
                       int64_t top) {
    items.load(seq, top);
    const int64_t t = first_item(top);
    const T* ref = &refs[t];
#pragma unroll
    for (int k = 0; k < ITEMS; k++) {
      ref_logprobs[k] = items.inside(k) ? ref[-k * WARP * refs.stride()] : T(0);
      scores[k] = !PLAIN && dense.data != nullptr && items.inside(k) ? dense[t - k * WARP] : T(0);
    }
  }
  // `score` lands on token `landing`.
  __device__ void shape(const Shaping<T>& shaping, T price, int64_t top, int64_t landing, T score) {
    const int64_t t = first_item(top);
#pragma unroll
    for (int k = 0; k < ITEMS; k++) {
      T reward = kl_reward_of(shaping.kl, items.rewards[k] - ref_logprobs[k], price);
      if (!PLAIN) reward += clamped(scores[k], -shaping.clip, shaping.clip);
      if (t - k * WARP == landing) reward += score;
      items.rewards[k] = items.valid(k) ? reward : T(0);
    }
  }
};

// Sums over all threads of a block, in a fixed tree, in every thread.
template <int N>
__device__ void block_sum(double (&x)[N]) {
  __shared__ double sums[WARPS][N];
  __syncthreads();  // all have read what was there before
#pragma unroll
  for (int i = 0; i < N; i++) {
#pragma unroll
    for (int bits = WARP / 2; bits > 0; bits /= 2) x[i] += __shfl_xor_sync(ALL, x[i], bits);
    if (lane() == 0) sums[warp()][i] = x[i];
    x[i] = 0;
  }
  __syncthreads();
#pragma unroll 1
  for (int w = 0; w < warps(); w++) {
#pragma unroll
    for (int i = 0; i < N; i++) x[i] += sums[w][i];
  }
}

// The value of thread 0, in every thread.
__device__ double of_first_thread(double x) {
  __shared__ double value;
  if (threadIdx.x == 0) value = x;
  __syncthreads();
  return value;
}

// Enough blocks to hide the loads, for no chunk is loaded ahead.
template <class T, bool PLAIN>
__global__ void __launch_bounds__(THREADS, sizeof(T) == 4 && PLAIN ? 3 : 1)
    advantages_kernel(Arguments<T> args, Shaping<T> shaping) {
  const int64_t b = blockIdx.x;
  const Sequence<T, PLAIN> seq(args, b);
  const Row<const T, PLAIN> refs(shaping.ref_logprobs, b);
  const Row<const T, false> dense(shaping.dense_scores, b);
  const Row<T, true> rewards(shaping.rewards, b);
  const T power = power_of_lane(args.gamma_lam), price = shaping.price ? *shaping.price : shaping.kl_coef;
  const int64_t last = last_valid(seq);
  // Where the row's score lands, if it has one.
  const int64_t landing = dense.data != nullptr || last < 0 ? -1 : min(last + shaping.next, seq.end - 1);
  const T score = landing < 0 ? T(0) : clamped(shaping.scores[b * shaping.scores_stride], -shaping.clip, shaping.clip);
  clear(args, b, last + 1, seq.end);
#pragma unroll 1
  for (int64_t t = last + 1 + threadIdx.x; t < seq.end; t += blockDim.x) rewards[t] = t == landing ? score : T(0);

  int count = 0;
  double center = 0, sums[3] = {};
  T u = seq.first;
  for (int64_t top = last; top >= seq.start; top -= CHUNK) {
    Tokens<T, PLAIN> tokens;
    tokens.load(seq, refs, dense, top);
    tokens.shape(shaping, price, top, landing, score);
    const Items<T>& items = tokens.items;
    T *const to = &rewards[first_item(top)], found[ITEMS];
#pragma unroll
    for (int k = 0; k < ITEMS; k++) {
      if (items.inside(k)) to[-k * WARP] = items.rewards[k];
    }
    const Scan<T> scan = scan_chunk(items, args, power);
    store(seq, top, items, scan, u, found);
    u = scan.all(u);
    // Around a member of the data, from which their mean is never so far that the squares would cancel.
    if (top == last) center = of_first_thread(static_cast<double>(found[0]));
#pragma unroll
    for (int k = 0; k < ITEMS; k++) {
      const double away = items.valid(k) ? static_cast<double>(found[k]) - center : 0;
      count += items.valid(k), sums[1] += away, sums[2] += away * away;
    }
  }
  if (shaping.moments == nullptr) return;
  sums[0] = count;
  block_sum(sums);
  const double away = sums[0] > 0 ? sums[1] / sums[0] : 0;
  if (threadIdx.x == 0) shaping.moments[b] = {sums[0], center + away, sums[2] - sums[1] * away};
}

// Of all rows, by a full block.
__device__ Moments together(const Moments* rows, int64_t count) {
  double sums[2] = {}, squares[1] = {};
#pragma unroll 1
  for (int64_t b = threadIdx.x; b < count; b += THREADS) {
    sums[0] += rows[b].count;
    sums[1] += rows[b].count * rows[b].mean;
  }
  block_sum(sums);
  const double mean = sums[1] / max(sums[0], 1.0);
#pragma unroll 1
  for (int64_t b = threadIdx.x; b < count; b += THREADS) {
    const double away = rows[b].mean - mean;
    if (rows[b].count > 0) squares[0] += rows[b].squares + rows[b].count * away * away;
  }
  block_sum(squares);
  return {sums[0], mean, squares[0]};
}

// Puts what is put together where one more row would be.
template <class T>
__global__ void __launch_bounds__(THREADS) advantages_together_kernel(Moments* moments, int64_t rows) {
  const Moments all = together(moments, rows);
  if (threadIdx.x == 0) moments[rows] = all;
}

template <class T>
__global__ void __launch_bounds__(THREADS)
    advantages_whiten_kernel(Rows<T> advantages, Rows<const uint8_t> mask, int64_t rows, int64_t width,
                             const Moments* moments, bool shift_mean, bool unbiased) {
  const Moments all = rows > MANY_ROWS ? moments[rows] : together(moments, rows);
  const Whitening<T> whitening = whitening_of<T>(all, shift_mean, unbiased);
  const int64_t per_row = (width + CHUNK - 1) / CHUNK, b = blockIdx.x / per_row;
  const int64_t start = (blockIdx.x - b * per_row) * CHUNK + threadIdx.x;
  const Row<T, true> x(advantages, b);
  const Row<const uint8_t, false> valid(mask, b);
#pragma unroll
  for (int k = 0; k < ITEMS; k++) {
    const int64_t t = start + k * THREADS;
    if (t < width && valid[t] != 0) x[t] = whitening(x[t]);
  }
}

template <class D>
Rows<D> rows_of(const View& view) {
  return {static_cast<D*>(view.data), view.stride[0], view.stride[1]};
}

template <class T>
void run(const AdvantagesTensors& t, const AdvantagesNumbers& numbers, Moments* moments, cudaStream_t stream) {
  const int64_t rows = t.rows(), width = t.width();
  const Arguments<T> args = {rows_of<const T>(t.logprobs),
                             rows_of<const T>(t.values),
                             rows_of<const uint8_t>(t.mask),
                             t.last_values.as<const T>(),
                             t.last_values.stride[0],
                             nullptr,
                             0,
                             false,
                             rows_of<T>(t.advantages),
                             rows_of<T>(t.returns),
                             rows,
                             width,
                             static_cast<T>(numbers.gamma),
                             static_cast<T>(numbers.gamma * numbers.lam),
                             numbers.zero_holes};
  const Rows<const T> none = {nullptr, 0, 0};
  const Shaping<T> shaping = {rows_of<const T>(t.ref_logprobs),
                              t.dense() ? rows_of<const T>(t.scores) : none,
                              t.scores.as<const T>(),
                              t.scores.stride[0],
                              t.price.as<const T>(),
                              static_cast<T>(numbers.kl_coef),
                              static_cast<T>(numbers.clip_scores),
                              numbers.kl,
                              numbers.next,
                              rows_of<T>(t.rewards),
                              numbers.whiten ? moments : nullptr};
  bool plain = !t.dense();
  for (const View* view : {&t.logprobs, &t.ref_logprobs, &t.values, &t.mask}) plain &= view->stride[1] == 1;
  const int64_t spans = (width + SPAN - 1) / SPAN, chunks = (width + CHUNK - 1) / CHUNK;
  const int threads = WARP * static_cast<int>(spans < WARPS ? spans : WARPS);
  launch(plain ? advantages_kernel<T, true> : advantages_kernel<T, false>, "advantages_kernel", rows, threads, stream,
         args, shaping);
  if (!numbers.whiten) return;
  if (rows > MANY_ROWS)
    launch(advantages_together_kernel<T>, "advantages_together_kernel", 1, THREADS, stream, moments, rows);
  launch(advantages_whiten_kernel<T>, "advantages_whiten_kernel", rows * chunks, THREADS, stream, args.advantages,
         args.mask, rows, width, static_cast<const Moments*>(moments), numbers.shift_mean, numbers.unbiased);
}

}  // namespace

void advantages(View scores, View logprobs, View ref_logprobs, View values, View mask, View last_values, View price,
                double kl_coef, const std::string& kl, const std::string& at, std::optional<double> clip_scores,
                double gamma, double lam, const std::string& holes, bool whiten, bool shift_mean, bool unbiased,
                View advantages, View returns, View rewards, View scratch, int device, uintptr_t stream) {
  const AdvantagesTensors tensors = {scores,      logprobs, ref_logprobs, values,  mask,
                                     last_values, price,    advantages,   returns, rewards};
  const AdvantagesNumbers numbers =
      advantages_numbers(kl_coef, kl, at, clip_scores, gamma, lam, holes, whiten, shift_mean, unbiased);
  check_advantages(tensors);
  require_advantages(scratch.dtype == Dtype::float64 && scratch.dims == 1 && scratch.stride[0] == 1 &&
                         scratch.shape[0] >= 3 * (tensors.rows() + 1),
                     "scratch is too small");
  if (!advantages) return;  // no token at all
  const DeviceGuard guard(device);
  const auto run_typed = logprobs.dtype == Dtype::float64 ? run<double> : run<float>;
  run_typed(tensors, numbers, scratch.as<Moments>(), reinterpret_cast<cudaStream_t>(stream));
}

}  // namespace rlhf_fast::cuda
