// Attention forward: online softmax over blocks of keys, for the queries of one head at a time.
//
// A work item is a chunk of one head's queries. For each block of keys it packs K transposed into panels
// and V as float32 rows, both small enough for L2, then goes through its queries in tiles of kTileRows:
// scores, softmax and the product with V follow each other tile by tile, so that the scores stay in L1.
//
//   s_ij = q_i . k_j, c = scale log2(e)     so that weights are powers of two
//   m' = max(m, c max_j s_ij)               l' = l 2^(m - m') + sum_j 2^(c s_ij - m')
//   o' = o 2^(m - m') + sum_j 2^(c s_ij - m') v_j
//   out = o / l                             lse = ln(2) m + ln(l)
//
// c s - m' is one fma, so that no score is rounded after the dot product; m' is, but alike in every term.
//
// (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018; Dao, "FlashAttention-2",
// 2023.) Block boundaries depend on D and N alone, so a row's bits depend on no other row, on no chunk and
// on no thread.
#pragma once

#include "gemm_micro.h"
#include "visibility.h"
#include "work_queue.h"

namespace fastformer::cpu::FASTFORMER_ISA {

constexpr int64_t kMaxKeyBlock = 512;
// Not a multiple of 4096 bytes, which would put a tile's rows into one cache set.
constexpr int64_t kScoreStride = kMaxKeyBlock + 16;
// Longer sums are made of shorter ones: one chain of 512 roundings would lose against torch's blocks.
constexpr int64_t kMaxDepth = 128;

FASTFORMER_INLINE int64_t key_block_of(const Attention& call) {
  return call.D + call.D_v <= 256 ? kMaxKeyBlock : kMaxKeyBlock / 2;
}

// What one work item keeps in its scratch.
struct AttentionBuffers {
  int64_t ldq, ldo;
  float* query;      // [chunk_rows, ldq], with ScoreScale's sign
  float* key;        // [key_block / kPanel, D, kPanel]
  float* value;      // [key_block, ldo]
  float* out;        // [chunk_rows, ldo], not yet divided by row_sum
  float* scores;     // [kTileRows, kScoreStride]
  float* row_max;    // [chunk_rows]
  float* row_sum;    // [chunk_rows]
  float* rescale;    // [kTileRows]
  uint8_t* is_real;  // [key_block]

  // With memory null: only counts. Returns the floats needed.
  int64_t carve(const AttentionFwd& fwd, float* memory) {
    const Attention& call = fwd.attention;
    const int64_t key_block = key_block_of(call);
    const int64_t rows = round_up<int64_t>(fwd.chunk_rows, kTileRows);
    ldq = round_up<int64_t>(call.D, kLanes) + 16;
    ldo = round_up<int64_t>(call.D_v, kLanes);
    int64_t used = 0;
    auto take = [&](int64_t floats) {
      float* const part = memory ? memory + used : nullptr;
      used += round_up<int64_t>(floats, 16);
      return part;
    };
    query = take(rows * ldq);
    key = take(key_block * call.D);
    value = take(key_block * ldo);
    out = take(rows * ldo);
    scores = take(kTileRows * kScoreStride);
    row_max = take(rows);
    row_sum = take(rows);
    rescale = take(kTileRows);
    is_real = reinterpret_cast<uint8_t*>(take(key_block / 4));
    return used;
  }
};

// A block of keys as the tiles read it.
struct KeyBlock {
  int64_t first, count;
  const float* value;
  int64_t value_stride;
  const uint8_t* is_real;  // null: all are
};

// A negative scale turns the queries' sign and a vanishing one makes them 0, so that the factor of the scores
// is positive: then the largest score has the largest weight, and -inf stays -inf.
struct ScoreScale {
  explicit ScoreScale(float scale) {
    constexpr float kLog2E = 1.44269504f, kLeastNormal = 1.17549435e-38f;
    const float magnitude = __builtin_fabsf(scale) * kLog2E;
    const bool vanishes = magnitude < kLeastNormal;
    of_query = vanishes ? 0.0f : scale < 0.0f ? -1.0f : 1.0f;
    of_scores = vanishes ? 1.0f : magnitude;
  }

