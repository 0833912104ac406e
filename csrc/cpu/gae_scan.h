// The scan behind gae.cpp and advantages.cpp: one sequence, from its last valid token to its first.
// SPDX-License-Identifier: Apache-2.0
//
// A_t = a_t A_{t+1} + b_t is associative, so a block of 16 tokens is scanned within vector registers and only its
// carry waits for the block to its right: about one fused multiply-add of latency per 16 tokens, not per token.
// Blocks are laid from the last valid token to the left: padding on either side, packing and the other rows of the
// batch change no bit.
#pragma once
#include <cstdint>
#include <cstring>

#define INLINE inline __attribute__((always_inline))
#define CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))

namespace rlhf_fast::cpu {
namespace {

constexpr int block = 16;  // tokens

template <class T>
struct Lanes;
template <>
struct Lanes<float> {
  typedef float vector __attribute__((vector_size(32)));
  typedef int32_t index __attribute__((vector_size(32)));
  static constexpr index shift1 = {1, 2, 3, 4, 5, 6, 7, 8}, shift2 = {2, 3, 4, 5, 6, 7, 8, 9};
  static constexpr index shift4 = {4, 5, 6, 7, 8, 9, 10, 11};
  static INLINE vector fill(float x) { return vector{x, x, x, x, x, x, x, x}; }
};
template <>
struct Lanes<double> {
  typedef double vector __attribute__((vector_size(32)));
  typedef int64_t index __attribute__((vector_size(32)));
  static constexpr index shift1 = {1, 2, 3, 4}, shift2 = {2, 3, 4, 5}, shift4 = {};
  static INLINE vector fill(double x) { return vector{x, x, x, x}; }
};

template <class T>
struct Row {
  const T* data;
  int64_t stride;
  INLINE T operator[](int64_t t) const { return data[t * stride]; }
};

INLINE bool all_valid(const uint8_t* mask) {  // of a block
  uint64_t bytes[2];
  std::memcpy(bytes, mask, block);
  return (bytes[0] & bytes[1]) == 0x0101010101010101u;
}

template <class T>
struct Sequence {
  Row<T> rewards, values;
  Row<uint8_t> mask;
  T* advantages;
  T* returns;
  int64_t length;
  T last, gamma, factor;  // factor = gamma * lam
  bool zero_holes;

  INLINE bool contiguous() const { return rewards.stride == 1 && values.stride == 1 && mask.stride == 1; }
  INLINE bool full(int64_t from) const { return all_valid(mask.data + from); }
};

// One block in registers: vector i holds tokens [i * lanes, (i + 1) * lanes).
template <class T>
struct Block {
  using L = Lanes<T>;
  using V = typename L::vector;
  static constexpr int lanes = sizeof(V) / sizeof(T), vectors = block / lanes;
  V x[vectors];

