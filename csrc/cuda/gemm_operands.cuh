// Operands of a product on their way to tensor cores: from memory to shared memory, from there to registers,
// and what of them meets in one product.
//
// A step's operand lies in 8 KB of shared memory. One whose columns are k is a panel of 128 rows of 64 bytes;
// of one whose rows are k each half of the block's rows, or columns, of c is one panel of 128 bytes a row
// (16-bit), or two (float32). Rows of 64 bytes lie as in attention_tiles.cuh, where one unit of 16 bytes more
// is also the next of k whatever the elements: seen as bytes, a tile of float32 is one of 16-bit elements
// twice as wide, and ldmatrix gives a lane the words that the product of float32 wants.
#pragma once

#include "attention_tiles.cuh"
#include "gemm_rows.cuh"

namespace fastformer::cuda {

constexpr int kStepPanel = kStepBytes / 2;        // of 16-bit elements, as attention_tiles.cuh counts
constexpr int kDeepRowBytes = 128;                // of a panel whose rows are k
constexpr int kHalfBytes = kOperandBytes / 2;     // of the low half of the block's rows, or columns
constexpr int kQuarterBytes = kOperandBytes / 4;  // of a panel [16 of k, 32] of float32

// Where unit `unit` of row `row` of a panel whose rows are k lies. Single words of float32 are read by eight
// neighbours in two units of each of four rows, 16-bit elements by ldmatrix in a column of units.
template <DType kType>
__device__ __forceinline__ uint32_t place_in_deep_panel(int row, int unit) {
  if constexpr (kType != DType::kFloat32) return place_in_panel<kGemmHalf>(row, unit);
  return row * kDeepRowBytes + (unit ^ 2 * (row & 3)) * 16;
}

// What a thread needs to copy its four units of 16 bytes of one operand's steps. Units 0 and 1 are of the low
// half of the block's rows (or columns) of c, the others of the high half.
//
// Pointers are two registers each. Of 16 bits every unit has its own, and the four threads of a row of k copy
// 64 bytes that lie together. Float32 has no registers for that: two threads copy one sector of 32 bytes and
// then the other, and where rows are k a thread keeps to one.
template <DType kType, bool kRowsOfK>
struct OperandCopier {
  using Element = typename ElementOf<kType>::Type;
  static constexpr bool kFloat32 = kType == DType::kFloat32;
  static constexpr int kElements = elements_of_unit(kType), kStep = gemm_step(kType);
  static constexpr int kLanes = kRowsOfK ? 8 : kFloat32 ? 2 : 4;  // that share a row
  static constexpr int kRows = kGemmThreads / kLanes;
  static constexpr int kPointers = !kFloat32 ? 4 : kRowsOfK ? 1 : 2, kUnitsEach = 4 / kPointers;

  const Element* from[kPointers];  // in the step that comes next
  int64_t advance;                 // to the step after it
  int columns;                     // kRowsOfK: that there are of the low half from the thread's unit on

  static __device__ __forceinline__ int unit() { return static_cast<int>(threadIdx.x) % kLanes; }
  // Of the thread's pairs of lanes eight write to shared memory at a time: of rows 0, 1, 4 and 5, and so on,
  // whose units lie in different banks.
  static __device__ __forceinline__ int row_of_thread(uint32_t thread) {
    const int row = static_cast<int>(thread) / kLanes;
    return kLanes == 2 ? (row & ~6) | (row & 2) << 1 | (row & 4) >> 1 : row;
  }
  // How many rows unit i lies below the thread's first.
  static __device__ __forceinline__ int below(int i) { return kFloat32 ? 0 : i % 2 * kRows; }
  // How many elements unit i lies beyond its pointer: the next panel, or the next sector.
  static __device__ __forceinline__ int beyond(int i) {
    return i % kUnitsEach * kElements * (kRowsOfK ? 8 : 2);
  }
  // How much further in a step's k unit i is, or begins, than the first.
  static __device__ __forceinline__ int deeper(int i) { return kRowsOfK ? below(i) : beyond(i); }
  // kRowsOfK: how many columns there are from unit i on.
  __device__ __forceinline__ int columns_of(int i) const {
    return columns - (kFloat32 ? beyond(i) : i / 2 * kGemmHalf);
  }

  // From `k` on. `low` and `high` are the halves' operands and where in them, of `extent` rows or columns,
  // the halves begin. What lies past the end is not read, or read at the end: it reaches no result.
  __device__ __forceinline__ OperandCopier(const GemmOperand& low, int low_first, const GemmOperand& high,
                                           int high_first, int extent, int k, bool aligned)
      : advance(kRowsOfK ? kStep * low.stride : kStep), columns(extent - low_first - kElements * unit()) {
#pragma unroll
    for (int q = 0; q < kPointers; ++q) {
      const int row = row_of_thread(threadIdx.x) + below(q * kUnitsEach);
      const int i = q * kUnitsEach;
      const GemmOperand& half = i < 2 ? low : high;
      int first = i < 2 ? low_first : high_first;
      int64_t offset = 0;
      if constexpr (kRowsOfK) {
        first += kElements * unit();
        if (!kFloat32 && aligned) first = min(first, extent - kElements);
        offset = (int64_t{k} + row) * half.stride + first;
      } else {
        first = min(first + row, extent - 1);
        offset = first * half.stride + k + kElements * unit();
      }
      from[q] = static_cast<const Element*>(half.data) + offset;
    }
  }

