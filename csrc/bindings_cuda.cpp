// SPDX-License-Identifier: Apache-2.0
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "view_caster.h"

namespace py = pybind11;
using namespace pybind11::literals;
using no_gil = py::call_guard<py::gil_scoped_release>;

PYBIND11_MODULE(_cuda, m) {
  using namespace rlhf_fast;
  m.attr("toolkit") = RLHF_FAST_CUDA_VERSION;
  m.def("device_count", &cuda::device_count, no_gil());
  m.def("advantages", &cuda::advantages, "scores"_a, "logprobs"_a, "ref_logprobs"_a, "values"_a, "mask"_a,
        "last_values"_a, "price"_a, "kl_coef"_a, "kl"_a, "at"_a, "clip_scores"_a, "gamma"_a, "lam"_a, "holes"_a,
        "whiten"_a, "shift_mean"_a, "unbiased"_a, "advantages"_a, "returns"_a, "rewards"_a, "scratch"_a, "device"_a = 0,
        "stream"_a = 0, no_gil());
  m.def("gae", &cuda::gae, "rewards"_a, "values"_a, "mask"_a, "last_values"_a, "cu_seqlens"_a, "gamma"_a, "lam"_a,
        "holes"_a, "advantages"_a, "returns"_a, "device"_a = 0, "stream"_a = 0, no_gil());
  m.def("kl", &cuda::kl, "logits"_a, "ref_logits"_a, "ids"_a, "mask"_a, "temperature"_a, "kl"_a, "logprobs"_a,
        "ref_logprobs"_a, "entropy"_a, "lse"_a, "ref_lse"_a, "device"_a = 0, "stream"_a = 0, no_gil());
  m.def("kl_backward", &cuda::kl_backward, "grad_kl"_a, "grad_logprobs"_a, "grad_entropy"_a, "logits"_a, "ref_logits"_a,
        "kl"_a, "entropy"_a, "lse"_a, "ref_lse"_a, "ids"_a, "mask"_a, "temperature"_a, "grad"_a, "device"_a = 0,
        "stream"_a = 0, no_gil());
  m.def("logprobs", &cuda::logprobs, "logits"_a, "ids"_a, "mask"_a, "temperature"_a, "softcap"_a, "logprobs"_a,
        "entropy"_a, "lse"_a, "device"_a = 0, "stream"_a = 0, no_gil());
  m.def("logprobs_backward", &cuda::logprobs_backward, "grad_logprobs"_a, "grad_entropy"_a, "grad_lse"_a, "logits"_a,
        "ids"_a, "entropy"_a, "lse"_a, "mask"_a, "temperature"_a, "softcap"_a, "grad"_a, "device"_a = 0, "stream"_a = 0,
        no_gil());
  m.def("ppo_loss", &cuda::ppo_loss, "logprobs"_a, "old_logprobs"_a, "advantages"_a, "mask"_a, "values"_a,
        "old_values"_a, "returns"_a, "entropy"_a, "ref_logprobs"_a, "denominator"_a, "cliprange_low"_a,
        "cliprange_high"_a, "cliprange_value"_a, "vf_coef"_a, "entropy_coef"_a, "kl_coef"_a, "kl"_a, "dual_clip"_a,
        "log_ratio_clamp"_a, "aggregate"_a, "loss"_a, "stats"_a, "grad_logprobs"_a, "grad_values"_a, "grad_entropy"_a,
        "scratch"_a, "device"_a = 0, "stream"_a = 0, no_gil());
  m.def("ppo_loss_backward", &cuda::ppo_loss_backward, "grad_loss"_a, "grad_logprobs"_a, "grad_values"_a,
        "grad_entropy"_a, "logprobs"_a, "values"_a, "entropy"_a, "device"_a = 0, "stream"_a = 0, no_gil());
}
