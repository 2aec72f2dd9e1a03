// Attention backward: one pass over keys with five products (Dao, "FlashAttention-2", 2023).
//   w_ij = exp(s_ij - row_max_i) / row_sum_i
//   ds_ij = w_ij (keep_ij (grad_out_i . v_j) / (1 - p) + offset_i), offset = grad_lse - delta
//   dv_j = sum_i keep_ij w_ij / (1 - p) grad_out_i    dk_j = scale sum_i ds_ij q_i    dq_i = scale ds_i k
// A block holds the sums of dK and dV of its keys in registers and walks over the queries. Each tile of dQ
// lies in a float32 workspace, to which blocks of keys add in their order: no atomics, the same bits always.
//
// Why not a pass of its own for dQ, which would write nothing but dQ: at D = 128 a step of 64 queries and 128
// keys takes 320 mma.m16n8k16 of a warp; adding to dQ takes 16 loads and stores of 16 bytes, some 20 more
// instructions and 64 KB of L2's bandwidth, in 5120 cycles of tensor cores. Two passes take 448 mma, and what
// lies between products twice: 1.4 times the time even where tensor cores never wait. What they save of DRAM
// is 8 M D bytes a head, the workspace written and read once.
//
// Order: a ticket tells a program its keys, so that programs start in the order of their keys on any machine,
// and they walk from the last query to the first: those before have passed wherever this one arrives, window
// or diagonal. A turn is taken before the products and given back after the last, so that neither the sums'
// latency nor the fence is waited for.
#pragma once

#include "attention_bwd_tiles.cuh"

namespace fastformer::cuda {

template <DType kType, int kD, BackwardKind kKind>
struct BackwardPass {
  static constexpr BackwardTile kTile = backward_tile(kD, kKind, kType);
  static constexpr int kBlockM = kTile.block_m, kBlockN = kTile.block_n, kThreads = kTile.threads();
  static constexpr int kWarps = kTile.warps, kStages = kTile.stages;
  static constexpr bool kFloat32 = kType == DType::kFloat32, kPlain = kKind == BackwardKind::kPlain;
  static constexpr int kColumns = kPanelColumns<kType, kD>;
  // Of scores, a warp's [16 kRowTiles, 8 kTiles] of [kBlockM, kBlockN]: all warps', or those of the first.
  static constexpr int kScoreRows = kTile.score_rows, kRowTiles = kBlockM / 16 / kScoreRows;
  static constexpr int kScoreWarps = kBlockN / 8 < kWarps / kScoreRows ? kScoreRows * kBlockN / 8 : kWarps;
  static constexpr int kTiles = kBlockN / 8 / (kScoreWarps / kScoreRows);
  // Of dK and dV, of [kBlockN, kD].
  static constexpr int kKeyRows = kTile.key_rows, kKeyRowTiles = kBlockN / 16 / kKeyRows;
  static constexpr int kKeyTiles = kD / 8 / (kWarps / kKeyRows);
  using Sums = QuerySums<kType, kD, kKind>;
  // Of dQ, at a time; of float32 a panel.
  static constexpr int kPart = kD <= 128 ? Sums::kTiles : kFloat32 ? kFloatPanel / 8 : Sums::kTiles / 4;
  // Bytes from K's place in shared memory. A stage is Q and dO.
  static constexpr int kPlaceOfV = 2 * kBlockN * kColumns, kPlaceOfQ = 2 * kPlaceOfV;
  static constexpr int kGradOut = 2 * kBlockM * kColumns, kStage = 2 * kGradOut;
  static constexpr int kPlaceOfP = kPlaceOfQ + kStages * kStage;
  static constexpr int kScores = kBlockM * score_columns(kTile, kType) * static_cast<int>(size_of(kType));
  using Copier = RowCopier<kType, kD, kThreads, false>;
  static constexpr int kStep = Copier::kStep;
  using Scores = float[kRowTiles][kTiles][4];

  const AttentionBwdParams& p;
  const AttentionFwdParams& call;
  // In shared memory, so as to take no registers.
  const KeyTile& keys;
  const Head& head;
  const HeadQueries& queries;
  const QueryTiles& tiles;
  int tile;   // of queries
  int stage;  // its place's offset
  const int warp = static_cast<int>(threadIdx.x / kWarp);
  const int warp_row = warp % kScoreRows * 16 * kRowTiles;
  const int warp_key = warp / kScoreRows * 8 * kTiles;
  const uint32_t shared;
  const uint32_t rows_of_warp = forgotten(units_then_rows<kColumns>(shared) + warp_row * kPanelPitch);
  RealKeys real;  // unless kPlain
  uint64_t seed = 0;
  float dk[kKeyRowTiles][kKeyTiles][4] = {};
  float dv[kKeyRowTiles][kKeyTiles][4] = {};

