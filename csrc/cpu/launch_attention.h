// The attention operators of the CPU, with the meaning that fastformer/ops/attention.py defines.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace fastformer::cpu {

using torch::stable::Tensor;

// What the three schemas have in common, which must be spelled out in each function that implements one: the
// call's tensors and its spec, and the same as AttentionArguments.
#define FASTFORMER_ATTENTION_PARAMETERS                                                                 \
  const Tensor &query, const Tensor &key, const Tensor &value, const std::optional<Tensor>&mask,        \
      const std::optional<Tensor>&key_padding_mask, const std::optional<Tensor>&key_lengths,            \
      const std::optional<Tensor>&bias, const std::optional<Tensor>&relative_bias,                      \
      const std::optional<Tensor>&sink, const std::optional<Tensor>&seed,                               \
      const std::optional<Tensor>&cu_seqlens_q, const std::optional<Tensor>&cu_seqlens_k, double scale, \
      std::optional<int64_t> left, std::optional<int64_t> right, bool lower_right,                      \
      std::optional<double> softcap, double dropout_p, std::optional<int64_t> max_seqlen_q,             \
      std::optional<int64_t> max_seqlen_k
#define FASTFORMER_ATTENTION_ARGUMENTS                                                     \
  {query,         key,         value,   mask,         key_padding_mask, key_lengths, bias, \
   relative_bias, sink,        seed,    cu_seqlens_q, cu_seqlens_k,     scale,       left, \
   right,         lower_right, softcap, dropout_p,    max_seqlen_q,     max_seqlen_k}

// out, lse, row_max, row_sum
std::tuple<Tensor, Tensor, Tensor, Tensor> attention_fwd(FASTFORMER_ATTENTION_PARAMETERS);

Tensor attention_weights(const Tensor& row_max, const Tensor& row_sum, FASTFORMER_ATTENTION_PARAMETERS,
                         bool mean);

// Gradients of query, key, value, bias, relative_bias and sink.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> attention_bwd(
    const std::optional<Tensor>& grad_out, const std::optional<Tensor>& grad_lse,
    const std::optional<Tensor>& grad_weights, const Tensor& out, const Tensor& row_max,
    const Tensor& row_sum, FASTFORMER_ATTENTION_PARAMETERS, bool need_bias, bool need_relative_bias,
    bool need_sink);

}  // namespace fastformer::cpu
