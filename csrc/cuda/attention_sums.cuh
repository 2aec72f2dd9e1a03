// Sums of weights, or of gradients of scores, over heads, batch elements, queries, keys or diagonals: the
// returned weights, delta where these have a gradient, and the gradients of a broadcast bias and of
// relative_bias. Weights and gradients are computed anew, tile by tile, and every sum has one order: no
// atomics.
//
// All sums run elementwise over tiles in registers, until the last: tiles of one diagonal of tiles have their
// diagonals in the same places, so that those too are summed once a block, in shared memory.
//
// One instantiation for heads of any width and both types of 16 bits, and one for float32: operands come 64
// columns at a time, the next while the last meet. A tile of 64 queries and 64 keys reads 512 bytes of L2 for
// each column of D, and takes 2 times 64 mma for every 64 of them: where L2 brings 5 TB/s that is half of an
// A100's rate, which exponentials, masks and the biases in between do not leave anyway.
#pragma once

#include "attention_bwd_rows.cuh"
#include "attention_float32.cuh"
#include "attention_sums_plan.h"

namespace fastformer::cuda {

// Floats between rows of a total in shared memory: a warp's pairs of columns lie in all banks.
constexpr int kSumPitch = kScoreSumBlock + 8;

template <bool kFloat32>
struct SumPass {
  static constexpr int kBlock = kScoreSumBlock, kThreads = kScoreSumThreads;
  // Of a tile, each of 2 x 2 warps has [16 kRowTiles, 8 kTiles].
  static constexpr int kRowTiles = 2, kTiles = 4;
  // Bytes. A stage is a panel of the queries' rows and of the keys': 64 columns, of float32 32.
  static constexpr int kPlaceOfKeys = 2 * kBlock * kBlock, kStage = 2 * kPlaceOfKeys;
  static_assert(kPanelWidth == kBlock && 4 * kBlock * kSumPitch <= 2 * kStage);
  static constexpr int kColumns = kFloat32 ? kFloatPanel : kBlock;
  using Copier = RowCopier<kFloat32 ? DType::kFloat32 : DType::kBFloat16, kColumns, kThreads, false>;
  using Scores = float[kRowTiles][kTiles][4];

  const AttentionSumsParams& p;
  const AttentionFwdParams& call;
  Head& head;  // in shared memory, of the member at hand
  const uint32_t shared;
  const int warp_row = static_cast<int>(threadIdx.x) / kWarp % 2 * 16 * kRowTiles;
  const int warp_key = static_cast<int>(threadIdx.x) / kWarp / 2 * 8 * kTiles;
  int m0 = 0, n0 = 0;  // the first query and key of the tile at hand
  bool full = false;   // whether ranges of keys hide nothing of it
  RealKeys real;
  Scores total = {};

  __device__ __forceinline__ SumPass(const AttentionSumsParams& p, Head& head, uint32_t shared)
      : p(p), call(p.bwd.call), head(head), shared(shared) {}

  // Panels: of Q and K, and with those of dO and V. Counted anew each time, which takes no registers.
  __device__ __forceinline__ int query_chunks() const { return (call.D + kColumns - 1) / kColumns; }
  __device__ __forceinline__ int chunks() const {
    return query_chunks() + (p.kind == SumKind::kWeights ? 0 : (call.D_v + kColumns - 1) / kColumns);
  }

  // The first column of chunk c, of Q and K or of dO and V.
  __device__ __forceinline__ int first_column(int c) const {
    return (c < query_chunks() ? c : c - query_chunks()) * kColumns;
  }

  // All threads must call.
  __device__ __forceinline__ void take_head(int b, int h) {
    __syncthreads();  // everybody is done with the last one
    if (threadIdx.x == 0) {
      head = head_of(call, b, h, 0);
      if (p.bwd.ranges != nullptr && head.M > 0) {
        const int32_t* const range = p.bwd.ranges + 2 * (int64_t{b} * call.H + h);
        head.key_begin = range[0];
        head.key_end = range[1];
      }
    }
    __syncthreads();
  }

  // Moves to the tile of these queries and keys; whether any of its scores is visible, masks apart.
  __device__ __forceinline__ bool take_tile(int first_query, int first_key) {
    m0 = first_query;
    n0 = first_key;
    if (m0 >= head.M) return false;
    const KeyRange first = keys_of_row(call, head, m0);
    const KeyRange last = keys_of_row(call, head, min(m0 + kBlock, head.M) - 1);
    full = n0 >= last.begin && n0 + kBlock <= first.end;
    return n0 < last.end && n0 + kBlock > first.begin;
  }

