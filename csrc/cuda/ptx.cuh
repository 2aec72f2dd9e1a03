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

// 2^x, about 2 ulp; 2^-inf is 0.
__device__ __forceinline__ float exp2_approximate(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}

__device__ __forceinline__ float reciprocal_approximate(float x) {
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(x));
  return inverse;
}

// `value`, of which the compiler knows nothing any more: what is computed from it in a loop is not kept in
// registers around the loop.
__device__ __forceinline__ uint32_t forgotten(uint32_t value) {
  asm volatile("" : "+r"(value));
  return value;
}

__device__ __forceinline__ uint4 forgotten(uint4 words) {
  return {forgotten(words.x), forgotten(words.y), forgotten(words.z), forgotten(words.w)};
}

// The same of a pointer: what follows from it is computed step by step, and not all of it at once, in
// registers of its own.
template <typename T>
__device__ __forceinline__ const T* forgotten(const T* pointer) {
  asm("" : "+l"(pointer));
  return pointer;
}

// The address of shared memory as the instructions below take it.
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Starts a copy of 16 aligned bytes into shared memory, past L1; zeros where `wanted` is false, and then
// nothing is read.
__device__ __forceinline__ void copy_async(uint32_t shared, const void* global, bool wanted) {
  asm volatile(
      "{\n"
      "  .reg .pred ignored;\n"
      "  setp.eq.b32 ignored, %2, 0;\n"
      "  cp.async.cg.shared.global.L2::128B [%0], [%1], 16, ignored;\n"
      "}\n" ::"r"(shared),
      "l"(global), "r"(static_cast<int>(wanted))
      : "memory");
}

// The same of 4 bytes, aligned to as many; by way of L1.
__device__ __forceinline__ void copy_async_word(uint32_t shared, const void* global, bool wanted) {
  asm volatile(
      "{\n"
      "  .reg .pred ignored;\n"
      "  setp.eq.b32 ignored, %2, 0;\n"
      "  cp.async.ca.shared.global [%0], [%1], 4, ignored;\n"
      "}\n" ::"r"(shared),
      "l"(global), "r"(static_cast<int>(wanted))
      : "memory");
}

__device__ __forceinline__ void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kPending of this thread's groups of copies are under way.
template <int kPending>
__device__ __forceinline__ void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

__device__ __forceinline__ void store_shared(uint32_t shared, uint4 words) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(shared), "r"(words.x), "r"(words.y),
               "r"(words.z), "r"(words.w)
               : "memory");
}

__device__ __forceinline__ void store_shared(uint32_t shared, uint32_t word) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(shared), "r"(word) : "memory");
}

// (Of a plain store of two nvcc now and then makes two, in the same banks.)
__device__ __forceinline__ void store_shared(uint32_t shared, float2 values) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(shared), "f"(values.x), "f"(values.y) : "memory");
}

__device__ __forceinline__ void store_shared(uint32_t shared, uint16_t half) {
  asm volatile("st.shared.b16 [%0], %1;" ::"r"(shared), "h"(half) : "memory");
}

__device__ __forceinline__ uint2 load_shared_pair(uint32_t shared) {
  uint2 words;
  asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(words.x), "=r"(words.y) : "r"(shared) : "memory");
  return words;
}

__device__ __forceinline__ uint4 load_shared(uint32_t shared) {
  uint4 words;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
               : "r"(shared)
               : "memory");
  return words;
}

__device__ __forceinline__ uint32_t load_shared_word(uint32_t shared) {
  uint32_t word;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(word) : "r"(shared) : "memory");
  return word;
}

// Starts over what other blocks have written: everything before their `store_release` of what is read here.
__device__ __forceinline__ int32_t load_acquire(const int32_t* address) {
  int32_t value;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}

__device__ __forceinline__ void store_release(int32_t* address, int32_t value) {
  asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}

// From L2, where other blocks' stores arrive.
__device__ __forceinline__ void load_past_l1(const float* address, float (&values)[4]) {
  asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(values[0]), "=f"(values[1]), "=f"(values[2]), "=f"(values[3])
               : "l"(address)
               : "memory");
}

__device__ __forceinline__ void store_past_l1(float* address, const float (&values)[4]) {
  asm volatile("st.global.cg.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(address), "f"(values[0]), "f"(values[1]),
               "f"(values[2]), "f"(values[3])
               : "memory");
}

// 16 aligned bytes. (Of a plain store beside one of single elements nvcc makes four.)
__device__ __forceinline__ void store_global(void* address, uint4 words) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(words.x), "r"(words.y),
               "r"(words.z), "r"(words.w)
               : "memory");
}

// Four 8x8 matrices of 16-bit elements. Lane 8 i + r gives the address of row r of matrix i, 16 bytes; word i
// of lane l becomes row l / 4, columns 2 (l % 4) and the next, of matrix i.
__device__ __forceinline__ void load_matrices(uint32_t shared, uint32_t (&words)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(shared)
               : "memory");
}

// The same, of the matrices transposed.
__device__ __forceinline__ void load_matrices_transposed(uint32_t shared, uint32_t (&words)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(shared)
               : "memory");
}

// sum [16, 8] += a [16, 16] b [16, 8], float32 sums of a warp. Lane l holds of sum rows l / 4 and l / 4 + 8,
// columns 2 (l % 4) and the next.
__device__ __forceinline__ void multiply_bfloat16(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0,
                                                  uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void multiply_float16(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0,
                                                 uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// sum [16, 8] += a [16, 8] b [8, 8], of words as round_to_tf32 gives them. Lane l holds of a rows l / 4 and
// l / 4 + 8 of column l % 4, then of column l % 4 + 4; of b rows l % 4 and l % 4 + 4 of column l / 4.
__device__ __forceinline__ void multiply_tf32(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0,
                                              uint32_t b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace fastformer::cuda
