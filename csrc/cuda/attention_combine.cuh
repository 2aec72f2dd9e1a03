// What a row of forward leaves: its statistics, and what its outputs are to be multiplied by. A block of
// threads that walked all of a row's keys knows it by itself. Where several divided them, each wrote the
// maximum of the scores that it saw, the sum of weights over that, and its sums of weights times values, and
// a second kernel joins these, in the order of the keys:
//   max = max_s max_s    sum = sum_s 2^(factor (max_s - max)) sum_s    and out as sum
#pragma once

#include "attention_plan.h"
#include "softmax.cuh"
#include "tile.cuh"

namespace fastformer::cuda {

// Of a row of head h whose place in lse is `at`, from its maximum and its sum over all keys: writes the
// statistics, sink included, where `writes`, and returns what its outputs are to be multiplied by. kPlain:
// the maximum is an exponent of 2 (see fold_scores).
template <bool kPlain>
__device__ __forceinline__ float finish_row(const AttentionFwdParams& p, int h, int64_t at, bool writes,
                                            float max, float sum) {
  RowResult row = in_logits(max, sum, kPlain ? kLn2 : p.unit, kPlain ? kLn2Low : 0.0f);
  float rescale = kPlain ? 1.0f : p.dropout_scale;
  if (p.sink != nullptr) rescale *= add_sink(row, load_element(p.sink, p.sink_dtype, h));
  const bool nothing = row.sum == 0.0f;
  if (writes) {
    if (p.row_max != nullptr) p.row_max[at] = row.max, p.row_sum[at] = row.sum;
    p.lse[at] = nothing ? kMinusInfinity : row.max + logf(row.sum);
  }
  return nothing ? 0.0f : rescale / row.sum;
}

// A warp has a row, a lane four columns of it at a time.
template <int kThreads>
__global__ void __launch_bounds__(kThreads)
    attention_combine_kernel(const __grid_constant__ AttentionFwdParams p) {
  constexpr int kUnit = 4;
  constexpr int kAhead = 8;  // loads of a lane that are under way together
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t row = int64_t{blockIdx.x} * (kThreads / kWarp) + threadIdx.x / kWarp;
  if (row >= p.rows) return;
  const float2* const stats = reinterpret_cast<const float2*>(p.partial_stats) + row * p.splits;
  float max = kLowest;
#pragma unroll 1
  for (int s = lane; s < p.splits; s += kWarp) max = fmaxf(max, stats[s].x);
#pragma unroll
  for (int bit = kWarp / 2; bit > 0; bit /= 2) max = fmaxf(max, __shfl_xor_sync(0xffffffffu, max, bit));
  const auto share_of = [&](float2 split) { return exp2_approximate((split.x - max) * p.factor); };
  float sum = 0.0f;
#pragma unroll 1
  for (int s = lane; s < p.splits; s += kWarp) sum = fmaf(share_of(stats[s]), stats[s].y, sum);
  sum = warp_sum(sum, kWarp);

  // Rows follow each other in lse: [B, H, M], or of packed sequences [H, total].
  const int64_t head = row / p.stats_stride_h, i = row % p.stats_stride_h;
  const int64_t b = head / p.H, h = head % p.H;
  const float rescale = finish_row<false>(p, static_cast<int>(h), row, lane == 0, max, sum);
  void* const out =
      row_at(p.out.data, p.dtype, b * p.out.stride_b + h * p.out.stride_h + i * p.out.stride_row);
  const float* const partial = p.partial_out + row * p.splits * p.partial_stride;
  for (int first = 0; first < p.D_v; first += kWarp * kUnit) {
    const int column = first + kUnit * lane;
    // Lanes past the row read its last columns once more.
    const float* const unit = partial + min(column, p.partial_stride - kUnit);
    float sums[kUnit] = {};
    for (int s0 = 0; s0 < p.splits; s0 += kWarp) {
      const float share = s0 + lane < p.splits ? share_of(stats[s0 + lane]) : 0.0f;
      for (int k0 = 0; k0 < min(kWarp, p.splits - s0); k0 += kAhead) {
        float values[kAhead][kUnit] = {};
#pragma unroll
        for (int k = 0; k < kAhead; ++k) {
          const int s = s0 + k0 + k;
          if (s < p.splits) load_past_l1(unit + int64_t{s} * p.partial_stride, values[k]);
        }
        __syncwarp();  // or ptxas saves registers, and issues a load only when the last has come
#pragma unroll
        for (int k = 0; k < kAhead; ++k) {
          const float weight = __shfl_sync(0xffffffffu, share, k0 + k);
#pragma unroll
          for (int e = 0; e < kUnit; ++e) sums[e] = fmaf(weight, values[k][e], sums[e]);
        }
      }
    }
    if (column >= p.D_v) continue;
#pragma unroll
    for (int e = 0; e < kUnit; ++e) sums[e] *= rescale;
    store_unit<kUnit>(out, p.dtype, p.aligned, column / kUnit, p.D_v, sums);
  }
}

}  // namespace fastformer::cuda
