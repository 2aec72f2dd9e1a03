// Which keys the queries of one head may see, and what lies between a product q . k and its logit. The same
// three kinds of hidden keys as everywhere: blocks that no query of a tile sees (ranges, skipped), keys that
// no query of the head sees (never read: zeros in shared memory, whatever they hold), and what is left, which
// `hide` sets to -inf one by one.
#pragma once

#include "attention_plan.h"
#include "softmax.cuh"
#include "tile.cuh"

namespace fastformer::cuda {

// One head of one batch element, or of one packed sequence, and the tile of its queries that a block takes.
// Of several heads, the first.
struct Head {
  int m0;  // the tile's first row
  int b, h, h_kv;
  uint32_t stream;                 // b H + h: dropout's counter
  int64_t first_query, first_key;  // rows before the packed sequence's own
  int M, N;                        // this sequence's
  int offset;                      // key i + offset is on query i's diagonal
  int key_begin, key_end;          // every key outside is hidden from all queries, or left to other blocks
};

__device__ __forceinline__ Head head_of(const AttentionFwdParams& p, int b, int h, int m0) {
  Head head{m0, b, h, h / p.group, static_cast<uint32_t>(b) * p.H + h, 0, 0, p.M, p.N, 0, 0, 0};
  if (p.starts_q != nullptr) {
    head.first_query = p.starts_q[b];
    head.first_key = p.starts_k[b];
    head.M = p.starts_q[b + 1] - p.starts_q[b];
    head.N = p.starts_k[b + 1] - p.starts_k[b];
  }
  head.key_end = head.N;
  if (p.key_lengths != nullptr) {
    const int64_t length = p.wide_lengths ? static_cast<const int64_t*>(p.key_lengths)[b]
                                          : static_cast<const int32_t*>(p.key_lengths)[b];
    head.key_end = static_cast<int>(length < 0 ? 0 : length < head.N ? length : head.N);
  }
  if (p.page_table != nullptr) head.N = head.key_end;
  if (p.lower_right) head.offset = head.N - head.M;
  return head;
}

// A row of a tile: query i of the head that comes g after the tile's.
struct QueryRow {
  int i, g;
};

// Row `row` where the queries of `share` neighbouring heads lie in one tile, those of one position together.
__device__ __forceinline__ QueryRow query_row(int row, int share) {
  const int i = static_cast<int>(static_cast<uint32_t>(row) / static_cast<uint32_t>(share));
  return {i, row - i * share};
}

// The position of a lane's first row and column in a warp's accumulators.
__device__ __forceinline__ int lane_row() { return static_cast<int>(threadIdx.x) % kWarp / 4; }
__device__ __forceinline__ int lane_column() { return static_cast<int>(threadIdx.x) % 4 * 2; }

// The two rows of a lane in a row tile of a warp, where they are not simply one below the other.
struct LaneRows {
  QueryRow of[2];

