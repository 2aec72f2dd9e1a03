// What every pass over the scores of a head shares: where its rows lie, how a product of a query and a key
// becomes a logit, which weights dropout keeps, and how a block of keys is packed.
#pragma once

#include "dropout_map.h"
#include "gemm_micro.h"
#include "visibility.h"
#include "worker.h"

namespace fastformer::cpu::FASTFORMER_ISA {
namespace {

constexpr float kLog2E = 1.44269504f;
// Longer sums are made of shorter ones: one chain of 512 roundings would lose against torch's blocks.
constexpr int64_t kMaxDepth = 128;

// So few queries read the keys as they lie: packing them would cost more than it saves.
constexpr int64_t kFewQueries = 4;
// torch takes the products of a single query over many lanes, each a short sum.
constexpr int64_t kMaxDepthOfFew = 32;

// One head of one batch element, or of one packed sequence.
struct Head {
  Head(const Attention& call, int64_t b, int64_t h)
      : b(b),
        h(h),
        first_query(call.cu_seqlens_q ? call.cu_seqlens_q[b] : 0),
        first_key(call.cu_seqlens_k ? call.cu_seqlens_k[b] : 0),
        M(call.cu_seqlens_q ? call.cu_seqlens_q[b + 1] - first_query : call.M),
        N(call.cu_seqlens_k    ? call.cu_seqlens_k[b + 1] - first_key
          : call.pages.lengths ? call.pages.lengths[b]
                               : call.N),
        visibility(call.masks, b, h, M, N) {}

  // Query row i of this head, in query, out or their gradients.
  template <typename T>
  T* query_row(const HeadRows& rows, int64_t i) const {
    return (T*)rows.data + b * rows.stride_b + h * rows.stride_h + (first_query + i) * rows.stride_row;
  }

  // Of the head, not of a chunk: chunks depend on the threads, and bits must not.
  bool has_few_queries() const { return M <= kFewQueries; }
  // How many keys one sum of a query's may be over.
  int64_t max_depth() const { return has_few_queries() ? kMaxDepthOfFew : kMaxDepth; }

  float* stats(const RowStats& rows, int64_t i) const {
    return rows.data + b * rows.stride_b + h * rows.stride_h + first_query + i;
  }

  int64_t b, h;
  int64_t first_query, first_key;  // rows before the packed sequence's own
  int64_t M, N;
  Visibility visibility;
};

// Key row j of key head h_kv, in key, value or their gradients.
template <typename T>
FASTFORMER_INLINE T* key_row(const HeadRows& rows, const Head& head, int64_t h_kv, int64_t j) {
  return (T*)rows.data + head.b * rows.stride_b + h_kv * rows.stride_h +
         (head.first_key + j) * rows.stride_row;
}

// z (1 + z^2 P(z^2)) near 0, where 1 - 2 / (e^2z + 1) would cancel; both to about 2 ulp.
FASTFORMER_INLINE F32 tanh(F32 z) {
  const F32 magnitude = select(z < 0.0f, -z, z);
  const F32 square = z * z;
  F32 p = splat(-5.70498872745e-3f);
  p = fma(p, square, splat(2.06390887954e-2f));
  p = fma(p, square, splat(-5.37397155531e-2f));
  p = fma(p, square, splat(1.33314422036e-1f));
  p = fma(p, square, splat(-3.33332819422e-1f));
  const F32 small = fma(p * square, z, z);
  const F32 large = 1.0f - 2.0f / (exp2(magnitude * (2.0f * kLog2E)) + 1.0f);
  return select(magnitude < 0.625f, small, select(z < 0.0f, -large, large));  // NaN: large
}

// row[n] += factor * matrix(i, first + n)
template <typename T>
static void add_elements(const T* elements, int64_t stride, float factor, float* row, int64_t count) {
  if (stride == 1) {
    const F32 factors = splat(factor);
    int64_t n = 0;
    for (; n + kLanes <= count; n += kLanes) {
      store(row + n, fma(load(elements + n), factors, load(row + n)));
    }
    if (n < count) {
      const int tail = (int)(count - n);
      store_n(row + n, fma(load_n(elements + n, tail), factors, load_n(row + n, tail)), tail);
    }
    return;
  }
  for (int64_t n = 0; n < count; ++n) row[n] += factor * to_float(elements[n * stride]);
}

// row[n] += factor * matrix of head (b, h) at (i, first + n)
__attribute__((noinline)) static void add_scores(const ScoreMatrix& matrix, const Head& head, int64_t i,
                                                 int64_t first, float factor, float* row, int64_t count) {
  const int64_t at =
      head.b * matrix.stride_b + head.h * matrix.stride_h + i * matrix.stride_m + first * matrix.stride_n;
  with_type(matrix.dtype, [&](auto type) {
    add_elements((const decltype(type)*)matrix.data + at, matrix.stride_n, factor, row, count);
  });
}

// From products of a query and a key to logits. Where nothing but a scale is between them the products stay
// as they are, and `unit` says what a product counts in logits; elsewhere logits are written in their place,
// and unit is 1.
//
// A negative scale turns the queries' sign and a vanishing one makes them 0, so that unit is positive: then
// the largest score has the largest weight, and -inf stays -inf.
class Logits {
 public:
  explicit Logits(const Attention& call) : call_(call) {
    constexpr float kLeastNormal = 1.17549435e-38f;
    const float magnitude = __builtin_fabsf(call.scale);
    const bool vanishes = magnitude * kLog2E < kLeastNormal;
    of_query = vanishes ? 0.0f : call.scale < 0.0f ? -1.0f : 1.0f;
    product_scale_ = vanishes ? 1.0f : magnitude;
    are_products = call.softcap == 0.0f && !call.bias.data && !call.relative_bias && !call.sink;
    unit = are_products ? product_scale_ : 1.0f;
  }

