// The product of two matrices of 16-bit elements, summed in float32: c [M, N] from a [M, K] or [K, M] and b
// [N, K] or [K, N], of any sizes and strides. What becomes of c is the caller's: it gets the sums row by row.
//
// A block has 128 x 128 of the sums and goes through k in steps of 32, whose operands lie in shared memory
// three steps deep. An operand whose columns are k is a panel [128, 32], one whose rows are k two panels [32,
// 64] (see attention_tiles.cuh). The block's columns are two halves of 64, which need not be neighbours: a
// gated block has the same columns of two products. Warps stand 2 x 2, and each has 32 columns of either
// half.
#pragma once

#include "attention_tiles.cuh"
#include "feed_forward_plan.h"

namespace fastformer::cuda {

// What a block makes: sums from row m0 and column n0 on, of one part of k.
struct GemmPlace {
  int m0, n0, part;
};

// Blocks count down kGemmGroup tiles and then to the right, so that those that run at one time read few rows
// of a and of b: both stay in L2.
__device__ __forceinline__ GemmPlace place_of_block(const GemmParams& p, int block_n) {
  const int tiles = p.tiles_m * p.tiles_n, tile = static_cast<int>(blockIdx.x) % tiles;
  const int group = kGemmGroup * p.tiles_n, within = tile % group;
  const int first = tile / group * kGemmGroup, rows = min(p.tiles_m - first, kGemmGroup);
  return {(first + within % rows) * kGemmBlock, within / rows * block_n,
          static_cast<int>(blockIdx.x) / tiles};
}

// What a thread needs to copy its four units of 16 bytes of one operand's steps. Units 0 and 1 are of the low
// half of the block's rows (or columns) of c, the others of the high half.
template <bool kRowsOfK>
struct OperandCopier {
  static constexpr int kUnits = kRowsOfK ? 8 : 4;  // of a panel's row
  static constexpr int kStep = kGemmThreads / kUnits;
  static constexpr int kPanel = kRowsOfK ? kGemmHalf : kGemmStep;

  const uint16_t* from[4];  // in the step that comes next
  int64_t advance;          // to the step after it
  int columns;              // kRowsOfK: that there are of the low half from the thread's unit on

  static __device__ __forceinline__ int unit() { return static_cast<int>(threadIdx.x) % kUnits; }
  static __device__ __forceinline__ int row() { return static_cast<int>(threadIdx.x) / kUnits; }
  // Where in a step's k unit i is, or begins.
  static __device__ __forceinline__ int depth(int i) { return kRowsOfK ? row() + i % 2 * kStep : 8 * unit(); }

