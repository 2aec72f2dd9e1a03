// The attention operators of the CPU, with the meaning that fastformer/ops/attention.py defines.
#pragma once

#include <tuple>

#include "../attention_arguments.h"

namespace fastformer::cpu {

using torch::stable::Tensor;

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
