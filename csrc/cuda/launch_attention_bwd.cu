// Runs the plan of attention_bwd_plan.h. As in launch_attention.cu the upper half knows no torch.
#include <cuda_runtime.h>

#include <atomic>

#include "attention_bwd.cuh"

namespace fastformer::cuda {

struct BackwardKernels {
  void (*rows)(AttentionBwdParams, int, int);
  void (*keys)(AttentionBwdParams);
  void (*queries)(AttentionBwdParams);
};

template <DType kType, int kD, bool kPlain>
BackwardKernels backward_kernels_of() {
  return {attention_bwd_rows_kernel<kType>, attention_bwd_keys_kernel<kType, kD, kPlain>,
          attention_bwd_queries_kernel<kType, kD, kPlain>};
}

template <DType kType>
BackwardKernels backward_kernels_of(int block_d, bool plain) {
  if (block_d == 64)
    return plain ? backward_kernels_of<kType, 64, true>() : backward_kernels_of<kType, 64, false>();
  if (block_d == 128)
    return plain ? backward_kernels_of<kType, 128, true>() : backward_kernels_of<kType, 128, false>();
  return backward_kernels_of<kType, 256, false>();
}

BackwardKernels backward_kernels_of(DType dtype, const AttentionBwdPlan& plan) {
  return dtype == DType::kBFloat16 ? backward_kernels_of<DType::kBFloat16>(plan.block_d, plan.plain)
                                   : backward_kernels_of<DType::kFloat16>(plan.block_d, plan.plain);
}

// As allow_shared of launch_attention.cu.
cudaError_t allow_shared(const BackwardKernels& kernels, DType dtype, const AttentionBwdPlan& plan) {
  constexpr int kDevices = 64, kMostUnits = 256 / 64;
  static std::atomic<bool> allowed[kDevices][2][kMostUnits][2];
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const auto set = [&] {
    return cudaFuncSetAttribute(kernels.keys, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared_bytes);
  };
  if (device >= kDevices) return set();
  auto& done = allowed[device][dtype == DType::kFloat16][plan.block_d / 64 - 1][plan.plain];
  if (done.load(std::memory_order_acquire)) return cudaSuccess;
  const cudaError_t failed = set();
  if (failed == cudaSuccess) done.store(true, std::memory_order_release);
  return failed;
}

// The first kernel that was not launched, and why; or null.
struct LaunchFailure {
  const char* kernel;
  cudaError_t error;
};

LaunchFailure launch(const AttentionBwdPlan& plan, const AttentionBwdParams& p, cudaStream_t stream) {
  const BackwardKernels kernels = backward_kernels_of(p.call.dtype, plan);
  const cudaError_t refused = allow_shared(kernels, p.call.dtype, plan);
  if (refused != cudaSuccess) return {"attention_bwd_keys_kernel", refused};
  const int zeros = plan.block_m * plan.block_d / kBackwardWarps;
  kernels.rows<<<plan.query_grid, plan.threads, 0, stream>>>(p, plan.block_m, zeros);
  cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) return {"attention_bwd_rows_kernel", error};
  if (p.grad_sink != nullptr) {
    attention_bwd_sink_kernel<256><<<p.call.H, 256, 0, stream>>>(p);
    error = cudaGetLastError();
    if (error != cudaSuccess) return {"attention_bwd_sink_kernel", error};
  }
  if (plan.key_grid > 0) {
    kernels.keys<<<plan.key_grid, plan.threads, plan.shared_bytes, stream>>>(p);
    error = cudaGetLastError();
    if (error != cudaSuccess) return {"attention_bwd_keys_kernel", error};
  }
  kernels.queries<<<plan.query_grid, plan.threads, plan.query_shared_bytes, stream>>>(p);
  return {"attention_bwd_queries_kernel", cudaGetLastError()};
}

}  // namespace fastformer::cuda

#if !defined(__CUDA_ARCH__)
#include "attention_call.h"
#include "launch.h"

