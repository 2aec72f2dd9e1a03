// Tiles of rows on their way from memory to tensor cores. A tile [rows, kD] of 16-bit elements lies in shared
// memory as panels of 64 columns (32 where 64 do not divide kD), row after row. A row of a panel has units of
// 16 bytes; unit u of row r lies at u ^ (r mod 8), so that eight rows of one column of units, which is what
// ldmatrix reads in one go, lie in eight different groups of banks. (Two rows of 32 columns share a group of
// 128 bytes: there it is u ^ (r / 2 mod 4).)
// A float32 tile [rows, kD] lies there as [rows, 2 kD] of 16 bits. Of eight rows of its units ldmatrix gives
// lane l word l mod 4 of row l / 4, which is how mma.m16n8k8 takes both of its operands; so a step of 16
// columns is two units of either type.
#pragma once

#include "attention_plan.h"
#include "tile.cuh"

namespace fastformer::cuda {

template <int kD>
struct Panel {
  static constexpr int kWidth = kD % 64 == 0 ? 64 : 32;
  static constexpr int kCount = kD / kWidth;
  static constexpr int kPitch = 2 * kWidth;  // bytes
  static constexpr int kUnits = kWidth / 8;
  static constexpr int kSteps = kWidth / 16;  // of 16 columns, as a product takes them
};

// Where unit `unit` of row `row` lies in a panel, in bytes.
template <int kD>
__device__ __forceinline__ uint32_t place_in_panel(int row, int unit) {
  const int swizzled = Panel<kD>::kWidth == 64 ? unit ^ (row & 7) : unit ^ (row >> 1 & 3);
  return row * Panel<kD>::kPitch + swizzled * 16;
}

// The address that this lane gives ldmatrix for the first 16 columns of the first 16 rows of the tile at
// `shared`. All else is a constant on top: 16 rows further, another panel, another tile; see `at_step`.
// Operands a, and b that lies transposed: of rows 0 to 15 the first unit, then the second.
template <int kD>
__device__ __forceinline__ uint32_t units_then_rows(uint32_t shared) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  return shared + place_in_panel<kD>(lane % 16, lane / 16);
}

// Operand b: of rows 0 to 7 both units, then of rows 8 to 15, so that each product finds its two words side
// by side.
template <int kD>
__device__ __forceinline__ uint32_t rows_then_units(uint32_t shared) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  return shared + place_in_panel<kD>(lane / 16 * 8 + lane % 8, lane / 8 % 2);
}

// The same for columns 16 step and on of a panel: two units further, before the swizzle.
__device__ __forceinline__ uint32_t at_step(uint32_t address, int step) {
  return address ^ static_cast<uint32_t>(32 * step);
}

// The columns of a tile [rows, kD] as Panel counts them.
template <DType kType, int kD>
inline constexpr int kPanelColumns = kD * static_cast<int>(size_of(kType)) / 2;

// What a thread needs to copy its units of tiles of one tensor: unit threadIdx.x % kUnits of each panel, of
// every kStep-th row.
template <DType kType, int kD, int kThreads, bool kWhole>
struct RowCopier {
  static constexpr int kColumns = kPanelColumns<kType, kD>;
  using P = Panel<kColumns>;
  using Element = typename ElementOf<kType>::Type;
  static constexpr int kStep = kThreads / P::kUnits;
  static constexpr int kUnit = 16 / sizeof(Element);  // elements
  static constexpr int kWidth = P::kUnits * kUnit;    // of a panel

  const Element* from;  // the thread's unit in its first row of the tile that comes next: every copy moves on
  int64_t stride;
  int width;  // columns that there are

  __device__ __forceinline__ RowCopier(const HeadRows& rows, int64_t b, int64_t h, int64_t row, int columns)
      : stride(rows.stride_row), width(columns - kUnit * unit()) {
    from = row_begin(rows, b, h, row + first_row());
  }

