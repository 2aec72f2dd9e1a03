// Runs the plan of attention_sums_plan.h. As in launch_attention.cu the upper half knows no torch.
#include <cuda_runtime.h>

#include "attention_sums.cuh"

namespace fastformer::cuda {

cudaError_t launch_sums(const AttentionSumsPlan& plan, const AttentionSumsParams& p, cudaStream_t stream) {
  const bool float32 = p.bwd.call.dtype == DType::kFloat32;
  const auto kernel = float32 ? attention_sums_kernel<kScoreSumThreads, true>
                              : attention_sums_kernel<kScoreSumThreads, false>;
  kernel<<<static_cast<uint32_t>(plan.grid), kScoreSumThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

cudaError_t launch_add_shares(const float* shares, int count, int64_t elements, void* target, DType dtype,
                              cudaStream_t stream) {
  constexpr int kThreads = 256;
  const uint32_t grid = static_cast<uint32_t>((elements + kThreads - 1) / kThreads);
  attention_add_shares_kernel<kThreads>
      <<<grid, kThreads, 0, stream>>>(shares, count, elements, target, dtype);
  return cudaGetLastError();
}

}  // namespace fastformer::cuda

#if !defined(__CUDA_ARCH__)
#include "attention_call.h"
#include "attention_passes.h"
#include "launch.h"

namespace fastformer::cuda {

namespace {

// Into `target`, contiguous, by way of shares where there are some. Its sizes are 1 or the call's.
void run_sums(AttentionSumsParams& sums, Tensor& target, int32_t target_B, int32_t target_H,
              cudaStream_t stream) {
  const AttentionSumsPlan plan = plan_attention_sums(sums, target_B, target_H);
  STD_TORCH_CHECK(plan.grid < int64_t{1} << 31,
                  "sums over 2**31 tiles of attention's scores or more are not served by cuda");
  sums.target.data = target.mutable_data_ptr();
  sums.target.dtype = dtype_of(target, "the result");
  if (plan.shares == 0) {
    check_launched(launch_sums(plan, sums, stream), "attention_sums_kernel");
    return;
  }
  Tensor shares = floats_on(target, plan.shares * sums.share_stride);
  // Of diagonals not every entry has two.
  if (sums.kind == SumKind::kDiagonals) set_zero(shares, stream);
  sums.target.data = shares.mutable_data_ptr();
  sums.target.dtype = DType::kFloat32;
  check_launched(launch_sums(plan, sums, stream), "attention_sums_kernel");
  const cudaError_t error =
      launch_add_shares(floats_of(shares), plan.shares, sums.share_stride, target.mutable_data_ptr(),
                        dtype_of(target, "the result"), stream);
  check_launched(error, "attention_add_shares_kernel");
}

AttentionSumsParams sums_of(const AttentionBwdParams& bwd, SumKind kind, int32_t block_m) {
  AttentionSumsParams sums{};
  sums.bwd = bwd;
  sums.kind = kind;
  sums.factor = 1.0f;
  sums.block_m = block_m;
  return sums;
}

}  // namespace

void sum_deltas(const AttentionBwdParams& bwd, cudaStream_t stream) {
  AttentionSumsParams sums = sums_of(bwd, SumKind::kDeltas, 0);
  sums.bwd.pivots = nullptr;
  sums.bwd.ranges = nullptr;
  const AttentionSumsPlan plan = plan_attention_sums(sums, bwd.call.B, bwd.call.H);
  check_launched(launch_sums(plan, sums, stream), "attention_sums_kernel");
}

void sum_bias(const AttentionBwdParams& bwd, int32_t block_m, Tensor& grad, cudaStream_t stream) {
  const SumKind kind = size_from_end(grad, 2) == bwd.call.M ? SumKind::kMatrix : SumKind::kRow;
  AttentionSumsParams sums = sums_of(bwd, kind, block_m);
  run_sums(sums, grad, size_from_end(grad, 4), size_from_end(grad, 3), stream);
}

void sum_relative_bias(const AttentionBwdParams& bwd, int32_t block_m, Tensor& grad, cudaStream_t stream) {
  AttentionSumsParams sums = sums_of(bwd, SumKind::kDiagonals, block_m);
  run_sums(sums, grad, 1, size_from_end(grad, 2), stream);
}

Tensor attention_weights(const Tensor& row_max, const Tensor& row_sum, FASTFORMER_ATTENTION_PARAMETERS,
                         bool mean) {
  AttentionSumsParams sums{};
  const OnDevice device(query);
  AttentionFwdParams& p = sums.bwd.call;
  const AttentionCall call(FASTFORMER_ATTENTION_ARGUMENTS, p);
  std::vector<int64_t> sizes = {p.B, p.H, p.M, p.N};
  if (mean) sizes.erase(sizes.begin() + 1);
  Tensor weights = empty_on(query, IntHeaderOnlyArrayRef(sizes.data(), sizes.size()), query.scalar_type());
  if (weights.numel() == 0 || p.H == 0) {
    set_zero(weights, device.stream());
    return weights;
  }
  set_statistics(row_max, row_sum, query, call.packed(), p);
  describe_scores(p);
  sums.kind = SumKind::kWeights;
  sums.factor = mean ? 1.0f / static_cast<float>(p.H) : 1.0f;
  run_sums(sums, weights, p.B, mean ? 1 : p.H, device.stream());
  return weights;
}

}  // namespace fastformer::cuda
#endif