  static INLINE V fill(T value) { return L::fill(value); }
  static INLINE V first(V v) { return __builtin_shuffle(v, typename L::index{}); }  // lane 0 in every lane
  INLINE void load(const T* from) {
    for (int i = 0; i < vectors; i++) std::memcpy(&x[i], from + i * lanes, sizeof(V));
  }
  INLINE void store(T* to) const {
    for (int i = 0; i < vectors; i++) std::memcpy(to + i * lanes, &x[i], sizeof(V));
  }
  // Token t holds what token t + 1 held; `entering` comes in from the right.
  INLINE Block shifted(V entering) const {
    Block y;
    for (int i = 0; i < vectors; i++)
      y.x[i] = __builtin_shuffle(x[i], i + 1 < vectors ? x[i + 1] : entering, L::shift1);
    return y;
  }
};

// Composes the affine maps x -> a x + b of a block, from each token to the block's right end: first within each
// vector, then over the vectors. Both functions below build the same tree, so that they give the same bits.
template <class T>
INLINE void compose(Block<T>& a, Block<T>& b) {
  using B = Block<T>;
  using L = Lanes<T>;
  const auto step = [](auto& a, auto& b, auto shift) __attribute__((always_inline)) {
    b += a * __builtin_shuffle(b, B::fill(0), shift);
    a *= __builtin_shuffle(a, B::fill(1), shift);
  };
  for (int i = B::vectors - 1; i >= 0; i--) {
    step(a.x[i], b.x[i], L::shift1);
    step(a.x[i], b.x[i], L::shift2);
    if constexpr (B::lanes == 8) step(a.x[i], b.x[i], L::shift4);
    if (i + 1 < B::vectors) {
      b.x[i] += a.x[i] * B::first(b.x[i + 1]);
      a.x[i] *= B::first(a.x[i + 1]);
    }
  }
}

// The same where every token multiplies by the same factor; `powers` is the `a` that compose() makes of it.
template <class T>
INLINE void compose_constant(const Block<T>& powers, Block<T>& b) {
  using B = Block<T>;
  using L = Lanes<T>;
  const auto tail = powers.x[B::vectors - 1];  // …, factor^2, factor
  for (int i = B::vectors - 1; i >= 0; i--) {
    b.x[i] += B::fill(tail[B::lanes - 1]) * __builtin_shuffle(b.x[i], B::fill(0), L::shift1);
    b.x[i] += B::fill(tail[B::lanes - 2]) * __builtin_shuffle(b.x[i], B::fill(0), L::shift2);
    if constexpr (B::lanes == 8)
      b.x[i] += B::fill(tail[B::lanes - 4]) * __builtin_shuffle(b.x[i], B::fill(0), L::shift4);
    if (i + 1 < B::vectors) b.x[i] += tail * B::first(b.x[i + 1]);
  }
}

// What the scan carries to the left: the advantage and the value of the token after the block, in every lane.
template <class T>
struct Carry {
  typename Block<T>::V advantage, value;
};

template <class T>
INLINE void full_block(const Sequence<T>& s, int64_t from, const Block<T>& powers, Carry<T>& carry) {
  Block<T> r, v, b;
  r.load(s.rewards.data + from);
  v.load(s.values.data + from);
  const Block<T> next = v.shifted(carry.value);
  for (int i = 0; i < b.vectors; i++) b.x[i] = r.x[i] + s.gamma * next.x[i] - v.x[i];
  if (s.factor != 0) {  // 0 * inf: a token whose factor is 0 does not look at the next one
    compose_constant(powers, b);
    for (int i = 0; i < b.vectors; i++) b.x[i] += powers.x[i] * carry.advantage;
  }
  carry = {b.first(b.x[0]), v.first(v.x[0])};
  b.store(s.advantages + from);
  for (int i = 0; i < b.vectors; i++) v.x[i] += b.x[i];
  v.store(s.returns + from);
}

// A block with masked tokens, with strides, or one that reaches over the start of the sequence.
template <class T>
INLINE void mixed_block(const Sequence<T>& s, int64_t from, Carry<T>& carry) {
  T r[block], v[block], next[block], factor[block];
  bool counts[block];
  T carried = carry.value[0];
  for (int i = block - 1; i >= 0; i--) {
    const int64_t t = from + i;
    counts[i] = t >= 0 && s.mask[t];
    const bool steps = counts[i] || (s.zero_holes && t >= 0);  // a skipped token is the identity: a = 1, b = 0
    r[i] = counts[i] ? s.rewards[t] : T(0);
    v[i] = counts[i] ? s.values[t] : T(0);
    next[i] = steps ? carried : T(0);
    factor[i] = steps ? s.factor : T(1);
    if (steps) carried = v[i];
  }
  Block<T> a, b, rewards, values, following;
  a.load(factor), rewards.load(r), values.load(v), following.load(next);
  for (int i = 0; i < b.vectors; i++) b.x[i] = rewards.x[i] + s.gamma * following.x[i] - values.x[i];
  if (s.factor != 0) {
    compose(a, b);
    for (int i = 0; i < b.vectors; i++) b.x[i] += a.x[i] * carry.advantage;
  }
  carry = {b.first(b.x[0]), b.fill(carried)};
  b.store(r);
  for (int i = from < 0 ? -from : 0; i < block; i++) {
    s.advantages[from + i] = counts[i] ? r[i] : T(0);
    s.returns[from + i] = counts[i] ? r[i] + v[i] : T(0);
  }
}

template <class T>
INLINE void scan_sequence(const Sequence<T>& given) {
  const Sequence<T> s = given;  // a local that no store can alias
  int64_t end = s.length;
  while (end > 0 && !s.mask[end - 1]) end--;
  std::memset(s.advantages + end, 0, (s.length - end) * sizeof(T));
  std::memset(s.returns + end, 0, (s.length - end) * sizeof(T));

  Block<T> powers, nothing;
  for (int i = 0; i < powers.vectors; i++) powers.x[i] = powers.fill(s.factor), nothing.x[i] = powers.fill(0);
  compose(powers, nothing);
  const bool contiguous = s.contiguous();
  Carry<T> carry = {powers.fill(0), powers.fill(s.last)};
  for (int64_t from = end - block; from > -block; from -= block) {
    for (; contiguous && from >= 0 && s.full(from); from -= block) full_block(s, from, powers, carry);
    if (from > -block) mixed_block(s, from, carry);
  }
}

}  // namespace
}  // namespace rlhf_fast::cpu
