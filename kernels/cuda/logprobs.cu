// Chosen-token logprob, entropy and logsumexp of every row of logits, and their gradient: a block per row.
// SPDX-License-Identifier: Apache-2.0
//
// Forward: one read, every thread with a softmax of its own that is merged at the end. Backward: one read, one write.
#include "logprobs.h"
#include "rows.cuh"

namespace rlhf_fast::cuda {
namespace {

template <class T>
struct Logits {
  using A = typename Wide<T>::type;
  const T* data;
  RowOffsets row_at;
  int64_t stride, size;
  DeviceChoices choices;
  Scaling<A> scaling;
};

// So many registers may a thread take; left to itself the compiler spills some kernels to fit in more blocks.
template <class T, bool VECTOR>
constexpr int BLOCKS_PER_SM = VECTOR && sizeof(T) < 8 ? 4 : 1;

template <class T, bool VECTOR, bool MAYBE_CAPPED>
__global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM<T, VECTOR>)
    logprobs_kernel(Logits<T> args, typename Wide<T>::type* logprobs, typename Wide<T>::type* entropy,
                    typename Wide<T>::type* lse) {
  using A = typename Wide<T>::type;
  const int64_t i = blockIdx.x;
  if (!args.choices.counts(i)) {
    if (threadIdx.x == 0) logprobs[i] = entropy[i] = lse[i] = A(0);
    return;
  }
  const T* row = args.data + args.row_at[i];
  Softmax<A> softmax;
  Items<T, VECTOR> items;
#pragma unroll 1
  for (int64_t at = 0; at < args.size; at += STEP) {
    items.load(row, args.stride, args.size, at);
    A z[ITEMS];
#pragma unroll
    for (int k = 0; k < ITEMS; k++)
      z[k] = Items<T, VECTOR>::place(at, k) < args.size ? args.scaling.template of<MAYBE_CAPPED>(widen(items[k]))
                                                        : A(-INFINITY);
    softmax.add(z);
  }
  merge_block(softmax);
  if (threadIdx.x != 0) return;
  const int64_t id = args.choices.id(i);
  const bool inside = id >= 0 && id < args.size;
  const A z = inside ? args.scaling.template of<MAYBE_CAPPED>(widen(row[id * args.stride])) : A(NAN);
  const A nothing = inside ? A(0) : A(NAN);  // the whole result of a row with a wrong id is NaN
  logprobs[i] = z - softmax.base() - log(softmax.total);
  entropy[i] = softmax.entropy() + nothing;
  lse[i] = softmax.base() + log(softmax.total) + nothing;
}

template <class A>
struct Upstream {
  Numbers<A> logprobs, entropy, lse, row_entropy, row_lse;
};

template <class T, bool VECTOR, bool MAYBE_CAPPED>
__global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM<T, VECTOR>)
    logprobs_backward_kernel(Logits<T> args, Upstream<typename Wide<T>::type> up, T* grad) {
  using A = typename Wide<T>::type;
  const int64_t i = blockIdx.x;
  const T* row = args.data + args.row_at[i];
  T* to = grad + i * args.size;
  const bool counts = args.choices.counts(i);
  const int64_t id = counts ? args.choices.id(i) : -1;
  const A g = up.logprobs[i], h = up.entropy[i], rest = up.lse[i] - g;
  const A entropy = up.row_entropy[i], lse = up.row_lse[i];
  Items<T, VECTOR> items;
#pragma unroll 1
  for (int64_t at = 0; at < args.size; at += STEP) {
    if (counts) items.load(row, args.stride, args.size, at);
#pragma unroll
    for (int k = 0; k < ITEMS; k++) {
      const A capped = args.scaling.template capped<MAYBE_CAPPED>(widen(items[k]));
      const A logp = product(capped, args.scaling.per_temperature) - lse;
      const A from_p = exponential(logp) * (rest - h * (logp + entropy));
      A dz = logp == A(-INFINITY) ? A(0) : from_p;  // a select: 0 * -inf
      dz += Items<T, VECTOR>::place(at, k) == id ? g : A(0);
      const A t = !MAYBE_CAPPED || args.scaling.softcap == A(0) ? A(0) : capped * args.scaling.per_softcap;
      dz *= args.scaling.per_temperature * (A(1) - t * t);
      narrow(counts ? dz : A(0), items[k]);
    }
    items.store(to, args.size, at);
  }
}

