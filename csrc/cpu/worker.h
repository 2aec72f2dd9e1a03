// What a worker holds while it runs: its next item, its scratch, and how it treats denormals.
#pragma once

#include <new>

#include "kernels.h"
#include "vec.h"

namespace fastformer::cpu::FASTFORMER_ISA {
namespace {

// The next item of a call; queue.count or more where none is left.
FASTFORMER_INLINE int64_t take(WorkQueue& queue) {
  return __atomic_fetch_add(&queue.next, int64_t{1}, __ATOMIC_RELAXED);
}

// Denormal results and operands count as zero while this lives. Tiny probabilities and GELU tails are
// otherwise up to twenty times slower. The caller's setting comes back at the end.
struct FlushDenormals {
#if defined(__SSE2__)
  FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040u); }  // FTZ | DAZ
  ~FlushDenormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#else
  FlushDenormals() {}
  ~FlushDenormals() {}
#endif
  FlushDenormals(const FlushDenormals&) = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;
};

// Uninitialised float scratch of one worker, aligned to a cache line. Throws std::bad_alloc.
class Scratch {
 public:
  explicit Scratch(int64_t floats)
      : data_(static_cast<float*>(
            ::operator new(static_cast<size_t>(floats) * sizeof(float), std::align_val_t{64}))) {}
  ~Scratch() { ::operator delete(data_, std::align_val_t{64}); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  float* data() const { return data_; }

 private:
  float* data_;
};

// Hands out parts of one scratch, each on a cache line of its own. With memory null it only counts, so that
// one function says both how much is needed and where everything lies.
struct Parts {
  float* memory;
  int64_t used = 0;

  float* take(int64_t floats) {
    float* const part = memory ? memory + used : nullptr;
    used += (floats + 15) / 16 * 16;
    return part;
  }
};

}  // namespace
}  // namespace fastformer::cpu::FASTFORMER_ISA
