// From the tensors of an attention call to what its kernels are told, checked before anything is launched.
// What only the device knows is not read: lengths, page numbers and the bounds of packed sequences.
#pragma once

#include <algorithm>
#include <cmath>

#include "../attention_arguments.h"
#include "attention_plan.h"
#include "tensors.h"

namespace fastformer::cuda {

// Of paged_attention, in the order of its schema.
struct PagedArguments {
  const Tensor &query, &key_pages, &value_pages, &page_table, &lengths;
  const std::optional<Tensor>& sink;
  double scale;
  std::optional<int64_t> left, right;
  std::optional<double> softcap;
};

// Owns what its pointers point to, so it lives until the kernels are launched.
class AttentionCall {
 public:
  // `p` without its outputs.
  AttentionCall(const AttentionArguments& arguments, AttentionFwdParams& p)
      : query_(with_contiguous_rows(arguments.query)),
        key_(with_contiguous_rows(arguments.key)),
        value_(with_contiguous_rows(arguments.value)) {
    packed_ = arguments.cu_seqlens_q.has_value();
    check_rows();
    set_sizes(arguments, p);
    p.query = head_rows(query_);
    p.key = head_rows(key_);
    p.value = head_rows(value_);
    p.scale = static_cast<float>(arguments.scale);
    p.softcap = static_cast<float>(arguments.softcap.value_or(0.0));
    set_masks(arguments, p);
    set_biases(arguments, p);
    set_sink(arguments.sink, p);
    set_dropout(arguments, p);
  }

  AttentionCall(const PagedArguments& arguments, AttentionFwdParams& p)
      : query_(with_contiguous_rows(arguments.query)),
        key_(with_contiguous_rows(arguments.key_pages)),
        value_(with_contiguous_rows(arguments.value_pages)) {
    check_dims("query [B, H, M, D], key_pages [P, S, H_kv, D] and value_pages [P, S, H_kv, D_v]", 4);
    STD_TORCH_CHECK(value_.size(0) == key_.size(0) && value_.size(1) == key_.size(1),
                    "key_pages and value_pages differ in P or S");
    check_heads(2);
    set_pages(arguments, p);
    p.query = head_rows(query_);
    p.key = page_rows(key_);
    p.value = page_rows(value_);
    p.scale = static_cast<float>(arguments.scale);
    p.softcap = static_cast<float>(arguments.softcap.value_or(0.0));
    p.dropout_scale = 1.0f;
    set_lengths(arguments.lengths, "lengths", p);
    set_sink(arguments.sink, p);
  }
  AttentionCall(const AttentionCall&) = delete;

  bool packed() const { return packed_; }

  // 0 where there is one element, so that alignment asks nothing of it.
  static int64_t stride_of(const Tensor& tensor, int64_t d) {
    return tensor.size(d) == 1 ? 0 : tensor.stride(d);
  }

  // [B, H, M, D], or packed [total, H, D].
  static HeadRows head_rows(const Tensor& tensor) {
    void* const data = const_cast<void*>(tensor.const_data_ptr());
    if (tensor.dim() == 3) return {data, 0, stride_of(tensor, 1), stride_of(tensor, 0)};
    return {data, stride_of(tensor, 0), stride_of(tensor, 1), stride_of(tensor, 2)};
  }

 private:
  static Tensor with_contiguous_rows(const Tensor& tensor) {
    const int64_t last = tensor.dim() - 1;
    STD_TORCH_CHECK(last >= 0, "query, key and value need rows");
    return tensor.size(last) == 1 || tensor.stride(last) == 1 ? tensor : torch::stable::contiguous(tensor);
  }

  // A small vector or matrix of parameters, contiguous; kept as long as the call.
  const Tensor& kept(const Tensor& tensor) {
    kept_.push_back(tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor));
    return kept_.back();
  }

  // [P, S, H_kv, D], whose "batch elements" are pages.
  static HeadRows page_rows(const Tensor& tensor) {
    void* const data = const_cast<void*>(tensor.const_data_ptr());
    return {data, stride_of(tensor, 0), stride_of(tensor, 2), stride_of(tensor, 1)};
  }

  void check_rows() const {
    const int64_t rows = packed_ ? 0 : 2;
    check_dims(
        "query, key and value [B, H, M, D], [B, H_kv, N, D] and [B, H_kv, N, D_v], or packed [total, H, D]",
        packed_ ? 3 : 4);
    STD_TORCH_CHECK(packed_ || (key_.size(0) == query_.size(0) && value_.size(0) == query_.size(0)),
                    "B differs");
    STD_TORCH_CHECK(value_.size(rows) == key_.size(rows), "key and value differ in N");
    check_heads(1);
  }

