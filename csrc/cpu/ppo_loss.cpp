// The clipped loss of policy and value, its statistics and its gradient on the CPU. SPDX-License-Identifier: Apache-2.0
//
// One pass over the tokens, in blocks that are counted over the whole batch, not over its rows or threads: sums are
// built in the same order for any strides and any number of threads. What does not lie in one piece is gathered into
// a block first, so that there is one loop for all layouts.
#include <vector>

#include "ppo_loss_block.h"

#define CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))

namespace rlhf_fast::cpu {
namespace {

constexpr int64_t chunk = 16 * block;  // tokens per task
constexpr int64_t parallel_from = 16384;

template <class T>
struct Batch {
  Input<T> input[inputs];
  Input<uint8_t> mask;
  T* grads[3];  // of logprobs, values and entropy
  PPOLossBounds<T> bounds;
  int64_t tokens;
  T scale;  // 1 / denominator
};

template <class T>
INLINE Partial take_chunk(const Batch<T>& batch, int64_t start) {
  alignas(64) T rooms[inputs][block] = {}, grad_room[block];
  alignas(64) uint8_t mask_room[block];
  Block<T> b{{}, batch.bounds, {}, {}, {}, {}, {}};
  Sums<T> sums;
  const auto has = [&](int input) { return batch.input[input].data != nullptr; };
  const int old_values = has(OLD_VALUES) ? OLD_VALUES : VALUES;  // its own value is never clipped
  const T* const slopes[] = {b.d_logprobs, b.d_values, b.d_entropy};
  std::fill(b.d_entropy, b.d_entropy + block, -batch.bounds.entropy_coef);
  const int64_t end = std::min(start + chunk, batch.tokens);
  for (int64_t at = start; at < end; at += block) {
    const int64_t count = std::min(block, end - at);
    for (int i = 0; i < inputs; i++) b.in[i] = batch.input[i].tokens(at, count, rooms[i]);
    b.weigh(batch.mask.tokens(at, count, mask_room));
    batch.bounds.dual_clip != 0 ? b.template policy<true>() : b.template policy<false>();
    if (has(VALUES)) b.value(old_values);
    if (has(REF_LOGPROBS)) b.estimate();
    if (has(ENTROPY)) b.entropy();
    const bool present[] = {true, has(VALUES), has(ENTROPY), has(REF_LOGPROBS), true, true, has(VALUES), true};
    for (int s = 0; s < ppo_loss_sums; s++) {
      if (present[s]) sums.add(s, b.weight, b.terms[s]);
    }
    sums.add_largest(b.terms[RATIO]);
    for (int g = 0; g < 3; g++) {
      if (batch.grads[g] == nullptr) continue;
      T* to = count == block ? batch.grads[g] + at : grad_room;
      b.gradient(slopes[g], batch.scale, to);
      if (count < block) std::memcpy(batch.grads[g] + at, to, count * sizeof(T));
    }
  }
  return sums.merged();
}
CLONES void take_chunk_float(const Batch<float>& batch, int64_t start, Partial& out) { out = take_chunk(batch, start); }
CLONES void take_chunk_double(const Batch<double>& batch, int64_t start, Partial& out) {
  out = take_chunk(batch, start);
}

// Valid tokens among `count` that are `stride` apart.
CLONES int64_t count_valid(const uint8_t* mask, int64_t count, int64_t stride) {
  int64_t valid = 0, i = 0;
  constexpr int64_t words = 8, bytes = 8 * words;
  while (stride == 1 && i + bytes <= count) {
    uint64_t lane[words] = {};  // sums of single bytes, of which each holds at most 255
    for (int64_t left = std::min<int64_t>((count - i) / bytes, 255); left > 0; left--, i += bytes) {
      uint64_t from[words];
      std::memcpy(from, mask + i, bytes);
      for (int w = 0; w < words; w++) lane[w] += from[w];
    }
    for (const uint64_t x : lane) {
      const uint64_t pairs = (x & 0x00ff00ff00ff00ffu) + ((x >> 8) & 0x00ff00ff00ff00ffu);
      valid += (pairs * 0x0001000100010001u) >> 48;
    }
  }
  for (; i < count; i++) valid += mask[i * stride];
  return valid;
}

// What the denominator counts: the valid tokens, or the sequences that have any; and each sequence's weight.
template <class T>
int64_t count_mask(const View& mask, const PPOLossNumbers& numbers, std::vector<T>& weights) {
  const Input<uint8_t> input(mask);
  const int64_t rows = mask.dims == 2 ? mask.shape[0] : 1, width = mask.shape[mask.dims - 1];
  const bool whole = !numbers.by_sequence() && (rows == 1 || (input.stride_t == 1 && input.stride_b == width));
  const int64_t length = whole ? chunk : width, tasks = whole ? (rows * width + chunk - 1) / chunk : rows;
  int64_t valid = 0;
#pragma omp parallel for schedule(guided) reduction(+ : valid) if (rows * width >= 4 * parallel_from)
  for (int64_t i = 0; i < tasks; i++) {
    const int64_t here = whole ? std::min(chunk, rows * width - i * chunk) : length;
    const int64_t step = whole ? chunk * input.stride_t : input.stride_b;
    const int64_t found = count_valid(input.data + i * step, here, input.stride_t);
    valid += numbers.by_sequence() ? found > 0 : found;
    if (!weights.empty()) weights[i] = found > 0 ? T(1) / T(found) : T(0);
  }
  return valid;
}

template <class T>
void run(const PPOLossTensors& t, const PPOLossNumbers& numbers, void (*take)(const Batch<T>&, int64_t, Partial&)) {
  const int last = t.logprobs.dims - 1;
  const int64_t rows = last == 1 ? t.logprobs.shape[0] : 1, width = t.logprobs.shape[last], tokens = rows * width;
  std::vector<T> weights(numbers.aggregate == Aggregate::seq_mean_token_mean ? rows : 0);
  double denominator = t.denominator ? static_cast<double>(*t.denominator.as<const T>()) : 1.0;
  const bool counts = !t.denominator && numbers.aggregate != Aggregate::token_sum;
  if (tokens > 0 && (counts || !weights.empty())) {
    const int64_t valid = count_mask(t.mask, numbers, weights);
    if (counts) denominator = static_cast<double>(std::max<int64_t>(valid, 1));
  }
  const T one = 1;
  View weight = {&const_cast<T&>(one), t.logprobs.dtype, 2, {rows, width}, {0, 0}};
  if (!weights.empty()) weight.data = weights.data(), weight.stride[0] = 1;
  const Batch<T> batch = {
      {Input<T>(t.logprobs), Input<T>(t.old_logprobs), Input<T>(t.advantages), Input<T>(t.values),
       Input<T>(t.old_values), Input<T>(t.returns), Input<T>(t.entropy), Input<T>(t.ref_logprobs), Input<T>(weight)},
      Input<uint8_t>(t.mask),
      {t.grad_logprobs.as<T>(), t.grad_values.as<T>(), t.grad_entropy.as<T>()},
      ppo_loss_bounds<T>(numbers),
      tokens,
      static_cast<T>(1 / denominator)};
  const int64_t chunks = (tokens + chunk - 1) / chunk;
  std::vector<Partial> partials(chunks);
#pragma omp parallel for schedule(guided) if (tokens >= parallel_from)
  for (int64_t i = 0; i < chunks; i++) take(batch, i * chunk, partials[i]);

  Partial all;
  for (const Partial& partial : partials) {
    for (int s = 0; s < ppo_loss_sums; s++) all.sums[s] += partial.sums[s];
    all.ratio_max = larger(all.ratio_max, partial.ratio_max);
  }
  for (double& sum : all.sums) sum = ppo_loss_mean(sum, denominator);
  *t.loss.as<T>() = static_cast<T>(ppo_loss_of(all.sums, batch.bounds));
  for (int s = 0; s < ppo_loss_sums; s++) t.stats.as<T>()[s] = static_cast<T>(all.sums[s]);
  t.stats.as<T>()[ppo_loss_sums] = static_cast<T>(all.ratio_max);
}

constexpr int64_t scale_chunk = 16384;  // tokens per task of the backward

template <class T>
INLINE void scale(const T* from, int64_t stride, T factor, T* to, int64_t count) {
  if (stride == 1) {
    for (int64_t i = 0; i < count; i++) to[i] = factor * from[i];
  } else {
    for (int64_t i = 0; i < count; i++) to[i] = factor * from[i * stride];
  }
}
CLONES void scale_piece(const float* from, int64_t stride, float factor, float* to, int64_t count) {
  scale(from, stride, factor, to, count);
}
CLONES void scale_piece(const double* from, int64_t stride, double factor, double* to, int64_t count) {
  scale(from, stride, factor, to, count);
}

template <class T>
void scale_all(const View& grad, T factor, const View& output) {
  const int last = grad.dims - 1;
  int64_t width = grad.shape[last], rows = last == 1 ? grad.shape[0] : 1;
  const int64_t step = last == 1 ? grad.stride[0] : 0, stride = grad.stride[last];
  if (step == width * stride) width *= rows, rows = 1;
  const int64_t pieces = (width + scale_chunk - 1) / scale_chunk;
#pragma omp parallel for collapse(2) schedule(guided) if (rows * width >= scale_chunk)
  for (int64_t b = 0; b < rows; b++) {
    for (int64_t i = 0; i < pieces; i++) {
      const int64_t from = i * scale_chunk;
      scale_piece(grad.as<const T>() + b * step + from * stride, stride, factor, output.as<T>() + b * width + from,
                  std::min(scale_chunk, width - from));
    }
  }
}

}  // namespace

void ppo_loss(View logprobs, View old_logprobs, View advantages, View mask, View values, View old_values, View returns,
              View entropy, View ref_logprobs, View denominator, double cliprange_low, double cliprange_high,
              double cliprange_value, double vf_coef, double entropy_coef, double kl_coef, const std::string& kl,
              std::optional<double> dual_clip, double log_ratio_clamp, const std::string& aggregate, View loss,
              View stats, View grad_logprobs, View grad_values, View grad_entropy) {
  const PPOLossTensors tensors = {logprobs,   old_logprobs, advantages,    mask,         values,
                                  old_values, returns,      entropy,       ref_logprobs, denominator,
                                  loss,       stats,        grad_logprobs, grad_values,  grad_entropy};
  const PPOLossNumbers numbers = ppo_loss_numbers(cliprange_low, cliprange_high, cliprange_value, vf_coef, entropy_coef,
                                                  kl_coef, kl, dual_clip, log_ratio_clamp, aggregate);
  check_ppo_loss(tensors, numbers);
  if (logprobs.dtype == Dtype::float64)
    run<double>(tensors, numbers, take_chunk_double);
  else
    run<float>(tensors, numbers, take_chunk_float);
}

void ppo_loss_backward(View grad_loss, View grad_logprobs, View grad_values, View grad_entropy, View logprobs,
                       View values, View entropy) {
  const View* const grads[] = {&grad_logprobs, &grad_values, &grad_entropy};
  const View* const outputs[] = {&logprobs, &values, &entropy};
  check_ppo_loss_backward(grad_loss, grads, outputs);
  for (int i = 0; i < 3; i++) {
    if (!*outputs[i]) continue;
    if (grad_loss.dtype == Dtype::float64)
      scale_all(*grads[i], *grad_loss.as<const double>(), *outputs[i]);
    else
      scale_all(*grads[i], *grad_loss.as<const float>(), *outputs[i]);
  }
}

}  // namespace rlhf_fast::cpu
