// Reads a View from Python: None, or (address, dtype code, shape, strides in elements).
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <pybind11/pybind11.h>

#include "ops.h"

namespace pybind11::detail {

template <>
struct type_caster<rlhf_fast::View> {
  PYBIND11_TYPE_CASTER(rlhf_fast::View, const_name("tuple[int, int, tuple, tuple] | None"));

  bool load(handle source, bool) {
    if (source.is_none()) return true;
    if (!PyTuple_Check(source.ptr()) || PyTuple_GET_SIZE(source.ptr()) != 4) return false;
    PyObject* shape = PyTuple_GET_ITEM(source.ptr(), 2);
    PyObject* strides = PyTuple_GET_ITEM(source.ptr(), 3);
    if (!PyTuple_Check(shape) || !PyTuple_Check(strides)) return false;
    value.data = PyLong_AsVoidPtr(PyTuple_GET_ITEM(source.ptr(), 0));
    value.dtype = static_cast<rlhf_fast::Dtype>(PyLong_AsLong(PyTuple_GET_ITEM(source.ptr(), 1)));
    value.dims = static_cast<int>(PyTuple_GET_SIZE(shape));
    if (value.dims > rlhf_fast::max_dims || PyTuple_GET_SIZE(strides) != value.dims) return false;
    for (int i = 0; i < value.dims; i++) {
      value.shape[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(shape, i));
      value.stride[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(strides, i));
    }
    if (PyErr_Occurred()) {
      PyErr_Clear();
      return false;
    }
    bool empty = false;
    for (int i = 0; i < value.dims; i++) {
      if (value.shape[i] < 0) throw value_error("a tensor has a negative size");
      empty = empty || value.shape[i] == 0;
    }
    if (!value && !empty) throw value_error("a tensor has the address 0: pass None for an absent one");
    if (value.dtype < rlhf_fast::Dtype::float32 || value.dtype > rlhf_fast::Dtype::int8)
      throw value_error("a tensor has an unknown dtype code: they are 0 to 7");
    return true;
  }
};

}  // namespace pybind11::detail
