// What surrounds attention's backward pass over keys: before it, what each row gives by itself; after it, dQ
// from its float32 sums, and sums of what rows gave: the gradients of the sink and of a bias of one column.
//   delta_i = grad_out_i . out_i = sum_j w_ij dw_ij
#pragma once

#include "attention_float32.cuh"
#include "attention_weights.cuh"

namespace fastformer::cuda {

// Where a tile of queries lies in the workspace, in tiles. Packed sequences begin tiles of their own: floor(x
// + y) + 1 >= floor(x) + ceil(y), so that no two share one.
__device__ __forceinline__ int64_t slot_of_tile(const AttentionBwdParams& p, const Head& head, int tile,
                                                int block_m) {
  const int first = p.call.starts_q == nullptr ? head.b * p.call.tiles
                                               : static_cast<int>(head.first_query) / block_m + head.b;
  return int64_t{head.h} * p.slots + first + tile;
}

// Block `index` of a grid (tile of queries, head, batch element), the tile fastest.
__device__ __forceinline__ Head head_of_block(const AttentionFwdParams& p, int block_m) {
  const int heads = static_cast<int>(blockIdx.x) / p.tiles;
  return head_of(p, heads / p.H, heads % p.H, static_cast<int>(blockIdx.x) % p.tiles * block_m);
}

// Sums over all threads of a block, in one order; thread 0 gets it.
__device__ __forceinline__ float block_sum(float value) {
  __shared__ float shares[kMaxWarps];
  value = warp_sum(value, kWarp);
  if (threadIdx.x % kWarp == 0) shares[threadIdx.x / kWarp] = value;
  __syncthreads();
  float sum = 0.0f;
  for (int warp = 0; warp < static_cast<int>(blockDim.x) / kWarp; ++warp) sum += shares[warp];
  return sum;
}

// A lane's share of a row's delta, of eight.
template <DType kType>
__device__ __forceinline__ float share_of_delta(const AttentionBwdParams& p, const Head& head, int i) {
  const auto row_of = [&](const HeadRows& rows) {
    return row_at(static_cast<const void*>(rows.data), kType,
                  head.b * rows.stride_b + head.h * rows.stride_h + (head.first_query + i) * rows.stride_row);
  };
  const void* const out = row_of(p.call.out);
  const void* const grad_out = row_of(p.grad_out);
  float delta = 0.0f;
  constexpr int kUnit = kType == DType::kFloat32 ? 4 : 8;
  for (int unit = static_cast<int>(threadIdx.x) % 8; kUnit * unit < p.call.D_v; unit += 8) {
    float o[kUnit], g[kUnit];
    load_unit(out, kType, p.aligned, unit, p.call.D_v, o);
    load_unit(grad_out, kType, p.aligned, unit, p.call.D_v, g);
#pragma unroll
    for (int e = 0; e < kUnit; ++e) delta = fmaf(o[e], g[e], delta);
  }
  return delta;
}

// Row i's entries of the workspace; returns the sink's share. `delta` is grad_out . out.
__device__ __forceinline__ float write_row(const AttentionBwdParams& p, const Head& head, int i, float delta,
                                           int64_t entry) {
  const int64_t at = head.b * p.call.stats_stride_b + head.h * p.call.stats_stride_h + head.first_query + i;
  const float row_sum = p.call.row_sum[at], row_max = p.call.row_max[at];
  if (p.deltas != nullptr) delta = p.deltas[at];
  const bool nothing = row_sum == 0.0f;
  const float grad_lse = p.grad_lse == nullptr || nothing ? 0.0f : p.grad_lse[at];
  const float offset = grad_lse - (sees_one_key(p.call, head, i) ? 0.0f : delta);
  p.pivots[entry] = {shift_of(p.call, row_max, row_sum), offset};
  p.factors[entry] = nothing ? 0.0f : 1.0f / row_sum;
  float share = 0.0f;
  if (p.call.sink != nullptr && !nothing) {
    const float sink = load_element(p.call.sink, p.call.sink_dtype, head.h);
    share = exp2_approximate((sink - row_max) * kLog2E) / row_sum * (grad_lse - delta);
  }
  // The gradients of a row's scores and of its sink add up to grad_lse.
  if (p.row_grads != nullptr) {
    p.row_grads[(int64_t{head.b} * p.call.H + head.h) * p.call.M + i] = grad_lse - share;
  }
  return share;
}

// A tile of queries a block: pivots and factors of its rows, turns set to 0, and `zeros` zeros.
template <DType kType>
__global__ void __launch_bounds__(kBackwardWarps* kWarp)
    attention_bwd_rows_kernel(const __grid_constant__ AttentionBwdParams p, int block_m, int zeros) {
  Head head = head_of_block(p.call, block_m);
  const int tile = head.m0 / block_m;
  if (blockIdx.x == 0) {
    if (threadIdx.x == 0) *p.ticket = 0;
    for (int i = static_cast<int>(threadIdx.x); i < zeros; i += static_cast<int>(blockDim.x)) p.zeros[i] = 0;
  }
  float share = 0.0f;
  if (head.m0 < head.M) {
    if (p.call.padding.data != nullptr || p.call.key_mask.data != nullptr) find_real_range(p.call, head);
    if (tile == 0 && threadIdx.x < 2) {
      int32_t* const range = p.ranges + 2 * (int64_t{head.b} * p.call.H + head.h);
      range[threadIdx.x] = threadIdx.x == 0 ? head.key_begin : head.key_end;
    }
    const int64_t slot = slot_of_tile(p, head, tile, block_m);
    if (threadIdx.x < kBackwardWarps) p.turns[slot * kBackwardWarps + threadIdx.x] = 0;
    for (int row = static_cast<int>(threadIdx.x) / 8; row < block_m; row += kBackwardWarps * 4) {
      const int i = head.m0 + row;
      const int64_t entry = slot * block_m + row;
      const bool own = i < head.M && p.deltas == nullptr;
      const float delta = warp_sum(own ? share_of_delta<kType>(p, head, i) : 0.0f, 8);
      if (threadIdx.x % 8 == 0 && i < head.M) {
        share += write_row(p, head, i, delta, entry);
      } else if (threadIdx.x % 8 == 0) {
        p.pivots[entry] = {-kMinusInfinity, 0.0f};
        p.factors[entry] = 0.0f;
      }
    }
  }
  if (p.sink_shares == nullptr) return;
  share = block_sum(share);
  if (threadIdx.x == 0) p.sink_shares[(int64_t{head.b} * p.call.H + head.h) * p.call.tiles + tile] = share;
}

// An element of target a block.
template <int kThreads>
__global__ void __launch_bounds__(kThreads) attention_bwd_row_sums_kernel(const __grid_constant__ RowSums p) {
  const int m0 = static_cast<int>(blockIdx.x) % p.target_M, slab = static_cast<int>(blockIdx.x) / p.target_M;
  const int h0 = slab % p.target_H, b0 = slab / p.target_H;
  const int rows = p.M / p.target_M, heads = p.H / p.target_H;
  const int64_t count = int64_t{p.B / p.target_B} * heads * rows;
  float sum = 0.0f;
  for (int64_t k = threadIdx.x; k < count; k += kThreads) {
    const int64_t b = b0 + k / rows / heads, h = h0 + k / rows % heads, m = m0 + k % rows;
    sum += p.from[(b * p.H + h) * p.M + m];
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) store_element(p.target, p.dtype, blockIdx.x, sum);
}

// Writes rows of a tile [kRows, kD] in shared memory, of which `left` are there, in whole units.
template <int kD, int kRows, int kThreads>
__device__ __forceinline__ void write_rows(uint32_t shared, const HeadRows& rows, int64_t b, int64_t h,
                                           int64_t first, int left, int width, bool aligned) {
  using P = Panel<kD>;
  const uint32_t thread = forgotten(threadIdx.x);  // no register for what this gives around the main loop
  const int unit = static_cast<int>(thread % P::kUnits);
  uint16_t* const to = static_cast<uint16_t*>(rows.data) + b * rows.stride_b + h * rows.stride_h;
#pragma unroll 1
  for (int row = static_cast<int>(thread / P::kUnits); row < min(kRows, left); row += kThreads / P::kUnits) {
#pragma unroll
    for (int panel = 0; panel < P::kCount; ++panel) {
      const int column = panel * P::kWidth + 8 * unit;
      const uint4 words = load_shared(shared + panel * kRows * P::kPitch + place_in_panel<kD>(row, unit));
      uint16_t* const at = to + (first + row) * rows.stride_row + column;
      if (aligned) {
        if (column < width) store_global(at, words);
      } else {
        const uint32_t halves[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          if (column + e < width) at[e] = static_cast<uint16_t>(halves[e / 2] >> 16 * (e % 2));
        }
      }
    }
  }
}

// How warps stand over dQ [block_m, kD], and where a lane's sums lie.
template <DType kType, int kD, BackwardKind kKind>
struct QuerySums {
  static constexpr BackwardTile kTile = backward_tile(kD, kKind, kType);
  static constexpr int kThreads = kTile.threads();
  static constexpr int kRows = kTile.query_rows, kColumns = kTile.warps / kRows;
  static constexpr int kRowTiles = kTile.block_m / 16 / kRows, kTiles = kD / 8 / kColumns;
  static constexpr int kLaneStride = 4, kStep = 4 * kWarp;  // from lane to lane; from 16 x 8 to 16 x 8

