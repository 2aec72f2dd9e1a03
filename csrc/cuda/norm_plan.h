// What a norm kernel is told, and which kernel serves a call on which grid. Neither torch nor CUDA: the
// launcher and the tests, which have no GPU, read the choice from here.
//
// Budget. An SM of an H100 gets about 3.4 bytes from DRAM in the time in which each of its schedulers issues
// an instruction; half of the issue slots idle in practice, so we aim at 7 bytes moved per instruction. A
// 16-bit layer norm moves 4 bytes a column and spends 8.5 lane instructions on it: 3 conversions and a half
// (x, weight, bias, out), add, subtract, fused square, scale, fused weight and bias. That is 15 bytes a slot
// before all that a warp does once, in 120 to 180 slots: addresses, two reductions, statistics. So a lane
// should bring 32 columns, or up to 64 where a second warp would bring few; what was compiled then moves 7.0
// to 9.8 bytes a slot (tests/gates counts them). Backward a lane has room for 16 columns beside their shares
// of two gradients: 6.8 to 9.2. Bytes in flight: 3.35 TB/s at 0.7 us latency is 18 KB an SM, and the 16 warps
// that 128 registers allow ask for 2 KB of x each before they wait.
#pragma once

#include <cstdint>

#include "../shapes.h"

namespace fastformer::cuda {

// out = norm(s) * weight + bias, s = residual + dropout(x), row by row. Strides count elements.
struct NormFwdParams {
  const void* x;         // [rows, columns], columns contiguous
  const void* residual;  // [rows, columns] or null: s is x
  const void* weight;    // [columns] or null: 1
  const void* bias;      // [columns] or null: 0
  const uint64_t* seed;  // [1]; read if threshold > 0
  void* out;             // [rows, columns] contiguous
  void* sum;             // s, as out; read only with residual
  float* mean;           // [rows]; null for rms
  float* rstd;           // [rows]
  int64_t rows;
  int64_t x_stride;
  int64_t residual_stride;
  int32_t columns;
  DType x_dtype;
  DType residual_dtype;
  DType weight_dtype;
  DType bias_dtype;
  DType out_dtype;  // of sum too
  float eps;
  uint32_t threshold;  // a 16-bit decision keeps its element iff it is >= threshold; 0: no dropout
  float scale;         // of what is kept
  float share;         // set by the plan: of a column in a mean
  int32_t rms;
  int32_t vector;  // set by the plan: rows and parameters may be read a unit at a time
};

// ds = norm'(s) grad_out + grad_sum, dx = dropout'(ds), dweight and dbias summed over the rows.
struct NormBwdParams {
  const void* grad_out;  // [rows, columns], columns contiguous
  const void* grad_sum;  // as grad_out, or null
  const void* s;         // [rows, columns]
  const void* weight;    // [columns] or null: 1
  const float* mean;     // [rows]; null for rms
  const float* rstd;     // [rows]
  const uint64_t* seed;  // [1]; read if threshold > 0
  void* ds;              // [rows, columns] contiguous
  void* dx;              // as ds; written if threshold > 0
  float* partial;        // [partial_rows, 2, partial_stride]: shares of dweight and dbias; null: not wanted
  float* dweight;        // [columns] or null: not wanted
  float* dbias;          // [columns] or null: not wanted
  int64_t rows;
  int64_t grad_out_stride;
  int64_t grad_sum_stride;
  int64_t s_stride;
  int32_t columns;
  int32_t partial_rows;    // set by the plan
  int32_t partial_stride;  // set by the plan: columns rounded up, so that every share is whole 16-byte words
  DType grad_out_dtype;
  DType grad_sum_dtype;
  DType s_dtype;  // of ds and dx too
  DType weight_dtype;
  uint32_t threshold;
  float scale;
  float share;
  int32_t rms;
  int32_t vector;  // set by the plan
};

// A thread's columns come in units: 16 bytes of one row, 8 columns of a 16-bit type and 4 of float32. Kernels
// that take any mix of types use units of 4, which are whole sectors in every type.
constexpr int kWideUnit = 8;
constexpr int kNarrowUnit = 4;

constexpr int kWarp = 32;
constexpr int kMaxThreads = 512;  // leaves 128 registers a thread
constexpr int kMaxWarps = kMaxThreads / kWarp;
constexpr int kKeptColumns = 32;  // that a thread of kBwdKeptWide holds at most
constexpr int kReduceLines = 16;  // shares of dweight and dbias that a block adds side by side

enum class NormKernel : int32_t {
  kFwdKept,      // the row in registers; aligned, x and residual of one type, parameters of it or float32
  kFwdAny,       // the row in registers, up to 32 columns a thread, any types and alignment
  kFwdWide,      // rows that no register file holds are read three times, from L2 after the first
  kBwdKept,      // ds and shares of dweight, dbias in one pass, up to 16 columns a thread; aligned, one type
  kBwdKeptWide,  // the same in 16 bits, up to 32 columns a thread, of which it opens the row twice
  kBwdAny,       // ds alone, the row read twice
  kBwdColumns,   // shares of dweight and dbias alone
  kBwdReduce     // their sums
};

inline const char* name_of(NormKernel kernel) {
  switch (kernel) {
    case NormKernel::kFwdKept:
      return "norm_fwd_kept_kernel";
    case NormKernel::kFwdAny:
      return "norm_fwd_any_kernel";
    case NormKernel::kFwdWide:
      return "norm_fwd_wide_kernel";
    case NormKernel::kBwdKept:
      return "norm_bwd_kept_kernel";
    case NormKernel::kBwdKeptWide:
      return "norm_bwd_kept_wide_kernel";
    case NormKernel::kBwdAny:
      return "norm_bwd_any_kernel";
    case NormKernel::kBwdColumns:
      return "norm_bwd_columns_kernel";
    case NormKernel::kBwdReduce:
      return "norm_bwd_reduce_kernel";
  }
  return "unknown kernel";
}

struct NormPlan {
  NormKernel kernel;
  int32_t thread_columns;  // of kFwdKept, which has an instantiation for each
  uint32_t grid_x, grid_y;
  uint32_t block_x, block_y;  // block_x threads share a row, block_y rows share a block
  uint32_t shared_bytes;      // dynamic
};

inline int unit_of(DType dtype) { return dtype == DType::kFloat32 ? kNarrowUnit : kWideUnit; }

// Whether every unit of `unit` columns lies within rows that start on its own size.
inline bool aligned(const void* base, int64_t stride, DType dtype, int64_t columns, int unit) {
  const int64_t unit_bytes = unit * size_of(dtype) < 16 ? unit * size_of(dtype) : 16;
  return base == nullptr || (reinterpret_cast<uintptr_t>(base) % unit_bytes == 0 &&
                             stride * size_of(dtype) % unit_bytes == 0 && columns % unit == 0);
}

// Threads a row: a power of two within a warp, so that a shuffle by exclusive or stays inside the row, of at
// most `in_a_warp` columns each; or whole warps.
inline uint32_t threads_per_row(int64_t columns, int in_a_warp, int columns_per_thread) {
  if (columns > kWarp * columns_per_thread) {
    const int64_t warps = ceil_div(columns, kWarp * columns_per_thread);
    return static_cast<uint32_t>(kWarp * (warps < kMaxWarps ? warps : kMaxWarps));
  }
  // Two, so that what they read side by side is a whole sector of 32 bytes.
  uint32_t threads = columns > kWideUnit ? 2 : 1;
  while (threads < kWarp && threads * in_a_warp < columns) threads *= 2;
  return threads;
}

// Columns that a thread of kFwdKept holds at most.
constexpr int kThreadColumns[] = {32, 48, 64};

// Which of these costs least. What every warp does besides takes as long as 16 columns. Of float32 a column
// is twice the bytes.
inline int best_thread_columns(int64_t columns, DType dtype) {
  int best = kThreadColumns[0];
  if (dtype == DType::kFloat32) return best;
  const auto cost = [&](int each) { return ceil_div(columns, kWarp * each) * (each + 16); };
  for (const int each : kThreadColumns) {
    if (cost(each) < cost(best)) best = each;
  }
  return best;
}

inline NormPlan plan_norm_fwd(NormFwdParams& p) {
  // Four rows a block when a warp or less holds a row: a block per row would wait for its slowest load alone.
  constexpr uint32_t kBlock = 128;
  const auto rows_aligned = [&](int unit) {
    return aligned(p.x, p.x_stride, p.x_dtype, p.columns, unit) &&
           aligned(p.residual, p.residual_stride, p.residual_dtype, p.columns, unit) &&
           aligned(p.weight, 0, p.weight_dtype, p.columns, unit) &&
           aligned(p.bias, 0, p.bias_dtype, p.columns, unit);
  };
  if (p.weight == nullptr) p.weight_dtype = p.bias == nullptr ? p.x_dtype : p.bias_dtype;
  const bool few_types = (p.residual == nullptr || p.residual_dtype == p.x_dtype) &&
                         (p.bias == nullptr || p.bias_dtype == p.weight_dtype) &&
                         (p.weight_dtype == p.x_dtype || p.weight_dtype == DType::kFloat32);
  const int own_unit = unit_of(p.x_dtype);
  p.share = 1.0f / static_cast<float>(p.columns);
  NormPlan plan{};
  if (p.columns > kMaxThreads * 32) {
    plan.kernel = NormKernel::kFwdWide;
    p.vector = rows_aligned(kNarrowUnit);
    plan.block_x = kMaxThreads;
  } else if (few_types && rows_aligned(own_unit)) {
    plan.kernel = NormKernel::kFwdKept;
    p.vector = 1;
    plan.thread_columns = best_thread_columns(p.columns, p.x_dtype);
    plan.block_x = threads_per_row(p.columns, plan.thread_columns, plan.thread_columns);
  } else {
    plan.kernel = NormKernel::kFwdAny;
    p.vector = rows_aligned(kNarrowUnit);
    plan.block_x = threads_per_row(p.columns, kNarrowUnit, 32);
  }
  plan.block_y = plan.block_x < kBlock && plan.block_x <= kWarp ? kBlock / plan.block_x : 1;
  plan.grid_x = static_cast<uint32_t>(ceil_div(p.rows, plan.block_y));
  plan.grid_y = 1;
  return plan;
}

// The backward pass of one call, kernel after kernel; those whose grid is empty have nothing to do.
struct NormBwdPlan {
  NormPlan ds;
  NormPlan columns;
  NormPlan reduce;  // blocks of 32 columns by up to kReduceLines shares
};

// Sets p.vector, partial_rows and partial_stride. The shares depend on `multiprocessors`, so that the same
// device always adds in the same order.
inline NormBwdPlan plan_norm_bwd(NormBwdParams& p, int multiprocessors, bool need_parameters) {
  const auto rows_aligned = [&](int unit) {
    return aligned(p.grad_out, p.grad_out_stride, p.grad_out_dtype, p.columns, unit) &&
           aligned(p.grad_sum, p.grad_sum_stride, p.grad_sum_dtype, p.columns, unit) &&
           aligned(p.s, p.s_stride, p.s_dtype, p.columns, unit) &&
           aligned(p.weight, 0, p.weight_dtype, p.columns, unit);
  };
  const bool one_type =
      p.grad_out_dtype == p.s_dtype && (p.grad_sum == nullptr || p.grad_sum_dtype == p.s_dtype);
  p.share = 1.0f / static_cast<float>(p.columns);
  const int own_unit = unit_of(p.s_dtype);
  NormBwdPlan plan{};
  p.partial_stride = static_cast<int32_t>(ceil_div(p.columns, kWideUnit) * kWideUnit);
  p.partial_rows = 0;
  // A thread of the kept kernel holds 16 columns of xhat, of weighted gradient, of weight and of two sums: 80
  // floats. One of the wide kernel holds 32 of two sums, and as many of the row in 32 words: 96; its weights,
  // in shared memory, cost a load of four. Its 26 lane instructions a column, 10 for what it opens twice,
  // then move 7.2 to 9 bytes a slot, and each array once where kBwdAny and kBwdColumns read two of them
  // twice.
  const bool wide = p.columns > kMaxThreads * 16;
  const int kept_columns = own_unit == kWideUnit ? kKeptColumns : 16;
  if (p.columns <= kMaxThreads * kept_columns && one_type && rows_aligned(own_unit)) {
    p.vector = 1;
    plan.ds.kernel = wide ? NormKernel::kBwdKeptWide : NormKernel::kBwdKept;
    plan.ds.block_x = threads_per_row(p.columns, 16, wide ? kKeptColumns : 16);
    if (wide) plan.ds.shared_bytes = kMaxThreads * kKeptColumns * sizeof(float);
    plan.ds.block_y = plan.ds.block_x < 256 ? 256 / plan.ds.block_x : 1;
    // At 128 registers 512 threads fill an SM. One wave, in which every block takes the same number of rows:
    // the shares are few (16 bytes a column and block) and stay in L2 until they are summed.
    const int64_t resident = kMaxThreads / (plan.ds.block_x * plan.ds.block_y) * int64_t{multiprocessors};
    const int64_t groups = ceil_div(p.rows, plan.ds.block_y);
    plan.ds.grid_x = static_cast<uint32_t>(groups < resident ? groups : resident);
    if (need_parameters) p.partial_rows = static_cast<int32_t>(plan.ds.grid_x);
  } else {
    p.vector = rows_aligned(kNarrowUnit);
    plan.ds.kernel = NormKernel::kBwdAny;
    plan.ds.block_x = threads_per_row(p.columns, kNarrowUnit, 32);
    plan.ds.block_y = plan.ds.block_x <= kWarp ? 128 / plan.ds.block_x : 1;
    plan.ds.grid_x = static_cast<uint32_t>(ceil_div(p.rows, plan.ds.block_y));
    if (need_parameters) {
      plan.columns.kernel = NormKernel::kBwdColumns;
      const int64_t units = ceil_div(p.columns, kNarrowUnit);
      plan.columns.block_x = units < kWarp ? threads_per_row(p.columns, kNarrowUnit, kNarrowUnit) : kWarp;
      plan.columns.block_y = 256 / plan.columns.block_x;
      plan.columns.grid_x = static_cast<uint32_t>(ceil_div(units, plan.columns.block_x));
      const int64_t wanted = ceil_div(4 * int64_t{multiprocessors}, plan.columns.grid_x);
      const int64_t groups = ceil_div(p.rows, plan.columns.block_y);
      plan.columns.grid_y = static_cast<uint32_t>(groups < wanted ? groups : wanted);
      p.partial_rows = static_cast<int32_t>(plan.columns.grid_y);
    }
  }
  plan.ds.grid_y = 1;
  if (!need_parameters) return plan;
  plan.reduce.kernel = NormKernel::kBwdReduce;
  plan.reduce.block_x = kWarp;
  plan.reduce.block_y = static_cast<uint32_t>(p.partial_rows < 1              ? 1
                                              : p.partial_rows < kReduceLines ? p.partial_rows
                                                                              : kReduceLines);
  plan.reduce.grid_x = static_cast<uint32_t>(ceil_div(p.columns, kWarp));
  plan.reduce.grid_y = 2;
  return plan;
}

}  // namespace fastformer::cuda
