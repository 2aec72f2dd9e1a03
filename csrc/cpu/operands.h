// From the tensors of a call to what products read, and from sums to tensors.
#pragma once

#include "gemm.h"

namespace fastformer::cpu::FASTFORMER_ISA {

// The size of an element as products read it.
static int64_t operand_size(DType dtype) {
  int64_t size = 0;
  with_type(dtype, [&](auto type) { size = sizeof(OperandOf<decltype(type)>); });
  return size;
}

static void pack_operand_rows(const RowMatrix& matrix, DType dtype, int64_t padded_rows, void* operands,
                              int64_t stride, int64_t row_begin, int64_t row_end) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    auto* const packed = (OperandOf<T>*)operands;
    pack_rows((const T*)matrix.data + row_begin * matrix.row_stride, matrix.row_stride, row_end - row_begin,
              matrix.columns, nullptr, 1.0f, packed + row_begin * stride, stride);
    if (row_end == matrix.rows) {
      const int64_t padding = (padded_rows - matrix.rows) * stride;
      __builtin_memset(packed + matrix.rows * stride, 0, padding * sizeof(OperandOf<T>));
    }
  });
}

// fn(pointer to the matrix's first element, in its type; an operand)
template <typename Fn>
FASTFORMER_INLINE void with_elements(const RowMatrix& matrix, DType dtype, Fn fn) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    using Operand = OperandOf<T>;
    if (matrix.operands) {
      fn((const Operand*)matrix.data, Operand{});
    } else {
      fn((const T*)matrix.data, Operand{});
    }
  });
}

static void pack_operands_transposed(const RowMatrix& matrix, DType dtype, void* operands, int64_t stride,
                                     int64_t column_begin, int64_t column_end) {
  const FlushDenormals flush;
  with_elements(matrix, dtype, [&](const auto* data, auto operand) {
    auto* const packed = (decltype(operand)*)operands;
    pack_transposed(data + column_begin, matrix.row_stride, column_end - column_begin, matrix.rows,
                    packed + column_begin * stride, stride);
  });
}

// So many rows are summed in float32, and the sums of them in float64.
constexpr int64_t kSumRows = 16;

static void column_sums(const RowMatrix& matrix, DType dtype, double* sums, int64_t column_begin,
                        int64_t column_end) {
  const FlushDenormals flush;
  with_type(dtype, [&](auto type) {
    const auto* const data = (const decltype(type)*)matrix.data;
    for (int64_t row = 0; row < matrix.rows; row += kSumRows) {
      const int64_t row_end = smaller(row + kSumRows, matrix.rows);
      for (int64_t j = column_begin; j < column_end; j += kLanes) {
        const int n = (int)smaller(kLanes, column_end - j);
        F32 sum{};
        for (int64_t i = row; i < row_end; ++i) sum += load_up_to(data + i * matrix.row_stride + j, n);
        for (int l = 0; l < n; ++l) sums[j + l] += sum[l];
      }
    }
  });
}

static void weight_bwd(const WeightGradient& gradient, ColumnQueue& queue) {
  const FlushDenormals flush;
  const Scratch scratch(kPanelFloats);
  const RowMatrix& right = gradient.right;
  const int64_t N = right.columns;
  with_type(gradient.dtype, [&](auto type) {
    using T = decltype(type);
    with_elements(right, gradient.dtype, [&](const auto* data, auto operand) {
      using Operand = decltype(operand);
      over_columns(queue, [&](int64_t first, int64_t columns) {
        const auto pack = [&](int64_t k, int64_t count, int64_t j, Operand* panel) {
          pack_columns(data + k * right.row_stride + first + j, right.row_stride,
                       smaller(kPanel, columns - j), count, panel);
        };
        const Product<T> dw = {
            (T*)gradient.dw + first, N, gradient.sums + first, N, gradient.first, gradient.last};
        packed_product((const Operand*)gradient.left, gradient.left_stride, gradient.M, columns, right.rows,
                       dw, (Operand*)scratch.data(), pack);
      });
    });
  });
}

static void from_float64(const double* source, DType dtype, void* target, int64_t count) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    for (int64_t i = 0; i < count; ++i) ((T*)target)[i] = from_float<T>((float)source[i]);
  });
}

}  // namespace fastformer::cpu::FASTFORMER_ISA
