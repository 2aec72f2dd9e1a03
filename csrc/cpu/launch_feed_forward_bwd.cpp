// feed_forward_bwd_cpu: from tensors to the plain structs of shapes.h, and the division of work over threads.
#include <algorithm>
#include <cstring>
#include <vector>

#include "feed_forward_call.h"
#include "launch_feed_forward.h"

namespace fastformer::cpu {
namespace {

// Deep enough for what a block adds to a weight's gradient to cost little beside its products.
constexpr int64_t kLeastBlockRows = 768;

// The gradient of a weight [M, N], and its sums over blocks where it cannot hold them itself.
struct WeightGrad {
  WeightGrad(bool need, int64_t M, int64_t N, int64_t rows, DType dtype)
      : tensor(need ? empty({M, N}, dtype) : empty({0}, dtype)) {
    gradient.M = M;
    gradient.dtype = dtype;
    if (!need) return;
    gradient.dw = tensor.mutable_data_ptr();
    if (rows == 0) std::memset(gradient.dw, 0, M * N * size_of(dtype));
    if (dtype == DType::kFloat32) {
      gradient.sums = static_cast<float*>(gradient.dw);
    } else if (rows > kDepthBlock) {
      sums = empty({M, N}, DType::kFloat32);
      gradient.sums = static_cast<float*>(sums->mutable_data_ptr());
    }
  }

  Tensor tensor;
  std::optional<Tensor> sums;
  WeightGradient gradient{};
};

// The gradient of a bias, a sum over all rows.
struct BiasGrad {
  BiasGrad(bool need, int64_t size) : sums(need ? size : 0) {}

  double* data() { return sums.empty() ? nullptr : sums.data(); }

  Tensor result(DType dtype) const {
    const int64_t size = static_cast<int64_t>(sums.size());
    Tensor tensor = empty({size}, dtype);
    kernels().feed_forward.from_float64(sums.data(), dtype, tensor.mutable_data_ptr(), size);
    return tensor;
  }

  std::vector<double> sums;
};

struct Gradients {
  Tensor dx;
  WeightGrad w1, w_gate, w2;
  BiasGrad b1, b_gate, b2;
};

// Parts of one allocation, each on a cache line of its own.
class Parts {
 public:
  template <typename Pointer>
  void want(bool wanted, Pointer* part, int64_t bytes) {
    if (!wanted) return;
    parts_.push_back({reinterpret_cast<void**>(part), total_});
    total_ += round_up(bytes, 64);
  }

  Tensor allocate() const {
    Tensor tensor = empty({total_ / size_of(DType::kFloat32)}, DType::kFloat32);
    for (const auto& [part, offset] : parts_) *part = static_cast<char*>(tensor.mutable_data_ptr()) + offset;
    return tensor;
  }