namespace fastformer::cuda {

namespace {

Tensor contiguous_like(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return empty_on(tensor, IntHeaderOnlyArrayRef(sizes.data(), sizes.size()), tensor.scalar_type());
}

Tensor floats_on(const Tensor& like, int64_t size) {
  return empty_on(like, IntHeaderOnlyArrayRef(&size, 1), ScalarType::Float);
}

float* floats_of(Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

void set_zero(Tensor& tensor, cudaStream_t stream) {
  if (tensor.numel() == 0) return;
  const size_t bytes = tensor.numel() * size_of(dtype_of(tensor, "gradient"));
  const cudaError_t error = cudaMemsetAsync(tensor.mutable_data_ptr(), 0, bytes, stream);
  STD_TORCH_CHECK(error == cudaSuccess, "a gradient was not zeroed: ", cudaGetErrorString(error));
}

// What a block may have of shared memory on the current device.
int64_t most_shared() {
  int device = 0, bytes = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  STD_TORCH_CHECK(error == cudaSuccess, "CUDA device ", device, ": ", cudaGetErrorString(error));
  return bytes;
}

bool has_sizes(const Tensor& tensor, const std::vector<int64_t>& sizes) {
  if (tensor.dim() != static_cast<int64_t>(sizes.size())) return false;
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (tensor.size(d) != sizes[d]) return false;
  }
  return true;
}

// The workspace of one call, which lives until its kernels are launched: torch's allocator hands memory on in
// the order of the stream.
struct Workspace {
  Tensor floats, integers;

