// Attention backward: blocks of keys outside, blocks of queries inside, over the tiles of attention_tiles.h.
//
//   dv_j = sum_i w_ij grad_out_i     dk_j = scale sum_i ds_ij q_i     dq_i = scale sum_j ds_ij k_j
//
// A work item is a chunk of one key head's keys with every query head that reads it, so that nothing that two
// workers write has one address. dQ of several chunks comes as shares, which are added in their order: how
// many there are depends on shapes alone, so bits do not depend on the threads. Heads that share a slice of a
// bias may make up one item, which adds their gradients to it in the order of attention_score_sum.
//
// (Dao, "FlashAttention-2", 2023; delta is its D.)
#pragma once

#include "attention_tiles.h"

namespace fastformer::cpu::FASTFORMER_ISA {
namespace {

struct BackwardBuffers {
  BackwardBuffers(const AttentionBwd& bwd, Parts& parts) : tiles(bwd.scores.attention, true, parts) {
    const Attention& call = bwd.scores.attention;
    ldk = round_up<int64_t>(call.D, kLanes);
    ldv = round_up<int64_t>(call.D_v, kLanes);
    key = parts.take(kBlockKeys * ldk);
    grad_query = parts.take(round_up<int64_t>(call.M, kTileRows) * ldk);
    grad_key = parts.take(bwd.chunk_keys * ldk);
    grad_value = parts.take(bwd.chunk_keys * ldv);
    relative_bias = parts.take(bwd.relative_bias_shares ? call.M + 2 * kBlockKeys : 0);
  }

  TileBuffers tiles;
  int64_t ldk, ldv;
  float* key;            // [kBlockKeys, ldk]
  float* grad_query;     // [M, ldk]
  float* grad_key;       // [chunk_keys, ldk]
  float* grad_value;     // [chunk_keys, ldv]
  float* relative_bias;  // [M + 2 kBlockKeys], of one block of keys
};

// c[kRows, width] += a b, with `multiply` adding the product of a and columns [d, d + lanes) of b to a tile.
template <int kRows, typename Fn>
FASTFORMER_INLINE void accumulate(int64_t width, float* c, int64_t ldc, Fn multiply) {
  const auto columns = [&](auto vectors, int64_t d) __attribute__((always_inline)) {
    Tile<kRows, decltype(vectors)::kCount> tile;
    tile.zero();
    multiply(tile, d);
    tile.add(c + d, ldc);
    tile.store_to(c + d, ldc);
  };
  int64_t d = 0;
  for (; d + kPanel <= width; d += kPanel) columns(RowCount<2>{}, d);
  if (d < width) columns(RowCount<1>{}, d);
}

// The products of one head and one chunk of keys.
template <typename T>
class HeadBackward {
 public:
  HeadBackward(const AttentionBwd& bwd, const BackwardBuffers& buffers, ScoreTiles<T>& tiles,
               const Head& head, int64_t chunk)
      : bwd_(bwd),
        call_(bwd.scores.attention),
        buffers_(buffers),
        tiles_(tiles),
        head_(head),
        chunk_(chunk),
        h_kv_(head.h / (call_.H / call_.H_kv)) {
    if (bwd.relative_bias_shares) {
      const int64_t entries = call_.M + call_.N - 1;
      relative_bias_ =
          bwd.relative_bias_shares + ((head.b * call_.H + head.h) * bwd.chunks + chunk) * entries;
      __builtin_memset(relative_bias_, 0, entries * sizeof(float));
    }
  }

  void run() {
    tiles_.start(head_);
    __builtin_memset(buffers_.grad_query, 0,
                     round_up<int64_t>(head_.M, kRowStep) * buffers_.ldk * sizeof(float));
    const int64_t begin = chunk_ * bwd_.chunk_keys, end = smaller(head_.N, begin + bwd_.chunk_keys);
    for (first_ = begin; first_ < end; first_ += kBlockKeys) {
      count_ = smaller(kBlockKeys, end - first_);
      if (tiles_.take_keys(first_, count_)) run_block();
    }
    write_grad_query();
  }

