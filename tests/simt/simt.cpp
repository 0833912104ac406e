// The scheduler of simt.hpp.
// SPDX-License-Identifier: Apache-2.0
#include "simt.hpp"

#include <numeric>

asm(R"(
.text
.globl simt_switch
.hidden simt_switch
.type simt_switch,@function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch, .-simt_switch
)");

namespace simt {

std::atomic<unsigned> seed{0};

// Set from the tests through ctypes: the order in which fibers and blocks run.
extern "C" [[gnu::visibility("default")]] void simt_set_seed(unsigned value) { seed = value; }

namespace {

// Where a fiber starts.
void run_fiber() {
  (*block->body)();
  self()->done = true;
  block->alive--;
  block->progress = true;
  for (;;) give_way();
}

void prepare(Block& b, int threads) {
  b.fibers.assign(threads, Fiber{});
  b.warps.assign((threads + warp_size - 1) / warp_size, Warp{});
  b.stacks.resize(stack_bytes * (threads + 1));  // the first is room for an overflow of the second
  b.order.resize(b.warps.size());
  std::iota(b.order.begin(), b.order.end(), 0);
  b.barrier = Meeting{};
  b.alive = threads;
  for (int i = 0; i < threads; i++) {
    Fiber& f = b.fibers[i];
    f.thread = {i % b.dim.x, i / b.dim.x % b.dim.y, i / (b.dim.x * b.dim.y)};
    f.lane = i % warp_size;
    f.warp = &b.warps[i / warp_size];
    char* stack = b.stacks.data() + stack_bytes * (i + 1);
    f.canary = reinterpret_cast<uint64_t*>(stack);
    *f.canary = canary;
    auto top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(stack + stack_bytes) & ~uintptr_t(15));
    *--top = nullptr;  // keeps the stack aligned as after a call
    *--top = reinterpret_cast<void*>(&run_fiber);
    for (int r = 0; r < 6; r++) *--top = nullptr;  // the registers that simt_switch restores
    f.stack_pointer = top;
  }
}

void check(const Block& b, bool progress) {
  if (!b.error.empty()) throw std::runtime_error(b.error);
  if (!progress && b.alive > 0) {
    throw std::runtime_error("simt: deadlock: a barrier or warp operation that not all threads reach");
  }
}

// Runs one fiber until it gives way.
void resume(Block& b, Fiber& f) {
  if (f.done || !b.error.empty()) return;
  fiber = &f;
  simt_switch(&b.scheduler, f.stack_pointer);
  if (*f.canary != canary) b.error = "simt: a thread's stack overflowed";
}

// With a seed the warps come in any order and one may get far ahead of the others, as on a GPU.
void run_block(Block& b, int threads) {
  prepare(b, threads);
  block = &b;
  std::minstd_rand random(seed + 1);
  while (b.alive > 0) {
    bool progress = false;
    if (seed != 0) std::shuffle(b.order.begin(), b.order.end(), random);
    for (int w : b.order) {
      const int first = w * warp_size, lanes = std::min(warp_size, threads - first);
      const int turn = seed == 0 ? 0 : random() % lanes;
      int passes = seed == 0 ? 1 : 1 + random() % 32;
      do {
        b.progress = false;
        for (int i = 0; i < lanes; i++) resume(b, b.fibers[first + (i + turn) % lanes]);
        progress |= b.progress;
      } while (b.progress && --passes > 0);
    }
    check(b, progress);
  }
}

}  // namespace

void launch(const std::function<void()>& body, Dim grid, Dim threads) {
  const int64_t blocks = grid.count();
  std::exception_ptr error;
#pragma omp parallel
  {
    Block b;
    b.body = &body;
    b.dim = threads;
    b.grid = grid;
#pragma omp for schedule(dynamic, 1)
    for (int64_t n = 0; n < blocks; n++) {
      const int64_t i = seed % 2 ? blocks - 1 - n : n;
      b.index = {unsigned(i % grid.x), unsigned(i / grid.x % grid.y), unsigned(i / (int64_t(grid.x) * grid.y))};
      try {
        run_block(b, static_cast<int>(threads.count()));
      } catch (...) {
#pragma omp critical
        error = std::current_exception();
      }
    }
  }
  if (error) std::rethrow_exception(error);
}

}  // namespace simt
