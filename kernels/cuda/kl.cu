// Exact KL divergence of two models over the vocabulary, and its gradient: a block per row, each logit read once.
// SPDX-License-Identifier: Apache-2.0
#include <type_traits>

#include "kl.h"
#include "rows.cuh"

namespace rlhf_fast::cuda {
namespace {

constexpr int SIDE = 8;                    // logits of each model that a thread takes per step, side by side
constexpr int PAIR_STEP = THREADS * SIDE;  // per step of a block

struct Model {
  const void* data;
  Dtype dtype;
  RowOffsets row_at;
  int64_t stride;
  explicit Model(const View& view)
      : data(view.data), dtype(view.dtype), row_at(view, view.dims - 1), stride(view.stride[view.dims - 1]) {}
  // Logit i of the row that begins at `start`.
  template <class A>
  __device__ A at(int64_t start, int64_t i) const {
    const int64_t offset = start + i * stride;
    if (dtype == Dtype::float32) return widen(static_cast<const float*>(data)[offset]);
    if (dtype == Dtype::bfloat16) return widen(static_cast<const bfloat16*>(data)[offset]);
    if (dtype == Dtype::float16) return widen(static_cast<const float16*>(data)[offset]);
    return static_cast<A>(static_cast<const double*>(data)[offset]);
  }
};

template <class A>
struct Pairs {
  Model policy, ref;
  int64_t size;
  DeviceChoices choices;
  bool chosen;  // are there ids?
  A per_temperature;
};

// Eight logits of the row that begins at `start`, divided by the temperature; -inf behind its end. T is the dtype of
// both models where 16-byte loads are possible, void where any of dtype and strides may be different.
template <class T, class A>
__device__ void load(const Model& model, int64_t start, int64_t first, int64_t size, A per_temperature, A (&z)[SIDE]) {
  if constexpr (std::is_void_v<T>) {
#pragma unroll
    for (int j = 0; j < SIDE; j++)
      z[j] = first + j < size ? product(model.at<A>(start, first + j), per_temperature) : A(-INFINITY);
  } else {
    struct alignas(16) Pack {
      T x[SIDE];
    } pack;
    const T* from = static_cast<const T*>(model.data) + start + first;
    if (first < size) pack = *reinterpret_cast<const Pack*>(from);
#pragma unroll
    for (int j = 0; j < SIDE; j++) z[j] = first < size ? product(A(widen(pack.x[j])), per_temperature) : A(-INFINITY);
  }
}

// Of some logits z and w of the two models, m and n being their maxima.
template <class A>
struct Pair {
  Softmax<A> policy;                     // of z
  A ref_top = -INFINITY, ref_total = 0;  // n, sum of exp(w - n)
  A cross = 0;                           // sum of exp(z - m) * ((z - m) - (w - n))
  int infinite = 0;                      // a token that only the reference excludes

