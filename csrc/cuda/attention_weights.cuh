// What every pass after forward makes of a warp's tile of products: weights before dropout, and of their
// gradients those of the scores. i0 and j0 are the tile's first query and key.
//   w_ij = exp(s_ij - row_max_i) / row_sum_i    ds_ij = w_ij (dw_ij + offset_i), offset = grad_lse - delta
#pragma once

#include "attention_bwd_plan.h"
#include "attention_products.cuh"
#include "attention_scores.cuh"

namespace fastformer::cuda {

// By window, lengths and padding, but not by a mask of queries and keys. Such a row's weight is 1 whatever
// its score, which therefore has no gradient but lse's.
__device__ __forceinline__ bool sees_one_key(const AttentionFwdParams& p, const Head& head, int i) {
  const KeyRange keys = keys_of_row(p, head, i);
  return p.sink == nullptr && keys.end - keys.begin == 1;
}

// What is taken off the exponents of a row's weights: infinity where it sees nothing.
__device__ __forceinline__ float shift_of(const AttentionFwdParams& p, float row_max, float row_sum) {
  if (row_sum == 0.0f) return -kMinusInfinity;
  return p.logits ? row_max : fmaf(row_max, kLog2E, log2f(row_sum));
}

// Products to logits, before anything is hidden. A capped score's gradient is to be multiplied by its slope,
// 1
// - tanh^2, and the score is softcap tanh; without a cap slopes are not written.
template <int kRowTiles, int kTiles>
__device__ __forceinline__ void make_logits(const AttentionFwdParams& p, const Head& head, int i0, int j0,
                                            float (&scores)[kRowTiles][kTiles][4],
                                            float (&slopes)[kRowTiles][kTiles][4]) {
  scale_and_cap(p, scores);
  if (p.softcap != 0.0f) {
    const float inverse = 1.0f / p.softcap;
    for_each(slopes, [&](float& slope, int m, int n, int e) {
      const float capped = scores[m][n][e] * inverse;
      slope = fmaf(-capped, capped, 1.0f);
    });
  }
  if (p.bias.data != nullptr) {
    if (p.bias_pairs) {
      add_bias<true>(p, head, i0, j0, scores);
    } else {
      add_bias<false>(p, head, i0, j0, scores);
    }
  }
  if (p.relative_bias != nullptr) add_relative_bias(p, head, i0, j0, scores);
}

// -inf where a key is hidden. `is_full` tells whether ranges of keys hide none of the tile; bit `first` of
// `real` is key j0's.
template <int kRowTiles, int kTiles, typename IsFull>
__device__ __forceinline__ void hide_some(const AttentionFwdParams& p, const Head& head, int i0, int j0,
                                          IsFull is_full, const RealKeys& real, int first,
                                          float (&scores)[kRowTiles][kTiles][4]) {
  if (!is_full()) hide_outside(p, head, i0, j0, scores);
  if (p.padding.data != nullptr || p.key_mask.data != nullptr) {
    hide_keys(RealKeys{real.bits >> first}, scores);
  }
  if (p.mask.data == nullptr) return;
  if (p.mask_pairs) {
    hide_masked<true>(p, head, i0, j0, scores);
  } else {
    hide_masked<false>(p, head, i0, j0, scores);
  }
}

// Scores to weights before dropout. factor_of(m, r) is 1 / row_sum, asked for where scores are logits.
template <bool kPlain, int kRowTiles, int kTiles, typename FactorOf>
__device__ __forceinline__ void exponentiate(const AttentionFwdParams& p,
                                             const RowPivot (&pivots)[kRowTiles][2], FactorOf factor_of,
                                             float (&scores)[kRowTiles][kTiles][4]) {
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float shift = pivots[m][r].shift;
      float factor = 1.0f;
      if constexpr (!kPlain) {
        if (p.logits) factor = factor_of(m, r);
      }
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int e = 2 * r; e < 2 * r + 2; ++e) {
          float& score = scores[m][n][e];
          if (!kPlain && p.logits) {
            score = exp2_approximate((score - shift) * kLog2E) * factor;
          } else {
            score = exp2_approximate(fmaf(score, p.factor, -shift));
          }
        }
      }
    }
  }
}

// The gradient of weights gets that of the weights that were returned.
template <int kRowTiles, int kTiles>
__device__ __forceinline__ void add_given_gradients(const ScoreMatrix& given, float scale, const Head& head,
                                                    int i0, int j0, float (&grads)[kRowTiles][kTiles][4]) {
  const void* const base = row_at(static_cast<const void*>(given.data), given.dtype,
                                  head.b * given.stride_b + head.h * given.stride_h);
  for_each(grads, [&](float& grad, int m, int n, int e) {
    const int i = i0 + 16 * m + e / 2 * 8 + lane_row(), j = j0 + 8 * n + lane_column() + e % 2;
    if (i >= head.M || j >= head.N) return;
    grad = fmaf(load_element(base, given.dtype, i * given.stride_m + j * given.stride_n), scale, grad);
  });
}

// grads: of weights before dropout, to scores. kPlain: they hold the offset already.
template <bool kPlain, bool kEdge, int kRowTiles, int kTiles>
__device__ __forceinline__ void make_gradients(const AttentionFwdParams& p, const Head& head, int i0,
                                               const RowPivot (&pivots)[kRowTiles][2],
                                               const float (&weights)[kRowTiles][kTiles][4],
                                               float (&grads)[kRowTiles][kTiles][4]) {
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float offset = pivots[m][r].offset;
      const auto each = [&](auto change) {
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
#pragma unroll
          for (int e = 2 * r; e < 2 * r + 2; ++e) grads[m][n][e] = change(weights[m][n][e], grads[m][n][e]);
        }
      };
      if constexpr (!kPlain) each([&](float, float grad) { return grad + offset; });
      if constexpr (kEdge) {
        const int i = i0 + 16 * m + 8 * r + lane_row();
        const bool constant = sees_one_key(p, head, i);
        if (__any_sync(0xffffffffu, constant)) {
          each([&](float, float grad) { return constant ? offset : grad; });
        }
        // Whatever a hidden key gave.
        each([](float weight, float grad) { return weight == 0.0f ? 0.0f : weight * grad; });
      } else {
        each([](float weight, float grad) { return weight * grad; });
      }
    }
  }
}

}  // namespace fastformer::cuda
