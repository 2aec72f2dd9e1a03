// Register-tiled matrix products, and the packing that feeds them: the inner loops of attention and
// feed-forward.
//
// A tile holds kRows x kVectors accumulators. A is read one broadcast float at a time, row-major; B one
// row of kVectors registers at a time. Twelve rows of two AVX-512 registers, or six of two narrower
// ones, leave registers for B and the broadcast and keep both FMA ports busy.
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

  __attribute__((always_inline)) void store_to(float* c, int64_t ldc) const {
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

  // acc += a[kRows, depth] b[depth, kVectors * kLanes], in order of depth.
  __attribute__((always_inline)) void multiply_add(int64_t depth, const float* a, int64_t lda, const float* b,
                                                   int64_t ldb) {
    // One pointer for three rows: a row's address is then base, base + lda or base + 2 lda.
    constexpr int kGroups = (kRows + 2) / 3;
    const float* group[kGroups];
#pragma GCC unroll 4
    for (int g = 0; g < kGroups; ++g) group[g] = a + 3 * g * lda;
    for (int64_t k = 0; k < depth; ++k) {
      F32 row_b[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) row_b[v] = load(b + v * kLanes);
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) {
        const F32 a_ik = splat(group[i / 3][i % 3 * lda]);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) acc[i][v] = fma(a_ik, row_b[v], acc[i][v]);
      }
#pragma GCC unroll 4
      for (int g = 0; g < kGroups; ++g) ++group[g];
      b += ldb;
    }
  }
};

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
// are missing or for which `real` (may be null) holds 0: those are never read.
template <typename T>
static void pack_panel(const T* rows, int64_t stride, int64_t n_rows, int64_t depth, const uint8_t* real,
                       float* panel) {
  for (int64_t first = 0; first < kPanel; first += kLanes) {
    for (int64_t k = 0; k < depth; k += kLanes) {
      const int width = depth - k < kLanes ? (int)(depth - k) : kLanes;
      F32 block[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        const int64_t row = first + i;
        const T* source = rows + row * stride + k;
        if (row >= n_rows || (real && !real[row])) {
          block[i] = F32{};
        } else {
          block[i] = width == kLanes ? load(source) : load_n(source, width);
        }
      }
      transpose(block);
      float* target = panel + k * kPanel + first;
      if (width == kLanes) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) store(target + i * kPanel, block[i]);
      } else {
        for (int i = 0; i < width; ++i) store(target + i * kPanel, block[i]);
      }
    }
  }
}

// packed[n_rows, ldp] = factor * rows[n_rows, width], widened, with zeros from width to ldp (a multiple of
// kLanes) and in rows for which `real` (may be null) holds 0: those are never read.
template <typename T>
static void pack_rows(const T* rows, int64_t stride, int64_t n_rows, int64_t width, const uint8_t* real,
                      float factor, float* packed, int64_t ldp) {
  const F32 factors = splat(factor);
  for (int64_t row = 0; row < n_rows; ++row) {
    const T* source = rows + row * stride;
    float* target = packed + row * ldp;
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
