// Weights and gradients of scores computed anew, tile by tile, from what forward left behind. Every pass
// after forward runs over these tiles: backward, the returned weights, and the sums of a broadcast bias.
//
//   weights_ij = exp(s_ij - row_max_i) / row_sum_i
//   ds_ij = weights_ij (keep_ij (grad_out_i . v_j + grad_weights_ij) / (1 - p) - delta_i + grad_lse_i)
//
// A row whose visible keys all lie in one block is normalised within it, and has its delta from it: then a
// row that sees one key has the weight 1 and no gradient but grad_lse's, exactly.
#pragma once

#include "attention_scores.h"

namespace fastformer::cpu::FASTFORMER_ISA {
namespace {

// Keys of a block: what one call of the generator decides on the widest level, and as deep as sums may be.
constexpr int64_t kBlockKeys = 128;
constexpr int64_t kTileStride = kBlockKeys + 16;
// Queries whose tiles are kept until their products with the queries are formed.
constexpr int64_t kBlockRows = 96;
static_assert(kBlockKeys % kPanel == 0 && kBlockKeys % kDecisionColumns == 0 && kBlockRows % kTileRows == 0);

// weights[count] from scores in place, with what forward found over all keys.
__attribute__((noinline)) static void weights_from_stats(float* scores, int64_t count, float unit,
                                                         float row_max, float row_sum) {
  const F32 units = splat(unit), minus_max = splat(-row_max), per_sum = splat(1.0f / row_sum);
  for (int64_t n = 0; n < count; n += kLanes) {
    const F32 below = fma(load(scores + n), units, minus_max);
    store(scores + n, exp2(below * kLog2E) * per_sum);
  }
}

// The same from scores that are all the row sees.
__attribute__((noinline)) static void weights_from_row(float* scores, int64_t count, float unit, float sink) {
  F32 largest = splat(kMinusInfinity);
  for (int64_t n = 0; n < count; n += kLanes) largest = vmax(load(scores + n), largest);
  const float row_max = reduce_max(largest);
  const float pivot = sink > row_max ? sink : row_max;
  const F32 factors = splat(unit * kLog2E), pivots = splat(pivot);
  F32 sums{};
  for (int64_t n = 0; n < count; n += kLanes) {
    const F32 weight = exp2((load(scores + n) - pivots) * factors);
    sums += weight;
    store(scores + n, weight);
  }
  const float sum = reduce_add(sums) + exp2(splat((sink - pivot) * unit * kLog2E))[0];
  const F32 per_sum = splat(1.0f / sum);
  for (int64_t n = 0; n < count; n += kLanes) store(scores + n, load(scores + n) * per_sum);
}

FASTFORMER_INLINE float dot_rows(const float* a, const float* b, int64_t count) {
  F32 sums{};
  for (int64_t n = 0; n < count; n += kLanes) sums = fma(load(a + n), load(b + n), sums);
  return reduce_add(sums);
}

// grads[count] = weights (grads - delta + grad_lse), in this order: the difference may be exactly 0. A hidden
// key has weight 0, and no gradient whatever grads holds there.
__attribute__((noinline)) static void score_gradients(const float* weights, float* grads, float delta,
                                                      float grad_lse, int64_t count) {
  const F32 deltas = splat(delta), grads_lse = splat(grad_lse);
  for (int64_t n = 0; n < count; n += kLanes) {
    const F32 weight = load(weights + n);
    store(grads + n, select(weight == 0.0f, F32{}, weight * (load(grads + n) - deltas + grads_lse)));
  }
}

FASTFORMER_INLINE void add_to(float* target, const float* source, int64_t count) {
  for (int64_t n = 0; n < count; n += kLanes) store(target + n, load(target + n) + load(source + n));
}

FASTFORMER_INLINE void multiply_by(float* target, const float* source, int64_t count) {
  for (int64_t n = 0; n < count; n += kLanes) store(target + n, load(target + n) * load(source + n));
}

// target[rows, width] = factor * source[rows, ld], in T
template <typename T>
static void write_gradient(const float* source, int64_t ld, int64_t rows, int64_t width, float factor,
                           T* target, int64_t stride) {
  const F32 factors = splat(factor);
  for (int64_t row = 0; row < rows; ++row) {
    const float* const from = source + row * ld;
    T* const to = target + row * stride;
    int64_t d = 0;
    for (; d + kLanes <= width; d += kLanes) store(to + d, load(from + d) * factors);
    if (d < width) store_n(to + d, load(from + d) * factors, (int)(width - d));
  }
}

struct TileBuffers {
  TileBuffers(const Attention& call, bool wants_gradients, Parts& parts) {
    const int64_t rows = round_up<int64_t>(call.M, kTileRows);
    ldq = operand_stride(call.D);
    ldo = operand_stride(call.D_v);
    query = parts.take(rows * ldq);
    grad_out = parts.take(wants_gradients ? rows * ldo : 0);
    key = parts.take(kBlockKeys * call.D);
    value = parts.take(wants_gradients ? kBlockKeys * call.D_v : 0);
    weights = parts.take(kBlockRows * kTileStride);
    grads = parts.take(kBlockRows * kTileStride);
    slopes = parts.take(kBlockKeys);
    is_real = (uint8_t*)parts.take(kBlockKeys / 4);
    decisions = (uint16_t*)parts.take(decision_buffer(kBlockKeys) / 2);
  }

