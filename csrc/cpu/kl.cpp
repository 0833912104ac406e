// Exact KL divergence of two models over the vocabulary, and its gradient, on the CPU.
// SPDX-License-Identifier: Apache-2.0
//
// Both rows go through the L1 cache together, a tile at a time, and each logit is read once.
#include "../kl.h"

#include <omp.h>

#include "any_row.h"
#include "choices.h"
#include "pages.h"
#include "pairs.h"

namespace rlhf_fast::cpu {
namespace {

struct PairResult {
  double kl, logprob, ref_logprob, entropy, lse, ref_lse;
};

PairResult result_of(const Pair& pair, bool chosen, double z, double w) {
  const double lse = pair.policy.lse(), ref_lse = pair.ref_lse();
  return {pair.kl(), chosen ? z - lse : 0, chosen ? w - ref_lse : 0, pair.policy.entropy(), lse, ref_lse};
}

// Without ids, `id` is -1.
struct Forward {
  template <int L>
  static INLINE PairResult run(const AnyRow& row, const AnyRow& ref_row, int64_t id, const Scaling& scaling) {
    const Pair pair = typed(row, [&](const auto& r) __attribute__((always_inline)) {
      return typed(ref_row, [&](const auto& q) __attribute__((always_inline)) { return row_pair<L>(r, q, scaling); });
    });
    if (id < 0) return result_of(pair, false, 0, 0);
    return result_of(pair, true, load_one<L>(row, id, scaling), load_one<L>(ref_row, id, scaling));
  }
};

template <class T>
struct Upstream {  // of one row
  T kl, logprob, entropy;
  T row_kl, row_entropy, row_lse, row_ref_lse;
};

// Gradient with respect to z; a scalar or a vector of them. `chosen` is what a chosen one adds.
template <class V, class E, class T>
INLINE V slope_of(V logp, V ref_logp, E exp, T chosen, const Upstream<T>& up) {
  V slope = -up.logprob - up.entropy * (logp + up.row_entropy);
  // An infinite KL that nobody asks about must not reach the gradient as 0 * inf.
  if (up.kl != 0) slope += up.kl * (logp - ref_logp - up.row_kl);
  return (logp == -infinity ? V{} : exp(logp) * slope) + chosen;  // a select: 0 * -inf
}

struct Backward {
  template <int L, class T>
  static INLINE void store_tile(const float* from, int64_t count, T* to) {
    const int64_t whole = count / L * L;
    for (int64_t i = 0; i < whole; i += L) Lanes<L>::store(to + i, Lanes<L>::load(from + i));
    T some[L];
    if (whole < count) Lanes<L>::store(some, Lanes<L>::load(from + whole));
    std::memcpy(static_cast<void*>(to + whole), some, (count - whole) * sizeof(T));
  }