  static __device__ __forceinline__ int unit() { return static_cast<int>(threadIdx.x) % P::kUnits; }
  static __device__ __forceinline__ int first_row() { return static_cast<int>(threadIdx.x) / P::kUnits; }

  // The thread's unit of a row.
  static __device__ __forceinline__ const Element* row_begin(const HeadRows& rows, int64_t b, int64_t h,
                                                             int64_t row) {
    return static_cast<const Element*>(rows.data) + b * rows.stride_b + h * rows.stride_h +
           row * rows.stride_row + kUnit * unit();
  }

  // Starts copies of a tile of kRows rows. `is_real(i)` tells of row first_row() + i kStep; zeros where it is
  // not, and past the tensor's columns.
  template <int kRows, typename IsReal>
  __device__ __forceinline__ void start(uint32_t shared, IsReal is_real) {
    static_assert(kRows % kStep == 0 && kStep % 8 == 0);
    const uint32_t place = shared + place_in_panel<kColumns>(first_row(), unit());
#pragma unroll
    for (int i = 0; i < kRows / kStep; ++i) {
      start_row<kRows>(place + i * kStep * P::kPitch, from, is_real(i), width);
      // One addition after the other: all at once they would take registers.
      from = forgotten(from + kStep * stride);
    }
  }

  // The same for rows that are not aligned, element by element; at once.
  template <int kRows, typename IsReal>
  __device__ __forceinline__ void copy_elements(uint32_t shared, IsReal is_real) {
    const uint32_t place = shared + place_in_panel<kColumns>(first_row(), unit());
#pragma unroll 1
    for (int i = 0; i < kRows / kStep; ++i, from += kStep * stride) {
      copy_row_elements<kRows>(place + i * kStep * P::kPitch, from, is_real(i), width);
    }
  }

  // As `start`, of rows that lie anywhere: `begin(i)` is where row first_row() + i kStep begins for this
  // thread. Of `columns` columns.
  template <int kRows, typename Begin, typename IsReal>
  static __device__ __forceinline__ void start_scattered(uint32_t shared, int columns, Begin begin,
                                                         IsReal is_real) {
    static_assert(kRows % kStep == 0 && kStep % 8 == 0);
    const uint32_t place = shared + place_in_panel<kColumns>(first_row(), unit());
#pragma unroll
    for (int i = 0; i < kRows / kStep; ++i) {
      start_row<kRows>(place + i * kStep * P::kPitch, begin(i), is_real(i), columns - kUnit * unit());
    }
  }

  // As `copy_elements`, of such rows.
  template <int kRows, typename Begin, typename IsReal>
  static __device__ __forceinline__ void copy_scattered_elements(uint32_t shared, int columns, Begin begin,
                                                                 IsReal is_real) {
    const uint32_t place = shared + place_in_panel<kColumns>(first_row(), unit());
#pragma unroll 1
    for (int i = 0; i < kRows / kStep; ++i) {
      copy_row_elements<kRows>(place + i * kStep * P::kPitch, begin(i), is_real(i), columns - kUnit * unit());
    }
  }

 private:
  // One row of a tile of kRows; `place` is where its unit in the first panel lies.
  template <int kRows>
  static __device__ __forceinline__ void start_row(uint32_t place, const Element* row, bool real, int width) {
#pragma unroll
    for (int panel = 0; panel < P::kCount; ++panel) {
      copy_async(place + panel * kRows * P::kPitch, row + panel * kWidth,
                 real && (kWhole || panel * kWidth < width));
    }
  }

  template <int kRows>
  static __device__ __forceinline__ void copy_row_elements(uint32_t place, const Element* row, bool real,
                                                           int width) {
#pragma unroll 1
    for (int panel = 0; panel < P::kCount; ++panel) {
      uint32_t words[4] = {};
#pragma unroll
      for (int e = 0; e < kUnit; ++e) {
        const int column = panel * kWidth + e;
        const uint32_t element = real && column < width ? row[column] : 0;
        words[e * 4 / kUnit] |= element << e * 128 / kUnit % 32;
      }
      store_shared(place + panel * kRows * P::kPitch, make_uint4(words[0], words[1], words[2], words[3]));
    }
  }
};

