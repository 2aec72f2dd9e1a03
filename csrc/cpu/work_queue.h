// Taking items from a call's queue.
#pragma once

#include "kernels.h"
#include "vec.h"

namespace fastformer::cpu::FASTFORMER_ISA {

// The next item; queue.count or more where none is left.
FASTFORMER_INLINE int64_t take(WorkQueue& queue) {
  return __atomic_fetch_add(&queue.next, int64_t{1}, __ATOMIC_RELAXED);
}

}  // namespace fastformer::cpu::FASTFORMER_ISA
