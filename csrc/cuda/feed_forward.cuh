// feed_forward's kernels: what its products are multiplied for. With hd the hidden rows as w2 meets them,
//
//   pre = x w1^T + b1;  hd = dropout(act(pre)), gated dropout(act(pre_gate) pre);  out = hd w2^T + b2
//   dh = dropout'(grad_out w2);  dpre = dh act'(pre), gated dh act(pre_gate);  dgate = dh pre act'(pre_gate)
//   dx = dpre w1 + dgate w_gate;  dw2 = grad_out^T hd;  dw1 = dpre^T x;  dw_gate = dgate^T x
//
// and gradients of biases are sums of columns: of grad_out, and of dpre and dgate, whose sums over each
// tile's rows the kernel that makes them leaves behind.
#pragma once

#include "activations.cuh"
#include "gemm.cuh"

namespace fastformer::cuda {

// values = dropout(values) of a row group; what is dropped is +0, even where the value was NaN.
__device__ __forceinline__ void drop(const GemmParams& p, const PhiloxWords& decisions, float (&values)[8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const uint32_t decision = i % 2 == 0 ? decisions.w[i / 2] & 0xffffu : decisions.w[i / 2] >> 16;
    values[i] = decision >= p.threshold ? values[i] * p.scale : 0.0f;
  }
}

// The decisions on a row group: column 32 J + 8 w + 2 t + e is kept by half e of word w of counter (4 J + t,
// row, 0, 2).
__device__ __forceinline__ PhiloxWords decisions_on(uint64_t seed, const RowGroup& group) {
  const uint32_t call = static_cast<uint32_t>(group.column / 8 + RowGroup::place());
  return philox4x32_7(seed, call, static_cast<uint32_t>(group.row), 0, 2);
}

// kHidden: from the products with w1 and w_gate to pre, pre_gate and hidden rows.
template <DType kType>
struct HiddenRows {
  const GemmParams& p;
  const uint64_t seed;
  float bias[8], gate_bias[8];

  __device__ __forceinline__ explicit HiddenRows(const GemmParams& p)
      : p(p), seed(p.threshold > 0 ? *p.seed : 0) {}

  __device__ __forceinline__ void begin(int column) {
    const RowGroup columns{0, column};
    columns.load_vector<kType>(p, p.bias, bias);
    columns.load_vector<kType>(p, p.gate_bias, gate_bias);
  }

  __device__ __forceinline__ void take(const RowGroup& group, float (&pre)[8], float (&gate)[8]) const {
    const bool gated = p.gated;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      pre[i] += bias[i];
      gate[i] = gated ? gate[i] + gate_bias[i] : pre[i];
    }
    if (p.pre != nullptr) group.store<kType>(p, p.pre, pre);
    if (p.pre_gate != nullptr) group.store<kType>(p, p.pre_gate, gate);
    if (p.out == nullptr) return;
    activate(p.activation, gate);
#pragma unroll
    for (int i = 0; i < 8; ++i) gate[i] = gated ? gate[i] * pre[i] : gate[i];
    if (p.threshold > 0) drop(p, decisions_on(seed, group), gate);
    group.store<kType>(p, p.out, gate);
  }

  __device__ __forceinline__ void end(int, int) const {}
};

// The other products' sums as they are, plus a bias; or one part's share of them.
template <DType kType>
struct PlainRows {
  const GemmParams& p;
  const int part;
  float bias[8];

  __device__ __forceinline__ void begin(int column) {
    RowGroup{0, column}.load_vector<kType>(p, part == 0 ? p.bias : nullptr, bias);
  }

  __device__ __forceinline__ void take(const RowGroup& group, float (&values)[8], float (&)[8]) const {
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] += bias[i];
    if (p.parts == nullptr) return group.store<kType>(p, p.out, values);
    group.store_floats(p, p.parts + int64_t{part} * p.M * p.N, p.N % 2 == 0, values);
  }

  __device__ __forceinline__ void end(int, int) const {}
};

// kHiddenGradient: from grad_out w2 to hidden rows, dpre and dgate, and to the sums of the last two over the
// block's rows, in a fixed order: a lane's, a warp's of a pass, then those of both passes and rows of warps.
template <DType kType>
struct HiddenGradients {
  static constexpr int kShares = 4;  // of a column's sum: passes times rows of warps

  const GemmParams& p;
  const uint64_t seed;
  float* const shared_sums;  // [2, kShares, kGemmBlock], of dpre and of dgate
  float sums[2][8];

  __device__ __forceinline__ HiddenGradients(const GemmParams& p, float* shared_sums)
      : p(p), seed(p.threshold > 0 ? *p.seed : 0), shared_sums(shared_sums) {}

  __device__ __forceinline__ void begin(int) {
#pragma unroll
    for (int i = 0; i < 8; ++i) sums[0][i] = sums[1][i] = 0.0f;
  }

