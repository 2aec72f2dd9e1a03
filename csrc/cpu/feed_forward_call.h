// What the launchers of both directions of feed-forward need.
#pragma once

#include <algorithm>
#include <functional>
#include <string>
#include <vector>

#include "../feed_forward_arguments.h"
#include "launch.h"
#include "parallel.h"
#include "tensors.h"

namespace fastformer::cpu {

// A multiple of every level's row step.
constexpr int64_t kRowStep = 4;
// A multiple of 32, the period of the dropout map, and of every level's panel.
constexpr int64_t kColumnStep = 32;

inline int64_t round_up(int64_t a, int64_t b) { return ceil_divide(a, b) * b; }

// A tensor [..., columns] as rows, copied where they cannot be read as they lie.
struct TensorRows {
  TensorRows(const Tensor& given, int64_t columns) : tensor(given) {
    if (!row_stride(tensor)) tensor = torch::stable::contiguous(tensor);
    view = {tensor.const_data_ptr(), *row_stride(tensor), tensor.numel() / columns, columns};
  }

  Tensor tensor;
  RowMatrix view;
};

// A weight [rows, columns] whose columns are contiguous, copied where they are not.
struct WeightRows {
  WeightRows(const Tensor& weight, int64_t rows, int64_t columns, DType dtype, const char* name)
      : tensor(weight) {
    STD_TORCH_CHECK(weight.dim() == 2 && weight.size(0) == rows && weight.size(1) == columns, name,
                    " has the wrong shape");
    STD_TORCH_CHECK(dtype_of(weight) == dtype, name, " must have the dtype of x");
    if (columns != 1 && weight.stride(1) != 1) tensor = torch::stable::contiguous(weight);
    view = {tensor.const_data_ptr(), tensor.stride(0)};
  }

  Tensor tensor;
  Weight view;
};

// A bias [size] as contiguous float32; null data where there is none.
struct Bias {
  Bias(const std::optional<Tensor>& bias, int64_t size, const char* name) : row(bias) {
    if (!bias) return;
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == size, name, " has the wrong shape");
  }

  Float32Copy row;
  const float* data = row.data();
};

// A kernel over the columns of its product, and what one column costs.
struct ColumnWork {
  int64_t columns, products;
  std::function<void(ColumnQueue&)> kernel;
};

// Kernels that do not read each other's results, one after the other without a wait between them, on as many
// workers as they pay for. The bits are the same however columns are cut, so they are cut finely enough for
// workers to end together.
inline void over_columns(const std::vector<ColumnWork>& works) {
  constexpr int64_t kPartsPerWorker = 3;
  int64_t products = 0;
  for (const ColumnWork& work : works) products += work.columns * work.products;
  const int64_t workers =
      std::min<int64_t>(torch::stable::get_num_threads(), ceil_divide(products, kProductsPerThread));
  std::vector<ColumnQueue> queues;
  for (const ColumnWork& work : works) {
    int64_t width = kGroupColumns;
    while (workers > 1 && width > kColumnStep &&
           ceil_divide(work.columns, width) < kPartsPerWorker * workers) {
      width /= 2;
    }
    queues.push_back({work.columns, width, {ceil_divide(work.columns, width)}});
  }
  parallel_for(workers, 1, [&](int64_t, int64_t) {
    for (size_t w = 0; w < works.size(); ++w) works[w].kernel(queues[w]);
  });
}

// Rows of one block, a multiple of kRowStep, of blocks about as large as each other. Their hidden rows take
// 12 MB where `least` allows, which last-level caches hold.
inline int64_t block_rows(int64_t rows, int64_t F, int64_t operand_size, int64_t least) {
  constexpr int64_t kHiddenBytes = int64_t{12} << 20;
  constexpr int64_t kMost = 1536;
  const int64_t most = std::clamp(kHiddenBytes / (F * operand_size), least, kMost);
  return round_up(ceil_divide(rows, std::max<int64_t>(1, ceil_divide(rows, most))), kRowStep);
}

inline RowMatrix rows_of(const RowMatrix& matrix, int64_t first, int64_t count, DType dtype) {
  RowMatrix block = matrix;
  block.data = static_cast<const char*>(matrix.data) + first * matrix.row_stride * size_of(dtype);
  block.rows = count;
  return block;
}

// `elements` further on; null stays null.
template <typename Pointer>
Pointer advance(Pointer data, int64_t elements, DType dtype) {
  return data ? (char*)data + elements * size_of(dtype) : nullptr;
}

inline void pack_operands(const RowMatrix& matrix, DType dtype, int64_t padded_rows, void* operands,
                          int64_t stride) {
  parallel_for(matrix.rows, kElementsPerThread / matrix.columns, [&](int64_t begin, int64_t end) {
    kernels().feed_forward.pack_rows(matrix, dtype, padded_rows, operands, stride, begin, end);
  });
}

}  // namespace fastformer::cpu
