// What the launchers of the passes after attention's forward share.
#pragma once

#include "attention_bwd_plan.h"
#include "tensors.h"

namespace fastformer::cuda {

inline Tensor contiguous_like(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return empty_on(tensor, IntHeaderOnlyArrayRef(sizes.data(), sizes.size()), tensor.scalar_type());
}

inline Tensor floats_on(const Tensor& like, int64_t size) {
  return empty_on(like, IntHeaderOnlyArrayRef(&size, 1), ScalarType::Float);
}

inline float* floats_of(Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

inline void set_zero(Tensor& tensor, cudaStream_t stream) {
  if (tensor.numel() == 0) return;
  const size_t bytes = tensor.numel() * size_of(dtype_of(tensor, "gradient"));
  const cudaError_t error = cudaMemsetAsync(tensor.mutable_data_ptr(), 0, bytes, stream);
  STD_TORCH_CHECK(error == cudaSuccess, "a gradient was not zeroed: ", cudaGetErrorString(error));
}

inline bool has_sizes(const Tensor& tensor, const std::vector<int64_t>& sizes) {
  if (tensor.dim() != static_cast<int64_t>(sizes.size())) return false;
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (tensor.size(d) != sizes[d]) return false;
  }
  return true;
}

// The size of dimension `from_end` (1 = last), 1 where it is missing.
inline int32_t size_from_end(const Tensor& tensor, int64_t from_end) {
  return tensor.dim() < from_end ? 1 : static_cast<int32_t>(tensor.size(tensor.dim() - from_end));
}

// Of row statistics: [B, H, M], or packed [H, total].
inline std::vector<int64_t> statistics_sizes(const Tensor& query, bool packed) {
  std::vector<int64_t> sizes(query.sizes().begin(), query.sizes().end());
  sizes.pop_back();
  if (packed) std::swap(sizes[0], sizes[1]);
  return sizes;
}

// The statistics that forward left.
inline void set_statistics(const Tensor& row_max, const Tensor& row_sum, const Tensor& query, bool packed,
                           AttentionFwdParams& p) {
  for (const Tensor* const each : {&row_max, &row_sum}) {
    STD_TORCH_CHECK(
        has_sizes(*each, statistics_sizes(query, packed)) && each->is_contiguous() &&
            each->scalar_type() == ScalarType::Float,
        "row_max and row_sum must be as attention_fwd gave them: contiguous float32 [B, H, M], or "
        "packed [H, total]");
  }
  p.row_max = static_cast<float*>(const_cast<void*>(row_max.const_data_ptr()));
  p.row_sum = static_cast<float*>(const_cast<void*>(row_sum.const_data_ptr()));
  p.stats_stride_b = packed ? 0 : row_max.stride(0);
  p.stats_stride_h = row_max.stride(packed ? 0 : 1);
}

// The sums that backward runs (launch_attention_sums.cu). `bwd` is after its plan; block_m is the plan's.

// Fills bwd.deltas, of a call whose weights have a gradient; before pivots are known.
void sum_deltas(const AttentionBwdParams& bwd, cudaStream_t stream);

// The gradient of a bias [B or 1, H or 1, M or 1, N].
void sum_bias(const AttentionBwdParams& bwd, int32_t block_m, Tensor& grad, cudaStream_t stream);

// The gradient of relative_bias, float32 [H or 1, M + N - 1].
void sum_relative_bias(const AttentionBwdParams& bwd, int32_t block_m, Tensor& grad, cudaStream_t stream);

}  // namespace fastformer::cuda