  template <int L>
  static INLINE void run(const AnyRow& row, const AnyRow& ref_row, int64_t id, const Upstream<float>& given,
                         const Scaling& scaling, void* grad) {
    using N = Lanes<L>;
    const Upstream<float> up = {canonical(given.kl),         canonical(given.logprob),     canonical(given.entropy),
                                canonical(given.row_kl),     canonical(given.row_entropy), canonical(given.row_lse),
                                canonical(given.row_ref_lse)};
    const float per_temperature = scaling.per_temperature;
    const auto bound = N::bound();
    const auto exp = [&](auto x) __attribute__((always_inline)) { return N::exp(x, bound); };
    alignas(64) float buffer[tile], ref_buffer[tile], dz[tile];
    for (int64_t at = 0; at < row.size; at += tile) {
      const int64_t steps = tile_steps(row.size, at), count = std::min<int64_t>(tile, row.size - at);
      const float* z = load_tile<L>(row, at, scaling, buffer);
      const float* w = load_tile<L>(ref_row, at, scaling, ref_buffer);
      for (int64_t i = 0; i < steps * step; i += L) {
        const auto logp = N::load(z + i) - up.row_lse, ref_logp = N::load(w + i) - up.row_ref_lse;
        N::store(dz + i, slope_of(logp, ref_logp, exp, 0.0f, up) * per_temperature);
      }
      if (id >= at && id < at + count) {  // its share is added before anything is rounded
        const auto logp = N::fill(z[id - at]) - up.row_lse, ref_logp = N::fill(w[id - at]) - up.row_ref_lse;
        dz[id - at] = (slope_of(logp, ref_logp, exp, up.logprob, up) * per_temperature)[0];
      }
      typed(row, [&](const auto& r) __attribute__((always_inline)) {
        using T = std::remove_const_t<std::remove_pointer_t<decltype(r.data)>>;
        store_tile<L>(dz, count, static_cast<T*>(grad) + at);
      });
    }
  }
};

// ---- float64, plainly.

struct DoubleRow {
  AnyRow row;
  double per_temperature;
  INLINE double operator[](int64_t i) const {
    if (row.dtype == Dtype::float64) return row.as<double>().data[i * row.stride] * per_temperature;
    return typed(row, [&](const auto& r) { return double(load_some<4>(r.data + i * r.stride, 1, 1)[0]); }) *
           per_temperature;
  }
};

PairResult double_forward(const DoubleRow& row, const DoubleRow& ref_row, int64_t id) {
  Pair all;
  for (int64_t i = 0; i < row.row.size; i++) {
    const double z = row[i], w = ref_row[i];
    const double total = z == -infinity ? 0 : 1, ref_total = w == -infinity ? 0 : 1;
    all.merge({{z, z == z ? total : z, 0}, w, w == w ? ref_total : w, 0, ref_total == 0 && total != 0});
  }
  return id < 0 ? result_of(all, false, 0, 0) : result_of(all, true, row[id], ref_row[id]);
}

void double_backward(const DoubleRow& row, const DoubleRow& ref_row, int64_t id, const Upstream<double>& up,
                     void* grad) {
  const auto exp = [](double x) { return std::exp(x); };
  for (int64_t i = 0; i < row.row.size; i++) {
    const double logp = row[i] - up.row_lse, ref_logp = ref_row[i] - up.row_ref_lse;
    const double dz = slope_of(logp, ref_logp, exp, i == id ? up.logprob : 0, up) * row.per_temperature;
    if (row.row.dtype == Dtype::float64)
      static_cast<double*>(grad)[i] = dz;
    else
      typed(row.row, [&](const auto& r) {
        using T = std::remove_const_t<std::remove_pointer_t<decltype(r.data)>>;
        T some[4];
        Lanes<4>::store(some, Lanes<4>::fill(static_cast<float>(dz)));
        static_cast<T*>(grad)[i] = some[0];
      });
  }
}

template <class T>
void run(const View& logits, const View& ref_logits, const View& ids, const View& mask, double temperature,
         const View (&outputs)[6]) {
  const Choices choices(ids, mask);
  const RowOffsets row_at(logits, logits.dims - 1), ref_at(ref_logits, logits.dims - 1);
  const int64_t rows = count_rows(logits), size = logits.shape[logits.dims - 1];
  if (ids) check_ids("kl", choices, rows, size);
  const Scaling scaling(0, temperature);
#pragma omp parallel for schedule(guided) if (rows * size >= 16384)
  for (int64_t i = 0; i < rows; i++) {
    PairResult r{};
    if (choices.counts(i)) {
      const AnyRow row(logits, row_at[i]), ref_row(ref_logits, ref_at[i]);
      const int64_t id = ids ? choices.id(i) : -1;
      if constexpr (sizeof(T) == 8)
        r = double_forward({row, 1 / temperature}, {ref_row, 1 / temperature}, id);
      else
        r = on_widest<Forward>(row, ref_row, id, scaling);
    }
    const double values[] = {r.kl, r.logprob, r.ref_logprob, r.entropy, r.lse, r.ref_lse};
    for (int k = 0; k < 6; k++)
      if (outputs[k]) outputs[k].as<T>()[i] = static_cast<T>(values[k]);  // outputs are contiguous
  }
}

template <class T>
void run_backward(const View (&grads)[3], const View& logits, const View& ref_logits, const View (&saved)[4],
                  const View& ids, const View& mask, double temperature, const View& grad) {
  const Choices choices(ids, mask);
  const RowOffsets row_at(logits, logits.dims - 1), ref_at(ref_logits, logits.dims - 1);
  const PerRow<const T> k(grads[0]), g(grads[1]), h(grads[2]);
  const PerRow<const T> kl(saved[0]), entropy(saved[1]), lse(saved[2]), ref_lse(saved[3]);
  const int64_t rows = count_rows(logits), size = logits.shape[logits.dims - 1];
  if (ids) check_ids("kl", choices, rows, size);
  const int64_t row_bytes = size * bytes_of(logits.dtype);
  const Scaling scaling(0, temperature);
  ask_for_huge_pages(grad.data, rows * row_bytes);
#pragma omp parallel for schedule(guided) if (rows * size >= 16384)
  for (int64_t i = 0; i < rows; i++) {
    char* to = grad.as<char>() + i * row_bytes;
    if (!choices.counts(i)) {
      std::memset(to, 0, row_bytes);
      continue;
    }
    const AnyRow row(logits, row_at[i]), ref_row(ref_logits, ref_at[i]);
    const int64_t id = ids ? choices.id(i) : -1;
    const Upstream<T> up = {k[i], ids ? g[i] : T(0), h[i], kl[i], entropy[i], lse[i], ref_lse[i]};
    if constexpr (sizeof(T) == 8)
      double_backward({row, 1 / temperature}, {ref_row, 1 / temperature}, id, up, to);
    else
      on_widest<Backward>(row, ref_row, id, up, scaling, static_cast<void*>(to));
  }
}

}  // namespace

void kl(View logits, View ref_logits, View ids, View mask, double temperature, View kl, View logprobs,
        View ref_logprobs, View entropy, View lse, View ref_lse) {
  check_kl(logits, ref_logits, ids, mask, temperature, kl, logprobs, ref_logprobs, entropy, lse, ref_lse);
  const View outputs[] = {kl, logprobs, ref_logprobs, entropy, lse, ref_lse};
  const bool wide = float_result(logits, ref_logits) == Dtype::float64;
  (wide ? run<double> : run<float>)(logits, ref_logits, ids, mask, temperature, outputs);
}

void kl_backward(View grad_kl, View grad_logprobs, View grad_entropy, View logits, View ref_logits, View kl,
                 View entropy, View lse, View ref_lse, View ids, View mask, double temperature, View grad) {
  check_kl_backward(grad_kl, grad_logprobs, grad_entropy, logits, ref_logits, kl, entropy, lse, ref_lse, ids, mask,
                    temperature, grad);
  const View grads[] = {grad_kl, grad_logprobs, grad_entropy}, saved[] = {kl, entropy, lse, ref_lse};
  const bool wide = float_result(logits, ref_logits) == Dtype::float64;
  (wide ? run_backward<double> : run_backward<float>)(grads, logits, ref_logits, saved, ids, mask, temperature, grad);
}

}  // namespace rlhf_fast::cpu
