// The CUDA operators' entry points, as their schemas in fastformer/ops name them.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "../attention_arguments.h"
#include "../feed_forward_arguments.h"

namespace fastformer::cuda {

using torch::stable::Tensor;
using TwoTensors = std::tuple<Tensor, Tensor>;
using ThreeTensors = std::tuple<Tensor, Tensor, Tensor>;
using FourTensors = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using SixTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

FourTensors norm_fwd(const Tensor& x, const std::optional<Tensor>& residual,
                     const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                     const std::optional<Tensor>& seed, bool rms, double eps, double dropout_p);

FourTensors norm_bwd(const Tensor& grad_out, const std::optional<Tensor>& grad_sum, const Tensor& s,
                     const std::optional<Tensor>& weight, const Tensor& mean, const Tensor& rstd,
                     const std::optional<Tensor>& seed, bool rms, double dropout_p, bool need_dweight,
                     bool need_dbias);

// out, lse, row_max, row_sum
FourTensors attention_fwd(FASTFORMER_ATTENTION_PARAMETERS);

// out, lse
TwoTensors paged_attention_fwd(const Tensor& query, const Tensor& key_pages, const Tensor& value_pages,
                               const Tensor& page_table, const Tensor& lengths,
                               const std::optional<Tensor>& sink, double scale, std::optional<int64_t> left,
                               std::optional<int64_t> right, std::optional<double> softcap);

// [B, H, M, N] after dropout, or their mean over heads, [B, M, N].
Tensor attention_weights(const Tensor& row_max, const Tensor& row_sum, FASTFORMER_ATTENTION_PARAMETERS,
                         bool mean);

// Gradients of query, key, value, bias, relative_bias and sink; empty where they are not needed.
SixTensors attention_bwd(const std::optional<Tensor>& grad_out, const std::optional<Tensor>& grad_lse,
                         const std::optional<Tensor>& grad_weights, const Tensor& out, const Tensor& row_max,
                         const Tensor& row_sum, FASTFORMER_ATTENTION_PARAMETERS, bool need_bias,
                         bool need_relative_bias, bool need_sink);

// out, pre, pre_gate
ThreeTensors feed_forward_fwd(FASTFORMER_FEED_FORWARD_PARAMETERS, bool save_pre);

FeedForwardGradients feed_forward_bwd(const Tensor& grad_out, const Tensor& pre, const Tensor& pre_gate,
                                      FASTFORMER_FEED_FORWARD_PARAMETERS, bool need_x, bool need_w1,
                                      bool need_b1, bool need_w_gate, bool need_b_gate, bool need_w2,
                                      bool need_b2);

}  // namespace fastformer::cuda
