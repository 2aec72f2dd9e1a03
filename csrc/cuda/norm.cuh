// Layer norm and rms norm with residual and dropout: forward kernels, free of torch. Which one runs, and on
// which grid, is norm_plan.h's to say. Every block is blockDim.x threads a row by blockDim.y rows.
#pragma once

#include "tile.cuh"

namespace fastformer::cuda {

struct RowOfBlock {
  int64_t index;
  bool real;  // false for rows past the last, whose threads still take part in shuffles and barriers
};

__device__ __forceinline__ RowOfBlock row_of_block(int64_t rows) {
  // In 32 bits, which hold every row; 64-bit products take three instructions.
  const uint32_t index = blockIdx.x * blockDim.y + threadIdx.y;
  return {index, index < static_cast<uint32_t>(rows)};
}

// s = residual + dropout(x) of one unit in float32, any types; 0 beyond the row.
template <int kUnit>
__device__ __forceinline__ void load_s(const NormFwdParams& p, int64_t row, int unit, float (&s)[kUnit]) {
  load_unit(row_at(p.x, p.x_dtype, row * p.x_stride), p.x_dtype, p.vector, unit, p.columns, s);
  if (p.residual == nullptr) return;
  float residual[kUnit];
  load_unit(row_at(p.residual, p.residual_dtype, row * p.residual_stride), p.residual_dtype, p.vector, unit,
            p.columns, residual);
  if (p.threshold > 0) drop_unit(*p.seed, row, unit, p.threshold, p.scale, s);
#pragma unroll
  for (int e = 0; e < kUnit; ++e) s[e] = rounded(__fadd_rn(residual[e], s[e]), p.out_dtype);
}

// centred <- centred * rstd * weight + bias, written to out.
template <int kUnit>
__device__ __forceinline__ void finish_unit(const NormFwdParams& p, int64_t row, int unit, float rstd,
                                            float (&centred)[kUnit]) {
  float parameter[kUnit];
#pragma unroll
  for (int e = 0; e < kUnit; ++e) centred[e] *= rstd;
  if (p.weight != nullptr) {
    load_unit(p.weight, p.weight_dtype, p.vector, unit, p.columns, parameter);
#pragma unroll
    for (int e = 0; e < kUnit; ++e) centred[e] *= parameter[e];
  }
  if (p.bias != nullptr) {
    load_unit(p.bias, p.bias_dtype, p.vector, unit, p.columns, parameter);
#pragma unroll
    for (int e = 0; e < kUnit; ++e) centred[e] += parameter[e];
  }
  store_unit(row_at(p.out, p.out_dtype, row * p.columns), p.out_dtype, p.vector, unit, p.columns, centred);
}

struct RowStatistics {
  float mean, rstd;
};

__device__ __forceinline__ void store_statistics(const NormFwdParams& p, int64_t row,
                                                 RowStatistics statistics) {
  if (threadIdx.x != 0) return;
  if (!p.rms) p.mean[row] = statistics.mean;
  p.rstd[row] = statistics.rstd;
}

// Centres a row held in registers, s [kUnits, kUnit]: mean first, then centred squares.
template <int kUnit, int kUnits>
__device__ __forceinline__ RowStatistics centre_row(const NormFwdParams& p, bool vector,
                                                    float (&s)[kUnits][kUnit]) {
  // One array a sum: a slow warp may still read the first while a fast one writes the second.
  __shared__ float mean_shared[kMaxWarps][1], squares_shared[kMaxWarps][1];
  float mean[1] = {0.0f};
  if (!p.rms) {
#pragma unroll
    for (int k = 0; k < kUnits; ++k) mean[0] += sum_of(s[k]);
    row_sum(mean, mean_shared);
    mean[0] *= p.share;
  }
  float squares[1] = {0.0f};
#pragma unroll
  for (int k = 0; k < kUnits; ++k) {
    const int unit = k * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x);
    float of_unit = 0.0f;
#pragma unroll
    for (int e = 0; e < kUnit; ++e) {
      s[k][e] -= mean[0];
      // A column beyond the row was read as 0, and is -mean now.
      const bool inside = vector || unit * kUnit + e < p.columns;
      of_unit = fmaf(inside ? s[k][e] : 0.0f, s[k][e], of_unit);
    }
    squares[0] += unit * kUnit < p.columns ? of_unit : 0.0f;
  }
  row_sum(squares, squares_shared);
  return {mean[0], reciprocal_sqrt(fmaf(squares[0], p.share, p.eps))};
}