  template <typename IsReal>
  __device__ __forceinline__ void copy(const HeadRows& rows, int h, int64_t row, int width, int column,
                                       uint32_t place, IsReal is_real) const {
    Copier copier(rows, head.b, h, row, width - column);
    copier.from += column;
    if (p.aligned) {
      copier.template start<kBlock>(place, is_real);
    } else {
      copier.template copy_elements<kBlock>(place, is_real);
    }
  }

  // Starts copies of chunk c: of Q and K, then of dO and V. One group, empty past the last.
  __device__ __forceinline__ void copy_chunk(int c) const {
    const uint32_t place = shared + c % 2 * kStage;
    const int left = head.M - m0 - Copier::first_row();
    const auto is_query = [&](int i) { return i * Copier::kStep < left; };
    const auto is_key = [&](int i) { return real.has(i * Copier::kStep + Copier::first_row()); };
    const int column = first_column(c);
    if (c < query_chunks()) {
      copy(call.query, head.h, head.first_query + m0, call.D, column, place, is_query);
      copy(call.key, head.h_kv, head.first_key + n0, call.D, column, place + kPlaceOfKeys, is_key);
    } else if (c < chunks()) {
      copy(p.bwd.grad_out, head.h, head.first_query + m0, call.D_v, column, place, is_query);
      copy(call.value, head.h_kv, head.first_key + n0, call.D_v, column, place + kPlaceOfKeys, is_key);
    }
    copies_commit();
  }

  // products += chunk c's.
  __device__ __forceinline__ void add_chunk(int c, Scores& products) const {
    copy_chunk(c + 1);
    copies_wait<1>();
    __syncthreads();  // chunk c is there
    const uint32_t rows = units_then_rows<kBlock>(shared) + warp_row * kPanelPitch + c % 2 * kStage;
    const uint32_t keys = rows_then_units<kBlock>(shared) + warp_key * kPanelPitch + c % 2 * kStage;
    if constexpr (kFloat32) {
      const int left = (c < query_chunks() ? call.D : call.D_v) - first_column(c);
      add_float32_rows<kBlock, kBlock>(rows, keys + kPlaceOfKeys, min(left, kColumns), products);
    } else if (call.dtype == DType::kBFloat16) {
      add_rows_by_rows<DType::kBFloat16, kBlock, kBlock, kBlock>(rows, 0, keys, kPlaceOfKeys, products);
    } else {
      add_rows_by_rows<DType::kFloat16, kBlock, kBlock, kBlock>(rows, 0, keys, kPlaceOfKeys, products);
    }
    __syncthreads();  // everybody is done with it
  }

  // Where row i of the head lies among pivots, and among statistics.
  __device__ __forceinline__ int64_t entry_of(int i) const {
    return slot_of_tile(p.bwd, head, 0, p.block_m) * p.block_m + i;
  }
  __device__ __forceinline__ int64_t place_of(int i) const {
    return head.b * call.stats_stride_b + head.h * call.stats_stride_h + head.first_query + i;
  }

