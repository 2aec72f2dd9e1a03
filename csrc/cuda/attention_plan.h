// What an attention kernel is told, and which instantiation serves a call on which grid. Neither torch nor
// CUDA: the launcher and the tests, which have no GPU, read the choice from here.
//
// Budget of forward's hot loop, by mma.m16n8k16 (2048 multiply-adds of a warp, 8 cycles of a quarter of an
// A100). At D = 128 such a product belongs to a quarter of a score a lane, and a score costs a fused
// multiply-add, a maximum, an exponential, an addition and half a conversion: 1.1 slots a product. Rescaling
// the sums takes 0.5 at 64 keys a block. A warp of 32 queries uses twice what ldmatrix brings of a key: 0.4
// slots and 6 cycles of shared memory's port, where 16 queries would take 9 of the 8 that there are.
#pragma once

#include <cstdint>

#include "../shapes.h"

namespace fastformer::cuda {

// A call as kernels see it; scores as shapes.h says. Strides count elements. Packed sequences: stride_b of
// rows and statistics is 0, M and N are those of the longest.
struct AttentionFwdParams {
  HeadRows query;  // [B, H, M, D]
  HeadRows key;    // [B, H_kv, N, D]
  HeadRows value;  // [B, H_kv, N, D_v]
  HeadRows out;    // [B, H, M, D_v]
  float* lse;      // [B, H, M]
  float* row_max;  // as lse: the largest score
  float* row_sum;  // as lse: the sum of exp(score - row_max)
  int64_t stats_stride_b;
  int64_t stats_stride_h;
  ScoreMatrix mask;      // bool; data null: none
  ScoreMatrix key_mask;  // a mask that is the same for all queries
  ScoreMatrix padding;   // the same for all queries and heads
  ScoreMatrix bias;
  const void* relative_bias;  // [H or 1, M + N - 1] or null
  int64_t relative_bias_stride_h;
  const void* sink;         // [H] or null
  const void* key_lengths;  // [B] or null
  const uint64_t* seed;     // [1]; read if threshold > 0
  const int32_t* starts_q;  // [B + 1] or null: packed sequences
  const int32_t* starts_k;
  int32_t B;
  int32_t H;
  int32_t group;  // H / H_kv
  int32_t M;
  int32_t N;
  int32_t D;
  int32_t D_v;
  int32_t left;  // of the window: at most M + N, which hides nothing
  int32_t right;
  int32_t lower_right;
  int32_t wide_lengths;  // key_lengths are int64, not int32
  DType dtype;           // of query, key, value and out: 16 bits
  DType relative_bias_dtype;
  DType sink_dtype;
  float scale;
  float softcap;       // 0: none
  uint32_t threshold;  // a 16-bit decision keeps its weight iff it is >= threshold; 0: no dropout
  float dropout_scale;
  // Set by the plan:
  int32_t aligned;     // rows come in whole aligned units of 16 bytes
  int32_t tiles;       // of a head's queries
  int32_t mask_pairs;  // two columns of the mask, and of the bias, may be read as one word
  int32_t bias_pairs;
  int32_t logits;  // scores are held as logits; else as bare products
  float unit;      // what an element of the scores counts in logits
  float factor;    // and in exponents of 2
};

// Sizes of positions, and sums of a few of them, fit 32 bits.
constexpr int64_t kMostPositions = int64_t{1} << 29;

// A scale whose exponent of 2 a kernel cannot tell from 0 goes the way of scores in logits.
constexpr float kLeastScale = 1e-30f;

constexpr int kHeadWidths[] = {32, 64, 96, 128, 192, 256};

// How one instantiation divides its work: each warp has row_tiles times 16 queries of its block, and all
// warps go through the keys together, block_n at a time.
struct AttentionTile {
  int row_tiles;
  int warps;
  int block_n;
  int blocks;  // that shall share an SM: how many registers a thread may have

