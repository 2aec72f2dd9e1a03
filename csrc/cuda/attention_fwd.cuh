// Attention forward: online softmax over blocks of keys, a tile of one head's queries a thread block (Dao,
// "FlashAttention-2", 2023).
//   out = sum_j keep_ij e^(s_ij - max) v_j / (sum_j e^(s_ij - max) (1 - p))     lse = max + ln(sum)
// A block's V is fetched while its scores are computed, and the next block's K while weights meet V.
// Few queries have tiles of all heads of a group, so that K and V are read once for these, and may have
// several thread blocks, each with its share of the keys (Dao et al., "Flash-Decoding", 2023).
#pragma once

#include "attention_combine.cuh"
#include "attention_float32.cuh"
#include "attention_scores.cuh"
#include "attention_tiles.cuh"

namespace fastformer::cuda {

// Where a key lies: which row of which page. Without a page table a batch element is a page.
struct KeyPlace {
  int page, row;
};

// The table is not read past the head's keys, and nothing past the pages, whatever it holds.
__device__ __forceinline__ KeyPlace place_of_key(const AttentionFwdParams& p, const Head& head, int key) {
  if (p.page_table == nullptr || key >= head.key_end) {
    return {head.b, static_cast<int>(head.first_key) + key};
  }
  const uint32_t entry = static_cast<uint32_t>(key) / static_cast<uint32_t>(p.page_size);
  const uint32_t number = p.page_table[head.b * p.page_table_stride + entry];
  const uint32_t page = min(number, static_cast<uint32_t>(p.pages) - 1);
  return {static_cast<int>(page), key - static_cast<int>(entry) * p.page_size};
}

template <DType kType, int kD, AttentionKind kKind>
struct ForwardTile {
  static constexpr bool kFew = kKind == AttentionKind::kFew;
  static constexpr bool kPlain = kKind != AttentionKind::kGeneral && !kFew;
  static constexpr bool kFloat32 = kType == DType::kFloat32;
  static constexpr AttentionTile kTile = forward_tile(kD, kKind, kType);
  static constexpr int kRowTiles = kTile.row_tiles, kTiles = kTile.block_n / 8;
  static constexpr int kBlockM = kTile.block_m(), kBlockN = kTile.block_n, kThreads = kTile.threads();
  // Bytes from Q's place in shared memory.
  static constexpr int kColumns = kPanelColumns<kType, kD>;
  static constexpr int kPlaceOfK = 2 * kBlockM * kColumns, kPlaceOfV = kPlaceOfK + 2 * kBlockN * kColumns;
  using P = Panel<kColumns>;
  using Copier = RowCopier<kType, kD, kThreads, kKind == AttentionKind::kWhole>;
  static constexpr int kStep = Copier::kStep;

  const AttentionFwdParams& p;
  // In shared memory: what full blocks do not need takes no registers there.
  const Head& head;
  const KeyBlocks& blocks;
  int n0;    // the first key of the block at hand
  int left;  // keys that are to be read from there on, counted from the thread's first row
  const int warp_row = static_cast<int>(threadIdx.x) / kWarp * 16 * kRowTiles;
  const uint32_t shared;
  const uint32_t q_address, k_address, v_address;  // for ldmatrix; of float32 v columns_of_lane
  Copier keys, values;                             // unless kFew, or of float32
  KeyPlace places[kBlockN / kStep];  // if kFew: of the thread's keys in the block whose K or V comes next
  RealKeys real, next_real;          // unless kPlain: of the block at hand, of the one whose K comes next
  uint64_t seed = 0;
  RowState<kRowTiles> state;
  float out[kRowTiles][kD / 8][4] = {};

  __device__ __forceinline__ ForwardTile(const AttentionFwdParams& p, const Head& head,
                                         const KeyBlocks& blocks, uint32_t shared)
      : p(p),
        head(head),
        blocks(blocks),
        n0(blocks.begin),
        left(head.key_end - blocks.begin - Copier::first_row()),
        shared(shared),
        q_address(units_then_rows<kColumns>(shared) + warp_row * P::kPitch),
        k_address(rows_then_units<kColumns>(shared + kPlaceOfK)),
        v_address(kFloat32 ? columns_of_lane(shared + kPlaceOfV)
                           : units_then_rows<kColumns>(shared + kPlaceOfV)),
        keys(p.key, head.b, head.h_kv, head.first_key + blocks.begin, p.D),
        values(p.value, head.b, head.h_kv, head.first_key + blocks.begin, p.D_v) {
    if (!kPlain && !kFloat32 && p.threshold > 0) seed = *p.seed;
  }

