// Feed-forward: act(x w1^T + b1) w2^T + b2 with a gate and dropout, for one block of rows at a time.
//
// The block's hidden rows stay in scratch as float32, or as bfloat16 where the machine multiplies that.
// Threads share both products by columns, so each part of a weight is read, and packed, by one thread only.
// Two ways to multiply:
//   packed  panels of weight columns are transposed into L2 and register tiles run over them. Packing costs
//           what about ten rows cost, so it wants many.
//   dots    a few rows meet the weights as they lie, one dot product for each element.
// The choice, and the order of every sum, depend on shapes alone: bits do not depend on the thread count.
#pragma once

#include "activations.h"
#include "dropout_map.h"
#include "gemm_micro.h"
#include "worker.h"

namespace fastformer::cpu::FASTFORMER_ISA {

constexpr int64_t kFewRows = 32;
// A group of packed panels is kDepthBlock x kGroupColumns lanes: 256 KB, for L2.
constexpr int64_t kDepthBlock = 512;
constexpr int64_t kGroupColumns = 128;
static_assert(kGroupColumns % kDecisionColumns == 0);

FASTFORMER_INLINE int64_t fewer(int64_t a, int64_t b) { return a < b ? a : b; }

template <int kRows, typename Operand>
static void packed_tile(const Operand* a, int64_t lda, int64_t depth, const Operand* panel, bool first,
                        float* c, int64_t ldc) {
  Tile<kRows, 2> tile;
  tile.zero();
  tile.multiply_add(depth, a, lda, panel, kPanel);
  // Sums of sums: about as accurate as the short sums alone.
  if (!first) tile.add(c, ldc);
  tile.store_to(c, ldc);
}

// c[padded_rows, columns] = a[padded_rows, depth] w[columns, depth]^T, columns <= kGroupColumns. c is written
// up to whole panels. panels: scratch.
template <typename Operand, typename T>
static void packed_product(const Operand* a, int64_t lda, int64_t padded_rows, const T* w, int64_t ldw,
                           int64_t columns, int64_t depth, float* c, int64_t ldc, Operand* panels) {
  constexpr int64_t kMostDepth = kDepthBlock * kPerLane<Operand>;
  const int64_t blocks = (depth + kMostDepth - 1) / kMostDepth;
  const int64_t block_depth = round_up<int64_t>((depth + blocks - 1) / blocks, kLanes * kPerLane<Operand>);
  for (int64_t k = 0; k < depth; k += block_depth) {
    const int64_t count = fewer(block_depth, depth - k);
    const int64_t panel_depth = round_up<int64_t>(count, kPerLane<Operand>);
    for (int64_t j = 0; j < columns; j += kPanel) {
      pack_panel(w + j * ldw + k, ldw, fewer(kPanel, columns - j), count, nullptr, panels + j * panel_depth);
    }
    for (int64_t row = 0; row < padded_rows; row += kTileRows) {
      const Operand* const a_tile = a + row * lda + k;
      for (int64_t j = 0; j < columns; j += kPanel) {
        const Operand* const panel = panels + j * panel_depth;
        float* const c_tile = c + row * ldc + j;
        if (padded_rows - row >= kTileRows) {
          packed_tile<kTileRows>(a_tile, lda, count, panel, k == 0, c_tile, ldc);
        } else if (padded_rows - row == 2 * kRowStep) {
          packed_tile<2 * kRowStep>(a_tile, lda, count, panel, k == 0, c_tile, ldc);
        } else {
          packed_tile<kRowStep>(a_tile, lda, count, panel, k == 0, c_tile, ldc);
        }
      }
    }
  }
}

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
    const int64_t count = fewer(step, columns - j);
    int64_t row = dot_rows<4>(a, lda, 0, rows, w + j * ldw, ldw, count, depth, c + j, ldc);
    row = dot_rows<2>(a, lda, row, rows, w + j * ldw, ldw, count, depth, c + j, ldc);
    dot_rows<1>(a, lda, row, rows, w + j * ldw, ldw, count, depth, c + j, ldc);
  }
}

