// Every asm statement of the project, one thin function each.
#pragma once

#include <cstdint>

namespace fastformer::cuda {

// 16 bytes that this block reads once, or zeros where `wanted` is false. Straight-line code, so that the
// compiler can issue many before it waits for the first; past L1, which is kept for what rows share (weight,
// bias).
__device__ __forceinline__ uint4 load_streaming(const void* address, bool wanted) {
  uint4 words;
  asm("{\n"
      "  .reg .pred wanted;\n"
      "  setp.ne.b32 wanted, %5, 0;\n"
      "  mov.b32 %0, 0; mov.b32 %1, 0; mov.b32 %2, 0; mov.b32 %3, 0;\n"
      "  @wanted ld.global.nc.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];\n"
      "}\n"
      : "=&r"(words.x), "=&r"(words.y), "=&r"(words.z), "=&r"(words.w)
      : "l"(address), "r"(static_cast<int>(wanted)));
  return words;
}

// Two floats rounded to nearest even, `low` in the low half.
__device__ __forceinline__ uint32_t pack_bfloat16(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

__device__ __forceinline__ uint32_t pack_float16(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

__device__ __forceinline__ float unpack_float16(uint16_t bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

// About 2 ulp.
__device__ __forceinline__ float reciprocal_sqrt(float x) {
  float root;
  asm("rsqrt.approx.f32 %0, %1;" : "=f"(root) : "f"(x));
  return root;
}

}  // namespace fastformer::cuda