  float of_query, of_scores;
};

// Turns scores[count] into weights 2^(scale s - max) and folds them into the row's maximum and sum. Returns
// the factor that brings what was accumulated before onto the new maximum. count: a multiple of kPanel. Not
// inlined: beside the products it would spill their registers.
__attribute__((noinline)) static float softmax_step(float* scores, int64_t count, float scale, float& row_max,
                                                    float& row_sum) {
  F32 max0 = load(scores), max1 = load(scores + kLanes);
  for (int64_t n = kPanel; n < count; n += kPanel) {
    max0 = vmax(load(scores + n), max0);
    max1 = vmax(load(scores + n + kLanes), max1);
  }
  const float block_max = reduce_max(vmax(max0, max1)) * scale;
  const float new_max = block_max > row_max ? block_max : row_max;
  // A row that has seen no key has maximum -inf: pivot on 0, or -inf - -inf would make NaN.
  const float pivot = new_max == kMinusInfinity ? 0.0f : new_max;
  const F32 scales = splat(scale), minus_pivot = splat(-pivot);
  F32 sum0{}, sum1{};
  for (int64_t n = 0; n < count; n += kPanel) {
    const F32 weight0 = exp2(fma(load(scores + n), scales, minus_pivot));
    const F32 weight1 = exp2(fma(load(scores + n + kLanes), scales, minus_pivot));
    sum0 += weight0;
    sum1 += weight1;
    store(scores + n, weight0);
    store(scores + n + kLanes, weight1);
  }
  const float rescale = exp2(splat(row_max - pivot))[0];
  row_max = new_max;
  row_sum = row_sum * rescale + reduce_add(sum0 + sum1);
  return rescale;
}

// scores[kRows, kPanel] = query[kRows, D] key[D, kPanel]
template <int kRows>
FASTFORMER_INLINE void score_panel(int64_t D, const float* query, int64_t ldq, const float* key,
                                   float* scores) {
  const int64_t depth = D > kMaxDepth ? (D + 1) / 2 : D;
  for (int64_t d = 0; d < D; d += depth) {
    Tile<kRows, 2> tile;
    tile.zero();
    tile.multiply_add(smaller(depth, D - d), query + d, ldq, key + d * kPanel, kPanel);
    if (d > 0) tile.add(scores, kScoreStride);
    tile.store_to(scores, kScoreStride);
  }
}

// out[kRows, kVectors * kLanes] = rescale * out + weights[kRows, keys] value[keys, kVectors * kLanes] for
// keys [begin, end) of the block.
template <int kRows, int kVectors>
FASTFORMER_INLINE void accumulate_output(const AttentionBuffers& buffers, const KeyBlock& block,
                                         int64_t begin, int64_t end, const float* value, float* out) {
  for (int64_t n = begin; n < end;) {
    // Where a span ends does not depend on where the tile's keys begin.
    const int64_t span_end = smaller(end, (n / kMaxDepth + 1) * kMaxDepth);
    Tile<kRows, kVectors> tile;
    tile.zero();
    tile.multiply_add(span_end - n, buffers.scores + n, kScoreStride, value + n * block.value_stride,
                      block.value_stride);
    if (n == begin) {
      tile.add_scaled(out, buffers.ldo, buffers.rescale);
    } else {
      tile.add(out, buffers.ldo);
    }
    tile.store_to(out, buffers.ldo);
    n = span_end;
  }
}

// One tile of kRows queries against one block of keys; `row` counts in the chunk, `i` in the head. Rows
// from M on are padding: they are multiplied along and never read.
template <int kRows>
static void attend_tile(const Attention& call, const Visibility& visibility, const KeyBlock& block,
                        const AttentionBuffers& buffers, int64_t row, int64_t i) {
  const int64_t rows = smaller(kRows, call.M - i);
  const KeyRange seen = visibility.keys_of_rows(i, rows);
  const int64_t begin = larger(0, seen.begin - block.first);
  const int64_t end = smaller(block.count, seen.end - block.first);
  if (begin >= end) return;

  const int64_t first_panel = begin / kPanel * kPanel;
  const int64_t last_panel = round_up<int64_t>(end, kPanel);
  for (int64_t n = first_panel; n < last_panel; n += kPanel) {
    score_panel<kRows>(call.D, buffers.query + row * buffers.ldq, buffers.ldq, buffers.key + n * call.D,
                       buffers.scores + n);
  }

  const float scale = ScoreScale(call.scale).of_scores;
  for (int64_t r = 0; r < kRows; ++r) buffers.rescale[r] = 1.0f;
  for (int64_t r = 0; r < rows; ++r) {
    float* const scores = buffers.scores + r * kScoreStride + first_panel;
    const int64_t count = last_panel - first_panel;
    visibility.hide_scores(scores, i + r, block.first + first_panel, count,
                           block.is_real ? block.is_real + first_panel : nullptr);
    buffers.rescale[r] =
        softmax_step(scores, count, scale, buffers.row_max[row + r], buffers.row_sum[row + r]);
  }

  float* const out = buffers.out + row * buffers.ldo;
  int64_t d = 0;
  for (; d + kPanel <= buffers.ldo; d += kPanel) {
    accumulate_output<kRows, 2>(buffers, block, begin, end, block.value + d, out + d);
  }
  if (d < buffers.ldo) accumulate_output<kRows, 1>(buffers, block, begin, end, block.value + d, out + d);
}

// Packs keys [first, first + count) and their values. False where no query sees any of them.
template <typename T>
static bool pack_keys(const Attention& call, const Visibility& visibility, const T* key, const T* value,
                      const AttentionBuffers& buffers, KeyBlock& block, int64_t rows) {
  const int64_t real = visibility.real_keys(block.first, block.count, buffers.is_real);
  if (real == 0) return false;
  block.is_real = real == block.count ? nullptr : buffers.is_real;
  const T* const first_key = key + block.first * call.key.stride_row;
  for (int64_t n = 0; n < block.count; n += kPanel) {
    pack_panel(first_key + n * call.key.stride_row, call.key.stride_row, smaller(kPanel, block.count - n),
               call.D, block.is_real ? block.is_real + n : nullptr, buffers.key + n * call.D);
  }
  const T* const first_value = value + block.first * call.value.stride_row;
  if constexpr (sizeof(T) == sizeof(float)) {
    // As it lies, if nothing in it must be hidden and its rows suit the tiles. Distant rows are worth
    // gathering where many queries read them.
    const bool near_rows = call.value.stride_row == call.D_v || rows <= 2 * kTileRows;
    if (!block.is_real && near_rows && call.D_v % kLanes == 0) {
      block.value = first_value;
      block.value_stride = call.value.stride_row;
      return true;
    }
  }
  pack_rows(first_value, call.value.stride_row, block.count, call.D_v, block.is_real, 1.0f, buffers.value,
            buffers.ldo);
  block.value = buffers.value;
  block.value_stride = buffers.ldo;
  return true;
}

template <typename T>
static void write_rows(const Attention& call, const AttentionBuffers& buffers, int64_t rows, T* out,
                       float* lse, float* lse_rest) {
  constexpr double kLn2 = 0.693147180559945309417;
  for (int64_t row = 0; row < rows; ++row) {
    const float sum = buffers.row_sum[row];
    const bool sees_nothing = sum == 0.0f && buffers.row_max[row] == kMinusInfinity;
    const F32 factor = splat(sees_nothing ? 0.0f : 1.0f / sum);
    const float* const source = buffers.out + row * buffers.ldo;
    T* const target = out + row * call.D_v;
    int64_t d = 0;
    for (; d + kLanes <= call.D_v; d += kLanes) store(target + d, load(source + d) * factor);
    if (d < call.D_v) store_n(target + d, load(source + d) * factor, (int)(call.D_v - d));
    lse[row] =
        sees_nothing ? kMinusInfinity : (float)(kLn2 * buffers.row_max[row] + __builtin_log((double)sum));
    lse_rest[row] = 0.0f;
  }
}

// Queries [i, i + rows) of head (b, h).
template <typename T>
static void attend_chunk(const AttentionFwd& fwd, int64_t b, int64_t h, int64_t i, int64_t rows,
                         const AttentionBuffers& buffers) {
  const Attention& call = fwd.attention;
  const int64_t h_kv = h / (call.H / call.H_kv);
  const T* const query = (const T*)call.query.data + b * call.query.stride_b + h * call.query.stride_h;
  const T* const key = (const T*)call.key.data + b * call.key.stride_b + h_kv * call.key.stride_h;
  const T* const value = (const T*)call.value.data + b * call.value.stride_b + h_kv * call.value.stride_h;

  const int64_t padded_rows = round_up<int64_t>(rows, kRowStep);
  pack_rows(query + i * call.query.stride_row, call.query.stride_row, rows, call.D, nullptr,
            ScoreScale(call.scale).of_query, buffers.query, buffers.ldq);
  __builtin_memset(buffers.query + rows * buffers.ldq, 0, (padded_rows - rows) * buffers.ldq * sizeof(float));
  __builtin_memset(buffers.out, 0, padded_rows * buffers.ldo * sizeof(float));
  for (int64_t row = 0; row < rows; ++row) {
    buffers.row_max[row] = kMinusInfinity;
    buffers.row_sum[row] = 0.0f;
  }

  const Visibility visibility(call.masks, b, h, call.M, call.N);
  const KeyRange seen = visibility.keys_of_rows(i, rows);
  const int64_t key_block = key_block_of(call);
  for (int64_t first = larger(0, seen.begin) / key_block * key_block; first < seen.end; first += key_block) {
    KeyBlock block{first, smaller(key_block, call.N - first), nullptr, 0, nullptr};
    if (!pack_keys(call, visibility, key, value, buffers, block, rows)) continue;
    int64_t row = 0;
    for (; row + kTileRows <= padded_rows; row += kTileRows) {
      attend_tile<kTileRows>(call, visibility, block, buffers, row, i + row);
    }
    const int64_t left = padded_rows - row;
    if (left == 2 * kRowStep) attend_tile<2 * kRowStep>(call, visibility, block, buffers, row, i + row);
    if (left == kRowStep) attend_tile<kRowStep>(call, visibility, block, buffers, row, i + row);
  }

  const int64_t first_row = (b * call.H + h) * call.M + i;
  write_rows(call, buffers, rows, (T*)fwd.out.data + first_row * call.D_v, fwd.lse.data + first_row,
             fwd.lse_rest.data + first_row);
}

static void attention_fwd(const AttentionFwd& fwd, WorkQueue& queue) {
  const FlushDenormals flush;
  const Attention& call = fwd.attention;
  AttentionBuffers buffers;
  const Scratch scratch(buffers.carve(fwd, nullptr));
  buffers.carve(fwd, scratch.data());
  for (int64_t item = take(queue); item < queue.count; item = take(queue)) {
    const int64_t head = item / fwd.chunks;
    const int64_t i = item % fwd.chunks * fwd.chunk_rows, rows = smaller(fwd.chunk_rows, call.M - i);
    const int64_t b = head / call.H, h = head % call.H;
    with_type(call.dtype, [&](auto type) { attend_chunk<decltype(type)>(fwd, b, h, i, rows, buffers); });
  }
}

}  // namespace fastformer::cpu::FASTFORMER_ISA
