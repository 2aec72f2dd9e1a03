// What an attention kernel is told, and which instantiation serves a call on which grid. Neither torch nor
// CUDA: the launcher and the tests, which have no GPU, read the choice from here.
//
// Budget of forward's hot loop, by mma.m16n8k16 (2048 multiply-adds of a warp, 8 cycles of a quarter of an
// A100). At D = 128 such a product belongs to a quarter of a score a lane, and a score costs a fused
// multiply-add, a maximum, an exponential, an addition and half a conversion: 1.1 slots a product. Rescaling
// the sums takes 0.5 at 64 keys a block. A warp of 32 queries uses twice what ldmatrix brings of a key: 0.4
// slots and 6 cycles of shared memory's port, where 16 queries would take 9 of the 8 that there are.
//
// Budget of few queries, whose time is that of reading K and V: 64 keys at D = 128 are 32 KB, which at the
// 13 bytes a clock that DRAM brings a multiprocessor (A100 and H100 alike) take 2500 cycles. A tile of 64
// rows, filled or not, takes 1024 of them on tensor cores and 700 more slots of a quarter, as the emulator
// counts; at D = 64 512 and 550 of 1250 cycles. So addresses and masks of a kernel that serves every argument
// find room beside the copies, and 128 rows would not. A block has one of its two tiles of keys under way,
// 16 KB, and two blocks a multiprocessor more than the 9 KB that its share of DRAM needs in 700 cycles of
// latency.
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
  float* row_max;  // as lse, or with row_sum null: the largest score
  float* row_sum;  // as lse: the sum of exp(score - row_max)
  int64_t stats_stride_b;
  int64_t stats_stride_h;
  int64_t rows;          // elements of lse
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
  // [B, N / page_size] or null. Key n of batch element b is then row n % page_size of page
  // page_table[b][n / page_size], stride_b of key and value leads from page to page, and an element's corner
  // lies at its own length.
  const int32_t* page_table;
  int64_t page_table_stride;
  int32_t page_size;
  int32_t pages;  // of key and value
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
  DType dtype;           // of query, key, value and out
  DType relative_bias_dtype;
  DType sink_dtype;
  float scale;
  float softcap;       // 0: none
  uint32_t threshold;  // a 16-bit decision keeps its weight iff it is >= threshold; 0: no dropout
  float dropout_scale;
  // Workspace where splits > 1, uninitialised:
  float* partial_out;    // [rows, splits, partial_stride]: sums of weights times values
  float* partial_stats;  // [rows, splits, 2]: a row's maximum in scores, and the sum of weights over it
  // Set by the plan:
  int32_t aligned;     // rows come in whole aligned units of 16 bytes
  int32_t tiles;       // of a head's queries; of those of `share` heads
  int32_t mask_pairs;  // two columns of the mask, and of the bias, may be read as one word
  int32_t bias_pairs;
  int32_t logits;  // scores are held as logits; else as bare products
  int32_t share;   // neighbouring heads whose queries lie in one tile: the group, or 1
  int32_t splits;  // blocks of threads that divide a tile's keys among them
  int32_t partial_stride;
  float unit;    // what an element of the scores counts in logits
  float factor;  // and in exponents of 2
};

// Sizes of positions, and sums of a few of them, fit 32 bits.
constexpr int64_t kMostPositions = int64_t{1} << 29;

// A scale whose exponent of 2 a kernel cannot tell from 0 goes the way of scores in logits.
constexpr float kLeastScale = 1e-30f;

constexpr int kHeadWidths[] = {32, 64, 96, 128, 192, 256};

// Of kFew: what D is padded to costs products, and few queries have time for them. Of float32, whose kernels
// leave out the products of columns that are not there, 32 at a time.
constexpr int kFewHeadWidths[] = {64, 128, 256};

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
  constexpr int shared_bytes(int block_d, DType dtype) const {
    return static_cast<int>(size_of(dtype)) * block_d * (block_m() + 2 * block_n);
  }
};

// What an instantiation is for. A plain call has nothing but a positive scale between a product and its
// weight, and what is hidden lies in ranges of keys: window, lengths, packed sequences. Between kWhole and
// kPadded lie two predicates and a register, which a warp of 32 queries at D = 128 does not have; between
// kPadded and kGeneral the loop without masks. kFew is kGeneral with half the rows, which are queries of all
// heads of a group, with keys divided among blocks of threads, and with pages: one division for each row of K
// and V that a thread copies, which few queries have time for. Float32 has no plain instantiations: its
// products take so long that a few branches beside them do not count.
enum class AttentionKind : int32_t {
  kWhole,    // plain and aligned, and D and D_v are the instantiation's
  kPadded,   // plain and aligned, of any width
  kGeneral,  // everything else
  kFew       // everything, for at most kFewQueries; and whatever has a page table
};