  void check_dims(const char* wanted, int64_t dims) const {
    STD_TORCH_CHECK(query_.dim() == dims && key_.dim() == dims && value_.dim() == dims, wanted,
                    " are wanted, and something has other dimensions");
  }

  // `heads` is the dimension of key and value that counts them.
  void check_heads(int64_t heads) const {
    const int64_t last = query_.dim() - 1;
    STD_TORCH_CHECK(value_.size(heads) == key_.size(heads), "key and value differ in H_kv");
    STD_TORCH_CHECK(key_.size(last) == query_.size(last), "query and key differ in D");
    STD_TORCH_CHECK(query_.size(1) == 0 || (key_.size(heads) > 0 && query_.size(1) % key_.size(heads) == 0),
                    "H must be divisible by H_kv");
    STD_TORCH_CHECK(
        key_.scalar_type() == query_.scalar_type() && value_.scalar_type() == query_.scalar_type(),
        "query, key and value must have one dtype");
    for (const int64_t width : {query_.size(last), value_.size(last)}) {
      STD_TORCH_CHECK(width >= 1 && width <= 256, "D and D_v must be 1 to 256");
    }
  }

  void set_sizes(const AttentionArguments& arguments, AttentionFwdParams& p) {
    int64_t B = query_.size(0), M = packed_ ? 0 : query_.size(2), N = packed_ ? 0 : key_.size(2);
    if (packed_) {
      STD_TORCH_CHECK(arguments.cu_seqlens_k && arguments.max_seqlen_q && arguments.max_seqlen_k,
                      "packed sequences need cu_seqlens_q, cu_seqlens_k, max_seqlen_q and max_seqlen_k");
      STD_TORCH_CHECK(!arguments.key_padding_mask && !arguments.key_lengths,
                      "packed sequences take no key_padding_mask and no key_lengths");
      p.starts_q = starts_of(*arguments.cu_seqlens_q, "cu_seqlens_q");
      p.starts_k = starts_of(*arguments.cu_seqlens_k, "cu_seqlens_k");
      B = arguments.cu_seqlens_q->size(0) - 1;
      STD_TORCH_CHECK(arguments.cu_seqlens_k->size(0) == B + 1,
                      "cu_seqlens_q and cu_seqlens_k differ in length");
      M = *arguments.max_seqlen_q;
      N = *arguments.max_seqlen_k;
    }
    count_positions(B, M, N, key_.size(1), arguments.left, arguments.right, p);
    p.lower_right = arguments.lower_right;
  }

  void count_positions(int64_t B, int64_t M, int64_t N, int64_t H_kv, std::optional<int64_t> left,
                       std::optional<int64_t> right, AttentionFwdParams& p) const {
    const int64_t H = query_.size(1);
    STD_TORCH_CHECK(M >= 0 && N >= 0 && M + N < kMostPositions, "attention of ", M, " queries and ", N,
                    " keys is not served by cuda");
    STD_TORCH_CHECK(B * H < int64_t{1} << 31, "B * H is too large for cuda");
    p.B = static_cast<int32_t>(B);
    p.H = static_cast<int32_t>(H);
    p.group = static_cast<int32_t>(H_kv == 0 ? 1 : H / H_kv);
    p.M = static_cast<int32_t>(M);
    p.N = static_cast<int32_t>(N);
    p.D = static_cast<int32_t>(query_.size(query_.dim() - 1));
    p.D_v = static_cast<int32_t>(value_.size(value_.dim() - 1));
    p.dtype = dtype_of(query_, "query");
    p.left = static_cast<int32_t>(std::min(left.value_or(M + N), M + N));
    p.right = static_cast<int32_t>(std::min(right.value_or(M + N), M + N));
  }

  void set_pages(const PagedArguments& arguments, AttentionFwdParams& p) {
    const Tensor& table = arguments.page_table;
    STD_TORCH_CHECK(
        table.scalar_type() == ScalarType::Int && table.dim() == 2 && table.size(0) == query_.size(0),
        "page_table must be int32 [B, pages]");
    const int64_t pages = key_.size(0), page_size = key_.size(1);
    STD_TORCH_CHECK(pages >= 1 && page_size >= 1 && pages < int64_t{1} << 31 && page_size < kMostPositions,
                    "key_pages of ", pages, " pages of ", page_size, " tokens are not served by cuda");
    const int64_t N = table.size(1) * page_size;
    count_positions(query_.size(0), query_.size(2), N, key_.size(2), arguments.left, arguments.right, p);
    p.lower_right = 1;
    p.page_table = static_cast<const int32_t*>(kept(table).const_data_ptr());
    p.page_table_stride = table.size(1);
    p.page_size = static_cast<int32_t>(page_size);
    p.pages = static_cast<int32_t>(pages);
  }

