// Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), the same on CPU and GPU.
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define ANYWHERE __host__ __device__
#else
#define ANYWHERE
#endif

namespace rlhf_fast {

// One double in [0, 1), a multiple of 2^-53: the seed is the key, the position the counter.
ANYWHERE inline double uniform(int64_t seed, int64_t position) {
  uint32_t c[4] = {static_cast<uint32_t>(position), static_cast<uint32_t>(position >> 32), 0, 0};
  uint32_t k[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  for (int round = 0; round < 10; round++) {
    const uint64_t a = uint64_t{0xD2511F53} * c[0], b = uint64_t{0xCD9E8D57} * c[2];
    c[0] = static_cast<uint32_t>(b >> 32) ^ c[1] ^ k[0];
    c[1] = static_cast<uint32_t>(b);
    c[2] = static_cast<uint32_t>(a >> 32) ^ c[3] ^ k[1];
    c[3] = static_cast<uint32_t>(a);
    k[0] += 0x9E3779B9, k[1] += 0xBB67AE85;
  }
  return static_cast<double>((uint64_t{c[0] >> 5} << 26) + (c[1] >> 6)) * 0x1p-53;
}

}  // namespace rlhf_fast