  __device__ __forceinline__ BackwardPass(const AttentionBwdParams& p, const KeyTile& keys, const Head& head,
                                          const HeadQueries& queries, const QueryTiles& tiles,
                                          uint32_t shared)
      : p(p), call(p.call), keys(keys), head(head), queries(queries), tiles(tiles), shared(shared) {
    if (!kPlain && call.threshold > 0) seed = *call.seed;
  }

  template <int kRows, typename IsReal>
  __device__ __forceinline__ void copy(Copier rows, int place, IsReal is_real) const {
    if (kPlain || p.aligned) {
      rows.template start<kRows>(shared + place, is_real);
    } else {
      rows.template copy_elements<kRows>(shared + place, is_real);
    }
  }

  __device__ __forceinline__ void copy_keys() {
    const Copier rows(call.key, head.b, head.h_kv, head.first_key + keys.n0, call.D);
    const Copier values(call.value, head.b, head.h_kv, head.first_key + keys.n0, call.D_v);
    const auto is_real = [&](int i) {
      const int row = i * Copier::kStep + Copier::first_row();
      if constexpr (kPlain) {
        return keys.n0 + row < head.key_end;
      } else {
        return real.has(row);
      }
    };
    copy<kBlockN>(rows, 0, is_real);
    copy<kBlockN>(values, kPlaceOfV, is_real);
  }

  // Starts copies of a tile's Q and dO.
  template <bool kLast>
  __device__ __forceinline__ void copy_queries(int tile, int stage) const {
    const uint32_t place = kPlaceOfQ + stage;
    if constexpr (kPlain) {
      const auto copy_one = [&](const uint16_t* rows, int64_t stride, int width, uint32_t place) {
        copy_aligned<kD, kBlockM, kStep, kLast>(rows, stride, width, tile * kBlockM, head.M, shared + place);
      };
      copy_one(queries.query, call.query.stride_row, call.D, place);
      copy_one(queries.grad_out, p.grad_out.stride_row, call.D_v, place + kGradOut);
    } else {
      const int m0 = tile * kBlockM, left = head.M - m0 - Copier::first_row();
      const auto is_real = [&](int i) { return i * kStep < left; };
      const Copier rows(call.query, head.b, head.h, head.first_query + m0, call.D);
      copy<kBlockM>(rows, place, is_real);
      const Copier grads(p.grad_out, head.b, head.h, head.first_query + m0, call.D_v);
      copy<kBlockM>(grads, place + kGradOut, is_real);
    }
    copies_commit();
  }

  // Straight from L2: by the pointer alone nvcc would not know that it is global memory.
  static __device__ __forceinline__ RowPivot load_pivot(const RowPivot* from) {
    const float2 pair = __ldg(reinterpret_cast<const float2*>(from));
    return {pair.x, pair.y};
  }