  // Of this lane's rows. Where they are not given weights alone are wanted, which need no offset.
  __device__ __forceinline__ void find_pivots(RowPivot (&pivots)[kRowTiles][2]) const {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int i = m0 + warp_row + 16 * m + 8 * r + lane_row();
        pivots[m][r] = {-kMinusInfinity, 0.0f};
        if (i >= head.M) continue;
        if (p.bwd.pivots != nullptr) {
          pivots[m][r] = p.bwd.pivots[entry_of(i)];
        } else {
          pivots[m][r].shift = shift_of(call, call.row_max[place_of(i)], call.row_sum[place_of(i)]);
        }
      }
    }
  }

  __device__ __forceinline__ float factor_of(int i) const {
    if (i >= head.M) return 0.0f;
    if (p.bwd.pivots != nullptr) return p.bwd.factors[entry_of(i)];
    const float row_sum = call.row_sum[place_of(i)];
    return row_sum == 0.0f ? 0.0f : 1.0f / row_sum;
  }

  __device__ __forceinline__ void drop_some(Scores& values) const {
    if (call.threshold == 0) return;
    drop(call, head, *call.seed, m0 + warp_row, n0 + warp_key, values);
    scale_all(values, call.dropout_scale);
  }

  // Of rows that there are: what a hidden row multiplies may be NaN.
  __device__ __forceinline__ void add_to_total(const Scores& values) {
    for_each(total, [&](float& sum, int m, int n, int e) {
      const int i = m0 + warp_row + 16 * m + e / 2 * 8 + lane_row();
      sum += i < head.M ? values[m][n][e] : 0.0f;
    });
  }

  // The tile at hand, into the total.
  __device__ __forceinline__ void add_tile() {
    const int i0 = m0 + warp_row, j0 = n0 + warp_key;
    real.find(call, head, n0);
    copy_chunk(0);
    Scores weights, grads, slopes;
    set_zero(weights);
    int c = 0;
#pragma unroll 1
    for (; c < query_chunks(); ++c) add_chunk(c, weights);

    RowPivot pivots[kRowTiles][2];
    find_pivots(pivots);
    if (call.logits) make_logits(call, head, i0, j0, weights, slopes);
    hide_some(call, head, i0, j0, [&] { return full; }, real, warp_key, weights);
    const auto factor = [&](int m, int r) { return factor_of(i0 + 16 * m + 8 * r + lane_row()); };
    exponentiate<false>(call, pivots, factor, weights);
    if (p.kind == SumKind::kWeights) {
      drop_some(weights);
      add_to_total(weights);
      return;
    }
    set_zero(grads);
#pragma unroll 1
    for (; c < chunks(); ++c) add_chunk(c, grads);
    if (p.bwd.grad_weights.data != nullptr) {
      add_given_gradients(p.bwd.grad_weights, p.bwd.grad_weights_scale, head, i0, j0, grads);
    }
    drop_some(grads);
    if (p.kind == SumKind::kDeltas) {
      for_each(grads, [&](float& grad, int m, int n, int e) {
        grad = weights[m][n][e] == 0.0f ? 0.0f : weights[m][n][e] * grad;
      });
    } else {
      make_gradients<false, true>(call, head, i0, pivots, weights, grads);
    }
    add_to_total(grads);
  }

  // The total into shared memory, where nothing else is wanted any more.
  __device__ __forceinline__ void share_total() const {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int row = warp_row + 16 * m + 8 * r + lane_row(), column = warp_key + 8 * n + lane_column();
          store_shared(shared + 4 * (row * kSumPitch + column),
                       make_float2(total[m][n][2 * r], total[m][n][2 * r + 1]));
        }
      }
    }
    __syncthreads();
  }
};

// What a block writes of its total, [kScoreSumBlock][kSumPitch] in shared memory: one of these.

// Tile (m0, n0) of the target.
__device__ __forceinline__ void write_tile(const AttentionSumsParams& p, const float* tile, void* target,
                                           int m0, int n0) {
  const int column = static_cast<int>(threadIdx.x) % kScoreSumBlock, j = n0 + column;
  for (int row = static_cast<int>(threadIdx.x) / kScoreSumBlock; row < kScoreSumBlock;
       row += kScoreSumThreads / kScoreSumBlock) {
    const int i = m0 + row;
    if (i >= p.bwd.call.M || j >= p.bwd.call.N) continue;
    const int64_t at = i * p.target.stride_m + j * p.target.stride_n;
    store_element(target, p.target.dtype, at, tile[row * kSumPitch + column] * p.factor);
  }
}

// Sums of columns.
__device__ __forceinline__ void write_column_sums(const AttentionSumsParams& p, const float* tile,
                                                  void* target, int n0) {
  const int column = static_cast<int>(threadIdx.x), j = n0 + column;
  if (column >= kScoreSumBlock || j >= p.bwd.call.N) return;
  float sum = 0.0f;
  for (int row = 0; row < kScoreSumBlock; ++row) sum += tile[row * kSumPitch + column];
  store_element(target, p.target.dtype, j * p.target.stride_n, sum * p.factor);
}

// Sums of diagonals of tiles whose keys begin `ahead` tiles past their queries. Those of j - i from the
// tiles' own diagonal on go into one share, those below into the next.
__device__ __forceinline__ void write_diagonal_sums(const AttentionSumsParams& p, const float* tile,
                                                    void* target, int ahead) {
  const int t = static_cast<int>(threadIdx.x) - (kScoreSumBlock - 1);  // j - i within the tile
  const int entry = ahead * kScoreSumBlock + t + p.bwd.call.M - 1;
  if (t >= kScoreSumBlock || entry < 0 || entry >= p.target.stride_m) return;
  float sum = 0.0f;
  for (int row = max(0, -t); row < kScoreSumBlock - max(0, t); ++row) sum += tile[row * kSumPitch + row + t];
  static_cast<float*>(target)[(t < 0 ? p.share_stride : 0) + entry] = sum * p.factor;
}

