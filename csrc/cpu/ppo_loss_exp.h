// e^x for ppo_loss on the CPU. SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "../ppo_loss_token.h"

#define INLINE inline __attribute__((always_inline))

namespace rlhf_fast::cpu {

// In float a loop over these becomes vectors, within 1 ulp; in double they are the library's.
struct Math {
  // e^x - 1 = 2^n (e^r - 1) + 2^n - 1 with |r| <= ln(2) / 2; the polynomial of e^r - 1 is that of Cephes.
  struct Reduced {
    float fraction, scale1, scale2;  // 2^n in two factors, for n from -150 to 128
    int32_t n;
  };
  static INLINE float power(int32_t n) {  // 2^n
    const int32_t bits = (n + 127) << 23;
    float x;
    std::memcpy(&x, &bits, sizeof(x));
    return x;
  }
  static INLINE Reduced reduced(float x) {
    constexpr float magic = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to an integer
    x = choose(x > 89.0f, 89.0f, x);
    x = choose(x < -104.0f, -104.0f, x);
    const float shifted = x * 1.44269504f + magic, n = shifted - magic;
    const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    float p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    int32_t bits;
    std::memcpy(&bits, &shifted, sizeof(bits));
    const int32_t whole = bits - 0x4b400000, half = whole >> 1;  // less the bits of magic
    return {p * (r * r) + r, power(half), power(whole - half), whole};
  }
  static INLINE float exp(float x) {
    const Reduced e = reduced(x);
    return (1.0f + e.fraction) * e.scale1 * e.scale2;
  }
  static INLINE float expm1(float x) {
    const Reduced e = reduced(x);
    const float away = (1.0f + e.fraction) * e.scale1 * e.scale2 - 1.0f;
    return choose(e.n == 0, e.fraction, away);
  }
  static INLINE double exp(double x) { return std::exp(x); }
  static INLINE double expm1(double x) { return std::expm1(x); }
};

}  // namespace rlhf_fast::cpu
