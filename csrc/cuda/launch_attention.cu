// Runs the plan of attention_plan.h: which instantiation, on which stream. The upper half knows no torch, and
// is all that the device passes of nvcc see: torch's headers are parsed once instead of once for each
// architecture, and the tests compile this file to PTX by itself.
#include <cuda_runtime.h>

#include "allow_shared.h"
#include "attention_fwd.cuh"

namespace fastformer::cuda {

using AttentionKernel = void (*)(AttentionFwdParams);

// Null where there is none.
template <DType kType, int kD, AttentionKind kKind>
constexpr AttentionKernel kernel_if_chosen() {
  if constexpr (is_chosen(kD, kKind, kType, 8)) return attention_fwd_kernel<kType, kD, kKind>;
  return nullptr;
}

template <DType kType, int kD>
AttentionKernel kernel_of(AttentionKind kind) {
  switch (kind) {
    case AttentionKind::kWhole:
      return kernel_if_chosen<kType, kD, AttentionKind::kWhole>();
    case AttentionKind::kPadded:
      return kernel_if_chosen<kType, kD, AttentionKind::kPadded>();
    case AttentionKind::kGeneral:
      return kernel_if_chosen<kType, kD, AttentionKind::kGeneral>();
    case AttentionKind::kFew:
      return kernel_if_chosen<kType, kD, AttentionKind::kFew>();
  }
  return nullptr;
}

template <DType kType>
AttentionKernel kernel_of(int block_d, AttentionKind kind) {
  switch (block_d) {
    case 32:
      return kernel_of<kType, 32>(kind);
    case 64:
      return kernel_of<kType, 64>(kind);
    case 96:
      return kernel_of<kType, 96>(kind);
    case 128:
      return kernel_of<kType, 128>(kind);
    case 192:
      return kernel_of<kType, 192>(kind);
    case 256:
      return kernel_of<kType, 256>(kind);
    default:
      return nullptr;
  }
}

AttentionKernel kernel_of(DType dtype, const AttentionPlan& plan) {
  switch (dtype) {
    case DType::kFloat32:
      return kernel_of<DType::kFloat32>(plan.block_d, plan.kind);
    case DType::kBFloat16:
      return kernel_of<DType::kBFloat16>(plan.block_d, plan.kind);
    case DType::kFloat16:
      return kernel_of<DType::kFloat16>(plan.block_d, plan.kind);
  }
  return nullptr;
}

cudaError_t allow_shared(AttentionKernel kernel, DType dtype, const AttentionPlan& plan) {
  constexpr int kTypes = 3, kKinds = 4, kMostUnits = 256 / 32;
  static Allowed allowed[kTypes][kMostUnits][kKinds];
  return allow_shared(kernel, static_cast<int>(plan.shared_bytes),
                      allowed[static_cast<int>(dtype)][plan.block_d / 32 - 1][static_cast<int>(plan.kind)]);
}

cudaError_t launch_fwd(const AttentionPlan& plan, const AttentionFwdParams& params, cudaStream_t stream) {
  if (plan.grid == 0) return cudaSuccess;
  const AttentionKernel kernel = kernel_of(params.dtype, plan);
  const cudaError_t error = allow_shared(kernel, params.dtype, plan);
  if (error != cudaSuccess) return error;
  kernel<<<plan.grid, plan.threads, plan.shared_bytes, stream>>>(params);
  return cudaGetLastError();
}

cudaError_t launch_combine(const AttentionPlan& plan, const AttentionFwdParams& params, cudaStream_t stream) {
  if (plan.combine_grid == 0) return cudaSuccess;
  attention_combine_kernel<kCombineThreads><<<plan.combine_grid, kCombineThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace fastformer::cuda

#if !defined(__CUDA_ARCH__)
#include "attention_call.h"
#include "launch.h"

namespace fastformer::cuda {

namespace {

float* floats_of(Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

// Plans and launches a call whose results have their places, `lse` among them.
void run(AttentionFwdParams& p, const OnDevice& device, const Tensor& lse) {
  p.rows = lse.numel();
  const AttentionPlan plan = plan_attention_fwd(p, {device.major(), device.multiprocessors()});
  const int64_t most = int64_t{1} << 31;
  STD_TORCH_CHECK(p.rows < most && int64_t{p.tiles} * (p.H / p.share) * p.B * p.splits < most,
                  "attention of 2**31 queries of all heads, or tiles of them, is not served by cuda");
  std::optional<Tensor> workspace;
  if (p.splits > 1) {
    const int64_t floats = plan.partial_rows * (p.partial_stride + 2);
    workspace = empty_on(lse, IntHeaderOnlyArrayRef(&floats, 1), ScalarType::Float);
    p.partial_out = floats_of(*workspace);
    p.partial_stats = p.partial_out + plan.partial_rows * p.partial_stride;
  }
  check_launched(launch_fwd(plan, p, device.stream()), "attention_fwd_kernel (", name_of(plan.kind),
                 ", D up to ", plan.block_d, ")");
  check_launched(launch_combine(plan, p, device.stream()), "attention_combine_kernel");
}

}  // namespace

FourTensors attention_fwd(FASTFORMER_ATTENTION_PARAMETERS) {
  AttentionFwdParams p{};
  const OnDevice device(query);
  const AttentionCall call(FASTFORMER_ATTENTION_ARGUMENTS, p);
  std::vector<int64_t> sizes(query.sizes().begin(), query.sizes().end());
  sizes.back() = p.D_v;
  Tensor out = empty_on(query, IntHeaderOnlyArrayRef(sizes.data(), sizes.size()), scalar_type_of(p.dtype));
  sizes.pop_back();
  if (call.packed()) std::swap(sizes[0], sizes[1]);
  const IntHeaderOnlyArrayRef rows(sizes.data(), sizes.size());
  Tensor lse = empty_on(query, rows, ScalarType::Float);
  Tensor row_max = empty_on(query, rows, ScalarType::Float);
  Tensor row_sum = empty_on(query, rows, ScalarType::Float);
  if (lse.numel() == 0) return {out, lse, row_max, row_sum};

  p.out = AttentionCall::head_rows(out);
  p.lse = floats_of(lse);
  p.row_max = floats_of(row_max);
  p.row_sum = floats_of(row_sum);
  p.stats_stride_b = call.packed() ? 0 : lse.stride(0);
  p.stats_stride_h = lse.stride(call.packed() ? 0 : 1);
  run(p, device, lse);
  return {out, lse, row_max, row_sum};
}

TwoTensors paged_attention_fwd(const Tensor& query, const Tensor& key_pages, const Tensor& value_pages,
                               const Tensor& page_table, const Tensor& lengths,
                               const std::optional<Tensor>& sink, double scale, std::optional<int64_t> left,
                               std::optional<int64_t> right, std::optional<double> softcap) {
  AttentionFwdParams p{};
  const OnDevice device(query);
  const PagedArguments arguments{query, key_pages, value_pages, page_table, lengths,
                                 sink,  scale,     left,        right,      softcap};
  const AttentionCall call(arguments, p);
  const int64_t sizes[] = {p.B, p.H, p.M, p.D_v};
  Tensor out = empty_on(query, IntHeaderOnlyArrayRef(sizes, 4), scalar_type_of(p.dtype));
  const IntHeaderOnlyArrayRef rows(sizes, 3);
  Tensor lse = empty_on(query, rows, ScalarType::Float);
  if (lse.numel() == 0) return {out, lse};

  p.out = AttentionCall::head_rows(out);
  p.lse = floats_of(lse);
  p.stats_stride_b = lse.stride(0);
  p.stats_stride_h = lse.stride(1);
  run(p, device, lse);
  return {out, lse};
}

}  // namespace fastformer::cuda
#endif