  __device__ __forceinline__ LaneRows(int warp_row, int share)
      : of{query_row(warp_row + lane_row(), share), query_row(warp_row + 8 + lane_row(), share)} {}
};

// A lane's row r of row tile m. What the functions below take as a warp's rows is either its first query, or
// LaneRows.
__device__ __forceinline__ QueryRow row_of(int first_query, int m, int r) {
  return {first_query + 16 * m + 8 * r + lane_row(), 0};
}

__device__ __forceinline__ QueryRow row_of(const LaneRows& rows, int, int r) { return rows.of[r]; }

// The keys of row i lie in [begin, end).
struct KeyRange {
  int begin, end;
};

__device__ __forceinline__ KeyRange keys_of_row(const AttentionFwdParams& p, const Head& head, int i) {
  return {max(head.key_begin, i + head.offset - p.left), min(head.key_end, i + head.offset + p.right + 1)};
}

// Multiples of kBlock, begin <= full_begin <= full_end <= end: blocks in [full_begin, full_end) are visible
// from end to end, masks apart, and those outside [begin, end) not at all.
struct KeyBlocks {
  int begin, full_begin, full_end, end;
};

// Of a tile with queries `first` to `last`.
template <int kBlock>
__device__ __forceinline__ KeyBlocks key_blocks(const AttentionFwdParams& p, const Head& head, int first,
                                                int last) {
  const KeyRange of_first = keys_of_row(p, head, first);
  const KeyRange of_last = keys_of_row(p, head, last);
  KeyBlocks blocks;
  blocks.begin = of_first.begin / kBlock * kBlock;
  blocks.end = max((max(of_last.end, 0) + kBlock - 1) / kBlock * kBlock, blocks.begin);
  blocks.full_begin = min((of_last.begin + kBlock - 1) / kBlock * kBlock, blocks.end);
  blocks.full_end = max(max(of_first.end, 0) / kBlock * kBlock, blocks.full_begin);
  return blocks;
}

// Leaves `head` the keys of one of p.splits blocks of threads: whole blocks of those that a tile's queries
// see, as evenly as they can be divided.
template <int kBlock>
__device__ __forceinline__ void take_split(const AttentionFwdParams& p, Head& head, int first, int last,
                                           int split) {
  const KeyBlocks seen = key_blocks<kBlock>(p, head, first, last);
  const int count = (seen.end - seen.begin) / kBlock;
  head.key_begin = max(head.key_begin, seen.begin + count * split / p.splits * kBlock);
  head.key_end = min(head.key_end, seen.begin + count * (split + 1) / p.splits * kBlock);
}

__device__ __forceinline__ const uint8_t* score_row(const ScoreMatrix& matrix, const Head& head) {
  return static_cast<const uint8_t*>(matrix.data) + head.b * matrix.stride_b + head.h * matrix.stride_h;
}

// Whether padding and the mask of keys leave key j.
__device__ __forceinline__ bool is_real(const AttentionFwdParams& p, const Head& head, int j) {
  bool real = j >= head.key_begin && j < head.key_end;
  if (p.padding.data != nullptr && real) real = score_row(p.padding, head)[j * p.padding.stride_n] != 0;
  if (p.key_mask.data != nullptr && real) real = score_row(p.key_mask, head)[j * p.key_mask.stride_n] != 0;
  return real;
}

// Narrows head's keys to those from the first real one to the last. All threads of the block must call.
__device__ __forceinline__ void find_real_range(const AttentionFwdParams& p, Head& head) {
  __shared__ int begins[kMaxWarps], ends[kMaxWarps];
  int begin = head.key_end, end = 0;
  for (int j = head.key_begin + static_cast<int>(threadIdx.x); j < head.key_end;
       j += static_cast<int>(blockDim.x)) {
    if (!is_real(p, head, j)) continue;
    begin = min(begin, j);
    end = j + 1;
  }
#pragma unroll
  for (int bit = kWarp / 2; bit > 0; bit /= 2) {
    begin = min(begin, __shfl_xor_sync(0xffffffffu, begin, bit));
    end = max(end, __shfl_xor_sync(0xffffffffu, end, bit));
  }
  const int warp = static_cast<int>(threadIdx.x) / kWarp, warps = static_cast<int>(blockDim.x) / kWarp;
  if (threadIdx.x % kWarp == 0) begins[warp] = begin, ends[warp] = end;
  __syncthreads();
  for (int other = 0; other < warps; ++other) begin = min(begin, begins[other]), end = max(end, ends[other]);
  head.key_begin = begin;
  head.key_end = max(end, begin);
}

// Bit j: whether key n0 + j is real. The same in all lanes of a warp.
struct RealKeys {
  uint64_t bits;

  __device__ __forceinline__ bool has(int j) const { return bits >> j & 1; }

  __device__ __forceinline__ void find(const AttentionFwdParams& p, const Head& head, int n0) {
    const int j = n0 + static_cast<int>(threadIdx.x) % kWarp;
    const uint32_t low = __ballot_sync(0xffffffffu, is_real(p, head, j));
    const uint32_t high = __ballot_sync(0xffffffffu, is_real(p, head, j + kWarp));
    bits = low | uint64_t{high} << kWarp;
  }
};

// -inf where the window, the lengths or the sequence's end hide a key. `rows` are the warp's (see row_of),
// `n0` is the first key of the tile.
template <typename Rows, int kRowTiles, int kTiles>
__device__ __forceinline__ void hide_outside(const AttentionFwdParams& p, const Head& head, Rows rows, int n0,
                                             float (&scores)[kRowTiles][kTiles][4]) {
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const KeyRange keys = keys_of_row(p, head, row_of(rows, m, r).i);
      const int first = n0 + lane_column();
      const int begin = keys.begin - first, end = keys.end - first;
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const bool seen = 8 * n + e >= begin && 8 * n + e < end;
          scores[m][n][2 * r + e] = seen ? scores[m][n][2 * r + e] : kMinusInfinity;
        }
      }
    }
  }
}

