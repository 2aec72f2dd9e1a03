// What attention's backward kernels are told, and which instantiation serves a call on which grids. Neither
// torch nor CUDA.
#pragma once

#include "attention_plan.h"

namespace fastformer::cuda {

// Of a row: what is taken off the exponent of its weights, and what is added to the gradient of its weights.
struct alignas(8) RowPivot {
  float shift, offset;
};

// A query tile of one head has a slot in the workspace: slot_of_tile of attention_bwd_tiles.cuh says which.
struct AttentionBwdParams {
  AttentionFwdParams call;  // out, row_max and row_sum as forward left them; lse is not read
  HeadRows grad_out;        // [B, H, M, D_v]
  HeadRows grad_query;      // [B, H, M, D]
  HeadRows grad_key;        // [B, H_kv, N, D]
  HeadRows grad_value;      // [B, H_kv, N, D_v]
  const float* grad_lse;    // as row_max, or null
  ScoreMatrix grad_bias;    // of a bias that is broadcast over nothing, zeroed before; data null: not wanted
  float* grad_sink;         // [H], or null
  // Of the returned weights, data null where there is none; stride_h is 0 where they are a mean over heads,
  // and the scale then 1 / H.
  ScoreMatrix grad_weights;
  float grad_weights_scale;
  // Workspace, uninitialised:
  RowPivot* pivots;    // [H, slots, block_m]
  float* factors;      // [H, slots, block_m]: 1 / row_sum; read where scores are logits
  float* sums;         // [H, slots, block_m, block_d]: dQ, each lane's sums of a step side by side
  float* zeros;        // [block_m, block_d] / 8: what the first adds to
  int32_t* turns;      // [H, slots, warps]: how many blocks of keys have added to their share of sums
  int32_t* ticket;     // [1]: how many programs over keys have begun
  float* sink_shares;  // [B, H, tiles], or null
  float* deltas;       // as row_max: sum_j w_ij dw_ij, given; null: grad_out . out
  float* row_grads;    // [B, H, M]: sum_j ds_ij, zeros before; or null
  int32_t* ranges;     // [B, H, 2]: a head's first real key, and the one after its last
  // Set by the plan:
  int32_t slots;      // of a head
  int32_t key_tiles;  // of a head
  int32_t aligned;    // rows of out, grad_out and of the gradients come in whole aligned units too
};

// target = sums of `from` over the dimensions in which target has size 1. Both are contiguous.
struct RowSums {
  const float* from;  // [B, H, M]
  void* target;       // [target_B, target_H, target_M]
  DType dtype;        // of target
  int32_t B, H, M;
  int32_t target_B, target_H, target_M;
};

constexpr int kBackwardWarps = 8;  // of a block, at most; of the kernel over rows

// The fewest queries or keys that a tile has.
constexpr int kFewestRows = 16;

// Bytes that the pass over keys takes beside its tiles, at most.
constexpr int kStaticShared = 1024;

// How one instantiation divides its work. The warps stand in a grid over each product's result: over scores
// [block_m, block_n], dK and dV [block_n, block_d], and dQ [block_m, block_d].
struct BackwardTile {
  int block_m;
  int block_n;
  int score_rows;  // of warps, along queries
  int key_rows;    // along keys
  int query_rows;  // along queries
  int stages;      // of Q and dO
  int blocks;      // that shall share an SM
  int warps = kBackwardWarps;

