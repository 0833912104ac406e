// As many floats at a time as the machine's registers hold: loads and stores of every dtype, exp and tanh, and the
// choice of the width when a function is called. SPDX-License-Identifier: Apache-2.0
//
// The polynomials are minimax fits, made for these intervals.
#pragma once
#include <cstdint>
#include <cstring>
#include <limits>

#define INLINE inline __attribute__((always_inline))

namespace rlhf_fast::cpu {

constexpr float infinity = std::numeric_limits<float>::infinity();

inline float lowest = -88.03f;  // see Lanes::bound

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

// The NaN that rounding to bfloat16 keeps; one full of bits would be carried over into -0.
INLINE float canonical(float x) { return x == x ? x : std::numeric_limits<float>::quiet_NaN(); }

template <int L>
struct Vectors;
template <>
struct Vectors<4> {
  typedef float Floats __attribute__((vector_size(16)));
  typedef uint32_t Words __attribute__((vector_size(16)));
  typedef uint16_t Halves __attribute__((vector_size(8)));
  typedef float Few __attribute__((vector_size(8)));  // half as many
  typedef double Doubles __attribute__((vector_size(16)));
};
template <>
struct Vectors<8> {
  typedef float Floats __attribute__((vector_size(32)));
  typedef uint32_t Words __attribute__((vector_size(32)));
  typedef uint16_t Halves __attribute__((vector_size(16)));
  typedef float Few __attribute__((vector_size(16)));  // half as many
  typedef double Doubles __attribute__((vector_size(32)));
};
template <>
struct Vectors<16> {
  typedef float Floats __attribute__((vector_size(64)));
  typedef uint32_t Words __attribute__((vector_size(64)));
  typedef uint16_t Halves __attribute__((vector_size(32)));
  typedef float Few __attribute__((vector_size(32)));  // half as many
  typedef double Doubles __attribute__((vector_size(64)));
};

template <int L>
struct Lanes {
  using Floats = typename Vectors<L>::Floats;
  using Words = typename Vectors<L>::Words;
  using Halves = typename Vectors<L>::Halves;

  static INLINE Floats fill(float x) { return x - Floats{}; }
  static INLINE Floats floats(Words x) { return reinterpret_cast<Floats>(x); }
  static INLINE Words words(Floats x) { return reinterpret_cast<Words>(x); }
  static INLINE Floats larger(Floats a, Floats b) { return a > b ? a : b; }  // b where one of them is NaN
  // A product as it is rounded: what is subtracted from it next must not be fused into it. A logit and the logsumexp of
  // its row, which is about that logit where a token is certain, would leave the rounding of the one for their gap.
  static INLINE Floats rounded(Floats x) {
#if defined(__x86_64__)
    asm("" : "+v"(x));
#else
    asm("" : "+m"(x));
#endif
    return x;
  }
  static INLINE Floats first(Floats x, int64_t count, float rest) {  // lanes from `count` on become `rest`
    Words lane;
    for (int i = 0; i < L; i++) lane[i] = i;
    return lane < static_cast<uint32_t>(count) ? x : fill(rest);
  }

  static INLINE Floats load(const float* from) {
    Floats x;
    std::memcpy(&x, from, sizeof x);
    return x;
  }
  static INLINE Words load_halves(const void* from) {
    Halves x;
    std::memcpy(&x, from, sizeof x);
    return __builtin_convertvector(x, Words);
  }
  // 2 L where order does not matter: of bfloat16 the even ones, then the odd ones, which saves the shuffles.
  static INLINE void load_two(const bfloat16* from, Floats& even, Floats& odd) {
    Words x;
    std::memcpy(&x, from, sizeof x);
    even = floats(x << 16), odd = floats(x & 0xffff0000u);
  }
  template <class T>
  static INLINE void load_two(const T* from, Floats& first, Floats& second) {
    first = load(from), second = load(from + L);
  }
  static INLINE Floats load(const bfloat16* from) { return floats(load_halves(from) << 16); }
  static INLINE Floats load(const float16* from) {
#if defined(__x86_64__)
    if constexpr (L >= 8) {  // the compiler does not know that the machine has it
      Halves h;
      Floats x;
      std::memcpy(&h, from, sizeof h);
      asm("vcvtph2ps %1, %0" : "=v"(x) : "vm"(h));
      return x;
    }
#endif
    const Words h = load_halves(from), sign = (h & 0x8000u) << 16, rest = (h & 0x7fffu) << 13;
    const Words scaled = words(floats(rest) * 0x1p112f);  // the exponents' biases differ by 112
    const Words special = rest | 0x7f800000u;             // infinity, NaN
    return floats((rest >= 0x0f800000u ? special : scaled) | sign);
  }