// centred * rstd * weight + bias of a thread's units, written to `out`.
template <DType kType, DType kParameter, int kUnit, int kUnits>
__device__ __forceinline__ void finish_row(const NormFwdParams& p, int units, float rstd, uint4* out,
                                           float (&centred)[kUnits][kUnit]) {
#pragma unroll
  for (int k = 0; k < kUnits; ++k) {
    const int unit = k * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x);
    if (unit >= units) continue;
    float weight[kUnit], bias[kUnit];
#pragma unroll
    for (int e = 0; e < kUnit; ++e) centred[k][e] *= rstd;
    if (p.weight != nullptr && p.bias != nullptr) {
      load_parameter<kParameter>(p.weight, unit, weight);
      load_parameter<kParameter>(p.bias, unit, bias);
#pragma unroll
      for (int e = 0; e < kUnit; ++e) centred[k][e] = fmaf(centred[k][e], weight[e], bias[e]);
    } else if (p.weight != nullptr) {
      load_parameter<kParameter>(p.weight, unit, weight);
#pragma unroll
      for (int e = 0; e < kUnit; ++e) centred[k][e] *= weight[e];
    } else if (p.bias != nullptr) {
      load_parameter<kParameter>(p.bias, unit, bias);
#pragma unroll
      for (int e = 0; e < kUnit; ++e) centred[k][e] += bias[e];
    }
    out[unit] = packed(centred[k], kType);
  }
}

// Rows of up to kColumns columns a thread in registers; x and residual of type kType, parameters of kType
// or float32, 16-byte aligned throughout. Writes out, mean, rstd and, with a residual, sum.
template <DType kType, int kColumns>
__global__ void __launch_bounds__(kMaxThreads) norm_fwd_kept_kernel(const __grid_constant__ NormFwdParams p) {
  constexpr int kUnit = kType == DType::kFloat32 ? kNarrowUnit : kWideUnit;
  constexpr int kUnits = kColumns / kUnit;
  const RowOfBlock row = row_of_block(p.rows);
  const int units = row.real ? static_cast<int>(static_cast<uint32_t>(p.columns) / kUnit) : 0;
  uint4 words[kUnits];
  float s[kUnits][kUnit];
  load_row(row_at(p.x, kType, row.index * p.x_stride), units, words);
  if (p.residual == nullptr) {
#pragma unroll
    for (int k = 0; k < kUnits; ++k) unpack(reinterpret_cast<const uint32_t*>(&words[k]), kType, s[k]);
  } else {
    uint4 residual[kUnits];
    load_row(row_at(p.residual, kType, row.index * p.residual_stride), units, residual);
    uint4* sum = static_cast<uint4*>(row_at(p.sum, kType, row.index * p.columns));
    const uint64_t seed = p.threshold > 0 ? *p.seed : 0;
#pragma unroll
    for (int k = 0; k < kUnits; ++k) {
      const int unit = k * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x);
      unpack(reinterpret_cast<const uint32_t*>(&words[k]), kType, s[k]);
      if (p.threshold > 0) drop_unit(seed, row.index, unit, p.threshold, p.scale, s[k]);
      float other[kUnit];
      unpack(reinterpret_cast<const uint32_t*>(&residual[k]), kType, other);
#pragma unroll
      for (int e = 0; e < kUnit; ++e) s[k][e] = __fadd_rn(other[e], s[k][e]);
      // What is normalised is s as it is written.
      words[k] = packed(s[k], kType);
      unpack(reinterpret_cast<const uint32_t*>(&words[k]), kType, s[k]);
      if (unit < units) sum[unit] = words[k];
    }
  }
  const RowStatistics statistics = centre_row(p, true, s);
  if (!row.real) return;
  store_statistics(p, row.index, statistics);
  uint4* out = static_cast<uint4*>(row_at(p.out, kType, row.index * p.columns));
  if (kType != DType::kFloat32 && p.weight_dtype == kType) {
    finish_row<kType, kType>(p, units, statistics.rstd, out, s);
  } else {
    finish_row<kType, DType::kFloat32>(p, units, statistics.rstd, out, s);
  }
}