  // Those of this lane's rows; far from where they are needed, since they come from L2.
  __device__ __forceinline__ void load_pivots(RowPivot (&pivots)[kRowTiles][2]) const {
    const uint32_t thread = forgotten(threadIdx.x);
    const uint32_t row = thread / kWarp % kScoreRows * 16 * kRowTiles + thread % kWarp / 4;
    const RowPivot* const from = queries.pivots + (tile * kBlockM + static_cast<int>(row));
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) pivots[m][r] = load_pivot(from + 16 * m + 8 * r);
    }
  }

  // Weights before dropout, from products; softcap's slopes where there is one.
  template <bool kEdge>
  __device__ __forceinline__ void make_weights(const RowPivot (&pivots)[kRowTiles][2], Scores& scores,
                                               Scores& slopes) const {
    const int i0 = tile * kBlockM + warp_row, j0 = keys.n0 + warp_key;
    if constexpr (!kPlain) {
      if (call.logits) make_logits(call, head, i0, j0, scores, slopes);
    }
    if constexpr (kPlain && kEdge) hide_outside(call, head, i0, j0, scores);
    if constexpr (!kPlain) {
      // (At D = 256 no register is left to know by.)
      const auto is_full = [&] { return kD <= 128 && tile >= tiles.full_begin && tile < tiles.full_end; };
      hide_some(call, head, i0, j0, is_full, real, warp_key, scores);
    }
    const auto factor_of = [&](int m, int r) { return queries.factors[i0 + 16 * m + 8 * r + lane_row()]; };
    exponentiate<kPlain>(call, pivots, factor_of, scores);
  }

  // dropout(weights) and dropout(their gradients), by the map that `drop` tells.
  __device__ __forceinline__ void drop_both(Scores& weights, Scores& grads) const {
    drop(call, head, seed, tile * kBlockM + warp_row, keys.n0 + warp_key, weights);
    drop(call, head, seed, tile * kBlockM + warp_row, keys.n0 + warp_key, grads);
    scale_all(weights, call.dropout_scale);
    scale_all(grads, call.dropout_scale);
  }

  // The offset comes with the product, unless dropout is to come between.
  __device__ __forceinline__ void start_gradients(const RowPivot (&pivots)[kRowTiles][2],
                                                  Scores& grads) const {
    for_each(grads, [&](float& grad, int m, int, int e) { grad = kPlain ? pivots[m][e / 2].offset : 0.0f; });
  }

  // scores += a b^T of rows in shared memory, of which `width` columns are there.
  __device__ __forceinline__ void add_rows(uint32_t a, int a_offset, uint32_t b, int b_offset, int width,
                                           Scores& scores) const {
    if constexpr (kFloat32) {
      add_float32_rows<kBlockM, kBlockN>(a + a_offset, b + b_offset, width, scores);
    } else {
      add_rows_by_rows<kType, kD, kBlockM, kBlockN>(a, a_offset, b, b_offset, scores);
    }
  }

  __device__ __forceinline__ void store_scores(uint32_t place, const Scores& scores) const {
    if constexpr (kFloat32) {
      store_float_tile<kBlockM>(place, scores);
    } else {
      store_tile<kBlockM>(place, scores, kType);
    }
  }

  // P and dS of the tile at hand, into shared memory.
  template <bool kEdge>
  __device__ __forceinline__ void make_scores() {
    const uint32_t rows = rows_of_warp + stage;
    const uint32_t columns = rows_then_units<kColumns>(shared) + warp_key * kPanelPitch;
    const uint32_t place = kFloat32 ? float_place_of_lane<kBlockM>(shared + kPlaceOfP, warp_row, warp_key)
                                    : place_of_lane<kBlockM>(shared + kPlaceOfP, warp_row, warp_key);
    const int i0 = tile * kBlockM + warp_row, j0 = keys.n0 + warp_key;
    RowPivot pivots[kRowTiles][2];
    Scores weights, grads, slopes;
    load_pivots(pivots);
    set_zero(weights);
    add_rows(rows, kPlaceOfQ, columns, 0, call.D, weights);
    make_weights<kEdge>(pivots, weights, slopes);
    if constexpr (kPlain) store_scores(place, weights);
    start_gradients(pivots, grads);
    add_rows(rows, kPlaceOfQ + kGradOut, columns, kPlaceOfV, call.D_v, grads);
    if constexpr (!kPlain) {
      if (p.grad_weights.data != nullptr) {
        add_given_gradients(p.grad_weights, p.grad_weights_scale, head, i0, j0, grads);
      }
      if (call.threshold > 0) {
        Scores kept;
        for_each(kept, [&](float& value, int m, int n, int e) { value = weights[m][n][e]; });
        drop_both(kept, grads);
        store_scores(place, kept);
      } else {
        store_scores(place, weights);
      }
    }
    make_gradients<kPlain, kEdge>(call, head, i0, pivots, weights, grads);
    if constexpr (!kPlain) {
      if (p.grad_bias.data != nullptr) write_bias_gradient(p.grad_bias, head, i0, j0, grads);
      if (call.softcap != 0.0f) {
        for_each(grads, [&](float& value, int m, int n, int e) { value *= slopes[m][n][e]; });
      }
    }
    store_scores(place + kScores, grads);
  }

  // dV, dQ and dK of P and dS.
  __device__ __forceinline__ void add_gradients() {
    int32_t* const turn = queries.turns + tile * kBackwardWarps + warp;
    const uint32_t thread = forgotten(threadIdx.x);
    float* const sums = queries.sums + int64_t{kBlockM * kD} * tile + Sums::place_of_thread(thread);
    const int before = keys.number - first_key_tile<kBlockN>(call, head, tile * kBlockM);
    while (load_acquire(turn) < before) continue;
    const float* const so_far = before > 0 ? sums : p.zeros + Sums::place_of_thread(thread % kWarp);
    if constexpr (kFloat32) {
      add_float32_gradients(so_far, sums);
    } else {
      add_gradients(so_far, sums);
    }
    __syncwarp();
    if (threadIdx.x % kWarp == 0) store_release(turn, before + 1);
  }

  // The same; dQ's sums so far come from one place and go to another.
  __device__ __forceinline__ void add_gradients(const float* so_far, float* sums) {
    const int warp_of_keys = warp % kKeyRows * 16 * kKeyRowTiles;
    const int first_column = warp / kKeyRows * 8 * kKeyTiles;
    const uint32_t weights = at_column<kBlockM>(rows_then_units<kColumns>(shared), warp_of_keys);
    const uint32_t rows = at_column<kBlockM>(units_then_rows<kColumns>(shared), first_column) + stage;
    float dq[Sums::kRowTiles][kPart][4];
    Sums::load(so_far, dq);
    add_columns_by_columns<kType, kBlockM>(weights, kPlaceOfP, rows, kPlaceOfQ + kGradOut, dv);
    const uint32_t grads = units_then_rows<kColumns>(shared) + Sums::first_row(warp) * kPanelPitch;
    const uint32_t columns = at_column<kBlockN>(units_then_rows<kColumns>(shared), Sums::first_column(warp));
#pragma unroll
    for (int first = 0; first < Sums::kTiles; first += kPart) {
      if (first > 0) Sums::load(so_far + first * Sums::kStep, dq);
      add_rows_by_columns<kType, kBlockN, kBlockM>(grads, kPlaceOfP + kScores, columns ^ 16 * first, dq);
      Sums::store(sums + first * Sums::kStep, dq);
    }
    add_columns_by_columns<kType, kBlockM>(weights, kPlaceOfP + kScores, rows, kPlaceOfQ, dk);
  }

  __device__ __forceinline__ void add_float32_gradients(const float* so_far, float* sums) {
    constexpr bool kKept = kD <= 128;
    const int first_column = warp / kKeyRows * 8 * kKeyTiles;
    const uint32_t weights = columns_of_scores<kBlockM>(shared + kPlaceOfP, warp % kKeyRows);
    const uint32_t rows = apart_columns_of_lane<kBlockM>(shared + kPlaceOfQ + stage, first_column / 16);
    const auto of_keys = [&](uint32_t place) {
      return [=](int chunk, int s, uint32_t (&words)[4]) {
        load_columns<16>(place + (chunk * kFloatPanel + 8 * s) * kPanelPitch, words);
      };
    };
    add_float32_columns<kBlockM, kKept>(of_keys(weights), rows + kGradOut, call.D_v - first_column, dv);
    const uint32_t grads = rows_of_scores(shared + kPlaceOfP + kScores) + Sums::first_row(warp) * kPanelPitch;
    const auto of_queries = [&](int chunk, int s, uint32_t (&words)[4]) {
      load_matrices(at_step(grads, s) + chunk * kBlockM * kPanelPitch, words);
    };
#pragma unroll
    for (int first = 0; first < Sums::kTiles; first += kPart) {
      const int column = Sums::first_column(warp) + 8 * first;
      if (first > 0 && column >= call.D) continue;
      float dq[Sums::kRowTiles][kPart][4];
      Sums::load(so_far + first * Sums::kStep, dq);
      add_float32_columns<kBlockN, kKept>(of_queries, apart_columns_of_lane<kBlockN>(shared, column / 16),
                                          call.D - column, dq);
      Sums::store(sums + first * Sums::kStep, dq);
    }
    add_float32_columns<kBlockM, kKept>(of_keys(weights + kScores), rows, call.D - first_column, dk);
  }

  template <bool kEdge>
  __device__ __forceinline__ void step() {
    copies_wait<0>();
    __syncthreads();  // the tile is there, and everybody is done with the last one's
    if constexpr (kStages == 2) {
      if (tile > tiles.begin) copy_queries<false>(tile - 1, kStage - stage);
    }
    if (kScoreWarps == kWarps || warp < kScoreWarps) make_scores<kEdge>();
    __syncthreads();
    add_gradients();
    if constexpr (kStages == 2) {
      stage = kStage - stage;
    } else {
      __syncthreads();
      if (tile > tiles.begin) copy_queries<false>(tile - 1, 0);
    }
    --tile;
  }

  // All queries of one head.
  __device__ __forceinline__ void add_head() {
    __syncthreads();  // head and tiles are there, and everybody is done with the last head's keys
    if (tiles.begin == tiles.end) return;
    if constexpr (!kPlain) real.find(call, head, keys.n0);
    tile = tiles.end - 1;
    stage = 0;
    copy_keys();
    copy_queries<true>(tile, stage);
    if constexpr (kPlain) {
      // At most twice: before the full tiles and those, then after.
      while (tile >= tiles.begin) {
        const int stop = tile >= tiles.full_end ? tiles.full_end : tiles.begin;
        if (tile >= tiles.full_end || tile < tiles.full_begin) {
          while (tile >= stop) step<true>();
        }
        while (tile >= tiles.full_begin) step<false>();
      }
    } else {
      while (tile >= tiles.begin) step<true>();
    }
  }

  // A lane's sums of dK or dV, of float32.
  __device__ __forceinline__ void store_gradients(const HeadRows& to, int width,
                                                  const float (&sums)[kKeyRowTiles][kKeyTiles][4]) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int key = keys.n0 + 16 * (warp % kKeyRows) + 2 * lane_row() + r;
      if (key >= head.N) continue;
      float* const row = static_cast<float*>(to.data) + head.b * to.stride_b + head.h_kv * to.stride_h +
                         (head.first_key + key) * to.stride_row;
      store_float_row(row, p.aligned, warp / kKeyRows * 8 * kKeyTiles, width, r, sums);
    }
  }

  __device__ __forceinline__ void finish() {
    const int thread = static_cast<int>(forgotten(threadIdx.x)), warp = thread / kWarp;
    const int row = warp % kKeyRows * 16 * kKeyRowTiles, column = warp / kKeyRows * 8 * kKeyTiles;
    scale_all(dk, call.scale);
    if constexpr (kFloat32) {
      store_gradients(p.grad_key, call.D, dk);
      store_gradients(p.grad_value, call.D_v, dv);
    } else {
      __syncthreads();
      store_tile<kBlockN>(place_of_lane<kBlockN>(shared, row, column, thread), dk, kType);
      store_tile<kBlockN>(place_of_lane<kBlockN>(shared + kPlaceOfV, row, column, thread), dv, kType);
      __syncthreads();
      const int left = head.N - keys.n0;
      write_rows<kD, kBlockN, kThreads>(shared, p.grad_key, head.b, head.h_kv, head.first_key + keys.n0, left,
                                        call.D, p.aligned);
      write_rows<kD, kBlockN, kThreads>(shared + kPlaceOfV, p.grad_value, head.b, head.h_kv,
                                        head.first_key + keys.n0, left, call.D_v, p.aligned);
    }
  }
};