  static INLINE void store(float* to, Floats x) { std::memcpy(to, &x, sizeof x); }
  static INLINE void store_halves(void* to, Words x) {
    const Halves h = __builtin_convertvector(x, Halves);
    std::memcpy(to, &h, sizeof h);
  }
  // Both round to nearest, ties to even. The first takes a NaN only if its payload is short: see `canonical`.
  static INLINE void store(bfloat16* to, Floats x) {
    const Words u = words(x);
    store_halves(to, (u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
  }
  static INLINE void store(float16* to, Floats x) {
#if defined(__x86_64__)
    if constexpr (L >= 8) {
      Halves h;
      asm("vcvtps2ph $0, %1, %0" : "=v"(h) : "v"(x));
      std::memcpy(to, &h, sizeof h);
      return;
    }
#endif
    const Words u = words(x), sign = u & 0x80000000u, rest = u ^ sign;
    const Words normal = (rest - (112u << 23) + 0xfffu + ((rest >> 13) & 1u)) >> 13;
    // Adding 0.5 leaves the 10 bits of a subnormal, rounded, at the end.
    const Words subnormal = words(floats(rest) + 0.5f) - 0x3f000000u;
    Words h = rest < (113u << 23) ? subnormal : normal;
    h = rest >= (143u << 23) ? Words{} + 0x7c00u : h;
    h = rest > 0x7f800000u ? Words{} + 0x7e00u : h;
    store_halves(to, h | (sign >> 16));
  }

  // exp within about an ulp; 0 below -87.7, where the result would be subnormal.
  // `low` is bound(), which belongs outside of the loop: the compiler makes one instruction of the maximum only as long
  // as it does not know the number.
  static INLINE Floats exp(Floats x, Floats low) { return exp_within(clamp(x, low)); }
  static INLINE Floats clamp(Floats x, Floats low) { return larger(low, x); }
  static INLINE Floats bound() { return fill(lowest); }
  static INLINE Floats exp_within(Floats x) {  // -88.03 <= x <= 88
    const Floats all[] = {x};
    Floats e[1];
    exp_within(all, e);
    return e[0];
  }
  template <int K>  // K of them, side by side: each step waits for the one before it
  static INLINE void exp_within(const Floats (&x)[K], Floats (&e)[K]) {
    constexpr float to_integer = 0x1.8p23f + 127;  // adding it rounds, and leaves the exponent's bits at the end
    constexpr float per_log2 = 0x1.715476p0f;
    Floats t[K], f[K];
    for (int k = 0; k < K; k++) t[k] = x[k] * per_log2 + to_integer;
    for (int k = 0; k < K; k++) f[k] = x[k] * per_log2 - (t[k] - to_integer);  // one rounding: fused
    for (int k = 0; k < K; k++) e[k] = f[k] * 1.326445433e-03f + 9.671725462e-03f;
    for (const float c : {5.550736323e-02f, 2.402223883e-01f, 6.931469752e-01f, 1.0f})
      for (int k = 0; k < K; k++) e[k] = e[k] * f[k] + c;
    for (int k = 0; k < K; k++) e[k] *= floats(words(t[k]) << 23);
  }

  static INLINE Floats tanh(Floats x) {
    const Words sign = words(x) & 0x80000000u;
    const Floats a = floats(words(x) ^ sign), s = x * x;
    Floats p = s * -5.704987122e-03f + 2.063908735e-02f;
    p = p * s - 5.373971511e-02f;
    p = p * s + 1.333144220e-01f;
    p = p * s - 3.333328194e-01f;
    const Floats small = a + a * (p * s);
    const Floats bounded = 15.0f < a ? fill(15.0f) : a;  // NaN stays
    const Floats large = 1.0f - 2.0f / (exp_within(bounded + bounded) + 1.0f);
    return floats(words(0.625f < a ? large : small) | sign);
  }

  // Sum of the lanes, in a fixed tree.
  static INLINE double sum(Floats x) {
    using Doubles = typename Vectors<L>::Doubles;
    typename Vectors<L>::Few half[2];
    std::memcpy(half, &x, sizeof x);
    Doubles y = __builtin_convertvector(half[0], Doubles) + __builtin_convertvector(half[1], Doubles);
    for (int rest = L / 4; rest > 0; rest /= 2)
      for (int i = 0; i < rest; i++) y[i] += y[i + rest];
    return y[0];
  }
  static INLINE float maximum(Floats x) {
    float top = x[0];
    for (int i = 1; i < L; i++) top = x[i] > top ? x[i] : top;
    return top;
  }
};

// Calls F::run<L>(arguments...), compiled for the widest registers of the machine; F::run must be INLINE. Not
// target_clones: what is split from 16 lanes into shorter registers comes out one lane at a time.
#if defined(__x86_64__)
template <class F, class... A>
__attribute__((target("arch=x86-64-v4"))) auto on_sixteen(const A&... arguments) {
  return F::template run<16>(arguments...);
}
template <class F, class... A>
__attribute__((target("arch=x86-64-v3"))) auto on_eight(const A&... arguments) {
  return F::template run<8>(arguments...);
}
inline const int width = __builtin_cpu_supports("x86-64-v4") ? 16 : __builtin_cpu_supports("x86-64-v3") ? 8 : 4;
#else
constexpr int width = 4;
#endif

template <class F, class... A>
auto on_widest(const A&... arguments) {
#if defined(__x86_64__)
  if (width == 16) return on_sixteen<F>(arguments...);
  if (width == 8) return on_eight<F>(arguments...);
#endif
  return F::template run<4>(arguments...);
}

}  // namespace rlhf_fast::cpu
