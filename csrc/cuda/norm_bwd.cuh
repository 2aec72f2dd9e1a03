// Gradients of layer norm and rms norm: kernels, free of torch, on blocks as norm.cuh has them.
#pragma once

#include "norm.cuh"

namespace fastformer::cuda {

// With g = grad_out * weight and xhat = (s - mean) * rstd:
//   ds = rstd * (g - mean_of(g) - xhat * mean_of(g * xhat)) + grad_sum, without mean_of(g) for rms
//   dweight = sum over rows of grad_out * xhat, dbias = sum over rows of grad_out
__device__ __forceinline__ RowStatistics load_statistics(const NormBwdParams& p, int64_t row, bool real) {
  return {real && !p.rms ? p.mean[row] : 0.0f, real ? p.rstd[row] : 0.0f};
}

// Writes a unit of ds = g + grad_sum and, with dropout, of dx, and leaves the last in g. `load_grad_sum` is
// asked where there is one.
template <int kUnit, typename LoadGradSum>
__device__ __forceinline__ void finish_gradient(const NormBwdParams& p, DType dtype, bool vector, int64_t row,
                                                int unit, LoadGradSum load_grad_sum, float (&g)[kUnit]) {
  if (p.grad_sum != nullptr) {
    float grad_sum[kUnit];
    load_grad_sum(grad_sum);
#pragma unroll
    for (int e = 0; e < kUnit; ++e) g[e] += grad_sum[e];
  }
  store_unit(row_at(p.ds, dtype, row * p.columns), dtype, vector, unit, p.columns, g);
  if (p.threshold == 0) return;
  drop_unit(*p.seed, row, unit, p.threshold, p.scale, g);
  store_unit(row_at(p.dx, dtype, row * p.columns), dtype, vector, unit, p.columns, g);
}

// The sums over columns become means; rms has no mean of g.
__device__ __forceinline__ void sums_to_means(const NormBwdParams& p, float (&sums)[2]) {
  sums[0] = p.rms ? 0.0f : sums[0] * p.share;
  sums[1] *= p.share;
}

// Adds `share` [kUnit columns a thread] over the block's rows and writes the sum to `target` at `unit`. All
// threads of the block must call; `shared` holds 16 bytes a thread and is free again afterwards.
template <int kUnit>
__device__ __forceinline__ void store_share(const float (&share)[kUnit], float4* shared, float* target,
                                            int unit, bool inside) {
  const int x = static_cast<int>(threadIdx.x), y = static_cast<int>(threadIdx.y);
#pragma unroll
  for (int part = 0; part < kUnit / 4; ++part) {
    shared[y * blockDim.x + x] =
        make_float4(share[4 * part], share[4 * part + 1], share[4 * part + 2], share[4 * part + 3]);
    __syncthreads();
    if (y == 0 && inside) {
      float4 sum = shared[x];
      for (int other = 1; other < static_cast<int>(blockDim.y); ++other) {
        const float4 more = shared[other * blockDim.x + x];
        sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
      }
      reinterpret_cast<float4*>(target)[unit * (kUnit / 4) + part] = sum;
    }
    // The next part overwrites what slow warps may still add.
    __syncthreads();
  }
}

// The block's line of p.partial, of a thread's units of both.
template <int kUnit, int kUnits>
__device__ __forceinline__ void store_line(const NormBwdParams& p, int units,
                                           const float (&dweight)[kUnits][kUnit],
                                           const float (&dbias)[kUnits][kUnit], float4* shared) {
  if (p.partial == nullptr) return;
  float* line = p.partial + int64_t{blockIdx.x} * 2 * p.partial_stride;
#pragma unroll
  for (int k = 0; k < kUnits; ++k) {
    const int unit = k * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x);
    store_share(dweight[k], shared, line, unit, unit < units);
    store_share(dbias[k], shared, line + p.partial_stride, unit, unit < units);
  }
}