template <class T>
Logits<T> rows_of(const View& logits, const View& ids, const View& mask, double temperature, double softcap) {
  return {logits.as<const T>(),           RowOffsets(logits, logits.dims - 1),
          logits.stride[logits.dims - 1], logits.shape[logits.dims - 1],
          DeviceChoices(ids, mask),       Scaling<typename Wide<T>::type>(softcap, temperature)};
}

template <class T>
void run(const View& logits, const View& ids, const View& mask, double temperature, double softcap,
         const View& logprobs, const View& entropy, const View& lse, cudaStream_t stream) {
  using A = typename Wide<T>::type;
  const auto kernel = !vectorizable(logits, sizeof(T)) ? logprobs_kernel<T, false, true>
                      : softcap > 0                    ? logprobs_kernel<T, true, true>
                                                       : logprobs_kernel<T, true, false>;
  launch(kernel, "logprobs_kernel", count_rows(logits), THREADS, stream,
         rows_of<T>(logits, ids, mask, temperature, softcap), logprobs.as<A>(), entropy.as<A>(), lse.as<A>());
}

template <class T>
void run_backward(const View& logits, const View& ids, const View& mask, double temperature, double softcap,
                  const View (&up)[5], const View& grad, cudaStream_t stream) {
  using A = typename Wide<T>::type;
  const bool vector = vectorizable(logits, sizeof(T)) && vectorizable(grad, sizeof(T));
  const auto kernel = !vector       ? logprobs_backward_kernel<T, false, true>
                      : softcap > 0 ? logprobs_backward_kernel<T, true, true>
                                    : logprobs_backward_kernel<T, true, false>;
  const Upstream<A> numbers = {Numbers<A>(up[0]), Numbers<A>(up[1]), Numbers<A>(up[2]), Numbers<A>(up[3]),
                               Numbers<A>(up[4])};
  launch(kernel, "logprobs_backward_kernel", count_rows(logits), THREADS, stream,
         rows_of<T>(logits, ids, mask, temperature, softcap), numbers, grad.as<T>());
}

}  // namespace

void logprobs(View logits, View ids, View mask, double temperature, std::optional<double> softcap, View logprobs,
              View entropy, View lse, int device, uintptr_t stream) {
  check_logprobs(logits, ids, mask, temperature, softcap, logprobs, entropy, lse);
  if (count_rows(logits) == 0) return;
  const DeviceGuard guard(device);
  const auto typed = logits.dtype == Dtype::float64    ? run<double>
                     : logits.dtype == Dtype::bfloat16 ? run<bfloat16>
                     : logits.dtype == Dtype::float16  ? run<float16>
                                                       : run<float>;
  typed(logits, ids, mask, temperature, softcap.value_or(0), logprobs, entropy, lse,
        reinterpret_cast<cudaStream_t>(stream));
}

void logprobs_backward(View grad_logprobs, View grad_entropy, View grad_lse, View logits, View ids, View entropy,
                       View lse, View mask, double temperature, std::optional<double> softcap, View grad, int device,
                       uintptr_t stream) {
  check_logprobs_backward(grad_logprobs, grad_entropy, grad_lse, logits, ids, entropy, lse, mask, temperature, softcap,
                          grad);
  if (count_rows(logits) == 0) return;
  const DeviceGuard guard(device);
  const auto typed = logits.dtype == Dtype::float64    ? run_backward<double>
                     : logits.dtype == Dtype::bfloat16 ? run_backward<bfloat16>
                     : logits.dtype == Dtype::float16  ? run_backward<float16>
                                                       : run_backward<float>;
  typed(logits, ids, mask, temperature, softcap.value_or(0), {grad_logprobs, grad_entropy, grad_lse, entropy, lse},
        grad, reinterpret_cast<cudaStream_t>(stream));
}

}  // namespace rlhf_fast::cuda
