// KL-shaped rewards, GAE and whitening on the CPU. SPDX-License-Identifier: Apache-2.0
//
// A thread takes a row at a time: rewards, the scan of gae.cpp and the row's moments, while the row is in the cache.
// The moments of the rows are then put together in the order of the rows, and a second pass whitens. Neither threads
// nor strides change a bit.
#include "../advantages.h"

#include <vector>

#include "gae_scan.h"
#include "ppo_loss_exp.h"

namespace rlhf_fast::cpu {
namespace {

constexpr int64_t piece = 16 * block;  // tokens that are gathered at a time where they do not lie side by side
constexpr int64_t parallel_from = 16384;

template <class T>
Row<T> row_of(const View& view, int64_t b) {
  return {view.as<const T>() + b * view.stride[0], view.stride[1]};
}

// Tokens [from, from + count) of a row: where they are, or in `room`.
template <class T>
INLINE const T* tokens(const Row<T>& row, int64_t from, int64_t count, T* room) {
  if (row.stride == 1) return row.data + from;
  for (int64_t i = 0; i < count; i++) room[i] = row[from + i];
  return room;
}

template <class T>
struct Shape {
  Row<T> logprobs, ref_logprobs, scores;  // scores: dense ones, or none
  Row<uint8_t> mask;
  T price, clip;
  T* rewards;
  int64_t length;
};

template <KL kl, class T>
INLINE void shape_row(const Shape<T>& row) {
  alignas(64) T rooms[3][piece];
  alignas(64) uint8_t mask_room[piece];
  const T price = row.price, clip = row.clip;
  for (int64_t from = 0; from < row.length; from += piece) {
    const int64_t count = std::min(piece, row.length - from);
    const T* const logprobs = tokens(row.logprobs, from, count, rooms[0]);
    const T* const ref_logprobs = tokens(row.ref_logprobs, from, count, rooms[1]);
    const uint8_t* const mask = tokens(row.mask, from, count, mask_room);
    T* __restrict const to = row.rewards + from;
    for (int64_t i = 0; i < count; i++)
      to[i] = choose(mask[i] != 0, kl_reward<Math, kl>(logprobs[i] - ref_logprobs[i], price), T(0));
    if (row.scores.data == nullptr) continue;
    const T* const scores = tokens(row.scores, from, count, rooms[2]);
    for (int64_t i = 0; i < count; i++) to[i] += choose(mask[i] != 0, clamped(scores[i], -clip, clip), T(0));
  }
}

// Four numbers as double.
template <class T>
INLINE Lanes<double>::vector widened(const T* from) {
  typedef T four __attribute__((vector_size(4 * sizeof(T))));
  four x;
  std::memcpy(&x, from, sizeof(x));
  return __builtin_convertvector(x, Lanes<double>::vector);
}

// The moments of what is valid in [0, end), around the last of them: a member of the data is never so far from their
// mean that the squares would cancel.
template <class T>
INLINE Moments moments_of(const T* advantages, const Row<uint8_t>& mask, int64_t end) {
  using V = Lanes<double>::vector;
  if (end == 0) return {0, 0, 0};
  constexpr int vectors = block / 4;
  V sums[vectors] = {}, squares[vectors] = {}, away[vectors];
  const double center = static_cast<double>(advantages[end - 1]);
  int64_t count = 0;
  for (int64_t from = 0; from < end; from += block) {
    if (mask.stride == 1 && from + block <= end && all_valid(mask.data + from)) {
      for (int i = 0; i < vectors; i++) away[i] = widened(advantages + from + 4 * i) - center;
      count += block;
    } else {
      double room[block];
      for (int i = 0; i < block; i++) {
        const bool valid = from + i < end && mask[from + i];
        room[i] = valid ? static_cast<double>(advantages[from + i]) - center : 0.0;
        count += valid;
      }
      std::memcpy(away, room, sizeof(room));
    }
    for (int i = 0; i < vectors; i++) sums[i] += away[i], squares[i] += away[i] * away[i];
  }
  double total[2] = {};
  for (int i = 0; i < vectors; i++) {
    for (int l = 0; l < 4; l++) total[0] += sums[i][l], total[1] += squares[i][l];
  }
  const double n = static_cast<double>(count), shift = total[0] / n;
  return {n, center + shift, total[1] - total[0] * shift};
}

template <class T>
struct Batch {
  const AdvantagesTensors& tensors;
  const AdvantagesNumbers& numbers;
  T price;
};

template <class T>
INLINE void take_row(const Batch<T>& batch, int64_t b, Moments& moments) {
  const AdvantagesTensors& t = batch.tensors;
  const AdvantagesNumbers& numbers = batch.numbers;
  const int64_t width = t.width();
  const Row<uint8_t> mask = row_of<uint8_t>(t.mask, b);
  T *const rewards = t.rewards.as<T>() + b * width, *const advantages = t.advantages.as<T>() + b * width;
  const T clip = static_cast<T>(numbers.clip_scores);
  const Row<T> scores = t.dense() ? row_of<T>(t.scores, b) : Row<T>{nullptr, 1};
  const Shape<T> shape = {
      row_of<T>(t.logprobs, b), row_of<T>(t.ref_logprobs, b), scores, mask, batch.price, clip, rewards, width};
  if (numbers.kl == KL::k1) shape_row<KL::k1>(shape);
  if (numbers.kl == KL::k2) shape_row<KL::k2>(shape);
  if (numbers.kl == KL::k3) shape_row<KL::k3>(shape);
  if (numbers.kl == KL::abs) shape_row<KL::abs>(shape);
  int64_t end = width;
  while (end > 0 && !mask[end - 1]) end--;
  if (!t.dense() && end > 0) {
    const int64_t landing = numbers.next ? std::min(end, width - 1) : end - 1;
    rewards[landing] += clamped(t.scores.as<const T>()[b * t.scores.stride[0]], -clip, clip);
  }
  scan_sequence<T>({{rewards, 1},
                    row_of<T>(t.values, b),
                    mask,
                    advantages,
                    t.returns.as<T>() + b * width,
                    width,
                    t.last_values ? t.last_values.as<const T>()[b * t.last_values.stride[0]] : T(0),
                    static_cast<T>(numbers.gamma),
                    static_cast<T>(numbers.gamma * numbers.lam),
                    numbers.zero_holes});
  if (numbers.whiten) moments = moments_of(advantages, mask, end);
}
CLONES void take_row_of(const Batch<float>& batch, int64_t b, Moments& moments) { take_row(batch, b, moments); }
CLONES void take_row_of(const Batch<double>& batch, int64_t b, Moments& moments) { take_row(batch, b, moments); }

template <class T>
INLINE void whiten_row(T* advantages, const Row<uint8_t>& mask, int64_t width, const Whitening<T>& whitening) {
  const Whitening<T> whitened = whitening;  // a local that no store can alias
  uint8_t room[piece];
  for (int64_t from = 0; from < width; from += piece) {
    const int64_t count = std::min(piece, width - from);
    const uint8_t* const valid = tokens(mask, from, count, room);
    T* __restrict const x = advantages + from;
    for (int64_t i = 0; i < count; i++) x[i] = choose(valid[i] != 0, whitened(x[i]), T(0));
  }
}
CLONES void whiten_row_of(float* advantages, const Row<uint8_t>& mask, int64_t width,
                          const Whitening<float>& whitening) {
  whiten_row(advantages, mask, width, whitening);
}
CLONES void whiten_row_of(double* advantages, const Row<uint8_t>& mask, int64_t width,
                          const Whitening<double>& whitening) {
  whiten_row(advantages, mask, width, whitening);
}

Moments together(const std::vector<Moments>& rows) {
  Moments all = {0, 0, 0};
  for (const Moments& row : rows) {
    all.count += row.count;
    all.mean += row.count * row.mean;
  }
  all.mean /= std::max(all.count, 1.0);
  for (const Moments& row : rows) {
    const double away = row.mean - all.mean;
    if (row.count > 0) all.squares += row.squares + row.count * away * away;
  }
  return all;
}

template <class T>
void run(const AdvantagesTensors& t, const AdvantagesNumbers& numbers) {
  const int64_t rows = t.rows(), width = t.width();
  if (rows * width == 0) return;
  const Batch<T> batch = {t, numbers, t.price ? *t.price.as<const T>() : static_cast<T>(numbers.kl_coef)};
  std::vector<Moments> moments(rows);
#pragma omp parallel for schedule(guided) if (rows * width >= parallel_from)
  for (int64_t b = 0; b < rows; b++) take_row_of(batch, b, moments[b]);
  if (!numbers.whiten) return;
  const Whitening<T> whitening = whitening_of<T>(together(moments), numbers.shift_mean, numbers.unbiased);
#pragma omp parallel for schedule(guided) if (rows * width >= parallel_from)
  for (int64_t b = 0; b < rows; b++)
    whiten_row_of(t.advantages.as<T>() + b * width, row_of<uint8_t>(t.mask, b), width, whitening);
}

}  // namespace

void advantages(View scores, View logprobs, View ref_logprobs, View values, View mask, View last_values, View price,
                double kl_coef, const std::string& kl, const std::string& at, std::optional<double> clip_scores,
                double gamma, double lam, const std::string& holes, bool whiten, bool shift_mean, bool unbiased,
                View advantages, View returns, View rewards) {
  const AdvantagesTensors tensors = {scores,      logprobs, ref_logprobs, values,  mask,
                                     last_values, price,    advantages,   returns, rewards};
  const AdvantagesNumbers numbers =
      advantages_numbers(kl_coef, kl, at, clip_scores, gamma, lam, holes, whiten, shift_mean, unbiased);
  check_advantages(tensors);
  logprobs.dtype == Dtype::float64 ? run<double>(tensors, numbers) : run<float>(tensors, numbers);
}

}  // namespace rlhf_fast::cpu