  int64_t ldq, ldo;
  float* query;         // [M, ldq], with Logits' sign
  float* grad_out;      // [M, ldo]
  float* key;           // [kBlockKeys / kPanel, D, kPanel]
  float* value;         // [kBlockKeys / kPanel, D_v, kPanel]
  float* weights;       // [kBlockRows, kTileStride], dropped and scaled
  float* grads;         // [kBlockRows, kTileStride]
  float* slopes;        // [kBlockKeys], of softcap
  uint8_t* is_real;     // [kBlockKeys]
  uint16_t* decisions;  // [decision_buffer(kBlockKeys)]
};

// What is done with the gradient of a row's logits before softcap's slope joins it.
struct Nothing {
  void operator()(int64_t /*i*/, int64_t /*n*/, const float* /*grads*/, int64_t /*count*/) const {}
};

// The tiles of one head after another.
template <typename T>
class ScoreTiles {
 public:
  ScoreTiles(const ScorePass& pass, bool wants_gradients, const TileBuffers& buffers)
      : pass_(pass),
        call_(pass.attention),
        logits_(pass.attention),
        buffers_(buffers),
        wants_gradients_(wants_gradients) {}

  // Takes a head: packs its queries and grad_out.
  void start(const Head& head) {
    head_ = &head;
    h_kv_ = head.h / (call_.H / call_.H_kv);
    const int64_t padding = round_up<int64_t>(head.M, kRowStep) - head.M;
    pack_rows(head.template query_row<T>(call_.query, 0), call_.query.stride_row, head.M, call_.D, nullptr,
              logits_.of_query, buffers_.query, buffers_.ldq);
    __builtin_memset(buffers_.query + head.M * buffers_.ldq, 0, padding * buffers_.ldq * sizeof(float));
    if (!wants_gradients_) return;
    int64_t given = 0;
    if (pass_.grad_out.data) {
      given = head.M;
      pack_rows(head.template query_row<T>(pass_.grad_out, 0), pass_.grad_out.stride_row, given, call_.D_v,
                nullptr, 1.0f, buffers_.grad_out, buffers_.ldo);
    }
    const int64_t missing = head.M + padding - given;
    __builtin_memset(buffers_.grad_out + given * buffers_.ldo, 0, missing * buffers_.ldo * sizeof(float));
  }

  // Takes the head's keys [first, first + count) and packs them. False where no query sees any of them.
  bool take_keys(int64_t first, int64_t count) {
    first_ = first;
    count_ = count;
    const int64_t real = head_->visibility.real_keys(first, count, buffers_.is_real);
    if (real == 0) return false;
    is_real_ = real == count ? nullptr : buffers_.is_real;
    rows_ = head_->visibility.rows_of_keys(first, count, head_->M);
    rows_.begin = rows_.begin / kTileRows * kTileRows;
    if (rows_.begin >= rows_.end) return false;
    if (head_->has_few_queries()) return true;
    pack_panels(key_row<T>(call_.key, *head_, h_kv_, first), call_.key.stride_row, count, call_.D, is_real_,
                buffers_.key);
    if (wants_gradients_) {
      pack_panels(key_row<T>(call_.value, *head_, h_kv_, first), call_.value.stride_row, count, call_.D_v,
                  is_real_, buffers_.value);
    }
    return true;
  }

  // Queries outside see none of the keys taken; it begins where a tile begins.
  Range rows() const { return rows_; }
  const uint8_t* is_real() const { return is_real_; }
  // The factor that turns sums over buffers.query into gradients of the keys.
  float key_scale() const { return __builtin_fabsf(call_.scale); }