 private:
  std::vector<std::pair<void**, int64_t>> parts_;
  int64_t total_ = 0;
};

// What a block's weight gradients read of grad_out: its transpose, and its columns' sums.
void read_grad_columns(const FeedForwardBwd& call, const RowMatrix& grad_out, void* grad_columns,
                       double* db2) {
  if (!grad_columns && !db2) return;
  const FeedForwardKernels& kernel = kernels().feed_forward;
  const int64_t grain = kElementsPerThread / (kColumnStep * call.rows);
  parallel_for(ceil_divide(call.E_out, kColumnStep), grain, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kColumnStep, past = std::min(end * kColumnStep, call.E_out);
    if (grad_columns) {
      kernel.pack_transposed(grad_out, call.dtype, grad_columns, call.columns_stride, first, past);
    }
    if (db2) kernel.column_sums(grad_out, call.dtype, db2, first, past);
  });
}

void run_block(const FeedForwardBwd& call, const RowMatrix& grad_out, const RowMatrix& x, void* grad_columns,
               Gradients& gradients, bool first, bool last) {
  const FeedForwardKernels& kernel = kernels().feed_forward;
  const bool gated = call.w_gate.data, recompute = call.x_operands;
  if (call.grad_operands) {
    pack_operands(grad_out, call.dtype, call.padded_rows, call.grad_operands, call.grad_stride);
  }
  if (recompute) pack_operands(x, call.dtype, call.padded_rows, call.x_operands, call.x_stride);
  read_grad_columns(call, grad_out, grad_columns, gradients.b2.data());
  if (call.grad_operands || call.hidden) {
    const int64_t depth = (call.grad_operands ? call.E_out : 0) + (recompute ? call.E * (gated ? 2 : 1) : 0);
    over_columns(
        {{call.F, call.rows * (depth + 1), [&](ColumnQueue& queue) { kernel.hidden_bwd(call, queue); }}});
  }
  std::vector<ColumnWork> works;
  if (call.dx) {
    works.push_back({call.E, call.rows * call.F * (gated ? 2 : 1),
                     [&](ColumnQueue& queue) { kernel.input_bwd(call, queue); }});
  }
  const auto add = [&](const WeightGrad& weight, const void* left, const RowMatrix& right) {
    WeightGradient gradient = weight.gradient;
    if (!gradient.dw) return;
    gradient.left = left;
    gradient.left_stride = call.columns_stride;
    gradient.right = right;
    gradient.first = first;
    gradient.last = last;
    works.push_back({right.columns, right.rows * gradient.M,
                     [&kernel, gradient](ColumnQueue& queue) { kernel.weight_bwd(gradient, queue); }});
  };
  add(gradients.w2, grad_columns, {call.hidden, call.hidden_stride, call.rows, call.F, true});
  add(gradients.w1, call.dpre_columns, x);
  add(gradients.w_gate, call.dgate_columns, x);
  if (!works.empty()) over_columns(works);
}

// Block by block; `call` and the matrices describe all rows.
void run(const FeedForwardBwd& call, const RowMatrix& grad_out, const RowMatrix& x, Gradients& gradients) {
  const int64_t operand_size = kernels().feed_forward.operand_size(call.dtype);
  const int64_t line = 64 / operand_size;
  const int64_t step = block_rows(call.rows, call.F, operand_size, kLeastBlockRows);
  const bool gated = call.w_gate.data, recompute = !call.pre;
  const bool need_w1 = gradients.w1.gradient.dw, need_w_gate = gradients.w_gate.gradient.dw;
  const bool need_w2 = gradients.w2.gradient.dw;
  const bool need_dpre = call.dx || need_w1, need_dgate = gated && (call.dx || need_w_gate);
  const bool need_grad = need_dpre || need_dgate || call.db1 || call.db_gate;

  FeedForwardBwd block = call;
  // Rows stand a cache line off a power of two, or a tile's rows would share a cache set.
  block.grad_stride = round_up(call.E_out, line) + line;
  block.x_stride = round_up(call.E, line) + line;
  block.hidden_stride = round_up(call.F, kColumnStep) + line;
  block.columns_stride = round_up(step, kColumnStep) + line;
  const auto columns_bytes = [&](int64_t columns) {
    return round_up(columns, kRowStep) * block.columns_stride * operand_size;
  };
  const int64_t hidden_bytes = step * block.hidden_stride * operand_size;
  Parts parts;
  parts.want(need_grad, &block.grad_operands, step * block.grad_stride * operand_size);
  parts.want(recompute && (need_grad || need_w2), &block.x_operands, step * block.x_stride * operand_size);
  parts.want(need_w2, &block.hidden, hidden_bytes);
  parts.want(need_dpre, &block.dpre, hidden_bytes);
  parts.want(need_dgate, &block.dgate, hidden_bytes);
  void* grad_columns = nullptr;
  parts.want(need_w2, &grad_columns, columns_bytes(call.E_out));
  parts.want(need_w1, &block.dpre_columns, columns_bytes(call.F));
  parts.want(need_w_gate, &block.dgate_columns, columns_bytes(call.F));
  const Tensor scratch = parts.allocate();

  for (int64_t row = 0; row < call.rows; row += step) {
    block.first_row = row;
    block.rows = std::min(step, call.rows - row);
    block.padded_rows = round_up(block.rows, kRowStep);
    block.pre = advance(call.pre, row * call.F, call.dtype);
    block.pre_gate = advance(call.pre_gate, row * call.F, call.dtype);
    block.dx = advance(call.dx, row * call.E, call.dtype);
    run_block(block, rows_of(grad_out, row, block.rows, call.dtype), rows_of(x, row, block.rows, call.dtype),
              grad_columns, gradients, row == 0, row + step >= call.rows);
  }
}

// What forward saved, [..., F]; nothing where it is to be computed again.
std::optional<Tensor> saved_rows(const Tensor& saved, int64_t rows, int64_t F, DType dtype,
                                 const char* name) {
  if (saved.numel() == 0) return std::nullopt;
  STD_TORCH_CHECK(saved.numel() == rows * F && dtype_of(saved) == dtype, name, " is not what forward saved");
  return saved.is_contiguous() ? saved : torch::stable::contiguous(saved);
}

}  // namespace

