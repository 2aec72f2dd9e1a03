// What every launcher shares: the kernels of the machine's ISA level, and the way from stable-ABI tensors to
// the plain structs of shapes.h.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "../shapes.h"
#include "kernels.h"

namespace fastformer::cpu {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The kernels in use: the machine's best level.
const Kernels& kernels();

const char* isa_level();

// Takes another level, for tests; false where the machine lacks it. Not to be called while kernels run.
bool set_isa_level(const char* level);

DType dtype_of(const Tensor& tensor);
ScalarType scalar_type_of(DType dtype);

// An uninitialised contiguous CPU tensor, by the shortest way that the stable ABI has.
Tensor empty(IntHeaderOnlyArrayRef sizes, ScalarType dtype);

// The stride between rows of the last dimension where that dimension is contiguous and the others collapse to
// one; nothing where they do not.
std::optional<int64_t> row_stride(const Tensor& tensor);

Dropout dropout_of(double p, const std::optional<Tensor>& seed);

// Below this many elements a second thread costs more than it saves.
constexpr int64_t kElementsPerThread = 32768;

}  // namespace fastformer::cpu
