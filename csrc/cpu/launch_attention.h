// The attention operators of the CPU, with the meaning that fastformer/ops/attention.py defines.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace fastformer::cpu {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor, Tensor> attention_fwd(
    const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& mask,
    const std::optional<Tensor>& key_padding_mask, const std::optional<Tensor>& key_lengths,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& relative_bias,
    const std::optional<Tensor>& sink, const std::optional<Tensor>& seed,
    const std::optional<Tensor>& cu_seqlens_q, const std::optional<Tensor>& cu_seqlens_k, double scale,
    std::optional<int64_t> left, std::optional<int64_t> right, bool lower_right,
    std::optional<double> softcap, double dropout_p, std::optional<int64_t> max_seqlen_q,
    std::optional<int64_t> max_seqlen_k);

}  // namespace fastformer::cpu
