// The clipped loss of policy and value, its statistics and its gradient. SPDX-License-Identifier: Apache-2.0
//
// A block per CHUNK tokens of the flattened batch makes the gradients and a partial sum of each statistic; one more
// block adds these up in a fixed order. Without a denominator a launch before them counts the mask. What passes from
// one launch to the next lies in `scratch`: no atomics, no host sync, the same bits in every run.
#include "ppo_loss_reduce.cuh"

namespace rlhf_fast::cuda {
namespace {

// Counts valid tokens, or each row's and the rows that have any; a block's share is the same in every run.
template <class T>
__global__ void __launch_bounds__(THREADS) ppo_loss_count_kernel(Arguments<T> args) {
  int64_t found = 0;
  if (!args.by_sequence) {
    for (int64_t i = blockIdx.x * int64_t(THREADS) + threadIdx.x; i < args.tokens; i += int64_t(gridDim.x) * THREADS)
      found += args.mask.at(i, args.width) != 0;
    found = block_sum(found);
  } else {
    for (int64_t b = blockIdx.x; b < args.rows; b += gridDim.x) {
      int64_t valid = 0;
      for (int64_t t = threadIdx.x; t < args.width; t += THREADS) valid += args.mask.at(b, t, args.width) != 0;
      valid = block_sum(valid);
      if (threadIdx.x == 0) args.row_counts()[b] = static_cast<double>(valid);
      found += valid > 0;
    }
  }
  if (threadIdx.x == 0) args.counts()[blockIdx.x] = static_cast<double>(found);
}

// The same number in every thread.
template <class T>
__device__ double denominator_of(const Arguments<T>& args) {
  if (args.denominator != nullptr) return static_cast<double>(*args.denominator);
  if (args.count_blocks == 0) return 1;
  int64_t found = 0;
  for (int i = threadIdx.x; i < args.count_blocks; i += THREADS) found += static_cast<int64_t>(args.counts()[i]);
  found = block_sum(found);
  return static_cast<double>(found > 1 ? found : 1);
}

template <class T>
__device__ KLTerm<T> kl_term_of(KL kl, T difference) {
  if (kl == KL::k1) return kl_term<Math, KL::k1>(difference);
  if (kl == KL::k2) return kl_term<Math, KL::k2>(difference);
  if (kl == KL::k3) return kl_term<Math, KL::k3>(difference);
  return kl_term<Math, KL::abs>(difference);
}

// Token i, which is valid: adds to the sums, writes the gradients.
template <class T>
__device__ void take_token(const Arguments<T>& args, int64_t i, T weight, T scale, T (&sums)[ppo_loss_sums],
                           T& ratio_max) {
  const PPOLossBounds<T>& bounds = args.bounds;
  const T logprob = args.logprobs.at(i, args.width), advantage = args.advantages.at(i, args.width);
  const T log_ratio = logprob - args.old_logprobs.at(i, args.width);
  const PolicyTerm<T> policy = bounds.dual_clip != 0 ? policy_term<Math, true>(log_ratio, advantage, bounds)
                                                     : policy_term<Math, false>(log_ratio, advantage, bounds);
  T slope = policy.slope;
  sums[0] += weight * policy.loss;
  sums[4] += weight * policy.approx_kl;
  sums[5] += weight * policy.clipped;
  sums[7] += weight * policy.ratio;
  ratio_max = larger(policy.ratio, ratio_max);
  if (args.values.data != nullptr) {
    const T value = args.values.at(i, args.width);
    const T old = args.old_values.data != nullptr ? args.old_values.at(i, args.width) : value;
    const ValueTerm<T> term = value_term(value, old, args.returns.at(i, args.width), bounds);
    sums[1] += weight * term.loss;
    sums[6] += weight * term.clipped;
    args.grad_values[i] = weight * scale * (bounds.vf_coef * term.slope);
  }
  if (args.entropy.data != nullptr) {
    sums[2] += weight * args.entropy.at(i, args.width);
    args.grad_entropy[i] = -bounds.entropy_coef * (weight * scale);
  }
  if (args.ref_logprobs.data != nullptr) {
    const KLTerm<T> term = kl_term_of(bounds.kl, logprob - args.ref_logprobs.at(i, args.width));
    sums[3] += weight * term.estimate;
    if (bounds.kl_coef != 0) slope += bounds.kl_coef * term.slope;  // without a weight it may be infinite
  }
  args.grad_logprobs[i] = weight * scale * slope;
}

template <class T>
__global__ void __launch_bounds__(THREADS) ppo_loss_kernel(Arguments<T> args) {
  const double denominator = denominator_of(args);
  if (blockIdx.x == 0 && threadIdx.x == 0) *args.scratch = denominator;
  const T scale = static_cast<T>(1 / denominator);
  T sums[ppo_loss_sums] = {}, ratio_max = 0;
  for (int k = 0; k < ITEMS; k++) {
    const int64_t i = int64_t(blockIdx.x) * CHUNK + k * THREADS + threadIdx.x;
    if (i >= args.tokens) break;
    if (args.mask.at(i, args.width) != 0) {
      const T weight = args.row_weights ? T(1) / static_cast<T>(args.row_counts()[i / args.width]) : T(1);
      take_token(args, i, weight, scale, sums, ratio_max);
    } else {
      args.grad_logprobs[i] = T(0);
      if (args.values.data != nullptr) args.grad_values[i] = T(0);
      if (args.entropy.data != nullptr) args.grad_entropy[i] = T(0);
    }
  }
  double wide[ppo_loss_stats];
  for (int s = 0; s < ppo_loss_sums; s++) wide[s] = static_cast<double>(sums[s]);
  wide[ppo_loss_sums] = static_cast<double>(ratio_max);
  block_merge(wide, args.partials() + int64_t(blockIdx.x) * ppo_loss_stats);
}

// One block adds up what the others left behind.
template <class T>
__global__ void __launch_bounds__(THREADS)
    ppo_loss_finish_kernel(Arguments<T> args, int64_t blocks, T* loss, T* stats) {
  __shared__ double means[ppo_loss_stats];
  double wide[ppo_loss_stats] = {};
  for (int64_t b = threadIdx.x; b < blocks; b += THREADS) {
    const double* partial = args.partials() + b * ppo_loss_stats;
    for (int s = 0; s < ppo_loss_sums; s++) wide[s] += partial[s];
    wide[ppo_loss_sums] = larger(partial[ppo_loss_sums], wide[ppo_loss_sums]);
  }
  block_merge(wide, means);
  __syncthreads();
  if (threadIdx.x != 0) return;
  const double denominator = blocks > 0 ? *args.scratch : 1;
  for (int s = 0; s < ppo_loss_sums; s++) means[s] = ppo_loss_mean(means[s], denominator);
  *loss = static_cast<T>(ppo_loss_of(means, args.bounds));
  for (int s = 0; s < ppo_loss_stats; s++) stats[s] = static_cast<T>(means[s]);
}

template <class T>
void run(const PPOLossTensors& t, const PPOLossNumbers& numbers, const View& scratch, cudaStream_t stream) {
  Arguments<T> args = arguments<T>(t, numbers, scratch);
  const int64_t blocks = (args.tokens + CHUNK - 1) / CHUNK;
  require_ppo_loss(scratch.dtype == Dtype::float64 && scratch.dims == 1 && scratch.stride[0] == 1 &&
                       scratch.shape[0] >= args.scratch_size(blocks),
                   "scratch is too small");
  if (blocks > 0 && (args.count_blocks > 0 || args.row_weights)) {
    const int64_t units = args.by_sequence ? args.rows : blocks;
    args.count_blocks = static_cast<int>(units < COUNT_BLOCKS ? units : COUNT_BLOCKS);
    launch(ppo_loss_count_kernel<T>, "ppo_loss_count_kernel", args.count_blocks, THREADS, stream, args);
  }
  if (blocks > 0) launch(ppo_loss_kernel<T>, "ppo_loss_kernel", blocks, THREADS, stream, args);
  launch(ppo_loss_finish_kernel<T>, "ppo_loss_finish_kernel", 1, THREADS, stream, args, blocks, t.loss.as<T>(),
         t.stats.as<T>());
}

// The three gradients end to end.
template <class T>
struct Gradients {
  Rows<const T> from[3];
  T* to[3];
  int64_t width[3], tokens[3];
};

template <class T>
__global__ void __launch_bounds__(THREADS) ppo_loss_backward_kernel(Gradients<T> grads, const T* factor) {
  int64_t i = int64_t(blockIdx.x) * THREADS + threadIdx.x;
  const T scale = *factor;
  for (int g = 0; g < 3; g++) {
    if (i >= 0 && i < grads.tokens[g]) grads.to[g][i] = scale * grads.from[g].at(i, grads.width[g]);
    i -= grads.tokens[g];
  }
}

template <class T>
void run_backward(const View& grad_loss, const View* const (&grads)[3], const View* const (&outputs)[3],
                  cudaStream_t stream) {
  Gradients<T> all;
  int64_t tokens = 0;
  for (int g = 0; g < 3; g++) {
    const View& view = *grads[g];
    all.from[g] = rows_of<const T>(view);
    all.to[g] = outputs[g]->as<T>();
    all.width[g] = view.shape[view.dims - 1];
    all.tokens[g] = view.dims == 2 ? view.shape[0] * all.width[g] : all.width[g];
    tokens += all.tokens[g];
  }
  if (tokens == 0) return;
  launch(ppo_loss_backward_kernel<T>, "ppo_loss_backward_kernel", (tokens + THREADS - 1) / THREADS, THREADS, stream,
         all, grad_loss.as<const T>());
}

}  // namespace

void ppo_loss(View logprobs, View old_logprobs, View advantages, View mask, View values, View old_values, View returns,
              View entropy, View ref_logprobs, View denominator, double cliprange_low, double cliprange_high,
              double cliprange_value, double vf_coef, double entropy_coef, double kl_coef, const std::string& kl,
              std::optional<double> dual_clip, double log_ratio_clamp, const std::string& aggregate, View loss,
              View stats, View grad_logprobs, View grad_values, View grad_entropy, View scratch, int device,
              uintptr_t stream) {
  const PPOLossTensors tensors = {logprobs,   old_logprobs, advantages,    mask,         values,
                                  old_values, returns,      entropy,       ref_logprobs, denominator,
                                  loss,       stats,        grad_logprobs, grad_values,  grad_entropy};
  const PPOLossNumbers numbers = ppo_loss_numbers(cliprange_low, cliprange_high, cliprange_value, vf_coef, entropy_coef,
                                                  kl_coef, kl, dual_clip, log_ratio_clamp, aggregate);
  check_ppo_loss(tensors, numbers);
  const DeviceGuard guard(device);
  const auto run_typed = logprobs.dtype == Dtype::float64 ? run<double> : run<float>;
  run_typed(tensors, numbers, scratch, reinterpret_cast<cudaStream_t>(stream));
}

void ppo_loss_backward(View grad_loss, View grad_logprobs, View grad_values, View grad_entropy, View logprobs,
                       View values, View entropy, int device, uintptr_t stream) {
  const View* const grads[] = {&grad_logprobs, &grad_values, &grad_entropy};
  const View* const outputs[] = {&logprobs, &values, &entropy};
  check_ppo_loss_backward(grad_loss, grads, outputs);
  const DeviceGuard guard(device);
  const auto run_typed = grad_loss.dtype == Dtype::float64 ? run_backward<double> : run_backward<float>;
  run_typed(grad_loss, grads, outputs, reinterpret_cast<cudaStream_t>(stream));
}

}  // namespace rlhf_fast::cuda