  // Fills kRows rows of `weights` and `grads` for queries from i on: every column up to count, rounded up to
  // panels, is written, with zeros where a key is hidden or a row is padding. Returns the columns that may
  // hold something else.
  template <int kRows, typename Fn>
  Range fill(int64_t i, float* weights, float* grads, const Fn& on_gradient) {
    const int64_t rows = smaller(kRows, head_->M - i), columns = round_up<int64_t>(count_, kPanel);
    const Range seen = head_->visibility.keys_of_rows(i, rows);
    const int64_t begin = larger(0, seen.begin - first_) / kPanel * kPanel;
    const int64_t end = round_up(larger(0, smaller(count_, seen.end - first_)), (int64_t)kPanel);
    for (int64_t r = 0; r < kRows; ++r) {
      const bool is_padding = r >= rows || begin >= end;
      const int64_t left = is_padding ? columns : begin;
      clear(weights + r * kTileStride, grads + r * kTileStride, 0, left);
      clear(weights + r * kTileStride, grads + r * kTileStride, larger(left, end), columns);
    }
    if (begin >= end) return {0, 0};
    for (int64_t n = begin; n < end; n += kPanel) {
      // Padding rows come out as zeros, or NaN, and are cleared below.
      multiply<kRows>(buffers_.query + i * buffers_.ldq, buffers_.ldq, call_.key, buffers_.key, call_.D, n,
                      weights + n);
      if (wants_gradients_) {
        multiply<kRows>(buffers_.grad_out + i * buffers_.ldo, buffers_.ldo, call_.value, buffers_.value,
                        call_.D_v, n, grads + n);
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      finish_row(i + r, begin, end - begin, weights + r * kTileStride + begin,
                 grads + r * kTileStride + begin, on_gradient);
    }
    for (int64_t r = rows; r < kRows; ++r) {
      clear(weights + r * kTileStride, grads + r * kTileStride, begin, end);
    }
    return {begin, smaller(end, count_)};
  }

 private:
  // products[kRows, kPanel] of rows with keys or values first_ + n on, from their panels or from where they
  // lie.
  template <int kRows>
  __attribute__((always_inline)) void multiply(const float* rows, int64_t stride, const HeadRows& others,
                                               const float* panels, int64_t depth, int64_t n,
                                               float* products) const {
    if (!head_->has_few_queries()) {
      multiply_panel<kRows>(depth, rows, stride, panels + n * depth, products, kTileStride);
      return;
    }
    const T* const first = key_row<T>(others, *head_, h_kv_, first_);
    for (int64_t r = 0; r < kRows; ++r) {
      multiply_rows(rows + r * stride, first, others.stride_row, n, count_, is_real_, depth,
                    products + r * kTileStride);
    }
  }

  void clear(float* weights, float* grads, int64_t begin, int64_t end) const {
    for (int64_t n = begin; n < end; n += kLanes) {
      store(weights + n, F32{});
      if (wants_gradients_) store(grads + n, F32{});
    }
  }

  // Of row i and keys first_ + n on.
  template <typename Fn>
  void finish_row(int64_t i, int64_t n, int64_t count, float* weights, float* grads, const Fn& on_gradient) {
    const int64_t first = first_ + n;
    const float row_sum = *head_->stats(pass_.row_sum, i);
    if (row_sum == 0.0f) {
      clear(weights, grads, 0, count);
      return;
    }
    const bool has_slopes = wants_gradients_ && call_.softcap > 0.0f;
    if (!logits_.are_products) {
      logits_.make(*head_, i, first, weights, has_slopes ? buffers_.slopes : nullptr, count);
    }
    head_->visibility.hide_scores(weights, i, first, count, is_real_ ? is_real_ + n : nullptr);
    const Range seen = head_->visibility.keys_of_row(i);
    const bool is_whole = seen.begin >= first_ && seen.end <= first_ + count_;
    if (is_whole) {
      weights_from_row(weights, count, logits_.unit, call_.sink ? call_.sink[head_->h] : kMinusInfinity);
    } else {
      weights_from_stats(weights, count, logits_.unit, *head_->stats(pass_.row_max, i), row_sum);
    }
    const Dropout& dropout = call_.dropout;
    const uint16_t* decisions = nullptr;
    if (dropout.threshold) {
      decisions = row_decisions(call_, *head_, i, first, count, buffers_.decisions);
    }
    if (wants_gradients_) {
      if (pass_.grad_weights.data) {
        add_scores(pass_.grad_weights, *head_, i, first, pass_.grad_weights_scale, grads,
                   smaller(count, head_->N - first));
      }
      if (decisions) drop(decisions, dropout.threshold, dropout.scale, grads, count);
      const float delta = is_whole ? dot_rows(weights, grads, count) : *head_->stats(pass_.delta, i);
      score_gradients(weights, grads, delta, pass_.grad_lse.data ? *head_->stats(pass_.grad_lse, i) : 0.0f,
                      count);
      on_gradient(i, n, grads, count);
      if (has_slopes) multiply_by(grads, buffers_.slopes, count);
    }
    if (decisions) drop(decisions, dropout.threshold, dropout.scale, weights, count);
  }

  const ScorePass& pass_;
  const Attention& call_;
  const Logits logits_;
  const TileBuffers& buffers_;
  const bool wants_gradients_;
  const Head* head_ = nullptr;
  int64_t h_kv_ = 0, first_ = 0, count_ = 0;
  Range rows_{};
  const uint8_t* is_real_ = nullptr;
};

}  // namespace
}  // namespace fastformer::cpu::FASTFORMER_ISA