  // The warp's rows, as row_of takes them: found anew each time, which takes no registers in between.
  __device__ __forceinline__ auto rows() const {
    if constexpr (kFew) {
      return LaneRows(head.m0 + warp_row, p.share);
    } else {
      return head.m0 + warp_row;
    }
  }

  // Whether the warp has a query. Of few, most warps have none, and only copy.
  __device__ __forceinline__ bool is_busy() const { return !kFew || head.m0 + warp_row < head.M * p.share; }

  template <int kRows, typename IsReal>
  __device__ __forceinline__ void copy(Copier& rows, int place, IsReal is_real) const {
    if (kPlain || p.aligned) {
      rows.template start<kRows>(shared + place, is_real);
    } else {
      rows.template copy_elements<kRows>(shared + place, is_real);
    }
    copies_commit();
  }

  // Rows that lie anywhere. `known(i)` is where one begins as registers have it, `found(i)` the same found
  // anew in a loop, which keeps the code of elements small.
  template <int kRows, typename Known, typename Found, typename IsReal>
  __device__ __forceinline__ void copy_scattered(int columns, int place, Known known, Found found,
                                                 IsReal is_real) const {
    if (p.aligned) {
      Copier::template start_scattered<kRows>(shared + place, columns, known, is_real);
    } else {
      Copier::template copy_scattered_elements<kRows>(shared + place, columns, found, is_real);
    }
    copies_commit();
  }

  __device__ __forceinline__ void copy_queries() const {
    if constexpr (kFew) {
      const auto at = [&](int i) { return query_row(head.m0 + i * kStep + Copier::first_row(), p.share); };
      const auto begin = [&](int i) {
        return Copier::row_begin(p.query, head.b, head.h + at(i).g, head.first_query + at(i).i);
      };
      copy_scattered<kBlockM>(p.D, 0, begin, begin, [&](int i) { return at(i).i < head.M; });
    } else {
      Copier rows(p.query, head.b, head.h, head.first_query + head.m0, p.D);
      const int left = head.M - head.m0 - Copier::first_row();
      copy<kBlockM>(rows, 0, [&](int i) { return i * kStep < left; });
    }
  }

  // The block that begins `ahead` keys after the one at hand: `rows` of `from`.
  __device__ __forceinline__ void copy_block(Copier& rows, const HeadRows& from, int columns, int place,
                                             int ahead, const RealKeys& of_block) const {
    if constexpr (kPlain) {
      copy<kBlockN>(rows, place, [&](int i) { return i * kStep < left - ahead; });
    } else {
      const auto is_real = [&](int i) { return of_block.has(i * kStep + Copier::first_row()); };
      if constexpr (kFew) {
        const auto begin = [&](KeyPlace key) {
          return Copier::row_begin(from, key.page, head.h_kv, key.row);
        };
        const auto known = [&](int i) { return begin(places[i]); };
        const auto found = [&](int i) { return begin(place_of(n0 + ahead, i)); };
        copy_scattered<kBlockN>(columns, place, known, found, is_real);
      } else if constexpr (kFloat32) {
        // Found anew for every block, which takes no registers in between.
        Copier found(from, head.b, head.h_kv, head.first_key + n0 + ahead, columns);
        copy<kBlockN>(found, place, is_real);
      } else {
        copy<kBlockN>(rows, place, is_real);
      }
    }
  }

  // Of the thread's i-th key in the block whose first is n.
  __device__ __forceinline__ KeyPlace place_of(int n, int i) const {
    return place_of_key(p, head, n + i * kStep + Copier::first_row());
  }

  // For the block whose first key is n, before its K is copied.
  __device__ __forceinline__ void find_places(int n) {
    if constexpr (kFew) {
#pragma unroll
      for (int i = 0; i < kBlockN / kStep; ++i) places[i] = place_of(n, i);
    }
  }

  __device__ __forceinline__ void start() {
    if constexpr (!kPlain) next_real.find(p, head, n0);
    find_places(n0);
    copy_queries();
    copy_block(keys, p.key, p.D, kPlaceOfK, 0, next_real);
  }

