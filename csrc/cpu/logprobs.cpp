// Chosen-token logprob, entropy and logsumexp of every row of logits, and their gradient, on the CPU.
// SPDX-License-Identifier: Apache-2.0
//
// Forward: one read; a tile that rises far above those before it is summed again while it is in the L1 cache. Backward:
// one read and one write.
#include "../logprobs.h"

#include <omp.h>

#include "choices.h"
#include "pages.h"
#include "tiles.h"

namespace rlhf_fast::cpu {
namespace {

// ---- float32, bfloat16, float16: sums of a tile in float32, of the row in float64.

struct RowResult {
  double logprob, entropy, lse;
};

struct Forward {
  template <int L, class T>
  static INLINE RowResult run(const Row<T>& given, int64_t id, const Scaling& given_scaling) {
    const Row<T> row = given;  // locals that no store can alias
    const Scaling scaling = given_scaling;
    const Softmax softmax = scaling.kind() == Scale::none          ? row_softmax<L, Scale::none>(row, scaling)
                            : scaling.kind() == Scale::temperature ? row_softmax<L, Scale::temperature>(row, scaling)
                                                                   : row_softmax<L, Scale::softcap>(row, scaling);
    const double lse = softmax.lse();
    return {load_one<L>(row, id, scaling) - lse, softmax.entropy(), lse};
  }
};

template <class T>
RowResult forward(const Row<T>& row, int64_t id, const Scaling& scaling) {
  return on_widest<Forward>(row, id, scaling);
}

template <class T>
struct Upstream {  // of one row
  T logprob, entropy, lse;
  T row_entropy, row_lse;
};

struct Backward {
  // Of as many logits at once; `chosen` is what a chosen one adds.
  template <int L, bool CAPPED, class V>
  static INLINE V gradient(V x, V chosen, V low, const Upstream<float>& up, const Scaling& scaling) {
    V slope = Lanes<L>::fill(scaling.per_temperature);
    if constexpr (CAPPED) {
      const V t = Lanes<L>::tanh(x * scaling.per_softcap);
      x = scaling.softcap * t;
      slope *= 1.0f - t * t;
    }
    const V logp = Lanes<L>::rounded(x * scaling.per_temperature) - up.row_lse;
    const V from_p = Lanes<L>::exp(logp, low) * ((up.lse - up.logprob) - up.entropy * (logp + up.row_entropy));
    return ((logp == -infinity ? V{} : from_p) + chosen) * slope;  // a select: 0 * -inf
  }

  template <int L, bool CAPPED, class T>
  static INLINE void row_gradient(const Row<T>& row, int64_t id, const Upstream<float>& up, const Scaling& scaling,
                                  T* grad) {
    using N = Lanes<L>;
    const typename N::Floats zero = {}, low = N::bound();
    const int64_t whole = row.stride == 1 ? row.size / L * L : 0;
    for (int64_t i = 0; i < whole; i += L)
      N::store(grad + i, gradient<L, CAPPED>(N::load(row.data + i), zero, low, up, scaling));
    T some[L];
    for (int64_t i = whole; i < row.size; i += L) {
      const int64_t rest = std::min<int64_t>(L, row.size - i);
      const auto x = load_some<L>(row.data + i * row.stride, row.stride, rest);
      N::store(some, gradient<L, CAPPED>(x, zero, low, up, scaling));
      std::memcpy(static_cast<void*>(grad + i), some, rest * sizeof(T));
    }
    // The chosen one again, with its share added before anything is rounded.
    const auto x = load_some<L>(row.data + id * row.stride, 1, 1);
    N::store(some, gradient<L, CAPPED>(x, N::fill(up.logprob), low, up, scaling));
    grad[id] = some[0];
  }

