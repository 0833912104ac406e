// Rows of a View [..., V] and the numbers [...] beside them, by their place among all rows.
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <algorithm>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>

#include "ops.h"

#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__
#else
#define HOST_DEVICE
#endif

namespace rlhf_fast {

// Where row i of all rows begins, counted in elements; any strides, no copy.
class RowOffsets {
 public:
  // `dims` leading dimensions of `view` are those of the rows.
  RowOffsets(const View& view, int dims) {
    for (int d = dims - 1; d >= 0; d--) {
      const int64_t size = view.shape[d], stride = view.stride[d];
      if (size == 1) continue;
      // A dimension that continues the one inside of it needs no division of its own.
      if (dims_ > 0 && stride == stride_[dims_ - 1] * size_[dims_ - 1]) {
        size_[dims_ - 1] *= size;
        continue;
      }
      size_[dims_] = size;
      stride_[dims_++] = stride;
    }
  }
  HOST_DEVICE int64_t operator[](int64_t row) const {
    if (dims_ == 0) return 0;
    int64_t offset = 0;
    for (int d = 0; d + 1 < dims_; d++) {
      offset += row % size_[d] * stride_[d];
      row /= size_[d];
    }
    return offset + row * stride_[dims_ - 1];
  }

 private:
  int dims_ = 0;  // the innermost first
  int64_t size_[max_dims] = {}, stride_[max_dims] = {};
};

// One number per row.
template <class T>
struct PerRow {
  T* data;
  RowOffsets offsets;
  explicit PerRow(const View& view) : data(view.as<T>()), offsets(view, view.dims) {}
  T& operator[](int64_t row) const { return data[offsets[row]]; }
};

// The ids and the mask of all rows.
struct Choices {
  View ids, mask;
  RowOffsets id_at, mask_at;
  Choices(const View& ids, const View& mask) : ids(ids), mask(mask), id_at(ids, ids.dims), mask_at(mask, mask.dims) {}

  bool counts(int64_t row) const { return !mask || mask.as<uint8_t>()[mask_at[row]] != 0; }
  int64_t id(int64_t row) const {
    return ids.dtype == Dtype::int32 ? ids.as<int32_t>()[id_at[row]] : ids.as<int64_t>()[id_at[row]];
  }
};

inline int64_t count_rows(const View& logits) {
  int64_t rows = 1;
  for (int d = 0; d + 1 < logits.dims; d++) rows *= logits.shape[d];
  return rows;
}

inline bool is_floating(Dtype dtype) {
  return dtype == Dtype::float32 || dtype == Dtype::float64 || dtype == Dtype::bfloat16 || dtype == Dtype::float16;
}

inline int bytes_of(Dtype floating) { return floating == Dtype::float64 ? 8 : floating == Dtype::float32 ? 4 : 2; }

// What ops over rows of logits ask of their arguments. Throws std::invalid_argument, Python's ValueError: the public
// functions have seen to it already, but torch.ops.rlhf_fast comes here directly, and a wrong dtype would be a wrong
// address.
class RowChecks {
 public:
  RowChecks(const char* op, const View& logits) : op_(op), logits_(logits) {
    require(logits.dims >= 1 && logits.shape[logits.dims - 1] >= 1, "logits must be [..., V] with V at least 1");
    require(is_floating(logits.dtype), "logits must be float32, float64, bfloat16 or float16");
  }
  void require(bool holds, const std::string& rule) const {
    if (!holds) throw std::invalid_argument(std::string(op_) + ": " + rule);
  }
  void like_logits(const View& view, const char* name) const {
    require(view.dims == logits_.dims && std::equal(view.shape, view.shape + view.dims, logits_.shape),
            std::string(name) + " must have the shape of logits");
  }
  void per_row(const View& view, const char* name, Dtype dtype) const {
    require(is_per_row(view), std::string(name) + " must be like logits without its last dimension");
    require(view.dims > 0 || view, std::string(name) + " must be a tensor");  // None looks like the number of one row
    require(view.dtype == dtype, std::string(name) + " has a wrong dtype");
  }
  struct Named {
    const View& view;
    const char* name;
  };
  void per_row(std::initializer_list<Named> views, Dtype dtype) const {
    for (const Named& v : views) per_row(v.view, v.name, dtype);
  }
  void choices(const View& ids, const View& mask) const {
    require(!ids || is_per_row(ids), "ids must be like logits without its last dimension");
    require(!ids || ids.dtype == Dtype::int32 || ids.dtype == Dtype::int64, "ids must be int32 or int64");
    if (mask) per_row(mask, "mask", Dtype::boolean);
  }
  static bool positive(double x) { return x > 0 && x <= 1.7976931348623157e308; }

 private:
  bool is_per_row(const View& view) const {
    return view.dims == logits_.dims - 1 && std::equal(view.shape, view.shape + view.dims, logits_.shape);
  }
  const char* op_;
  const View& logits_;
};

}  // namespace rlhf_fast
