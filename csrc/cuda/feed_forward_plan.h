// What feed_forward's kernels are told, and which grid a product gets. Neither torch nor CUDA: the launcher
// and the tests, which have no GPU, read the choice from here.
//
// Budget of the hot loop, by mma.m16n8k16 (2048 multiply-adds of a warp, 8 cycles of a quarter of an A100).
// Four warps share 128 x 128 sums; a warp's 64 x 64 take 128 of a thread's registers. For each 16 of k it
// brings 64 rows of either operand by eight ldmatrix and makes 32 products of them: 128 bytes of shared
// memory a product. The block's copies write 16 KB for 256 products, 64 bytes each. So four quarters ask for
// 768 bytes in 8 cycles, of the 1024 that there are. (Eight warps of 64 x 32 sums would ask for all 1024.) A
// step of 32 of k is 64 products, 16 ldmatrix, 8 copies, 16 slots for the copies' addresses, and about 20 for
// fragments' addresses, predicates, the barrier and the loop: 0.95 slots beside a product, whose own 8 cycles
// hide them. (ptxas: 0.94, and up to 1.12 where the rows of operands are k.) Fragments of the next 16 of k
// are loaded while these are multiplied, across the barrier too. ptxas sets those loads one product apart,
// and shared memory takes two products' time for each, so that one warp a quarter keeps tensor cores busy for
// 0.73 of the time. Three stages are 48 KB: two blocks share any chip's multiprocessor, and one multiplies
// while the other waits, or finishes its sums.
//
// Float32 goes by the same tile, in steps of 16 of k, and three products m16n8k8 of its parts take the place
// of one: 24 cycles for 1024 multiply-adds, where an A100's own multiply-adds take 64. A warp's eight of k
// are 96 products of parts, and beside them 128 additions of their sums, 96 instructions that split 32 words,
// 8 ldmatrix (or a load for each word where rows are k), 4 copies and about 30 for addresses, branches and
// the barrier: 2.8 slots a product, whose own 8 cycles hide them. (ptxas: 2.8, and 3.1 where the rows of both
// are k.) Shared memory is asked for a quarter of what there is. 128 registers of sums, 44 of parts and 16 of
// sums of eight leave none for the columns of the next eight of k, which are loaded when these are done.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "norm_plan.h"

