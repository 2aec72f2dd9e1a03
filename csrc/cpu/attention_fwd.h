// Attention forward: online softmax over blocks of keys, for the queries of one head at a time.
//
// A work item is a chunk of one head's queries. For each block of keys it packs K transposed into panels
// and V as float32 rows, both small enough for L2, then goes through its queries in tiles of kTileRows:
// scores, softmax and the product with V follow each other tile by tile, so that the scores stay in L1.
//
//   c = unit log2(e)                        so that weights are powers of two
//   m' = max(m, max_j s_ij)                 l' = l 2^(c (m - m')) + sum_j 2^(c (s_ij - m'))
//   o' = o 2^(c (m - m')) + sum_j keep_ij 2^(c (s_ij - m')) v_j
//   out = o / (l (1 - p))                   lse = unit m + ln(l)
//
// s is a logit, or a bare product that counts `unit` logits (attention_scores.h). A sink is a key that has a
// logit and no value: m and l start with it.
//
// (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018; Dao, "FlashAttention-2",
// 2023.) Block boundaries depend on D and N alone, so a row's bits depend on no chunk and on no thread, and
// on other rows only in that M <= kFewQueries sums in another order.
#pragma once

#include "attention_scores.h"

namespace fastformer::cpu::FASTFORMER_ISA {
namespace {

constexpr int64_t kMaxKeyBlock = 512;
// Not a multiple of 4096 bytes, which would put a tile's rows into one cache set.
constexpr int64_t kScoreStride = kMaxKeyBlock + 16;

FASTFORMER_INLINE int64_t key_block_of(const Attention& call) {
  return call.D + call.D_v <= 256 ? kMaxKeyBlock : kMaxKeyBlock / 2;
}

// What one work item keeps in its scratch.
struct ForwardBuffers {
  ForwardBuffers(const AttentionFwd& fwd, Parts& parts) {
    const Attention& call = fwd.attention;
    const int64_t key_block = key_block_of(call);
    const int64_t rows = round_up<int64_t>(fwd.chunk_rows, kTileRows);
    ldq = operand_stride(call.D);
    ldo = round_up<int64_t>(call.D_v, kLanes);
    query = parts.take(rows * ldq);
    key = parts.take(key_block * call.D);
    value = parts.take(key_block * ldo);
    if (call.pages.table) {
      key_rows = parts.take(key_block * call.D);
      value_rows = parts.take(key_block * call.D_v);
    }
    out = parts.take(rows * ldo);
    scores = parts.take(kTileRows * kScoreStride);
    row_max = parts.take(rows);
    row_sum = parts.take(rows);
    rescale = parts.take(kTileRows);
    is_real = (uint8_t*)parts.take(key_block / 4);
    decisions = (uint16_t*)parts.take(decision_buffer(key_block) / 2);
  }

  int64_t ldq, ldo;
  float* query;         // [chunk_rows, ldq], with Logits' sign
  float* key;           // [key_block / kPanel, D, kPanel]
  float* value;         // [key_block, ldo]
  float* out;           // [chunk_rows, ldo], not yet divided by row_sum
  float* scores;        // [kTileRows, kScoreStride]
  float* row_max;       // [chunk_rows]
  float* row_sum;       // [chunk_rows]
  float* rescale;       // [kTileRows]
  uint8_t* is_real;     // [key_block]
  uint16_t* decisions;  // [decision_buffer(key_block)]

  // Of the call's dtype, fetched from their pages; null where there are none.
  float* key_rows = nullptr;    // [key_block, D]
  float* value_rows = nullptr;  // [key_block, D_v]
};

// A block of keys as the tiles read it.
template <typename T>
struct KeyBlock {
  int64_t first, count;
  const T* key;  // as it lies
  int64_t key_stride;
  const float* value;
  int64_t value_stride;
  const uint8_t* is_real;  // null: all are
};

// Queries [i, i + rows) of one head.
template <typename T>
struct Chunk {
  const AttentionFwd& fwd;
  const Attention& call;
  const Head& head;
  const Logits& logits;
  const ForwardBuffers& buffers;
  int64_t h_kv, i, rows;

