// Matrix products whose left operand lies in memory whole and whose right operand is packed as it is needed.
//
// For a group of columns the right operand is packed into L2, one block of depth after the other, and
// register tiles run down the left operand's rows over it. The order of every sum depends on the depth alone,
// so that threads may share a product by columns as they like.
#pragma once

#include "gemm_micro.h"
#include "worker.h"

namespace fastformer::cpu::FASTFORMER_ISA {

// The depth that is packed at a time. Longer sums of pairs save up to a twentieth, and what they lose is
// little beside the rounding of bfloat16.
template <typename Operand>
constexpr int64_t kMostDepth = kPerLane<Operand> == 1 ? kDepthBlock : 4 * kDepthBlock;

// Packed panels of kMostDepth x kGroupColumns: at most 256 KB, for L2.
constexpr int64_t kPanelFloats = 2 * kDepthBlock * kGroupColumns;

// fn(first column, columns) for one part of the queue after the other.
template <typename Fn>
FASTFORMER_INLINE void over_columns(ColumnQueue& queue, Fn fn) {
  for (int64_t item = take(queue.items); item < queue.items.count; item = take(queue.items)) {
    const int64_t first = item * queue.width;
    fn(first, smaller(queue.width, queue.columns - first));
  }
}

template <typename T>
FASTFORMER_INLINE F32 load_up_to(const T* p, int n) {
  return n == kLanes ? load(p) : load_n(p, n);
}

template <typename T>
FASTFORMER_INLINE void store_up_to(T* p, F32 x, int n) {
  n == kLanes ? store(p, x) : store_n(p, x, n);
}

// Lane l holds the kPerLane elements of column l that lie below p, of which n columns and `rows` rows are
// there, with zeros for the others.
template <typename T>
FASTFORMER_INLINE F32 load_columns(float, const T* p, int64_t, int64_t, int n) {
  return load_up_to(p, n);
}

#if defined(__AVX512BF16__)
FASTFORMER_INLINE F32 load_columns(BFloat16, const BFloat16* p, int64_t stride, int64_t rows, int n) {
  const __mmask16 columns = (__mmask16)((1u << n) - 1);
  const __m256i first = _mm256_maskz_loadu_epi16(columns, p);
  const __m256i second = rows > 1 ? _mm256_maskz_loadu_epi16(columns, p + stride) : _mm256_setzero_si256();
  return (F32)_mm512_or_si512(_mm512_cvtepu16_epi32(first),
                              _mm512_slli_epi32(_mm512_cvtepu16_epi32(second), 16));
}
#endif

// panel[depth, kPanel] = rows[depth, columns], columns <= kPanel, as pack_panel() leaves its transpose.
template <typename T, typename Operand>
static void pack_columns(const T* rows, int64_t stride, int64_t columns, int64_t depth, Operand* panel) {
  const int first = (int)smaller(columns, kLanes), second = (int)columns - first;
  for (int64_t k = 0; k < depth; k += kPerLane<Operand>) {
    const T* const source = rows + k * stride;
    float* const target = (float*)(panel + k * kPanel);
    store(target, load_columns(Operand{}, source, stride, depth - k, first));
    store(target + kLanes,
          second ? load_columns(Operand{}, source + kLanes, stride, depth - k, second) : F32{});
  }
}

// packed[columns, depth] = the transpose of rows[depth, columns], as Operand, with zeros up to whole
// registers.
template <typename T, typename Operand>
static void pack_transposed(const T* rows, int64_t stride, int64_t columns, int64_t depth, Operand* packed,
                            int64_t ldp) {
  constexpr int64_t kElements = kLanes * kPerLane<Operand>;
  for (int64_t k = 0; k < depth; k += kElements) {
    for (int64_t j = 0; j < columns; j += kLanes) {
      const int n = (int)smaller(kLanes, columns - j);
      F32 block[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        const int64_t row = k + i * kPerLane<Operand>;
        const T* const source = rows + row * stride + j;
        block[i] = row < depth ? load_columns(Operand{}, source, stride, depth - row, n) : F32{};
      }
      transpose(block);
      float* const target = (float*)(packed + j * ldp + k);
      const int64_t floats = ldp / kPerLane<Operand>;
      if (n == kLanes) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) store(target + i * floats, block[i]);
      } else {
        for (int i = 0; i < n; ++i) store(target + i * floats, block[i]);
      }
    }
  }
}

