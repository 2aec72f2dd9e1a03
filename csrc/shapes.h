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

inline int64_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

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

// [batch, head, row, column] with contiguous columns; strides count elements.
struct HeadRows {
  const void* data;
  int64_t stride_b, stride_h, stride_row;
};

// A side of the window that nothing bounds: far below 2^63, so that sums of positions cannot overflow.
constexpr int64_t kOpenSide = int64_t{1} << 60;

// Which keys a query may see. Key j lies in query i's window iff -left <= j - i - offset <= right. Each
// pointer may be null.
struct KeyMasks {
  int64_t left = kOpenSide, right = kOpenSide, offset = 0;
  const uint8_t* mask = nullptr;  // [B, H, M, N], 1 = may attend; strides are 0 where it is broadcast
  int64_t mask_stride_b = 0, mask_stride_h = 0, mask_stride_m = 0, mask_stride_n = 0;
  const uint8_t* key_padding = nullptr;  // [B, N], 1 = real token
  int64_t key_padding_stride_b = 0, key_padding_stride_n = 0;
  const int64_t* key_lengths = nullptr;  // [B], contiguous
};

// out = softmax(scale query key^T) value over the visible keys, head by head.
struct AttentionFwd {
  HeadRows query;  // [B, H, M, D]
  HeadRows key;    // [B, H_kv, N, D]
  HeadRows value;  // [B, H_kv, N, D_v]
  void* out;       // [B, H, M, D_v] contiguous
  float* lse;      // [B, H, M] contiguous, natural log
  int64_t B, H, H_kv, M, N, D, D_v;
  KeyMasks masks;
  float scale;
  DType dtype;
  // A work item is (b * H + h) * chunks + chunk: chunk_rows queries of one head.
  int64_t chunk_rows, chunks;
};

enum class Activation : int32_t { kRelu, kGelu, kGeluTanh, kSilu, kRelu2 };

// A weight as torch.nn.Linear holds it: [rows out, columns in], columns contiguous.
struct Weight {
  const void* data = nullptr;
  int64_t row_stride = 0;
};

// out = dropout(act(x w1^T + b1)) w2^T + b2, gated: act(x w_gate^T + b_gate) * (x w1^T + b1), for one block
// of rows. The hidden rows are whole, so that threads may share the block by columns in both products.
struct FeedForwardFwd {
  const void* x;  // [rows, E], columns contiguous
  int64_t x_row_stride;
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

}  // namespace fastformer
