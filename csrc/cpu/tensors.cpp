#include "tensors.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cmath>

#include "launch.h"

namespace fastformer::cpu {

DType dtype_of(const Tensor& tensor) {
  using torch::headeronly::ScalarType;
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      STD_TORCH_CHECK(false, "the cpu backend serves float32, bfloat16 and float16 only");
  }
}

Tensor empty(IntHeaderOnlyArrayRef sizes, DType dtype) {
  constexpr size_t kMaxDims = 64;
  STD_TORCH_CHECK(sizes.size() <= kMaxDims, "at most 64 dimensions, got ", sizes.size());
  int64_t strides[kMaxDims];
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = stride;
    stride *= sizes[d] > 1 ? sizes[d] : 1;
  }
  const int32_t type = dtype == DType::kFloat32    ? aoti_torch_dtype_float32()
                       : dtype == DType::kBFloat16 ? aoti_torch_dtype_bfloat16()
                                                   : aoti_torch_dtype_float16();
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides,
                                                  type, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

std::vector<int64_t> sizes_of(const Tensor& tensor) {
  return std::vector<int64_t>(tensor.sizes().begin(), tensor.sizes().end());
}

std::optional<int64_t> row_stride(const Tensor& tensor) {
  const IntHeaderOnlyArrayRef sizes = tensor.sizes();
  const IntHeaderOnlyArrayRef strides = tensor.strides();
  const size_t last = sizes.size() - 1;
  if (sizes[last] > 1 && strides[last] != 1) return std::nullopt;
  int64_t row = sizes[last];  // of a single row, where any stride would do
  int64_t expected = -1;
  for (size_t d = last; d-- > 0;) {
    if (sizes[d] == 1) continue;
    if (expected < 0) {
      row = strides[d];
    } else if (strides[d] != expected) {
      return std::nullopt;
    }
    expected = strides[d] * sizes[d];
  }
  return row;
}

Float32Copy::Float32Copy(const std::optional<Tensor>& given) {
  if (!given) return;
  row_ = given->is_contiguous() ? *given : torch::stable::contiguous(*given);
  const int64_t count = row_->numel();
  if (dtype_of(*row_) == DType::kFloat32) {
    data_ = row_->const_data_ptr<float>();
  } else {
    converted_.resize(static_cast<size_t>(count));
    kernels().norm.to_float32(row_->const_data_ptr(), dtype_of(*row_), converted_.data(), count);
    data_ = converted_.data();
  }
}

Dropout dropout_of(double p, const std::optional<Tensor>& seed) {
  Dropout dropout;
  if (p == 0.0) return dropout;
  STD_TORCH_CHECK(seed.has_value(), "dropout_p > 0 needs a seed");
  STD_TORCH_CHECK(p > 0.0 && p <= 1.0, "dropout_p must be in [0, 1], got ", p);
  dropout.seed = static_cast<uint64_t>(*seed->const_data_ptr<int64_t>());
  dropout.threshold = static_cast<uint32_t>(std::nearbyint(p * 65536.0));  // half to even
  dropout.scale =
      dropout.threshold == 65536 ? 0.0f : static_cast<float>(65536.0 / (65536.0 - dropout.threshold));
  return dropout;
}

}  // namespace fastformer::cpu