  // One block of keys: its K is on the way, or there.
  template <bool kEdge>
  __device__ __forceinline__ void fold_block() {
    copies_wait<0>();
    __syncthreads();  // K is there, and everybody is done with the last block's V
    if constexpr (!kPlain) real = next_real;
    copy_block(values, p.value, p.D_v, kPlaceOfV, 0, real);
    find_places(n0 + kBlockN);  // the table answers while scores are computed
    float scores[kRowTiles][kTiles][4];
    const bool busy = is_busy();
    if (busy) {
      if constexpr (kFloat32) {
        set_zero(scores);
        add_float32_rows<kBlockM, kBlockN>(q_address, k_address, p.D, scores);
      } else {
        multiply_keys<kType, kD, kBlockM>(q_address, k_address, scores);
      }
    }

    copies_wait<0>();
    __syncthreads();  // V is there, and everybody is done with K
    if constexpr (!kPlain) next_real.find(p, head, n0 + kBlockN);
    copy_block(keys, p.key, p.D, kPlaceOfK, kBlockN, next_real);
    if (!busy) return;

    modify<kEdge>(scores);
    fold_scores<!kPlain>(p.factor, state, scores, out);
    if constexpr (!kPlain) {
      if (p.threshold > 0) drop(p, head, kFloat32 ? *p.seed : seed, rows(), n0, scores);
    }
    if constexpr (kFloat32) {
      multiply_float32_values<kD>(v_address, p.D_v, scores, out);
    } else {
      multiply_values<kType, kD>(v_address, scores, out);
    }
  }

