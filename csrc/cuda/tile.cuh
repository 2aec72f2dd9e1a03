// A row's units: how threads read, convert, drop and write a few neighbouring columns, and sum over a row.
#pragma once

#include "../philox.h"
#include "norm_plan.h"
#include "ptx.cuh"

namespace fastformer::cuda {

// A word of memory that holds one element.
template <DType kType>
struct ElementOf {
  using Type = uint16_t;
};
template <>
struct ElementOf<DType::kFloat32> {
  using Type = uint32_t;
};

// The nearest number that tensor cores take of a float32, whose last 13 bits are zero; of two the one further
// from zero, and of NaN perhaps another number. (cvt.rna.tf32.f32 is four instructions, because it keeps
// NaN.)
__device__ __forceinline__ uint32_t round_to_tf32(float x) {
  return (__float_as_uint(x) + 0x1000u) & 0xffffe000u;
}

// value = large + small, both of which tensor cores take: of a word they read all but the last 13 bits. Large
// is rounded, so that small halves, whose products with each other are left out, have any sign; of small no
// more than the value's last bit is cut off. Of inf small is NaN, and of NaN too, whatever large may be.
__device__ __forceinline__ void split_float32(uint32_t value, uint32_t& large, uint32_t& small) {
  const float whole = __uint_as_float(value);
  large = round_to_tf32(whole);
  small = __float_as_uint(whole - __uint_as_float(large));
}

// The word type of one unit in memory: 16 bytes, or 8 for four columns of a 16-bit type.
template <int kBytes>
struct WordsOf;
template <>
struct WordsOf<8> {
  using Type = uint2;
};
template <>
struct WordsOf<16> {
  using Type = uint4;
};

// For array indexing only: both dtypes fold away where the template argument is known.
__device__ __forceinline__ float unpack_half(uint32_t word, int half, DType dtype) {
  if (dtype == DType::kBFloat16) return __uint_as_float(half == 0 ? word << 16 : word & 0xffff0000u);
  return unpack_float16(static_cast<uint16_t>(half == 0 ? word : word >> 16));
}

__device__ __forceinline__ uint32_t pack_halves(float low, float high, DType dtype) {
  return dtype == DType::kBFloat16 ? pack_bfloat16(low, high) : pack_float16(low, high);
}

// value as it comes back from memory of this type.
__device__ __forceinline__ float rounded(float value, DType dtype) {
  return dtype == DType::kFloat32 ? value : unpack_half(pack_halves(value, 0.0f, dtype), 0, dtype);
}

// kUnit floats from the words of 16-bit or float32 memory.
template <int kUnit>
__device__ __forceinline__ void unpack(const uint32_t* words, DType dtype, float (&values)[kUnit]) {
  if (dtype == DType::kFloat32) {
#pragma unroll
    for (int e = 0; e < kUnit; ++e) values[e] = __uint_as_float(words[e]);
  } else {
#pragma unroll
    for (int e = 0; e < kUnit; ++e) values[e] = unpack_half(words[e / 2], e % 2, dtype);
  }
}

__device__ __forceinline__ float load_element(const void* row, DType dtype, int64_t column) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(row)[column];
  return unpack_half(static_cast<const uint16_t*>(row)[column], 0, dtype);
}

__device__ __forceinline__ void store_element(void* row, DType dtype, int64_t column, float value) {
  if (dtype == DType::kFloat32) {
    static_cast<float*>(row)[column] = value;
  } else {
    static_cast<uint16_t*>(row)[column] = static_cast<uint16_t>(pack_halves(value, 0.0f, dtype));
  }
}

