// a w^T for weights as torch.nn.Linear holds them, in one of two ways:
//   packed  panels of weight columns are transposed into L2. That costs what about ten rows cost, so it wants
//           many rows.
//   dots    a few rows meet the weights as they lie, one dot product for each element.
// The choice depends on the number of rows alone.
#pragma once

#include "gemm.h"

namespace fastformer::cpu::FASTFORMER_ISA {

constexpr int64_t kFewRows = 32;

// As many accumulators as registers allow beside their operands.
constexpr int kDots = kLanes == 16 ? 16 : 8;

// c[kRows, kColumns] = a[kRows, depth] w[kColumns, depth]^T. Rows of `a` hold zeros up to whole registers.
template <int kRows, int kColumns, typename Operand, typename T>
static void dot_tile(const Operand* a, int64_t lda, const T* w, int64_t ldw, int64_t depth, float* c,
                     int64_t ldc) {
  constexpr int kElements = kLanes * kPerLane<Operand>;
  F32 sums[kRows][kColumns] = {};
  int64_t k = 0;
  const auto add_products = [&](auto load_w) __attribute__((always_inline)) {
    F32 a_k[kRows];
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) a_k[i] = load_operands(Operand{}, a + i * lda + k);
#pragma GCC unroll 16
    for (int j = 0; j < kColumns; ++j) {
      const F32 w_k = load_w(w + j * ldw + k);
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) sums[i][j] = fma_operands(Operand{}, a_k[i], w_k, sums[i][j]);
    }
  };
  for (; k + kElements <= depth; k += kElements) {
    add_products([](const T* p) { return load_operands(Operand{}, p); });
  }
  if (k < depth) {
    const int tail = (int)(depth - k);
    add_products([tail](const T* p) { return load_operands_n(Operand{}, p, tail); });
  }
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < kColumns; ++j) c[i * ldc + j] = reduce_add(sums[i][j]);
  }
}

template <int kRows, typename Operand, typename T>
static int64_t dot_rows(const Operand* a, int64_t lda, int64_t row, int64_t rows, const T* w, int64_t ldw,
                        int64_t columns, int64_t depth, float* c, int64_t ldc) {
  constexpr int kColumns = kDots / kRows;
  for (; row + kRows <= rows; row += kRows) {
    const Operand* const a_tile = a + row * lda;
    float* const c_tile = c + row * ldc;
    int64_t j = 0;
    for (; j + kColumns <= columns; j += kColumns) {
      dot_tile<kRows, kColumns>(a_tile, lda, w + j * ldw, ldw, depth, c_tile + j, ldc);
    }
    for (; j < columns; ++j) dot_tile<kRows, 1>(a_tile, lda, w + j * ldw, ldw, depth, c_tile + j, ldc);
  }
  return row;
}

// c[rows, columns] = a[rows, depth] w[columns, depth]^T
template <typename Operand, typename T>
static void dot_product(const Operand* a, int64_t lda, int64_t rows, const T* w, int64_t ldw, int64_t columns,
                        int64_t depth, float* c, int64_t ldc) {
  // Few enough columns at a time for their weights to stay in L2 while the rows pass.
  const int64_t step = round_up<int64_t>(1 + 65536 / depth, kDots);
  for (int64_t j = 0; j < columns; j += step) {
    const int64_t count = smaller(step, columns - j);
    int64_t row = dot_rows<4>(a, lda, 0, rows, w + j * ldw, ldw, count, depth, c + j, ldc);
    row = dot_rows<2>(a, lda, row, rows, w + j * ldw, ldw, count, depth, c + j, ldc);
    dot_rows<1>(a, lda, row, rows, w + j * ldw, ldw, count, depth, c + j, ldc);
  }
}

// c[padded_rows, kGroupColumns] = a[padded_rows, depth] w[first_column : first_column + columns]^T, with
// columns <= kGroupColumns. c is written up to whole panels; with few rows, to `rows` and `columns`.
template <typename T, typename Operand>
static void linear_product(const Operand* a, int64_t lda, int64_t rows, int64_t padded_rows,
                           const Weight& weight, int64_t first_column, int64_t columns, int64_t depth,
                           float* c, Operand* panels) {
  const int64_t ldw = weight.row_stride;
  const T* const w = (const T*)weight.data + first_column * ldw;
  if (rows <= kFewRows) {
    dot_product(a, lda, rows, w, ldw, columns, depth, c, kGroupColumns);
    return;
  }
  const auto pack = [&](int64_t k, int64_t count, int64_t j, Operand* panel) {
    pack_panel(w + j * ldw + k, ldw, smaller(kPanel, columns - j), count, nullptr, panel);
  };
  packed_product(a, lda, padded_rows, round_up<int64_t>(columns, kPanel), depth,
                 product_into(c, kGroupColumns), panels, pack);
}

}  // namespace fastformer::cpu::FASTFORMER_ISA
