// Register-tiled matrix products, and the packing that feeds them: the inner loops of attention and
// feed-forward.
//
// A tile holds kRows x kVectors accumulators. A is read one broadcast lane at a time, row-major; B one
// row of kVectors registers at a time. Twelve rows of two AVX-512 registers, or six of two narrower
// ones, leave registers for B and the broadcast and keep both FMA ports busy.
//
// A lane of A and of B holds one float, or two neighbours in depth where the machine multiplies bfloat16 by
// pairs (vdpbf16ps); accumulators are float either way. Depths and strides count elements: an odd depth ends
// in a pair whose second element is zero.
#pragma once

#include "vec.h"

namespace fastformer::cpu::FASTFORMER_ISA {

constexpr int kTileRows = kLanes == 16 ? 12 : 6;
// Rows left over are served by tiles of one or two steps, so A and C are padded to whole steps.
constexpr int kRowStep = kTileRows / 3;
// Columns of a packed panel: one tile's width.
constexpr int kPanel = 2 * kLanes;

template <typename T>
FASTFORMER_INLINE T round_up(T x, T multiple) {
  return (x + multiple - 1) / multiple * multiple;
}

// What the elements of a matrix of T are multiplied as.
template <typename T>
struct OperandType {
  using Type = float;
};

template <typename Operand>
static constexpr int kPerLane = sizeof(float) / sizeof(Operand);

// Registers of operands pass as F32, whatever their lanes hold. n counts elements.

template <typename T>
FASTFORMER_INLINE F32 load_operands(float, const T* p) {
  return load(p);
}

template <typename T>
FASTFORMER_INLINE F32 load_operands_n(float, const T* p, int n) {
  return load_n(p, n);
}

FASTFORMER_INLINE F32 splat_operand(const float* p) { return splat(*p); }
FASTFORMER_INLINE F32 fma_operands(float, F32 a, F32 b, F32 c) { return fma(a, b, c); }

#if defined(__AVX512BF16__)
template <>
struct OperandType<BFloat16> {
  using Type = BFloat16;
};

FASTFORMER_INLINE F32 load_operands(BFloat16, const BFloat16* p) { return (F32)_mm512_loadu_si512(p); }

FASTFORMER_INLINE F32 load_operands_n(BFloat16, const BFloat16* p, int n) {
  tell_reads(p, n);
  return (F32)_mm512_maskz_loadu_epi16((__mmask32)((uint64_t{1} << n) - 1), p);
}

FASTFORMER_INLINE F32 splat_operand(const BFloat16* p) {
  uint32_t pair;
  __builtin_memcpy(&pair, p, sizeof pair);
  return (F32)splat(pair);
}

FASTFORMER_INLINE F32 fma_operands(BFloat16, F32 a, F32 b, F32 c) {
  return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b);
}
#endif

template <typename T>
using OperandOf = typename OperandType<T>::Type;

template <int kRows, int kVectors>
struct Tile {
  F32 acc[kRows][kVectors];

  __attribute__((always_inline)) void zero() {
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) acc[i][v] = F32{};
    }
  }

  template <typename T>
  __attribute__((always_inline)) void store_to(T* c, int64_t ldc) const {
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) store(c + i * ldc + v * kLanes, acc[i][v]);
    }
  }

  __attribute__((always_inline)) void add(const float* c, int64_t ldc) {
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) acc[i][v] += load(c + i * ldc + v * kLanes);
    }
  }

  // acc += row i of c times factors[i].
  __attribute__((always_inline)) void add_scaled(const float* c, int64_t ldc, const float* factors) {
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const F32 factor = splat(factors[i]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) acc[i][v] = fma(load(c + i * ldc + v * kLanes), factor, acc[i][v]);
    }
  }

  // acc += a[depth, kRows]^T b[depth, kVectors * kLanes], in order of depth.
  __attribute__((always_inline)) void multiply_add_transposed(int64_t depth, const float* a, int64_t lda,
                                                              const float* b, int64_t ldb) {
    for (int64_t k = 0; k < depth; ++k) {
      F32 row_b[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) row_b[v] = load(b + v * kLanes);
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) {
        const F32 a_ki = splat(a[i]);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) acc[i][v] = fma(a_ki, row_b[v], acc[i][v]);
      }
      a += lda;
      b += ldb;
    }
  }

  // acc += a[kRows, depth] b[depth, kVectors * kLanes], in order of depth.
  template <typename Operand>
  __attribute__((always_inline)) void multiply_add(int64_t depth, const Operand* a, int64_t lda,
                                                   const Operand* b, int64_t ldb) {
    // One pointer for three rows: a row's address is then base, base + lda or base + 2 lda.
    constexpr int kGroups = (kRows + 2) / 3;
    const Operand* group[kGroups];
#pragma GCC unroll 4
    for (int g = 0; g < kGroups; ++g) group[g] = a + 3 * g * lda;
    for (int64_t k = 0; k < depth; k += kPerLane<Operand>) {
      F32 row_b[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        row_b[v] = load_operands(Operand{}, b + v * kLanes * kPerLane<Operand>);
      }
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) {
        const F32 a_ik = splat_operand(group[i / 3] + i % 3 * lda);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) acc[i][v] = fma_operands(Operand{}, a_ik, row_b[v], acc[i][v]);
      }
