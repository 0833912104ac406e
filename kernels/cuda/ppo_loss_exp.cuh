// e^x for ppo_loss and advantages on CUDA: the library's. SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cmath>

#include "launch.h"

namespace rlhf_fast::cuda {
namespace {

struct Math {
  static __device__ float exp(float x) { return ::expf(x); }
  static __device__ float expm1(float x) { return ::expm1f(x); }
  static __device__ double exp(double x) { return ::exp(x); }
  static __device__ double expm1(double x) { return ::expm1(x); }
};

}  // namespace
}  // namespace rlhf_fast::cuda
