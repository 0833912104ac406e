// Generalised advantage estimation on the CPU, a sequence at a time. SPDX-License-Identifier: Apache-2.0
#include "../gae.h"

#include <omp.h>

#include "gae_scan.h"

namespace rlhf_fast::cpu {
namespace {

CLONES void scan_sequence_float(const Sequence<float>& s) { scan_sequence(s); }
CLONES void scan_sequence_double(const Sequence<double>& s) { scan_sequence(s); }

int64_t offset(const View& cu_seqlens, int64_t i) {
  const int64_t at = i * cu_seqlens.stride[0];
  return cu_seqlens.dtype == Dtype::int32 ? cu_seqlens.as<int32_t>()[at] : cu_seqlens.as<int64_t>()[at];
}

void check_offsets(const View& cu_seqlens, int64_t sequences, int64_t tokens) {
  bool rises = offset(cu_seqlens, 0) == 0 && offset(cu_seqlens, sequences) == tokens;
  for (int64_t i = 0; i < sequences; i++) rises &= offset(cu_seqlens, i) <= offset(cu_seqlens, i + 1);
  if (!rises) throw std::invalid_argument("gae: cu_seqlens must rise from 0 to N = " + std::to_string(tokens));
}

template <class T>
void run(const View& rewards, const View& values, const View& mask, const View& last_values, const View& cu_seqlens,
         double gamma, double lam, bool zero_holes, const View& advantages, const View& returns,
         void (*scan)(const Sequence<T>&)) {
  const bool packed = cu_seqlens.dims > 0;
  const int64_t sequences = packed ? cu_seqlens.shape[0] - 1 : rewards.shape[0];
  const int64_t width = rewards.shape[rewards.dims - 1], tokens = packed ? width : sequences * width;
  if (packed) check_offsets(cu_seqlens, sequences, tokens);
  if (tokens == 0) return;
  const int last_dim = rewards.dims - 1;
#pragma omp parallel for schedule(guided) if (tokens >= 16384)
  for (int64_t i = 0; i < sequences; i++) {
    const int64_t start = packed ? offset(cu_seqlens, i) : 0;
    const auto origin = [&](const View& x) { return (packed ? 0 : i * x.stride[0]) + start * x.stride[last_dim]; };
    const int64_t out = packed ? start : i * width;  // outputs are contiguous
    scan({{rewards.as<const T>() + origin(rewards), rewards.stride[last_dim]},
          {values.as<const T>() + origin(values), values.stride[last_dim]},
          {mask.as<const uint8_t>() + origin(mask), mask.stride[last_dim]},
          advantages.as<T>() + out,
          returns.as<T>() + out,
          packed ? offset(cu_seqlens, i + 1) - start : width,
          last_values ? last_values.as<const T>()[i * last_values.stride[0]] : T(0),
          static_cast<T>(gamma),
          static_cast<T>(gamma * lam),
          zero_holes});
  }
}

}  // namespace

void gae(View rewards, View values, View mask, View last_values, View cu_seqlens, double gamma, double lam,
         const std::string& holes, View advantages, View returns) {
  check_gae(rewards, values, mask, last_values, cu_seqlens, holes, advantages, returns);
  const bool zero_holes = holes == "zero";
  if (rewards.dtype == Dtype::float64)
    run<double>(rewards, values, mask, last_values, cu_seqlens, gamma, lam, zero_holes, advantages, returns,
                scan_sequence_double);
  else
    run<float>(rewards, values, mask, last_values, cu_seqlens, gamma, lam, zero_holes, advantages, returns,
               scan_sequence_float);
}

}  // namespace rlhf_fast::cpu
