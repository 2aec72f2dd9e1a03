// Online softmax in base 2 over the accumulators of mma.m16n8k16, kept by one warp for its rows:
//   max' = max(max, max_j x_j)    sum' = sum 2^(max - max') + sum_j 2^(x_j - max')
// (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018.)
#pragma once

#include "ptx.cuh"

namespace fastformer::cuda {

constexpr float kLog2E = 1.44269504088896340736f;
constexpr float kLn2 = 0.693147180559945309417f;
constexpr float kLn2Low = -1.90465429995776804525e-9f;  // what its rounding to float32 lost
constexpr float kMinusInfinity = -__builtin_inff();
// Where every row's maximum begins: a number, and no larger than any other, so that the difference from a
// hidden score is -inf and never NaN. A row whose sum stays 0 has seen nothing.
constexpr float kLowest = -3.40282346638528859812e38f;

// [kRowTiles * 16, kTiles * 8] of a warp. A lane holds of row tile m rows lane / 4 + 8 r, and of each eight
// columns 2 (lane % 4) + e: element [m][tile][2 r + e].
template <int kRowTiles, int kTiles>
using Accumulators = float[kRowTiles][kTiles][4];

// Of the rows that a lane holds, [m][r]. Sums are the lane's own shares until `add_lanes`.
template <int kRowTiles>
struct RowState {
  float max[kRowTiles][2];
  float sum[kRowTiles][2];

  __device__ __forceinline__ RowState() {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) max[m][r] = kLowest, sum[m][r] = 0.0f;
    }
  }
};

// Over the four lanes that share a row.
__device__ __forceinline__ float max_of_lanes(float value) {
  value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, 2));
  return fmaxf(value, __shfl_xor_sync(0xffffffffu, value, 1));
}

__device__ __forceinline__ float sum_of_lanes(float value) {
  value += __shfl_xor_sync(0xffffffffu, value, 2);
  return value + __shfl_xor_sync(0xffffffffu, value, 1);
}

// Folds a tile of scores into the state and rescales `out` to the new maxima. Scores become weights, of which
// each counts 2^(factor score - max), or with kScaledLast 2^(factor (score - max)): of products the first,
// one multiply-add, and `max` is then an exponent of 2; of logits the second, which finfo.min does not
// overflow.
template <bool kScaledLast, int kRowTiles, int kTiles, int kOutTiles>
__device__ __forceinline__ void fold_scores(float factor, RowState<kRowTiles>& state,
                                            Accumulators<kRowTiles, kTiles>& scores,
                                            Accumulators<kRowTiles, kOutTiles>& out) {
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float largest = scores[m][0][2 * r];
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        largest = fmaxf(largest, fmaxf(scores[m][n][2 * r], scores[m][n][2 * r + 1]));
      }
      largest = max_of_lanes(largest);
      largest = fmaxf(state.max[m][r], kScaledLast ? largest : largest * factor);
      const float fall = state.max[m][r] - largest;
      const float rescale = exp2_approximate(kScaledLast ? fall * factor : fall);
      state.max[m][r] = largest;
      state.sum[m][r] *= rescale;
#pragma unroll
      for (int n = 0; n < kOutTiles; ++n) out[m][n][2 * r] *= rescale, out[m][n][2 * r + 1] *= rescale;
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& score = scores[m][n][2 * r + e];
          score = exp2_approximate(kScaledLast ? (score - largest) * factor : fmaf(score, factor, -largest));
          state.sum[m][r] += score;
        }
      }
    }
  }
}

template <int kRowTiles>
__device__ __forceinline__ void add_lanes(RowState<kRowTiles>& state) {
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) state.sum[m][r] = sum_of_lanes(state.sum[m][r]);
  }
}

// What a row leaves: its largest score in logits and the sum that refers to it, -inf and 0 where it has seen
// nothing.
struct RowResult {
  float max, sum;
};

// `unit` + `unit_low` is what one of the state's maximum counts in logits. The maximum is rounded, and the
// sum makes up for it.
__device__ __forceinline__ RowResult in_logits(float max, float sum, float unit, float unit_low) {
  const float logits = max * unit;
  const float rounding = fmaf(max, unit_low, fmaf(max, unit, -logits));
  return sum == 0.0f ? RowResult{kMinusInfinity, 0.0f} : RowResult{logits, sum * (1.0f + rounding)};
}

// The sink joins the sum. Returns what the row's outputs are to be multiplied by beside 1 / sum.
__device__ __forceinline__ float add_sink(RowResult& row, float sink) {
  const float largest = fmaxf(row.max, sink);
  const float pivot = largest == kMinusInfinity ? 0.0f : largest;
  const float share = exp2_approximate((row.max - pivot) * kLog2E);
  row = {largest, row.sum * share + exp2_approximate((sink - pivot) * kLog2E)};
  return share;
}

}  // namespace fastformer::cuda