  const int32_t* starts_of(const Tensor& starts, const char* name) {
    STD_TORCH_CHECK(starts.scalar_type() == ScalarType::Int && starts.dim() == 1 && starts.size(0) >= 1, name,
                    " must be int32 [S + 1]");
    return static_cast<const int32_t*>(kept(starts).const_data_ptr());
  }

  // Strides of a tensor that broadcasts to [B, H, M, N], 0 where it does.
  ScoreMatrix score_matrix(const Tensor& tensor, const AttentionFwdParams& p, const char* name) const {
    const int64_t full[] = {p.N, p.M, p.H, p.B};
    STD_TORCH_CHECK(tensor.dim() <= 4, name, " must be broadcastable to [B, H, M, N]");
    int64_t strides[4] = {};
    for (int64_t from_end = 0; from_end < tensor.dim(); ++from_end) {
      const int64_t d = tensor.dim() - 1 - from_end;
      STD_TORCH_CHECK(tensor.size(d) == 1 || tensor.size(d) == full[from_end], name,
                      " must be broadcastable to [B, H, M, N]");
      strides[from_end] = stride_of(tensor, d);
    }
    void* const data = const_cast<void*>(tensor.const_data_ptr());
    return {data, DType::kFloat32, strides[3], strides[2], strides[1], strides[0]};
  }

  void set_masks(const AttentionArguments& arguments, AttentionFwdParams& p) {
    if (const auto& mask = arguments.mask) {
      STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool, "mask must be bool");
      const bool of_keys = mask->dim() < 2 || mask->size(mask->dim() - 2) == 1;
      (of_keys ? p.key_mask : p.mask) = score_matrix(*mask, p, "mask");
    }
    if (const auto& padding = arguments.key_padding_mask) {
      STD_TORCH_CHECK(padding->scalar_type() == ScalarType::Bool && padding->dim() == 2 &&
                          padding->size(0) == p.B && padding->size(1) == p.N,
                      "key_padding_mask must be bool [B, N]");
      void* const data = const_cast<void*>(padding->const_data_ptr());
      p.padding = {data, DType::kFloat32, padding->stride(0), 0, 0, padding->stride(1)};
    }
    if (arguments.key_lengths) set_lengths(*arguments.key_lengths, "key_lengths", p);
  }

  void set_lengths(const Tensor& lengths, const char* name, AttentionFwdParams& p) {
    p.wide_lengths = lengths.scalar_type() == ScalarType::Long;
    STD_TORCH_CHECK(p.wide_lengths || lengths.scalar_type() == ScalarType::Int, name,
                    " must be int32 or int64");
    STD_TORCH_CHECK(lengths.dim() == 1 && lengths.size(0) == p.B, name, " must be [B]");
    p.key_lengths = kept(lengths).const_data_ptr();
  }

  void set_biases(const AttentionArguments& arguments, AttentionFwdParams& p) {
    if (arguments.bias) {
      p.bias = score_matrix(*arguments.bias, p, "bias");
      p.bias.dtype = dtype_of(*arguments.bias, "bias");
    }
    if (const auto& row = arguments.relative_bias) {
      const int64_t entries = std::max<int64_t>(int64_t{p.M} + p.N - 1, 0);
      STD_TORCH_CHECK(
          row->dim() == 2 && (row->size(0) == 1 || row->size(0) == p.H) && row->size(1) == entries,
          "relative_bias must be [H or 1, M + N - 1]");
      p.relative_bias = kept(*row).const_data_ptr();
      p.relative_bias_dtype = dtype_of(*row, "relative_bias");
      p.relative_bias_stride_h = row->size(0) == 1 ? 0 : entries;
    }
  }

  void set_sink(const std::optional<Tensor>& sink, AttentionFwdParams& p) {
    if (!sink) return;
    STD_TORCH_CHECK(sink->dim() == 1 && sink->size(0) == p.H, "sink must be [H]");
    p.sink = kept(*sink).const_data_ptr();
    p.sink_dtype = dtype_of(*sink, "sink");
  }

  static void set_dropout(const AttentionArguments& arguments, AttentionFwdParams& p) {
    p.threshold = static_cast<uint32_t>(std::nearbyint(arguments.dropout_p * 65536.0));  // half to even
    p.dropout_scale = 1.0f;
    if (p.threshold == 0) return;
    const auto& seed = arguments.seed;
    STD_TORCH_CHECK(seed.has_value() && seed->scalar_type() == ScalarType::Long && seed->numel() == 1,
                    "dropout needs a seed: an int64 tensor of one element");
    p.seed = static_cast<const uint64_t*>(seed->const_data_ptr());
    p.dropout_scale = p.threshold == 65536 ? 0.0f : static_cast<float>(65536.0 / (65536.0 - p.threshold));
  }

  Tensor query_, key_, value_;
  std::vector<Tensor> kept_;
  bool packed_ = false;
};

}  // namespace fastformer::cuda