// -inf where a key is not real: of most tiles none. (Of 16 columns it is as soon done as asked.)
template <int kRowTiles, int kTiles>
__device__ __forceinline__ void hide_keys(const RealKeys& real, float (&scores)[kRowTiles][kTiles][4]) {
  static_assert(kTiles <= 8, "a tile of keys has 64 bits");
  constexpr uint64_t kAll = ~uint64_t{0} >> (64 - 8 * kTiles);
  if (kTiles > 2 && (real.bits & kAll) == kAll) return;
  const uint64_t bits = real.bits >> lane_column();
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const bool seen = bits >> (8 * n + e) & 1;
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          scores[m][n][2 * r + e] = seen ? scores[m][n][2 * r + e] : kMinusInfinity;
        }
      }
    }
  }
}

// -inf where the mask hides a key from the query. kPairs: a lane's two columns are read as one word.
template <bool kPairs, typename Rows, int kRowTiles, int kTiles>
__device__ __forceinline__ void hide_masked(const AttentionFwdParams& p, const Head& head, Rows rows, int n0,
                                            float (&scores)[kRowTiles][kTiles][4]) {
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const QueryRow at = row_of(rows, m, r);
      const int i = at.i;
      const uint8_t* const row = score_row(p.mask, head) + at.g * p.mask.stride_h + i * p.mask.stride_m;
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        const int j = n0 + 8 * n + lane_column();
        uint32_t pair = 0xffff;
        if constexpr (kPairs) {
          if (i < head.M && j < head.N) pair = *reinterpret_cast<const uint16_t*>(row + j);
        } else {
          if (i < head.M && j < head.N) pair = row[j * p.mask.stride_n];
          if (i < head.M && j + 1 < head.N) pair |= row[(j + 1) * p.mask.stride_n] << 8;
        }
        float (&tile)[4] = scores[m][n];
        tile[2 * r] = (pair & 0xff) != 0 ? tile[2 * r] : kMinusInfinity;
        tile[2 * r + 1] = pair >> 8 != 0 ? tile[2 * r + 1] : kMinusInfinity;
      }
    }
  }
}

// tanh, about 4 ulp: z (1 + z^2 P(z^2)) near 0, where 1 - 2 / (e^2z + 1) would cancel.
__device__ __forceinline__ float tanh_approximate(float z) {
  const float square = z * z;
  float series = fmaf(square, -5.70498872745e-3f, 2.06390887954e-2f);
  series = fmaf(series, square, -5.37397155531e-2f);
  series = fmaf(series, square, 1.33314422036e-1f);
  series = fmaf(series, square, -3.33332819422e-1f);
  const float magnitude = fabsf(z);
  const float power = exp2_approximate(magnitude * (2.0f * kLog2E)) + 1.0f;
  const float large = fmaf(-2.0f, reciprocal_approximate(power), 1.0f);
  return magnitude < 0.625f ? fmaf(series * square, z, z) : copysignf(large, z);  // NaN: large
}

// Products to capped logits.
template <int kRowTiles, int kTiles>
__device__ __forceinline__ void scale_and_cap(const AttentionFwdParams& p,
                                              float (&scores)[kRowTiles][kTiles][4]) {
  const float scale = p.softcap != 0.0f ? p.scale / p.softcap : p.scale;
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        scores[m][n][c] *= scale;
        if (p.softcap != 0.0f) scores[m][n][c] = tanh_approximate(scores[m][n][c]) * p.softcap;
      }
    }
  }
}

