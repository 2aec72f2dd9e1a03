// The passes around backward: what a row gives by itself (delta, the sink's gradient), and sums of weights or
// of gradients of scores over heads, batch elements or queries (returned weights, the gradient of a broadcast
// bias).
#pragma once

#include "attention_tiles.h"

namespace fastformer::cpu::FASTFORMER_ISA {
namespace {

// a . b, in T
template <typename T>
static float dot(const T* a, const T* b, int64_t width) {
  F32 sums{};
  int64_t d = 0;
  for (; d + kLanes <= width; d += kLanes) sums = fma(load(a + d), load(b + d), sums);
  if (d < width) sums = fma(load_n(a + d, (int)(width - d)), load_n(b + d, (int)(width - d)), sums);
  return reduce_add(sums);
}

// delta_i += sum_j weights_ij grad_weights_ij
template <typename T>
static void add_weights_gradient(const ScorePass& pass, const TileBuffers& buffers, const Head& head) {
  ScoreTiles<T> tiles(pass, false, buffers);
  tiles.start(head);
  for (int64_t first = 0; first < head.N; first += kBlockKeys) {
    if (!tiles.take_keys(first, smaller(kBlockKeys, head.N - first))) continue;
    const Range rows = tiles.rows();
    over_row_tiles(round_up<int64_t>(rows.end - rows.begin, kRowStep), [&](auto tile_rows, int64_t r) {
      constexpr int kRows = decltype(tile_rows)::kCount;
      const int64_t i = rows.begin + r;
      const Range seen = tiles.template fill<kRows>(i, buffers.weights, buffers.grads, Nothing{});
      const int64_t count = seen.end - seen.begin;
      for (int64_t t = 0; count > 0 && t < smaller(kRows, head.M - i); ++t) {
        float* const grads = buffers.grads;
        __builtin_memset(grads, 0, kTileStride * sizeof(float));
        add_scores(pass.grad_weights, head, i + t, first + seen.begin, pass.grad_weights_scale, grads, count);
        const float* const weights = buffers.weights + t * kTileStride + seen.begin;
        *head.stats(pass.delta, i + t) += dot_rows(weights, grads, round_up<int64_t>(count, kLanes));
      }
    });
  }
}

// delta, and what the sink and a bias of one column per row get from it.
template <typename T>
static void backward_rows(const AttentionBwd& bwd, const TileBuffers& buffers, const Head& head) {
  const ScorePass& pass = bwd.scores;
  const Attention& call = pass.attention;
  for (int64_t i = 0; i < head.M; ++i) {
    float delta = 0.0f;
    if (pass.grad_out.data) {
      delta = dot(head.query_row<T>(pass.grad_out, i), head.query_row<T>(bwd.out, i), call.D_v);
    }
    *head.stats(pass.delta, i) = delta;
  }
  if (pass.grad_weights.data) add_weights_gradient<T>(pass, buffers, head);
  double sink_gradient = 0.0;
  for (int64_t i = 0; i < head.M; ++i) {
    const float row_max = *head.stats(pass.row_max, i), row_sum = *head.stats(pass.row_sum, i);
    const bool sees_nothing = row_sum == 0.0f;
    const float grad_lse = pass.grad_lse.data && !sees_nothing ? *head.stats(pass.grad_lse, i) : 0.0f;
    const float above_lse = *head.stats(pass.delta, i) - grad_lse;
    float sink_weight = 0.0f;
    if (call.sink && !sees_nothing) {
      sink_weight = exp2(splat((call.sink[head.h] - row_max) * kLog2E))[0] / row_sum;
    }
    sink_gradient -= (double)sink_weight * above_lse;
    // The gradients of a row's scores and of its sink add up to grad_lse.
    if (bwd.grad_rows.data) *head.stats(bwd.grad_rows, i) = grad_lse + sink_weight * above_lse;
  }
  if (bwd.sink_shares) bwd.sink_shares[head.b * call.H + head.h] = (float)sink_gradient;
}

// A work item is b * H + h.
static void attention_bwd_rows(const AttentionBwd& bwd, WorkQueue& queue) {
  const FlushDenormals flush;
  const Attention& call = bwd.scores.attention;
  Parts count{nullptr};
  (void)TileBuffers(call, false, count);
  const Scratch scratch(bwd.scores.grad_weights.data ? count.used : 0);
  Parts parts{bwd.scores.grad_weights.data ? scratch.data() : nullptr};
  const TileBuffers buffers(call, false, parts);
  for (int64_t item = take(queue); item < queue.count; item = take(queue)) {
    const Head head(call, item / call.H, item % call.H);
    with_type(call.dtype, [&](auto type) { backward_rows<decltype(type)>(bwd, buffers, head); });
  }
}

// What a worker sums up for its block of keys.
struct SumBuffers {
  SumBuffers(const ScoreSum& sum, Parts& parts) : tiles(sum.scores.attention, sum.of_gradient, parts) {
    total = parts.take(round_up<int64_t>(sum.target_M, kTileRows) * kTileStride);
    block = parts.take(kTileStride);
  }

