// A sum over a block, sound and in the ways in which people get it wrong: what the shim must tell apart.
// SPDX-License-Identifier: Apache-2.0
#include <pybind11/pybind11.h>

#include "simt.hpp"

namespace {

enum Flaw { NONE, NO_BARRIER, HALF_WARP, DIVERGENT_SHUFFLE, DIVERGENT_BARRIER, PARTIAL_WARP, DEEP_STACK };

constexpr int THREADS = 128;

template <Flaw FLAW>
__global__ void block_sum(const int* numbers, int* sums) {
  __shared__ int warps[THREADS / 32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int sum = numbers[blockIdx.x * THREADS + threadIdx.x];
  if (FLAW == DEEP_STACK) {
    volatile char deep[40 * 1024];
    for (size_t i = 0; i < sizeof(deep); i++) deep[i] = 1;
  }
  const unsigned mask = FLAW == PARTIAL_WARP ? 0xffffu : 0xffffffffu;
  for (int bits = FLAW == HALF_WARP ? 8 : 16; bits > 0; bits /= 2) {
    if (FLAW == DIVERGENT_SHUFFLE && lane >= 16) {
      sum += __shfl_down_sync(mask, sum, bits);
    } else {
      sum += __shfl_xor_sync(mask, sum, bits);
    }
  }
  if (lane == 0) warps[warp] = sum;
  if (FLAW != NO_BARRIER && (FLAW != DIVERGENT_BARRIER || warp != 0)) __syncthreads();
  if (threadIdx.x == 0) {
    int total = 0;
    for (int w = 0; w < THREADS / 32; w++) total += warps[w];
    sums[blockIdx.x] = total;
  }
  __syncthreads();
}

template <Flaw FLAW>
void run(uintptr_t numbers, uintptr_t sums, int blocks) {
  simt::launch([=] { block_sum<FLAW>(reinterpret_cast<const int*>(numbers), reinterpret_cast<int*>(sums)); }, blocks,
               THREADS);
}

}  // namespace

PYBIND11_MODULE(block_sum, m) {
  m.def("none", &run<NONE>);
  m.def("no_barrier", &run<NO_BARRIER>);
  m.def("half_warp", &run<HALF_WARP>);
  m.def("divergent_shuffle", &run<DIVERGENT_SHUFFLE>);
  m.def("divergent_barrier", &run<DIVERGENT_BARRIER>);
  m.def("partial_warp", &run<PARTIAL_WARP>);
  m.def("deep_stack", &run<DEEP_STACK>);
}
