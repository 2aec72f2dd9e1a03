// The attention operators of the CPU, with the meaning that fastformer/ops/attention.py defines.
#pragma once

#include <tuple>

#include "../attention_arguments.h"

namespace fastformer::cpu {

using torch::stable::Tensor;

// out, lse, row_max, row_sum
std::tuple<Tensor, Tensor, Tensor, Tensor> attention_fwd(FASTFORMER_ATTENTION_PARAMETERS);

// out, lse; with the meaning of fastformer/ops/paged_attention.py.
std::tuple<Tensor, Tensor> paged_attention_fwd(const Tensor& query, const Tensor& key_pages,
                                               const Tensor& value_pages, const Tensor& page_table,
                                               const Tensor& lengths, const std::optional<Tensor>& sink,
                                               double scale, std::optional<int64_t> left,
                                               std::optional<int64_t> right, std::optional<double> softcap);

Tensor attention_weights(const Tensor& row_max, const Tensor& row_sum, FASTFORMER_ATTENTION_PARAMETERS,
                         bool mean);

// Gradients of query, key, value, bias, relative_bias and sink.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> attention_bwd(
    const std::optional<Tensor>& grad_out, const std::optional<Tensor>& grad_lse,
    const std::optional<Tensor>& grad_weights, const Tensor& out, const Tensor& row_max,
    const Tensor& row_sum, FASTFORMER_ATTENTION_PARAMETERS, bool need_bias, bool need_relative_bias,
    bool need_sink);

}  // namespace fastformer::cpu
