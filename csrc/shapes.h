// Plain sizes, strides and pointers: all that a kernel knows of a tensor. No torch here.
#pragma once

#include <cstdint>

namespace fastformer {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

enum class DType : int32_t { kFloat32, kBFloat16, kFloat16 };

inline int64_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

}  // namespace fastformer
