// The kernels of one ISA level, as function pointers: the only way from launch code into code that was
// compiled with -m flags.
#pragma once

#include "../shapes.h"

namespace fastformer::cpu {

// The items of a call, handed out one by one to whichever worker is free.
struct WorkQueue {
  int64_t count;
  int64_t next = 0;
};

// Columns of a product, of which a worker takes `width` at a time: a multiple of 32, the period of the
// dropout map, up to kGroupColumns.
struct ColumnQueue {
  int64_t columns, width;
  WorkQueue items;
};

// Kernels that need scratch throw std::bad_alloc where there is none.

struct NormKernels {
  void (*to_float32)(const void* source, DType dtype, float* target, int64_t count);
  void (*fwd)(const NormFwd& call, int64_t row_begin, int64_t row_end);
  // dweight and dbias [cols] receive the sums over these rows; null where they are not needed.
  void (*bwd)(const NormBwd& call, int64_t row_begin, int64_t row_end, float* dweight, float* dbias);
};

struct AttentionKernels {
  int64_t block_keys;  // of the passes after forward
  void (*fwd)(const AttentionFwd& call, WorkQueue& queue);
  // Backward: first the rows, whose delta the others read.
  void (*bwd_rows)(const AttentionBwd& call, WorkQueue& queue);
  void (*bwd)(const AttentionBwd& call, WorkQueue& queue);
  void (*score_sum)(const ScoreSum& call, WorkQueue& queue);
  // Elements [begin, end) of target = factor times the sum of shares that lie `stride` elements apart.
  void (*sum_shares)(const float* shares, int64_t share_count, int64_t stride, float factor, DType dtype,
                     void* target, int64_t begin, int64_t end);
};

struct FeedForwardKernels {
  // In bytes: what elements of `dtype` are multiplied as, float32 or narrower.
  int64_t (*operand_size)(DType dtype);
  // Operands of rows of a matrix of `dtype`, with zeros up to `stride`; the last rows bring the padding.
  void (*pack_rows)(const RowMatrix& matrix, DType dtype, int64_t padded_rows, void* operands, int64_t stride,
                    int64_t row_begin, int64_t row_end);
  // The stages of one block of rows, in this order, x_operands packed.
  void (*hidden)(const FeedForwardFwd& call, ColumnQueue& queue);
  void (*output)(const FeedForwardFwd& call, ColumnQueue& queue);

  // operands[columns, stride] = the transpose, with zeros from matrix.rows to whole registers.
  void (*pack_transposed)(const RowMatrix& matrix, DType dtype, void* operands, int64_t stride,
                          int64_t column_begin, int64_t column_end);
  // sums[columns] += those of a matrix of `dtype`.
  void (*column_sums)(const RowMatrix& matrix, DType dtype, double* sums, int64_t column_begin,
                      int64_t column_end);
  // Columns of hidden, dpre and dgate, and of db1 and db_gate; of dx, which reads these; of one dw.
  void (*hidden_bwd)(const FeedForwardBwd& call, ColumnQueue& queue);
  void (*input_bwd)(const FeedForwardBwd& call, ColumnQueue& queue);
  void (*weight_bwd)(const WeightGradient& gradient, ColumnQueue& queue);
  void (*from_float64)(const double* source, DType dtype, void* target, int64_t count);
};

struct Kernels {
  const char* level;
  const NormKernels& norm;
  const AttentionKernels& attention;
  const FeedForwardKernels& feed_forward;
  // See peak.h.
  double (*run_fma)(int64_t rounds, float& sum);
};

// One for each level that the build compiled.
extern const Kernels kernels_avx512bf16;  // avx512 and vdpbf16ps
extern const Kernels kernels_avx512;
extern const Kernels kernels_avx2;
extern const Kernels kernels_sse2;      // x86-64 without further flags
extern const Kernels kernels_baseline;  // every other machine

#if defined(FASTFORMER_ISA)
// The parts of one level's table, each from its own kernels_*.cpp.
namespace FASTFORMER_ISA {
extern const NormKernels norm_kernels;
extern const AttentionKernels attention_kernels;
extern const FeedForwardKernels feed_forward_kernels;
}  // namespace FASTFORMER_ISA
#endif

}  // namespace fastformer::cpu
