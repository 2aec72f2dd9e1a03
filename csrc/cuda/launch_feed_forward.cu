// Runs feed_forward's products, one after another, as feed_forward_plan.h plans each. The upper half knows no
// torch, and is all that the device passes of nvcc see: torch's headers are parsed once instead of once for
// each architecture, and the tests compile this file to PTX by itself.
#include <cuda_runtime.h>

#include "feed_forward.cuh"

namespace fastformer::cuda {

using FeedForwardKernel = void (*)(GemmParams);

template <DType kType>
FeedForwardKernel kernel_of(GemmKernel kernel) {
  switch (kernel) {
    case GemmKernel::kHidden:
      return feed_forward_kernel<kType, GemmKernel::kHidden>;
    case GemmKernel::kLinear:
      return feed_forward_kernel<kType, GemmKernel::kLinear>;
    case GemmKernel::kHiddenGradient:
      return feed_forward_kernel<kType, GemmKernel::kHiddenGradient>;
    case GemmKernel::kInputGradient:
      return feed_forward_kernel<kType, GemmKernel::kInputGradient>;
    case GemmKernel::kWeightGradient:
      return feed_forward_kernel<kType, GemmKernel::kWeightGradient>;
  }
  return nullptr;
}

cudaError_t launch(GemmKernel kernel, const GemmPlan& plan, const GemmParams& p, cudaStream_t stream) {
  const FeedForwardKernel chosen = p.dtype == DType::kFloat32    ? kernel_of<DType::kFloat32>(kernel)
                                   : p.dtype == DType::kBFloat16 ? kernel_of<DType::kBFloat16>(kernel)
                                                                 : kernel_of<DType::kFloat16>(kernel);
  chosen<<<plan.grid, plan.threads, plan.shared_bytes, stream>>>(p);
  return cudaGetLastError();
}

cudaError_t launch(const ColumnSumsPlan& plan, const ColumnSumsParams& p, cudaStream_t stream) {
  const dim3 grid(plan.grid_x, plan.grid_y), block(plan.block_x, plan.block_y);
  column_sums_kernel<kSumLines><<<grid, block, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace fastformer::cuda

#if !defined(__CUDA_ARCH__)
#include "launch.h"
#include "tensors.h"

namespace fastformer::cuda {

namespace {

int32_t checked_size(int64_t size, const char* name) {
  STD_TORCH_CHECK(size <= kMostGemmSize, "feed_forward with ", name, " = ", size, " is not served by cuda");
  return static_cast<int32_t>(size);
}

// A matrix's rows as a product's operand.
GemmOperand operand_of(const Rows& rows) { return {rows.data(), rows.stride}; }

// The tensors of a call as products read them, checked. Owns the copies of those that cannot be read in
// place, so it lives until the kernels are launched.
struct FeedForwardCall {
  explicit FeedForwardCall(const FeedForwardArguments& given)
      : dtype(dtype_of(given.x, "x")), x(given.x), w1(given.w1), w2(given.w2), w_gate(given.w_gate) {
    STD_TORCH_CHECK(x.dim() >= 1 && w1.dim() == 2 && w2.dim() == 2,
                    "x must be [..., E], w1 [F, E] and w2 [E_out, F]");
    int64_t count = 1;
    for (int64_t d = 0; d + 1 < x.dim(); ++d) count *= x.size(d);
    rows = checked_size(count, "rows");
    E = checked_size(x.size(x.dim() - 1), "E");
    F = checked_size(w1.size(0), "F");
    E_out = checked_size(w2.size(0), "E_out");
    STD_TORCH_CHECK(w_gate.has_value() || !given.b_gate.has_value(), "b_gate came without w_gate");
    x_rows = rows_of(x);
    w1_rows = weight(w1, F, E, "w1");
    w2_rows = weight(w2, E_out, F, "w2");
    if (w_gate) gate_rows = weight(*w_gate, F, E, "w_gate");
    b1 = bias(given.b1, F, "b1");
    b_gate = bias(given.b_gate, F, "b_gate");
    b2 = bias(given.b2, E_out, "b2");
    set_dropout(common, given.dropout_p, given.seed);
    common.activation = activation_named(given.activation);
    common.dtype = dtype;
  }
  FeedForwardCall(const FeedForwardCall&) = delete;

  // x's leading sizes, and `columns`.
  std::vector<int64_t> sizes(int64_t columns) const {
    std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
    sizes.back() = columns;
    return sizes;
  }

  GemmParams product(int32_t M, int32_t N, int32_t K) const {
    GemmParams p = common;
    p.M = M;
    p.N = N;
    p.K = K;
    return p;
  }

  // kHidden without its results.
  GemmParams hidden_product() const {
    GemmParams p = product(rows, F, E);
    p.a = operand_of(*x_rows);
    p.b = operand_of(*w1_rows);
    p.gated = gate_rows.has_value();
    if (gate_rows) p.gate = operand_of(*gate_rows);
    if (b1) p.bias = b1->const_data_ptr();
    if (b_gate) p.gate_bias = b_gate->const_data_ptr();
    return p;
  }

  DType dtype;
  Tensor x, w1, w2;
  std::optional<Tensor> w_gate;
  std::optional<Rows> x_rows, w1_rows, w2_rows, gate_rows;
  std::optional<Tensor> b1, b_gate, b2;
  int32_t rows, E, F, E_out;
  GemmParams common{};

 private:
  void check_dtype(const Tensor& tensor, const char* name) const {
    STD_TORCH_CHECK(dtype_of(tensor, name) == dtype, name, " must have the dtype of x");
  }

  Rows weight(const Tensor& tensor, int64_t size, int64_t columns, const char* name) const {
    STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == size && tensor.size(1) == columns, name,
                    " must be [", size, ", ", columns, "]");
    check_dtype(tensor, name);
    return rows_of(tensor);
  }

  std::optional<Tensor> bias(const std::optional<Tensor>& tensor, int64_t size, const char* name) const {
    if (tensor) check_dtype(*tensor, name);
    return row_parameter(tensor, size, name);
  }
};

// Launches on one stream; what is allocated here may be freed once its kernels are launched, because torch's
// allocator hands memory on in the order of the stream.
struct Launcher {
  const Tensor& like;
  const OnDevice& device;
  DType dtype;

  Tensor empty(const std::vector<int64_t>& sizes, ScalarType type) const {
    return empty_on(like, IntHeaderOnlyArrayRef(sizes.data(), sizes.size()), type);
  }

  // Of the call's dtype; nothing where it is not wanted.
  Tensor empty_if(bool wanted, const std::vector<int64_t>& sizes) const {
    return empty(wanted ? sizes : std::vector<int64_t>{0}, scalar_type_of(dtype));
  }

  // What `p` asks of `kernel`; where k is divided, the parts are added.
  void multiply(GemmKernel kernel, GemmParams p) const {
    const GemmPlan plan = plan_gemm(kernel, p, device.multiprocessors());
    STD_TORCH_CHECK(int64_t{p.tiles_m} * p.tiles_n * plan.parts < int64_t{1} << 31, "feed_forward of ", p.M,
                    " x ", p.N, " elements is not served by cuda");
    if (plan.grid == 0) return;
    const int64_t size = int64_t{p.M} * p.N;
    Tensor parts = empty({plan.parts > 1 ? plan.parts * size : 0}, ScalarType::Float);
    if (plan.parts > 1) p.parts = static_cast<float*>(parts.mutable_data_ptr());
    check_launched(launch(kernel, plan, p, device.stream()), name_of(kernel));
    if (plan.parts > 1) add_rows({p.parts, p.out, size, plan.parts, size, 0, DType::kFloat32, dtype});
  }

  // The sums of a matrix's columns, in one stage or two.
  void add_rows(ColumnSumsParams p) const {
    if (p.columns == 0) return;
    const ColumnSumsPlan plan = plan_column_sums(p);
    if (plan.grid_y == 1) return run(plan, p);
    Tensor shares = empty({plan.grid_y * p.columns}, ScalarType::Float);
    const ColumnSumsParams last = {shares.const_data_ptr(), p.out,      p.columns, plan.grid_y, p.columns, 0,
                                   DType::kFloat32,         p.out_dtype};
    p.out = shares.mutable_data_ptr();
    p.out_dtype = DType::kFloat32;
    run(plan, p);
    add_rows(last);
  }

 private:
  void run(const ColumnSumsPlan& plan, const ColumnSumsParams& p) const {
    check_launched(launch(plan, p, device.stream()), "column_sums_kernel");
  }
};

// pre or pre_gate as forward saved it, contiguous.
Tensor saved_rows(const Tensor& saved, const FeedForwardCall& call, const char* name) {
  STD_TORCH_CHECK(saved.numel() == int64_t{call.rows} * call.F && dtype_of(saved, name) == call.dtype, name,
                  " is not what forward saved");
  return saved.is_contiguous() ? saved : torch::stable::contiguous(saved);
}

// What backward wants of hidden rows, and then has: each is empty where it is not wanted.
struct HiddenResults {
  Tensor hidden, dpre, dgate;    // [rows, F]
  Tensor dpre_sums, dgate_sums;  // float32 [tiles of rows, F]

  HiddenResults(const Launcher& launcher, const FeedForwardCall& call, bool want_hidden, bool want_dpre,
                bool want_dgate, bool want_dpre_sums, bool want_dgate_sums)
      : hidden(launcher.empty_if(want_hidden, {call.rows, call.F})),
        dpre(launcher.empty_if(want_dpre, {call.rows, call.F})),
        dgate(launcher.empty_if(want_dgate, {call.rows, call.F})),
        dpre_sums(launcher.empty({want_dpre_sums ? tiles_of(call) : 0, call.F}, ScalarType::Float)),
        dgate_sums(launcher.empty({want_dgate_sums ? tiles_of(call) : 0, call.F}, ScalarType::Float)),
        multiplies(want_dpre || want_dgate || want_dpre_sums || want_dgate_sums),
        any(multiplies || want_hidden) {}

  static int64_t tiles_of(const FeedForwardCall& call) { return ceil_div(call.rows, kGemmBlock); }

  // kHiddenGradient, with pre and pre_gate as forward saved them, or, where those are empty, computed again.
  void compute(const Launcher& launcher, const FeedForwardCall& call, const Rows& grad_rows,
               const Tensor& pre, const Tensor& pre_gate) {
    if (!any) return;
    const bool gated = call.w_gate.has_value(), again = pre.numel() == 0;
    const std::vector<int64_t> sizes{call.rows, call.F};
    Tensor pre_rows = again ? launcher.empty_if(true, sizes) : saved_rows(pre, call, "pre");
    Tensor gate_rows =
        again || !gated ? launcher.empty_if(gated, sizes) : saved_rows(pre_gate, call, "pre_gate");
    GemmParams p = call.hidden_product();
    p.pre = pre_rows.mutable_data_ptr();
    if (gated) p.pre_gate = gate_rows.mutable_data_ptr();
    if (again) launcher.multiply(GemmKernel::kHidden, p);

    GemmParams q = call.product(call.rows, call.F, multiplies ? call.E_out : 0);
    q.a = operand_of(grad_rows);
    q.b = operand_of(*call.w2_rows);
    q.pre = p.pre;
    q.pre_gate = p.pre_gate;
    q.out = data_of(hidden);
    q.dpre = data_of(dpre);
    q.dgate = data_of(dgate);
    q.dpre_sums = static_cast<float*>(data_of(dpre_sums));
    q.dgate_sums = static_cast<float*>(data_of(dgate_sums));
    launcher.multiply(GemmKernel::kHiddenGradient, q);
  }

 private:
  static void* data_of(Tensor& tensor) { return tensor.numel() == 0 ? nullptr : tensor.mutable_data_ptr(); }

  const bool multiplies, any;
};

// The gradient of a bias: sums over the rows of a contiguous float32 [tiles, columns].
void add_tiles(const Launcher& launcher, const Tensor& tiles, Tensor& grad) {
  if (grad.numel() == 0) return;
  launcher.add_rows({tiles.const_data_ptr(), grad.mutable_data_ptr(), tiles.size(1), tiles.size(0),
                     tiles.size(1), 0, DType::kFloat32, launcher.dtype});
}

}  // namespace

ThreeTensors feed_forward_fwd(FASTFORMER_FEED_FORWARD_PARAMETERS, bool save_pre) {
  const OnDevice device(x);
  const FeedForwardCall call(FASTFORMER_FEED_FORWARD_ARGUMENTS);
  const Launcher launcher{x, device, call.dtype};
  Tensor out = launcher.empty_if(true, call.sizes(call.E_out));
  Tensor pre = launcher.empty_if(save_pre, call.sizes(call.F));
  Tensor pre_gate = launcher.empty_if(save_pre && w_gate.has_value(), call.sizes(call.F));
  Tensor hidden = launcher.empty_if(true, {call.rows, call.F});

  GemmParams p = call.hidden_product();
  p.out = hidden.mutable_data_ptr();
  if (save_pre) p.pre = pre.mutable_data_ptr();
  if (save_pre && w_gate) p.pre_gate = pre_gate.mutable_data_ptr();
  launcher.multiply(GemmKernel::kHidden, p);

  p = call.product(call.rows, call.E_out, call.F);
  p.a = {hidden.const_data_ptr(), call.F};
  p.b = operand_of(*call.w2_rows);
  if (call.b2) p.bias = call.b2->const_data_ptr();
  p.out = out.mutable_data_ptr();
  launcher.multiply(GemmKernel::kLinear, p);
  return {out, pre, pre_gate};
}

FeedForwardGradients feed_forward_bwd(const Tensor& grad_out, const Tensor& pre, const Tensor& pre_gate,
                                      FASTFORMER_FEED_FORWARD_PARAMETERS, bool need_x, bool need_w1,
                                      bool need_b1, bool need_w_gate, bool need_b_gate, bool need_w2,
                                      bool need_b2) {
  const OnDevice device(x);
  const FeedForwardCall call(FASTFORMER_FEED_FORWARD_ARGUMENTS);
  const Launcher launcher{x, device, call.dtype};
  const int64_t rows = call.rows, E = call.E, F = call.F, E_out = call.E_out;
  STD_TORCH_CHECK(grad_out.dim() == x.dim() && grad_out.size(x.dim() - 1) == E_out &&
                      grad_out.numel() == rows * E_out && dtype_of(grad_out, "grad_out") == call.dtype,
                  "grad_out must be [..., E_out] with the leading sizes and the dtype of x");
  const Rows grad_rows = rows_of(grad_out);
  const bool gated = w_gate.has_value();
  Tensor dx = launcher.empty_if(need_x, call.sizes(E));
  Tensor dw1 = launcher.empty_if(need_w1, {F, E}), dw2 = launcher.empty_if(need_w2, {E_out, F});
  Tensor dw_gate = launcher.empty_if(need_w_gate && gated, {F, E});
  Tensor db1 = launcher.empty_if(need_b1 && b1, {F}), db2 = launcher.empty_if(need_b2 && b2, {E_out});
  Tensor db_gate = launcher.empty_if(need_b_gate && b_gate, {F});
  HiddenResults made(launcher, call, need_w2, need_x || need_w1, gated && (need_x || need_w_gate),
                     db1.numel() > 0, db_gate.numel() > 0);
  made.compute(launcher, call, grad_rows, pre, pre_gate);

  const GemmOperand dpre{made.dpre.const_data_ptr(), F};
  const GemmOperand dgate{gated ? made.dgate.const_data_ptr() : nullptr, F};
  if (need_x) {
    GemmParams p = call.product(call.rows, call.E, call.F);
    p.a = dpre;
    p.b = operand_of(*call.w1_rows);
    p.a2 = dgate;
    if (gated) p.b2 = operand_of(*call.gate_rows);
    p.out = dx.mutable_data_ptr();
    launcher.multiply(GemmKernel::kInputGradient, p);
  }
  const auto weight_gradient = [&](Tensor& grad, const GemmOperand& a, const GemmOperand& b) {
    if (grad.dim() != 2) return;
    GemmParams p =
        call.product(static_cast<int32_t>(grad.size(0)), static_cast<int32_t>(grad.size(1)), call.rows);
    p.a = a;
    p.b = b;
    p.out = grad.mutable_data_ptr();
    launcher.multiply(GemmKernel::kWeightGradient, p);
  };
  weight_gradient(dw1, dpre, operand_of(*call.x_rows));
  weight_gradient(dw_gate, dgate, operand_of(*call.x_rows));
  weight_gradient(dw2, operand_of(grad_rows), {made.hidden.const_data_ptr(), F});
  add_tiles(launcher, made.dpre_sums, db1);
  add_tiles(launcher, made.dgate_sums, db_gate);
  if (db2.numel() > 0) {
    launcher.add_rows(
        {grad_rows.data(), db2.mutable_data_ptr(), grad_rows.stride, rows, E_out, 0, call.dtype, call.dtype});
  }
  return {dx, dw1, db1, dw_gate, db_gate, dw2, db2};
}

}  // namespace fastformer::cuda
#endif