  __device__ __forceinline__ void take(const RowGroup& group, float (&dh)[8], float (&)[8]) {
    const bool gated = p.pre_gate != nullptr;
    PhiloxWords decisions{};
    if (p.threshold > 0) {
      decisions = decisions_on(seed, group);
      drop(p, decisions, dh);
    }
    // x is what the activation is taken of, then its value; dx what meets its slope, then the product.
    float pre[8], x[8], dx[8];
    group.load<kType>(p, p.pre, pre);
    if (gated) group.load<kType>(p, p.pre_gate, x);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      x[i] = gated ? x[i] : pre[i];
      dx[i] = gated ? dh[i] * pre[i] : dh[i];
    }
    activate(p.activation, x, dx);
    if (gated) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        dh[i] *= x[i];  // dpre
        x[i] *= pre[i];
      }
      if (p.dgate != nullptr) group.store<kType>(p, p.dgate, dx);
      add(group, dx, sums[1]);
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) dh[i] = dx[i];
    }
    if (p.dpre != nullptr) group.store<kType>(p, p.dpre, dh);
    add(group, dh, sums[0]);
    if (p.out == nullptr) return;
    if (p.threshold > 0) drop(p, decisions, x);
    group.store<kType>(p, p.out, x);
  }

  __device__ __forceinline__ void end(int pass, int column) {
    const int share = 2 * pass + static_cast<int>(threadIdx.x) / kWarp / 2;
    const RowGroup columns{0, column};
#pragma unroll
    for (int kind = 0; kind < 2; ++kind) {
      if ((kind == 0 ? p.dpre_sums : p.dgate_sums) == nullptr) continue;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        float sum = sums[kind][i];
        // Over the eight rows of lanes.
#pragma unroll
        for (int bit = 4; bit < kWarp; bit *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, bit);
        if (threadIdx.x % kWarp < 4) {
          shared_sums[(kind * kShares + share) * kGemmBlock + columns.column_of(i)] = sum;
        }
      }
    }
  }

  // After all: the tile's sums. All threads of the block must call.
  __device__ __forceinline__ void store_sums(const GemmPlace& place) const {
    __syncthreads();
    const int column = place.n0 + static_cast<int>(threadIdx.x);
    if (column >= p.N) return;
    const int64_t at = int64_t{place.m0 / kGemmBlock} * p.N + column;
#pragma unroll
    for (int kind = 0; kind < 2; ++kind) {
      float* const to = kind == 0 ? p.dpre_sums : p.dgate_sums;
      if (to == nullptr) continue;
      float sum = 0.0f;
#pragma unroll
      for (int share = 0; share < kShares; ++share) {
        sum += shared_sums[(kind * kShares + share) * kGemmBlock + threadIdx.x];
      }
      to[at] = sum;
    }
  }

 private:
  __device__ __forceinline__ void add(const RowGroup& group, const float (&values)[8], float (&to)[8]) const {
#pragma unroll
    for (int i = 0; i < 8; ++i) to[i] += group.row < p.M ? values[i] : 0.0f;
  }
};

template <DType kType, GemmKernel kKernel>
using TileOf = GemmTile<kType, has_k_rows_a(kKernel), has_k_rows_b(kKernel)>;

// A block makes one tile of one product's result, or one part's share of it.
template <DType kType, GemmKernel kKernel>
__global__ void __launch_bounds__(kGemmThreads, kGemmBlocks)
    feed_forward_kernel(const __grid_constant__ GemmParams p) {
  extern __shared__ __align__(128) uint8_t dynamic_shared[];
  const bool gated = kKernel == GemmKernel::kHidden && p.gated;
  TileOf<kType, kKernel> tile(p, gated, shared_address(dynamic_shared));
  if constexpr (kKernel == GemmKernel::kInputGradient) {
#pragma unroll 1
    for (int product = 0; product < (p.a2.data == nullptr ? 1 : 2); ++product) {
      const GemmOperand a = product == 0 ? p.a : p.a2, b = product == 0 ? p.b : p.b2;
      tile.accumulate(a, b, b);
    }
  } else {
    const GemmOperand high = gated ? p.gate : p.b;
    tile.accumulate(p.a, p.b, high);
  }

  if constexpr (kKernel == GemmKernel::kHidden) {
    HiddenRows<kType> epilogue(p);
    tile.finish(epilogue);
  } else if constexpr (kKernel == GemmKernel::kHiddenGradient) {
    // Behind the sums that finish() keeps.
    HiddenGradients<kType> epilogue(p, reinterpret_cast<float*>(dynamic_shared + 2 * kStageBytes));
    tile.finish(epilogue);
    epilogue.store_sums(tile.place());
  } else {
    PlainRows<kType> epilogue{p, tile.place().part};
    tile.finish(epilogue);
  }
}

// A block adds the rows of one part of a matrix in blockDim.x columns, blockDim.y of them side by side.
template <int kLines>
__global__ void __launch_bounds__(kSumThreads)
    column_sums_kernel(const __grid_constant__ ColumnSumsParams p) {
  __shared__ float shares[kLines][kSumThreads / kLines];
  const int64_t column = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const int64_t begin = blockIdx.y * p.depth, end = min(begin + p.depth, p.rows);
  float sum = 0.0f;
  if (column < p.columns) {
#pragma unroll 4
    for (int64_t row = begin + threadIdx.y; row < end; row += blockDim.y) {
      sum += load_element(row_at(p.matrix, p.dtype, row * p.stride), p.dtype, column);
    }
  }
  if (blockDim.y > 1) {
    shares[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y > 0) return;
    sum = 0.0f;
#pragma unroll
    for (int line = 0; line < kLines; ++line) sum += shares[line][threadIdx.x];
  }
  if (column < p.columns) {
    store_element(row_at(p.out, p.out_dtype, blockIdx.y * p.columns), p.out_dtype, column, sum);
  }
}

}  // namespace fastformer::cuda
