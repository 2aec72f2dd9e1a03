// Attention forward: online softmax over blocks of keys, a tile of one head's queries a thread block (Dao,
// "FlashAttention-2", 2023).
//   out = sum_j keep_ij e^(s_ij - max) v_j / (sum_j e^(s_ij - max) (1 - p))     lse = max + ln(sum)
// A block's V is fetched while its scores are computed, and the next block's K while weights meet V.
#pragma once

#include "attention_scores.cuh"
#include "attention_tiles.cuh"

namespace fastformer::cuda {

template <DType kType, int kD, AttentionKind kKind>
struct ForwardTile {
  static constexpr bool kPlain = kKind != AttentionKind::kGeneral;
  static constexpr AttentionTile kTile = forward_tile(kD, kKind);
  static constexpr int kRowTiles = kTile.row_tiles, kTiles = kTile.block_n / 8;
  static constexpr int kBlockM = kTile.block_m(), kBlockN = kTile.block_n, kThreads = kTile.threads();
  // Bytes from Q's place in shared memory.
  static constexpr int kPlaceOfK = 2 * kBlockM * kD, kPlaceOfV = kPlaceOfK + 2 * kBlockN * kD;
  using Copier = RowCopier<kD, kThreads, kKind == AttentionKind::kWhole>;
  static constexpr int kStep = Copier::kStep;

  const AttentionFwdParams& p;
  // In shared memory: what full blocks do not need takes no registers there.
  const Head& head;
  const KeyBlocks& blocks;
  int n0;    // the first key of the block at hand
  int left;  // keys that are to be read from there on, counted from the thread's first row
  const int warp_row = static_cast<int>(threadIdx.x) / kWarp * 16 * kRowTiles;
  const uint32_t shared;
  const uint32_t q_address, k_address, v_address;  // for ldmatrix
  Copier keys, values;
  RealKeys real, next_real;  // unless kPlain: of the block at hand, of the one whose K comes next
  uint64_t seed = 0;
  RowState<kRowTiles> state;
  float out[kRowTiles][kD / 8][4] = {};

  __device__ __forceinline__ ForwardTile(const AttentionFwdParams& p, const Head& head,
                                         const KeyBlocks& blocks, uint32_t shared)
      : p(p),
        head(head),
        blocks(blocks),
        n0(blocks.begin),
        left(min(blocks.end, head.key_end) - blocks.begin - Copier::first_row()),
        shared(shared),
        q_address(units_then_rows<kD>(shared) + warp_row * Panel<kD>::kPitch),
        k_address(rows_then_units<kD>(shared + kPlaceOfK)),
        v_address(units_then_rows<kD>(shared + kPlaceOfV)),
        keys(p.key, head.b, head.h_kv, head.first_key + blocks.begin, p.D),
        values(p.value, head.b, head.h_kv, head.first_key + blocks.begin, p.D_v) {
    if (!kPlain && p.threshold > 0) seed = *p.seed;
  }

  template <int kRows, typename IsReal>
  __device__ __forceinline__ void copy(Copier& rows, int place, IsReal is_real) const {
    if (kPlain || p.aligned) {
      rows.template start<kRows>(shared + place, is_real);
    } else {
      rows.template copy_elements<kRows>(shared + place, is_real);
    }
    copies_commit();
  }

  __device__ __forceinline__ void copy_queries() const {
    Copier rows(p.query, head.b, head.h, head.first_query + head.m0, p.D);
    const int left = head.M - head.m0 - Copier::first_row();
    copy<kBlockM>(rows, 0, [&](int i) { return i * kStep < left; });
  }

  // Keys of a block of which `left` are to be read, counted from the thread's first row.
  __device__ __forceinline__ void copy_block(Copier& rows, int place, int left,
                                             const RealKeys& of_block) const {
    if constexpr (kPlain) {
      copy<kBlockN>(rows, place, [&](int i) { return i * kStep < left; });
    } else {
      copy<kBlockN>(rows, place, [&](int i) { return of_block.has(i * kStep + Copier::first_row()); });
    }
  }

