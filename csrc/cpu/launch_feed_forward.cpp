// feed_forward_fwd_cpu: from tensors to the plain struct of shapes.h, and the division of work over threads.
#include "launch_feed_forward.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "launch.h"
#include "parallel.h"
#include "tensors.h"

namespace fastformer::cpu {
namespace {

// The hidden rows of one block: 12 MB, which last-level caches hold.
constexpr int64_t kHiddenBytes = int64_t{12} << 20;
constexpr int64_t kLeastBlockRows = 192, kMostBlockRows = 1536;
// A multiple of every level's row step.
constexpr int64_t kRowStep = 4;
// A multiple of 32, the period of the dropout map, and of every level's panel.
constexpr int64_t kColumnStep = 32;

int64_t round_up(int64_t a, int64_t b) { return ceil_divide(a, b) * b; }

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
  Bias(const std::optional<Tensor>& bias, int64_t size, const char* name) {
    if (!bias) return;
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == size, name, " has the wrong shape");
    row = bias->is_contiguous() ? *bias : torch::stable::contiguous(*bias);
    if (dtype_of(*row) == DType::kFloat32) {
      data = row->const_data_ptr<float>();
    } else {
      converted.resize(size);
      kernels().norm.to_float32(row->const_data_ptr(), dtype_of(*row), converted.data(), size);
      data = converted.data();
    }
  }
  Bias(const Bias&) = delete;

  std::optional<Tensor> row;
  std::vector<float> converted;
  const float* data = nullptr;
};

Activation activation_named(const std::string& name) {
  if (name == "relu") return Activation::kRelu;
  if (name == "gelu") return Activation::kGelu;
  if (name == "gelu_tanh") return Activation::kGeluTanh;
  if (name == "silu") return Activation::kSilu;
  STD_TORCH_CHECK(name == "relu2", "unknown activation ", name);
  return Activation::kRelu2;
}

// Columns in steps of kColumnStep over the threads. products: for one column.
template <typename Kernel>
void over_columns(int64_t columns, int64_t products, Kernel kernel) {
  const int64_t grain =
      std::max<int64_t>(1, kProductsPerThread / std::max<int64_t>(1, products * kColumnStep));
  parallel_for(ceil_divide(columns, kColumnStep), grain, [&](int64_t begin, int64_t end) {
    kernel(begin * kColumnStep, std::min(end * kColumnStep, columns));
  });
}

void run_block(const FeedForwardFwd& call) {
  const int64_t row_grain = std::max<int64_t>(1, kElementsPerThread / call.E);
  parallel_for(call.rows, row_grain,
               [&](int64_t begin, int64_t end) { kernels().feed_forward.pack(call, begin, end); });
  const int64_t products = call.rows * call.E * (call.w_gate.data ? 2 : 1);
  over_columns(call.F, products,
               [&](int64_t begin, int64_t end) { kernels().feed_forward.hidden(call, begin, end); });
  over_columns(call.E_out, call.rows * call.F,
               [&](int64_t begin, int64_t end) { kernels().feed_forward.output(call, begin, end); });
}

void* advance(void* data, int64_t elements, DType dtype) {
  return data ? static_cast<char*>(data) + elements * size_of(dtype) : nullptr;
}

// Block by block; `call` describes all rows.
void run(const FeedForwardFwd& call) {
  const int64_t rows = call.rows;
  const int64_t operand_size = kernels().feed_forward.operand_size(call.dtype);
  const int64_t line = 64 / operand_size;
  const int64_t most = std::clamp(kHiddenBytes / (call.F * operand_size), kLeastBlockRows, kMostBlockRows);
  const int64_t block_rows =
      round_up(ceil_divide(rows, std::max<int64_t>(1, ceil_divide(rows, most))), kRowStep);
  FeedForwardFwd block = call;
  // Rows of x and of the hidden block stand a cache line off a power of two, or a tile's rows would share a
  // cache set.
  block.x_stride = round_up(call.E, line) + line;
  block.hidden_stride = round_up(call.F, kColumnStep) + line;
  const int64_t x_bytes = block_rows * block.x_stride * operand_size;
  const int64_t hidden_bytes = block_rows * block.hidden_stride * operand_size;
  const Tensor scratch = empty({(x_bytes + hidden_bytes) / size_of(DType::kFloat32)}, DType::kFloat32);
  block.x_operands = scratch.mutable_data_ptr();
  block.hidden = static_cast<char*>(block.x_operands) + x_bytes;
  for (int64_t row = 0; row < rows; row += block_rows) {
    block.first_row = row;
    block.rows = std::min(block_rows, rows - row);
    block.padded_rows = round_up(block.rows, kRowStep);
    block.x = static_cast<const char*>(call.x) + row * call.x_row_stride * size_of(call.dtype);
    block.out = advance(call.out, row * call.E_out, call.dtype);
    block.pre = advance(call.pre, row * call.F, call.dtype);
    block.pre_gate = advance(call.pre_gate, row * call.F, call.dtype);
    run_block(block);
  }
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> feed_forward_fwd(
    const Tensor& x, const Tensor& w1, const std::optional<Tensor>& b1, const std::optional<Tensor>& w_gate,
    const std::optional<Tensor>& b_gate, const Tensor& w2, const std::optional<Tensor>& b2,
    const std::optional<Tensor>& seed, const std::string& activation, double dropout_p, bool save_pre) {
  STD_TORCH_CHECK(x.dim() >= 1 && w1.dim() == 2 && w2.dim() == 2,
                  "x must be [..., E], w1 [F, E] and w2 [E_out, F]");
  FeedForwardFwd call{};
  call.dtype = dtype_of(x);
  call.activation = activation_named(activation);
  call.E = x.size(x.dim() - 1);
  call.F = w1.size(0);
  call.E_out = w2.size(0);
  STD_TORCH_CHECK(call.E >= 1 && call.F >= 1 && call.E_out >= 1, "E, F and E_out must be at least 1");
  call.rows = x.numel() / call.E;
  call.dropout = dropout_of(dropout_p, seed);

  const Tensor x_rows = row_stride(x) ? x : torch::stable::contiguous(x);
  call.x = x_rows.const_data_ptr();
  call.x_row_stride = *row_stride(x_rows);
  const WeightRows w1_rows(w1, call.F, call.E, call.dtype, "w1"),
      w2_rows(w2, call.E_out, call.F, call.dtype, "w2");
  std::optional<WeightRows> w_gate_rows;
  if (w_gate) w_gate_rows.emplace(*w_gate, call.F, call.E, call.dtype, "w_gate");
  call.w1 = w1_rows.view;
  call.w2 = w2_rows.view;
  if (w_gate_rows) call.w_gate = w_gate_rows->view;
  const Bias b1_row(b1, call.F, "b1"), b_gate_row(b_gate, call.F, "b_gate"), b2_row(b2, call.E_out, "b2");
  call.b1 = b1_row.data;
  call.b_gate = b_gate_row.data;
  call.b2 = b2_row.data;

  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  const std::vector<int64_t> none{0};
  sizes.back() = call.E_out;
  Tensor out = empty(sizes, call.dtype);
  sizes.back() = call.F;
  Tensor pre = empty(save_pre ? sizes : none, call.dtype);
  Tensor pre_gate = empty(save_pre && w_gate ? sizes : none, call.dtype);
  call.out = out.mutable_data_ptr();
  call.pre = save_pre ? pre.mutable_data_ptr() : nullptr;
  call.pre_gate = save_pre && w_gate ? pre_gate.mutable_data_ptr() : nullptr;
  run(call);
  return {out, pre, pre_gate};
}

}  // namespace fastformer::cpu