// One wave of blocks walks the rows, [blockDim.y rows at a time]; a thread keeps its 16 columns' shares of
// dweight and dbias and its weights in registers. Writes ds, dx and the block's line of p.partial.
template <DType kType>
__global__ void __launch_bounds__(kMaxThreads) norm_bwd_kept_kernel(const __grid_constant__ NormBwdParams p) {
  constexpr int kUnit = kType == DType::kFloat32 ? kNarrowUnit : kWideUnit;
  constexpr int kUnits = 16 / kUnit;
  // Two, taken in turn: a slow warp may still read one row's sums while a fast one writes the next row's.
  __shared__ float sums_shared[2][kMaxWarps][2];
  __shared__ float4 share_shared[kMaxThreads];
  const int units = static_cast<int>(static_cast<uint32_t>(p.columns) / kUnit);
  float weight[kUnits][kUnit], dweight[kUnits][kUnit], dbias[kUnits][kUnit];
#pragma unroll
  for (int k = 0; k < kUnits; ++k) {
    const int unit = k * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x);
#pragma unroll
    for (int e = 0; e < kUnit; ++e) weight[k][e] = 1.0f, dweight[k][e] = 0.0f, dbias[k][e] = 0.0f;
    if (p.weight != nullptr && unit < units) {
      load_unit(p.weight, p.weight_dtype, true, unit, p.columns, weight[k]);
    }
  }

  int turn = 0;
  const uint32_t rows = static_cast<uint32_t>(p.rows), step = gridDim.x * blockDim.y;
  for (uint32_t first = blockIdx.x * blockDim.y; first < rows; first += step) {
    const int64_t row = first + threadIdx.y;
    const bool real = first + threadIdx.y < rows;
    uint4 grad_words[kUnits], s_words[kUnits], grad_sum_words[kUnits] = {};
    const int own_units = real ? units : 0;
    load_row(row_at(p.grad_out, kType, row * p.grad_out_stride), own_units, grad_words);
    load_row(row_at(p.s, kType, row * p.s_stride), own_units, s_words);
    const RowStatistics statistics = load_statistics(p, row, real);

    float g[kUnits][kUnit], xhat[kUnits][kUnit];
    float sums[2] = {0.0f, 0.0f};
#pragma unroll
    for (int k = 0; k < kUnits; ++k) {
      // float32, whose units cost less a byte, would spill for this branch.
      const int unit = k * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x);
      if (kType != DType::kFloat32 && unit >= own_units) continue;
      unpack(reinterpret_cast<const uint32_t*>(&grad_words[k]), kType, g[k]);
      unpack(reinterpret_cast<const uint32_t*>(&s_words[k]), kType, xhat[k]);
#pragma unroll
      for (int e = 0; e < kUnit; ++e) {
        xhat[k][e] = (xhat[k][e] - statistics.mean) * statistics.rstd;
        dweight[k][e] = fmaf(g[k][e], xhat[k][e], dweight[k][e]);
        dbias[k][e] += g[k][e];
        g[k][e] *= weight[k][e];
        sums[0] += g[k][e];
        sums[1] = fmaf(g[k][e], xhat[k][e], sums[1]);
      }
    }
    // Not before: above, its words would keep registers that the sums need.
    if (p.grad_sum != nullptr) {
      load_row(row_at(p.grad_sum, kType, row * p.grad_sum_stride), own_units, grad_sum_words);
    }
    row_sum(sums, sums_shared[turn]);
    turn ^= 1;
    sums_to_means(p, sums);
    const float rstd = statistics.rstd, mean = rstd * sums[0], slope = rstd * sums[1];
#pragma unroll
    for (int k = 0; k < kUnits; ++k) {
      const int unit = k * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x);
      if (unit >= own_units) continue;
#pragma unroll
      for (int e = 0; e < kUnit; ++e) g[k][e] = fmaf(-xhat[k][e], slope, fmaf(g[k][e], rstd, -mean));
      const auto load_grad_sum = [&](float (&grad_sum)[kUnit]) {
        unpack(reinterpret_cast<const uint32_t*>(&grad_sum_words[k]), kType, grad_sum);
      };
      finish_gradient(p, kType, true, row, unit, load_grad_sum, g[k]);
    }
  }
  store_line(p, units, dweight, dbias, share_shared);
}

// The same of 32 columns a thread, in 16 bits. Of a row it keeps the words between the two passes, and opens
// them again; its weights lie in shared memory, [2 kUnits, kMaxThreads] of four floats.
template <DType kType>
__global__ void __launch_bounds__(kMaxThreads)
    norm_bwd_kept_wide_kernel(const __grid_constant__ NormBwdParams p) {
  constexpr int kUnit = kWideUnit, kUnits = kKeptColumns / kUnit;
  constexpr int kPitch = 16 * kMaxThreads;
  extern __shared__ __align__(16) uint8_t dynamic_shared[];
  __shared__ float sums_shared[2][kMaxWarps][2];
  __shared__ float4 share_shared[kMaxThreads];
  const int units = static_cast<int>(static_cast<uint32_t>(p.columns) / kUnit);
  const auto unit_of = [](int k) { return k * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x); };
  const uint32_t weights = forgotten(shared_address(dynamic_shared) + 16 * threadIdx.x);
  float dweight[kUnits][kUnit] = {}, dbias[kUnits][kUnit] = {};