  TileBuffers tiles;
  float* total;  // [target_M, kTileStride]
  float* block;  // [kTileStride], one block of rows' share where target_M is 1
};

// Adds one head's tiles to the total of keys [first, first + count).
template <typename T>
static void add_head(const ScoreSum& sum, const SumBuffers& buffers, ScoreTiles<T>& tiles, const Head& head,
                     int64_t first, int64_t count) {
  tiles.start(head);
  if (!tiles.take_keys(first, count)) return;
  const bool by_row = sum.target_M > 1;
  const auto add_row = [&](int64_t i, int64_t n, const float* row, int64_t columns) {
    add_to((by_row ? buffers.total + i * kTileStride : buffers.block) + n, row, columns);
  };
  const Range rows = tiles.rows();
  for (int64_t i = rows.begin; i < rows.end; i += kBlockRows) {
    if (!by_row) __builtin_memset(buffers.block, 0, kTileStride * sizeof(float));
    const int64_t padded_rows = round_up<int64_t>(smaller(kBlockRows, rows.end - i), kRowStep);
    over_row_tiles(padded_rows, [&](auto tile_rows, int64_t r) {
      constexpr int kRows = decltype(tile_rows)::kCount;
      float* const weights = buffers.tiles.weights;
      if (sum.of_gradient) {
        tiles.template fill<kRows>(i + r, weights, buffers.tiles.grads, add_row);
        return;
      }
      tiles.template fill<kRows>(i + r, weights, buffers.tiles.grads, Nothing{});
      for (int64_t t = 0; t < smaller(kRows, head.M - i - r); ++t) {
        add_row(i + r + t, 0, weights + t * kTileStride, round_up<int64_t>(count, kPanel));
      }
    });
    if (!by_row) add_to(buffers.total, buffers.block, kBlockKeys);
  }
}

template <typename T>
static void sum_item(const ScoreSum& sum, const SumBuffers& buffers, int64_t b_target, int64_t h_target,
                     int64_t first) {
  const Attention& call = sum.scores.attention;
  const int64_t count = smaller(kBlockKeys, call.N - first);
  __builtin_memset(buffers.total, 0, sum.target_M * kTileStride * sizeof(float));
  ScoreTiles<T> tiles(sum.scores, sum.of_gradient, buffers.tiles);
  const bool all_b = sum.target_B == 1, all_h = sum.target_H == 1;
  for (int64_t b = all_b ? 0 : b_target; b < (all_b ? call.B : b_target + 1); ++b) {
    for (int64_t h = all_h ? 0 : h_target; h < (all_h ? call.H : h_target + 1); ++h) {
      const Head head(call, b, h);
      const int64_t real = smaller(count, head.N - first);
      if (real > 0) add_head<T>(sum, buffers, tiles, head, first, real);
    }
  }
  const ScoreMatrix& target = sum.target;
  const int64_t at = b_target * target.stride_b + h_target * target.stride_h + first;
  with_type(target.dtype, [&](auto type) {
    write_gradient(buffers.total, kTileStride, sum.target_M, count, sum.factor,
                   (decltype(type)*)target.data + at, target.stride_m);
  });
}

// A work item is (b * target_H + h) * blocks + block of keys.
static void attention_score_sum(const ScoreSum& sum, WorkQueue& queue) {
  const FlushDenormals flush;
  const int64_t blocks = (sum.scores.attention.N + kBlockKeys - 1) / kBlockKeys;
  Parts count{nullptr};
  (void)SumBuffers(sum, count);
  const Scratch scratch(count.used);
  Parts parts{scratch.data()};
  const SumBuffers buffers(sum, parts);
  for (int64_t item = take(queue); item < queue.count; item = take(queue)) {
    const int64_t slab = item / blocks, first = item % blocks * kBlockKeys;
    with_type(sum.scores.attention.dtype, [&](auto type) {
      sum_item<decltype(type)>(sum, buffers, slab / sum.target_H, slab % sum.target_H, first);
    });
  }
}

// Elements [begin, end) of target = factor times the sum of the shares in their order; `stride` elements lie
// from one share to the next.
static void sum_shares(const float* shares, int64_t share_count, int64_t stride, float factor, DType dtype,
                       void* target, int64_t begin, int64_t end) {
  with_type(dtype, [&](auto type) {
    auto* const to = (decltype(type)*)target;
    for (int64_t e = begin; e < end; e += kLanes) {
      const int n = (int)smaller(kLanes, end - e);
      F32 total{};
      for (int64_t share = 0; share < share_count; ++share) total += load_n(shares + share * stride + e, n);
      store_n(to + e, total * factor, n);
    }
  });
}

}  // namespace
}  // namespace fastformer::cpu::FASTFORMER_ISA