// The same for x and residual of any two types, and for rows that are not aligned.
__global__ void __launch_bounds__(kMaxThreads, 1)
    norm_fwd_any_kernel(const __grid_constant__ NormFwdParams p) {
  constexpr int kUnits = 32 / kNarrowUnit;
  const RowOfBlock row = row_of_block(p.rows);
  const int units = (p.columns + kNarrowUnit - 1) / kNarrowUnit;
  float s[kUnits][kNarrowUnit];
#pragma unroll
  for (int k = 0; k < kUnits; ++k) {
    const int unit = k * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x);
#pragma unroll
    for (int e = 0; e < kNarrowUnit; ++e) s[k][e] = 0.0f;
    if (!row.real || unit >= units) continue;
    load_s(p, row.index, unit, s[k]);
    if (p.residual != nullptr) {
      store_unit(row_at(p.sum, p.out_dtype, row.index * p.columns), p.out_dtype, p.vector, unit, p.columns,
                 s[k]);
    }
  }
  const RowStatistics statistics = centre_row(p, p.vector, s);
  if (!row.real) return;
  store_statistics(p, row.index, statistics);
#pragma unroll
  for (int k = 0; k < kUnits; ++k) {
    const int unit = k * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x);
    if (unit < units) finish_unit(p, row.index, unit, statistics.rstd, s[k]);
  }
}

// A block a row, the row read once for each of mean, squares and result: the second and third time from L2.
__global__ void __launch_bounds__(kMaxThreads) norm_fwd_wide_kernel(const __grid_constant__ NormFwdParams p) {
  __shared__ float mean_shared[kMaxWarps][1], squares_shared[kMaxWarps][1];
  const int64_t row = blockIdx.x;
  const int units = (p.columns + kNarrowUnit - 1) / kNarrowUnit;
  const int first = static_cast<int>(threadIdx.x), step = static_cast<int>(blockDim.x);
  float s[kNarrowUnit];
  float mean[1] = {0.0f}, squares[1] = {0.0f};
  if (!p.rms) {
    for (int unit = first; unit < units; unit += step) {
      load_s(p, row, unit, s);
      mean[0] += sum_of(s);
    }
    row_sum(mean, mean_shared);
    mean[0] *= p.share;
  }
  for (int unit = first; unit < units; unit += step) {
    load_s(p, row, unit, s);
    float of_unit = 0.0f;
#pragma unroll
    for (int e = 0; e < kNarrowUnit; ++e) {
      const float centred = unit * kNarrowUnit + e < p.columns ? s[e] - mean[0] : 0.0f;
      of_unit = fmaf(centred, centred, of_unit);
    }
    squares[0] += of_unit;
  }
  row_sum(squares, squares_shared);
  const float rstd = reciprocal_sqrt(fmaf(squares[0], p.share, p.eps));
  store_statistics(p, row, {mean[0], rstd});
  for (int unit = first; unit < units; unit += step) {
    load_s(p, row, unit, s);
    if (p.residual != nullptr) {
      store_unit(row_at(p.sum, p.out_dtype, row * p.columns), p.out_dtype, p.vector, unit, p.columns, s);
    }
#pragma unroll
    for (int e = 0; e < kNarrowUnit; ++e) s[e] -= mean[0];
    finish_unit(p, row, unit, rstd, s);
  }
}

}  // namespace fastformer::cuda