 private:
  void run_block() {
    pack_rows(key_row<T>(call_.key, head_, h_kv_, first_), call_.key.stride_row, count_, call_.D,
              tiles_.is_real(), 1.0f, buffers_.key, buffers_.ldk);
    const Range rows = tiles_.rows();
    const int64_t diagonals = head_.M + kBlockKeys;
    if (relative_bias_) __builtin_memset(buffers_.relative_bias, 0, diagonals * sizeof(float));
    for (int64_t i = rows.begin; i < rows.end; i += kBlockRows) {
      const int64_t padded_rows = round_up<int64_t>(smaller(kBlockRows, rows.end - i), kRowStep);
      over_row_tiles(padded_rows,
                     [&](auto tile_rows, int64_t r) { query_tile<decltype(tile_rows)::kCount>(i + r, r); });
      over_row_tiles(round_up<int64_t>(count_, kRowStep), [&](auto tile_rows, int64_t j) {
        key_tile<decltype(tile_rows)::kCount>(i, smaller(head_.M, i + padded_rows), j);
      });
    }
    if (relative_bias_) {
      // Entry j - i + M - 1 of the longest M is entry j - first - i + M - 1 of the block's.
      float* const target = relative_bias_ + first_ + call_.M - head_.M;
      for (int64_t n = 0; n < head_.M + count_ - 1; ++n) target[n] += buffers_.relative_bias[n];
    }
  }

  // Weights and gradients of queries from i on, row r of the block, and their dQ.
  template <int kRows>
  void query_tile(int64_t i, int64_t r) {
    float* const grads = buffers_.tiles.grads + r * kTileStride;
    const Range seen =
        tiles_.template fill<kRows>(i, buffers_.tiles.weights + r * kTileStride, grads,
                                    [&](int64_t row, int64_t n, const float* gradients, int64_t count) {
                                      on_gradient(row, n, gradients, count);
                                    });
    const int64_t max_depth = head_.max_depth();
    for (int64_t n = seen.begin; n < seen.end; n += max_depth) {
      accumulate<kRows>(buffers_.ldk, buffers_.grad_query + i * buffers_.ldk, buffers_.ldk,
                        [&](auto& tile, int64_t d) __attribute__((always_inline)) {
                          tile.multiply_add(smaller(max_depth, seen.end - n), grads + n, kTileStride,
                                            buffers_.key + n * buffers_.ldk + d, buffers_.ldk);
                        });
    }
  }

  // dK and dV of keys first_ + j on, from queries [begin, end).
  template <int kRows>
  void key_tile(int64_t begin, int64_t end, int64_t j) {
    const Range rows = head_.visibility.rows_of_keys(first_ + j, kRows, end);
    const int64_t from = larger(begin, rows.begin), depth = rows.end - from;
    if (depth <= 0) return;
    const TileBuffers& tiles = buffers_.tiles;
    const int64_t at = (from - begin) * kTileStride + j, row = first_ - chunk_ * bwd_.chunk_keys + j;
    accumulate<kRows>(buffers_.ldv, buffers_.grad_value + row * buffers_.ldv, buffers_.ldv,
                      [&](auto& tile, int64_t d) __attribute__((always_inline)) {
                        tile.multiply_add_transposed(depth, tiles.weights + at, kTileStride,
                                                     tiles.grad_out + from * tiles.ldo + d, tiles.ldo);
                      });
    accumulate<kRows>(buffers_.ldk, buffers_.grad_key + row * buffers_.ldk, buffers_.ldk,
                      [&](auto& tile, int64_t d) __attribute__((always_inline)) {
                        tile.multiply_add_transposed(depth, tiles.grads + at, kTileStride,
                                                     tiles.query + from * tiles.ldq + d, tiles.ldq);
                      });
  }