// Unit `unit` of a row of any type; columns beyond the row are zeros.
template <int kUnit>
__device__ __forceinline__ void load_unit(const void* row, DType dtype, bool vector, int unit, int columns,
                                          float (&values)[kUnit]) {
  if (!vector) {
#pragma unroll
    for (int e = 0; e < kUnit; ++e) {
      const int column = unit * kUnit + e;
      values[e] = column < columns ? load_element(row, dtype, column) : 0.0f;
    }
  } else if (dtype == DType::kFloat32) {
#pragma unroll
    for (int i = 0; i < kUnit / 4; ++i) {
      const float4 four = static_cast<const float4*>(row)[unit * (kUnit / 4) + i];
      values[4 * i] = four.x, values[4 * i + 1] = four.y, values[4 * i + 2] = four.z,
                 values[4 * i + 3] = four.w;
    }
  } else {
    using Words = typename WordsOf<2 * kUnit>::Type;
    const Words words = static_cast<const Words*>(row)[unit];
    unpack(reinterpret_cast<const uint32_t*>(&words), dtype, values);
  }
}

// A unit of 16 bytes as it lies in memory: 4 columns of float32, or 8 of `dtype`.
__device__ __forceinline__ uint4 packed(const float (&values)[kNarrowUnit], DType) {
  return make_uint4(__float_as_uint(values[0]), __float_as_uint(values[1]), __float_as_uint(values[2]),
                    __float_as_uint(values[3]));
}

__device__ __forceinline__ uint4 packed(const float (&values)[kWideUnit], DType dtype) {
  return make_uint4(pack_halves(values[0], values[1], dtype), pack_halves(values[2], values[3], dtype),
                    pack_halves(values[4], values[5], dtype), pack_halves(values[6], values[7], dtype));
}

template <int kUnit>
__device__ __forceinline__ void store_unit(void* row, DType dtype, bool vector, int unit, int columns,
                                           const float (&values)[kUnit]) {
  if (!vector) {
#pragma unroll
    for (int e = 0; e < kUnit; ++e) {
      const int column = unit * kUnit + e;
      if (column < columns) store_element(row, dtype, column, values[e]);
    }
  } else if (dtype == DType::kFloat32) {
#pragma unroll
    for (int i = 0; i < kUnit / 4; ++i) {
      static_cast<float4*>(row)[unit * (kUnit / 4) + i] =
          make_float4(values[4 * i], values[4 * i + 1], values[4 * i + 2], values[4 * i + 3]);
    }
  } else {
    using Words = typename WordsOf<2 * kUnit>::Type;
    Words words;
#pragma unroll
    for (int i = 0; i < kUnit / 2; ++i) {
      reinterpret_cast<uint32_t*>(&words)[i] = pack_halves(values[2 * i], values[2 * i + 1], dtype);
    }
    static_cast<Words*>(row)[unit] = words;
  }
}

// All of a thread's units of one aligned row, [kUnits, 16 bytes]: every load is issued before the first is
// used. Units from `units` on are zeros.
template <int kUnits>
__device__ __forceinline__ void load_row(const void* row, int units, uint4 (&words)[kUnits]) {
#pragma unroll
  for (int k = 0; k < kUnits; ++k) {
    const int unit = k * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x);
    words[k] = load_streaming(static_cast<const uint4*>(row) + unit, unit < units);
  }
}

// A unit of a parameter [columns] of this type, aligned to 16 bytes.
template <DType kType, int kUnit>
__device__ __forceinline__ void load_parameter(const void* parameter, int unit, float (&values)[kUnit]) {
  constexpr int kWords = kUnit * (kType == DType::kFloat32 ? 4 : 2) / 16;
  uint4 words[kWords];
#pragma unroll
  for (int i = 0; i < kWords; ++i) words[i] = static_cast<const uint4*>(parameter)[unit * kWords + i];
  unpack(reinterpret_cast<const uint32_t*>(words), kType, values);
}

__device__ __forceinline__ const void* row_at(const void* base, DType dtype, int64_t element) {
  return static_cast<const char*>(base) + element * (dtype == DType::kFloat32 ? 4 : 2);
}

