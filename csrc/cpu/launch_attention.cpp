// attention_fwd_cpu: from tensors to the plain struct of shapes.h, and the division of work over threads.
#include "launch_attention.h"

#include <algorithm>
#include <vector>

#include "launch.h"
#include "parallel.h"
#include "tensors.h"

namespace fastformer::cpu {
namespace {

using torch::headeronly::ScalarType;

// Query rows whose float32 outputs a work item may keep: 256 KB, which leaves room for keys in L2.
constexpr int64_t kChunkFloats = 65536;
// A multiple of every level's tile rows.
constexpr int64_t kChunkStep = 12;
constexpr int64_t kLeastChunkRows = 48;

int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

Tensor with_contiguous_rows(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  return tensor.stride(last) == 1 || tensor.size(last) == 1 ? tensor : torch::stable::contiguous(tensor);
}

HeadRows head_rows(const Tensor& tensor) {
  return {const_cast<void*>(tensor.const_data_ptr()), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

// The stride of dimension `from_end` (1 = last), 0 where it is missing or broadcast.
int64_t broadcast_stride(const Tensor& tensor, int64_t from_end) {
  const int64_t d = tensor.dim() - from_end;
  return d < 0 || tensor.size(d) == 1 ? 0 : tensor.stride(d);
}

void check_broadcastable(const Tensor& mask, const Attention& call) {
  const int64_t full[] = {call.N, call.M, call.H, call.B};
  STD_TORCH_CHECK(mask.scalar_type() == ScalarType::Bool, "mask must be bool");
  STD_TORCH_CHECK(mask.dim() <= 4, "mask must be broadcastable to [B, H, M, N]");
  for (int64_t from_end = 1; from_end <= mask.dim(); ++from_end) {
    const int64_t size = mask.size(mask.dim() - from_end);
    STD_TORCH_CHECK(size == 1 || size == full[from_end - 1], "mask must be broadcastable to [B, H, M, N]");
  }
}

void check_shapes(const Tensor& query, const Tensor& key, const Tensor& value) {
  STD_TORCH_CHECK(query.dim() == 4 && key.dim() == 4 && value.dim() == 4,
                  "query, key and value must be [B, H, M, D], [B, H_kv, N, D] and [B, H_kv, N, D_v]");
  STD_TORCH_CHECK(key.size(0) == query.size(0) && value.size(0) == query.size(0), "B differs");
  STD_TORCH_CHECK(value.size(1) == key.size(1), "key and value differ in H_kv");
  STD_TORCH_CHECK(value.size(2) == key.size(2), "key and value differ in N");
  STD_TORCH_CHECK(key.size(3) == query.size(3), "query and key differ in D");
  STD_TORCH_CHECK(query.size(1) == 0 || (key.size(1) > 0 && query.size(1) % key.size(1) == 0),
                  "H must be divisible by H_kv");
  STD_TORCH_CHECK(key.scalar_type() == query.scalar_type() && value.scalar_type() == query.scalar_type(),
                  "query, key and value must have one dtype");
}

std::vector<int64_t> lengths_of(const Tensor& key_lengths, int64_t B) {
  STD_TORCH_CHECK(key_lengths.dim() == 1 && key_lengths.size(0) == B, "key_lengths must be [B]");
  const bool wide = key_lengths.scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK(wide || key_lengths.scalar_type() == ScalarType::Int, "key_lengths must be int32 or int64");
  std::vector<int64_t> lengths(B);
  for (int64_t b = 0; b < B; ++b) {
    const int64_t at = b * key_lengths.stride(0);
    lengths[b] = wide ? key_lengths.const_data_ptr<int64_t>()[at] : key_lengths.const_data_ptr<int32_t>()[at];
  }
  return lengths;
}

// Chunks of at most kChunkFloats outputs, and more of them where the heads are too few for the threads.
void divide_work(AttentionFwd& fwd) {
  const Attention& call = fwd.attention;
  const int64_t most_rows = kChunkFloats / ((call.D_v + 15) / 16 * 16) / kChunkStep * kChunkStep;
  const int64_t heads = call.B * call.H;
  int64_t chunks = ceil_divide(call.M, most_rows);
  const int64_t threads = torch::stable::get_num_threads();
  if (threads > 1 && heads > 0 && heads < 4 * threads) {
    const int64_t wanted = ceil_divide(4 * threads, heads);
    const int64_t possible = ceil_divide(call.M, kLeastChunkRows);
    chunks = std::max(chunks, std::min(wanted, possible));
  }
  fwd.chunk_rows = ceil_divide(ceil_divide(call.M, std::max<int64_t>(chunks, 1)), kChunkStep) * kChunkStep;
  fwd.chunks = ceil_divide(call.M, std::max<int64_t>(fwd.chunk_rows, 1));
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> attention_fwd(
    const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& mask,
    const std::optional<Tensor>& key_padding_mask, const std::optional<Tensor>& key_lengths,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& relative_bias,
    const std::optional<Tensor>& sink, const std::optional<Tensor>& /*seed*/,
    const std::optional<Tensor>& cu_seqlens_q, const std::optional<Tensor>& cu_seqlens_k, double scale,
    std::optional<int64_t> left, std::optional<int64_t> right, bool lower_right,
    std::optional<double> softcap, double dropout_p, std::optional<int64_t> /*max_seqlen_q*/,
    std::optional<int64_t> /*max_seqlen_k*/) {
  STD_TORCH_CHECK(
      !bias && !relative_bias && !sink && !cu_seqlens_q && !cu_seqlens_k && !softcap && dropout_p == 0.0,
      "attention_fwd_cpu serves no bias, relative_bias, sink, softcap, dropout or packed sequences");
  check_shapes(query, key, value);
  const Tensor q = with_contiguous_rows(query), k = with_contiguous_rows(key),
               v = with_contiguous_rows(value);

  AttentionFwd fwd{};
  Attention& call = fwd.attention;
  call.dtype = dtype_of(q);
  call.query = head_rows(q);
  call.key = head_rows(k);
  call.value = head_rows(v);
  call.B = q.size(0);
  call.H = q.size(1);
  call.H_kv = k.size(1);
  call.M = q.size(2);
  call.N = k.size(2);
  call.D = q.size(3);
  call.D_v = v.size(3);
  STD_TORCH_CHECK(call.D >= 1 && call.D <= 256 && call.D_v >= 1 && call.D_v <= 256,
                  "D and D_v must be 1 to 256");
  call.scale = static_cast<float>(scale);

  KeyMasks& masks = call.masks;
  masks.left = std::min(left.value_or(kOpenSide), kOpenSide);
  masks.right = std::min(right.value_or(kOpenSide), kOpenSide);
  masks.lower_right = lower_right;
  if (mask) {
    check_broadcastable(*mask, call);
    masks.mask = static_cast<const uint8_t*>(mask->const_data_ptr());
    masks.mask_stride_n = broadcast_stride(*mask, 1);
    masks.mask_stride_m = broadcast_stride(*mask, 2);
    masks.mask_stride_h = broadcast_stride(*mask, 3);
    masks.mask_stride_b = broadcast_stride(*mask, 4);
  }
  if (key_padding_mask) {
    STD_TORCH_CHECK(key_padding_mask->scalar_type() == ScalarType::Bool && key_padding_mask->dim() == 2 &&
                        key_padding_mask->size(0) == call.B && key_padding_mask->size(1) == call.N,
                    "key_padding_mask must be bool [B, N]");
    masks.key_padding = static_cast<const uint8_t*>(key_padding_mask->const_data_ptr());
    masks.key_padding_stride_b = key_padding_mask->stride(0);
    masks.key_padding_stride_n = key_padding_mask->stride(1);
  }
  std::vector<int64_t> lengths;
  if (key_lengths) {
    lengths = lengths_of(*key_lengths, call.B);
    masks.key_lengths = lengths.data();
  }

  Tensor out = empty({call.B, call.H, call.M, call.D_v}, call.dtype);
  Tensor lse = empty({call.B, call.H, call.M}, DType::kFloat32);
  Tensor lse_rest = empty({call.B, call.H, call.M}, DType::kFloat32);
  fwd.out.data = out.mutable_data_ptr();
  fwd.lse.data = static_cast<float*>(lse.mutable_data_ptr());
  fwd.lse_rest.data = static_cast<float*>(lse_rest.mutable_data_ptr());
  divide_work(fwd);
  run_items(call.B * call.H * fwd.chunks, std::min(fwd.chunk_rows, call.M) * call.N * (call.D + call.D_v),
            [&](WorkQueue& queue) { kernels().attention.fwd(fwd, queue); });
  return {out, lse, lse_rest};
}

}  // namespace fastformer::cpu
