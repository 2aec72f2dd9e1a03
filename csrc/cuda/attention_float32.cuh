// Products of float32 tiles in shared memory: in two parts an element, of which all products but that of the
// small ones count (3xTF32; Ootomo and Yokota, "Recovering single precision accuracy from Tensor Cores",
// 2022), and what tensor cores cut off. They truncate every addition: in one chain of products over 128
// columns, as measured on an H100, a sum is off by 4.5 times what a chain of fused multiply-adds is, over
// 8192 by 35 times. So the products of large halves, of which each may cost half a unit in the last place, go
// into a fresh sum every 32 of what is summed over, four products, and ordinary additions join those; and
// products with small halves have sums of their own, whose last place is 2^-11 of the others'.
#pragma once

#include "attention_products.cuh"
#include "softmax.cuh"

namespace fastformer::cuda {

constexpr int kFloatPanel = 32;  // columns

__device__ __forceinline__ void split_operands(const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                               uint32_t (&large_a)[4], uint32_t (&small_a)[4],
                                               uint32_t (&large_b)[2], uint32_t (&small_b)[2]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) split_float32(a[i], large_a[i], small_a[i]);
  split_float32(b0, large_b[0], small_b[0]);
  split_float32(b1, large_b[1], small_b[1]);
}

// sum += a b: of large halves into `sum`, of these with small ones into `cross`.
__device__ __forceinline__ void multiply_apart(float (&sum)[4], float (&cross)[4], const uint32_t (&a)[4],
                                               uint32_t b0, uint32_t b1) {
  uint32_t large_a[4], small_a[4], large_b[2], small_b[2];
  split_operands(a, b0, b1, large_a, small_a, large_b, small_b);
  multiply_tf32(cross, small_a, large_b[0], large_b[1]);
  multiply_tf32(cross, large_a, small_b[0], small_b[1]);
  multiply_tf32(sum, large_a, large_b[0], large_b[1]);
}

// sum += a b of small halves alone.
__device__ __forceinline__ void multiply_small(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0,
                                               uint32_t b1) {
  uint32_t large_a[4], small_a[4], large_b[2], small_b[2];
  split_operands(a, b0, b1, large_a, small_a, large_b, small_b);
  multiply_tf32(sum, small_a, small_b[0], small_b[1]);
}

// sums += cross, where sums are numbers. Of inf the small half is NaN, and so is cross, and times inf
// another's small half is inf of either sign; what is NaN need be so in cross alone.
template <int kRowTiles, int kTiles>
__device__ __forceinline__ void add_cross(float (&sums)[kRowTiles][kTiles][4],
                                          const float (&cross)[kRowTiles][kTiles][4]) {
  for_each(sums, [&](float& sum, int m, int n, int e) {
    if (fabsf(sum) < -kMinusInfinity) sum += cross[m][n][e];
  });
}

// sum[..][first + n] += part[..][n].
template <int kRowTiles, int kTiles, int kParts>
__device__ __forceinline__ void add_part(float (&sum)[kRowTiles][kTiles][4], int first,
                                         const float (&part)[kRowTiles][kParts][4]) {
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int n = 0; n < kParts; ++n) {
#pragma unroll
      for (int c = 0; c < 4; ++c) sum[m][first + n][c] += part[m][n][c];
    }
  }
}

// multiply(m, n, a, b0, b1) for every product of 8 columns of a and b, of the first kSteps * 8 of a panel: a
// of rows that lie at a_address, as units_then_rows gives it, and b at b_address, as rows_then_units does: of
// an odd number of tiles 8 rows more are read, whatever they hold.
template <int kSteps, int kRowTiles, int kTiles, typename Multiply>
__device__ __forceinline__ void for_each_product(uint32_t a_address, uint32_t b_address, Multiply multiply) {
  using P = Panel<2 * kFloatPanel>;
  static_assert(kSteps <= P::kSteps, "a panel has 32 columns");
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    uint32_t a[kRowTiles][4], b[4];
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) load_matrices(at_step(a_address, s) + 16 * m * P::kPitch, a[m]);
#pragma unroll
    for (int n = 0; n < kTiles; n += 2) {
      load_matrices(at_step(b_address, s) + 8 * n * P::kPitch, b);
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        multiply(m, n, a[m], b[0], b[1]);
        if (n + 1 < kTiles) multiply(m, n + 1, a[m], b[2], b[3]);
      }
    }
  }
}