// Columns `column` and the next, which lie on a multiple of their size.
__device__ __forceinline__ float2 load_pair(const char* row, DType dtype, int column) {
  if (dtype == DType::kFloat32) return *reinterpret_cast<const float2*>(row + 4 * column);
  const uint32_t word = *reinterpret_cast<const uint32_t*>(row + 2 * column);
  return {unpack_half(word, 0, dtype), unpack_half(word, 1, dtype)};
}

// kPairs: as hide_masked.
template <bool kPairs, typename Rows, int kRowTiles, int kTiles>
__device__ __forceinline__ void add_bias(const AttentionFwdParams& p, const Head& head, Rows rows, int n0,
                                         float (&scores)[kRowTiles][kTiles][4]) {
  const int size = p.bias.dtype == DType::kFloat32 ? 4 : 2;
  const char* const matrix =
      static_cast<const char*>(p.bias.data) + size * (head.b * p.bias.stride_b + head.h * p.bias.stride_h);
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const QueryRow at = row_of(rows, m, r);
      const int i = at.i;
      const char* const row = matrix + size * (at.g * p.bias.stride_h + i * p.bias.stride_m);
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        const int j = n0 + 8 * n + lane_column();
        float (&tile)[4] = scores[m][n];
        if constexpr (kPairs) {
          if (i >= head.M || j >= head.N) continue;
          const float2 pair = load_pair(row, p.bias.dtype, j);
          tile[2 * r] += pair.x;
          tile[2 * r + 1] += pair.y;
        } else {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            if (i >= head.M || j + e >= head.N) continue;
            tile[2 * r + e] += load_element(row, p.bias.dtype, (j + e) * p.bias.stride_n);
          }
        }
      }
    }
  }
}

template <typename Rows, int kRowTiles, int kTiles>
__device__ __forceinline__ void add_relative_bias(const AttentionFwdParams& p, const Head& head, Rows rows,
                                                  int n0, float (&scores)[kRowTiles][kTiles][4]) {
  const int size = p.relative_bias_dtype == DType::kFloat32 ? 4 : 2;
  const char* const entries =
      static_cast<const char*>(p.relative_bias) + size * (head.h * p.relative_bias_stride_h);
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const QueryRow at = row_of(rows, m, r);
      const int i = at.i;
      const char* const row = entries + size * (at.g * p.relative_bias_stride_h);
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int j = n0 + 8 * n + lane_column() + e;
          if (i >= head.M || j >= head.N) continue;
          scores[m][n][2 * r + e] += load_element(row, p.relative_bias_dtype, j - i + p.M - 1);
        }
      }
    }
  }
}

// 0 for the weights that dropout drops. A lane's eight weights of a row in 32 columns are the halves of one
// call's words: column 32 J + 8 w + 2 t + e is half e of word w of counter (4 J + t, i, stream, 0). Narrower
// tiles, of 16 or 8 columns, take two words or one.
template <typename Rows, int kRowTiles, int kTiles>
__device__ __forceinline__ void drop(const AttentionFwdParams& p, const Head& head, uint64_t seed, Rows rows,
                                     int n0, float (&weights)[kRowTiles][kTiles][4]) {
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const QueryRow at = row_of(rows, m, r);
      const uint32_t i = at.i;
#pragma unroll
      for (int four = 0; four < kTiles; four += 4) {
        const int eight = (n0 + 8 * four) / 8, first = kTiles < 4 ? eight % 4 : 0;
        const uint32_t call = eight - first + lane_column() / 2;
        const PhiloxWords decisions = philox4x32_7(seed, call, i, head.stream + at.g, 0);
#pragma unroll
        for (int w = 0; w < (kTiles < 4 ? kTiles : 4); ++w) {
          uint32_t word = decisions.w[w];
#pragma unroll
          for (int later = kTiles; later < 4; later += kTiles) {
            if (first == later) word = decisions.w[later + w];
          }
          float (&tile)[4] = weights[m][four + w];
          if ((word & 0xffffu) < p.threshold) tile[2 * r] = 0.0f;
          if (word >> 16 < p.threshold) tile[2 * r + 1] = 0.0f;
        }
      }
    }
  }
}

}  // namespace fastformer::cuda
