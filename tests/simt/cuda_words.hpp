// The words of CUDA that the kernels use, said in terms of simt.hpp.
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <math.h>

#include <utility>

#include "simt.hpp"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __grid_constant__
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define __shared__ static thread_local  // a block stays on one core

#define threadIdx (simt::self()->thread)
#define blockIdx (simt::block->index)
#define blockDim (simt::block->dim)
#define gridDim (simt::block->grid)

// __COUNTER__ names the place in the source.
#define __syncthreads() simt::barrier(__COUNTER__)
#define __syncwarp() (void)simt::ballot(0xffffffffu, true, __COUNTER__)
#define __ballot_sync(mask, predicate) simt::ballot(mask, predicate, __COUNTER__)
#define __all_sync(mask, predicate) (simt::ballot(mask, predicate, __COUNTER__) == 0xffffffffu)
#define __any_sync(mask, predicate) (simt::ballot(mask, predicate, __COUNTER__) != 0)
#define __shfl_sync(mask, value, source) simt::shuffle(mask, value, source, __COUNTER__)
#define __shfl_xor_sync(mask, value, bits) simt::shuffle(mask, value, simt::lane() ^ (bits), __COUNTER__)
#define __shfl_up_sync(mask, value, offset) \
  simt::shuffle(mask, value, simt::lane() < (offset) ? simt::lane() : simt::lane() - (offset), __COUNTER__)
#define __shfl_down_sync(mask, value, offset) \
  simt::shuffle(mask, value, simt::lane() + (offset) > 31 ? simt::lane() : simt::lane() + (offset), __COUNTER__)

#define __reduce_max_sync(mask, value) simt::largest(mask, value, __COUNTER__)

using dim3 = simt::Dim;
using std::max;
using std::min;

template <class T>
T atomicAdd(T* to, T x) {  // a block runs one thread at a time
  return std::exchange(*to, *to + x);
}
// Rounded where they stand: the compiler may not fuse them into what comes next.
inline float __fmul_rn(float a, float b) {
  float product = a * b;
  asm("" : "+x"(product));
  return product;
}
inline double __dmul_rn(double a, double b) {
  double product = a * b;
  asm("" : "+x"(product));
  return product;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(unsigned x) { return __builtin_ffs(static_cast<int>(x)); }
inline int __clz(unsigned x) { return x == 0 ? 32 : __builtin_clz(x); }
inline int __clzll(long long x) { return x == 0 ? 64 : __builtin_clzll(x); }

// The runtime, with two devices that are this CPU.
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidDevice = 101 };

namespace simt {
constexpr int devices = 2;
inline thread_local int device = 0;
}  // namespace simt

inline const char* cudaGetErrorName(cudaError_t e) {
  return e == cudaSuccess ? "cudaSuccess" : "cudaErrorInvalidDevice";
}
inline const char* cudaGetErrorString(cudaError_t e) {
  return e == cudaSuccess ? "no error" : "invalid device ordinal";
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = simt::devices, cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = simt::device, cudaSuccess; }
inline cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= simt::devices) return cudaErrorInvalidDevice;
  return simt::device = device, cudaSuccess;
}