  __device__ __forceinline__ void start() {
    if constexpr (!kPlain) next_real.find(p, head, n0);
    copy_queries();
    copy_block(keys, kPlaceOfK, left, next_real);
  }

  // One block of keys: its K is on the way, or there.
  template <bool kEdge>
  __device__ __forceinline__ void fold_block() {
    copies_wait<0>();
    __syncthreads();  // K is there, and everybody is done with the last block's V
    if constexpr (!kPlain) real = next_real;
    copy_block(values, kPlaceOfV, left, real);
    float scores[kRowTiles][kTiles][4];
    multiply_keys<kType, kD, kBlockM>(q_address, k_address, scores);

    copies_wait<0>();
    __syncthreads();  // V is there, and everybody is done with K
    if constexpr (!kPlain) next_real.find(p, head, n0 + kBlockN);
    copy_block(keys, kPlaceOfK, left - kBlockN, next_real);

    modify<kEdge>(scores);
    fold_scores<!kPlain>(p.factor, state, scores, out);
    if constexpr (!kPlain) {
      if (p.threshold > 0) drop(p, head, seed, head.m0 + warp_row, n0, scores);
    }
    multiply_values<kType, kD>(v_address, scores, out);
  }

  // Bare products become logits, unless nothing but the scale lies between; what is hidden becomes -inf.
  template <bool kEdge>
  __device__ __forceinline__ void modify(float (&scores)[kRowTiles][kTiles][4]) const {
    const int i0 = head.m0 + warp_row;
    if constexpr (kPlain) {
      if constexpr (kEdge) hide_outside(p, head, i0, n0, scores);
    } else {
      if (p.logits) scale_and_cap(p, scores);
      if (p.bias_pairs) {
        add_bias<true>(p, head, i0, n0, scores);
      } else if (p.bias.data != nullptr) {
        add_bias<false>(p, head, i0, n0, scores);
      }
      if (p.relative_bias != nullptr) add_relative_bias(p, head, i0, n0, scores);
      if (n0 < blocks.full_begin || n0 >= blocks.full_end) hide_outside(p, head, i0, n0, scores);
      if (p.padding.data != nullptr || p.key_mask.data != nullptr) hide_keys(real, scores);
      if (p.mask_pairs) {
        hide_masked<true>(p, head, i0, n0, scores);
      } else if (p.mask.data != nullptr) {
        hide_masked<false>(p, head, i0, n0, scores);
      }
    }
  }

  __device__ __forceinline__ void next_block() {
    n0 += kBlockN;
    left -= kBlockN;
  }

  __device__ __forceinline__ void fold_all() {
    start();
    if constexpr (kPlain) {
      // At most twice: the left edge and the full blocks, then the right edge.
      while (n0 < blocks.end) {
        const int stop = n0 < blocks.full_begin ? blocks.full_begin : blocks.end;
        if (n0 < blocks.full_begin || n0 >= blocks.full_end) {
          for (; n0 < stop; next_block()) fold_block<true>();
        }
        for (; n0 < blocks.full_end; next_block()) fold_block<false>();
      }
    } else {
      for (; n0 < blocks.end; next_block()) fold_block<true>();
    }
    copies_wait<0>();
  }

  // Writes the statistics of a row, and returns what its outputs are to be multiplied by.
  __device__ __forceinline__ float finish_row(int m, int r) const {
    RowResult row =
        in_logits(state.max[m][r], state.sum[m][r], kPlain ? kLn2 : p.unit, kPlain ? kLn2Low : 0.0f);
    float rescale = kPlain ? 1.0f : p.dropout_scale;
    if (p.sink != nullptr) rescale *= add_sink(row, load_element(p.sink, p.sink_dtype, head.h));
    const bool nothing = row.sum == 0.0f;
    const int i = head.m0 + warp_row + 16 * m + 8 * r + lane_row();
    if (lane_column() == 0 && i < head.M) {
      const int64_t at = head.b * p.stats_stride_b + head.h * p.stats_stride_h + head.first_query + i;
      p.row_max[at] = row.max;
      p.row_sum[at] = row.sum;
      p.lse[at] = nothing ? kMinusInfinity : row.max + logf(row.sum);
    }
    return nothing ? 0.0f : rescale / row.sum;
  }