#pragma GCC unroll 4
      for (int g = 0; g < kGroups; ++g) group[g] += kPerLane<Operand>;
      b += kPerLane<Operand> * ldb;
    }
  }
};

// The number of rows of a tile, as a type.
template <int kRows>
struct RowCount {
  static constexpr int kCount = kRows;
};

// fn(RowCount, first row) for the tiles that cover padded_rows, a multiple of kRowStep.
template <typename Fn>
FASTFORMER_INLINE void over_row_tiles(int64_t padded_rows, Fn fn) {
  int64_t row = 0;
  for (; row + kTileRows <= padded_rows; row += kTileRows) fn(RowCount<kTileRows>{}, row);
  if (padded_rows - row == 2 * kRowStep) fn(RowCount<2 * kRowStep>{}, row);
  if (padded_rows - row == kRowStep) fn(RowCount<kRowStep>{}, row);
}

// [kLanes, kLanes] transposed in registers, one power of two at a time: of each pair of rows `kHalf`
// apart, the upper-right block of the first changes places with the lower-left block of the second.
template <int... kLane>
struct LaneList {};

#if defined(__AVX512F__)
using AllLanes = LaneList<0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15>;
#elif defined(__AVX2__)
using AllLanes = LaneList<0, 1, 2, 3, 4, 5, 6, 7>;
#else
using AllLanes = LaneList<0, 1, 2, 3>;
#endif

template <int kHalf, int... kLane>
FASTFORMER_INLINE void exchange_blocks(F32& first, F32& second, LaneList<kLane...>) {
  const F32 low = __builtin_shufflevector(first, second, (kLane & kHalf ? kLanes + kLane - kHalf : kLane)...);
  second = __builtin_shufflevector(first, second, (kLane & kHalf ? kLanes + kLane : kLane + kHalf)...);
  first = low;
}

template <int kHalf>
FASTFORMER_INLINE void transpose_steps(F32 (&rows)[kLanes]) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (!(i & kHalf)) exchange_blocks<kHalf>(rows[i], rows[i + kHalf], AllLanes{});
  }
  if constexpr (kHalf > 1) transpose_steps<kHalf / 2>(rows);
}

FASTFORMER_INLINE void transpose(F32 (&rows)[kLanes]) { transpose_steps<kLanes / 2>(rows); }

// panel[depth, kPanel] = the transpose of rows[n_rows, depth], n_rows <= kPanel, with zeros for rows that
// are missing or for which `real` (may be null) holds 0: those are never read. Pairs stay together:
// [depth / 2, kPanel, 2], an odd depth rounded up.
template <typename T, typename Operand>
static void pack_panel(const T* rows, int64_t stride, int64_t n_rows, int64_t depth, const uint8_t* real,
                       Operand* panel) {
  constexpr int kElements = kLanes * kPerLane<Operand>;
  for (int64_t first = 0; first < kPanel; first += kLanes) {
    for (int64_t k = 0; k < depth; k += kElements) {
      const int width = depth - k < kElements ? (int)(depth - k) : kElements;
      F32 block[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        const int64_t row = first + i;
        const T* source = rows + row * stride + k;
        if (row >= n_rows || (real && !real[row])) {
          block[i] = F32{};
        } else {
          block[i] = width == kElements ? load_operands(Operand{}, source)
                                        : load_operands_n(Operand{}, source, width);
        }
      }
      transpose(block);
      const int lanes = (width + kPerLane<Operand> - 1) / kPerLane<Operand>;
      float* target = (float*)(panel + k * kPanel) + first;
      if (lanes == kLanes) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) store(target + i * kPanel, block[i]);
      } else {
        for (int i = 0; i < lanes; ++i) store(target + i * kPanel, block[i]);
      }
    }
  }
}

// packed[n_rows, ldp] = factor * rows[n_rows, width], as Operand, with zeros from width to ldp (a multiple of
// kLanes) and in rows for which `real` (may be null) holds 0: those are never read.
template <typename T, typename Operand>
static void pack_rows(const T* rows, int64_t stride, int64_t n_rows, int64_t width, const uint8_t* real,
                      float factor, Operand* packed, int64_t ldp) {
  const F32 factors = splat(factor);
  for (int64_t row = 0; row < n_rows; ++row) {
    const T* source = rows + row * stride;
    Operand* target = packed + row * ldp;
    const bool skip = real && !real[row];
    for (int64_t k = 0; k < ldp; k += kLanes) {
      F32 x{};
      if (!skip && k + kLanes <= width) {
        x = load(source + k) * factors;
      } else if (!skip && k < width) {
        x = load_n(source + k, (int)(width - k)) * factors;
      }
      store(target + k, x);
    }
  }
}

}  // namespace fastformer::cpu::FASTFORMER_ISA
