// Which keys the queries of one head may see: the window, the lengths, the padding and the mask in one
// description, which forward and backward share.
//
// Three kinds, from the cheapest: ranges of keys that no query of a tile sees (skipped), keys that no
// query of the head sees (`real_keys`: never read, whatever they hold), and what is left, which
// `hide_scores` sets to -inf.
#pragma once

#include "vec.h"

namespace fastformer::cpu::FASTFORMER_ISA {
namespace {

constexpr float kMinusInfinity = -__builtin_inff();

// Lanes whose byte is not 0.
FASTFORMER_INLINE I32 load_mask(const uint8_t* bytes) {
  typedef uint8_t Bytes __attribute__((vector_size(kLanes)));
  Bytes b;
  __builtin_memcpy(&b, bytes, sizeof b);
  return __builtin_convertvector(b, I32) != 0;
}

// Of keys or rows; empty where begin >= end.
struct Range {
  int64_t begin, end;
};

class Visibility {
 public:
  Visibility(const KeyMasks& masks, int64_t b, int64_t h, int64_t M, int64_t N)
      : masks_(masks), keys_{0, N}, offset_(masks.lower_right ? N - M : 0) {
    if (masks.mask) mask_ = masks.mask + b * masks.mask_stride_b + h * masks.mask_stride_h;
    if (masks.key_padding) padding_ = masks.key_padding + b * masks.key_padding_stride_b;
    if (masks.key_lengths) keys_.end = larger(0, smaller(N, masks.key_lengths[b]));
    mask_is_per_key_ = masks.mask && masks.mask_stride_m == 0;
    if (padding_ || mask_is_per_key_) {
      while (keys_.end > keys_.begin && !is_real(keys_.end - 1)) --keys_.end;
      while (keys_.begin < keys_.end && !is_real(keys_.begin)) ++keys_.begin;
    }
  }

  // The keys that row `i` may see lie in here.
  Range keys_of_row(int64_t i) const {
    const int64_t centre = i + offset_;
    return {larger(keys_.begin, centre - masks_.left), smaller(keys_.end, centre + masks_.right + 1)};
  }

  // Both ends grow with the row, so the first and the last row bound a tile.
  Range keys_of_rows(int64_t first, int64_t count) const {
    return {keys_of_row(first).begin, keys_of_row(first + count - 1).end};
  }

  // The rows that may see one of keys [first, first + count) lie in here.
  Range rows_of_keys(int64_t first, int64_t count, int64_t M) const {
    return {larger(0, first - masks_.right - offset_), smaller(M, first + count + masks_.left - offset_)};
  }

  // real[n] = whether any query may see key first + n, windows apart. Returns how many are; where all are,
  // real may be left as it was.
  int64_t real_keys(int64_t first, int64_t count, uint8_t* real) const {
    const bool is_per_key = padding_ || mask_is_per_key_;
    if (!is_per_key && first >= keys_.begin && first + count <= keys_.end) return count;
    int64_t sum = 0;
    for (int64_t n = 0; n < count; ++n) {
      const int64_t j = first + n;
      real[n] = j >= keys_.begin && j < keys_.end && is_real(j);
      sum += real[n];
    }
    return sum;
  }

  bool has_mask_per_row() const { return mask_ && !mask_is_per_key_; }

  // Sets scores[n] of row `i` and key first + n to -inf where that key is hidden. `count` is a multiple of
  // kLanes and may reach past N; `real` (null: all real) is what real_keys gave for these keys.
  void hide_scores(float* scores, int64_t i, int64_t first, int64_t count, const uint8_t* real) const {
    const Range seen = keys_of_row(i);
    hide_outside(scores, seen.begin - first, seen.end - first, count);
    const int64_t begin = larger(0, seen.begin - first), end = smaller(count, seen.end - first);
    if (begin >= end) return;
    if (real) keep_where(scores + begin, real + begin, end - begin);
    if (has_mask_per_row()) apply_mask(scores + begin, i, first + begin, end - begin);
  }

 private:
  bool is_real(int64_t j) const {
    return (!padding_ || padding_[j * masks_.key_padding_stride_n]) &&
           (!mask_is_per_key_ || mask_[j * masks_.mask_stride_n]);
  }

  static void hide_outside(float* scores, int64_t begin, int64_t end, int64_t count) {
    const F32 hidden = splat(kMinusInfinity);
    for (int64_t n = 0; n < smaller(begin, count); n += kLanes) {
      const I32 is_hidden = lane_index() < (int32_t)smaller(begin - n, kLanes);
      store(scores + n, select(is_hidden, hidden, load(scores + n)));
    }
    for (int64_t n = larger(0, end) / kLanes * kLanes; n < count; n += kLanes) {
      const I32 is_hidden = lane_index() >= (int32_t)larger(end - n, 0);
      store(scores + n, select(is_hidden, hidden, load(scores + n)));
    }
  }

  static void keep_where(float* scores, const uint8_t* keep, int64_t count) {
    int64_t n = 0;
    for (; n + kLanes <= count; n += kLanes) {
      store(scores + n, select(load_mask(keep + n), load(scores + n), splat(kMinusInfinity)));
    }
    for (; n < count; ++n) {
      if (!keep[n]) scores[n] = kMinusInfinity;
    }
  }

  void apply_mask(float* scores, int64_t i, int64_t first, int64_t count) const {
    const int64_t stride = masks_.mask_stride_n;
    const uint8_t* mask = mask_ + i * masks_.mask_stride_m + first * stride;
    if (stride == 1) {
      keep_where(scores, mask, count);
    } else if (stride != 0 || !mask[0]) {
      for (int64_t n = 0; n < count; ++n) {
        if (!mask[n * stride]) scores[n] = kMinusInfinity;
      }
    }
  }

  const KeyMasks& masks_;
  Range keys_;  // every key outside is hidden from all queries
  int64_t offset_;
  const uint8_t* mask_ = nullptr;
  const uint8_t* padding_ = nullptr;
  bool mask_is_per_key_ = false;
};

}  // namespace
}  // namespace fastformer::cpu::FASTFORMER_ISA
