// attention_bwd_cpu and attention_weights_cpu, the passes after forward: what they allocate, and the division
// of work over threads.
#include <algorithm>
#include <cstring>

#include "attention_call.h"
#include "launch.h"
#include "launch_attention.h"
#include "parallel.h"

namespace fastformer::cpu {
namespace {

// Backward cuts keys where there are fewer key heads than this, but not below so many keys. By shapes alone:
// what is cut is added up in another order.
constexpr int64_t kWantedItems = 16;
constexpr int64_t kLeastChunkKeys = 512;

void divide_work(AttentionBwd& bwd) {
  const Attention& call = bwd.scores.attention;
  const int64_t block = kernels().attention.block_keys;
  const int64_t heads = std::max<int64_t>(call.B * call.H_kv, 1);
  const int64_t possible = std::max<int64_t>(call.N / kLeastChunkKeys, 1);
  const int64_t chunks = std::min(ceil_divide(kWantedItems, heads), possible);
  bwd.chunk_keys = std::max<int64_t>(ceil_divide(ceil_divide(call.N, chunks), block), 1) * block;
  bwd.chunks = std::max<int64_t>(ceil_divide(call.N, bwd.chunk_keys), 1);
  bwd.group_B = bwd.group_H = 1;
}

Tensor empty_as(const Tensor& tensor) { return empty(sizes_of(tensor), dtype_of(tensor)); }

Tensor nothing(DType dtype) { return empty({0}, dtype); }

float* floats(Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

ScorePass score_pass(const AttentionCall& call, const Tensor& row_max, const Tensor& row_sum) {
  const int64_t rows = call.total_rows() * call.attention.H;
  STD_TORCH_CHECK(row_max.is_contiguous() && row_sum.is_contiguous() && row_max.numel() == rows &&
                      row_sum.numel() == rows,
                  "row_max and row_sum must be as attention_fwd gave them");
  ScorePass pass{};
  pass.attention = call.attention;
  pass.row_max = row_stats(row_max);
  pass.row_sum = row_stats(row_sum);
  pass.grad_weights_scale = 1.0f;
  return pass;
}

void run_score_sum(const ScoreSum& sum) {
  const Attention& call = sum.scores.attention;
  const int64_t blocks = ceil_divide(call.N, kernels().attention.block_keys);
  const int64_t items = sum.target_B * sum.target_H * blocks;
  run_items(items, products_of_head(call) * call.B * call.H / std::max<int64_t>(items, 1),
            [&](WorkQueue& queue) { kernels().attention.score_sum(sum, queue); });
}

// The size of dimension `from_end` (1 = last), 1 where it is missing.
int64_t size_from_end(const Tensor& tensor, int64_t from_end) {
  return tensor.dim() < from_end ? 1 : tensor.size(tensor.dim() - from_end);
}

// Float32 `wide`, in the shape and dtype of the bias.
Tensor as_bias(const Tensor& wide, const Tensor& bias) {
  Tensor grad = empty_as(bias);
  kernels().attention.sum_shares(static_cast<const float*>(wide.const_data_ptr()), 1, 0, 1.0f, dtype_of(bias),
                                 grad.mutable_data_ptr(), 0, bias.numel());
  return grad;
}

// grad[b, h, m, 0] = rows[b, h, m], summed over the dimensions in which the bias has size 1.
Tensor reduce_rows(const AttentionCall& call, const RowStats& rows, const Tensor& bias) {
  const Attention& attention = call.attention;
  const int64_t B = size_from_end(bias, 4), H = size_from_end(bias, 3), M = size_from_end(bias, 2);
  std::vector<double> totals(static_cast<size_t>(B * H * M), 0.0);
  for (int64_t b = 0; b < attention.B; ++b) {
    const int32_t* const cu = attention.cu_seqlens_q;
    const int64_t length = cu != nullptr ? cu[b + 1] - cu[b] : attention.M;
    for (int64_t h = 0; h < attention.H; ++h) {
      const float* const row = rows.data + b * rows.stride_b + h * rows.stride_h + (cu ? cu[b] : 0);
      double* const total = totals.data() + ((B == 1 ? 0 : b) * H + (H == 1 ? 0 : h)) * M;
      for (int64_t i = 0; i < length; ++i) total[M == 1 ? 0 : i] += row[i];
    }
  }
  Tensor wide = empty({B * H * M}, DType::kFloat32);
  for (size_t e = 0; e < totals.size(); ++e) floats(wide)[e] = static_cast<float>(totals[e]);
  return as_bias(wide, bias);
}

// The bias's gradient where it is broadcast over nothing but queries, heads or batch elements.
Tensor sum_bias(const ScorePass& pass, const Tensor& bias) {
  Tensor grad = empty_as(bias);
  ScoreSum sum{};
  sum.scores = pass;
  sum.of_gradient = true;
  sum.factor = 1.0f;
  sum.target = score_matrix(grad, pass.attention, "bias");
  sum.target_B = size_from_end(bias, 4);
  sum.target_H = size_from_end(bias, 3);
  sum.target_M = size_from_end(bias, 2);
  run_score_sum(sum);
  return grad;
}

// Where the gradient of a 16-bit bias is added up in float32, that takes at most so many elements.
constexpr int64_t kMostWideBias = int64_t{1} << 20;
// Products that backward forms of a query and a key, and those that a pass for the bias forms anew.
constexpr int64_t kBackwardProducts = 5, kBiasProducts = 2;

// Has the heads that share a slice of the bias share a work item, which adds them up as they come, where that
// takes less time on these threads than to compute their scores anew in sum_bias. Both add in one order.
void group_heads(AttentionBwd& bwd, const Tensor& bias) {
  const Attention& call = bwd.scores.attention;
  if (call.B * call.H_kv == 0 || size_from_end(bias, 2) != call.M) return;
  if (dtype_of(bias) != DType::kFloat32 && bias.numel() > kMostWideBias) return;
  const int64_t group_B = size_from_end(bias, 4) == 1 ? call.B : 1;
  const int64_t group_H = size_from_end(bias, 3) == 1 ? call.H_kv : 1;
  const int64_t items = call.B * call.H_kv * bwd.chunks, members = group_B * group_H;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t together = ceil_divide(items / members, threads) * members * kBackwardProducts;
  if (together > ceil_divide(items, threads) * (kBackwardProducts + kBiasProducts)) return;
  bwd.group_B = group_B;
  bwd.group_H = group_H;
}

// [rows of relative_bias, M + N - 1] from the shares of batch elements, heads and chunks.
Tensor sum_relative_bias(const AttentionBwd& bwd, int64_t rows) {
  const Attention& call = bwd.scores.attention;
  const int64_t entries = std::max<int64_t>(call.M + call.N - 1, 0), chunks = bwd.chunks;
  Tensor grad = empty({rows, entries}, DType::kFloat32);
  for (int64_t row = 0; row < rows; ++row) {
    std::vector<double> totals(static_cast<size_t>(entries), 0.0);
    for (int64_t share = 0; share < call.B * call.H * chunks; ++share) {
      if (rows > 1 && share / chunks % call.H != row) continue;
      const float* const from = bwd.relative_bias_shares + share * entries;
      for (int64_t e = 0; e < entries; ++e) totals[e] += from[e];
    }
    std::copy(totals.begin(), totals.end(), floats(grad) + row * entries);
  }
  return grad;
}

Tensor sum_sink(const AttentionBwd& bwd) {
  const Attention& call = bwd.scores.attention;
  Tensor grad = empty({call.H}, DType::kFloat32);
  for (int64_t h = 0; h < call.H; ++h) {
    double total = 0.0;
    for (int64_t b = 0; b < call.B; ++b) total += bwd.sink_shares[b * call.H + h];
    floats(grad)[h] = static_cast<float>(total);
  }
  return grad;
}

// Gradients that come in, with what they refer to.
struct Incoming {
  Incoming(const std::optional<Tensor>& grad_out, const std::optional<Tensor>& grad_lse,
           const std::optional<Tensor>& grad_weights, const Tensor& out, const Tensor& lse, ScorePass& pass) {
    const Attention& call = pass.attention;
    if (grad_out) {
      check_like(*grad_out, out, "grad_out");
      rows = with_contiguous_rows(*grad_out);
      pass.grad_out = head_rows(*rows);
    }
    if (grad_lse) {
      check_like(*grad_lse, lse, "grad_lse");
      stats = grad_lse->is_contiguous() ? *grad_lse : torch::stable::contiguous(*grad_lse);
      pass.grad_lse = row_stats(*stats);
    }
    if (!grad_weights) return;
    const Tensor& weights = *grad_weights;
    const bool mean = weights.dim() == 3;
    STD_TORCH_CHECK(weights.dim() == (mean ? 3 : 4) && weights.size(0) == call.B &&
                        (mean || weights.size(1) == call.H) && weights.size(weights.dim() - 2) == call.M &&
                        weights.size(weights.dim() - 1) == call.N,
                    "grad_weights must be [B, H, M, N] or [B, M, N]");
    const int64_t last = weights.dim() - 1;
    pass.grad_weights = {const_cast<void*>(weights.const_data_ptr()),
                         dtype_of(weights),
                         weights.stride(0),
                         mean ? 0 : weights.stride(1),
                         weights.stride(last - 1),
                         weights.stride(last)};
    if (mean) pass.grad_weights_scale = 1.0f / static_cast<float>(std::max<int64_t>(call.H, 1));
  }

  static void check_like(const Tensor& grad, const Tensor& like, const char* name) {
    STD_TORCH_CHECK(sizes_of(grad) == sizes_of(like) && grad.scalar_type() == like.scalar_type(), name,
                    " must have the shape and dtype of what it is the gradient of");
  }

  std::optional<Tensor> rows, stats;
};

bool is_whole(const Tensor& bias, const Attention& call) {
  return bias.dim() == 4 && bias.size(0) == call.B && bias.size(1) == call.H && bias.size(2) == call.M &&
         bias.size(3) == call.N;
}

}  // namespace

Tensor attention_weights(const Tensor& row_max, const Tensor& row_sum, FASTFORMER_ATTENTION_PARAMETERS,
                         bool mean) {
  const AttentionCall call(FASTFORMER_ATTENTION_ARGUMENTS);
  const Attention& attention = call.attention;
  const int64_t B = attention.B, H = attention.H, M = attention.M, N = attention.N;
  ScoreSum sum{};
  sum.scores = score_pass(call, row_max, row_sum);
  sum.factor = mean ? 1.0f / static_cast<float>(std::max<int64_t>(H, 1)) : 1.0f;
  sum.target_B = B;
  sum.target_H = mean ? 1 : H;
  sum.target_M = M;
  Tensor weights = mean ? empty({B, M, N}, attention.dtype) : empty({B, H, M, N}, attention.dtype);
  sum.target = {weights.mutable_data_ptr(), attention.dtype, sum.target_H * M * N, M * N, N, 1};
  run_score_sum(sum);
  return weights;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> attention_bwd(
    const std::optional<Tensor>& grad_out, const std::optional<Tensor>& grad_lse,
    const std::optional<Tensor>& grad_weights, const Tensor& out, const Tensor& row_max,
    const Tensor& row_sum, FASTFORMER_ATTENTION_PARAMETERS, bool need_bias, bool need_relative_bias,
    bool need_sink) {
  const AttentionCall call(FASTFORMER_ATTENTION_ARGUMENTS);
  AttentionBwd bwd{};
  bwd.scores = score_pass(call, row_max, row_sum);
  ScorePass& pass = bwd.scores;
  const Attention& attention = pass.attention;
  const Incoming incoming(grad_out, grad_lse, grad_weights, out, row_max, pass);
  const Tensor out_rows = with_contiguous_rows(out);
  bwd.out = head_rows(out_rows);
  divide_work(bwd);

  Tensor grad_query = empty_as(query), grad_key = empty_as(key), grad_value = empty_as(value);
  bwd.grad_query = head_rows(grad_query);
  bwd.grad_key = head_rows(grad_key);
  bwd.grad_value = head_rows(grad_value);
  bwd.query_elements = query.numel();
  Tensor delta = empty(sizes_of(row_max), DType::kFloat32);
  pass.delta = row_stats(delta);
  Tensor grad_bias = nothing(bias ? dtype_of(*bias) : attention.dtype);
  const bool wants_bias = bias.has_value() && need_bias;
  const bool by_row = wants_bias && size_from_end(*bias, 1) == 1;
  if (wants_bias && !by_row) group_heads(bwd, *bias);
  const int64_t group = bwd.group_B * bwd.group_H;
  const bool bias_from_items = wants_bias && !by_row && (group > 1 || is_whole(*bias, attention));
  Tensor row_gradients = by_row ? empty(sizes_of(row_max), DType::kFloat32) : nothing(DType::kFloat32);
  if (by_row) bwd.grad_rows = row_stats(row_gradients);
  if (bias_from_items) {
    grad_bias = group > 1 ? empty(sizes_of(*bias), DType::kFloat32) : empty_as(*bias);
    // An empty tensor's pointer is null, which memset must not get.
    const int64_t bytes = grad_bias.numel() * size_of(dtype_of(grad_bias));
    if (bytes > 0) std::memset(grad_bias.mutable_data_ptr(), 0, bytes);
    bwd.grad_bias = score_matrix(grad_bias, attention, "bias");
  }
  const int64_t heads = attention.B * attention.H;
  const bool wants_relative = relative_bias.has_value() && need_relative_bias;
  const bool wants_sink = sink.has_value() && need_sink;
  const int64_t entries = std::max<int64_t>(attention.M + attention.N - 1, 0);
  Tensor relative_shares = empty({wants_relative ? heads * bwd.chunks * entries : 0}, DType::kFloat32);
  Tensor sink_shares = empty({wants_sink ? heads : 0}, DType::kFloat32);
  Tensor query_shares = empty({bwd.chunks > 1 ? bwd.chunks * bwd.query_elements : 0}, DType::kFloat32);
  if (wants_relative) bwd.relative_bias_shares = floats(relative_shares);
  if (wants_sink) bwd.sink_shares = floats(sink_shares);
  if (bwd.chunks > 1) bwd.query_shares = floats(query_shares);

  const AttentionKernels& kernel = kernels().attention;
  const int64_t row_products = grad_weights ? products_of_head(attention) : attention.M * attention.D_v;
  run_items(heads, row_products, [&](WorkQueue& queue) { kernel.bwd_rows(bwd, queue); });
  const int64_t items = attention.B * attention.H_kv * bwd.chunks / group;
  run_items(items, 2 * products_of_head(attention) * group / bwd.chunks,
            [&](WorkQueue& queue) { kernel.bwd(bwd, queue); });
  if (bwd.chunks > 1) {
    parallel_for(bwd.query_elements, kElementsPerThread, [&](int64_t begin, int64_t end) {
      kernel.sum_shares(bwd.query_shares, bwd.chunks, bwd.query_elements, attention.scale, attention.dtype,
                        grad_query.mutable_data_ptr(), begin, end);
    });
  }
  if (by_row) {
    grad_bias = reduce_rows(call, bwd.grad_rows, *bias);
  } else if (wants_bias && !bias_from_items) {
    grad_bias = sum_bias(pass, *bias);
  } else if (wants_bias && dtype_of(grad_bias) != dtype_of(*bias)) {
    grad_bias = as_bias(grad_bias, *bias);
  }
  return {grad_query,
          grad_key,
          grad_value,
          grad_bias,
          wants_relative ? sum_relative_bias(bwd, relative_bias->size(0)) : nothing(DType::kFloat32),
          wants_sink ? sum_sink(bwd) : nothing(DType::kFloat32)};
}

}  // namespace fastformer::cpu