  // Writes out by way of Q's place, whose rows belong to the warp that reads them, in whole units.
  __device__ __forceinline__ void finish() {
    add_lanes(state);
    __syncthreads();  // other warps may have copied this warp's queries
    const uint32_t place = shared + warp_row * Panel<kD>::kPitch;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float rescale = finish_row(m, r);
        const int row = 16 * m + 8 * r + lane_row();
#pragma unroll
        for (int n = 0; n < kD / 8; ++n) {
          const int panel = n / Panel<kD>::kUnits, unit = n % Panel<kD>::kUnits;
          store_shared(
              place + panel * kBlockM * Panel<kD>::kPitch + place_in_panel<kD>(row, unit) + 2 * lane_column(),
              pack_halves(out[m][n][2 * r] * rescale, out[m][n][2 * r + 1] * rescale, kType));
        }
      }
    }
    __syncwarp();
    store_rows(place);
  }

  __device__ __forceinline__ void store_rows(uint32_t place) const {
    using P = Panel<kD>;
    const int thread = static_cast<int>(threadIdx.x) % kWarp;
    const int unit = thread % P::kUnits, i0 = head.m0 + warp_row;
    for (int row = thread / P::kUnits; row < 16 * kRowTiles && i0 + row < head.M; row += kWarp / P::kUnits) {
      uint16_t* const to = static_cast<uint16_t*>(p.out.data) + head.b * p.out.stride_b +
                           head.h * p.out.stride_h + (head.first_query + i0 + row) * p.out.stride_row;
#pragma unroll
      for (int panel = 0; panel < P::kCount; ++panel) {
        const int column = panel * P::kWidth + 8 * unit;
        const uint4 words = load_shared(place + panel * kBlockM * P::kPitch + place_in_panel<kD>(row, unit));
        if (kPlain || p.aligned) {
          if (column < p.D_v) *reinterpret_cast<uint4*>(to + column) = words;
        } else {
          const uint32_t halves[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
          for (int e = 0; e < 8; ++e) {
            if (column + e < p.D_v) to[column + e] = static_cast<uint16_t>(halves[e / 2] >> 16 * (e % 2));
          }
        }
      }
    }
  }
};

// Blocks are (tile of queries, head, batch element), the tile fastest: blocks that run together share keys.
template <DType kType, int kD, AttentionKind kKind>
__global__ void __launch_bounds__(forward_tile(kD, kKind).threads(), forward_tile(kD, kKind).blocks)
    attention_fwd_kernel(const __grid_constant__ AttentionFwdParams p) {
  using Tile = ForwardTile<kType, kD, kKind>;
  extern __shared__ __align__(128) uint8_t dynamic_shared[];
  const int heads = static_cast<int>(blockIdx.x) / p.tiles;
  int tile = static_cast<int>(blockIdx.x) % p.tiles;
  // Where later rows see more they come first, so that no long one is left over at the end.
  if (p.right < p.M) tile = p.tiles - 1 - tile;
  Head found = head_of(p, heads / p.H, heads % p.H, tile * Tile::kBlockM);
  if (found.m0 >= found.M) return;
  if constexpr (!Tile::kPlain) {
    if (p.padding.data != nullptr || p.key_mask.data != nullptr) find_real_range(p, found);
  }
  __shared__ Head head;
  __shared__ KeyBlocks blocks;
  if (threadIdx.x == 0) {
    head = found;
    blocks = key_blocks<Tile::kBlockN>(p, found, Tile::kBlockM);
  }
  __syncthreads();
  Tile work(p, head, blocks, shared_address(dynamic_shared));
  if (blocks.begin < blocks.end) work.fold_all();
  work.finish();
}

}  // namespace fastformer::cuda