  // Bare products become logits, unless nothing but the scale lies between; what is hidden becomes -inf.
  template <bool kEdge>
  __device__ __forceinline__ void modify(float (&scores)[kRowTiles][kTiles][4]) const {
    if constexpr (kPlain) {
      if constexpr (kEdge) hide_outside(p, head, rows(), n0, scores);
    } else {
      if (p.logits) scale_and_cap(p, scores);
      if (p.bias_pairs) {
        add_bias<true>(p, head, rows(), n0, scores);
      } else if (p.bias.data != nullptr) {
        add_bias<false>(p, head, rows(), n0, scores);
      }
      if (p.relative_bias != nullptr) add_relative_bias(p, head, rows(), n0, scores);
      if (n0 < blocks.full_begin || n0 >= blocks.full_end) hide_outside(p, head, rows(), n0, scores);
      if (p.padding.data != nullptr || p.key_mask.data != nullptr) hide_keys(real, scores);
      if (p.mask_pairs) {
        hide_masked<true>(p, head, rows(), n0, scores);
      } else if (p.mask.data != nullptr) {
        hide_masked<false>(p, head, rows(), n0, scores);
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

  // A row's place in lse.
  __device__ __forceinline__ int64_t place_in_statistics(const QueryRow& row) const {
    return head.b * p.stats_stride_b + (head.h + row.g) * p.stats_stride_h + head.first_query + row.i;
  }

  // Writes out by way of Q's place, whose rows belong to the warp that reads them, in whole units. Of float32
  // a lane has these.
  __device__ __forceinline__ void finish() {
    add_lanes(state);
    __syncthreads();  // other warps may have copied this warp's queries
    const uint32_t place = shared + warp_row * P::kPitch;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const QueryRow query = row_of(rows(), m, r);
        const bool writes = lane_column() == 0 && query.i < head.M;
        const float rescale = finish_row<kPlain>(p, head.h + query.g, place_in_statistics(query), writes,
                                                 state.max[m][r], state.sum[m][r]);
        if constexpr (kFloat32) {
          if (query.i < head.M) store_units(query, m, r, rescale);
        } else {
          place_row(place, m, r, rescale);
        }
      }
    }
    if constexpr (!kFloat32) {
      __syncwarp();
      store_rows(place);
    }
  }

  // Of float32: what this lane has of a row.
  __device__ __forceinline__ void store_units(const QueryRow& query, int m, int r, float rescale) const {
    float* const to = static_cast<float*>(p.out.data) + head.b * p.out.stride_b +
                      (head.h + query.g) * p.out.stride_h + (head.first_query + query.i) * p.out.stride_row;
    for_each_unit(m, r, [&](int column, float (&unit)[4]) {
      if (column >= p.D_v) return;
#pragma unroll
      for (int e = 0; e < 4; ++e) unit[e] *= rescale;
      store_unit<4>(to, kType, p.aligned, column / 4, p.D_v, unit);
    });
  }

  // visit(column, unit) for each four columns of float32 of a row of this lane's.
  template <typename Visit>
  __device__ __forceinline__ void for_each_unit(int m, int r, Visit visit) const {
#pragma unroll
    for (int columns = 0; columns < kD / 16; ++columns) {
      const float (&even)[4] = out[m][2 * columns], (&odd)[4] = out[m][2 * columns + 1];
      float unit[4] = {even[2 * r], odd[2 * r], even[2 * r + 1], odd[2 * r + 1]};
      visit(16 * columns + 2 * lane_column(), unit);
    }
  }

  __device__ __forceinline__ void place_row(uint32_t place, int m, int r, float rescale) const {
    const int row = 16 * m + 8 * r + lane_row();
#pragma unroll
    for (int n = 0; n < kD / 8; ++n) {
      const int panel = n / P::kUnits, unit = n % P::kUnits;
      store_shared(
          place + panel * kBlockM * P::kPitch + place_in_panel<kColumns>(row, unit) + 2 * lane_column(),
          pack_halves(out[m][n][2 * r] * rescale, out[m][n][2 * r + 1] * rescale, kType));
    }
  }

  __device__ __forceinline__ void store_rows(uint32_t place) const {
    const int thread = static_cast<int>(threadIdx.x) % kWarp;
    const int unit = thread % P::kUnits;
    for (int row = thread / P::kUnits; row < 16 * kRowTiles; row += kWarp / P::kUnits) {
      const int at = head.m0 + warp_row + row;
      const QueryRow query = kFew ? query_row(at, p.share) : QueryRow{at, 0};
      if (query.i >= head.M) break;
      uint16_t* const to = static_cast<uint16_t*>(p.out.data) + head.b * p.out.stride_b +
                           (head.h + query.g) * p.out.stride_h +
                           (head.first_query + query.i) * p.out.stride_row;
#pragma unroll
      for (int panel = 0; panel < P::kCount; ++panel) {
        const int column = panel * P::kWidth + 8 * unit;
        const uint4 words =
            load_shared(place + panel * kBlockM * P::kPitch + place_in_panel<kColumns>(row, unit));
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

  // Writes what attention_combine_kernel joins. Four lanes fill a sector of a row.
  __device__ __forceinline__ void finish_split(int split) {
    add_lanes(state);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const QueryRow query = row_of(rows(), 0, r);
      if (query.i >= head.M) continue;
      const int64_t at = place_in_statistics(query) * p.splits + split;
      if (lane_column() == 0) {
        reinterpret_cast<float2*>(p.partial_stats)[at] = make_float2(state.max[0][r], state.sum[0][r]);
      }
      float* const to = p.partial_out + at * p.partial_stride;
      if constexpr (kFloat32) {
        for_each_unit(0, r, [&](int column, const float (&unit)[4]) {
          if (column < p.partial_stride) store_past_l1(to + column, unit);
        });
      } else {
#pragma unroll
        for (int n = 0; n < kD / 8; ++n) {
          if (8 * n >= p.partial_stride) continue;
          *reinterpret_cast<float2*>(to + 8 * n + lane_column()) =
              make_float2(out[0][n][2 * r], out[0][n][2 * r + 1]);
        }
      }
    }
  }
};

// Blocks are (tile of queries, split of its keys, head or group of heads, batch element), the tile fastest:
// blocks that run together share keys.
template <DType kType, int kD, AttentionKind kKind>
__global__ void __launch_bounds__(forward_tile(kD, kKind, kType).threads(),
                                  forward_tile(kD, kKind, kType).blocks)
    attention_fwd_kernel(const __grid_constant__ AttentionFwdParams p) {
  using Tile = ForwardTile<kType, kD, kKind>;
  extern __shared__ __align__(128) uint8_t dynamic_shared[];
  int heads = static_cast<int>(blockIdx.x) / p.tiles;
  int tile = static_cast<int>(blockIdx.x) % p.tiles;
  [[maybe_unused]] int split = 0;
  int share = 1;
  if constexpr (Tile::kFew) {
    split = heads % p.splits;
    heads /= p.splits;
    share = p.share;
  }
  // Where later rows see more they come first, so that no long one is left over at the end.
  if (p.right < p.M) tile = p.tiles - 1 - tile;
  const int per_element = p.H / share;
  Head found = head_of(p, heads / per_element, heads % per_element * share, tile * Tile::kBlockM);
  if (found.m0 >= found.M * share) return;
  const int first = found.m0 / share;
  const int last = (min(found.m0 + Tile::kBlockM, found.M * share) - 1) / share;
  if constexpr (Tile::kFew) take_split<Tile::kBlockN>(p, found, first, last, split);
  if constexpr (!Tile::kPlain) {
    if (p.padding.data != nullptr || p.key_mask.data != nullptr) find_real_range(p, found);
  }
  __shared__ Head head;
  __shared__ KeyBlocks blocks;
  if (threadIdx.x == 0) {
    blocks = key_blocks<Tile::kBlockN>(p, found, first, last);
    found.key_end = min(found.key_end, blocks.end);  // what is not folded is not read
    head = found;
  }
  __syncthreads();
  Tile work(p, head, blocks, shared_address(dynamic_shared));
  if (blocks.begin < blocks.end) work.fold_all();
  if constexpr (Tile::kFew) {
    if (p.splits > 1) return work.finish_split(split);
  }
  work.finish();
}

}  // namespace fastformer::cuda
