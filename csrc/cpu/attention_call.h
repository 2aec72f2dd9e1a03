// From the tensors of an attention call to the plain struct of shapes.h, checked, for every launcher of
// attention.
#pragma once

#include <vector>

#include "tensors.h"

namespace fastformer::cpu {

// Arguments in the order of the operators' schemas.
struct AttentionArguments {
  const Tensor &query, &key, &value;
  const std::optional<Tensor>&mask, &key_padding_mask, &key_lengths, &bias, &relative_bias, &sink, &seed;
  const std::optional<Tensor>&cu_seqlens_q, &cu_seqlens_k;
  double scale;
  std::optional<int64_t> left, right;
  bool lower_right;
  std::optional<double> softcap;
  double dropout_p;
  std::optional<int64_t> max_seqlen_q, max_seqlen_k;
};

// Owns what the struct points to, so it lives as long as the kernels run.
class AttentionCall {
 public:
  explicit AttentionCall(const AttentionArguments& arguments);
  AttentionCall(const AttentionCall&) = delete;

  Attention attention{};
  bool packed() const { return attention.cu_seqlens_q != nullptr; }
  // Query rows of all batch elements.
  int64_t total_rows() const { return total_rows_; }

 private:
  void set_masks(const AttentionArguments& arguments);
  void set_packed(const AttentionArguments& arguments);

  Tensor query_, key_, value_;
  std::optional<Tensor> cu_seqlens_q_, cu_seqlens_k_;
  Float32Copy relative_bias_, sink_;
  std::vector<int64_t> lengths_;
  int64_t total_rows_;
};

// A copy where the last dimension is not contiguous.
Tensor with_contiguous_rows(const Tensor& tensor);

// [B, H, M, D], or packed [total, H, D].
HeadRows head_rows(const Tensor& tensor);

// [B, H, M], or packed [H, total], contiguous float32.
RowStats row_stats(const Tensor& tensor);

// A tensor that broadcasts to the call's [B, H, M, N].
ScoreMatrix score_matrix(const Tensor& tensor, const Attention& call, const char* name);

// The multiplications of one head's scores and outputs.
inline int64_t products_of_head(const Attention& call) { return call.M * call.N * (call.D + call.D_v); }

}  // namespace fastformer::cpu
