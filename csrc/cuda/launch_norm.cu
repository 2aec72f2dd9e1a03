// Runs the plan of norm_plan.h: which instantiation, on which stream. The upper half knows no torch, and is
// all that the device passes of nvcc see: torch's headers are parsed once instead of once for each
// architecture, and the tests compile this file to PTX by itself.
#include <cuda_runtime.h>

#include <iterator>

#include "allow_shared.h"
#include "norm_bwd.cuh"

namespace fastformer::cuda {

template <typename Params>
using Kernel = void (*)(Params);

// Of what is instantiated by type.
DType type_of(const NormFwdParams& p) { return p.x_dtype; }
DType type_of(const NormBwdParams& p) { return p.s_dtype; }

template <DType kType>
Kernel<NormFwdParams> norm_fwd_kept(int columns) {
  constexpr auto& kEach = kThreadColumns;
  static_assert(std::size(kEach) == 3);
  if (columns == kEach[0]) return norm_fwd_kept_kernel<kType, kEach[0]>;
  return columns == kEach[1] ? norm_fwd_kept_kernel<kType, kEach[1]> : norm_fwd_kept_kernel<kType, kEach[2]>;
}

Kernel<NormFwdParams> norm_fwd_kept(DType dtype, int columns) {
  if (dtype == DType::kFloat32) return norm_fwd_kept_kernel<DType::kFloat32, kThreadColumns[0]>;
  return dtype == DType::kBFloat16 ? norm_fwd_kept<DType::kBFloat16>(columns)
                                   : norm_fwd_kept<DType::kFloat16>(columns);
}

Kernel<NormFwdParams> kernel_of(const NormPlan& plan, const NormFwdParams& p) {
  switch (plan.kernel) {
    case NormKernel::kFwdKept:
      return norm_fwd_kept(type_of(p), plan.thread_columns);
    case NormKernel::kFwdAny:
      return norm_fwd_any_kernel;
    case NormKernel::kFwdWide:
      return norm_fwd_wide_kernel;
    default:
      return nullptr;
  }
}

Kernel<NormBwdParams> norm_bwd_kept(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return norm_bwd_kept_kernel<DType::kFloat32>;
    case DType::kBFloat16:
      return norm_bwd_kept_kernel<DType::kBFloat16>;
    case DType::kFloat16:
      return norm_bwd_kept_kernel<DType::kFloat16>;
  }
  return nullptr;
}

Kernel<NormBwdParams> norm_bwd_kept_wide(DType dtype) {
  return dtype == DType::kBFloat16 ? norm_bwd_kept_wide_kernel<DType::kBFloat16>
                                   : norm_bwd_kept_wide_kernel<DType::kFloat16>;
}

Kernel<NormBwdParams> kernel_of(const NormPlan& plan, const NormBwdParams& p) {
  switch (plan.kernel) {
    case NormKernel::kBwdKept:
      return norm_bwd_kept(type_of(p));
    case NormKernel::kBwdKeptWide:
      return norm_bwd_kept_wide(type_of(p));
    case NormKernel::kBwdAny:
      return norm_bwd_any_kernel;
    case NormKernel::kBwdColumns:
      return norm_bwd_columns_kernel;
    case NormKernel::kBwdReduce:
      return norm_bwd_reduce_kernel;
    default:
      return nullptr;
  }
}

template <typename Params>
cudaError_t launch(const NormPlan& plan, const Params& params, cudaStream_t stream) {
  if (plan.grid_x == 0 || plan.grid_y == 0) return cudaSuccess;
  const Kernel<Params> kernel = kernel_of(plan, params);
  if (plan.shared_bytes > 0) {
    static Allowed allowed[3];  // by type, of the one kernel that has any
    const cudaError_t error =
        allow_shared(kernel, static_cast<int>(plan.shared_bytes), allowed[static_cast<int>(type_of(params))]);
    if (error != cudaSuccess) return error;
  }
  kernel<<<dim3(plan.grid_x, plan.grid_y), dim3(plan.block_x, plan.block_y), plan.shared_bytes, stream>>>(
      params);
  return cudaGetLastError();
}

}  // namespace fastformer::cuda

#if !defined(__CUDA_ARCH__)
#include "launch.h"
#include "tensors.h"

namespace fastformer::cuda {
namespace {

template <typename Params>
void run(const NormPlan& plan, const Params& params, const OnDevice& device) {
  check_launched(launch(plan, params, device.stream()), name_of(plan.kernel));
}

int64_t rows_in(const Tensor& tensor, int64_t columns) { return columns == 0 ? 0 : tensor.numel() / columns; }

template <typename Params>
void set_shape(Params& p, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.dim() > 0, "norm needs a last dimension to normalise over");
  const int64_t columns = tensor.size(tensor.dim() - 1);
  STD_TORCH_CHECK(columns <= int64_t{1} << 30, "norm over more than 2**30 columns is not served by cuda");
  p.columns = static_cast<int32_t>(columns);
  p.rows = rows_in(tensor, columns);
  STD_TORCH_CHECK(p.rows < int64_t{1} << 31, "norm of 2**31 rows or more is not served by cuda");
}

}  // namespace