// Where a product goes. Until its last part, sums of parts stand in `sums`, which may be `out` itself.
template <typename Out>
struct Product {
  Out* out;
  int64_t out_stride;
  float* sums;
  int64_t sums_stride;
  bool first = true, last = true;  // whether this is the first part of the whole sum, and the last
};

// A product that is its own sum.
FASTFORMER_INLINE Product<float> product_into(float* out, int64_t stride) {
  return {out, stride, out, stride};
}

// c[kRows, kPanel] = before + a[kRows, depth] panel, of which at most rows x columns are there.
template <int kRows, typename Operand, typename Out>
static void packed_tile(const Operand* a, int64_t lda, int64_t depth, const Operand* panel,
                        const float* before, int64_t before_stride, Out* c, int64_t ldc, int64_t rows,
                        int64_t columns) {
  Tile<kRows, 2> tile;
  tile.zero();
  tile.multiply_add(depth, a, lda, panel, kPanel);
  if (rows >= kRows && columns >= kPanel) {
    // Sums of sums: about as accurate as the short sums alone.
    if (before) tile.add(before, before_stride);
    tile.store_to(c, ldc);
    return;
  }
  float part[kRows * kPanel];
  tile.store_to(part, kPanel);
  for (int64_t i = 0; i < smaller(rows, kRows); ++i) {
    for (int64_t j = 0; j < smaller(columns, kPanel); j += kLanes) {
      const int n = (int)smaller(kLanes, columns - j);
      F32 x = load(part + i * kPanel + j);
      if (before) x += load_up_to(before + i * before_stride + j, n);
      store_up_to(c + i * ldc + j, x, n);
    }
  }
}

// One block of depth: tiles of c[rows, columns] = before + a[rows, depth] panels. a's rows are there up to
// whole steps.
template <typename Operand, typename Out>
static void packed_tiles(const Operand* a, int64_t lda, int64_t depth, const Operand* panels,
                         int64_t panel_depth, const float* before, int64_t before_stride, Out* c, int64_t ldc,
                         int64_t rows, int64_t columns) {
  for (int64_t row = 0; row < rows; row += kTileRows) {
    const int64_t left = rows - row;
    const auto tile = left > 2 * kRowStep ? &packed_tile<kTileRows, Operand, Out>
                      : left > kRowStep   ? &packed_tile<2 * kRowStep, Operand, Out>
                                          : &packed_tile<kRowStep, Operand, Out>;
    for (int64_t j = 0; j < columns; j += kPanel) {
      const float* const sums = before ? before + row * before_stride + j : nullptr;
      tile(a + row * lda, lda, depth, panels + j * panel_depth, sums, before_stride, c + row * ldc + j, ldc,
           left, columns - j);
    }
  }
}

// c[rows, columns] = a[rows, depth] b[depth, columns], columns <= kGroupColumns. pack(k, count, j, panel)
// packs b[k : k + count, j : j + kPanel]. panels: scratch, kPanelFloats.
template <typename Operand, typename Out, typename Pack>
static void packed_product(const Operand* a, int64_t lda, int64_t rows, int64_t columns, int64_t depth,
                           const Product<Out>& c, Operand* panels, Pack pack) {
  constexpr int64_t kMost = kMostDepth<Operand>;
  const int64_t blocks = (depth + kMost - 1) / kMost;
  const int64_t block_depth = round_up<int64_t>((depth + blocks - 1) / blocks, kLanes * kPerLane<Operand>);
  for (int64_t k = 0; k < depth; k += block_depth) {
    const int64_t count = smaller(block_depth, depth - k);
    const int64_t panel_depth = round_up<int64_t>(count, kPerLane<Operand>);
    for (int64_t j = 0; j < columns; j += kPanel) pack(k, count, j, panels + j * panel_depth);
    const float* const before = c.first && k == 0 ? nullptr : c.sums;
    if (c.last && k + count == depth) {
      packed_tiles(a + k, lda, count, panels, panel_depth, before, c.sums_stride, c.out, c.out_stride, rows,
                   columns);
    } else {
      packed_tiles(a + k, lda, count, panels, panel_depth, before, c.sums_stride, c.sums, c.sums_stride, rows,
                   columns);
    }
  }
}

}  // namespace fastformer::cpu::FASTFORMER_ISA