  // In place, of row i and keys first + n. `slopes` (may be null) receives softcap's derivative. What lies
  // beyond key N is not touched by a bias.
  __attribute__((noinline)) void make(const Head& head, int64_t i, int64_t first, float* products,
                                      float* slopes, int64_t count) const {
    const F32 scale = splat(product_scale_);
    if (call_.softcap > 0.0f) {
      const F32 cap = splat(call_.softcap), per_cap = splat(product_scale_ / call_.softcap);
      for (int64_t n = 0; n < count; n += kLanes) {
        const F32 t = tanh(load(products + n) * per_cap);
        store(products + n, t * cap);
        if (slopes) store(slopes + n, 1.0f - t * t);
      }
    } else {
      for (int64_t n = 0; n < count; n += kLanes) store(products + n, load(products + n) * scale);
    }
    const int64_t real = smaller(count, head.N - first);
    if (call_.bias.data) add_scores(call_.bias, head, i, first, 1.0f, products, real);
    if (call_.relative_bias) {
      const float* const row = call_.relative_bias + head.h * call_.relative_bias_stride_h;
      add_elements(row + first - i + call_.M - 1, 1, 1.0f, products, real);
    }
  }

  float of_query;
  float unit;
  bool are_products;

 private:
  const Attention& call_;
  float product_scale_;
};

// decisions[n] for row i and key first + n, n < count; first is a multiple of kPanel. `buffer` holds
// decision_buffer(count) words. Not inlined: beside the products it would spill their registers.
FASTFORMER_INLINE constexpr int64_t decision_buffer(int64_t count) { return count + kDecisionColumns + 32; }

__attribute__((noinline)) static const uint16_t* row_decisions(const Attention& call, const Head& head,
                                                               int64_t i, int64_t first, int64_t count,
                                                               uint16_t* buffer) {
  const int64_t aligned = first / 32 * 32;
  for (int64_t n = 0; n < first - aligned + count; n += kDecisionColumns) {
    drop_decisions(call.dropout.seed, aligned + n, (uint32_t)i, (uint32_t)(head.b * call.H + head.h), 0,
                   buffer + n);
  }
  return buffer + (first - aligned);
}

// Zeros where `decisions` drop, and what is kept times `factor`.
__attribute__((noinline)) static void drop(const uint16_t* decisions, uint32_t threshold, float factor,
                                           float* row, int64_t count) {
  for (int64_t n = 0; n < count; n += kLanes) {
    store(row + n, select(kept(decisions + n, threshold), load(row + n) * factor, F32{}));
  }
}

// panels[count / kPanel, depth, kPanel]: rows transposed, with zeros where `real` (may be null) holds 0.
template <typename T>
static void pack_panels(const T* rows, int64_t stride, int64_t count, int64_t depth, const uint8_t* real,
                        float* panels) {
  for (int64_t n = 0; n < count; n += kPanel) {
    pack_panel(rows + n * stride, stride, smaller(kPanel, count - n), depth, real ? real + n : nullptr,
               panels + n * depth);
  }
}

// products[kRows, kPanel] = rows[kRows, depth] panel[depth, kPanel]
template <int kRows>
FASTFORMER_INLINE void multiply_panel(int64_t depth, const float* rows, int64_t stride, const float* panel,
                                      float* products, int64_t ldp) {
  const int64_t span = depth > kMaxDepth ? (depth + 1) / 2 : depth;
  for (int64_t d = 0; d < depth; d += span) {
    Tile<kRows, 2> tile;
    tile.zero();
    tile.multiply_add(smaller(span, depth - d), rows + d, stride, panel + d * kPanel, kPanel);
    if (d > 0) tile.add(products, ldp);
    tile.store_to(products, ldp);
  }
}

// The sums over lanes of kLanes registers, one in each lane, in the order of a transposition.
FASTFORMER_INLINE F32 reduce_add_each(F32 (&sums)[kLanes]) {
  transpose(sums);
#pragma GCC unroll 4
  for (int half = kLanes / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
    for (int l = 0; l < half; ++l) sums[l] += sums[l + half];
  }
  return sums[0];
}

// products[kPanel] = row . rows[n + k] where they lie: 0 for those from count on, and where `real` (may be
// null) holds 0.
template <typename T>
static void multiply_rows(const float* row, const T* rows, int64_t stride, int64_t n, int64_t count,
                          const uint8_t* real, int64_t depth, float* products) {
  for (int64_t first = n; first < n + kPanel; first += kLanes) {
    F32 sums[kLanes];
#pragma GCC unroll 16
    for (int l = 0; l < kLanes; ++l) {
      const int64_t k = first + l;
      sums[l] = F32{};
      if (k >= count || (real && !real[k])) continue;
      const T* const other = rows + k * stride;
      int64_t d = 0;
      for (; d + kLanes <= depth; d += kLanes) sums[l] = fma(load(row + d), load(other + d), sums[l]);
      if (d < depth) sums[l] = fma(load(row + d), load_n(other + d, (int)(depth - d)), sums[l]);
    }
    store(products + (first - n), reduce_add_each(sums));
  }
}

// Rows of float32 operands stand this far apart: off a power of two, or a tile's rows would share a cache
// set.
FASTFORMER_INLINE int64_t operand_stride(int64_t width) { return round_up<int64_t>(width, kLanes) + 16; }

}  // namespace
}  // namespace fastformer::cpu::FASTFORMER_ISA
