// What every CUDA host function needs: the runtime, a device guard, error checks and a launch.
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>

#ifdef RLHF_FAST_SIMT
#include "simt.hpp"  // the same source, compiled for the CPU (tests/simt)
#else
#include <cuda_runtime.h>
#endif

namespace rlhf_fast::cuda {

// Throws std::runtime_error with CUDA's name and message of the error; `what` says what was tried.
void check(cudaError_t status, const char* what);

// Makes `device` current and gives the caller's device back at the end of the scope.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

// Launches `kernel` on a grid of blocks and checks that it was accepted. Does not wait for it.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const char* name, int64_t grid, int block, cudaStream_t stream,
            const Arguments&... arguments) {
  if (grid > 0x7fffffff) throw std::length_error(std::string(name) + ": too many blocks for one launch");
#ifdef RLHF_FAST_SIMT
  simt::launch([&] { kernel(arguments...); }, grid, block);
#else
  kernel<<<static_cast<unsigned>(grid), block, 0, stream>>>(arguments...);
#endif
  check(cudaGetLastError(), name);
}

}  // namespace rlhf_fast::cuda