FeedForwardGradients feed_forward_bwd(const Tensor& grad_out, const Tensor& pre, const Tensor& pre_gate,
                                      FASTFORMER_FEED_FORWARD_PARAMETERS, bool need_x, bool need_w1,
                                      bool need_b1, bool need_w_gate, bool need_b_gate, bool need_w2,
                                      bool need_b2) {
  STD_TORCH_CHECK(x.dim() >= 1 && w1.dim() == 2 && w2.dim() == 2,
                  "x must be [..., E], w1 [F, E] and w2 [E_out, F]");
  FeedForwardBwd call{};
  const DType dtype = call.dtype = dtype_of(x);
  call.activation = activation_named(activation);
  const int64_t E = call.E = x.size(x.dim() - 1), F = call.F = w1.size(0), E_out = call.E_out = w2.size(0);
  STD_TORCH_CHECK(E >= 1 && F >= 1 && E_out >= 1, "E, F and E_out must be at least 1");
  const TensorRows x_rows(x, E);
  const int64_t rows = call.rows = x_rows.view.rows;
  STD_TORCH_CHECK(grad_out.dim() == x.dim() && grad_out.size(x.dim() - 1) == E_out &&
                      grad_out.numel() == rows * E_out && dtype_of(grad_out) == dtype,
                  "grad_out must be [..., E_out] with the leading sizes and the dtype of x");
  const TensorRows grad_rows(grad_out, E_out);
  call.dropout = dropout_of(dropout_p, seed);

  const WeightRows w1_rows(w1, F, E, dtype, "w1"), w2_rows(w2, E_out, F, dtype, "w2");
  std::optional<WeightRows> w_gate_rows;
  if (w_gate) w_gate_rows.emplace(*w_gate, F, E, dtype, "w_gate");
  call.w1 = w1_rows.view;
  call.w2 = w2_rows.view;
  if (w_gate_rows) call.w_gate = w_gate_rows->view;
  const Bias b1_row(b1, F, "b1"), b_gate_row(b_gate, F, "b_gate");
  call.b1 = b1_row.data;
  call.b_gate = b_gate_row.data;
  const std::optional<Tensor> pre_rows = saved_rows(pre, rows, F, dtype, "pre");
  const std::optional<Tensor> pre_gate_rows = saved_rows(pre_gate, rows, F, dtype, "pre_gate");
  STD_TORCH_CHECK(pre_gate_rows.has_value() == (pre_rows.has_value() && w_gate.has_value()),
                  "pre_gate must be given where pre and w_gate are, and only there");
  if (pre_rows) call.pre = pre_rows->const_data_ptr();
  if (pre_gate_rows) call.pre_gate = pre_gate_rows->const_data_ptr();

  Gradients gradients{
      .dx = need_x ? empty(x.sizes(), dtype) : empty({0}, dtype),
      .w1 = WeightGrad(need_w1, F, E, rows, dtype),
      .w_gate = WeightGrad(need_w_gate && w_gate, F, E, rows, dtype),
      .w2 = WeightGrad(need_w2, E_out, F, rows, dtype),
      .b1 = BiasGrad(need_b1 && b1, F),
      .b_gate = BiasGrad(need_b_gate && b_gate, F),
      .b2 = BiasGrad(need_b2 && b2, E_out),
  };
  if (need_x) call.dx = gradients.dx.mutable_data_ptr();
  call.db1 = gradients.b1.data();
  call.db_gate = gradients.b_gate.data();
  run(call, grad_rows.view, x_rows.view, gradients);
  return {gradients.dx,
          gradients.w1.tensor,
          gradients.b1.result(dtype),
          gradients.w_gate.tensor,
          gradients.b_gate.result(dtype),
          gradients.w2.tensor,
          gradients.b2.result(dtype)};
}

}  // namespace fastformer::cpu
