// How launchers put work on threads: torch's own pool, in one place.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "kernels.h"

namespace fastformer::cpu {

// Multiplications below which a second thread costs more than it saves.
constexpr int64_t kProductsPerThread = int64_t{1} << 20;

// body(begin, end) over parts of [0, count), none of them smaller than `grain` unless it is the last.
template <typename Body>
void parallel_for(int64_t count, int64_t grain, Body body) {
  torch::stable::parallel_for(0, count, std::max<int64_t>(grain, 1), body);
}

// kernel(queue) on as many workers as the work pays for; each takes items until none is left.
template <typename Kernel>
void run_items(int64_t items, int64_t products_of_item, Kernel kernel) {
  const int64_t grain = std::max<int64_t>(1, kProductsPerThread / std::max<int64_t>(products_of_item, 1));
  const int64_t workers = std::min<int64_t>(torch::stable::get_num_threads(), (items + grain - 1) / grain);
  WorkQueue queue{items};
  parallel_for(workers, 1, [&](int64_t, int64_t) { kernel(queue); });
}

}  // namespace fastformer::cpu
