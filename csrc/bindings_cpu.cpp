// SPDX-License-Identifier: Apache-2.0
#include <pybind11/pybind11.h>

#include "view_caster.h"

namespace py = pybind11;
using no_gil = py::call_guard<py::gil_scoped_release>;

PYBIND11_MODULE(_cpu, m) {
  using namespace rlhf_fast;
  m.def("gae", &cpu::gae, no_gil());
  m.def("sample", &cpu::sample, no_gil());
}
