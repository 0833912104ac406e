// Ids that reach past the vocabulary, found before anything is read with them. SPDX-License-Identifier: Apache-2.0
#pragma once
#include "../rows.h"

namespace rlhf_fast::cpu {

// Throws std::out_of_range, Python's IndexError.
inline void check_ids(const char* op, const Choices& choices, int64_t rows, int64_t size) {
  for (int64_t i = 0; i < rows; i++) {
    if (!choices.counts(i)) continue;
    const int64_t id = choices.id(i);
    if (id < 0 || id >= size)
      throw std::out_of_range(std::string(op) + ": ids must be in [0, " + std::to_string(size) + "), got " +
                              std::to_string(id) + " in row " + std::to_string(i));
  }
}

}  // namespace rlhf_fast::cpu
