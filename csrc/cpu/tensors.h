// The way from stable-ABI tensors to the plain structs of shapes.h, for every launcher.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "../shapes.h"

namespace fastformer::cpu {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::stable::Tensor;

DType dtype_of(const Tensor& tensor);

// An uninitialised contiguous CPU tensor, by the shortest way that the stable ABI has.
Tensor empty(IntHeaderOnlyArrayRef sizes, DType dtype);

std::vector<int64_t> sizes_of(const Tensor& tensor);

// The stride between rows of the last dimension where that dimension is contiguous and the others collapse to
// one; nothing where they do not.
std::optional<int64_t> row_stride(const Tensor& tensor);

// A tensor as float32, converted where it is not; empty where there is none.
class Float32Copy {
 public:
  explicit Float32Copy(const std::optional<Tensor>& given);
  Float32Copy(const Float32Copy&) = delete;
  const float* data() const { return data_; }

 private:
  std::optional<Tensor> row_;
  std::vector<float> converted_;
  const float* data_ = nullptr;
};

Dropout dropout_of(double p, const std::optional<Tensor>& seed);

inline int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace fastformer::cpu