  template <int L, class T>
  static INLINE void run(const Row<T>& given, int64_t id, const Upstream<float>& given_up, const Scaling& given_scaling,
                         T* grad) {
    const Row<T> row = given;
    const Upstream<float> up = {canonical(given_up.logprob), canonical(given_up.entropy), canonical(given_up.lse),
                                canonical(given_up.row_entropy), canonical(given_up.row_lse)};
    const Scaling scaling = given_scaling;
    scaling.softcap == 0 ? row_gradient<L, false>(row, id, up, scaling, grad)
                         : row_gradient<L, true>(row, id, up, scaling, grad);
  }
};

template <class T>
void backward(const Row<T>& row, int64_t id, const Upstream<float>& up, const Scaling& scaling, T* grad) {
  on_widest<Backward>(row, id, up, scaling, grad);
}

// ---- float64, plainly.

RowResult forward(const Row<double>& row, int64_t id, const DoubleScaling& scaling) {
  Softmax softmax;
  for (int64_t at = 0; at < row.size; at += tile) softmax.merge(double_softmax(row, at, scaling));
  const double lse = softmax.lse();
  return {scaling(row.data[id * row.stride]) - lse, softmax.entropy(), lse};
}

void backward(const Row<double>& row, int64_t id, const Upstream<double>& up, const DoubleScaling& scaling,
              double* grad) {
  for (int64_t i = 0; i < row.size; i++) {
    const double z = scaling(row.data[i * row.stride]), logp = z - up.row_lse;
    const double slope = up.lse - up.logprob - up.entropy * (logp + up.row_entropy);
    double dz = (logp == -infinity ? 0 : std::exp(logp) * slope) + (i == id ? up.logprob : 0);
    if (scaling.softcap != 0) {
      const double t = z * scaling.temperature / scaling.softcap;
      dz *= 1 - t * t;
    }
    grad[i] = dz / scaling.temperature;
  }
}

template <class T, class S>
void run(const View& logits, const View& ids, const View& mask, double temperature, double softcap,
         const View& logprobs, const View& entropy, const View& lse) {
  using Result = std::conditional_t<sizeof(T) == 8, double, float>;
  const Choices choices(ids, mask);
  const RowOffsets row_at(logits, logits.dims - 1);
  const int64_t rows = count_rows(logits), size = logits.shape[logits.dims - 1];
  const int64_t stride = logits.stride[logits.dims - 1];
  check_ids("logprobs", choices, rows, size);
  const S scaling{softcap, temperature};
  auto *chosen_out = logprobs.as<Result>(), *entropy_out = entropy.as<Result>(), *lse_out = lse.as<Result>();
#pragma omp parallel for schedule(guided) if (rows * size >= 16384)
  for (int64_t i = 0; i < rows; i++) {
    RowResult result{0, 0, 0};
    if (choices.counts(i))
      result = forward(Row<T>{logits.as<const T>() + row_at[i], stride, size}, choices.id(i), scaling);
    chosen_out[i] = static_cast<Result>(result.logprob);  // outputs are contiguous
    entropy_out[i] = static_cast<Result>(result.entropy);
    lse_out[i] = static_cast<Result>(result.lse);
  }
}

template <class T, class S>
void run_backward(const View& grad_logprobs, const View& grad_entropy, const View& grad_lse, const View& logits,
                  const View& ids, const View& entropy, const View& lse, const View& mask, double temperature,
                  double softcap, const View& grad) {
  using Result = std::conditional_t<sizeof(T) == 8, double, float>;
  const Choices choices(ids, mask);
  const RowOffsets row_at(logits, logits.dims - 1);
  const PerRow<const Result> g(grad_logprobs), h(grad_entropy), l(grad_lse), of_entropy(entropy), of_lse(lse);
  const int64_t rows = count_rows(logits), size = logits.shape[logits.dims - 1];
  const int64_t stride = logits.stride[logits.dims - 1];
  check_ids("logprobs", choices, rows, size);
  const S scaling{softcap, temperature};
  ask_for_huge_pages(grad.data, rows * size * sizeof(T));
#pragma omp parallel for schedule(guided) if (rows * size >= 16384)
  for (int64_t i = 0; i < rows; i++) {
    T* to = grad.as<T>() + i * size;
    if (choices.counts(i))
      backward(Row<T>{logits.as<const T>() + row_at[i], stride, size}, choices.id(i),
               Upstream<Result>{g[i], h[i], l[i], of_entropy[i], of_lse[i]}, scaling, to);
    else
      std::memset(static_cast<void*>(to), 0, size * sizeof(T));
  }
}

}  // namespace

void logprobs(View logits, View ids, View mask, double temperature, std::optional<double> softcap, View logprobs,
              View entropy, View lse) {
  check_logprobs(logits, ids, mask, temperature, softcap, logprobs, entropy, lse);
  const auto typed = logits.dtype == Dtype::float64    ? run<double, DoubleScaling>
                     : logits.dtype == Dtype::bfloat16 ? run<bfloat16, Scaling>
                     : logits.dtype == Dtype::float16  ? run<float16, Scaling>
                                                       : run<float, Scaling>;
  typed(logits, ids, mask, temperature, softcap.value_or(0), logprobs, entropy, lse);
}

void logprobs_backward(View grad_logprobs, View grad_entropy, View grad_lse, View logits, View ids, View entropy,
                       View lse, View mask, double temperature, std::optional<double> softcap, View grad) {
  check_logprobs_backward(grad_logprobs, grad_entropy, grad_lse, logits, ids, entropy, lse, mask, temperature, softcap,
                          grad);
  const auto typed = logits.dtype == Dtype::float64    ? run_backward<double, DoubleScaling>
                     : logits.dtype == Dtype::bfloat16 ? run_backward<bfloat16, Scaling>
                     : logits.dtype == Dtype::float16  ? run_backward<float16, Scaling>
                                                       : run_backward<float, Scaling>;
  typed(grad_logprobs, grad_entropy, grad_lse, logits, ids, entropy, lse, mask, temperature, softcap.value_or(0), grad);
}

}  // namespace rlhf_fast::cpu