// Tickets are (tile of keys, key head, batch element), the tile fastest: blocks that run together share
// queries. The query heads of a group add one after another.
template <DType kType, int kD, BackwardKind kKind>
__global__ void __launch_bounds__(backward_tile(kD, kKind, kType).threads(),
                                  backward_tile(kD, kKind, kType).blocks)
    attention_bwd_keys_kernel(const __grid_constant__ AttentionBwdParams p) {
  using Pass = BackwardPass<kType, kD, kKind>;
  extern __shared__ __align__(128) uint8_t dynamic_shared[];
  __shared__ KeyTile keys;
  __shared__ Head head;
  __shared__ HeadQueries queries;
  __shared__ QueryTiles tiles;
  if (threadIdx.x == 0) {
    const int ticket = atomicAdd(p.ticket, 1), heads = ticket / p.key_tiles;
    const int key_heads = p.call.H / p.call.group;
    keys.number = ticket % p.key_tiles;
    keys.n0 = keys.number * Pass::kBlockN;
    keys.b = heads / key_heads;
    keys.first_head = heads % key_heads * p.call.group;
    head.h = keys.first_head - 1;
  }
  __syncthreads();
  Pass work(p, keys, head, queries, tiles, shared_address(dynamic_shared));
  do {
    Head found = head_of(p.call, keys.b, head.h + 1, 0);
    if (keys.n0 >= found.N) return;
    __syncthreads();
    if constexpr (!Pass::kPlain) {
      if (p.call.padding.data != nullptr || p.call.key_mask.data != nullptr) find_real_range(p.call, found);
    }
    if (threadIdx.x == 0) {
      head = found;
      queries = head_queries<Pass::kBlockM, kD>(p, found);
      tiles = query_tiles<Pass::kBlockM, Pass::kBlockN>(p.call, found, keys.n0);
    }
    work.add_head();
  } while (head.h + 1 < keys.first_head + p.call.group);
  work.finish();
}

}  // namespace fastformer::cuda