#pragma unroll
  for (int k = 0; k < kUnits; ++k) {
    float weight[kUnit] = {1.0f, 1.0f, 1.0f, 1.0f, 1.0f, 1.0f, 1.0f, 1.0f};
    if (p.weight != nullptr && unit_of(k) < units) {
      load_unit(p.weight, p.weight_dtype, true, unit_of(k), p.columns, weight);
    }
    const auto four = reinterpret_cast<const float (*)[4]>(weight);
    store_shared(weights + 2 * k * kPitch, packed(four[0], DType::kFloat32));
    store_shared(weights + (2 * k + 1) * kPitch, packed(four[1], DType::kFloat32));
  }

  int turn = 0;
  const uint32_t rows = static_cast<uint32_t>(p.rows);
  for (uint32_t number = blockIdx.x; number < rows; number += gridDim.x) {
    const int64_t row = number;
    uint4 grad_words[kUnits], s_words[kUnits];
    load_row(row_at(p.grad_out, kType, row * p.grad_out_stride), units, grad_words);
    load_row(row_at(p.s, kType, row * p.s_stride), units, s_words);
    const RowStatistics statistics = load_statistics(p, row, true);
    float g[kUnit], centred[kUnit];
    const auto open = [&](int k) {
      unpack(reinterpret_cast<const uint32_t*>(&grad_words[k]), kType, g);
      unpack(reinterpret_cast<const uint32_t*>(&s_words[k]), kType, centred);
#pragma unroll
      for (int e = 0; e < kUnit; ++e) centred[e] -= statistics.mean;
    };
    const auto load_weights = [&](int k, float (&weight)[kUnit]) {
      const uint4 words[2] = {load_shared(weights + 2 * k * kPitch),
                              load_shared(weights + (2 * k + 1) * kPitch)};
      unpack(reinterpret_cast<const uint32_t*>(words), DType::kFloat32, weight);
    };
    float sums[2] = {0.0f, 0.0f};
#pragma unroll
    for (int k = 0; k < kUnits; ++k) {
      if (unit_of(k) >= units) continue;
      float weight[kUnit];
      load_weights(k, weight);
      open(k);
#pragma unroll
      for (int e = 0; e < kUnit; ++e) {
        const float product = g[e] * centred[e];
        dweight[k][e] = fmaf(product, statistics.rstd, dweight[k][e]);
        dbias[k][e] += g[e];
        sums[0] = fmaf(g[e], weight[e], sums[0]);
        sums[1] = fmaf(product, weight[e], sums[1]);
      }
    }
    row_sum(sums, sums_shared[turn]);
    turn ^= 1;
    sums_to_means(p, sums);
    const float slope = statistics.rstd * (statistics.rstd * sums[1]);
#pragma unroll
    for (int k = 0; k < kUnits; ++k) {
      const int unit = unit_of(k);
      if (unit >= units) continue;
      grad_words[k] = forgotten(grad_words[k]), s_words[k] = forgotten(s_words[k]);
      float weight[kUnit];
      load_weights(k, weight);
      open(k);
#pragma unroll
      for (int e = 0; e < kUnit; ++e) {
        g[e] = statistics.rstd * fmaf(-centred[e], slope, fmaf(g[e], weight[e], -sums[0]));
      }
      const auto load_grad_sum = [&](float (&grad_sum)[kUnit]) {
        load_unit(row_at(p.grad_sum, kType, row * p.grad_sum_stride), kType, true, unit, p.columns, grad_sum);
      };
      finish_gradient(p, kType, true, row, unit, load_grad_sum, g);
    }
  }
  store_line(p, units, dweight, dbias, share_shared);
}

