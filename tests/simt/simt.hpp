// Runs CUDA source on the CPU: compile it as C++ with -DRLHF_FAST_SIMT, and this stands in for the CUDA runtime.
// SPDX-License-Identifier: Apache-2.0
//
// Every CUDA thread of a block is a fiber with a stack of its own. Fibers run one at a time and give way only at a
// barrier or a warp operation; blocks are spread over the cores. What this finds: wrong numbers, a missing barrier (the
// order of the warps and how far one gets ahead are drawn from a seed, see simt.cpp), a barrier or warp operation that
// not all threads reach, or that threads reach at different places of the source. What it does not model: races in
// general, warp operations on part of a warp (an error here), memory ordering between blocks, alignment. x86-64 and the
// System V ABI only.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

namespace simt {

constexpr int warp_size = 32;
constexpr size_t stack_bytes = 32 * 1024;
constexpr uint64_t canary = 0x5afe5afe5afe5afeull;  // at the far end of each stack

struct Index {
  unsigned x, y, z;
};

struct Dim {
  unsigned x, y, z;
  Dim(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}  // NOLINT: as CUDA's dim3
  int64_t count() const { return int64_t(x) * y * z; }
};

// A meeting point: the threads that have arrived, and where in the source the first of them did.
struct Meeting {
  int arrived = 0;
  unsigned generation = 0;
  int place = -1;
};

struct Warp {
  Meeting meeting;
  uint64_t slots[2][warp_size];  // by parity of the generation: read in one while the next is being written
};

struct Fiber {
  void* stack_pointer = nullptr;
  Index thread{};
  int lane = 0;
  Warp* warp = nullptr;
  uint64_t* canary = nullptr;
  bool done = false;
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<char> stacks;
  std::vector<int> order;     // of the warps
  void* scheduler = nullptr;  // its stack pointer while a fiber runs
  const std::function<void()>* body = nullptr;
  Index index{};
  Dim dim, grid;
  Meeting barrier;
  int alive = 0;
  bool progress = false;
  std::string error;
};

extern std::atomic<unsigned> seed;  // simt.cpp

inline thread_local Block* block = nullptr;
inline thread_local Fiber* fiber = nullptr;

// Saves the callee-saved registers and the stack pointer, and goes on where `load` was saved.
extern "C" void simt_switch(void** save, void* load);

// Not inlined, so that no compiler keeps the answer across a switch.
[[gnu::noinline]] inline Fiber* self() {
  asm volatile("" ::: "memory");
  return fiber;
}

inline void give_way() { simt_switch(&self()->stack_pointer, block->scheduler); }

// Ends the block with an error: exceptions cannot cross a switch, so the scheduler throws it.
[[noreturn]] inline void fail(const std::string& what) {
  if (block->error.empty()) block->error = "simt: " + what;
  for (;;) give_way();
}

// Waits until all `expected` threads have come to the same place.
inline void meet(Meeting& meeting, const std::function<int()>& expected, int place, const char* what) {
  const unsigned generation = meeting.generation;
  if (meeting.arrived == 0) meeting.place = place;
  if (meeting.place != place) fail(std::string("threads meet in different ") + what + "s");
  meeting.arrived++;
  block->progress = true;
  while (meeting.generation == generation) {
    if (meeting.arrived >= expected()) {
      meeting.arrived = 0;
      meeting.generation++;
      block->progress = true;
    } else {
      give_way();
    }
  }
}

inline void barrier(int place) {
  meet(block->barrier, [] { return block->alive; }, place, "barrier");
}

// Each lane of the warp gives a value; returns all 32. `mask` must name the whole warp.
template <class T>
const uint64_t* exchange(unsigned mask, T value, int place) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "a warp operation moves at most 8 bytes");
  Fiber* me = self();
  if (mask != 0xffffffffu) fail("a warp operation on part of a warp");
  uint64_t* slots = me->warp->slots[me->warp->meeting.generation % 2];
  std::memcpy(&slots[me->lane], &value, sizeof(T));
  meet(me->warp->meeting, [] { return warp_size; }, place, "warp operation");
  return slots;
}

template <class T>
T shuffle(unsigned mask, T value, int source, int place) {
  T result;
  std::memcpy(&result, &exchange(mask, value, place)[source % warp_size], sizeof(T));
  return result;
}

inline unsigned ballot(unsigned mask, bool predicate, int place) {
  const uint64_t* slots = exchange(mask, uint64_t(predicate), place);
  unsigned result = 0;
  for (int lane = 0; lane < warp_size; lane++) result |= unsigned(slots[lane] != 0) << lane;
  return result;
}

inline int largest(unsigned mask, int value, int place) {
  const uint64_t* slots = exchange(mask, value, place);
  for (int lane = 0; lane < warp_size; lane++) value = std::max(value, static_cast<int>(slots[lane]));
  return value;
}

inline int lane() { return self()->lane; }

// Runs `body` once per thread of `grid` x `threads` and returns when all are done; throws what a block failed with.
void launch(const std::function<void()>& body, Dim grid, Dim threads);

}  // namespace simt

#include "cuda_words.hpp"