  void on_gradient(int64_t i, int64_t n, const float* grads, int64_t count) const {
    if (relative_bias_) add_to(buffers_.relative_bias + head_.M - 1 - i + n, grads, count);
    const ScoreMatrix& bias = bwd_.grad_bias;
    if (!bias.data) return;
    const int64_t at = head_.b * bias.stride_b + head_.h * bias.stride_h + i * bias.stride_m + first_ + n;
    const int64_t real = smaller(count, count_ - n);
    if (bwd_.group_B * bwd_.group_H > 1) {
      add_elements(grads, 1, 1.0f, (float*)bias.data + at, real);
      return;
    }
    with_type(bias.dtype, [&](auto type) {
      write_gradient(grads, 0, 1, real, 1.0f, (decltype(type)*)bias.data + at, 0);
    });
  }

  void write_grad_query() const {
    const HeadRows& target = bwd_.grad_query;
    if (bwd_.query_shares) {
      HeadRows share = target;
      share.data = bwd_.query_shares + chunk_ * bwd_.query_elements;
      write_gradient(buffers_.grad_query, buffers_.ldk, head_.M, call_.D, 1.0f,
                     head_.query_row<float>(share, 0), share.stride_row);
    } else {
      write_gradient(buffers_.grad_query, buffers_.ldk, head_.M, call_.D, call_.scale,
                     head_.query_row<T>(target, 0), target.stride_row);
    }
  }

  const AttentionBwd& bwd_;
  const Attention& call_;
  const BackwardBuffers& buffers_;
  ScoreTiles<T>& tiles_;
  const Head& head_;
  const int64_t chunk_, h_kv_;
  float* relative_bias_ = nullptr;
  int64_t first_ = 0, count_ = 0;
};

template <typename T>
static void backward_item(const AttentionBwd& bwd, const BackwardBuffers& buffers, int64_t b, int64_t h_kv,
                          int64_t chunk) {
  const Attention& call = bwd.scores.attention;
  ScoreTiles<T> tiles(bwd.scores, true, buffers.tiles);
  const int64_t group = call.H / call.H_kv, begin = chunk * bwd.chunk_keys;
  __builtin_memset(buffers.grad_key, 0, bwd.chunk_keys * buffers.ldk * sizeof(float));
  __builtin_memset(buffers.grad_value, 0, bwd.chunk_keys * buffers.ldv * sizeof(float));
  for (int64_t h = h_kv * group; h < (h_kv + 1) * group; ++h) {
    const Head head(call, b, h);
    HeadBackward<T>(bwd, buffers, tiles, head, chunk).run();
  }
  const Head head(call, b, h_kv * group);
  const int64_t count = smaller(bwd.chunk_keys, head.N - begin);
  if (count <= 0) return;
  write_gradient(buffers.grad_key, buffers.ldk, count, call.D, tiles.key_scale(),
                 key_row<T>(bwd.grad_key, head, h_kv, begin), bwd.grad_key.stride_row);
  write_gradient(buffers.grad_value, buffers.ldv, count, call.D_v, 1.0f,
                 key_row<T>(bwd.grad_value, head, h_kv, begin), bwd.grad_value.stride_row);
}

static void attention_bwd(const AttentionBwd& bwd, WorkQueue& queue) {
  const FlushDenormals flush;
  const Attention& call = bwd.scores.attention;
  Parts count{nullptr};
  (void)BackwardBuffers(bwd, count);
  const Scratch scratch(count.used);
  Parts parts{scratch.data()};
  const BackwardBuffers buffers(bwd, parts);
  for (int64_t item = take(queue); item < queue.count; item = take(queue)) {
    const int64_t group = item / bwd.chunks, head_groups = call.H_kv / bwd.group_H;
    const int64_t first_b = group / head_groups * bwd.group_B, first_h = group % head_groups * bwd.group_H;
    for (int64_t b = first_b; b < first_b + bwd.group_B; ++b) {
      for (int64_t h_kv = first_h; h_kv < first_h + bwd.group_H; ++h_kv) {
        with_type(call.dtype, [&](auto type) {
          backward_item<decltype(type)>(bwd, buffers, b, h_kv, item % bwd.chunks);
        });
      }
    }
  }
}

}  // namespace
}  // namespace fastformer::cpu::FASTFORMER_ISA