  constexpr int threads() const { return 32 * warps; }
};

// Columns of P and of dS in shared memory, which lie in panels of 128 bytes.
constexpr int score_columns(const BackwardTile& tile, DType dtype) {
  const int panel = 128 / static_cast<int>(size_of(dtype));
  return (tile.block_n + panel - 1) / panel * panel;
}

// K and V; Q and dO of each stage; P and dS.
constexpr int shared_bytes_of(const BackwardTile& tile, int block_d, DType dtype) {
  const int elements =
      block_d * (tile.block_n + tile.stages * tile.block_m) + tile.block_m * score_columns(tile, dtype);
  return 2 * static_cast<int>(size_of(dtype)) * elements;
}

// Which calls an instantiation serves: all; those with nothing but ranges of hidden keys, in 16 bits up to D
// = 128; or all of wider heads where a block has too little shared memory for the first.
enum class BackwardKind : int32_t { kGeneral, kPlain, kSmall };

// Of float32, whose products take six times as long, and whose tiles twice the bytes: 96 KB at D = 64 and 72
// at 128; 136 at 256. Small tiles take 68: 32 keys would be 100 of 99, and of 16 keys two warps make scores.
constexpr BackwardTile float32_backward_tile(int block_d, BackwardKind kind) {
  if (kind == BackwardKind::kSmall) return {16, 16, 1, 1, 1, 1, 1, 4};
  if (block_d > 64) return {32, 32, 2, 2, 2, 1, block_d > 128 ? 1 : 2, 4};
  return {64, 64, 4, 4, 4, 1, 1};
}

// Wider tiles read less of shared memory for a product: ldmatrix brings 32 rows to a warp for 32 or 64
// columns. The general kernel has half the keys, and fits 99 KB up to D = 128: it serves plain calls too
// where there is no more. It runs twice the instructions, which there, where tensor cores have half of an
// A100's rate, find their slots: 6 of 16 for a product at D = 128. Small tiles take 73 KB.
constexpr BackwardTile backward_tile(int block_d, BackwardKind kind, DType dtype) {
  if (dtype == DType::kFloat32) return float32_backward_tile(block_d, kind);
  if (kind == BackwardKind::kSmall) return {32, 32, 2, 1, 1, 1, 1, 4};
  if (kind == BackwardKind::kGeneral) return {64, 64, 4, 2, 2, 1, 1};
  if (block_d > 64) return {64, 128, 2, 4, 2, 2, 1};
  return {128, 128, 4, 4, 4, 2, 1};
}

// Whether there is an instantiation, and a block may have its shared memory.
constexpr bool is_chosen(int block_d, BackwardKind kind, DType dtype, int64_t most_shared) {
  if (kind == BackwardKind::kPlain && (block_d > 128 || dtype == DType::kFloat32)) return false;
  if (kind == BackwardKind::kSmall && block_d <= 128) return false;
  const bool fits =
      shared_bytes_of(backward_tile(block_d, kind, dtype), block_d, dtype) + kStaticShared <= most_shared;
  return fits &&
         (kind != BackwardKind::kSmall || !is_chosen(block_d, BackwardKind::kGeneral, dtype, most_shared));
}

constexpr int kBackwardHeadWidths[] = {64, 128, 256};

struct AttentionBwdPlan {
  int32_t block_d;
  BackwardKind kind;
  int32_t block_m;
  int32_t query_grid;  // of the kernels that take a tile of queries a block; 0: nothing to do
  int32_t key_grid;
  int32_t threads;
  int32_t shared_bytes;        // of the pass over keys
  int32_t query_shared_bytes;  // of the last kernel
  int64_t rows;                // of the workspace: H slots block_m
};

// `total_queries` is the number of packed rows, or 0; `most_shared` what a block may have. block_d is 0 where
// the chip has too little.
inline AttentionBwdPlan plan_attention_bwd(AttentionBwdParams& p, int64_t total_queries,
                                           int64_t most_shared) {
  AttentionFwdParams& call = p.call;
  describe_scores(call);
  p.aligned = call.aligned && has_aligned_rows(p.grad_out, call.dtype, call.D_v) &&
              has_aligned_rows(p.grad_query, call.dtype, call.D) &&
              has_aligned_rows(p.grad_key, call.dtype, call.D) &&
              has_aligned_rows(p.grad_value, call.dtype, call.D_v);
  const bool masked =
      call.mask.data != nullptr || call.key_mask.data != nullptr || call.padding.data != nullptr;
  const int width = call.D > call.D_v ? call.D : call.D_v;
  AttentionBwdPlan plan{};
  for (const int block_d : kBackwardHeadWidths) {
    plan.block_d = block_d;
    if (width <= block_d) break;
  }
  constexpr int64_t kMostStride = int64_t{1} << 30;  // bytes of a stride, and of a step of them, fit 32 bits
  const bool near = call.query.stride_row < kMostStride / 32 && p.grad_out.stride_row < kMostStride / 32;
  const bool plain =
      p.aligned && near && !call.logits && !masked && call.threshold == 0 && p.grad_weights.data == nullptr;
  const auto chosen = [&](BackwardKind kind) {
    return is_chosen(plan.block_d, kind, call.dtype, most_shared);
  };
  if (plain && chosen(BackwardKind::kPlain)) plan.kind = BackwardKind::kPlain;
  if (chosen(BackwardKind::kSmall)) plan.kind = BackwardKind::kSmall;
  const BackwardTile tile = backward_tile(plan.block_d, plan.kind, call.dtype);
  plan.shared_bytes = shared_bytes_of(tile, plan.block_d, call.dtype);
  plan.query_shared_bytes = call.dtype == DType::kFloat32 ? 0 : 2 * plan.block_d * tile.block_m;
  plan.threads = tile.threads();
  plan.block_m = tile.block_m;
  if (plan.shared_bytes + kStaticShared > most_shared) plan.block_d = 0;
  call.tiles = (call.M + tile.block_m - 1) / tile.block_m;
  p.key_tiles = (call.N + tile.block_n - 1) / tile.block_n;
  p.slots = call.starts_q == nullptr ? call.B * call.tiles
                                     : static_cast<int32_t>(total_queries / tile.block_m) + call.B;
  plan.query_grid = call.B * call.H * call.tiles;
  plan.key_grid = call.B * (call.H / call.group) * p.key_tiles;
  plan.rows = int64_t{call.H} * p.slots * tile.block_m;
  return plan;
}

}  // namespace fastformer::cuda
