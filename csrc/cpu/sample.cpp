// Sampling on the CPU, a row per thread. SPDX-License-Identifier: Apache-2.0
//
// One read of a row finds its largest score and those of its chunks of 256 tokens; a second one, from the cache, adds
// up exp in double. Filters then become a smallest score and only chunks that reach it are looked at once more. The
// draw inverts the sums of the chunks and then those of one chunk.
//
// Against the reference, which adds up all in double: the uniform is the same to the bit, and so are the kept set (save
// a top-p whose edge lies within 2^-40 of a token's cumulative mass) and the id, except where the uniform lies within
// 2^-20 of a boundary of the CDF if float32 logits are drawn from unfiltered, whose masses are added up in float by
// chunks, and within 2^-40 else.
#include <omp.h>

#include <vector>

#include "sample_filters.h"

namespace rlhf_fast::cpu {
namespace {

INLINE float widened_half(uint16_t half) {
  const uint32_t magnitude = (half & 0x7fffu) << 13, sign = (half & 0x8000u) << 16;
  float x;
  std::memcpy(&x, &magnitude, sizeof x);
  x *= 0x1p112f;  // the exponent's bias; exact for subnormals too
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof x);
  bits |= (magnitude >= 0x0f800000u ? 0x7f800000u : 0u) | sign;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

INLINE float widened_bfloat(uint16_t bfloat) {
  const uint32_t bits = static_cast<uint32_t>(bfloat) << 16;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

template <class T, class S, class Convert>
INLINE void convert(const S* from, int64_t stride, int64_t n, T* to, Convert as) {
  if (stride == 1)
    for (int64_t i = 0; i < n; i++) to[i] = as(from[i]);
  else
    for (int64_t i = 0; i < n; i++) to[i] = as(from[i * stride]);
}

// Tokens [start, start + n) of a row of any dtype, as T.
template <class T>
INLINE void read(const View& view, int64_t row, int64_t start, int64_t n, T* to) {
  const int64_t stride = view.stride[1], at = row * view.stride[0] + start * stride;
  const auto plain = [](auto x) { return static_cast<T>(x); };
  switch (view.dtype) {
    case Dtype::float32:
      return convert(view.as<const float>() + at, stride, n, to, plain);
    case Dtype::float64:
      return convert(view.as<const double>() + at, stride, n, to, plain);
    case Dtype::bfloat16:
      return convert(view.as<const uint16_t>() + at, stride, n, to, [](uint16_t x) { return T(widened_bfloat(x)); });
    case Dtype::float16:
      return convert(view.as<const uint16_t>() + at, stride, n, to, [](uint16_t x) { return T(widened_half(x)); });
    case Dtype::int32:
      return convert(view.as<const int32_t>() + at, stride, n, to, plain);
    case Dtype::int64:
      return convert(view.as<const int64_t>() + at, stride, n, to, plain);
    default:
      return convert(view.as<const int8_t>() + at, stride, n, to, plain);
  }
}

struct Knobs {
  double temperature, top_p, min_p, repetition, presence, frequency;
  int64_t top_k;
  bool in_range;

  Knobs(const Sampling& s, int64_t row) {
    const auto knob = [&](const View& view, double off) {
      return view ? view.as<const double>()[row * view.stride[0]] : off;
    };
    temperature = knob(s.temperature, 1), top_p = knob(s.top_p, 1), min_p = knob(s.min_p, 0);
    repetition = knob(s.repetition, 1), presence = knob(s.presence, 0), frequency = knob(s.frequency, 0);
    top_k = s.top_k ? s.top_k.as<const int64_t>()[row * s.top_k.stride[0]] : 0;
    in_range = temperature >= 0 && temperature < infinite && top_p == top_p && min_p >= 0 && min_p <= 1 &&
               repetition > 0 && repetition < infinite && std::abs(presence) < infinite &&
               std::abs(frequency) < infinite;
  }
};

// A product rounded on its own: the sum that follows must not swallow it, or bits differ from the reference's.
INLINE float product(float a, float b) { return static_cast<float>(static_cast<double>(a) * static_cast<double>(b)); }
INLINE double product(double a, double b) { return a * b; }

// The scores after bias and penalties; -inf where not allowed. False where one was NaN or +inf before that.
template <class T>
INLINE bool process(const Sampling& s, int64_t row, const Knobs& knobs, const T* raw, int64_t size, T* scores) {
  const T repetition = static_cast<T>(knobs.repetition), presence = static_cast<T>(knobs.presence);
  const T frequency = static_cast<T>(knobs.frequency);
  T x[chunk], other[chunk];
  bool sound = true;
  for (int64_t start = 0; start < size; start += chunk) {
    const int n = static_cast<int>(std::min<int64_t>(chunk, size - start));
    std::copy_n(raw + start, n, x);
    if (s.bias) {
      read(s.bias, row, start, n, other);
      for (int i = 0; i < n; i++) x[i] += other[i];
    }
    if (s.counts) {
      read(s.counts, row, start, n, other);
      for (int i = 0; i < n; i++) {
        const T repeated = x[i] < 0 ? product(x[i], repetition) : x[i] / repetition;
        x[i] = (other[i] > 0 ? repeated : x[i]) - product(frequency, other[i]);
        x[i] -= other[i] > 0 ? presence : T(0);
      }
    }
    for (int i = 0; i < n; i++) sound &= x[i] < T(infinite);
    if (s.allowed) {
      read(s.allowed, row, start, n, other);
      for (int i = 0; i < n; i++) x[i] = other[i] != 0 ? x[i] : T(-infinite);
    }
    std::copy_n(x, n, scores + start);
  }
  return sound;
}

struct Drawn {
  int64_t id = -1, kept = 0;
  double logprob = NAN;
};

// The token among those that the filters leave.
template <class T>
INLINE Drawn draw(const Row<T>& row, const Extremes& found, const Scale& scale, double total, const Knobs& knobs,
                  double u, Scratch<T>& s) {
  const bool top_k = knobs.top_k > 0 && knobs.top_k < row.size, top_p = knobs.top_p < 1;
  const T k_least = top_k ? top_k_least(row, s, knobs.top_k, knobs.temperature) : T(-infinite);
  const T min_least = min_p_least<T>(knobs.min_p, scale);
  if (!top_p && k_least == T(-infinite) && min_least == T(-infinite)) {
    double target = u * total;
    const int64_t c = invert(s.masses, row.chunks(), target);
    target *= weigh(row[c], scale, s.weights) / s.masses[c];  // the chunk's mass was added up less precisely
    const int64_t id = c * chunk + invert(s.weights, chunk, target);
    return {id, found.finite, scale(row.data[id]) - std::log(total)};
  }
  T least = k_least;
  Candidates<T> left;
  if (top_k || !top_p) {
    least = top_k ? k_least : min_least;
    left = candidates(row, s, least, scale);
    if (top_p) keep_nucleus(left, s, top_p_reach<T>(knobs.top_p, left.add_up()));
  } else {
    const double reach = top_p_reach<T>(knobs.top_p, total);
    const T bound = std::max(min_least, top_p_bound<T>(knobs.top_p, total, row.size, scale));
    least = std::max(bound, top_p_guess(row, s, knobs.top_p, total, scale));
    left = candidates(row, s, least, scale);
    if (least > bound && !(left.add_up() > reach)) left = candidates(row, s, least = bound, scale);
    keep_nucleus(left, s, reach);
  }
  if (min_least > least) {
    int64_t n = 0;
    for (int64_t i = 0; i < left.count; i++) left.set(n, i), n += left.scores[n] >= min_least;
    left.count = n;
  }
  const double kept = left.add_up();
  const int64_t at = left.draw(u * kept);
  return {left.ids[at], left.count, left.z[at] - std::log(kept)};
}

template <class T>
INLINE void finish(const Sampling& s, int64_t row, int status, const Drawn& drawn, double policy, double entropy) {
  const T logprob = static_cast<T>(drawn.logprob), of_policy = static_cast<T>(policy);
  s.ids.as<int64_t>()[row] = drawn.id;
  s.kept.as<int64_t>()[row] = drawn.kept;
  s.logprobs.as<T>()[row] = logprob;
  s.policy_logprobs.as<T>()[row] = of_policy;
  s.kept_logmass.as<T>()[row] = of_policy - logprob;
  s.entropy.as<T>()[row] = static_cast<T>(entropy);
  s.status.as<int8_t>()[row] = static_cast<int8_t>(status);
}

template <class T>
INLINE int64_t first_of(const Row<T>& row, T top) {
  return std::find(row.data, row.data + row.size, top) - row.data;
}

template <class T>
INLINE void sample_row(const Sampling& s, int64_t at, Scratch<T>& scratch) {
  constexpr Dtype own = sizeof(T) == 4 ? Dtype::float32 : Dtype::float64;
  const int64_t size = s.logits.shape[1];
  const Knobs knobs(s, at);
  const bool processed = s.bias || s.counts || s.allowed;
  Row<T> raw, scores;
  const T* data = s.logits.as<const T>() + at * s.logits.stride[0];
  if (s.logits.dtype != own || (s.logits.stride[1] != 1 && size > 1)) {
    read<T>(s.logits, at, 0, size, scratch.raw);
    data = scratch.raw;
  }
  raw.set(data, size);
  const Extremes of_raw = extremes<T>(raw, scratch.maxima);
  Extremes found = of_raw;
  bool sound = !found.nan && found.top < infinite;
  if (processed) {
    sound &= process<T>(s, at, knobs, data, size, scratch.scores);
    scores.set(scratch.scores, size);
    found = extremes<T>(scores, scratch.maxima);
  }
  const Row<T>& row = processed ? scores : raw;
  if (!sound) return finish<T>(s, at, 1, {}, NAN, NAN);
  if (found.top == -infinite || !knobs.in_range) return finish<T>(s, at, 2, {}, NAN, NAN);

  const T divisor = static_cast<T>(knobs.temperature);
  const bool greedy = divisor == 0 || std::isinf(static_cast<T>(found.top) / divisor) || knobs.top_p <= 0;
  const double temperature = knobs.temperature == 0 ? 1 : knobs.temperature;
  const Scale policy = {of_raw.top, temperature}, scale = {found.top, temperature};
  const bool nucleus = knobs.top_p < 1 && !(knobs.top_k > 0 && knobs.top_k < size);  // of the whole row
  const Mass mass = softmax(raw, policy, nucleus && !processed, scratch.masses);
  Drawn drawn;
  if (greedy) {
    drawn = {first_of(row, static_cast<T>(found.top)), 1, 0};
  } else {
    const double total = processed ? softmax(row, scale, nucleus, scratch.masses).total : mass.total;
    const double u = uniform(s.seeds.as<const int64_t>()[at * s.seeds.stride[0]],
                             s.positions.as<const int64_t>()[at * s.positions.stride[0]]);
    drawn = draw(row, found, scale, total, knobs, u, scratch);
  }
  const double log_total = std::log(mass.total);
  finish<T>(s, at, 0, drawn, policy(raw.data[drawn.id]) - log_total, log_total - mass.spread / mass.total);
}
CLONES void sample_row_float(const Sampling& s, int64_t row, Scratch<float>& scratch) { sample_row(s, row, scratch); }
CLONES void sample_row_double(const Sampling& s, int64_t row, Scratch<double>& scratch) { sample_row(s, row, scratch); }

template <class T>
void run(const Sampling& s, void (*sample_one)(const Sampling&, int64_t, Scratch<T>&)) {
  const int64_t rows = s.logits.shape[0], size = s.logits.shape[1];
  const int threads = static_cast<int>(std::min<int64_t>(rows * size < 32768 ? 1 : omp_get_max_threads(), rows));
  std::vector<Scratch<T>> scratch;
  for (int i = 0; i < threads; i++) scratch.emplace_back(size);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t row = 0; row < rows; row++) sample_one(s, row, scratch[omp_get_thread_num()]);
}

}  // namespace

void sample(View logits, View seeds, View positions, View temperature, View top_k, View top_p, View min_p,
            View repetition_penalty, View presence_penalty, View frequency_penalty, View token_counts, View logit_bias,
            View allowed, View ids, View logprobs, View policy_logprobs, View kept_logmass, View entropy, View kept,
            View status) {
  const Sampling s = {logits,
                      seeds,
                      positions,
                      temperature,
                      top_k,
                      top_p,
                      min_p,
                      repetition_penalty,
                      presence_penalty,
                      frequency_penalty,
                      token_counts,
                      logit_bias,
                      allowed,
                      ids,
                      logprobs,
                      policy_logprobs,
                      kept_logmass,
                      entropy,
                      kept,
                      status};
  check_sample(s);
  if (logits.shape[0] == 0) return;
  logits.dtype == Dtype::float64 ? run<double>(s, sample_row_double) : run<float>(s, sample_row_float);
}

}  // namespace rlhf_fast::cpu