// Of float32, whose three products of half the rate take six times the time of 16 bits: what lies between
// them is 5 slots of the 8 cycles that a product of an A100's quarter takes, and small blocks cost nothing.
constexpr AttentionTile float32_forward_tile(int block_d, AttentionKind kind) {
  if (block_d > 128) return {1, 4, 16, 1};
  if (kind == AttentionKind::kFew) return {1, 4, 32, block_d > 64 ? 2 : 3};
  if (block_d > 64) return {1, 8, 32, 1};
  return {2, 4, 32, 2};
}

// At most 96 KB of shared memory, which every chip from Ampere on has. At D = 64 96 keys are what registers
// hold beside the sums: rescaling these costs a third less than at 64 keys, and 128 spill.
constexpr AttentionTile forward_tile(int block_d, AttentionKind kind, DType dtype) {
  if (dtype == DType::kFloat32) return float32_forward_tile(block_d, kind);
  if (kind == AttentionKind::kFew)
    return {1, 4, block_d > 128 ? 32 : 64, block_d > 128 ? 1 : block_d > 64 ? 2 : 3};
  if (block_d > 192) return {1, 4, 64, 1};
  if (kind == AttentionKind::kGeneral) return {1, 8, 64, block_d > 64 ? 1 : 2};
  if (block_d > 128 || (block_d == 128 && kind == AttentionKind::kPadded)) return {1, 8, 64, 1};
  return {2, 4, block_d == 64 && kind == AttentionKind::kWhole ? 96 : 64, 2};
}

// Whether a device of compute capability `major`.x runs this instantiation. At D = 128 32 queries a warp
// leave no register free, and on 12.x, whose code takes more of them, 312 bytes spill; there tensor cores
// have half of an A100's rate, so that shared memory keeps up with 16 queries a warp too.
constexpr bool is_chosen(int block_d, AttentionKind kind, DType dtype, int major) {
  const bool wide = block_d == 64 || block_d == 128 || block_d == 256;
  if (dtype == DType::kFloat32)
    return wide && (kind == AttentionKind::kGeneral || kind == AttentionKind::kFew);
  if (kind == AttentionKind::kFew) return wide;
  return major < 12 || block_d != 128 || kind != AttentionKind::kWhole;
}

// Whether rows of this tensor begin at multiples of 16 bytes.
inline bool has_aligned_rows(const HeadRows& rows, DType dtype, int64_t width) {
  const int64_t unit = 16 / size_of(dtype);
  return reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 && rows.stride_b % unit == 0 &&
         rows.stride_h % unit == 0 && rows.stride_row % unit == 0 && width % unit == 0;
}

// Whether every two columns from an even one on are a word, in a tensor [.., N] of elements of this size.
inline bool has_pairs(const ScoreMatrix& matrix, int64_t size, int64_t N) {
  return matrix.data != nullptr && reinterpret_cast<uintptr_t>(matrix.data) % (2 * size) == 0 &&
         matrix.stride_n == 1 && matrix.stride_b % 2 == 0 && matrix.stride_h % 2 == 0 &&
         matrix.stride_m % 2 == 0 && N % 2 == 0;
}

// Whether whole blocks of keys of a kWhole instantiation are so much more than N that kPadded's smaller ones,
// of which each costs a twelfth more, are the cheaper.
inline bool wastes_keys(int block_d, DType dtype, int64_t N) {
  const auto rounded = [&](AttentionKind kind) {
    const int block_n = forward_tile(block_d, kind, dtype).block_n;
    return (N + block_n - 1) / block_n * block_n;
  };
  return rounded(AttentionKind::kWhole) * 12 > rounded(AttentionKind::kPadded) * 13;
}

inline const char* name_of(AttentionKind kind) {
  switch (kind) {
    case AttentionKind::kWhole:
      return "whole";
    case AttentionKind::kPadded:
      return "padded";
    case AttentionKind::kGeneral:
      return "general";
    case AttentionKind::kFew:
      return "few";
  }
  return "?";
}

// Sets what follows from a call's own arguments, for every pass over its scores.
inline void describe_scores(AttentionFwdParams& p) {
  constexpr float kLog2E = 1.44269504088896340736f;
  p.aligned = has_aligned_rows(p.query, p.dtype, p.D) && has_aligned_rows(p.key, p.dtype, p.D) &&
              has_aligned_rows(p.value, p.dtype, p.D_v) && has_aligned_rows(p.out, p.dtype, p.D_v);
  p.mask_pairs = has_pairs(p.mask, 1, p.N);
  p.bias_pairs = has_pairs(p.bias, size_of(p.bias.dtype), p.N);
  // Of float32 always: the exponent of a bare product and the rounded one of a row's largest differ by more
  // than the last place where both are the same score, and a weight of 1 must be 1.
  p.logits = p.softcap != 0.0f || p.bias.data != nullptr || p.relative_bias != nullptr ||
             p.scale < kLeastScale || p.dtype == DType::kFloat32;
  p.unit = p.logits ? 1.0f : p.scale;
  p.factor = p.unit * kLog2E;
}

// At most so many queries of a head are few: a tile of kFew holds them, and half of another kind's tile is
// empty.
constexpr int kFewQueries = 64;

constexpr int kMostSplits = 128;

