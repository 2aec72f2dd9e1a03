// Plain sizes, strides and pointers: all that a kernel knows of a call. No torch here.
#pragma once

#include <cstdint>

namespace fastformer {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

enum class DType : int32_t { kFloat32, kBFloat16, kFloat16 };

constexpr int64_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A 16-bit decision keeps its element iff it is >= threshold, and `scale` then multiplies it.
struct Dropout {
  uint64_t seed = 0;
  uint32_t threshold = 0;  // 0: no dropout; 65536: everything is dropped, and scale is 0
  float scale = 1.0f;
};

// out = norm(s) * weight + bias with s = residual + dropout(x), row by row. Strides count elements.
struct NormFwd {
  const void* x;         // [rows, cols], columns contiguous
  const void* residual;  // [rows, cols] or null: s is x
  const float* weight;   // [cols] or null: 1
  const float* bias;     // [cols] or null: 0
  void* out;             // [rows, cols] contiguous
  void* sum;             // s, as out; null without residual
  float* mean;           // [rows]; null for rms
  float* rstd;           // [rows]
  int64_t cols;
  int64_t x_row_stride;
  int64_t residual_row_stride;
  DType x_dtype;
  DType residual_dtype;  // out and sum have the common dtype of the two, float32 where they differ
  bool rms;
  bool past_caches;  // out and sum will not be read soon
  float eps;
  Dropout dropout;
};

// ds = norm'(s) grad_out + grad_sum, dx = dropout'(ds), and one block of rows' share of dweight and dbias.
struct NormBwd {
  const void* grad_out;  // [rows, cols], columns contiguous
  const void* grad_sum;  // as grad_out, or null
  const void* s;         // [rows, cols]
  const float* weight;   // [cols] or null: 1
  const float* mean;     // [rows]; null for rms
  const float* rstd;     // [rows]
  void* ds;              // [rows, cols] contiguous
  void* dx;              // as ds; null without dropout
  int64_t cols;
  int64_t grad_out_row_stride;
  int64_t grad_sum_row_stride;
  int64_t s_row_stride;
  DType dtype;  // of all five
  bool past_caches;
  Dropout dropout;
};

// [batch, head, row, column] with contiguous columns; strides count elements. Packed sequences follow each
// other in rows: stride_b is 0, and sequence b begins at row cu_seqlens[b].
struct HeadRows {
  void* data;
  int64_t stride_b, stride_h, stride_row;
};

// Statistics of query rows: float32 [B, H, M], packed [H, total], contiguous.
struct RowStats {
  float* data;
  int64_t stride_b, stride_h;
};

// A tensor that broadcasts to [B, H, M, N]; strides are 0 where it is broadcast.
struct ScoreMatrix {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t stride_b = 0, stride_h = 0, stride_m = 0, stride_n = 0;
};

// A side of the window that nothing bounds: far below 2^63, so that sums of positions cannot overflow.
constexpr int64_t kOpenSide = int64_t{1} << 60;

// Which keys a query may see. Key j lies in query i's window iff -left <= j - i - offset <= right, with
// offset N - M where `lower_right` and 0 elsewhere. Each pointer may be null.
struct KeyMasks {
  int64_t left = kOpenSide, right = kOpenSide;
  bool lower_right = false;
  const uint8_t* mask = nullptr;  // [B, H, M, N], 1 = may attend; strides are 0 where it is broadcast
  int64_t mask_stride_b = 0, mask_stride_h = 0, mask_stride_m = 0, mask_stride_n = 0;
  const uint8_t* key_padding = nullptr;  // [B, N], 1 = real token
  int64_t key_padding_stride_b = 0, key_padding_stride_n = 0;
  const int64_t* key_lengths = nullptr;  // [B], contiguous
};

// Keys and values in the pages of a cache: key j of batch element b is row j % size of page
// table[b * stride_b + j / size * stride_n]; what is no page's number counts as the last. `key` and `value`
// then have pages in the place of batch elements, and N is that of the longest.
struct Pages {
  const int32_t* table = nullptr;  // [B, pages]; null: a batch element's keys lie in rows
  int64_t stride_b = 0, stride_n = 0;
  int64_t size = 0, count = 0;
  const int64_t* lengths = nullptr;  // [B]: each batch element's own N
};

// What every pass over the scores of a call knows of it:
//   score_ij = softcap(scale q_i . k_j) + bias_ij + relative_bias[j - i + M - 1], -inf where masked
struct Attention {
  HeadRows query;  // [B, H, M, D]
  HeadRows key;    // [B, H_kv, N, D]
  HeadRows value;  // [B, H_kv, N, D_v]
  int64_t B, H, H_kv, M, N, D, D_v;
  // Of packed sequences, [B + 1] each, and then M and N are those of the longest; null elsewhere.
  const int32_t* cu_seqlens_q = nullptr;
  const int32_t* cu_seqlens_k = nullptr;
  Pages pages;
  KeyMasks masks;
  ScoreMatrix bias;                      // data null: none
  const float* relative_bias = nullptr;  // [H or 1, M + N - 1]
  int64_t relative_bias_stride_h = 0;
  const float* sink = nullptr;  // [H]
  float scale;
  float softcap = 0.0f;  // 0: none
  Dropout dropout;
  DType dtype;  // of query, key, value, out and their gradients
};

// out = dropout(softmax(score)) value, head by head, and lse = log sum exp score = row_max + log(row_sum),
// where row_max is the largest score.
struct AttentionFwd {
  Attention attention;
  HeadRows out;  // [B, H, M, D_v]
  RowStats lse, row_max, row_sum;
  // A work item is (b * H + h) * chunks + chunk: chunk_rows queries of one head.
  int64_t chunk_rows, chunks;
};

// What it takes to compute weights anew, and the gradient of the scores.
struct ScorePass {
  Attention attention;
  RowStats row_max, row_sum;
  HeadRows grad_out;         // data null: zero
  ScoreMatrix grad_weights;  // data null: none; averaged weights have stride_h 0
  float grad_weights_scale;  // 1, averaged: 1 / H
  RowStats grad_lse;         // data null: zero
  RowStats delta;            // grad_out_i . out_i + sum_j weights_ij grad_weights_ij
};

struct AttentionBwd {
  ScorePass scores;
  HeadRows out;
  HeadRows grad_query, grad_key, grad_value;
  // Null where not wanted. Sums that cross work items come as shares, which are added in order afterwards.
  ScoreMatrix grad_bias;        // zeroed before; added to, in float32, where one item takes several heads
  RowStats grad_rows;           // sum_j dscore_ij
  float* sink_shares;           // [B, H]
  float* relative_bias_shares;  // [B, H, chunks, M + N - 1]
  float* query_shares;          // [chunks, elements of query]; null where chunks is 1
  int64_t query_elements;
  // A work item is (batch group * head groups + head group) * chunks + chunk: chunk_keys keys of group_B
  // batch elements and group_H key heads, one after another: 1, or all of those that share a slice of the
  // bias.
  int64_t chunk_keys, chunks;
  int64_t group_B, group_H;
};

// target = factor times the sum of the weights, or of the gradient of the scores, over the dimensions in
// which target has size 1.
struct ScoreSum {
  ScorePass scores;
  bool of_gradient;
  float factor;
  ScoreMatrix target;
  int64_t target_B, target_H, target_M;  // N is whole
};

enum class Activation : int32_t { kRelu, kGelu, kGeluTanh, kSilu, kRelu2 };

// [rows, columns] with contiguous columns, of a call's dtype or of operands: what that dtype is multiplied
// as.
struct RowMatrix {
  const void* data = nullptr;
  int64_t row_stride = 0, rows = 0, columns = 0;
  bool operands = false;
};

// A weight as torch.nn.Linear holds it: [rows out, columns in], columns contiguous.
struct Weight {
  const void* data = nullptr;
  int64_t row_stride = 0;
};

// out = dropout(act(x w1^T + b1)) w2^T + b2, gated: act(x w_gate^T + b_gate) * (x w1^T + b1), for one block
// of rows. The hidden rows are whole, so that threads may share the block by columns in both products.
struct FeedForwardFwd {
  Weight w1, w_gate, w2;          // [F, E], [F, E] or null, [E_out, F]
  const float *b1, *b_gate, *b2;  // [F], [F], [E_out]; null: 0
  void *pre, *pre_gate;           // [rows, F] contiguous; null where they are not wanted
  void* out;                      // [rows, E_out] contiguous
  // Scratch, of elements as the level multiplies them. What hidden's padding rows hold reaches no output.
  void* x_operands;  // [padded_rows, x_stride]: x, with zero rows and columns around it
  void* hidden;      // [padded_rows, hidden_stride]
  int64_t rows, padded_rows, E, F, E_out;
  int64_t x_stride, hidden_stride;
  int64_t first_row;  // of this block in the whole x: dropout counts from there
  Activation activation;
  DType dtype;
  Dropout dropout;
};

// The gradients of FeedForwardFwd for one block of rows. Each dw and db sums over blocks.
struct FeedForwardBwd {
  const void *pre, *pre_gate;  // [rows, F] contiguous; null: computed again from x_operands
  Weight w1, w_gate, w2;       // [F, E], [F, E] or null, [E_out, F]
  const float *b1, *b_gate;    // [F]; null: 0
  void* dx;                    // [rows, E] contiguous; null where it is not needed
  double *db1, *db_gate;       // [F]; null where they are not needed
  // Scratch, of elements as the level multiplies them; null where nothing needs it. What padding rows hold
  // reaches no result.
  void* grad_operands;  // [padded_rows, grad_stride]: grad_out, with zero rows and columns around it
  void* x_operands;     // [padded_rows, x_stride], like it
  // [padded_rows, hidden_stride]: what w2 met, and the gradients of pre and pre_gate.
  void *hidden, *dpre, *dgate;
  void *dpre_columns, *dgate_columns;  // [F up to whole steps, columns_stride]: the same, transposed
  int64_t rows, padded_rows, E, F, E_out;
  int64_t grad_stride, x_stride, hidden_stride, columns_stride;
  int64_t first_row;  // of this block in the whole x: dropout counts from there
  Activation activation;
  DType dtype;
  Dropout dropout;
};

// Products of at most this depth are summed in one part: twice as many terms have errors of 1.4 times
// torch's.
constexpr int64_t kDepthBlock = 256;

// The most columns of a product that a worker takes at a time.
constexpr int64_t kGroupColumns = 128;

// dw[M, N] = sum over rows of left[row, M] right[row, N], for one block of rows.
struct WeightGradient {
  const void* left;  // [M up to whole steps, left_stride]: transposed, as operands
  int64_t left_stride;
  RowMatrix right;  // [rows, N]
  void* dw;         // [M, N] contiguous
  float* sums;      // as dw: what earlier parts gave. dw itself where that is float32,
                    // null where it is not and there is one part
  int64_t M;
  bool first, last;  // of the blocks
  DType dtype;       // of dw
};

}  // namespace fastformer
