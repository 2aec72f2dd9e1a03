// feed_forward_fwd_cpu: from tensors to the plain struct of shapes.h, and the division of work over threads.
#include "launch_feed_forward.h"

#include <algorithm>
#include <vector>

#include "feed_forward_call.h"

namespace fastformer::cpu {
namespace {

constexpr int64_t kLeastBlockRows = 192;

void run_block(const FeedForwardFwd& call, const RowMatrix& x) {
  pack_operands(x, call.dtype, call.padded_rows, call.x_operands, call.x_stride);
  const int64_t products = call.rows * call.E * (call.w_gate.data ? 2 : 1);
  const FeedForwardKernels& kernel = kernels().feed_forward;
  over_columns({{call.F, products, [&](ColumnQueue& queue) { kernel.hidden(call, queue); }}});
  over_columns({{call.E_out, call.rows * call.F, [&](ColumnQueue& queue) { kernel.output(call, queue); }}});
}

// Block by block; `call` describes all rows.
void run(const FeedForwardFwd& call, const RowMatrix& x) {
  const int64_t operand_size = kernels().feed_forward.operand_size(call.dtype);
  const int64_t line = 64 / operand_size;
  const int64_t step = block_rows(call.rows, call.F, operand_size, kLeastBlockRows);
  FeedForwardFwd block = call;
  // Rows of x and of the hidden block stand a cache line off a power of two, or a tile's rows would share a
  // cache set.
  block.x_stride = round_up(call.E, line) + line;
  block.hidden_stride = round_up(call.F, kColumnStep) + line;
  const int64_t x_bytes = step * block.x_stride * operand_size;
  const int64_t hidden_bytes = step * block.hidden_stride * operand_size;
  const Tensor scratch = empty({(x_bytes + hidden_bytes) / size_of(DType::kFloat32)}, DType::kFloat32);
  block.x_operands = scratch.mutable_data_ptr();
  block.hidden = static_cast<char*>(block.x_operands) + x_bytes;
  for (int64_t row = 0; row < call.rows; row += step) {
    block.first_row = row;
    block.rows = std::min(step, call.rows - row);
    block.padded_rows = round_up(block.rows, kRowStep);
    block.out = advance(call.out, row * call.E_out, call.dtype);
    block.pre = advance(call.pre, row * call.F, call.dtype);
    block.pre_gate = advance(call.pre_gate, row * call.F, call.dtype);
    run_block(block, rows_of(x, row, block.rows, call.dtype));
  }
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> feed_forward_fwd(FASTFORMER_FEED_FORWARD_PARAMETERS, bool save_pre) {
  STD_TORCH_CHECK(x.dim() >= 1 && w1.dim() == 2 && w2.dim() == 2,
                  "x must be [..., E], w1 [F, E] and w2 [E_out, F]");
  FeedForwardFwd call{};
  call.dtype = dtype_of(x);
  call.activation = activation_named(activation);
  call.E = x.size(x.dim() - 1);
  call.F = w1.size(0);
  call.E_out = w2.size(0);
  STD_TORCH_CHECK(call.E >= 1 && call.F >= 1 && call.E_out >= 1, "E, F and E_out must be at least 1");
  const TensorRows x_rows(x, call.E);
  call.rows = x_rows.view.rows;
  call.dropout = dropout_of(dropout_p, seed);

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
  run(call, x_rows.view);
  return {out, pre, pre_gate};
}

}  // namespace fastformer::cpu