  __device__ void lift(A to, A ref_to) {
    const A shift = policy.total == A(0) || policy.top == to ? A(0) : policy.top - to;
    const A ref_shift = ref_total == A(0) || ref_top == ref_to ? A(0) : ref_top - ref_to;
    const A weight = exponential(shift);
    cross = weight == A(0) ? A(0) : (cross + policy.total * (shift - ref_shift)) * weight;
    policy.lift(to);
    ref_total = product(ref_total, exponential(ref_shift));
    ref_top = ref_to;
  }
  __device__ void merge(Pair other) {
    const A to = max(policy.top, other.policy.top), ref_to = max(ref_top, other.ref_top);
    lift(to, ref_to), other.lift(to, ref_to);
    policy.total += other.policy.total;
    policy.dot += other.policy.dot;
    ref_total += other.ref_total;
    cross += other.cross;
    infinite |= other.infinite;
  }
  __device__ void add(const A (&z)[SIDE], const A (&w)[SIDE]) {
    A top = policy.top, highest = ref_top;
#pragma unroll
    for (int j = 0; j < SIDE; j++) top = max(top, z[j]), highest = max(highest, w[j]);
    lift(top, highest);
    const A shift = top == A(-INFINITY) ? A(0) : top, ref_shift = highest == A(-INFINITY) ? A(0) : highest;
#pragma unroll
    for (int j = 0; j < SIDE; j++) {
      const A d = z[j] - shift, e = exponential(d), ref_d = w[j] - ref_shift;
      const bool none = z[j] == A(-INFINITY), only_ref = w[j] == A(-INFINITY) && !none;
      policy.total += e;
      policy.dot += e == A(0) ? A(0) : e * d;  // 0 * -inf
      ref_total += exponential(ref_d);
      cross += none || only_ref ? A(0) : e * (d - ref_d);
      infinite |= only_ref;
    }
  }
  __device__ Pair across(int distance) const {
    Pair other;
    other.policy = policy.across(distance);
    other.ref_top = __shfl_xor_sync(ALL, ref_top, distance);
    other.ref_total = __shfl_xor_sync(ALL, ref_total, distance);
    other.cross = __shfl_xor_sync(ALL, cross, distance);
    other.infinite = __shfl_xor_sync(ALL, infinite, distance);
    return other;
  }
  __device__ A ref_base() const { return ref_total == A(0) ? A(0) : ref_top; }
  __device__ A kl() const {
    const A finite = cross / policy.total - log(policy.total) + log(ref_total);
    return infinite ? finite + A(INFINITY) : finite;  // NaN stays
  }
};

template <class A>
struct Outputs {
  A *kl, *logprobs, *ref_logprobs, *entropy, *lse, *ref_lse;
};

template <class T, class A>
__global__ void __launch_bounds__(THREADS, std::is_void_v<T> ? 1 : 3) kl_kernel(Pairs<A> args, Outputs<A> out) {
  const int64_t i = blockIdx.x;
  const bool writes = threadIdx.x == 0;
  if (!args.choices.counts(i)) {
    if (writes) out.kl[i] = out.entropy[i] = out.lse[i] = out.ref_lse[i] = A(0);
    if (writes && args.chosen) out.logprobs[i] = out.ref_logprobs[i] = A(0);
    return;
  }
  const int64_t start = args.policy.row_at[i], ref_start = args.ref.row_at[i];
  Pair<A> pair;
#pragma unroll 1
  for (int64_t first = threadIdx.x * SIDE; first - threadIdx.x * SIDE < args.size; first += PAIR_STEP) {
    A z[SIDE], w[SIDE];
    load<T>(args.policy, start, first, args.size, args.per_temperature, z);
    load<T>(args.ref, ref_start, first, args.size, args.per_temperature, w);
    pair.add(z, w);
  }
  merge_block(pair);
  if (!writes) return;
  const A log_total = log(pair.policy.total), ref_log_total = log(pair.ref_total);
  out.kl[i] = pair.kl();
  out.entropy[i] = pair.policy.entropy();
  out.lse[i] = pair.policy.base() + log_total;
  out.ref_lse[i] = pair.ref_base() + ref_log_total;
  if (!args.chosen) return;
  const int64_t id = args.choices.id(i);
  const bool inside = id >= 0 && id < args.size;
  const A z = inside ? product(args.policy.template at<A>(start, id), args.per_temperature) : A(NAN);
  const A w = inside ? product(args.ref.template at<A>(ref_start, id), args.per_temperature) : A(NAN);
  out.logprobs[i] = z - pair.policy.base() - log_total;
  out.ref_logprobs[i] = w - pair.ref_base() - ref_log_total;
}

template <class A>
struct Upstream {
  Numbers<A> kl, logprobs, entropy, row_kl, row_entropy, row_lse, row_ref_lse;
};

template <class A>
__device__ void store_any(void* grad, Dtype dtype, int64_t at, A x) {
  if (dtype == Dtype::float64) static_cast<double*>(grad)[at] = x;
  if (dtype == Dtype::float32) static_cast<float*>(grad)[at] = static_cast<float>(x);
  if (dtype == Dtype::bfloat16) narrow(static_cast<float>(x), static_cast<bfloat16*>(grad)[at]);
  if (dtype == Dtype::float16) narrow(static_cast<float>(x), static_cast<float16*>(grad)[at]);
}

template <class T, class A>
__global__ void __launch_bounds__(THREADS, std::is_void_v<T> ? 1 : 3)
    kl_backward_kernel(Pairs<A> args, Upstream<A> up, void* grad) {
  const int64_t i = blockIdx.x;
  const bool counts = args.choices.counts(i);
  const int64_t id = counts && args.chosen ? args.choices.id(i) : -1;
  A g = counts && args.chosen ? up.logprobs[i] : A(0);
  if (g != A(0) && (id < 0 || id >= args.size)) g = A(NAN);
  const A k = up.kl[i], h = up.entropy[i], kl = up.row_kl[i], entropy = up.row_entropy[i];
  const A lse = up.row_lse[i], ref_lse = up.row_ref_lse[i];
  const int64_t start = args.policy.row_at[i], ref_start = args.ref.row_at[i];
#pragma unroll 1
  for (int64_t first = threadIdx.x * SIDE; first < args.size; first += PAIR_STEP) {
    A z[SIDE], w[SIDE];
    if (counts) {
      load<T>(args.policy, start, first, args.size, args.per_temperature, z);
      load<T>(args.ref, ref_start, first, args.size, args.per_temperature, w);
    }
#pragma unroll
    for (int j = 0; j < SIDE; j++) {
      const A logp = z[j] - lse, ref_logp = w[j] - ref_lse;
      A slope = -g - h * (logp + entropy);
      if (k != A(0)) slope += k * (logp - ref_logp - kl);  // else an infinite KL would come through as 0 * inf
      A dz = logp == A(-INFINITY) ? A(0) : exponential(logp) * slope;
      dz = (dz + (first + j == id ? g : A(0))) * args.per_temperature;
      z[j] = counts ? dz : A(0);
    }
    if constexpr (std::is_void_v<T>) {
#pragma unroll
      for (int j = 0; j < SIDE; j++)
        if (first + j < args.size) store_any(grad, args.policy.dtype, i * args.size + first + j, z[j]);
    } else {
      struct alignas(16) Pack {
        T x[SIDE];
      } pack;
#pragma unroll
      for (int j = 0; j < SIDE; j++) narrow(z[j], pack.x[j]);
      *reinterpret_cast<Pack*>(static_cast<T*>(grad) + i * args.size + first) = pack;
    }
  }
}

// Calls with.template operator()<T, A>().
template <class F>
void typed(const View& logits, const View& ref_logits, const F& with) {
  const int bytes = bytes_of(logits.dtype);
  const bool vector = logits.dtype == ref_logits.dtype && logits.shape[logits.dims - 1] % SIDE == 0 &&
                      vectorizable(logits, bytes) && vectorizable(ref_logits, bytes);
  if (float_result(logits, ref_logits) == Dtype::float64) return with(static_cast<void*>(nullptr), double());
  if (!vector) return with(static_cast<void*>(nullptr), float());
  if (logits.dtype == Dtype::bfloat16) return with(static_cast<bfloat16*>(nullptr), float());
  if (logits.dtype == Dtype::float16) return with(static_cast<float16*>(nullptr), float());
  with(static_cast<float*>(nullptr), float());
}

template <class A>
Pairs<A> pairs_of(const View& logits, const View& ref_logits, const View& ids, const View& mask, double temperature) {
  return {Model(logits),
          Model(ref_logits),
          logits.shape[logits.dims - 1],
          DeviceChoices(ids, mask),
          bool(ids),
          static_cast<A>(1 / temperature)};
}

}  // namespace

void kl(View logits, View ref_logits, View ids, View mask, double temperature, View kl, View logprobs,
        View ref_logprobs, View entropy, View lse, View ref_lse, int device, uintptr_t stream) {
  check_kl(logits, ref_logits, ids, mask, temperature, kl, logprobs, ref_logprobs, entropy, lse, ref_lse);
  if (count_rows(logits) == 0) return;
  const DeviceGuard guard(device);
  typed(logits, ref_logits, [&](auto* dtype, auto number) {
    using A = decltype(number);
    using T = std::remove_pointer_t<decltype(dtype)>;
    const Outputs<A> out = {kl.as<A>(),      logprobs.as<A>(), ref_logprobs.as<A>(),
                            entropy.as<A>(), lse.as<A>(),      ref_lse.as<A>()};
    launch(kl_kernel<T, A>, "kl_kernel", count_rows(logits), THREADS, reinterpret_cast<cudaStream_t>(stream),
           pairs_of<A>(logits, ref_logits, ids, mask, temperature), out);
  });
}

void kl_backward(View grad_kl, View grad_logprobs, View grad_entropy, View logits, View ref_logits, View kl,
                 View entropy, View lse, View ref_lse, View ids, View mask, double temperature, View grad, int device,
                 uintptr_t stream) {
  check_kl_backward(grad_kl, grad_logprobs, grad_entropy, logits, ref_logits, kl, entropy, lse, ref_lse, ids, mask,
                    temperature, grad);
  if (count_rows(logits) == 0) return;
  const DeviceGuard guard(device);
  typed(logits, ref_logits, [&](auto* dtype, auto number) {
    using A = decltype(number);
    using T = std::remove_pointer_t<decltype(dtype)>;
    const Upstream<A> up = {Numbers<A>(grad_kl), Numbers<A>(grad_logprobs), Numbers<A>(grad_entropy), Numbers<A>(kl),
                            Numbers<A>(entropy), Numbers<A>(lse),           Numbers<A>(ref_lse)};
    launch(kl_backward_kernel<T, A>, "kl_backward_kernel", count_rows(logits), THREADS,
           reinterpret_cast<cudaStream_t>(stream), pairs_of<A>(logits, ref_logits, ids, mask, temperature), up,
           grad.data);
  });
}

}  // namespace rlhf_fast::cuda