template <typename T>
static void product(const FeedForwardFwd& call, const OperandOf<T>* a, int64_t lda, const Weight& weight,
                    int64_t first_column, int64_t columns, int64_t depth, float* c, OperandOf<T>* panels) {
  constexpr int64_t ldc = kGroupColumns;
  const T* const w = (const T*)weight.data + first_column * weight.row_stride;
  if (call.rows <= kFewRows) {
    dot_product(a, lda, call.rows, w, weight.row_stride, columns, depth, c, ldc);
  } else {
    packed_product(a, lda, call.padded_rows, w, weight.row_stride, columns, depth, c, ldc, panels);
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

// hidden[:, first_column : first_column + columns] = bias, activation, gate and dropout on the first product,
// sums[rows, kGroupColumns]. `gate` [rows, kGroupColumns] holds the gate's product where there is one.
template <typename T, typename Act>
static void finish_hidden(const FeedForwardFwd& call, int64_t first_column, int64_t columns,
                          const float* sums, const float* gate) {
  // Beyond F the second product may read whole registers: zeros.
  const int64_t whole_registers = round_up<int64_t>(columns, kLanes * kPerLane<OperandOf<T>>);
  uint16_t decisions[kDecisionColumns];
  for (int64_t row = 0; row < call.rows; ++row) {
    OperandOf<T>* const hidden = (OperandOf<T>*)call.hidden + row * call.hidden_stride + first_column;
    for (int64_t c = 0; c < whole_registers; c += kLanes) {
      const int64_t column = first_column + c;
      const int n = column < call.F ? (int)fewer(kLanes, call.F - column) : 0;
      F32 x = load(sums + row * kGroupColumns + c);
      if (call.b1) x += load_up_to(call.b1 + column, n);
      if (call.pre) store_up_to((T*)call.pre + row * call.F + column, x, n);
      if (gate) {
        F32 g = load(gate + row * kGroupColumns + c);
        if (call.b_gate) g += load_up_to(call.b_gate + column, n);
        if (call.pre_gate) store_up_to((T*)call.pre_gate + row * call.F + column, g, n);
        x *= Act::of(g);
      } else {
        x = Act::of(x);
      }
      if (call.dropout.threshold) {
        if (c % kDecisionColumns == 0) {
          drop_decisions(call.dropout.seed, column, (uint32_t)(call.first_row + row), 0, 2, decisions);
        }
        const I32 keep = kept(decisions + c % kDecisionColumns, call.dropout.threshold);
        x = select(keep, x * call.dropout.scale, F32{});
      }
      if (n < kLanes) x = select(lane_index() < n, x, F32{});
      store(hidden + c, x);
    }
  }
}

template <typename T>
static void finish_hidden(const FeedForwardFwd& call, int64_t first_column, int64_t columns,
                          const float* sums, const float* gate) {
  switch (call.activation) {
    case Activation::kRelu:
      return finish_hidden<T, Relu>(call, first_column, columns, sums, gate);
    case Activation::kGelu:
      return finish_hidden<T, Gelu>(call, first_column, columns, sums, gate);
    case Activation::kGeluTanh:
      return finish_hidden<T, GeluTanh>(call, first_column, columns, sums, gate);
    case Activation::kSilu:
      return finish_hidden<T, Silu>(call, first_column, columns, sums, gate);
    case Activation::kRelu2:
      return finish_hidden<T, Relu2>(call, first_column, columns, sums, gate);
  }
}

// Hidden columns [column_begin, column_end) of every row of the block.
template <typename T>
static void hidden_columns(const FeedForwardFwd& call, int64_t column_begin, int64_t column_end,
                           OperandOf<T>* panels, float* sums) {
  const auto* const x = (const OperandOf<T>*)call.x_operands;
  float* const gate = call.w_gate.data ? sums + call.padded_rows * kGroupColumns : nullptr;
  for (int64_t j = column_begin; j < column_end; j += kGroupColumns) {
    const int64_t columns = fewer(kGroupColumns, column_end - j);
    product<T>(call, x, call.x_stride, call.w1, j, columns, call.E, sums, panels);
    if (gate) product<T>(call, x, call.x_stride, call.w_gate, j, columns, call.E, gate, panels);
    finish_hidden<T>(call, j, columns, sums, gate);
  }
}

// Output columns [column_begin, column_end) of every row of the block.
template <typename T>
static void output_columns(const FeedForwardFwd& call, int64_t column_begin, int64_t column_end,
                           OperandOf<T>* panels, float* sums) {
  const auto* const hidden = (const OperandOf<T>*)call.hidden;
  for (int64_t j = column_begin; j < column_end; j += kGroupColumns) {
    const int64_t columns = fewer(kGroupColumns, column_end - j);
    product<T>(call, hidden, call.hidden_stride, call.w2, j, columns, call.F, sums, panels);
    for (int64_t row = 0; row < call.rows; ++row) {
      T* const out = (T*)call.out + row * call.E_out + j;
      for (int64_t c = 0; c < columns; c += kLanes) {
        const int n = (int)fewer(kLanes, columns - c);
        F32 y = load(sums + row * kGroupColumns + c);
        if (call.b2) y += load_up_to(call.b2 + j + c, n);
        store_up_to(out + c, y, n);
      }
    }
  }
}

// The size of an element of x_operands and hidden.
static int64_t feed_forward_operand_size(DType dtype) {
  int64_t size = 0;
  with_type(dtype, [&](auto type) { size = sizeof(OperandOf<decltype(type)>); });
  return size;
}

// Rows [row_begin, row_end) of x into x_operands; the last rows bring the padding.
static void feed_forward_pack(const FeedForwardFwd& call, int64_t row_begin, int64_t row_end) {
  with_type(call.dtype, [&](auto type) {
    using T = decltype(type);
    auto* const operands = (OperandOf<T>*)call.x_operands;
    pack_rows((const T*)call.x + row_begin * call.x_row_stride, call.x_row_stride, row_end - row_begin,
              call.E, nullptr, 1.0f, operands + row_begin * call.x_stride, call.x_stride);
    if (row_end == call.rows) {
      const int64_t padding = (call.padded_rows - call.rows) * call.x_stride;
      __builtin_memset(operands + call.rows * call.x_stride, 0, padding * sizeof(OperandOf<T>));
    }
  });
}

FASTFORMER_INLINE int64_t panel_floats(const FeedForwardFwd& call) {
  return call.rows <= kFewRows ? 0 : kGroupColumns * kDepthBlock;
}

// Both: the worker's share of columns.
static void feed_forward_hidden(const FeedForwardFwd& call, int64_t column_begin, int64_t column_end) {
  const FlushDenormals flush;
  const Scratch scratch(panel_floats(call) + (call.w_gate.data ? 2 : 1) * call.padded_rows * kGroupColumns);
  float* const panels = scratch.data();
  with_type(call.dtype, [&](auto type) {
    using T = decltype(type);
    hidden_columns<T>(call, column_begin, column_end, (OperandOf<T>*)panels, panels + panel_floats(call));
  });
}

static void feed_forward_output(const FeedForwardFwd& call, int64_t column_begin, int64_t column_end) {
  const FlushDenormals flush;
  const Scratch scratch(panel_floats(call) + call.padded_rows * kGroupColumns);
  float* const panels = scratch.data();
  with_type(call.dtype, [&](auto type) {
    using T = decltype(type);
    output_columns<T>(call, column_begin, column_end, (OperandOf<T>*)panels, panels + panel_floats(call));
  });
}

}  // namespace fastformer::cpu::FASTFORMER_ISA
