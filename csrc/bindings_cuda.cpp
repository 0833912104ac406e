// SPDX-License-Identifier: Apache-2.0
#include <pybind11/pybind11.h>

#include "view_caster.h"

namespace py = pybind11;
using no_gil = py::call_guard<py::gil_scoped_release>;

PYBIND11_MODULE(_cuda, m) {
  using namespace rlhf_fast;
  m.attr("toolkit") = RLHF_FAST_CUDA_VERSION;
  m.def("device_count", &cuda::device_count, no_gil());
  m.def("gae", &cuda::gae, no_gil());
}