// sum += a b^T, a of kRowsA rows and b of kRowsB, panel by panel of the `columns` that there are.
//
// One product may be all of a sum of few, and what it lacks without that of the small halves is up to 2^-22
// of it, as much as four units in its last place: so up to 8 columns count this too. Of more, products that
// are short by as much seldom are so together.
template <int kRowsA, int kRowsB, int kRowTiles, int kTiles>
__device__ __forceinline__ void add_float32_rows(uint32_t a_address, uint32_t b_address, int columns,
                                                 float (&sum)[kRowTiles][kTiles][4]) {
  using P = Panel<2 * kFloatPanel>;
  float cross[kRowTiles][kTiles][4] = {};
  if (columns <= 8) {
    for_each_product<1, kRowTiles, kTiles>(
        a_address, b_address, [&](int m, int n, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
          multiply_small(cross[m][n], a, b0, b1);
        });
  }
#pragma unroll 1
  for (int column = 0; column < columns; column += kFloatPanel) {
    float part[kRowTiles][kTiles][4] = {};
    for_each_product<P::kSteps, kRowTiles, kTiles>(
        a_address, b_address, [&](int m, int n, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
          multiply_apart(part[m][n], cross[m][n], a, b0, b1);
        });
    add_part(sum, 0, part);
    a_address += kRowsA * P::kPitch;
    b_address += kRowsB * P::kPitch;
  }
  add_cross(sum, cross);
}

// A tile as operand b read down its columns, which ldmatrix cannot turn. Within a product rows may come in
// any order that both operands have, and columns in any: so of 8 rows and 16 columns a lane takes rows 2 t
// and 2 t + 1, t = lane % 4, which are the columns of a that it holds as accumulators, and of each columns 2
// g and 2 g + 1, g = lane / 4, the first for one product and the second for another. Its sums of the two are
// then columns 4 t to 4 t + 3: element e of product j is column 4 t + 2 (e % 2) + j. Sixteen lanes that are
// served together read all banks once: rows 2 t have their units at four pairs of places.
//
// Where this lane's columns of row 2 t lie; of row 2 t + 1: a row further, after ^ 16; 16 columns on: ^ 64.
__device__ __forceinline__ uint32_t columns_of_lane(uint32_t shared) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  return shared + place_in_panel<64>(lane % 4 * 2, lane / 8) + lane / 4 % 2 * 8;
}

// As multiply_values: v_address is columns_of_lane's, and out has its columns. Panels past the `columns` that
// there are take no time. (The branches between panels keep apart what ptxas would do all at once, in
// registers that are not there.)
template <int kD, int kRowTiles, int kTiles>
__device__ __forceinline__ void multiply_float32_values(uint32_t v_address, int columns,
                                                        const float (&weights)[kRowTiles][kTiles][4],
                                                        float (&out)[kRowTiles][kD / 8][4]) {
  constexpr int kPitch = Panel<64>::kPitch;
#pragma unroll
  for (int sixteen = 0; sixteen < kD / 16; ++sixteen) {
    if (sixteen > 0 && 16 * sixteen >= columns) continue;
    const uint32_t row = v_address ^ static_cast<uint32_t>(sixteen % 2 * 64);
    const uint32_t next_row = (row ^ 16) + kPitch;
    float part[kRowTiles][2][4] = {}, cross[kRowTiles][2][4] = {};
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const int place = (sixteen / 2 * kTiles + n) * 8 * kPitch;
      const uint2 first = load_shared_pair(row + place), second = load_shared_pair(next_row + place);
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        const float (&w)[4] = weights[m][n];
        const uint32_t a[4] = {__float_as_uint(w[0]), __float_as_uint(w[2]), __float_as_uint(w[1]),
                               __float_as_uint(w[3])};
        multiply_apart(part[m][0], cross[m][0], a, first.x, second.x);
        multiply_apart(part[m][1], cross[m][1], a, first.y, second.y);
      }
    }
    add_cross(part, cross);
    add_part(out, 2 * sixteen, part);
  }
}

// A tile of scores is stored as accumulators have it, sixteen lanes together four rows of two units, and read
// down its columns the same way. So that both meet all banks once, unit u of row r lies at u ^ s, s = r mod 8
// turned by a bit: 0, 2, 4, 6, 1, 3, 5, 7. Eight rows of one unit, as ldmatrix reads them, do so as well.
__device__ __forceinline__ uint32_t place_of_scores(int row, int unit) {
  return row * kPanelPitch + (unit ^ ((row & 3) << 1 | (row >> 2 & 1))) * 16;
}

// Where a lane keeps the first two elements of a warp's accumulators in a tile of kRows rows, where those
// begin at `row` and `column`, multiples of 8.
template <int kRows>
__device__ __forceinline__ uint32_t float_place_of_lane(uint32_t tile, int row, int column) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  return at_column<kRows>(tile + row * kPanelPitch + place_of_scores(lane / 4, lane % 4 / 2), 2 * column) +
         lane % 2 * 8;
}

// As units_then_rows, of a tile of scores.
__device__ __forceinline__ uint32_t rows_of_scores(uint32_t shared) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  return shared + place_of_scores(lane % 16, lane / 16);
}

// Where columns 2 g and 2 g + 1, g = lane / 4, of the `sixteen`-th 16 lie in row t = lane % 4 of a tile of
// scores of kRows rows; of row t + 4: four rows further, after ^ 16.
template <int kRows>
__device__ __forceinline__ uint32_t columns_of_scores(uint32_t shared, int sixteen) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, column = 16 * sixteen + lane / 4 * 2;
  return shared + column / kFloatPanel * (kRows * kPanelPitch) +
         place_of_scores(lane % 4, column % kFloatPanel / 4) + column % 4 * 4;
}

