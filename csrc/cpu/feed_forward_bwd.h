// Backward of feed-forward, for one block of rows at a time:
//
//   h = act(pre), gated act(gate) pre;  hd = dropout(h);  dh = dropout'(dout w2)
//   dpre = dh act'(pre), gated dh act(gate);  dgate = dh pre act'(gate)
//   dx = dpre w1 + dgate w_gate;  dw2 = dout^T hd;  dw1 = dpre^T x;  dw_gate = dgate^T x
//
// hd, dpre and dgate stay in scratch as what products read: float32, or bfloat16 where the machine multiplies
// that. Threads share every product by columns.
#pragma once

#include "activations.h"
#include "dropout_map.h"
#include "linear.h"
#include "operands.h"

namespace fastformer::cpu::FASTFORMER_ISA {

// What one worker knows of a group of hidden columns, each [rows, kGroupColumns].
struct HiddenGroup {
  int64_t first_column, columns;
  float* grad;            // dout w2; null where nothing needs it
  float *pre, *pre_gate;  // x w1^T and x w_gate^T; null where they were saved, or there is no gate
};

// pre or pre_gate at one register of columns: computed again, with the bits that would have been saved.
template <typename T>
FASTFORMER_INLINE F32 load_pre(const T* saved, const float* sums, const float* bias, int64_t at_saved,
                               int64_t at_sums, int64_t column, int n) {
  if (!sums) return load_up_to(saved + at_saved, n);
  const F32 x = load(sums + at_sums);
  return rounded(bias ? x + load_up_to(bias + column, n) : x, T{});
}

FASTFORMER_INLINE void accumulate(float* sums, F32 x) { store(sums, load(sums) + x); }

// Rows [row_begin, row_end) of the group's columns of hidden, dpre and dgate; bias_sums[2][kGroupColumns]
// += the sums of dpre and dgate.
template <typename T, typename Act>
static void finish_rows(const FeedForwardBwd& call, const HiddenGroup& group, int64_t row_begin,
                        int64_t row_end, float* bias_sums) {
  using Operand = OperandOf<T>;
  const bool gated = call.w_gate.data;
  // Beyond F a product may read a whole pair: zeros.
  const int64_t whole_registers = round_up<int64_t>(group.columns, kLanes * kPerLane<Operand>);
  uint16_t decisions[kDecisionColumns];
  for (int64_t row = row_begin; row < row_end; ++row) {
    const auto store_hidden = [&](void* target, int64_t column, F32 x) __attribute__((always_inline)) {
      if (target) store((Operand*)target + row * call.hidden_stride + column, x);
    };
    for (int64_t c = 0; c < whole_registers; c += kLanes) {
      const int64_t column = group.first_column + c;
      const int n = column < call.F ? (int)smaller(kLanes, call.F - column) : 0;
      const int64_t at_saved = row * call.F + column, at_sums = row * kGroupColumns + c;
      const F32 pre = load_pre((const T*)call.pre, group.pre, call.b1, at_saved, at_sums, column, n);
      const I32 real = lane_index() < n;
      I32 keep = real;
      F32 scale = splat(1.0f);
      if (call.dropout.threshold) {
        if (c % kDecisionColumns == 0) {
          drop_decisions(call.dropout.seed, column, (uint32_t)(call.first_row + row), 0, 2, decisions);
        }
        keep &= kept(decisions + c % kDecisionColumns, call.dropout.threshold);
        scale = splat(call.dropout.scale);
      }
      F32 dh{};
      if (group.grad) dh = select(keep, load(group.grad + at_sums) * scale, F32{});
      F32 h, dpre, dgate{};
      if (gated) {
        const F32 gate =
            load_pre((const T*)call.pre_gate, group.pre_gate, call.b_gate, at_saved, at_sums, column, n);
        const F32 open = Act::of(gate, dh * pre, dgate);
        h = open * pre;
        dpre = open * dh;
        dgate = select(real, dgate, F32{});
      } else {
        h = Act::of(pre, dh, dpre);
      }
      dpre = select(real, dpre, F32{});
      store_hidden(call.hidden, column, select(keep, h * scale, F32{}));
      store_hidden(call.dpre, column, dpre);
      store_hidden(call.dgate, column, dgate);
      if (call.db1) accumulate(bias_sums + c, dpre);
      if (call.db_gate) accumulate(bias_sums + kGroupColumns + c, dgate);
    }
  }
}

template <typename T, typename Act>
static void finish_hidden_bwd(const FeedForwardBwd& call, const HiddenGroup& group) {
  const auto add_to = [&](double* db, const float* sums) {
    for (int64_t c = 0; db && c < group.columns; ++c) db[group.first_column + c] += sums[c];
  };
  for (int64_t row = 0; row < call.rows; row += kSumRows) {
    float bias_sums[2 * kGroupColumns] = {};
    finish_rows<T, Act>(call, group, row, smaller(row + kSumRows, call.rows), bias_sums);
    add_to(call.db1, bias_sums);
    add_to(call.db_gate, bias_sums + kGroupColumns);
  }
}

template <typename T>
static void finish_hidden_bwd(const FeedForwardBwd& call, const HiddenGroup& group) {
  switch (call.activation) {
    case Activation::kRelu:
      return finish_hidden_bwd<T, Relu>(call, group);
    case Activation::kGelu:
      return finish_hidden_bwd<T, Gelu>(call, group);
    case Activation::kGeluTanh:
      return finish_hidden_bwd<T, GeluTanh>(call, group);
    case Activation::kSilu:
      return finish_hidden_bwd<T, Silu>(call, group);
    case Activation::kRelu2:
      return finish_hidden_bwd<T, Relu2>(call, group);
  }
}

// c = a[rows, depth] w[depth, first_column : first_column + columns]: a weight met from the other side.
template <typename T, typename Operand, typename Out>
static void product_with_columns(const Operand* a, int64_t lda, int64_t rows, const Weight& weight,
                                 int64_t first_column, int64_t columns, int64_t depth, const Product<Out>& c,
                                 Operand* panels) {
  const int64_t ldw = weight.row_stride;
  const T* const w = (const T*)weight.data + first_column;
  const auto pack = [&](int64_t k, int64_t count, int64_t j, Operand* panel) {
    pack_columns(w + k * ldw + j, ldw, smaller(kPanel, columns - j), count, panel);
  };
  packed_product(a, lda, rows, columns, depth, c, panels, pack);
}

// Hidden columns of every row of the block.
static void feed_forward_hidden_bwd(const FeedForwardBwd& call, ColumnQueue& queue) {
  const FlushDenormals flush;
  const bool saved = call.pre, gated = call.w_gate.data;
  const int64_t group_floats = call.padded_rows * kGroupColumns;
  const Scratch scratch(kPanelFloats + (saved ? 1 : gated ? 3 : 2) * group_floats);
  float* const sums = scratch.data() + kPanelFloats;
  HiddenGroup group{};
  if (call.grad_operands) group.grad = sums;
  if (!saved) group.pre = sums + group_floats;
  if (!saved && gated) group.pre_gate = sums + 2 * group_floats;
  with_type(call.dtype, [&](auto type) {
    using T = decltype(type);
    auto* const panels = (OperandOf<T>*)scratch.data();
    const auto* const x = (const OperandOf<T>*)call.x_operands;
    over_columns(queue, [&](int64_t j, int64_t columns) {
      const auto product_of_x = [&](const Weight& weight, float* c) {
        linear_product<T>(x, call.x_stride, call.rows, call.padded_rows, weight, j, columns, call.E, c,
                          panels);
      };
      group.first_column = j;
      group.columns = columns;
      if (group.grad) {
        product_with_columns<T>((const OperandOf<T>*)call.grad_operands, call.grad_stride, call.rows, call.w2,
                                j, columns, call.E_out, product_into(group.grad, kGroupColumns), panels);
      }
      if (group.pre) product_of_x(call.w1, group.pre);
      if (group.pre_gate) product_of_x(call.w_gate, group.pre_gate);
      finish_hidden_bwd<T>(call, group);
      const auto transpose_group = [&](const void* rows, void* transposed) {
        if (!transposed) return;
        pack_transposed((const OperandOf<T>*)rows + j, call.hidden_stride, columns, call.rows,
                        (OperandOf<T>*)transposed + j * call.columns_stride, call.columns_stride);
      };
      transpose_group(call.dpre, call.dpre_columns);
      transpose_group(call.dgate, call.dgate_columns);
    });
  });
}

// Columns of dx for every row of the block.
static void feed_forward_input_bwd(const FeedForwardBwd& call, ColumnQueue& queue) {
  const FlushDenormals flush;
  const bool in_float32 = call.dtype == DType::kFloat32;
  const Scratch scratch(kPanelFloats + (in_float32 ? 0 : call.rows * kGroupColumns));
  with_type(call.dtype, [&](auto type) {
    using T = decltype(type);
    using Operand = OperandOf<T>;
    over_columns(queue, [&](int64_t j, int64_t columns) {
      T* const out = (T*)call.dx + j;
      Product<T> dx = {out, call.E, scratch.data() + kPanelFloats, kGroupColumns};
      if (in_float32) {
        dx.sums = (float*)out;
        dx.sums_stride = call.E;
      }
      const auto add_product = [&](const void* a, const Weight& weight) {
        product_with_columns<T>((const Operand*)a, call.hidden_stride, call.rows, weight, j, columns, call.F,
                                dx, (Operand*)scratch.data());
      };
      dx.last = !call.w_gate.data;
      add_product(call.dpre, call.w1);
      if (call.w_gate.data) {
        dx.first = false;
        dx.last = true;
        add_product(call.dgate, call.w_gate);
      }
    });
  });
}

}  // namespace fastformer::cpu::FASTFORMER_ISA
