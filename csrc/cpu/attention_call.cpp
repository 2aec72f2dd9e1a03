#include "attention_call.h"

#include <algorithm>

namespace fastformer::cpu {

using torch::headeronly::ScalarType;

namespace {

// The stride of dimension `from_end` (1 = last), 0 where it is missing or broadcast.
int64_t broadcast_stride(const Tensor& tensor, int64_t from_end) {
  const int64_t d = tensor.dim() - from_end;
  return d < 0 || tensor.size(d) == 1 ? 0 : tensor.stride(d);
}

void check_broadcastable(const Tensor& tensor, const Attention& call, const char* name) {
  const int64_t full[] = {call.N, call.M, call.H, call.B};
  STD_TORCH_CHECK(tensor.dim() <= 4, name, " must be broadcastable to [B, H, M, N]");
  for (int64_t from_end = 1; from_end <= tensor.dim(); ++from_end) {
    const int64_t size = tensor.size(tensor.dim() - from_end);
    STD_TORCH_CHECK(size == 1 || size == full[from_end - 1], name, " must be broadcastable to [B, H, M, N]");
  }
}

// What is wanted wherever the keys lie.
void check_operands(const Tensor& query, const Tensor& key, const Tensor& value, int64_t H_kv) {
  const int64_t H = query.size(1), last = query.dim() - 1;
  STD_TORCH_CHECK(key.size(last) == query.size(last), "query and key differ in D");
  STD_TORCH_CHECK(H == 0 || (H_kv > 0 && H % H_kv == 0), "H must be divisible by H_kv");
  STD_TORCH_CHECK(key.scalar_type() == query.scalar_type() && value.scalar_type() == query.scalar_type(),
                  "query, key and value must have one dtype");
  for (const int64_t width : {query.size(last), value.size(last)}) {
    STD_TORCH_CHECK(width >= 1 && width <= 256, "D and D_v must be 1 to 256");
  }
}

void check_shapes(const Tensor& query, const Tensor& key, const Tensor& value, int64_t dims) {
  STD_TORCH_CHECK(query.dim() == dims && key.dim() == dims && value.dim() == dims,
                  "query, key and value must be [B, H, M, D], [B, H_kv, N, D] and [B, H_kv, N, D_v], or "
                  "packed [total, H, D]");
  const int64_t heads = 1, rows = dims == 4 ? 2 : 0;
  STD_TORCH_CHECK(dims == 3 || (key.size(0) == query.size(0) && value.size(0) == query.size(0)), "B differs");
  STD_TORCH_CHECK(value.size(heads) == key.size(heads), "key and value differ in H_kv");
  STD_TORCH_CHECK(value.size(rows) == key.size(rows), "key and value differ in N");
  check_operands(query, key, value, key.size(heads));
}

// Bounds of packed sequences, contiguous: from 0 to `total`, none longer than `longest`.
Tensor checked_bounds(const Tensor& cu_seqlens, int64_t total, int64_t longest, const char* name) {
  STD_TORCH_CHECK(
      cu_seqlens.scalar_type() == ScalarType::Int && cu_seqlens.dim() == 1 && cu_seqlens.size(0) >= 1, name,
      " must be int32 [S + 1]");
  Tensor bounds = cu_seqlens.is_contiguous() ? cu_seqlens : torch::stable::contiguous(cu_seqlens);
  const int32_t* const bound = bounds.const_data_ptr<int32_t>();
  const int64_t count = bounds.size(0) - 1;
  STD_TORCH_CHECK(bound[0] == 0 && bound[count] == total, name, " must go from 0 to ", total);
  for (int64_t b = 0; b < count; ++b) {
    const int64_t length = int64_t{bound[b + 1]} - bound[b];
    STD_TORCH_CHECK(length >= 0 && length <= longest, name, " has a sequence of ", length,
                    " rows; wanted 0 to max_seqlen, ", longest);
  }
  return bounds;
}

std::vector<int64_t> lengths_of(const Tensor& tensor, int64_t B, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) == B, name, " must be [B]");
  const bool wide = tensor.scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK(wide || tensor.scalar_type() == ScalarType::Int, name, " must be int32 or int64");
  std::vector<int64_t> lengths(B);
  for (int64_t b = 0; b < B; ++b) {
    const int64_t at = b * tensor.stride(0);
    lengths[b] = wide ? tensor.const_data_ptr<int64_t>()[at] : tensor.const_data_ptr<int32_t>()[at];
  }
  return lengths;
}

// Keys or values in pages, [P, S, H_kv, width].
HeadRows page_rows(const Tensor& tensor) {
  return {const_cast<void*>(tensor.const_data_ptr()), tensor.stride(0), tensor.stride(2), tensor.stride(1)};
}

}  // namespace