  // From `k` on. `low` and `high` are the halves' operands and where in them, of `extent` rows or columns,
  // the halves begin. What lies past the end is read at the end: it reaches no result.
  __device__ __forceinline__ OperandCopier(const GemmOperand& low, int low_first, const GemmOperand& high,
                                           int high_first, int extent, int k, bool aligned)
      : advance(kRowsOfK ? kGemmStep * low.stride : kGemmStep), columns(extent - low_first - 8 * unit()) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const GemmOperand& half = i < 2 ? low : high;
      int first = i < 2 ? low_first : high_first;
      int64_t offset = 0;
      if constexpr (kRowsOfK) {
        first += 8 * unit();
        if (aligned) first = min(first, extent - 8);
        offset = (int64_t{k} + depth(i)) * half.stride + first;
      } else {
        first = min(first + row() + i % 2 * kStep, extent - 1);
        offset = first * half.stride + k + depth(i);
      }
      from[i] = static_cast<const uint16_t*>(half.data) + offset;
    }
  }

  static __device__ __forceinline__ uint32_t place_in(uint32_t shared, int i) {
    return shared + place_in_panel<kPanel>(row(), unit()) + i * (kOperandBytes / 4);
  }

  // Starts to copy unit i of a step of which `left` of k there are, zeros beyond, and goes on to the next
  // step.
  __device__ __forceinline__ void start(int i, uint32_t shared, int left) {
    copy_async(place_in(shared, i), from[i], depth(i) < left);
    from[i] += advance;
  }

  // The same of all units.
  __device__ __forceinline__ void copy(uint32_t shared, int left, bool aligned) {
    if (!aligned) return copy_elements(shared, left);
#pragma unroll
    for (int i = 0; i < 4; ++i) start(i, shared, left);
  }

  // Of rows that are not aligned, at once.
  __device__ __forceinline__ void copy_elements(uint32_t shared, int left) {
#pragma unroll 1
    for (int e = 0; e < 8; ++e) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const bool real = kRowsOfK ? depth(i) < left && e < columns - i / 2 * kGemmHalf : depth(i) + e < left;
        store_shared(place_in(shared, i) + 2 * e, real ? from[i][e] : uint16_t{0});
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) from[i] += advance;
  }
};

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

  // To and from a contiguous matrix [M, N] of 16-bit elements. All lanes of a warp must call.
  template <DType kType>
  __device__ __forceinline__ void store(const GemmParams& p, void* matrix, const float (&values)[8]) const {
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

  // Zeros past the ends.
  template <DType kType>
  __device__ __forceinline__ void load(const GemmParams& p, const void* matrix, float (&values)[8]) const {
    const uint16_t* const from = static_cast<const uint16_t*>(matrix) + int64_t{row} * p.N;
    if (p.aligned_c) {
      const int first = column + 8 * place();
      const uint4 unit = load_streaming(from + first, row < p.M && first < p.N);
      uint32_t words[4] = {unit.x, unit.y, unit.z, unit.w};
      transpose_quad(words);
      unpack(words, kType, values);
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const bool real = row < p.M && column_of(i) < p.N;
        values[i] = real ? load_element(from, kType, column_of(i)) : 0.0f;
      }
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

// One block's sums.
template <DType kType, bool kRowsOfKA, bool kRowsOfKB>
struct GemmTile {
  static constexpr int kRowTiles = 4, kTiles = 8;  // of 16 rows, and of 8 columns: 4 of either half
  static constexpr int kHalfBytes = kOperandBytes / 2;
  using CopierA = OperandCopier<kRowsOfKA>;
  using CopierB = OperandCopier<kRowsOfKB>;

  const GemmParams& p;
  const GemmPlace place;
  const bool gated;  // the high half is the gate's
  const uint32_t shared;
  float sums[kRowTiles][kTiles][4] = {};
  uint32_t a[2][kRowTiles][4], b[2][kTiles / 2][4];  // fragments of 16 of k, and of the next 16

  __device__ __forceinline__ GemmTile(const GemmParams& p, const GemmPlace& place, bool gated,
                                      uint32_t shared)
      : p(p), place(place), gated(gated), shared(shared) {}

  static __device__ __forceinline__ int warp_m() { return static_cast<int>(threadIdx.x) / kWarp / 2; }
  static __device__ __forceinline__ int warp_n() { return static_cast<int>(threadIdx.x) / kWarp % 2; }

  // Addresses for ldmatrix of the warp's first rows, or columns, in a step that lies at 0.
  static __device__ __forceinline__ uint32_t address_a() {
    return warp_m() * kHalfBytes +
           (kRowsOfKA ? rows_then_units<kGemmHalf>(0) : units_then_rows<kGemmStep>(0));
  }
  static __device__ __forceinline__ uint32_t address_b() {
    const uint32_t first = warp_n() * 32;
    return kOperandBytes + (kRowsOfKB ? units_then_rows<kGemmHalf>(0) ^ 2 * first
                                      : rows_then_units<kGemmStep>(0) + 2 * kGemmStep * first);
  }

  // Of 16 of k, the kSixteen-th of a step: fragments of row tile i of a, and of column pair i of b.
  template <int kSixteen>
  __device__ __forceinline__ void load(int i, uint32_t at_a, uint32_t at_b) {
    constexpr int kRowBytes = 2 * kGemmStep, kDeepBytes = 2 * kGemmHalf;
    const int half = i / 2, pair = i % 2;
    if constexpr (kRowsOfKB) {
      load_matrices_transposed(at_step(at_b, pair) + (half * kHalfBytes + 16 * kSixteen * kDeepBytes),
                               b[kSixteen][i]);
    } else {
      load_matrices(at_step(at_b, kSixteen) + (half * kHalfBytes + 16 * pair * kRowBytes), b[kSixteen][i]);
    }
    if constexpr (kRowsOfKA) {
      load_matrices_transposed(at_step(at_a, i) + 16 * kSixteen * kDeepBytes, a[kSixteen][i]);
    } else {
      load_matrices(at_step(at_a, kSixteen) + 16 * i * kRowBytes, a[kSixteen][i]);
    }
  }

  // The products of row tile m.
  template <int kSixteen>
  __device__ __forceinline__ void add_products(int m) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const uint32_t (&words)[4] = b[kSixteen][n / 2];
      multiply<kType>(sums[m][n], a[kSixteen][m], words[n % 2 * 2], words[n % 2 * 2 + 1]);
    }
  }

  // sums += the product of `left` and `right`, whose high half is `high`'s.
  __device__ __forceinline__ void accumulate(const GemmOperand& left, const GemmOperand& right,
                                             const GemmOperand& high) {
    if (p.aligned_a && p.aligned_b) {
      accumulate_aligned<true>(left, right, high);
    } else {
      accumulate_aligned<false>(left, right, high);
    }
  }

  // Copies and loads stand among the products that hide them: fragments of the next 16 of k, across the
  // barrier too, and operands three steps ahead. All loads come before all copies: each time that one follows
  // the other ptxas sets three empty instructions between them for sm_80.
  template <bool kAligned>
  __device__ __forceinline__ void accumulate_aligned(const GemmOperand& left, const GemmOperand& right,
                                                     const GemmOperand& high) {
    const bool aligned_a = kAligned || p.aligned_a, aligned_b = kAligned || p.aligned_b;
    const int k = place.part * p.depth;
    int rest = min(p.K - k, p.depth);  // of k, from the step on that is copied next
    int steps = (rest + kGemmStep - 1) / kGemmStep;
    CopierA of_a(left, place.m0, left, place.m0 + kGemmHalf, p.M, k, aligned_a);
    CopierB of_b(right, place.n0, high, gated ? place.n0 : place.n0 + kGemmHalf, p.N, k, aligned_b);
    const auto copy = [&](uint32_t stage) {
      of_a.copy(stage, rest, aligned_a);
      of_b.copy(stage + kOperandBytes, rest, aligned_b);
    };
    uint32_t stage = shared, next = shared + kStageBytes, last = shared + 2 * kStageBytes;
    const auto start_copies = [&](int i) {
      of_a.start(i, stage, rest);
      of_b.start(i, stage + kOperandBytes, rest);
    };
    copies_wait<0>();
    __syncthreads();  // everybody is done with what the product before left in shared memory
#pragma unroll 1
    for (int i = 0; i < kGemmStages; ++i) {
      copy(shared + i * kStageBytes);
      copies_commit();
      rest -= kGemmStep;
    }
    copies_wait<2>();
    __syncthreads();
    const uint32_t first_a = address_a(), first_b = address_b();
#pragma unroll
    for (int i = 0; i < 4; ++i) load<0>(i, stage + first_a, stage + first_b);
#pragma unroll 1
    for (; steps > 0; --steps) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        load<1>(i, stage + first_a, stage + first_b);
        add_products<0>(i);
      }
      copies_wait<1>();
      __syncthreads();  // the next step is there, and everybody has read this one
      if constexpr (!kAligned) copy(stage);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (i < 2) {
          load<0>(2 * i, next + first_a, next + first_b);
          load<0>(2 * i + 1, next + first_a, next + first_b);
        } else if constexpr (kAligned) {
          start_copies(2 * i - 4);
          start_copies(2 * i - 3);
        }
        add_products<1>(i);
      }
      copies_commit();
      rest -= kGemmStep;
      const uint32_t done = stage;
      stage = next;
      next = last;
      last = done;
    }
  }

  // Gives all sums to `epilogue`, eight at a time, by a loop whose body stands in the code once: for that
  // they go through shared memory, 32 rows of each warp at a time, every thread's to a place of its own.
  //
  // epilogue.begin(column) begins 32 columns; epilogue.take(group, values, gates) gets what a lane has of one
  // row of those; epilogue.end(pass, column) ends the columns of pass 0 or 1.
  template <typename Epilogue>
  __device__ __forceinline__ void finish(Epilogue& epilogue) {
    constexpr uint32_t kSlot = 16 * kGemmThreads;  // bytes: four floats of every thread
    copies_wait<0>();
    __syncthreads();  // everybody is done with the operands
    const uint32_t own = shared + 16 * threadIdx.x;
    const int lane_row = static_cast<int>(threadIdx.x) % kWarp / 4;
#pragma unroll 1
    for (int pass = 0; pass < 2; ++pass) {
      keep_two_row_tiles(own);
      const int first = place.m0 + kGemmHalf * warp_m() + 32 * pass;
#pragma unroll 1
      for (int half = 0; half < (gated ? 1 : 2); ++half) {
        const int column = place.n0 + kGemmHalf * half + 32 * warp_n();
        if (column >= p.N) break;
        epilogue.begin(column);
#pragma unroll 1
        for (int eight = 0; eight < 4 && first + 8 * eight < p.M; ++eight) {
          float values[8], gates[8];
          load_kept(own + (4 * eight + 2 * half) * kSlot, kSlot, values);
          if (gated) load_kept(own + (4 * eight + 2) * kSlot, kSlot, gates);
          epilogue.take(RowGroup{first + 8 * eight + lane_row, column}, values, gates);
        }
        epilogue.end(pass, column - place.n0);
      }
    }
  }

 private:
  // To slot 4 (2 m + r) + 2 half, and the next: row tiles 0 and 1, whose place the others take.
  __device__ __forceinline__ void keep_two_row_tiles(uint32_t own) {
#pragma unroll
    for (int slot = 0; slot < 16; ++slot) {
      const int m = slot / 8, r = slot / 4 % 2, n = slot % 4 * 2;
      store_shared(
          own + slot * 16 * kGemmThreads,
          make_uint4(__float_as_uint(sums[m][n][2 * r]), __float_as_uint(sums[m][n][2 * r + 1]),
                     __float_as_uint(sums[m][n + 1][2 * r]), __float_as_uint(sums[m][n + 1][2 * r + 1])));
    }
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[m][n][e] = sums[m + 2][n][e];
      }
    }
  }

  static __device__ __forceinline__ void load_kept(uint32_t place, uint32_t slot, float (&values)[8]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint4 words = load_shared(place + i * slot);
      values[4 * i] = __uint_as_float(words.x), values[4 * i + 1] = __uint_as_float(words.y);
      values[4 * i + 2] = __uint_as_float(words.z), values[4 * i + 3] = __uint_as_float(words.w);
    }
  }
};

}  // namespace fastformer::cuda
