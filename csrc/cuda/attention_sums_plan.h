// What the sums of weights and of gradients of scores are told, and how a call divides them among blocks.
// Neither torch nor CUDA.
#pragma once

#include "attention_bwd_plan.h"

namespace fastformer::cuda {

// A tile has so many queries and as many keys, and takes so many columns of both at a time.
constexpr int kScoreSumBlock = 64;
constexpr int kScoreSumThreads = 128;

// What is summed, and over what beside the heads and batch elements that share a result.
enum class SumKind : int32_t {
  kWeights,    // weights after dropout
  kMatrix,     // gradients of scores
  kRow,        // these, over queries
  kDiagonals,  // these, over all scores with one j - i
  kDeltas      // weights times their gradients, over keys
};

// A block adds up the tiles of its steps in a tile of registers, one after another: of each member, a batch
// element and a head, `inner` tiles that lie side by side in the direction of the sum.
struct AttentionSumsParams {
  AttentionBwdParams bwd;  // of gradients after its plan; else what a weight, or a delta, is made of
  ScoreMatrix target;      // contiguous, of size 1 where it is summed; shares where there are some
  SumKind kind;
  float factor;     // of every sum
  int32_t block_m;  // of the plan of backward
  // Set by the plan:
  int64_t share_stride;  // elements of target
  int32_t target_H;
  int32_t slabs;      // target's heads, of all its batch elements
  int32_t members_h;  // heads that share a slab
  int32_t tiles_m;    // of target; diagonals of tiles lie along tiles_n
  int32_t tiles_n;
  int32_t inner;
  int32_t steps;       // of a tile of target
  int32_t part_steps;  // of a block
  int32_t aligned;     // rows come in whole aligned units
};

// Blocks there shall be, as far as steps can be divided: what shares take is bounded by them, 8 MB.
constexpr int64_t kWantedSumBlocks = 512;

struct AttentionSumsPlan {
  int64_t grid;
  int32_t shares;  // of target, float32, to be added in their order; 0: target is written
};

// Target's sizes, 1 or the call's. Nothing of the call may be empty.
inline AttentionSumsPlan plan_attention_sums(AttentionSumsParams& p, int32_t target_B, int32_t target_H) {
  const AttentionFwdParams& call = p.bwd.call;
  const int32_t tiles_m = (call.M + kScoreSumBlock - 1) / kScoreSumBlock;
  const int32_t tiles_n = (call.N + kScoreSumBlock - 1) / kScoreSumBlock;
  const bool over_queries = p.kind == SumKind::kRow, over_keys = p.kind == SumKind::kDeltas;
  const bool diagonal = p.kind == SumKind::kDiagonals;
  p.target_H = target_H;
  p.slabs = target_B * target_H;
  p.members_h = call.H / target_H;
  p.tiles_m = over_queries || diagonal ? 1 : tiles_m;
  p.tiles_n = diagonal ? tiles_m + tiles_n - 1 : over_keys ? 1 : tiles_n;
  p.inner = over_queries ? tiles_m : over_keys ? tiles_n : 1;
  if (diagonal) p.inner = tiles_m < tiles_n ? tiles_m : tiles_n;
  p.steps = call.B / target_B * p.members_h * p.inner;
  const int64_t blocks = int64_t{p.slabs} * p.tiles_m * p.tiles_n;
  int64_t parts = over_keys ? 1 : kWantedSumBlocks / blocks;
  parts = parts < 1 ? 1 : parts > p.steps ? p.steps : parts;
  p.part_steps = static_cast<int32_t>((p.steps + parts - 1) / parts);
  parts = (p.steps + p.part_steps - 1) / p.part_steps;
  const int64_t rows = over_queries || diagonal ? 1 : call.M;
  const int64_t columns = diagonal ? int64_t{call.M} + call.N - 1 : call.N;
  p.target.stride_n = 1;
  p.target.stride_m = columns;
  p.target.stride_h = rows * columns;
  p.target.stride_b = target_H * rows * columns;
  p.share_stride = p.slabs * rows * columns;
  p.aligned = has_aligned_rows(call.query, call.dtype, call.D) &&
              has_aligned_rows(call.key, call.dtype, call.D) &&
              (p.kind == SumKind::kWeights || (has_aligned_rows(call.value, call.dtype, call.D_v) &&
                                               has_aligned_rows(p.bwd.grad_out, call.dtype, call.D_v)));
  AttentionSumsPlan plan{blocks * parts, static_cast<int32_t>(parts)};
  // An entry has a share of the diagonal of tiles that its scores begin on, and one of the next.
  if (diagonal) plan.shares = static_cast<int32_t>(2 * parts);
  if (plan.shares == 1) plan.shares = 0;
  return plan;
}

}  // namespace fastformer::cuda
