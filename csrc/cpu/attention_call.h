// From the tensors of an attention call to the plain struct of shapes.h, checked, for every launcher of
// attention.
#pragma once

#include <vector>

#include "../attention_arguments.h"
#include "tensors.h"

namespace fastformer::cpu {

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

// The same of a call of paged_attention: query [B, H, M, D], and key and value [P, S, H_kv, D] in pages.
class PagedAttentionCall {
 public:
  PagedAttentionCall(const Tensor& query, const Tensor& key_pages, const Tensor& value_pages,
                     const Tensor& page_table, const Tensor& lengths, const std::optional<Tensor>& sink,
                     double scale, std::optional<int64_t> left, std::optional<int64_t> right,
                     std::optional<double> softcap);
  PagedAttentionCall(const PagedAttentionCall&) = delete;

  Attention attention{};

 private:
  void set_pages(const Tensor& page_table, const Tensor& lengths);

  Tensor query_, key_pages_, value_pages_;
  Float32Copy sink_;
  std::vector<int64_t> lengths_;
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
