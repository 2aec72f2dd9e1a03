// What the schemas of attention (fastformer/ops/attention.py) have in common, on every device.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

namespace fastformer {

using torch::stable::Tensor;

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

// The same, spelled out as each function that implements a schema must: its parameters, and what makes
// AttentionArguments of them.
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

}  // namespace fastformer