// Of 16-bit types.
template <DType kType>
__device__ __forceinline__ void multiply(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  static_assert(kType != DType::kFloat32);
  if constexpr (kType == DType::kBFloat16) {
    multiply_bfloat16(sum, a, b0, b1);
  } else {
    multiply_float16(sum, a, b0, b1);
  }
}

// scores = q k^T, q [kRowTiles * 16 of kRowsQ, kD] and k [kTiles * 8, kD] at these addresses. q is read again
// for every tile of keys: its registers are worth more than the reads.
template <DType kType, int kD, int kRowsQ, int kRowTiles, int kTiles>
__device__ __forceinline__ void multiply_keys(uint32_t q_address, uint32_t k_address,
                                              float (&scores)[kRowTiles][kTiles][4]) {
  using P = Panel<kD>;
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
      scores[m][n][0] = scores[m][n][1] = scores[m][n][2] = scores[m][n][3] = 0;
  }
  // Each load is issued one product ahead of its use.
  constexpr int kPairs = kTiles / 2, kSteps = kD / 16;
  uint32_t q[kRowTiles][4], k[2][4];
  const auto load_q = [&](int s) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      load_matrices(at_step(q_address, s % P::kSteps) + (s / P::kSteps * kRowsQ + 16 * m) * P::kPitch, q[m]);
    }
  };
  const auto load_k = [&](int i) {
    const int s = i / kPairs, n = i % kPairs;
    load_matrices(at_step(k_address, s % P::kSteps) + (s / P::kSteps * kPairs + n) * 16 * P::kPitch,
                  k[i % 2]);
  };
  load_k(0);
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    load_q(s);
#pragma unroll
    for (int n = 0; n < kPairs; ++n) {
      const int i = s * kPairs + n;
      if (i + 1 < kSteps * kPairs) load_k(i + 1);
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        multiply<kType>(scores[m][2 * n], q[m], k[i % 2][0], k[i % 2][1]);
        multiply<kType>(scores[m][2 * n + 1], q[m], k[i % 2][2], k[i % 2][3]);
      }
    }
  }
}

// out += weights v, v [kTiles * 8, kD] at v_address. The accumulators of one product are the operands of the
// next, rounded.
template <DType kType, int kD, int kRowTiles, int kTiles>
__device__ __forceinline__ void multiply_values(uint32_t v_address,
                                                const float (&weights)[kRowTiles][kTiles][4],
                                                float (&out)[kRowTiles][kD / 8][4]) {
  using P = Panel<kD>;
  constexpr int kColumns = kD / 16, kPairs = kTiles / 2;
  uint32_t a[kRowTiles][4], v[2][4];
  const auto load_v = [&](int i) {
    const int n = i / kColumns, column = i % kColumns;
    load_matrices_transposed(
        at_step(v_address, column % P::kSteps) + (column / P::kSteps * kPairs + n) * 16 * P::kPitch,
        v[i % 2]);
  };
  load_v(0);
#pragma unroll
  for (int n = 0; n < kPairs; ++n) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float (&w)[4] = weights[m][2 * n + half];
        a[m][2 * half] = pack_halves(w[0], w[1], kType);
        a[m][2 * half + 1] = pack_halves(w[2], w[3], kType);
      }
    }
#pragma unroll
    for (int column = 0; column < kColumns; ++column) {
      const int i = n * kColumns + column;
      if (i + 1 < kPairs * kColumns) load_v(i + 1);
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        multiply<kType>(out[m][2 * column], a[m], v[i % 2][0], v[i % 2][1]);
        multiply<kType>(out[m][2 * column + 1], a[m], v[i % 2][2], v[i % 2][3]);
      }
    }
  }
}

}  // namespace fastformer::cuda