template <int kRows, int kRowTiles, int kTiles>
__device__ __forceinline__ void store_float_tile(uint32_t place,
                                                 const float (&values)[kRowTiles][kTiles][4]) {
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const uint32_t at = (place ^ static_cast<uint32_t>(n % 4 * 32)) + n / 4 * (kRows * kPanelPitch);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        store_shared(at + (16 * m + 8 * r) * kPanelPitch,
                     make_float2(values[m][n][2 * r], values[m][n][2 * r + 1]));
      }
    }
  }
}

// Backward reads tiles down their columns where the other operand has rows in their own order: of 8 rows a
// lane takes rows t and t + 4. So that sixteen lanes read all banks once the 16 columns are four units of a
// panel, of which g's second bit tells the half.
//
// The first of two columns that lane or lane group x of eight takes of the `sixteen`-th 16 of a tile.
__device__ __forceinline__ int apart_column(int x, int sixteen) {
  const int unit = x / 2 % 2 * 4 + x / 4 + sixteen % 2 * 2;
  return kFloatPanel * (sixteen / 2) + 4 * unit + x % 2 * 2;
}

// Where this lane's columns of row t lie in a tile of kRows rows; of row t + 4: four rows further, after ^
// 64; the second 16 of a panel: ^ 32.
template <int kRows>
__device__ __forceinline__ uint32_t apart_columns_of_lane(uint32_t shared, int sixteen) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int column = apart_column(lane / 4, sixteen);
  return shared + column / kFloatPanel * (kRows * kPanelPitch) +
         place_in_panel<64>(lane % 4, column % kFloatPanel / 4) + column % 4 * 4;
}

// Both rows' words of 8 rows at an address of columns_of_scores, kTurn = 16, or of apart_columns_of_lane, 64:
// as operand a column 0 of row t, column 1, then of row t + 4.
template <uint32_t kTurn>
__device__ __forceinline__ void load_columns(uint32_t address, uint32_t (&words)[4]) {
  const uint2 first = load_shared_pair(address);
  const uint2 second = load_shared_pair((address ^ kTurn) + 4 * kPanelPitch);
  words[0] = first.x, words[1] = first.y, words[2] = second.x, words[3] = second.y;
}

// sum += a b over the kRows of what both share, 32 at a time. load_a(chunk, step, words) loads 16 rows and 8
// of these of operand a: once, where kKept and there are registers, or again for every 16 columns. b, of
// kRows rows, is read down its columns from b_address on, which begins a panel; panels that begin `left`
// columns from there or further take no time. Sums of two tiles that belong together are columns
// apart_column(2 t) to the third from there: element e of tile j is 2 (e % 2) + j.
template <int kRows, bool kKept, int kTiles, typename LoadA>
__device__ __forceinline__ void add_float32_columns(LoadA load_a, uint32_t b_address, int left,
                                                    float (&sum)[1][kTiles][4]) {
  constexpr int kChunk = kRows < kFloatPanel ? kRows : kFloatPanel, kSteps = kChunk / 8;
#pragma unroll
  for (int chunk = 0; chunk < kRows / kChunk; ++chunk) {
    uint32_t a[kSteps][4];
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      if (kKept) load_a(chunk, s, a[s]);
    }
#pragma unroll
    for (int pair = 0; pair < kTiles / 2; ++pair) {
      if (kFloatPanel * (pair / 2) >= left) continue;
      const uint32_t place = (b_address ^ static_cast<uint32_t>(pair % 2 * 32)) +
                             (pair / 2 * kRows + chunk * kChunk) * kPanelPitch;
      float part[1][2][4] = {}, cross[1][2][4] = {};
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        uint32_t b[4];
        if (!kKept) load_a(chunk, s, a[s]);
        load_columns<64>(place + 8 * s * kPanelPitch, b);
        multiply_apart(part[0][0], cross[0][0], a[s], b[0], b[2]);
        multiply_apart(part[0][1], cross[0][1], a[s], b[1], b[3]);
      }
      add_cross(part, cross);
      add_part(sum, 2 * pair, part);
    }
  }
}

// Stores row r of a lane's sums of such products, of which the first column is `column`, a panel's.
template <int kTiles>
__device__ __forceinline__ void store_float_row(void* row, bool aligned, int column, int width, int r,
                                                const float (&sum)[1][kTiles][4]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
  for (int pair = 0; pair < kTiles / 2; ++pair) {
    const float (&even)[4] = sum[0][2 * pair], (&odd)[4] = sum[0][2 * pair + 1];
    const float unit[4] = {even[2 * r], odd[2 * r], even[2 * r + 1], odd[2 * r + 1]};
    // Lanes t have units as lane groups 2 t would have the first columns of.
    const int at = column + apart_column(2 * (lane % 4), pair);
    if (at < width) store_unit<4>(row, DType::kFloat32, aligned, at / 4, width, unit);
  }
}

}  // namespace fastformer::cuda
