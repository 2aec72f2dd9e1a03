// Runs the plan of attention_bwd_plan.h. As in launch_attention.cu the upper half knows no torch.
#include <cuda_runtime.h>

#include "allow_shared.h"
#include "attention_bwd.cuh"

namespace fastformer::cuda {

struct BackwardKernels {
  void (*rows)(AttentionBwdParams, int, int);
  void (*keys)(AttentionBwdParams);
  void (*queries)(AttentionBwdParams);
};

template <DType kType, int kD, BackwardKind kKind>
BackwardKernels backward_kernels_of() {
  return {attention_bwd_rows_kernel<kType>, attention_bwd_keys_kernel<kType, kD, kKind>,
          attention_bwd_queries_kernel<kType, kD, kKind>};
}

template <DType kType>
BackwardKernels backward_kernels_of(int block_d, BackwardKind kind) {
  using enum BackwardKind;
  if (kind == kSmall) return backward_kernels_of<kType, 256, kSmall>();
  if constexpr (kType != DType::kFloat32) {
    if (kind == kPlain) {
      return block_d == 64 ? backward_kernels_of<kType, 64, kPlain>()
                           : backward_kernels_of<kType, 128, kPlain>();
    }
  }
  if (block_d == 64) return backward_kernels_of<kType, 64, kGeneral>();
  if (block_d == 128) return backward_kernels_of<kType, 128, kGeneral>();
  return backward_kernels_of<kType, 256, kGeneral>();
}

BackwardKernels backward_kernels_of(DType dtype, const AttentionBwdPlan& plan) {
  if (dtype == DType::kFloat32) return backward_kernels_of<DType::kFloat32>(plan.block_d, plan.kind);
  return dtype == DType::kBFloat16 ? backward_kernels_of<DType::kBFloat16>(plan.block_d, plan.kind)
                                   : backward_kernels_of<DType::kFloat16>(plan.block_d, plan.kind);
}

// Of `zeros`: what a warp has of a tile of dQ.
int zeros_of(const AttentionBwdPlan& plan) { return plan.block_m * plan.block_d / (plan.threads / kWarp); }

cudaError_t allow_shared(const BackwardKernels& kernels, DType dtype, const AttentionBwdPlan& plan) {
  constexpr int kTypes = 3, kMostUnits = 256 / 64, kKinds = 3;
  static Allowed allowed[kTypes][kMostUnits][kKinds];
  return allow_shared(kernels.keys, plan.shared_bytes,
                      allowed[static_cast<int>(dtype)][plan.block_d / 64 - 1][static_cast<int>(plan.kind)]);
}

// The first kernel that was not launched, and why; or null.
struct LaunchFailure {
  const char* kernel;
  cudaError_t error;
};

cudaError_t launch_row_sums(const RowSums& sums, cudaStream_t stream) {
  const int64_t grid = int64_t{sums.target_B} * sums.target_H * sums.target_M;
  attention_bwd_row_sums_kernel<256><<<static_cast<uint32_t>(grid), 256, 0, stream>>>(sums);
  return cudaGetLastError();
}

LaunchFailure launch(const AttentionBwdPlan& plan, const AttentionBwdParams& p, cudaStream_t stream) {
  const BackwardKernels kernels = backward_kernels_of(p.call.dtype, plan);
  const cudaError_t refused = allow_shared(kernels, p.call.dtype, plan);
  if (refused != cudaSuccess) return {"attention_bwd_keys_kernel", refused};
  kernels.rows<<<plan.query_grid, kBackwardWarps * kWarp, 0, stream>>>(p, plan.block_m, zeros_of(plan));
  cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) return {"attention_bwd_rows_kernel", error};
  if (p.grad_sink != nullptr) {
    const AttentionFwdParams& call = p.call;
    error = launch_row_sums(
        {p.sink_shares, p.grad_sink, DType::kFloat32, call.B, call.H, call.tiles, 1, call.H, 1}, stream);
    if (error != cudaSuccess) return {"attention_bwd_row_sums_kernel", error};
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
#include "attention_passes.h"
#include "launch.h"

namespace fastformer::cuda {

namespace {

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

// The gradients that come in; owns what had to be made contiguous, or zero.
struct Incoming {
  std::optional<Tensor> rows, stats;

  Incoming(const std::optional<Tensor>& grad_out, const std::optional<Tensor>& grad_lse,
           const std::optional<Tensor>& grad_weights, const Tensor& out, const Tensor& row_max,
           cudaStream_t stream, AttentionBwdParams& p) {
    const std::vector<int64_t> sizes(out.sizes().begin(), out.sizes().end());
    STD_TORCH_CHECK(
        !grad_out || (has_sizes(*grad_out, sizes) && grad_out->scalar_type() == out.scalar_type()),
        "grad_out must be like out");
    rows = grad_out ? *grad_out : contiguous_like(out);
    if (!grad_out) set_zero(*rows, stream);
    const int64_t last = rows->dim() - 1;
    if (rows->size(last) > 1 && rows->stride(last) != 1) rows = torch::stable::contiguous(*rows);
    p.grad_out = AttentionCall::head_rows(*rows);
    if (grad_lse) {
      const std::vector<int64_t> of_rows(row_max.sizes().begin(), row_max.sizes().end());
      STD_TORCH_CHECK(has_sizes(*grad_lse, of_rows) && grad_lse->scalar_type() == ScalarType::Float,
                      "grad_lse must be float32, of row_max's shape");
      stats = torch::stable::contiguous(*grad_lse);
      p.grad_lse = static_cast<const float*>(stats->const_data_ptr());
    }
    if (grad_weights) set_grad_weights(*grad_weights, p);
  }

 private:
  static void set_grad_weights(const Tensor& weights, AttentionBwdParams& p) {
    const int64_t B = p.call.B, H = p.call.H, M = p.call.M, N = p.call.N, last = weights.dim() - 1;
    const bool mean = weights.dim() == 3;
    STD_TORCH_CHECK(has_sizes(weights, {B, H, M, N}) || has_sizes(weights, {B, M, N}),
                    "grad_weights must be [B, H, M, N], or [B, M, N] of the mean over heads");
    if (weights.numel() == 0) return;
    p.grad_weights = {const_cast<void*>(weights.const_data_ptr()),
                      dtype_of(weights, "grad_weights"),
                      weights.stride(0),
                      mean ? 0 : weights.stride(1),
                      weights.stride(last - 1),
                      weights.stride(last)};
    p.grad_weights_scale = mean ? 1.0f / static_cast<float>(H) : 1.0f;
  }
};

// The gradient of a bias that is not whole. Of a bias of one column it is what rows gave.
struct BiasSum {
  bool wanted, column;
  int64_t rows = 0;  // floats that rows give

  BiasSum(const Tensor& grad, bool whole, const AttentionBwdParams& p)
      : wanted(!whole && grad.numel() > 0), column(wanted && size_from_end(grad, 1) == 1) {
    // A row's gradients add up to 0 where nothing but keys has a share of its softmax.
    if (column && (p.call.sink != nullptr || p.grad_lse != nullptr)) {
      rows = int64_t{p.call.B} * p.call.H * p.call.M;
    }
    STD_TORCH_CHECK(rows < int64_t{1} << 31,
                    "the gradient of a bias of one column for 2**31 rows or more is ", "not served by cuda");
  }

  void run(const AttentionBwdParams& p, int32_t block_m, Tensor& grad, cudaStream_t stream) const {
    if (!wanted) return;
    if (!column) return sum_bias(p, block_m, grad, stream);
    if (rows == 0) return set_zero(grad, stream);
    const cudaError_t error =
        launch_row_sums({p.row_grads, grad.mutable_data_ptr(), dtype_of(grad, "bias"), p.call.B, p.call.H,
                         p.call.M, size_from_end(grad, 4), size_from_end(grad, 3), size_from_end(grad, 2)},
                        stream);
    check_launched(error, "attention_bwd_row_sums_kernel");
  }
};

// The workspace of one call, which lives until its kernels are launched: torch's allocator hands memory on in
// the order of the stream.
struct Workspace {
  Tensor floats, integers;

  // Beside what every call takes so many deltas, and gradients of rows.
  Workspace(const Tensor& like, const AttentionBwdPlan& plan, int64_t deltas, int64_t row_grads,
            cudaStream_t stream, AttentionBwdParams& p)
      : floats(floats_on(like, 0)), integers(floats_on(like, 0)) {
    const int64_t zeros = zeros_of(plan);
    const int64_t shares = p.grad_sink == nullptr ? 0 : int64_t{p.call.H} * p.call.B * p.call.tiles;
    // In this order every part begins at a multiple of what its kernels read at a time.
    floats = floats_on(
        like, plan.rows * plan.block_d + zeros + plan.rows * 2 + plan.rows + shares + deltas + row_grads);
    p.sums = floats_of(floats);
    p.zeros = p.sums + plan.rows * plan.block_d;
    p.pivots = reinterpret_cast<RowPivot*>(p.zeros + zeros);
    p.factors = p.zeros + zeros + plan.rows * 2;
    float* const rest = p.factors + plan.rows;
    if (shares > 0) p.sink_shares = rest;
    if (deltas > 0) p.deltas = rest + shares;
    if (row_grads > 0) {
      p.row_grads = rest + shares + deltas;
      // Packed sequences have fewer rows than the longest.
      const cudaError_t error = cudaMemsetAsync(p.row_grads, 0, row_grads * sizeof(float), stream);
      STD_TORCH_CHECK(error == cudaSuccess, "rows were not zeroed: ", cudaGetErrorString(error));
    }
    const int64_t turns = plan.rows / plan.block_m * kBackwardWarps, heads = int64_t{p.call.B} * p.call.H;
    const int64_t all = turns + 1 + 2 * heads;
    integers = empty_on(like, IntHeaderOnlyArrayRef(&all, 1), ScalarType::Int);
    p.turns = static_cast<int32_t*>(integers.mutable_data_ptr());
    p.ticket = p.turns + turns;
    p.ranges = p.ticket + 1;
  }
};

// What comes out, allocated.
struct Gradients {
  Tensor query, key, value, bias, relative_bias, sink;

  Gradients(const AttentionArguments& call, const AttentionFwdParams& p, bool need_bias,
            bool need_relative_bias, bool need_sink)
      : query(contiguous_like(call.query)),
        key(contiguous_like(call.key)),
        value(contiguous_like(call.value)),
        bias(nothing_on(query, query.scalar_type())),
        relative_bias(nothing_on(query, ScalarType::Float)),
        sink(nothing_on(query, ScalarType::Float)) {
    STD_TORCH_CHECK(
        (!need_bias || call.bias) && (!need_relative_bias || call.relative_bias) && (!need_sink || call.sink),
        "a gradient was asked for of a bias, relative_bias or sink that was not given");
    if (need_bias) bias = contiguous_like(*call.bias);
    if (need_relative_bias) {
      const auto sizes = call.relative_bias->sizes();
      relative_bias = empty_on(query, IntHeaderOnlyArrayRef(sizes.data(), sizes.size()), ScalarType::Float);
    }
    if (need_sink) sink = floats_on(query, p.H);
  }

  // Of a call without queries.
  void set_all_zero(cudaStream_t stream) {
    for (Tensor* const grad : {&query, &key, &value, &bias, &relative_bias, &sink}) set_zero(*grad, stream);
  }

  SixTensors all() const { return {query, key, value, bias, relative_bias, sink}; }
};

}  // namespace

SixTensors attention_bwd(const std::optional<Tensor>& grad_out, const std::optional<Tensor>& grad_lse,
                         const std::optional<Tensor>& grad_weights, const Tensor& out, const Tensor& row_max,
                         const Tensor& row_sum, FASTFORMER_ATTENTION_PARAMETERS, bool need_bias,
                         bool need_relative_bias, bool need_sink) {
  AttentionBwdParams p{};
  const OnDevice device(query);
  const AttentionArguments arguments = FASTFORMER_ATTENTION_ARGUMENTS;
  const AttentionCall call(arguments, p.call);
  const bool packed = call.packed();
  const cudaStream_t stream = device.stream();
  Gradients grads(arguments, p.call, need_bias, need_relative_bias, need_sink);
  if (query.numel() == 0) {
    grads.set_all_zero(stream);
    return grads.all();
  }

  std::vector<int64_t> sizes(query.sizes().begin(), query.sizes().end());
  sizes.back() = p.call.D_v;
  STD_TORCH_CHECK(has_sizes(out, sizes) && out.is_contiguous() && out.scalar_type() == query.scalar_type(),
                  "out must be as attention_fwd gave it");
  set_statistics(row_max, row_sum, query, packed, p.call);
  const Incoming incoming(grad_out, grad_lse, grad_weights, out, row_max, stream, p);
  p.call.out = AttentionCall::head_rows(out);
  p.grad_query = AttentionCall::head_rows(grads.query);
  p.grad_key = AttentionCall::head_rows(grads.key);
  p.grad_value = AttentionCall::head_rows(grads.value);
  const bool whole = has_sizes(grads.bias, {p.call.B, p.call.H, p.call.M, p.call.N});
  if (need_bias && whole) {
    const Tensor& bias = grads.bias;
    p.grad_bias = {grads.bias.mutable_data_ptr(),
                   dtype_of(bias, "bias"),
                   bias.stride(0),
                   bias.stride(1),
                   bias.stride(2),
                   bias.stride(3)};
    set_zero(grads.bias, stream);
  }
  if (need_sink) p.grad_sink = floats_of(grads.sink);
  const int64_t longest = std::max(p.call.M, p.call.N);
  STD_TORCH_CHECK(int64_t{p.call.B} * p.call.H * (longest / kFewestRows + 1) < int64_t{1} << 31,
                  "gradients of attention of 2**31 tiles or more are not served by cuda");
  const AttentionBwdPlan plan = plan_attention_bwd(p, packed ? query.size(0) : 0, most_shared());
  STD_TORCH_CHECK(plan.block_d > 0, "attention's gradients at D = ", p.call.D, " and D_v = ", p.call.D_v,
                  " take more shared memory than this device has");

  const BiasSum of_bias(grads.bias, whole, p);
  const int64_t deltas = p.grad_weights.data == nullptr ? 0 : row_max.numel();
  const Workspace workspace(query, plan, deltas, of_bias.rows, stream, p);
  if (deltas > 0) sum_deltas(p, stream);
  const LaunchFailure launched = launch(plan, p, stream);
  check_launched(launched.error, launched.kernel, " (D up to ", plan.block_d, ")");
  of_bias.run(p, plan.block_m, grads.bias, stream);
  if (need_relative_bias && p.call.N > 0) {
    sum_relative_bias(p, plan.block_m, grads.relative_bias, stream);
  } else {
    set_zero(grads.relative_bias, stream);
  }
  return grads.all();
}

}  // namespace fastformer::cuda
#endif
