// A warp's products of tiles in shared memory, of any of the five forms that backward has. Tiles are panels
// of 64 columns (see attention_tiles.cuh); what changes from load to load is a constant on top of an address,
// or its exclusive or with one.
#pragma once

#include "attention_tiles.cuh"

namespace fastformer::cuda {

constexpr int kPanelWidth = 64, kPanelPitch = 2 * kPanelWidth;

// Column `column`, a multiple of 8, of a tile of kRows rows whose first column `address` is of.
template <int kRows>
__device__ __forceinline__ uint32_t at_column(uint32_t address, int column) {
  return (address + column / kPanelWidth * (kRows * kPanelPitch)) ^
         static_cast<uint32_t>(column % kPanelWidth * 2);
}

// Where this lane keeps the first two elements of a warp's accumulators in a tile of kRows rows, where those
// begin at `row` and `column`. The next 8 columns lie at ^ 16, and so on.
template <int kRows>
__device__ __forceinline__ uint32_t place_of_lane(uint32_t tile, int row, int column,
                                                  int thread = static_cast<int>(threadIdx.x)) {
  const int lane = thread % kWarp;
  return at_column<kRows>(tile + row * kPanelPitch + place_in_panel<kPanelWidth>(lane / 4, 0), column) +
         lane % 4 * 4;
}

template <int kRows, int kRowTiles, int kTiles>
__device__ __forceinline__ void store_tile(uint32_t place, const float (&values)[kRowTiles][kTiles][4],
                                           DType dtype) {
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const uint32_t at = (place ^ static_cast<uint32_t>(n % 8 * 16)) + n / 8 * (kRows * kPanelPitch);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        store_shared(at + (16 * m + 8 * r) * kPanelPitch,
                     pack_halves(values[m][n][2 * r], values[m][n][2 * r + 1], dtype));
      }
    }
  }
}

// change(element, m, n, e) for every element of a warp's accumulators.
template <int kRowTiles, int kTiles, typename Change>
__device__ __forceinline__ void for_each(float (&values)[kRowTiles][kTiles][4], Change change) {
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) change(values[m][n][e], m, n, e);
    }
  }
}

template <int kRowTiles, int kTiles>
__device__ __forceinline__ void set_zero(float (&sum)[kRowTiles][kTiles][4]) {
  for_each(sum, [](float& value, int, int, int) { value = 0.0f; });
}

template <int kRowTiles, int kTiles>
__device__ __forceinline__ void scale_all(float (&values)[kRowTiles][kTiles][4], float scale) {
  for_each(values, [&](float& value, int, int, int) { value *= scale; });
}

// sum += a b over kSteps times 16 of what both share. load_a(step, m, words) loads 16 rows of a, load_b(step,
// pair, words) 16 columns of b, each one product ahead of its use.
template <DType kType, int kSteps, int kRowTiles, int kTiles, typename LoadA, typename LoadB>
__device__ __forceinline__ void add_products(float (&sum)[kRowTiles][kTiles][4], LoadA load_a, LoadB load_b) {
  constexpr int kPairs = kTiles / 2;
  static_assert(kTiles % 2 == 0);
  uint32_t a[kRowTiles][4], b[2][4];
  load_b(0, 0, b[0]);
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) load_a(s, m, a[m]);
#pragma unroll
    for (int n = 0; n < kPairs; ++n) {
      const int i = s * kPairs + n;
      if (i + 1 < kSteps * kPairs) load_b((i + 1) / kPairs, (i + 1) % kPairs, b[(i + 1) % 2]);
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        multiply<kType>(sum[m][2 * n], a[m], b[i % 2][0], b[i % 2][1]);
        multiply<kType>(sum[m][2 * n + 1], a[m], b[i % 2][2], b[i % 2][3]);
      }
    }
  }
}

// In the forms below an operand lies at a lane's address, as units_then_rows or rows_then_units give it, plus
// an offset: a constant, so that tiles of one shape share the registers of the steps' addresses.

// sum += a b^T: a [.., kD] of kRowsA rows and b [.., kD] of kRowsB rows, both read along their rows.
template <DType kType, int kD, int kRowsA, int kRowsB, int kRowTiles, int kTiles>
__device__ __forceinline__ void add_rows_by_rows(uint32_t a_address, int a_offset, uint32_t b_address,
                                                 int b_offset, float (&sum)[kRowTiles][kTiles][4]) {
  add_products<kType, kD / 16>(
      sum,
      [&](int s, int m, uint32_t (&words)[4]) {
        load_matrices(at_step(a_address, s % 4) + (a_offset + (s / 4 * kRowsA + 16 * m) * kPanelPitch),
                      words);
      },
      [&](int s, int pair, uint32_t (&words)[4]) {
        load_matrices(at_step(b_address, s % 4) + (b_offset + (s / 4 * kRowsB + 16 * pair) * kPanelPitch),
                      words);
      });
}

// sum += a b: a [.., kInner] of kRowsA rows, b [kInner, ..] read down its columns, at most 64 of a panel.
template <DType kType, int kInner, int kRowsA, int kRowTiles, int kTiles>
__device__ __forceinline__ void add_rows_by_columns(uint32_t a_address, int a_offset, uint32_t b_address,
                                                    float (&sum)[kRowTiles][kTiles][4]) {
  static_assert(kTiles <= 8);
  add_products<kType, kInner / 16>(
      sum,
      [&](int s, int m, uint32_t (&words)[4]) {
        load_matrices(at_step(a_address, s % 4) + (a_offset + (s / 4 * kRowsA + 16 * m) * kPanelPitch),
                      words);
      },
      [&](int s, int pair, uint32_t (&words)[4]) {
        load_matrices_transposed(at_step(b_address, pair) + 16 * s * kPanelPitch, words);
      });
}

// sum += a^T b: a [kInner, ..] and b [kInner, ..], both read down their columns, at most 64 of a panel.
template <DType kType, int kInner, int kRowTiles, int kTiles>
__device__ __forceinline__ void add_columns_by_columns(uint32_t a_address, int a_offset, uint32_t b_address,
                                                       int b_offset, float (&sum)[kRowTiles][kTiles][4]) {
  static_assert(kTiles <= 8 && kRowTiles <= 4);
  add_products<kType, kInner / 16>(
      sum,
      [&](int s, int m, uint32_t (&words)[4]) {
        load_matrices_transposed(at_step(a_address, m) + (a_offset + 16 * s * kPanelPitch), words);
      },
      [&](int s, int pair, uint32_t (&words)[4]) {
        load_matrices_transposed(at_step(b_address, pair) + (b_offset + 16 * s * kPanelPitch), words);
      });
}

}  // namespace fastformer::cuda