// ds and dx of rows of any width, types and alignment: one pass over the row for its two sums, one for the
// result.
__global__ void __launch_bounds__(kMaxThreads, 1)
    norm_bwd_any_kernel(const __grid_constant__ NormBwdParams p) {
  __shared__ float sums_shared[kMaxWarps][2];
  const RowOfBlock row = row_of_block(p.rows);
  const int units = row.real ? (p.columns + kNarrowUnit - 1) / kNarrowUnit : 0;
  const int step = static_cast<int>(blockDim.x);
  const RowStatistics statistics = load_statistics(p, row.index, row.real);
  const void* grad_out = row_at(p.grad_out, p.grad_out_dtype, row.index * p.grad_out_stride);
  const void* s = row_at(p.s, p.s_dtype, row.index * p.s_stride);
  float g[kNarrowUnit], xhat[kNarrowUnit], other[kNarrowUnit];
  const auto load = [&](int unit) {
    load_unit(grad_out, p.grad_out_dtype, p.vector, unit, p.columns, g);
    load_unit(s, p.s_dtype, p.vector, unit, p.columns, xhat);
    if (p.weight != nullptr) load_unit(p.weight, p.weight_dtype, p.vector, unit, p.columns, other);
#pragma unroll
    for (int e = 0; e < kNarrowUnit; ++e) {
      xhat[e] = (xhat[e] - statistics.mean) * statistics.rstd;
      if (p.weight != nullptr) g[e] *= other[e];
    }
  };

  float sums[2] = {0.0f, 0.0f};
  for (int unit = static_cast<int>(threadIdx.x); unit < units; unit += step) {
    load(unit);
    float products = 0.0f;
#pragma unroll
    for (int e = 0; e < kNarrowUnit; ++e) products = fmaf(g[e], xhat[e], products);
    sums[0] += sum_of(g);
    sums[1] += products;
  }
  row_sum(sums, sums_shared);
  sums_to_means(p, sums);
  for (int unit = static_cast<int>(threadIdx.x); unit < units; unit += step) {
    load(unit);
#pragma unroll
    for (int e = 0; e < kNarrowUnit; ++e) {
      // Nothing is left of a row of one column.
      g[e] = statistics.rstd * fmaf(-xhat[e], sums[1], g[e] - sums[0]);
    }
    const auto load_grad_sum = [&](float (&grad_sum)[kNarrowUnit]) {
      load_unit(row_at(p.grad_sum, p.grad_sum_dtype, row.index * p.grad_sum_stride), p.grad_sum_dtype,
                p.vector, unit, p.columns, grad_sum);
    };
    finish_gradient(p, p.s_dtype, p.vector, row.index, unit, load_grad_sum, g);
  }
}

// Shares of dweight and dbias beside norm_bwd_any_kernel: a thread walks down one unit of columns, block (x,
// y) writes its columns of line y of p.partial.
__global__ void __launch_bounds__(256) norm_bwd_columns_kernel(const __grid_constant__ NormBwdParams p) {
  __shared__ float4 share_shared[256];
  const int unit = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  const bool inside = unit * kNarrowUnit < p.columns;
  float dweight[kNarrowUnit] = {}, dbias[kNarrowUnit] = {};
  const int64_t step = int64_t{gridDim.y} * blockDim.y;
  for (int64_t row = int64_t{blockIdx.y} * blockDim.y + threadIdx.y; inside && row < p.rows; row += step) {
    const RowStatistics statistics = load_statistics(p, row, true);
    float grad[kNarrowUnit], s[kNarrowUnit];
    load_unit(row_at(p.grad_out, p.grad_out_dtype, row * p.grad_out_stride), p.grad_out_dtype, p.vector, unit,
              p.columns, grad);
    load_unit(row_at(p.s, p.s_dtype, row * p.s_stride), p.s_dtype, p.vector, unit, p.columns, s);
#pragma unroll
    for (int e = 0; e < kNarrowUnit; ++e) {
      dweight[e] = fmaf(grad[e], (s[e] - statistics.mean) * statistics.rstd, dweight[e]);
      dbias[e] += grad[e];
    }
  }
  float* line = p.partial + int64_t{blockIdx.y} * 2 * p.partial_stride;
  store_share(dweight, share_shared, line, unit, inside);
  store_share(dbias, share_shared, line + p.partial_stride, unit, inside);
}

// dweight (y = 0) and dbias (y = 1): adds the lines of p.partial, 32 columns a block, in an order that only
// the number of lines decides.
__global__ void __launch_bounds__(kMaxThreads)
    norm_bwd_reduce_kernel(const __grid_constant__ NormBwdParams p) {
  __shared__ float shared[kReduceLines][kWarp];
  float* target = blockIdx.y == 0 ? p.dweight : p.dbias;
  if (target == nullptr) return;
  const int column = static_cast<int>(blockIdx.x * kWarp + threadIdx.x);
  const int y = static_cast<int>(threadIdx.y), lines = static_cast<int>(blockDim.y);
  const int64_t line = 2 * int64_t{p.partial_stride};
  const float* source = p.partial + blockIdx.y * p.partial_stride + column;
  float sum = 0.0f;
  if (column < p.columns) {
#pragma unroll 4
    for (int share = y; share < p.partial_rows; share += lines) sum += source[share * line];
  }
  shared[y][threadIdx.x] = sum;
  __syncthreads();
  if (y > 0 || column >= p.columns) return;
  for (int other = 1; other < lines; ++other) sum += shared[other][threadIdx.x];
  target[column] = sum;
}

}  // namespace fastformer::cuda