// Sums of rows of the head's queries from m0 on.
__device__ __forceinline__ void write_deltas(const AttentionSumsParams& p, const float* tile,
                                             const Head& head, int m0) {
  const int row = static_cast<int>(threadIdx.x), i = m0 + row;
  if (row >= kScoreSumBlock || i >= head.M) return;
  float sum = 0.0f;
  for (int column = 0; column < kScoreSumBlock; ++column) sum += tile[row * kSumPitch + column];
  const AttentionFwdParams& call = p.bwd.call;
  p.bwd.deltas[head.b * call.stats_stride_b + head.h * call.stats_stride_h + head.first_query + i] = sum;
}

// What a block sums: blocks are (tile of target, slab, part of its steps), the tile's keys fastest, so that
// those that run together share queries.
struct SumBlock {
  int first_m, first_n;  // tiles that steps begin at
  int ahead;             // of a diagonal of tiles: how many tiles the keys' lie past the queries'
  int b, h;              // the target's
  int part;

  __device__ __forceinline__ SumBlock(const AttentionSumsParams& p, uint32_t block) {
    const int tile_n = static_cast<int>(block) % p.tiles_n, others = static_cast<int>(block) / p.tiles_n;
    const int tile_m = others % p.tiles_m, slab = others / p.tiles_m % p.slabs;
    const bool diagonal = p.kind == SumKind::kDiagonals;
    part = others / p.tiles_m / p.slabs;
    b = slab / p.target_H;
    h = slab % p.target_H;
    ahead = tile_n - ((p.bwd.call.M + kScoreSumBlock - 1) / kScoreSumBlock - 1);
    first_m = diagonal ? max(0, -ahead) : tile_m;
    first_n = diagonal ? max(0, ahead) : tile_n;
  }
};

template <bool kFloat32>
__device__ __forceinline__ void add_steps(const AttentionSumsParams& p, SumPass<kFloat32>& work) {
  const SumBlock block(p, blockIdx.x);
  const bool diagonal = p.kind == SumKind::kDiagonals;
  const int step_m = diagonal || p.kind == SumKind::kRow, step_n = diagonal || p.kind == SumKind::kDeltas;
  const int begin = block.part * p.part_steps, end = begin + min(p.part_steps, p.steps - begin);
  int member = -1;
#pragma unroll 1
  for (int step = begin; step < end; ++step) {
    const int inner = step % p.inner;
    if (step / p.inner != member) {
      member = step / p.inner;
      work.take_head(block.b + member / p.members_h, block.h + member % p.members_h);
    }
    const int m0 = (block.first_m + inner * step_m) * kScoreSumBlock;
    const int n0 = (block.first_n + inner * step_n) * kScoreSumBlock;
    if (work.take_tile(m0, n0)) work.add_tile();
  }
}

template <int kThreads, bool kFloat32>
__global__ void __launch_bounds__(kThreads, kFloat32 ? 2 : 3)
    attention_sums_kernel(const __grid_constant__ AttentionSumsParams p) {
  using Pass = SumPass<kFloat32>;
  static_assert(kThreads == Pass::kThreads);
  __shared__ __align__(128) uint8_t stages[2 * Pass::kStage];
  __shared__ Head head;
  Pass work(p, head, shared_address(stages));
  add_steps(p, work);
  work.share_total();

  const float* const tile = reinterpret_cast<const float*>(stages);
  const SumBlock block(p, forgotten(blockIdx.x));  // no register for what this gives around the loop
  const bool diagonal = p.kind == SumKind::kDiagonals;
  const int64_t share = int64_t{block.part} * (diagonal ? 2 : 1) * p.share_stride;
  void* const target = row_at(p.target.data, p.target.dtype,
                              share + block.b * p.target.stride_b + block.h * p.target.stride_h);
  if (diagonal) {
    write_diagonal_sums(p, tile, target, block.ahead);
  } else if (p.kind == SumKind::kRow) {
    write_column_sums(p, tile, target, block.first_n * kScoreSumBlock);
  } else if (p.kind == SumKind::kDeltas) {
    write_deltas(p, tile, head, block.first_m * kScoreSumBlock);
  } else {
    write_tile(p, tile, target, block.first_m * kScoreSumBlock, block.first_n * kScoreSumBlock);
  }
}

// target = sums of `count` shares of as many elements, in their order.
template <int kThreads>
__global__ void __launch_bounds__(kThreads)
    attention_add_shares_kernel(const float* shares, int count, int64_t elements, void* target, DType dtype) {
  const int64_t e = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (e >= elements) return;
  float sum = 0.0f;
  for (int share = 0; share < count; ++share) sum += shares[share * elements + e];
  store_element(target, dtype, e, sum);
}

}  // namespace fastformer::cuda
