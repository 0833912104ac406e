// What both host functions of gae, on the CPU and on CUDA, ask of their arguments. SPDX-License-Identifier: Apache-2.0
#pragma once
#include <algorithm>
#include <stdexcept>
#include <string>

#include "ops.h"

namespace rlhf_fast {

// Throws std::invalid_argument, Python's ValueError. The public function has seen to all of this already, but
// torch.ops.rlhf_fast.gae and users without torch come here directly, and a wrong dtype would be a wrong address.
inline void check_gae(const View& rewards, const View& values, const View& mask, const View& last_values,
                      const View& cu_seqlens, const std::string& holes, const View& advantages, const View& returns) {
  const auto require = [](bool holds, const char* rule) {
    if (!holds) throw std::invalid_argument(std::string("gae: ") + rule);
  };
  const bool packed = !cu_seqlens.absent();
  require(rewards.dims == (packed ? 1 : 2), "rewards must be [B, T], or [N] with cu_seqlens");
  require(rewards.dtype == Dtype::float32 || rewards.dtype == Dtype::float64, "rewards must be float32 or float64");
  for (const View* view : {&values, &mask, &advantages, &returns}) {
    require(view->dims == rewards.dims && std::equal(view->shape, view->shape + view->dims, rewards.shape),
            "values, mask and outputs must have the shape of rewards");
  }
  for (const View* view : {&values, &advantages, &returns}) {
    require(view->dtype == rewards.dtype, "values and outputs must have the dtype of rewards");
  }
  require(mask.dtype == Dtype::boolean, "mask must be bool");
  require(!packed || (cu_seqlens.dims == 1 && cu_seqlens.shape[0] > 0), "cu_seqlens must be [B+1]");
  require(!packed || cu_seqlens.dtype == Dtype::int32 || cu_seqlens.dtype == Dtype::int64,
          "cu_seqlens must be int32 or int64");
  const int64_t sequences = packed ? cu_seqlens.shape[0] - 1 : rewards.shape[0];
  require(!last_values || (last_values.dims == 1 && last_values.shape[0] == sequences), "last_values must be [B]");
  require(!last_values || last_values.dtype == rewards.dtype, "last_values must have the dtype of rewards");
  require_contiguous("gae", {&advantages, &returns});
  require(holes == "skip" || holes == "zero", "holes must be skip or zero");
}

}  // namespace rlhf_fast