FourTensors norm_fwd(const Tensor& x, const std::optional<Tensor>& residual,
                     const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                     const std::optional<Tensor>& seed, bool rms, double eps, double dropout_p) {
  NormFwdParams p{};
  set_shape(p, x);
  set_dropout(p, dropout_p, seed);
  STD_TORCH_CHECK(p.threshold == 0 || residual.has_value(), "norm drops x only where there is a residual");
  const OnDevice device(x);
  const Rows x_rows = rows_of(x);
  p.x = x_rows.data();
  p.x_stride = x_rows.stride;
  p.x_dtype = p.out_dtype = dtype_of(x, "x");
  std::optional<Rows> residual_rows;
  if (residual.has_value()) {
    STD_TORCH_CHECK(residual->numel() == x.numel(), "residual must have x's shape");
    residual_rows = rows_of(*residual);
    p.residual = residual_rows->data();
    p.residual_stride = residual_rows->stride;
    p.residual_dtype = dtype_of(*residual, "residual");
    if (p.residual_dtype != p.x_dtype) p.out_dtype = DType::kFloat32;
  }
  const auto weight_row = row_parameter(weight, p.columns, "weight");
  const auto bias_row = row_parameter(bias, p.columns, "bias");
  if (weight_row.has_value()) {
    p.weight = weight_row->const_data_ptr();
    p.weight_dtype = dtype_of(*weight_row, "weight");
  }
  if (bias_row.has_value()) {
    p.bias = bias_row->const_data_ptr();
    p.bias_dtype = dtype_of(*bias_row, "bias");
  }
  p.eps = static_cast<float>(eps);
  p.rms = rms;

  const auto shape = x.sizes();
  const IntHeaderOnlyArrayRef row_shape(shape.data(), shape.size() - 1);
  const ScalarType out_dtype = scalar_type_of(p.out_dtype);
  Tensor out = empty_on(x, shape, out_dtype);
  Tensor sum = residual.has_value() ? empty_on(x, shape, out_dtype) : nothing_on(x, out_dtype);
  Tensor mean = rms ? nothing_on(x, ScalarType::Float) : empty_on(x, row_shape, ScalarType::Float);
  Tensor rstd = empty_on(x, row_shape, ScalarType::Float);
  p.out = out.mutable_data_ptr();
  p.sum = sum.mutable_data_ptr();
  p.mean = static_cast<float*>(mean.mutable_data_ptr());
  p.rstd = static_cast<float*>(rstd.mutable_data_ptr());
  const NormPlan plan = plan_norm_fwd(p);
  run(plan, p, device);
  return {out, sum, mean, rstd};
}

FourTensors norm_bwd(const Tensor& grad_out, const std::optional<Tensor>& grad_sum, const Tensor& s,
                     const std::optional<Tensor>& weight, const Tensor& mean, const Tensor& rstd,
                     const std::optional<Tensor>& seed, bool rms, double dropout_p, bool need_dweight,
                     bool need_dbias) {
  NormBwdParams p{};
  set_shape(p, s);
  set_dropout(p, dropout_p, seed);
  const OnDevice device(s);
  const Rows s_rows = rows_of(s);
  p.s = s_rows.data();
  p.s_stride = s_rows.stride;
  p.s_dtype = dtype_of(s, "s");
  STD_TORCH_CHECK(grad_out.numel() == s.numel(), "grad_out must have s's shape");
  const Rows grad_out_rows = rows_of(grad_out);
  p.grad_out = grad_out_rows.data();
  p.grad_out_stride = grad_out_rows.stride;
  p.grad_out_dtype = dtype_of(grad_out, "grad_out");
  std::optional<Rows> grad_sum_rows;
  if (grad_sum.has_value()) {
    STD_TORCH_CHECK(grad_sum->numel() == s.numel(), "grad_sum must have s's shape");
    grad_sum_rows = rows_of(*grad_sum);
    p.grad_sum = grad_sum_rows->data();
    p.grad_sum_stride = grad_sum_rows->stride;
    p.grad_sum_dtype = dtype_of(*grad_sum, "grad_sum");
  }
  const auto weight_row = row_parameter(weight, p.columns, "weight");
  if (weight_row.has_value()) {
    p.weight = weight_row->const_data_ptr();
    p.weight_dtype = dtype_of(*weight_row, "weight");
  }
  STD_TORCH_CHECK(rstd.is_contiguous() && rstd.numel() == p.rows && (rms || mean.numel() == p.rows) &&
                      mean.is_contiguous(),
                  "mean and rstd must be those of the forward pass");
  p.mean = static_cast<const float*>(mean.const_data_ptr());
  p.rstd = static_cast<const float*>(rstd.const_data_ptr());
  p.rms = rms;

  const ScalarType dtype = scalar_type_of(p.s_dtype);
  const int64_t columns = p.columns, none = 0;
  Tensor ds = empty_on(s, s.sizes(), dtype);
  Tensor dx = p.threshold > 0 ? empty_on(s, s.sizes(), dtype) : nothing_on(s, dtype);
  Tensor dweight = empty_on(s, IntHeaderOnlyArrayRef(need_dweight ? &columns : &none, 1), ScalarType::Float);
  Tensor dbias = empty_on(s, IntHeaderOnlyArrayRef(need_dbias ? &columns : &none, 1), ScalarType::Float);
  p.ds = ds.mutable_data_ptr();
  p.dx = dx.mutable_data_ptr();
  const NormBwdPlan plan = plan_norm_bwd(p, device.multiprocessors(), need_dweight || need_dbias);
  const int64_t partial_size = int64_t{p.partial_rows} * 2 * p.partial_stride;
  const Tensor partial = empty_on(s, IntHeaderOnlyArrayRef(&partial_size, 1), ScalarType::Float);
  if (partial_size > 0) p.partial = static_cast<float*>(partial.mutable_data_ptr());
  if (need_dweight) p.dweight = static_cast<float*>(dweight.mutable_data_ptr());
  if (need_dbias) p.dbias = static_cast<float*>(dbias.mutable_data_ptr());
  run(plan.ds, p, device);
  run(plan.columns, p, device);
  run(plan.reduce, p, device);
  return {ds, dx, dweight, dbias};
}

}  // namespace fastformer::cuda
#endif
