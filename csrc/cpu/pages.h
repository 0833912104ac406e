// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstddef>
#include <cstdint>
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace rlhf_fast::cpu {

// A large tensor is fresh memory: its pages are mapped one by one as they are written, and with 4 KB pages that takes
// several times as long as the writing. Advice only; the kernel may ignore it, and nothing is changed in the bytes.
inline void ask_for_huge_pages(void* data, size_t bytes) {
#ifdef __linux__
  constexpr uintptr_t huge = uintptr_t(2) << 20;
  const uintptr_t from = reinterpret_cast<uintptr_t>(data), first = (from + huge - 1) / huge * huge;
  const uintptr_t last = (from + bytes) / huge * huge;
  if (bytes >= 4 * huge && first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace rlhf_fast::cpu
