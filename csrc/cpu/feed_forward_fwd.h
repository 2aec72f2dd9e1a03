// Feed-forward: act(x w1^T + b1) w2^T + b2 with a gate and dropout, for one block of rows at a time.
//
// The block's hidden rows stay in scratch as float32, or as bfloat16 where the machine multiplies that.
// Threads share both products by columns, so each part of a weight is read, and packed, by one thread only.
// The order of every sum depends on shapes alone: bits do not depend on the thread count.
#pragma once

#include "activations.h"
#include "dropout_map.h"
#include "linear.h"

namespace fastformer::cpu::FASTFORMER_ISA {

static_assert(kGroupColumns % kDecisionColumns == 0);

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
      const int n = column < call.F ? (int)smaller(kLanes, call.F - column) : 0;
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

// Hidden columns of every row of the block.
template <typename T>
static void hidden_columns(const FeedForwardFwd& call, ColumnQueue& queue, OperandOf<T>* panels,
                           float* sums) {
  const auto* const x = (const OperandOf<T>*)call.x_operands;
  float* const gate = call.w_gate.data ? sums + call.padded_rows * kGroupColumns : nullptr;
  over_columns(queue, [&](int64_t j, int64_t columns) {
    const auto product = [&](const Weight& weight, float* c) {
      linear_product<T>(x, call.x_stride, call.rows, call.padded_rows, weight, j, columns, call.E, c, panels);
    };
    product(call.w1, sums);
    if (gate) product(call.w_gate, gate);
    finish_hidden<T>(call, j, columns, sums, gate);
  });
}

// Output columns of every row of the block.
template <typename T>
static void output_columns(const FeedForwardFwd& call, ColumnQueue& queue, OperandOf<T>* panels,
                           float* sums) {
  const auto* const hidden = (const OperandOf<T>*)call.hidden;
  over_columns(queue, [&](int64_t j, int64_t columns) {
    linear_product<T>(hidden, call.hidden_stride, call.rows, call.padded_rows, call.w2, j, columns, call.F,
                      sums, panels);
    for (int64_t row = 0; row < call.rows; ++row) {
      T* const out = (T*)call.out + row * call.E_out + j;
      for (int64_t c = 0; c < columns; c += kLanes) {
        const int n = (int)smaller(kLanes, columns - c);
        F32 y = load(sums + row * kGroupColumns + c);
        if (call.b2) y += load_up_to(call.b2 + j + c, n);
        store_up_to(out + c, y, n);
      }
    }
  });
}

FASTFORMER_INLINE int64_t panel_floats(const FeedForwardFwd& call) {
  return call.rows <= kFewRows ? 0 : kPanelFloats;
}

static void feed_forward_hidden(const FeedForwardFwd& call, ColumnQueue& queue) {
  const FlushDenormals flush;
  const Scratch scratch(panel_floats(call) + (call.w_gate.data ? 2 : 1) * call.padded_rows * kGroupColumns);
  float* const panels = scratch.data();
  with_type(call.dtype, [&](auto type) {
    using T = decltype(type);
    hidden_columns<T>(call, queue, (OperandOf<T>*)panels, panels + panel_floats(call));
  });
}

static void feed_forward_output(const FeedForwardFwd& call, ColumnQueue& queue) {
  const FlushDenormals flush;
  const Scratch scratch(panel_floats(call) + call.padded_rows * kGroupColumns);
  float* const panels = scratch.data();
  with_type(call.dtype, [&](auto type) {
    using T = decltype(type);
    output_columns<T>(call, queue, (OperandOf<T>*)panels, panels + panel_floats(call));
  });
}

}  // namespace fastformer::cpu::FASTFORMER_ISA
