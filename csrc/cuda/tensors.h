// The way from stable-ABI tensors on a GPU to the plain pointers and strides that kernels take.
#pragma once

#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <optional>
#include <vector>

#include "../shapes.h"

namespace fastformer::cuda {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// After a launch; `kernel` is its name, and what tells its instantiations apart.
template <typename... Words>
void check_launched(cudaError_t error, const Words&... kernel) {
  STD_TORCH_CHECK(error == cudaSuccess, kernel..., " was not launched: ", cudaGetErrorString(error));
}

inline DType dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      STD_TORCH_CHECK(false, name, " must be float32, bfloat16 or float16, got ",
                      torch::headeronly::toString(tensor.scalar_type()));
  }
}

inline ScalarType scalar_type_of(DType dtype) {
  return dtype == DType::kFloat32    ? ScalarType::Float
         : dtype == DType::kBFloat16 ? ScalarType::BFloat16
                                     : ScalarType::Half;
}

// An uninitialised contiguous tensor on `like`'s device; a direct call, where new_empty would go through the
// dispatcher with boxed arguments.
inline Tensor empty_on(const Tensor& like, IntHeaderOnlyArrayRef sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = stride;
    stride *= sizes[d] > 1 ? sizes[d] : 1;
  }
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                               torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
                               aoti_torch_device_type_cuda(), like.get_device_index(), &handle));
  return Tensor(handle);
}

inline Tensor nothing_on(const Tensor& like, ScalarType dtype) {
  const int64_t zero = 0;
  return empty_on(like, IntHeaderOnlyArrayRef(&zero, 1), dtype);
}

// A tensor read as rows of its last dimension, `stride` elements apart; owns the copy, if one had to be made.
struct Rows {
  Tensor tensor;
  int64_t stride;

  const void* data() const { return tensor.const_data_ptr(); }
};

// In place where the last dimension is contiguous and the others collapse to one stride, else copied once.
inline Rows rows_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  const auto strides = tensor.strides();
  const int64_t last = tensor.dim() - 1;
  bool collapses = sizes[last] == 1 || strides[last] == 1;
  int64_t stride = 0, inner = 0;  // of the rows; of the first row past those seen so far
  bool found = false;
  for (int64_t d = last - 1; d >= 0 && collapses; --d) {
    if (sizes[d] == 1) continue;
    if (!found) {
      stride = strides[d];
      found = true;
    } else {
      collapses = strides[d] == inner;
    }
    inner = strides[d] * sizes[d];
  }
  if (collapses) return {tensor, found ? stride : sizes[last]};
  return {torch::stable::contiguous(tensor), sizes[last]};
}

// Dropout as kernels are told of it: `threshold`, the device pointer `seed`, and `scale`.
template <typename Params>
void set_dropout(Params& p, double dropout_p, const std::optional<Tensor>& seed) {
  p.threshold = static_cast<uint32_t>(std::nearbyint(dropout_p * 65536.0));  // half to even
  if (p.threshold == 0) return;
  STD_TORCH_CHECK(seed.has_value() && seed->scalar_type() == ScalarType::Long && seed->numel() == 1,
                  "dropout needs a seed: an int64 tensor of one element");
  p.seed = static_cast<const uint64_t*>(seed->const_data_ptr());
  p.scale = p.threshold == 65536 ? 0.0f : static_cast<float>(65536.0 / (65536.0 - p.threshold));
}

// A parameter [columns], contiguous (copied if it was not), or nothing.
inline std::optional<Tensor> row_parameter(const std::optional<Tensor>& tensor, int64_t columns,
                                           const char* name) {
  if (!tensor.has_value()) return std::nullopt;
  STD_TORCH_CHECK(tensor->dim() == 1 && tensor->size(0) == columns, name, " must have ", columns,
                  " elements");
  return tensor->is_contiguous() ? *tensor : torch::stable::contiguous(*tensor);
}

// Makes the tensors' device current for torch and for this module's own copy of the CUDA runtime, and finds
// the stream that torch is working on there.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& tensor)
      : guard_(tensor.get_device_index()), device_(tensor.get_device_index()) {
    const cudaError_t error = cudaSetDevice(device_);
    STD_TORCH_CHECK(error == cudaSuccess, "CUDA device ", device_,
                    " cannot be used: ", cudaGetErrorString(error));
    using Lookup = AOTITorchError (*)(int32_t, void**);
    static const auto lookup = reinterpret_cast<Lookup>(find("aoti_torch_get_current_cuda_stream"));
    STD_TORCH_CHECK(
        lookup != nullptr,
        "aoti_torch_get_current_cuda_stream was not found in libtorch_cuda.so: this torch has no CUDA, or is "
        "older than 2.11");
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(lookup(device_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  cudaStream_t stream() const { return stream_; }

  int multiprocessors() const { return attribute(cudaDevAttrMultiProcessorCount); }

  // Of its compute capability.
  int major() const { return attribute(cudaDevAttrComputeCapabilityMajor); }

 private:
  int attribute(cudaDeviceAttr which) const {
    int value = 0;
    const cudaError_t error = cudaDeviceGetAttribute(&value, which, device_);
    STD_TORCH_CHECK(error == cudaSuccess, "CUDA device ", device_, ": ", cudaGetErrorString(error));
    return value;
  }

  // RTLD_DEFAULT does not see libraries that Python loaded privately.
  static void* find(const char* symbol) {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    return library == nullptr ? nullptr : dlsym(library, symbol);
  }

  torch::stable::accelerator::DeviceGuard guard_;
  int32_t device_;
  cudaStream_t stream_ = nullptr;
};

}  // namespace fastformer::cuda
