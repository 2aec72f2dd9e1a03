// Rows of a product's result on their way between the sums that tensor cores leave and memory.
#pragma once

#include "feed_forward_plan.h"
#include "tile.cuh"

namespace fastformer::cuda {

// Lane t of the four that share a row gives word w of its own, and gets word t of lane w.
__device__ __forceinline__ void transpose_quad(uint32_t (&words)[4]) {
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2) {
    const bool upper = (threadIdx.x & bit) != 0;
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      if ((w & bit) != 0) continue;
      const uint32_t theirs = __shfl_xor_sync(0xffffffffu, upper ? words[w] : words[w | bit], bit);
      words[w] = upper ? theirs : words[w];
      words[w | bit] = upper ? words[w | bit] : theirs;
    }
  }
}

// Eight elements of a row of c: of the 32 columns from `column` on a lane has 8 w + 2 t + e as element 2 w +
// e, where t is its place among the four lanes of the row. Dropout decides in the same order.
struct RowGroup {
  int row, column;

  static __device__ __forceinline__ int place() { return static_cast<int>(threadIdx.x) % 4; }
  // Of element i.
  __device__ __forceinline__ int column_of(int i) const { return column + i / 2 * 8 + 2 * place() + i % 2; }

  // To and from a contiguous matrix [M, N] of the call's dtype. All lanes of a warp must call.
  template <DType kType>
  __device__ __forceinline__ void store(const GemmParams& p, void* matrix, const float (&values)[8]) const {
    if constexpr (kType == DType::kFloat32) {
      store_floats(p, static_cast<float*>(matrix), p.aligned_c, values);
    } else {
      uint16_t* const to = static_cast<uint16_t*>(matrix) + int64_t{row} * p.N;
      uint32_t words[4];
#pragma unroll
      for (int w = 0; w < 4; ++w) words[w] = pack_halves(values[2 * w], values[2 * w + 1], kType);
      if (p.aligned_c) {
        transpose_quad(words);
        const int first = column + 8 * place();
        if (row < p.M && first < p.N)
          store_global(to + first, make_uint4(words[0], words[1], words[2], words[3]));
      } else {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const uint16_t half = static_cast<uint16_t>(words[i / 2] >> i % 2 * 16);
          if (row < p.M && column_of(i) < p.N) to[column_of(i)] = half;
        }
      }
    }
  }

  // To a contiguous float32 matrix [M, N]; in aligned pairs, of which a warp's make whole sectors, if
  // `pairs`.
  __device__ __forceinline__ void store_floats(const GemmParams& p, float* matrix, bool pairs,
                                               const float (&values)[8]) const {
    if (row >= p.M) return;
    float* const to = matrix + int64_t{row} * p.N;
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
      const int first = column_of(i);
      if (pairs) {
        if (first < p.N) *reinterpret_cast<float2*>(to + first) = make_float2(values[i], values[i + 1]);
      } else {
        if (first < p.N) to[first] = values[i];
        if (first + 1 < p.N) to[first + 1] = values[i + 1];
      }
    }
  }

  // Zeros past the ends.
  template <DType kType>
  __device__ __forceinline__ void load(const GemmParams& p, const void* matrix, float (&values)[8]) const {
    const auto* const from = static_cast<const typename ElementOf<kType>::Type*>(matrix) + int64_t{row} * p.N;
    if (!p.aligned_c) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const bool real = row < p.M && column_of(i) < p.N;
        values[i] = real ? load_element(from, kType, column_of(i)) : 0.0f;
      }
    } else if constexpr (kType == DType::kFloat32) {
#pragma unroll
      for (int i = 0; i < 8; i += 2) {
        const bool real = row < p.M && column_of(i) < p.N;
        const float2 pair =
            real ? *reinterpret_cast<const float2*>(from + column_of(i)) : make_float2(0.0f, 0.0f);
        values[i] = pair.x, values[i + 1] = pair.y;
      }
    } else {
      const int first = column + 8 * place();
      const uint4 unit = load_streaming(from + first, row < p.M && first < p.N);
      uint32_t words[4] = {unit.x, unit.y, unit.z, unit.w};
      transpose_quad(words);
      unpack(words, kType, values);
    }
  }

  // Elements of a vector [N], zeros past its end.
  template <DType kType>
  __device__ __forceinline__ void load_vector(const GemmParams& p, const void* vector,
                                              float (&values)[8]) const {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const bool real = vector != nullptr && column_of(i) < p.N;
      values[i] = real ? load_element(vector, kType, column_of(i)) : 0.0f;
    }
  }
};

}  // namespace fastformer::cuda