namespace fastformer::cuda {

// The products that feed_forward is made of, c [M, N] over k, and what becomes of c.
enum class GemmKernel : int32_t {
  kHidden,          // x w1^T beside x w_gate^T: bias, activation, gate and dropout
  kLinear,          // hidden w2^T + b2
  kHiddenGradient,  // grad_out w2: what backward wants of hidden rows
  kInputGradient,   // dpre w1 + dgate w_gate
  kWeightGradient   // dpre^T x, grad_out^T hidden
};

inline const char* name_of(GemmKernel kernel) {
  switch (kernel) {
    case GemmKernel::kHidden:
      return "feed_forward_kernel (hidden)";
    case GemmKernel::kLinear:
      return "feed_forward_kernel (linear)";
    case GemmKernel::kHiddenGradient:
      return "feed_forward_kernel (hidden gradient)";
    case GemmKernel::kInputGradient:
      return "feed_forward_kernel (input gradient)";
    case GemmKernel::kWeightGradient:
      return "feed_forward_kernel (weight gradient)";
  }
  return "unknown kernel";
}

// Whether the rows of a, or of b, are k: [K, M] instead of [M, K].
constexpr bool has_k_rows_a(GemmKernel kernel) { return kernel == GemmKernel::kWeightGradient; }

constexpr bool has_k_rows_b(GemmKernel kernel) {
  return kernel != GemmKernel::kHidden && kernel != GemmKernel::kLinear;
}

// Rows of the call's dtype, contiguous, `stride` elements apart. data null: no operand.
struct GemmOperand {
  const void* data;
  int64_t stride;
};

// Matrices [M, N] are contiguous, of the call's dtype, and null where they are not wanted.
struct GemmParams {
  GemmOperand a;          // [M, K] or [K, M]
  GemmOperand b;          // [N, K] or [K, N]
  GemmOperand gate;       // kHidden: as b; its product opens b's
  GemmOperand a2;         // kInputGradient: another product of the same sizes, which is added
  GemmOperand b2;         // its right side
  const void* bias;       // kHidden, kLinear: [N] or null: 0
  const void* gate_bias;  // kHidden: [N] or null: 0
  const uint64_t* seed;   // [1]; read if threshold > 0
  void* out;              // what the kernel is for; kHiddenGradient: hidden, as w2 met it
  void* pre;              // kHidden writes x w1^T + b1, kHiddenGradient reads it
  void* pre_gate;         // the same of w_gate; null without a gate
  void* dpre;             // kHiddenGradient: the gradient of pre
  void* dgate;            // of pre_gate
  float* dpre_sums;       // kHiddenGradient: sums of dpre over a tile's rows, [tiles_m, N]
  float* dgate_sums;      // of dgate
  float* parts;           // [parts, M, N]: shares of the sum over k, instead of out; null if there is one
  int32_t M;
  int32_t N;
  int32_t K;
  DType dtype;
  Activation activation;
  uint32_t threshold;  // a 16-bit decision keeps its element iff it is >= threshold; 0: no dropout
  float scale;         // of what is kept
  int32_t gated;       // kHidden: there is a gate, whose data is null where K is 0
  // Set by the plan:
  int32_t aligned_a;  // rows come in whole aligned units of 16 bytes
  int32_t aligned_b;
  int32_t aligned_c;  // of every matrix [M, N]; of float32 in units of two elements
  int32_t tiles_m;
  int32_t tiles_n;
  int32_t depth;  // of k, that one part has
};

constexpr int kGemmBlock = 128;  // rows and columns of a block's sums
constexpr int kGemmHalf = 64;    // columns of a gated block, whose other half is the gate's
constexpr int kStepBytes = 64;   // of k
constexpr int kGemmStages = 3;   // steps in shared memory at a time
constexpr int kGemmThreads = 128;
constexpr int kGemmBlocks = 2;   // that share a multiprocessor
constexpr int kGemmGroup = 8;    // tiles of rows that run side by side
constexpr int kFewProducts = 8;  // that float32 adds one by one
// Of a part; below, another part costs more than it brings.
constexpr int kLeastDepth = 512;

constexpr int kOperandBytes = kGemmBlock * kStepBytes;  // of one step
constexpr int kStageBytes = 2 * kOperandBytes;
// All that a kernel may have without being allowed more.
constexpr int kGemmSharedBytes = kGemmStages * kStageBytes;
static_assert(kGemmSharedBytes <= 48 << 10);

// Of 16 bytes.
constexpr int elements_of_unit(DType dtype) { return dtype == DType::kFloat32 ? 4 : 8; }

// Of k.
constexpr int gemm_step(DType dtype) { return kStepBytes / 16 * elements_of_unit(dtype); }

// No size of a product is larger, so that places a tile past an end are still 32-bit numbers.
constexpr int64_t kMostGemmSize = (int64_t{1} << 31) - (int64_t{1} << 16);

struct GemmPlan {
  uint32_t grid;  // empty where there is nothing to do
  uint32_t threads;
  uint32_t shared_bytes;
  int32_t parts;  // of k; of more than one, the sums in `parts` are still to be added
};

// Sets the last fields of p. Parts depend on `multiprocessors`, so that the same device always adds in the
// same order.
inline GemmPlan plan_gemm(GemmKernel kernel, GemmParams& p, int multiprocessors) {
  const int64_t width_a = has_k_rows_a(kernel) ? p.M : p.K, width_b = has_k_rows_b(kernel) ? p.N : p.K;
  const auto has_aligned_rows = [&](const GemmOperand& operand, int64_t width, int unit) {
    return aligned(operand.data, operand.stride, p.dtype, width, unit);
  };
  const int unit = elements_of_unit(p.dtype), unit_c = p.dtype == DType::kFloat32 ? 2 : unit;
  p.aligned_a = has_aligned_rows(p.a, width_a, unit) && has_aligned_rows(p.a2, width_a, unit);
  p.aligned_b = has_aligned_rows(p.b, width_b, unit) && has_aligned_rows(p.gate, width_b, unit) &&
                has_aligned_rows(p.b2, width_b, unit);
  p.aligned_c = 1;
  for (const void* const matrix : {p.out, p.pre, p.pre_gate, p.dpre, p.dgate}) {
    if (!has_aligned_rows({matrix, p.N}, p.N, unit_c)) p.aligned_c = 0;
  }
  p.tiles_m = static_cast<int32_t>(ceil_div(p.M, kGemmBlock));
  p.tiles_n = static_cast<int32_t>(ceil_div(p.N, p.gated ? kGemmHalf : kGemmBlock));
  const int64_t tiles = int64_t{p.tiles_m} * p.tiles_n, steps = ceil_div(p.K, gemm_step(p.dtype));
  int64_t parts = 1;
  // What comes after the other products needs the whole sum.
  if (kernel != GemmKernel::kHidden && kernel != GemmKernel::kHiddenGradient && tiles > 0) {
    const int64_t idle = int64_t{kGemmBlocks} * multiprocessors / tiles;
    const int64_t most = p.K / kLeastDepth < idle ? p.K / kLeastDepth : idle;
    if (most > 1) parts = most;
  }
  const int64_t steps_of_part = ceil_div(steps, parts);
  if (steps_of_part > 0) parts = ceil_div(steps, steps_of_part);
  p.depth = static_cast<int32_t>(steps_of_part * gemm_step(p.dtype));
  GemmPlan plan{};
  plan.grid = static_cast<uint32_t>(tiles * parts);
  plan.threads = kGemmThreads;
  plan.shared_bytes = kGemmSharedBytes;
  plan.parts = static_cast<int32_t>(parts);
  return plan;
}

// out[part] = the sums of a matrix's columns over `depth` rows: gradients of biases, and parts of a product.
struct ColumnSumsParams {
  const void* matrix;  // [rows, columns]
  void* out;           // [parts, columns] contiguous
  int64_t stride;      // of rows, in elements
  int64_t rows;
  int64_t columns;
  int64_t depth;  // set by the plan
  DType dtype;
  DType out_dtype;
};

constexpr int kSumThreads = 256;
constexpr int kSumLines = 8;  // rows that a block adds side by side

struct ColumnSumsPlan {
  uint32_t grid_x, grid_y;  // of columns, and the parts: of more than one, float32 sums are added once more
  uint32_t block_x, block_y;
};

// Sets p.depth. The order of additions depends on sizes alone.
inline ColumnSumsPlan plan_column_sums(ColumnSumsParams& p) {
  constexpr int64_t kFewRows = 8 * kSumLines, kRowsOfPart = 1024, kMostParts = 64;
  ColumnSumsPlan plan{};
  plan.block_y = p.rows <= kFewRows ? 1 : kSumLines;
  plan.block_x = kSumThreads / plan.block_y;
  const int64_t wanted = ceil_div(p.rows, kRowsOfPart);
  const int64_t parts = wanted < 1 ? 1 : wanted < kMostParts ? wanted : kMostParts;
  p.depth = ceil_div(p.rows, parts);
  plan.grid_x = static_cast<uint32_t>(ceil_div(p.columns, plan.block_x));
  plan.grid_y = static_cast<uint32_t>(p.depth == 0 ? 1 : ceil_div(p.rows, p.depth));
  return plan;
}

}  // namespace fastformer::cuda