// A warp of the kernel that joins splits has a row.
constexpr int kCombineThreads = 128, kCombineRows = kCombineThreads / 32;

struct AttentionPlan {
  int32_t block_d;
  AttentionKind kind;
  uint32_t grid;
  uint32_t threads;
  uint32_t shared_bytes;
  uint32_t combine_grid;  // of the kernel that joins splits; 0: there is one
  int64_t partial_rows;   // of the workspace: rows times splits, or 0
};

// Divides the keys of each tile among `splits` blocks of threads. The grid is empty where there is nothing to
// do.
inline void divide_keys(AttentionFwdParams& p, AttentionPlan& plan, int splits) {
  p.splits = splits;
  plan.grid = static_cast<uint32_t>(int64_t{p.tiles} * (p.H / p.share) * p.B * splits);
  plan.partial_rows = splits > 1 ? p.rows * splits : 0;
  plan.combine_grid = splits > 1 ? static_cast<uint32_t>(ceil_div(p.rows, kCombineRows)) : 0;
}

// Into how many parts the keys of `tiles` tiles are divided where a device runs `resident` blocks of threads
// at a time: what takes the least time, counted in blocks of keys, if every block of threads takes one more
// for itself, and a second kernel with its launch four. (Guessed: no GPU was at hand.) More parts than two
// waves have room for are left out.
inline int best_splits(int64_t tiles, int64_t key_blocks, int64_t resident) {
  constexpr int64_t kOwnTime = 1, kCombineTime = 4;
  int64_t best = 1, least = ceil_div(tiles, resident) * (key_blocks + kOwnTime);
  for (int64_t splits = 2; splits <= key_blocks && splits <= kMostSplits; ++splits) {
    if (tiles * splits > 2 * resident) break;
    const int64_t waves = ceil_div(tiles * splits, resident);
    const int64_t time = waves * (ceil_div(key_blocks, splits) + kOwnTime) + kCombineTime;
    if (time < least) least = time, best = splits;
  }
  return static_cast<int>(best);
}

// The device that a plan is for: the major number of its compute capability, and its multiprocessors.
struct AttentionDevice {
  int major;
  int multiprocessors;
};

inline AttentionKind kind_of(const AttentionFwdParams& p, int block_d, int major) {
  const bool masked = p.mask.data != nullptr || p.key_mask.data != nullptr || p.padding.data != nullptr;
  const bool plain = p.aligned && !p.logits && !masked && p.threshold == 0;
  if (!plain || p.dtype == DType::kFloat32) return AttentionKind::kGeneral;
  const bool whole = p.D == block_d && p.D_v == block_d && !wastes_keys(block_d, p.dtype, p.N) &&
                     is_chosen(block_d, AttentionKind::kWhole, p.dtype, major);
  return whole ? AttentionKind::kWhole : AttentionKind::kPadded;
}

// The least width that holds both head dims.
template <int kCount>
int block_width(const int (&widths)[kCount], const AttentionFwdParams& p) {
  for (const int width : widths) {
    if (p.D <= width && p.D_v <= width) return width;
  }
  return widths[kCount - 1];
}

// Sets the last fields of p. A head has few queries if it has at most `few_queries`, which only tests change.
inline AttentionPlan plan_attention_fwd(AttentionFwdParams& p, const AttentionDevice& device,
                                        int few_queries = kFewQueries) {
  describe_scores(p);
  AttentionPlan plan{};
  const bool few = p.page_table != nullptr || p.M <= few_queries;
  plan.block_d =
      few || p.dtype == DType::kFloat32 ? block_width(kFewHeadWidths, p) : block_width(kHeadWidths, p);
  plan.kind = few ? AttentionKind::kFew : kind_of(p, plan.block_d, device.major);
  // A key that a mask of keys hides from one head of a group, and not from another, is none that the group
  // can leave unread.
  const bool apart = p.key_mask.data != nullptr && p.key_mask.stride_h != 0;
  p.share = few && !apart ? p.group : 1;
  p.partial_stride = static_cast<int32_t>(ceil_div(p.D_v, 8) * 8);  // whole sectors
  const AttentionTile tile = forward_tile(plan.block_d, plan.kind, p.dtype);
  p.tiles = static_cast<int32_t>(ceil_div(int64_t{p.M} * p.share, tile.block_m()));
  plan.threads = tile.threads();
  plan.shared_bytes = tile.shared_bytes(plan.block_d, p.dtype);
  int splits = 1;
  if (few) {
    const int64_t queries = ceil_div(tile.block_m(), p.share);
    const int64_t seen = int64_t{p.left} + p.right + (p.M < queries ? p.M : queries);
    const int64_t key_blocks = ceil_div(seen < p.N ? seen : p.N, tile.block_n);
    splits = best_splits(int64_t{p.tiles} * (p.H / p.share) * p.B, key_blocks,
                         int64_t{device.multiprocessors} * tile.blocks);
  }
  divide_keys(p, plan, splits);
  return plan;
}

}  // namespace fastformer::cuda
