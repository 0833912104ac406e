// Rows whose dtype is known when the program runs. SPDX-License-Identifier: Apache-2.0
#pragma once
#include "../rows.h"
#include "tiles.h"

namespace rlhf_fast::cpu {

// A row of any dtype: the two models need not have the same.
struct AnyRow {
  const void* data;
  Dtype dtype;
  int64_t stride, size;

  AnyRow(const View& view, int64_t offset)
      : dtype(view.dtype), stride(view.stride[view.dims - 1]), size(view.shape[view.dims - 1]) {
    data = view.as<const char>() + offset * bytes_of(dtype);
  }
  template <class T>
  INLINE Row<T> as() const {
    return {static_cast<const T*>(data), stride, size};
  }
};

// Calls `with` on the row as what it is, but for float64.
template <class F>
INLINE auto typed(const AnyRow& row, F with) {
  switch (row.dtype) {
    case Dtype::bfloat16:
      return with(row.as<bfloat16>());
    case Dtype::float16:
      return with(row.as<float16>());
    default:
      return with(row.as<float>());
  }
}
template <int L>
INLINE const float* load_tile(const AnyRow& row, int64_t at, const Scaling& scaling, float* buffer) {
  return typed(row, [&](const auto& r) __attribute__((always_inline)) { return load_tile<L>(r, at, scaling, buffer); });
}
template <int L>
INLINE float load_one(const AnyRow& row, int64_t id, const Scaling& scaling) {
  return typed(row, [&](const auto& r) __attribute__((always_inline)) { return load_one<L>(r, id, scaling); });
}

}  // namespace rlhf_fast::cpu