  bool is_few() const { return head.has_few_queries(); }
};

// Turns scores[count] into weights 2^(c (s - max)) and folds them into the row's maximum and sum. Returns
// the factor that brings what was accumulated before onto the new maximum. count: a multiple of kPanel. Not
// inlined: beside the products it would spill their registers.
__attribute__((noinline)) static float softmax_step(float* scores, int64_t count, float c, float& row_max,
                                                    float& row_sum) {
  F32 max0 = load(scores), max1 = load(scores + kLanes);
  for (int64_t n = kPanel; n < count; n += kPanel) {
    max0 = vmax(load(scores + n), max0);
    max1 = vmax(load(scores + n + kLanes), max1);
  }
  const float block_max = reduce_max(vmax(max0, max1));
  const float new_max = block_max > row_max ? block_max : row_max;
  // A row that has seen no key has maximum -inf: pivot on 0, or -inf - -inf would make NaN.
  const float pivot = new_max == kMinusInfinity ? 0.0f : new_max;
  const F32 factors = splat(c), pivots = splat(pivot);
  F32 sum0{}, sum1{};
  for (int64_t n = 0; n < count; n += kPanel) {
    const F32 weight0 = exp2((load(scores + n) - pivots) * factors);
    const F32 weight1 = exp2((load(scores + n + kLanes) - pivots) * factors);
    sum0 += weight0;
    sum1 += weight1;
    store(scores + n, weight0);
    store(scores + n + kLanes, weight1);
  }
  const float rescale = exp2(splat((row_max - pivot) * c))[0];
  row_max = new_max;
  row_sum = row_sum * rescale + reduce_add(sum0 + sum1);
  return rescale;
}

// out[kRows, kVectors * kLanes] = rescale * out + weights[kRows, keys] value[keys, kVectors * kLanes] for
// keys [begin, end) of the block.
template <int kRows, int kVectors, typename T>
FASTFORMER_INLINE void accumulate_output(const Chunk<T>& chunk, const KeyBlock<T>& block, int64_t begin,
                                         int64_t end, const float* value, float* out) {
  const ForwardBuffers& buffers = chunk.buffers;
  const int64_t max_depth = chunk.head.max_depth();
  for (int64_t n = begin; n < end;) {
    // Where a span ends does not depend on where the tile's keys begin.
    const int64_t span_end = smaller(end, (n / max_depth + 1) * max_depth);
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

// scores[kRows, first_panel : last_panel] of queries `row` on, counted in the chunk.
template <int kRows, typename T>
FASTFORMER_INLINE void score_tile(const Chunk<T>& chunk, const KeyBlock<T>& block, int64_t row,
                                  int64_t first_panel, int64_t last_panel) {
  const ForwardBuffers& buffers = chunk.buffers;
  const float* const query = buffers.query + row * buffers.ldq;
  for (int64_t n = first_panel; n < last_panel; n += kPanel) {
    float* const scores = buffers.scores + n;
    if (chunk.is_few()) {
      for (int64_t r = 0; r < smaller(kRows, chunk.rows - row); ++r) {
        multiply_rows(query + r * buffers.ldq, block.key, block.key_stride, n, block.count, block.is_real,
                      chunk.call.D, scores + r * kScoreStride);
      }
    } else {
      multiply_panel<kRows>(chunk.call.D, query, buffers.ldq, buffers.key + n * chunk.call.D, scores,
                            kScoreStride);
    }
  }
}

// Scores of row r of the tile to weights, dropped ones zero.
template <typename T>
FASTFORMER_INLINE void weigh_row(const Chunk<T>& chunk, const KeyBlock<T>& block, int64_t r, int64_t row,
                                 int64_t first_panel, int64_t count) {
  const ForwardBuffers& buffers = chunk.buffers;
  float* const scores = buffers.scores + r * kScoreStride + first_panel;
  const int64_t i = chunk.i + row, first = block.first + first_panel;
  if (!chunk.logits.are_products) chunk.logits.make(chunk.head, i, first, scores, nullptr, count);
  chunk.head.visibility.hide_scores(scores, i, first, count,
                                    block.is_real ? block.is_real + first_panel : nullptr);
  buffers.rescale[r] =
      softmax_step(scores, count, chunk.logits.unit * kLog2E, buffers.row_max[row], buffers.row_sum[row]);
  const Dropout& dropout = chunk.call.dropout;
  if (dropout.threshold) {
    const uint16_t* const decisions =
        row_decisions(chunk.call, chunk.head, i, first, count, buffers.decisions);
    drop(decisions, dropout.threshold, 1.0f, scores, count);
  }
}

// One tile of kRows queries against one block of keys; `row` counts in the chunk. Rows from chunk.rows on are
// padding: they are multiplied along and never read.
template <int kRows, typename T>
static void attend_tile(const Chunk<T>& chunk, const KeyBlock<T>& block, int64_t row) {
  const ForwardBuffers& buffers = chunk.buffers;
  const int64_t rows = smaller(kRows, chunk.rows - row);
  const Range seen = chunk.head.visibility.keys_of_rows(chunk.i + row, rows);
  const int64_t begin = larger(0, seen.begin - block.first);
  const int64_t end = smaller(block.count, seen.end - block.first);
  if (begin >= end) return;

  const int64_t first_panel = begin / kPanel * kPanel;
  const int64_t last_panel = round_up<int64_t>(end, kPanel);
  score_tile<kRows>(chunk, block, row, first_panel, last_panel);
  for (int64_t r = 0; r < kRows; ++r) buffers.rescale[r] = 1.0f;
  for (int64_t r = 0; r < rows; ++r) {
    weigh_row(chunk, block, r, row + r, first_panel, last_panel - first_panel);
  }

  float* const out = buffers.out + row * buffers.ldo;
  int64_t d = 0;
  if constexpr (kRows == 1) {
    // More accumulators, or each product would wait for the one before.
    for (; d + 4 * kLanes <= buffers.ldo; d += 4 * kLanes) {
      accumulate_output<kRows, 4>(chunk, block, begin, end, block.value + d, out + d);
    }
  }
  for (; d + kPanel <= buffers.ldo; d += kPanel) {
    accumulate_output<kRows, 2>(chunk, block, begin, end, block.value + d, out + d);
  }
  if (d < buffers.ldo) accumulate_output<kRows, 1>(chunk, block, begin, end, block.value + d, out + d);
}

// Rows of a block, where a tile can read them.
template <typename T>
struct BlockRows {
  const T* data;
  int64_t stride;
};

// The block's rows of key or value: as they lie or, of pages, fetched into `fetched`.
template <typename T>
static BlockRows<T> rows_of_block(const Chunk<T>& chunk, const KeyBlock<T>& block, const HeadRows& rows,
                                  int64_t width, float* fetched) {
  const Pages& pages = chunk.call.pages;
  if (!pages.table) return {key_row<T>(rows, chunk.head, chunk.h_kv, block.first), rows.stride_row};
  const int32_t* const table = pages.table + chunk.head.b * pages.stride_b;
  T* const target = (T*)fetched;
  for (int64_t n = 0; n < block.count;) {
    const int64_t j = block.first + n, first = j % pages.size;
    const int64_t count = smaller(pages.size - first, block.count - n);
    const int64_t page = smaller(pages.count - 1, (uint32_t)table[j / pages.size * pages.stride_n]);
    const T* const source =
        (const T*)rows.data + page * rows.stride_b + chunk.h_kv * rows.stride_h + first * rows.stride_row;
    for (int64_t row = 0; row < count; ++row) {
      __builtin_memcpy(target + (n + row) * width, source + row * rows.stride_row, width * sizeof(T));
    }
    n += count;
  }
  return {target, width};
}

// Packs the block's keys and their values. False where no query sees any of them.
template <typename T>
static bool pack_keys(const Chunk<T>& chunk, KeyBlock<T>& block) {
  const Attention& call = chunk.call;
  const ForwardBuffers& buffers = chunk.buffers;
  const int64_t real = chunk.head.visibility.real_keys(block.first, block.count, buffers.is_real);
  if (real == 0) return false;
  block.is_real = real == block.count ? nullptr : buffers.is_real;
  const BlockRows<T> keys = rows_of_block(chunk, block, call.key, call.D, buffers.key_rows);
  block.key = keys.data;
  block.key_stride = keys.stride;
  if (!chunk.is_few()) {
    pack_panels(block.key, block.key_stride, block.count, call.D, block.is_real, buffers.key);
  }
  const BlockRows<T> values = rows_of_block(chunk, block, call.value, call.D_v, buffers.value_rows);
  if constexpr (sizeof(T) == sizeof(float)) {
    // As it lies, if nothing in it must be hidden and its rows suit the tiles. Distant rows are worth
    // gathering where many queries read them.
    const bool near_rows = values.stride == call.D_v || chunk.rows <= 2 * kTileRows;
    if (!block.is_real && near_rows && call.D_v % kLanes == 0) {
      block.value = values.data;
      block.value_stride = values.stride;
      return true;
    }
  }
  pack_rows(values.data, values.stride, block.count, call.D_v, block.is_real, 1.0f, buffers.value,
            buffers.ldo);
  block.value = buffers.value;
  block.value_stride = buffers.ldo;
  return true;
}

template <typename T>
static void write_rows(const Chunk<T>& chunk) {
  const Attention& call = chunk.call;
  const ForwardBuffers& buffers = chunk.buffers;
  for (int64_t row = 0; row < chunk.rows; ++row) {
    const float sum = buffers.row_sum[row];
    const bool sees_nothing = sum == 0.0f && buffers.row_max[row] == kMinusInfinity;
    const F32 factor = splat(sees_nothing ? 0.0f : call.dropout.scale / sum);
    const float* const source = buffers.out + row * buffers.ldo;
    T* const target = chunk.head.template query_row<T>(chunk.fwd.out, chunk.i + row);
    int64_t d = 0;
    for (; d + kLanes <= call.D_v; d += kLanes) store(target + d, load(source + d) * factor);
    if (d < call.D_v) store_n(target + d, load(source + d) * factor, (int)(call.D_v - d));

    const double largest = (double)chunk.logits.unit * buffers.row_max[row];
    const double log_sum = __builtin_log((double)sum);
    const int64_t i = chunk.i + row;
    *chunk.head.stats(chunk.fwd.lse, i) = sees_nothing ? kMinusInfinity : (float)(largest + log_sum);
    // The sum refers to the largest score before it was rounded.
    const float row_max = (float)largest;
    const float rounding = sees_nothing ? 0.0f : (float)(largest - row_max);
    *chunk.head.stats(chunk.fwd.row_max, i) = row_max;
    *chunk.head.stats(chunk.fwd.row_sum, i) = sum * (1.0f + rounding);
  }
}

template <typename T>
static void attend_chunk(const Chunk<T>& chunk) {
  const Attention& call = chunk.call;
  const ForwardBuffers& buffers = chunk.buffers;
  const int64_t padded_rows = chunk.rows == 1 ? 1 : round_up<int64_t>(chunk.rows, kRowStep);
  const int64_t padding = padded_rows - chunk.rows;
  pack_rows(chunk.head.template query_row<T>(call.query, chunk.i), call.query.stride_row, chunk.rows, call.D,
            nullptr, chunk.logits.of_query, buffers.query, buffers.ldq);
  __builtin_memset(buffers.query + chunk.rows * buffers.ldq, 0, padding * buffers.ldq * sizeof(float));
  __builtin_memset(buffers.out, 0, padded_rows * buffers.ldo * sizeof(float));
  const float sink = call.sink ? call.sink[chunk.head.h] : kMinusInfinity;
  for (int64_t row = 0; row < chunk.rows; ++row) {
    buffers.row_max[row] = sink;
    buffers.row_sum[row] = sink == kMinusInfinity ? 0.0f : 1.0f;
  }

  const Range seen = chunk.head.visibility.keys_of_rows(chunk.i, chunk.rows);
  const int64_t key_block = key_block_of(call);
  for (int64_t first = larger(0, seen.begin) / key_block * key_block; first < seen.end; first += key_block) {
    KeyBlock<T> block{first, smaller(key_block, chunk.head.N - first), nullptr, 0, nullptr, 0, nullptr};
    if (!pack_keys(chunk, block)) continue;
    if (padded_rows == 1) {
      attend_tile<1>(chunk, block, 0);
    } else {
      over_row_tiles(padded_rows,
                     [&](auto rows, int64_t row) { attend_tile<decltype(rows)::kCount>(chunk, block, row); });
    }
  }
  write_rows(chunk);
}

static void attention_fwd(const AttentionFwd& fwd, WorkQueue& queue) {
  const FlushDenormals flush;
  const Attention& call = fwd.attention;
  Parts count{nullptr};
  (void)ForwardBuffers(fwd, count);
  const Scratch scratch(count.used);
  Parts parts{scratch.data()};
  const ForwardBuffers buffers(fwd, parts);
  const Logits logits(call);
  for (int64_t item = take(queue); item < queue.count; item = take(queue)) {
    const int64_t h = item / fwd.chunks % call.H;
    // Causal chunks grow with their position: the longest first, so that no thread ends with one.
    const int64_t i = (fwd.chunks - 1 - item % fwd.chunks) * fwd.chunk_rows;
    const Head head(call, item / fwd.chunks / call.H, h);
    const int64_t rows = smaller(fwd.chunk_rows, head.M - i);
    if (rows <= 0) continue;
    with_type(call.dtype, [&](auto type) {
      attend_chunk(
          Chunk<decltype(type)>{fwd, call, head, logits, buffers, h / (call.H / call.H_kv), i, rows});
    });
  }
}

}  // namespace
}  // namespace fastformer::cpu::FASTFORMER_ISA