  // [kRowTiles][kTiles][kWarp][4] of a warp, so that a warp's accesses are whole.
  static __device__ __forceinline__ uint32_t place_of_thread(uint32_t thread) {
    return thread / kWarp * (kRowTiles * kTiles * kStep) + thread % kWarp * kLaneStride;
  }
  static __device__ __forceinline__ int first_row(int warp) { return warp % kRows * 16 * kRowTiles; }
  static __device__ __forceinline__ int first_column(int warp) { return warp / kRows * 8 * kTiles; }

  // All of a lane's, or kPart of each kTiles.
  template <int kPart>
  static __device__ __forceinline__ void load(const float* at, float (&sums)[kRowTiles][kPart][4]) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kPart; ++n) load_past_l1(at + (m * kTiles + n) * kStep, sums[m][n]);
    }
  }

  template <int kPart>
  static __device__ __forceinline__ void store(float* at, const float (&sums)[kRowTiles][kPart][4]) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kPart; ++n) store_past_l1(at + (m * kTiles + n) * kStep, sums[m][n]);
    }
  }
};

// dQ of a tile of queries a block, from its sums; zeros where no block of keys was visible.
template <DType kType, int kD, BackwardKind kKind>
__global__ void __launch_bounds__(backward_tile(kD, kKind, kType).threads())
    attention_bwd_queries_kernel(const __grid_constant__ AttentionBwdParams p) {
  using Sums = QuerySums<kType, kD, kKind>;
  constexpr int kBlockM = Sums::kTile.block_m;
  extern __shared__ __align__(128) uint8_t dynamic_shared[];
  const uint32_t shared = shared_address(dynamic_shared);
  const Head head = head_of_block(p.call, kBlockM);
  if (head.m0 >= head.M) return;
  const int64_t slot = slot_of_tile(p, head, head.m0 / kBlockM, kBlockM);
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  float dq[Sums::kRowTiles][Sums::kTiles][4];
  set_zero(dq);
  if (p.turns[slot * kBackwardWarps + warp] > 0) {
    Sums::load(p.sums + slot * (kBlockM * kD) + Sums::place_of_thread(threadIdx.x), dq);
  }
  scale_all(dq, p.call.scale);
  if constexpr (kType == DType::kFloat32) {
    float* const to = static_cast<float*>(p.grad_query.data) + head.b * p.grad_query.stride_b +
                      head.h * p.grad_query.stride_h;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int i = head.m0 + Sums::first_row(warp) + 8 * r + lane_row();
      if (i >= head.M) continue;
      store_float_row(to + (head.first_query + i) * p.grad_query.stride_row, p.aligned,
                      Sums::first_column(warp), p.call.D, r, dq);
    }
  } else {
    store_tile<kBlockM>(place_of_lane<kBlockM>(shared, Sums::first_row(warp), Sums::first_column(warp)), dq,
                        kType);
    __syncthreads();
    write_rows<kD, kBlockM, Sums::kThreads>(shared, p.grad_query, head.b, head.h, head.first_query + head.m0,
                                            head.M - head.m0, p.call.D, p.aligned);
  }
}

}  // namespace fastformer::cuda