Tensor with_contiguous_rows(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  return tensor.stride(last) == 1 || tensor.size(last) == 1 ? tensor : torch::stable::contiguous(tensor);
}

HeadRows head_rows(const Tensor& tensor) {
  void* const data = const_cast<void*>(tensor.const_data_ptr());
  if (tensor.dim() == 3) return {data, 0, tensor.stride(1), tensor.stride(0)};
  return {data, tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

RowStats row_stats(const Tensor& tensor) {
  auto* const data = const_cast<float*>(tensor.const_data_ptr<float>());
  if (tensor.dim() == 2) return {data, 0, tensor.size(1)};
  return {data, tensor.size(1) * tensor.size(2), tensor.size(2)};
}

ScoreMatrix score_matrix(const Tensor& tensor, const Attention& call, const char* name) {
  check_broadcastable(tensor, call, name);
  return {const_cast<void*>(tensor.const_data_ptr()),
          dtype_of(tensor),
          broadcast_stride(tensor, 4),
          broadcast_stride(tensor, 3),
          broadcast_stride(tensor, 2),
          broadcast_stride(tensor, 1)};
}

AttentionCall::AttentionCall(const AttentionArguments& arguments)
    : query_(with_contiguous_rows(arguments.query)),
      key_(with_contiguous_rows(arguments.key)),
      value_(with_contiguous_rows(arguments.value)),
      relative_bias_(arguments.relative_bias),
      sink_(arguments.sink) {
  const bool packed = arguments.cu_seqlens_q.has_value();
  check_shapes(query_, key_, value_, packed ? 3 : 4);
  Attention& call = attention;
  call.dtype = dtype_of(query_);
  call.query = head_rows(query_);
  call.key = head_rows(key_);
  call.value = head_rows(value_);
  call.H = query_.size(1);
  call.H_kv = key_.size(1);
  call.D = query_.size(query_.dim() - 1);
  call.D_v = value_.size(value_.dim() - 1);
  if (packed) {
    set_packed(arguments);
  } else {
    call.B = query_.size(0);
    call.M = query_.size(2);
    call.N = key_.size(2);
    total_rows_ = call.B * call.M;
  }
  call.scale = static_cast<float>(arguments.scale);
  call.softcap = static_cast<float>(arguments.softcap.value_or(0.0));
  call.dropout = dropout_of(arguments.dropout_p, arguments.seed);
  set_masks(arguments);
  if (arguments.bias) call.bias = score_matrix(*arguments.bias, call, "bias");
  if (const auto& row = arguments.relative_bias) {
    const int64_t entries = std::max<int64_t>(call.M + call.N - 1, 0);
    STD_TORCH_CHECK(
        row->dim() == 2 && (row->size(0) == 1 || row->size(0) == call.H) && row->size(1) == entries,
        "relative_bias must be [H or 1, M + N - 1]");
    call.relative_bias = relative_bias_.data();
    call.relative_bias_stride_h = row->size(0) == 1 ? 0 : entries;
  }
  if (const auto& sink = arguments.sink) {
    STD_TORCH_CHECK(sink->dim() == 1 && sink->size(0) == call.H, "sink must be [H]");
    call.sink = sink_.data();
  }
}

void AttentionCall::set_packed(const AttentionArguments& arguments) {
  STD_TORCH_CHECK(arguments.cu_seqlens_k.has_value() && arguments.max_seqlen_q && arguments.max_seqlen_k,
                  "packed sequences need cu_seqlens_q, cu_seqlens_k, max_seqlen_q and max_seqlen_k");
  STD_TORCH_CHECK(!arguments.key_padding_mask && !arguments.key_lengths,
                  "packed sequences take no key_padding_mask and no key_lengths");
  Attention& call = attention;
  call.M = *arguments.max_seqlen_q;
  call.N = *arguments.max_seqlen_k;
  total_rows_ = query_.size(0);
  cu_seqlens_q_ = checked_bounds(*arguments.cu_seqlens_q, total_rows_, call.M, "cu_seqlens_q");
  cu_seqlens_k_ = checked_bounds(*arguments.cu_seqlens_k, key_.size(0), call.N, "cu_seqlens_k");
  call.B = cu_seqlens_q_->size(0) - 1;
  STD_TORCH_CHECK(cu_seqlens_k_->size(0) == call.B + 1, "cu_seqlens_q and cu_seqlens_k differ in length");
  call.cu_seqlens_q = cu_seqlens_q_->const_data_ptr<int32_t>();
  call.cu_seqlens_k = cu_seqlens_k_->const_data_ptr<int32_t>();
}

void AttentionCall::set_masks(const AttentionArguments& arguments) {
  const Attention& call = attention;
  KeyMasks& masks = attention.masks;
  masks.left = std::min(arguments.left.value_or(kOpenSide), kOpenSide);
  masks.right = std::min(arguments.right.value_or(kOpenSide), kOpenSide);
  masks.lower_right = arguments.lower_right;
  if (const auto& mask = arguments.mask) {
    STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool, "mask must be bool");
    check_broadcastable(*mask, call, "mask");
    masks.mask = static_cast<const uint8_t*>(mask->const_data_ptr());
    masks.mask_stride_n = broadcast_stride(*mask, 1);
    masks.mask_stride_m = broadcast_stride(*mask, 2);
    masks.mask_stride_h = broadcast_stride(*mask, 3);
    masks.mask_stride_b = broadcast_stride(*mask, 4);
  }
  if (const auto& padding = arguments.key_padding_mask) {
    STD_TORCH_CHECK(padding->scalar_type() == ScalarType::Bool && padding->dim() == 2 &&
                        padding->size(0) == call.B && padding->size(1) == call.N,
                    "key_padding_mask must be bool [B, N]");
    masks.key_padding = static_cast<const uint8_t*>(padding->const_data_ptr());
    masks.key_padding_stride_b = padding->stride(0);
    masks.key_padding_stride_n = padding->stride(1);
  }
  if (arguments.key_lengths) {
    lengths_ = lengths_of(*arguments.key_lengths, call.B, "key_lengths");
    masks.key_lengths = lengths_.data();
  }
}

PagedAttentionCall::PagedAttentionCall(const Tensor& query, const Tensor& key_pages,
                                       const Tensor& value_pages, const Tensor& page_table,
                                       const Tensor& lengths, const std::optional<Tensor>& sink, double scale,
                                       std::optional<int64_t> left, std::optional<int64_t> right,
                                       std::optional<double> softcap)
    : query_(with_contiguous_rows(query)),
      key_pages_(with_contiguous_rows(key_pages)),
      value_pages_(with_contiguous_rows(value_pages)),
      sink_(sink) {
  STD_TORCH_CHECK(query.dim() == 4 && key_pages.dim() == 4 && value_pages.dim() == 4,
                  "query, key_pages and value_pages must be [B, H, M, D], [P, S, H_kv, D] and "
                  "[P, S, H_kv, D_v]");
  for (const int64_t axis : {0, 1, 2}) {
    STD_TORCH_CHECK(key_pages.size(axis) == value_pages.size(axis),
                    "key_pages and value_pages differ in P, S or H_kv");
  }
  check_operands(query, key_pages, value_pages, key_pages.size(2));
  Attention& call = attention;
  call.dtype = dtype_of(query_);
  call.query = head_rows(query_);
  call.key = page_rows(key_pages_);
  call.value = page_rows(value_pages_);
  call.B = query_.size(0);
  call.H = query_.size(1);
  call.M = query_.size(2);
  call.D = query_.size(3);
  call.H_kv = key_pages_.size(2);
  call.D_v = value_pages_.size(3);
  call.scale = static_cast<float>(scale);
  call.softcap = static_cast<float>(softcap.value_or(0.0));
  call.masks.left = std::min(left.value_or(kOpenSide), kOpenSide);
  call.masks.right = std::min(right.value_or(kOpenSide), kOpenSide);
  call.masks.lower_right = true;
  if (sink) {
    STD_TORCH_CHECK(sink->dim() == 1 && sink->size(0) == call.H, "sink must be [H]");
    call.sink = sink_.data();
  }
  set_pages(page_table, lengths);
}

void PagedAttentionCall::set_pages(const Tensor& page_table, const Tensor& lengths) {
  Attention& call = attention;
  Pages& pages = call.pages;
  STD_TORCH_CHECK(
      page_table.scalar_type() == ScalarType::Int && page_table.dim() == 2 && page_table.size(0) == call.B,
      "page_table must be int32 [B, pages]");
  pages.table = page_table.const_data_ptr<int32_t>();
  pages.stride_b = page_table.stride(0);
  pages.stride_n = page_table.stride(1);
  pages.count = key_pages_.size(0);
  pages.size = key_pages_.size(1);
  STD_TORCH_CHECK(pages.count >= 1 && pages.size >= 1, "P and S must be at least 1");
  lengths_ = lengths_of(lengths, call.B, "lengths");
  const int64_t most = page_table.size(1) * pages.size;
  call.N = 0;
  for (int64_t& length : lengths_) {
    length = std::clamp<int64_t>(length, 0, most);
    call.N = std::max(call.N, length);
  }
  pages.lengths = lengths_.data();
}

}  // namespace fastformer::cpu