  Workspace(const Tensor& like, const AttentionBwdPlan& plan, AttentionBwdParams& p)
      : floats(floats_on(like, 0)), integers(floats_on(like, 0)) {
    const int64_t zeros = plan.block_m * plan.block_d / kBackwardWarps;
    const int64_t shares = p.grad_sink == nullptr ? 0 : int64_t{p.call.H} * p.call.B * p.call.tiles;
    // In this order every part begins at a multiple of 16 bytes.
    floats = floats_on(like, plan.rows * plan.block_d + zeros + plan.rows * 2 + plan.rows + shares);
    p.sums = floats_of(floats);
    p.zeros = p.sums + plan.rows * plan.block_d;
    p.pivots = reinterpret_cast<RowPivot*>(p.zeros + zeros);
    p.factors = p.zeros + zeros + plan.rows * 2;
    if (shares > 0) p.sink_shares = p.factors + plan.rows;
    const int64_t turns = plan.rows / plan.block_m * kBackwardWarps, all = turns + 1;
    integers = empty_on(like, IntHeaderOnlyArrayRef(&all, 1), ScalarType::Int);
    p.turns = static_cast<int32_t*>(integers.mutable_data_ptr());
    p.ticket = p.turns + turns;
  }
};

}  // namespace

SixTensors attention_bwd(const std::optional<Tensor>& grad_out, const std::optional<Tensor>& grad_lse,
                         const std::optional<Tensor>& grad_weights, const Tensor& out, const Tensor& row_max,
                         const Tensor& row_sum, FASTFORMER_ATTENTION_PARAMETERS, bool need_bias,
                         bool need_relative_bias, bool need_sink) {
  AttentionBwdParams p{};
  const OnDevice device(query);
  const AttentionCall call(FASTFORMER_ATTENTION_ARGUMENTS, p.call);
  const bool packed = call.packed();
  STD_TORCH_CHECK(!grad_weights && !need_relative_bias,
                  "gradients of returned weights and of relative_bias are not served by cuda");
  Tensor dq = contiguous_like(query), dk = contiguous_like(key), dv = contiguous_like(value);
  Tensor dbias = nothing_on(query, query.scalar_type()), dsink = nothing_on(query, ScalarType::Float);
  Tensor none = nothing_on(query, ScalarType::Float);
  if (need_bias) {
    STD_TORCH_CHECK(bias.has_value() && has_sizes(*bias, {p.call.B, p.call.H, p.call.M, p.call.N}),
                    "the gradient of a bias that is broadcast is not served by cuda");
    dbias = contiguous_like(*bias);
    set_zero(dbias, device.stream());
  }
  if (need_sink) {
    STD_TORCH_CHECK(sink.has_value(), "sink's gradient was asked for without a sink");
    dsink = floats_on(query, p.call.H);
  }
  if (query.numel() == 0) {
    for (Tensor* const grad : {&dq, &dk, &dv, &dbias, &dsink}) set_zero(*grad, device.stream());
    return {dq, dk, dv, dbias, none, dsink};
  }

  // What comes and goes by rows of out.
  std::vector<int64_t> sizes(query.sizes().begin(), query.sizes().end());
  sizes.back() = p.call.D_v;
  STD_TORCH_CHECK(has_sizes(out, sizes) && out.is_contiguous() && out.scalar_type() == query.scalar_type(),
                  "out must be as attention_fwd gave it");
  STD_TORCH_CHECK(!grad_out || (has_sizes(*grad_out, sizes) && grad_out->scalar_type() == out.scalar_type()),
                  "grad_out must be like out");
  sizes.pop_back();
  if (packed) std::swap(sizes[0], sizes[1]);
  for (const Tensor* const each : {&row_max, &row_sum, grad_lse ? &*grad_lse : &row_max}) {
    STD_TORCH_CHECK(has_sizes(*each, sizes) && each->scalar_type() == ScalarType::Float,
                    "row_max, row_sum and grad_lse must be float32 [B, H, M], or packed [H, total]");
  }
  STD_TORCH_CHECK(row_max.is_contiguous() && row_sum.is_contiguous(),
                  "row_max and row_sum must be contiguous");
  Tensor of_out = grad_out ? *grad_out : contiguous_like(out);
  if (!grad_out) set_zero(of_out, device.stream());
  const int64_t last = of_out.dim() - 1;
  if (of_out.size(last) > 1 && of_out.stride(last) != 1) of_out = torch::stable::contiguous(of_out);
  const Tensor of_lse = grad_lse ? torch::stable::contiguous(*grad_lse) : row_max;

  p.call.out = AttentionCall::head_rows(out);
  p.call.row_max = static_cast<float*>(const_cast<void*>(row_max.const_data_ptr()));
  p.call.row_sum = static_cast<float*>(const_cast<void*>(row_sum.const_data_ptr()));
  p.call.stats_stride_b = packed ? 0 : row_max.stride(0);
  p.call.stats_stride_h = row_max.stride(packed ? 0 : 1);
  p.grad_out = AttentionCall::head_rows(of_out);
  p.grad_query = AttentionCall::head_rows(dq);
  p.grad_key = AttentionCall::head_rows(dk);
  p.grad_value = AttentionCall::head_rows(dv);
  if (grad_lse) p.grad_lse = static_cast<const float*>(of_lse.const_data_ptr());
  if (need_bias) {
    p.grad_bias = {dbias.mutable_data_ptr(), dtype_of(dbias, "bias"), dbias.stride(0),
                   dbias.stride(1),          dbias.stride(2),         dbias.stride(3)};
  }
  if (need_sink) p.grad_sink = floats_of(dsink);
  const int64_t longest = std::max(p.call.M, p.call.N);
  STD_TORCH_CHECK(int64_t{p.call.B} * p.call.H * (longest / 64 + 1) < int64_t{1} << 31,
                  "gradients of attention of 2**31 tiles or more are not served by cuda");
  const AttentionBwdPlan plan = plan_attention_bwd(p, packed ? query.size(0) : 0, most_shared());
  STD_TORCH_CHECK(plan.block_d > 0, "attention's gradients at D = ", p.call.D, " and D_v = ", p.call.D_v,
                  " take more shared memory than this device has");
  const Workspace workspace(query, plan, p);
  const LaunchFailure launched = launch(plan, p, device.stream());
  STD_TORCH_CHECK(launched.error == cudaSuccess, launched.kernel, " (D up to ", plan.block_d,
                  ") was not launched: ", cudaGetErrorString(launched.error));
  return {dq, dk, dv, dbias, none, dsink};
}

}  // namespace fastformer::cuda
#endif