  // Where the thread's units of a step go, and what there is of k from the first of them on. Float32 has no
  // registers to keep for that what follows from the thread's number.
  struct Target {
    uint32_t place;
    int left;
  };
  static __device__ __forceinline__ Target target(uint32_t shared, int left) {
    const uint32_t thread = kFloat32 ? forgotten(threadIdx.x) : threadIdx.x;
    const int row = row_of_thread(thread), unit = static_cast<int>(thread) % kLanes;
    if constexpr (kRowsOfK) return {shared + place_in_deep_panel<kType>(row, unit), left - row};
    return {shared + place_in_panel<kStepPanel>(row, unit), left - kElements * unit};
  }
  static __device__ __forceinline__ uint32_t place_of(const Target& to, int i) {
    if constexpr (kRowsOfK || !kFloat32) return to.place + i * kQuarterBytes;
    return at_step(to.place, i % 2) + i / 2 * kHalfBytes;
  }

  // Starts to copy unit i, zeros where there is no more of k; of float32 that is not aligned (kWhole) word by
  // word. After the fourth unit `from` is in the next step.
  template <bool kWhole>
  __device__ __forceinline__ void start(int i, const Target& to) {
    const Element* const unit = from[i / kUnitsEach] + beyond(i);
    if constexpr (kWhole) {
      const bool wanted = deeper(i) < to.left && (!kFloat32 || !kRowsOfK || columns_of(i) > 0);
      copy_async(place_of(to, i), unit, wanted);
    } else {
      static_assert(kFloat32);
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        copy_async_word(place_of(to, i) + 4 * e, unit + e, is_real(i, e, to.left));
      }
    }
    go_on(i);
  }

  // The same of all units of a step of which `left` of k there are.
  __device__ __forceinline__ void copy(uint32_t shared, int left, bool aligned) {
    const Target to = target(shared, left);
    if (aligned) {
#pragma unroll
      for (int i = 0; i < 4; ++i) start<true>(i, to);
    } else if constexpr (kFloat32) {
#pragma unroll
      for (int i = 0; i < 4; ++i) start<false>(i, to);
    } else {
      copy_elements(to);
    }
  }

  // Of rows of 16-bit elements that are not aligned, at once.
  __device__ __forceinline__ void copy_elements(const Target& to) {
#pragma unroll 1
    for (int e = 0; e < kElements; ++e) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        store_shared(place_of(to, i) + 2 * e, is_real(i, e, to.left) ? from[i][e] : Element{0});
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) go_on(i);
  }

 private:
  // Of element e of unit i.
  __device__ __forceinline__ bool is_real(int i, int e, int left) const {
    return kRowsOfK ? deeper(i) < left && e < columns_of(i) : deeper(i) + e < left;
  }

  __device__ __forceinline__ void go_on(int i) {
    if (i % kUnitsEach == kUnitsEach - 1) from[i / kUnitsEach] += advance;
  }
};

// What a warp has in registers of half a step, two units of k: 64 rows of a as four tiles of 16, and the
// columns of b as four pairs of tiles of 8, two pairs of either half. Of 16 bits the next half step is loaded
// beside it.
template <DType kType>
struct Fragments {
  uint32_t a[2][4][4], b[2][4][4];

  // sums += the products of row tile m.
  __device__ __forceinline__ void add_products(int part, int m, float (&sums)[8][4]) const {
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const uint32_t (&words)[4] = b[part][n / 2];
      multiply<kType>(sums[n], a[part][m], words[n % 2 * 2], words[n % 2 * 2 + 1]);
    }
  }
};

// Float32 in two parts, of which all products but that of the small ones count (3xTF32; Ootomo and Yokota,
// "Recovering single precision accuracy from Tensor Cores", 2022). An element is split once for all products
// of the warp: one row tile and all columns are there split, and the words that come next as they are.
template <>
struct Fragments<DType::kFloat32> {
  struct Split {
    uint32_t large[4], small[4];

    __device__ __forceinline__ void take(const uint32_t (&words)[4]) {
#pragma unroll
      for (int w = 0; w < 4; ++w) split_float32(words[w], large[w], small[w]);
    }
  };

  uint32_t a[4], b[4][4];
  Split row_tile, column_pairs[4];

  __device__ __forceinline__ void take_rows() { row_tile.take(a); }
  __device__ __forceinline__ void take_columns() {
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) column_pairs[pair].take(b[pair]);
  }

  // Tensor cores do not round what they add to a sum to nearest, they cut it off: thousands of products would
  // drift. So these are sums of eight of k, and ordinary additions make the whole. (Errors of the three ways
  // on an H100, as multiples of those of a chain of multiply-adds: of one chain of products 3 at 64 of k and
  // 35 at 8192, of sums of sixteen 1.0 and 0.26, of sums of eight 0.7 and 0.36.)
  __device__ __forceinline__ void add_products(float (&sums)[8][4]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float of_eight[4][4] = {};
#pragma unroll
      for (int term = 0; term < 3; ++term) {
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          const Split& columns = column_pairs[2 * half + n / 2];
          const uint32_t (&left)[4] = term == 0 ? row_tile.small : row_tile.large;
          const uint32_t (&right)[4] = term == 1 ? columns.small : columns.large;
          multiply_tf32(of_eight[n], left, right[n % 2 * 2], right[n % 2 * 2 + 1]);
        }
      }
#pragma unroll
      for (int n = 0; n < 4; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[4 * half + n][e] += of_eight[n][e];
      }
    }
  }
};

// Where this lane's word of the first four rows and eight columns of a panel of float32 lies whose rows are
// k; see multiply_tf32. Eight columns further is at_step(address, 1).
__device__ __forceinline__ uint32_t word_in_deep_panel(uint32_t shared) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, column = lane / 4;
  return shared + place_in_deep_panel<DType::kFloat32>(lane % 4, column / 4) + column % 4 * 4;
}

}  // namespace fastformer::cuda