  constexpr int block_m() const { return 16 * row_tiles * warps; }
  constexpr int threads() const { return 32 * warps; }
  // Q, K and V lie in shared memory.
  constexpr int shared_bytes(int block_d) const { return 2 * block_d * (block_m() + 2 * block_n); }
};

// What an instantiation is for. A plain call has nothing but a positive scale between a product and its
// weight, and what is hidden lies in ranges of keys: window, lengths, packed sequences. Between kWhole and
// kPadded lie two predicates and a register, which a warp of 32 queries at D = 128 does not have; between
// kPadded and kGeneral the loop without masks.
enum class AttentionKind : int32_t {
  kWhole,   // plain and aligned, and D and D_v are the instantiation's
  kPadded,  // plain and aligned, of any width
  kGeneral  // everything else
};

// At most 96 KB of shared memory, which every chip from Ampere on has. At D = 64 96 keys are what registers
// hold beside the sums: rescaling these costs a third less than at 64 keys, and 128 spill.
constexpr AttentionTile forward_tile(int block_d, AttentionKind kind) {
  if (block_d > 192) return {1, 4, 64, 1};
  if (kind == AttentionKind::kGeneral) return {1, 8, 64, block_d > 64 ? 1 : 2};
  if (block_d > 128 || (block_d == 128 && kind == AttentionKind::kPadded)) return {1, 8, 64, 1};
  return {2, 4, block_d == 64 && kind == AttentionKind::kWhole ? 96 : 64, 2};
}

// Whether a device of compute capability `major`.x runs this instantiation. At D = 128 32 queries a warp
// leave no register free, and on 12.x, whose code takes more of them, 312 bytes spill; there tensor cores
// have half of an A100's rate, so that shared memory keeps up with 16 queries a warp too.
constexpr bool is_chosen(int block_d, AttentionKind kind, int major) {
  return major < 12 || block_d != 128 || kind != AttentionKind::kWhole;
}

// Whether rows of this tensor begin at multiples of 16 bytes.
inline bool has_aligned_rows(const HeadRows& rows, int64_t width) {
  return reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 && rows.stride_b % 8 == 0 &&
         rows.stride_h % 8 == 0 && rows.stride_row % 8 == 0 && width % 8 == 0;
}

// Whether every two columns from an even one on are a word, in a tensor [.., N] of elements of this size.
inline bool has_pairs(const ScoreMatrix& matrix, int64_t size, int64_t N) {
  return matrix.data != nullptr && reinterpret_cast<uintptr_t>(matrix.data) % (2 * size) == 0 &&
         matrix.stride_n == 1 && matrix.stride_b % 2 == 0 && matrix.stride_h % 2 == 0 &&
         matrix.stride_m % 2 == 0 && N % 2 == 0;
}

// Whether whole blocks of keys of a kWhole instantiation are so much more than N that kPadded's smaller ones,
// of which each costs a twelfth more, are the cheaper.
inline bool wastes_keys(int block_d, int64_t N) {
  const auto rounded = [&](AttentionKind kind) {
    const int block_n = forward_tile(block_d, kind).block_n;
    return (N + block_n - 1) / block_n * block_n;
  };
  return rounded(AttentionKind::kWhole) * 12 > rounded(AttentionKind::kPadded) * 13;
}

inline const char* name_of(AttentionKind kind) {
  return kind == AttentionKind::kWhole ? "whole" : kind == AttentionKind::kPadded ? "padded" : "general";
}

struct AttentionPlan {
  int32_t block_d;
  AttentionKind kind;
  uint32_t grid;
  uint32_t threads;
  uint32_t shared_bytes;
};

// For a device of compute capability `major`.x. The grid is empty where there is nothing to do. Sets the last
// fields of p.
inline AttentionPlan plan_attention_fwd(AttentionFwdParams& p, int major) {
  constexpr float kLog2E = 1.44269504088896340736f;
  const int width = p.D > p.D_v ? p.D : p.D_v;
  AttentionPlan plan{};
  for (const int block_d : kHeadWidths) {
    plan.block_d = block_d;
    if (width <= block_d) break;
  }
  p.aligned = has_aligned_rows(p.query, p.D) && has_aligned_rows(p.key, p.D) &&
              has_aligned_rows(p.value, p.D_v) && has_aligned_rows(p.out, p.D_v);
  p.mask_pairs = has_pairs(p.mask, 1, p.N);
  p.bias_pairs = has_pairs(p.bias, size_of(p.bias.dtype), p.N);
  p.logits =
      p.softcap != 0.0f || p.bias.data != nullptr || p.relative_bias != nullptr || p.scale < kLeastScale;
  p.unit = p.logits ? 1.0f : p.scale;
  p.factor = p.unit * kLog2E;
  const bool masked = p.mask.data != nullptr || p.key_mask.data != nullptr || p.padding.data != nullptr;
  const bool general = !p.aligned || p.logits || masked || p.threshold > 0;
  const bool whole = p.D == plan.block_d && p.D_v == plan.block_d && !wastes_keys(plan.block_d, p.N) &&
                     is_chosen(plan.block_d, AttentionKind::kWhole, major);
  plan.kind = general ? AttentionKind::kGeneral : whole ? AttentionKind::kWhole : AttentionKind::kPadded;
  const AttentionTile tile = forward_tile(plan.block_d, plan.kind);
  p.tiles = (p.M + tile.block_m() - 1) / tile.block_m();
  plan.grid = static_cast<uint32_t>(int64_t{p.tiles} * p.H * p.B);
  plan.threads = tile.threads();
  plan.shared_bytes = tile.shared_bytes(plan.block_d);
  return plan;
}

}  // namespace fastformer::cuda
