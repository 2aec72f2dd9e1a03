// The kernels of one ISA level, as function pointers: the only way from launch code into code that was
// compiled with -m flags.
#pragma once

#include "../shapes.h"

namespace fastformer::cpu {

struct Kernels {
  const char* level;

  void (*to_float32)(const void* source, DType dtype, float* target, int64_t count);
  void (*norm_fwd)(const NormFwd& call, int64_t row_begin, int64_t row_end);
  // dweight and dbias [cols] receive the sums over these rows; null where they are not needed.
  void (*norm_bwd)(const NormBwd& call, int64_t row_begin, int64_t row_end, float* dweight, float* dbias);

  // False when there is no memory for scratch.
  bool (*attention_fwd)(const AttentionFwd& call, int64_t item_begin, int64_t item_end);

  // In bytes: what x and the hidden rows are multiplied as, float32 or narrower.
  int64_t (*feed_forward_operand_size)(DType dtype);
  // The stages of one block of rows, in this order; the last two as attention_fwd.
  void (*feed_forward_pack)(const FeedForwardFwd& call, int64_t row_begin, int64_t row_end);
  bool (*feed_forward_hidden)(const FeedForwardFwd& call, int64_t column_begin, int64_t column_end);
  bool (*feed_forward_output)(const FeedForwardFwd& call, int64_t column_begin, int64_t column_end);
};

// One for each level that the build compiled.
extern const Kernels kernels_avx512bf16;  // avx512 and vdpbf16ps
extern const Kernels kernels_avx512;
extern const Kernels kernels_avx2;
extern const Kernels kernels_sse2;      // x86-64 without further flags
extern const Kernels kernels_baseline;  // every other machine

}  // namespace fastformer::cpu
