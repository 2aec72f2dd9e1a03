// The product of two matrices, summed in float32: c [M, N] from a [M, K] or [K, M] and b [N, K] or [K, N], of
// any sizes and strides. What becomes of c is the caller's: it gets the sums row by row.
//
// A block has 128 x 128 of the sums and goes through k in steps of 64 bytes, 32 elements of 16 bits or 16 of
// float32, whose operands lie in shared memory three steps deep (see gemm_operands.cuh). The block's columns
// are two halves of 64, which need not be neighbours: a gated block has the same columns of two products.
// Warps stand 2 x 2, and each has 32 columns of either half.
#pragma once

#include "gemm_operands.cuh"
#include "gemm_rows.cuh"

namespace fastformer::cuda {

// What a block makes: sums from row m0 and column n0 on, of one part of k.
struct GemmPlace {
  int m0, n0, part;
};

// Blocks count down kGemmGroup tiles and then to the right, so that those that run at one time read few rows
// of a and of b: both stay in L2.
__device__ __forceinline__ GemmPlace place_of_block(const GemmParams& p, int block_n) {
  const int block = static_cast<int>(forgotten(blockIdx.x));
  const int tiles = p.tiles_m * p.tiles_n, tile = block % tiles;
  const int group = kGemmGroup * p.tiles_n, within = tile % group;
  const int first = tile / group * kGemmGroup, rows = min(p.tiles_m - first, kGemmGroup);
  return {(first + within % rows) * kGemmBlock, within / rows * block_n, block / tiles};
}

// One block's sums.
template <DType kType, bool kRowsOfKA, bool kRowsOfKB>
struct GemmTile {
  static constexpr bool kFloat32 = kType == DType::kFloat32;
  static constexpr int kRowTiles = 4, kTiles = 8;  // of 16 rows, and of 8 columns: 4 of either half
  static constexpr int kStep = gemm_step(kType);
  // How many steps are copied before they are multiplied.
  static constexpr int kAhead = kFloat32 ? kGemmStages - 1 : kGemmStages;
  using CopierA = OperandCopier<kType, kRowsOfKA>;
  using CopierB = OperandCopier<kType, kRowsOfKB>;

  const GemmParams& p;
  const bool gated;  // the high half is the gate's
  const uint32_t shared;
  const uint32_t first_a = address_a(), first_b = address_b();
  float sums[kRowTiles][kTiles][4] = {};
  Fragments<kType> fragments;

  __device__ __forceinline__ GemmTile(const GemmParams& p, bool gated, uint32_t shared)
      : p(p), gated(gated), shared(shared) {}

  // Computed anew where it is asked for: the loop over k has no registers to keep it.
  __device__ __forceinline__ GemmPlace place() const {
    return place_of_block(p, gated ? kGemmHalf : kGemmBlock);
  }

  static __device__ __forceinline__ int warp_m() { return static_cast<int>(threadIdx.x) / kWarp / 2; }
  static __device__ __forceinline__ int warp_n() { return static_cast<int>(threadIdx.x) / kWarp % 2; }

  // Where this lane reads the warp's first rows, or columns, of a step that lies at 0.
  static __device__ __forceinline__ uint32_t address_a() {
    const uint32_t half = warp_m() * kHalfBytes;
    if constexpr (!kRowsOfKA) return half + units_then_rows<kStepPanel>(0);
    if constexpr (kFloat32) return word_in_deep_panel(half);
    return half + rows_then_units<kGemmHalf>(0);
  }
  static __device__ __forceinline__ uint32_t address_b() {
    const uint32_t first = warp_n() * 32;
    if constexpr (!kRowsOfKB) return kOperandBytes + kStepBytes * first + rows_then_units<kStepPanel>(0);
    if constexpr (kFloat32) return word_in_deep_panel(kOperandBytes + warp_n() * kQuarterBytes);
    return kOperandBytes + (units_then_rows<kGemmHalf>(0) ^ 2 * first);
  }

  // Of half a step, the part-th, that lies at `stage`: row tile i of a.
  __device__ __forceinline__ void load_rows(int part, int i, uint32_t stage, uint32_t (&rows)[4]) const {
    const uint32_t at = stage + first_a;
    const int deep_bytes = part * kStep / 2 * kDeepRowBytes;
    if constexpr (!kRowsOfKA) {
      load_matrices(at_step(at, part) + 16 * i * kStepBytes, rows);
    } else if constexpr (kFloat32) {
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        rows[w] = load_shared_word(at_step(at, i % 2 * 2 + w % 2) +
                                   (i / 2 * kQuarterBytes + deep_bytes + w / 2 * 4 * kDeepRowBytes));
      }
    } else {
      load_matrices_transposed(at_step(at, i) + deep_bytes, rows);
    }
  }