__device__ __forceinline__ void* row_at(void* base, DType dtype, int64_t element) {
  return static_cast<char*>(base) + element * (dtype == DType::kFloat32 ? 4 : 2);
}

// values = dropout(values). Column 8q + 2w + e of a row is kept by half e of word w of counter (q, row, 0,
// 1). A product of its own, never fused into a later sum, so that every backend rounds alike; what is dropped
// is +0, even where the value was NaN.
template <int kUnit>
__device__ __forceinline__ void drop_unit(uint64_t seed, int64_t row, int unit, uint32_t threshold,
                                          float scale, float (&values)[kUnit]) {
  const uint32_t call = static_cast<uint32_t>(unit) / (8 / kUnit);
  const PhiloxWords decisions = philox4x32_7(seed, call, static_cast<uint32_t>(row), 0, 1);
#pragma unroll
  for (int e = 0; e < kUnit; e += 2) {
    uint32_t word = decisions.w[e / 2];
    if (kUnit == 4 && unit % 2 == 1) word = decisions.w[e / 2 + 2];
    values[e] = (word & 0xffffu) >= threshold ? __fmul_rn(values[e], scale) : 0.0f;
    values[e + 1] = (word >> 16) >= threshold ? __fmul_rn(values[e + 1], scale) : 0.0f;
  }
}

template <int kUnit>
__device__ __forceinline__ float sum_of(const float (&values)[kUnit]) {
  float sum = (values[0] + values[1]) + (values[2] + values[3]);
  if constexpr (kUnit == 8) sum += (values[4] + values[5]) + (values[6] + values[7]);
  return sum;
}

// Sums over groups of `threads` neighbouring lanes, a power of two; every lane gets its group's.
__device__ __forceinline__ float warp_sum(float value, int threads) {
#pragma unroll
  for (int lane_bit = kWarp / 2; lane_bit > 0; lane_bit /= 2) {
    if (lane_bit < threads) value += __shfl_xor_sync(0xffffffffu, value, lane_bit);
  }
  return value;
}

// Sums `values` over the blockDim.x threads that share a row; every thread gets the same bits. Rows wider
// than a warp meet in `shared` [kMaxWarps], where no other sum may be under way; all threads of the block
// must call.
template <int kCount>
__device__ __forceinline__ void row_sum(float (&values)[kCount], float (*shared)[kCount]) {
  const int threads = static_cast<int>(blockDim.x);
  if (threads < kWarp) {
#pragma unroll 1
    for (int lane_bit = threads / 2; lane_bit > 0; lane_bit /= 2) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) values[i] += __shfl_xor_sync(0xffffffffu, values[i], lane_bit);
    }
    return;
  }
  // Each half of the lanes adds up one of two values.
  static_assert(kCount <= 2 && kMaxWarps <= kWarp / 2);
  constexpr int kHalf = kWarp / 2;
  const uint32_t lane = threadIdx.x % kWarp, own = kCount * lane / kWarp;
  const float given = kCount == 2 && own == 0 ? values[1] : values[0];
  float sum = kCount == 2 && own == 1 ? values[1] : values[0];
  sum += __shfl_xor_sync(0xffffffffu, given, kHalf);
  sum = warp_sum(sum, kHalf);
  if (threads > kWarp) {
    const uint32_t warps = blockDim.x / kWarp, first = threadIdx.y * warps, other = lane % kHalf;
    if (lane % (kWarp / kCount) == 0) shared[first + threadIdx.x / kWarp][own] = sum;
    __syncthreads();
    sum = warp_sum(other < warps ? shared[first + other][own] : 0.0f, kHalf);
  }
  values[0] = sum;
  if constexpr (kCount == 2) {
    const float others = __shfl_xor_sync(0xffffffffu, sum, kHalf);
    values[0] = own == 0 ? sum : others;
    values[1] = own == 1 ? sum : others;
  }
}

}  // namespace fastformer::cuda
