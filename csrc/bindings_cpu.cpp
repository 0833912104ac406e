// SPDX-License-Identifier: Apache-2.0
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "view_caster.h"

namespace py = pybind11;
using no_gil = py::call_guard<py::gil_scoped_release>;

PYBIND11_MODULE(_cpu, m) {
  using namespace rlhf_fast;
  m.def("advantages", &cpu::advantages, no_gil());
  m.def("gae", &cpu::gae, no_gil());
  m.def("kl", &cpu::kl, no_gil());
  m.def("kl_backward", &cpu::kl_backward, no_gil());
  m.def("logprobs", &cpu::logprobs, no_gil());
  m.def("logprobs_backward", &cpu::logprobs_backward, no_gil());
  m.def("ppo_loss", &cpu::ppo_loss, no_gil());
  m.def("ppo_loss_backward", &cpu::ppo_loss_backward, no_gil());
  m.def("sample", &cpu::sample, no_gil());
}