  // Column pair i of b.
  __device__ __forceinline__ void load_columns(int part, int i, uint32_t stage,
                                               uint32_t (&columns)[4]) const {
    const uint32_t at = stage + first_b;
    const int half_bytes = i / 2 * kHalfBytes, pair = i % 2;
    const int deep_bytes = half_bytes + part * kStep / 2 * kDeepRowBytes;
    if constexpr (!kRowsOfKB) {
      load_matrices(at_step(at, part) + (half_bytes + 16 * pair * kStepBytes), columns);
    } else if constexpr (kFloat32) {
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        columns[w] =
            load_shared_word(at_step(at, 2 * pair + w / 2) + (deep_bytes + w % 2 * 4 * kDeepRowBytes));
      }
    } else {
      load_matrices_transposed(at_step(at, pair) + deep_bytes, columns);
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

  template <bool kAligned>
  __device__ __forceinline__ void accumulate_aligned(const GemmOperand& left, const GemmOperand& right,
                                                     const GemmOperand& high) {
    // Of float32 either both operands are copied in whole units or none is.
    const bool aligned_a = kAligned || (!kFloat32 && p.aligned_a);
    const bool aligned_b = kAligned || (!kFloat32 && p.aligned_b);
    const GemmPlace place = this->place();
    const int k = place.part * p.depth;
    int rest = min(p.K - k, p.depth);  // of k, from the step on that is copied next
    CopierA of_a(left, place.m0, left, place.m0 + kGemmHalf, p.M, k, aligned_a);
    CopierB of_b(right, place.n0, high, gated ? place.n0 : place.n0 + kGemmHalf, p.N, k, aligned_b);
    const auto copy = [&](uint32_t stage) {
      of_a.copy(stage, rest, aligned_a);
      of_b.copy(stage + kOperandBytes, rest, aligned_b);
    };
    uint32_t stage = shared, next = shared + kStageBytes, last = shared + 2 * kStageBytes;
    copies_wait<0>();
    __syncthreads();  // everybody is done with what the product before left in shared memory
#pragma unroll 1
    for (int i = 0; i < kAhead; ++i) {
      copy(shared + i * kStageBytes);
      copies_commit();
      rest -= kStep;
    }
    copies_wait<kAhead - 1>();
    __syncthreads();
    const auto start_copies = [&](uint32_t to, int first, int end) {
      const auto to_a = of_a.target(to, rest);
      const auto to_b = of_b.target(to + kOperandBytes, rest);
#pragma unroll
      for (int i = first; i < end; ++i) {
        of_a.template start<kAligned || !kFloat32>(i, to_a);
        of_b.template start<kAligned || !kFloat32>(i, to_b);
      }
    };
    load_first(0, stage);
    // Of the warp, that are not all past the end.
    const int row_tiles = (p.M - place.m0 - kGemmHalf * warp_m() + 15) / 16;
#pragma unroll 1
    while (rest > -kAhead * kStep) {
      if constexpr (kFloat32) {
        start_copies(last, 0, 4);
        copies_commit();
        multiply_floats(stage, next, row_tiles);
      } else if constexpr (kAligned) {
        multiply_halves(stage, next, [] {}, start_copies);
        copies_commit();
      } else {
        multiply_halves(stage, next, [&] { copy(stage); }, [](uint32_t, int, int) {});
        copies_commit();
      }
      rest -= kStep;
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
    const GemmPlace place = this->place();
    const uint32_t own = shared + 16 * threadIdx.x;
    const int lane_row = static_cast<int>(threadIdx.x) % kWarp / 4;
#pragma unroll 1
    for (int pass = 0; pass < 2; ++pass) {
      keep_two_row_tiles(own);
      if constexpr (kFloat32) repair_kept(own, pass);
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
  // Of half a step: what a loop over k begins with.
  __device__ __forceinline__ void load_first(int part, uint32_t stage) {
    if constexpr (kFloat32) {
      load_rows(part, 0, stage, fragments.a);
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) load_columns(part, pair, stage, fragments.b[pair]);
      fragments.take_columns();
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) load(part, i, stage);
    }
  }

  // Of half a step of 16-bit elements: row tile and column pair i.
  __device__ __forceinline__ void load(int part, int i, uint32_t stage) {
    load_columns(part, i, stage, fragments.b[part][i]);
    load_rows(part, i, stage, fragments.a[part][i]);
  }

  // Once in a step: the next step is there, and everybody has read this one.
  static __device__ __forceinline__ void change_steps() {
    copies_wait<1>();
    __syncthreads();
  }

  // sums += the product of a step. Copies and loads stand among the products that hide them: fragments of the
  // next half step, across the barrier too, and operands three steps ahead. All loads come before all copies:
  // each time that one follows the other ptxas sets three empty instructions between them for sm_80.
  // `copy()` copies at once, `start_copies(first, end)` starts to, of either operand the thread's units from
  // `first` on.
  template <typename Copy, typename StartCopies>
  __device__ __forceinline__ void multiply_halves(uint32_t stage, uint32_t next, const Copy& copy,
                                                  const StartCopies& start_copies) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      load(1, i, stage);
      fragments.add_products(0, i, sums[i]);
    }
    change_steps();
    copy();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i < 2) {
        load(0, 2 * i, next);
        load(0, 2 * i + 1, next);
      } else {
        start_copies(stage, 2 * i - 4, 2 * i - 2);
      }
      fragments.add_products(1, i, sums[i]);
    }
  }

  // The same of float32, whose parts leave fewer registers: a row tile of a is loaded while the one before it
  // is multiplied, but the columns of a half step when the one before it is done. Meanwhile the other block
  // that shares the multiprocessor multiplies.
  __device__ __forceinline__ void multiply_floats(uint32_t stage, uint32_t next, int row_tiles) {
#pragma unroll 1
    for (int part = 0; part < 2; ++part) {
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        if (m >= row_tiles) break;
        fragments.take_rows();
        if (m < 3) load_rows(part, m + 1, stage, fragments.a);
        fragments.add_products(sums[m]);
      }
      if (part == 1) change_steps();
      load_first(1 - part, part == 0 ? stage : next);
    }
  }

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

  // Where an operand has infinities the products of its parts are infinities of either sign and NaN. So what
  // was kept as NaN is computed again, element by element: that is NaN soon, or the infinity. And so is all
  // where k is so short that the errors of parts, up to 2^-21, do not even out.
  __device__ __forceinline__ void repair_kept(uint32_t own, int pass) const {
    const GemmPlace place = this->place();
    const bool few = p.K <= kFewProducts;
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll 1
    for (int slot = 0; slot < 16; ++slot) {
      const uint32_t from = own + slot * 16 * kGemmThreads;
      const uint4 kept = load_shared(from);
      if (!few && !isnan(__uint_as_float(kept.x)) && !isnan(__uint_as_float(kept.y)) &&
          !isnan(__uint_as_float(kept.z)) && !isnan(__uint_as_float(kept.w))) {
        continue;
      }
      const int row = place.m0 + kGemmHalf * warp_m() + 32 * pass + slot / 4 * 8 + lane / 4;
      const bool high = slot % 4 >= 2;
      const int first = place.n0 + (high && !gated ? kGemmHalf : 0) + 32 * warp_n() + slot % 2 * 16;
#pragma unroll 1
      for (int e = 0; e < 4; ++e) {
        const int column = first + e / 2 * 8 + 2 * (lane % 4) + e % 2;
        const float value = __uint_as_float(load_shared_word(from + 4 * e));
        if ((!few && !isnan(value)) || row >= p.M || column >= p.N) continue;
        float sum = 0.0f;
        add_one_by_one(place.part, p.a, high && gated ? p.gate : p.b, row, column, sum);
        if (p.a2.data != nullptr) add_one_by_one(place.part, p.a2, p.b2, row, column, sum);
        store_shared(from + 4 * e, __float_as_uint(sum));
      }
    }
  }

  // sum += the product of one element of c.
  __device__ __forceinline__ void add_one_by_one(int part, const GemmOperand& left, const GemmOperand& right,
                                                 int row, int column, float& sum) const {
    const int64_t step_a = kRowsOfKA ? left.stride : 1, step_b = kRowsOfKB ? right.stride : 1;
    int k = part * p.depth;
    const int end = min(p.K, k + p.depth);
    const float* a = static_cast<const float*>(left.data) + k * step_a + row * (kRowsOfKA ? 1 : left.stride);
    const float* b =
        static_cast<const float*>(right.data) + k * step_b + column * (kRowsOfKB ? 1 : right.stride);
#pragma unroll 1
    for (; k < end && !isnan(sum); ++k, a += step_a, b += step_b) sum = fmaf(*a, *b, sum);
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
