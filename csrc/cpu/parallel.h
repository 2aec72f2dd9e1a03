// How launchers put work on threads: torch's own pool, in one place.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "kernels.h"

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif

namespace fastformer::cpu {

#if defined(__SANITIZE_THREAD__)

// Under ThreadSanitizer every call is cut as finely as it can be, or the tests' small ones would race nobody.
constexpr int64_t kProductsPerThread = 1;
constexpr int64_t kElementsPerThread = 1;

// The order that OpenMP's barriers make, which ThreadSanitizer does not see: a worker comes after the
// caller's start, and the caller's end after every worker. Workers stay unordered among themselves, so that a
// race between two of them is found.
template <typename Body>
class Region {
 public:
  explicit Region(const Body& body) : body_(body) {}

  void run(int64_t count) const {
    __tsan_release(&start_);
    torch::stable::parallel_for(0, count, 1, *this);
    __tsan_acquire(&end_);
  }

  // Nothing may be read before the worker has come after the start, not even body_.
  void operator()(int64_t begin, int64_t end) const {
    __tsan_acquire(&start_);
    body_(begin, end);
    __tsan_release(&end_);
  }

 private:
  const Body& body_;
  mutable char start_ = 0, end_ = 0;
};

template <typename Body>
void parallel_for(int64_t count, int64_t /*grain*/, Body body) {
  Region<Body>(body).run(count);
}

#else

// Multiplications, and elements read or written, below which a second thread costs more than it saves.
constexpr int64_t kProductsPerThread = int64_t{1} << 20;
constexpr int64_t kElementsPerThread = 32768;

// body(begin, end) over parts of [0, count), none of them smaller than `grain` unless it is the last.
template <typename Body>
void parallel_for(int64_t count, int64_t grain, Body body) {
  torch::stable::parallel_for(0, count, std::max<int64_t>(grain, 1), body);
}

#endif

// kernel(queue) on as many workers as the work pays for; each takes items until none is left.
template <typename Kernel>
void run_items(int64_t items, int64_t products_of_item, Kernel kernel) {
  const int64_t grain = std::max<int64_t>(1, kProductsPerThread / std::max<int64_t>(products_of_item, 1));
  const int64_t workers = std::min<int64_t>(torch::stable::get_num_threads(), (items + grain - 1) / grain);
  WorkQueue queue{items};
  parallel_for(workers, 1, [&](int64_t, int64_t) { kernel(queue); });
}

}  // namespace fastformer::cpu
