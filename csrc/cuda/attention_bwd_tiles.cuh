// Which queries a block of keys meets in attention's backward, where their rows lie, and how they are copied.
#pragma once

#include "attention_bwd_rows.cuh"

namespace fastformer::cuda {

// Tiles of queries that see a block of keys, by number, begin <= full_begin <= full_end <= end; those in
// [full_begin, full_end) see all of it, masks apart. Rows past the last query hide nothing: their weights are
// 0.
struct QueryTiles {
  int begin, full_begin, full_end, end;
};

template <int kBlockM, int kBlockN>
__device__ __forceinline__ QueryTiles query_tiles(const AttentionFwdParams& p, const Head& head, int n0) {
  const int first_key = max(n0, head.key_begin), last_key = min(n0 + kBlockN, head.key_end) - 1;
  const int first = max(0, first_key - head.offset - p.right);
  const int last = min(head.M - 1, last_key - head.offset + p.left);
  if (first_key > last_key || first > last) return {0, 0, 0, 0};
  QueryTiles tiles{first / kBlockM, 0, 0, last / kBlockM + 1};
  const bool whole = n0 >= head.key_begin && n0 + kBlockN <= head.key_end;
  const int full_first = max(0, last_key - head.offset - p.right);
  const int full_end = first_key - head.offset + p.left + 1;
  tiles.full_begin = min((full_first + kBlockM - 1) / kBlockM, tiles.end);
  tiles.full_end = full_end >= head.M ? tiles.end : max(full_end, 0) / kBlockM;
  tiles.full_end = max(whole ? tiles.full_end : 0, tiles.full_begin);
  return tiles;
}

// The first block of keys that the queries from m0 on see.
template <int kBlockN>
__device__ __forceinline__ int first_key_tile(const AttentionFwdParams& p, const Head& head, int m0) {
  return max(head.key_begin, m0 + head.offset - p.left) / kBlockN;
}

// The keys that a block takes.
struct KeyTile {
  int n0;
  int number;         // n0 / kBlockN
  int b, first_head;  // the first query head that reads them
};

// What belongs to one head's queries, from its first row on.
struct HeadQueries {
  const uint16_t* query;
  const uint16_t* grad_out;
  const RowPivot* pivots;
  const float* factors;
  float* sums;
  int32_t* turns;
};

template <int kBlockM, int kD>
__device__ __forceinline__ HeadQueries head_queries(const AttentionBwdParams& p, const Head& head) {
  const auto first_row = [&](const HeadRows& rows) {
    return static_cast<const uint16_t*>(rows.data) + head.b * rows.stride_b + head.h * rows.stride_h +
           head.first_query * rows.stride_row;
  };
  const int64_t slot = slot_of_tile(p, head, 0, kBlockM);
  return {first_row(p.call.query),    first_row(p.grad_out),        p.pivots + slot * kBlockM,
          p.factors + slot * kBlockM, p.sums + slot * kBlockM * kD, p.turns + slot * kBackwardWarps};
}

// Starts copies of rows `first` on, of M, into a tile [kRows, kD]; kStep rows at a time. A tile is full
// unless it is the last. Rows are aligned here, and strides 32-bit.
template <int kD, int kRows, int kStep, bool kLast>
__device__ __forceinline__ void copy_aligned(const uint16_t* rows, int64_t stride, int width, int first,
                                             int M, uint32_t place) {
  const uint32_t thread = forgotten(threadIdx.x);  // no register for what this gives
  const int unit = static_cast<int>(thread % 8), row = static_cast<int>(thread / 8);
  const uint32_t pitch = 2 * static_cast<uint32_t>(stride);
  const char* from =
      reinterpret_cast<const char*>(rows) + uint64_t{static_cast<uint32_t>(first + row)} * pitch + 16 * unit;
  place += place_in_panel<kD>(row, unit);
#pragma unroll
  for (int i = 0; i < kRows / kStep; ++i, from += kStep * pitch) {
    from = forgotten(from);  // one addition after the other, and the panels' are constants
#pragma unroll
    for (int panel = 0; panel < kD / kPanelWidth; ++panel) {
      copy_async(place + (panel * kRows + i * kStep) * kPanelPitch, from + panel * kPanelPitch,
                 (!kLast || first + row + i * kStep < M) && panel * kPanelWidth < width - 8 * unit);
    }
  }
}

// A warp's gradients of scores, from query i0 and key j0 on.
template <int kRowTiles, int kTiles>
__device__ __forceinline__ void write_bias_gradient(const ScoreMatrix& to, const Head& head, int i0, int j0,
                                                    const float (&grads)[kRowTiles][kTiles][4]) {
  void* const base = row_at(to.data, to.dtype, head.b * to.stride_b + head.h * to.stride_h);
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int i = i0 + 16 * m + e / 2 * 8 + lane_row(), j = j0 + 8 * n + lane_column() + e % 2;
        if (i >= head.M || j >= head.N) continue;
        store_element(base, to.dtype, i * to.stride_m + j * to.stride_n, grads[m][n][e]);
      }
    }
  }
}

}  // namespace fastformer::cuda
