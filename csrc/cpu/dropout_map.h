// Where attention and feed_forward find the decision of a column: column 32 J + 8 w + 2 t + e has half e of
// word w of the counter (4 J + t, row, ...). Word by word and t by t the halves lie in column order.
#pragma once

#include "philox_vec.h"

namespace fastformer::cpu::FASTFORMER_ISA {

// Columns that one call of drop_decisions serves: kLanes counters of eight decisions.
constexpr int kDecisionColumns = 8 * kLanes;

// decisions[kDecisionColumns]: [c] is that of column first + c; first is a multiple of 32.
static inline void drop_decisions(uint64_t seed, int64_t first, uint32_t c1, uint32_t c2, uint32_t c3,
                                  uint16_t* decisions) {
  const U32 c0 = (U32)lane_index() + (uint32_t)(first / 8);
  const PhiloxVectors words = philox4x32_7(seed, c0, splat(c1), splat(c2), splat(c3));
#pragma GCC unroll 4
  for (int w = 0; w < 4; ++w) {
#pragma GCC unroll 4
    for (int block = 0; block < kLanes / 4; ++block) {
      // Four counters (t = 0..3), two decisions each.
      __builtin_memcpy(decisions + 32 * block + 8 * w, (const char*)&words.w[w] + 16 * block, 16);
    }
  }
}

}  // namespace fastformer::cpu::FASTFORMER_ISA
