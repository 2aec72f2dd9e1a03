// The feed-forward operators of the CPU, with the meaning that fastformer/ops/feed_forward.py defines.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>

namespace fastformer::cpu {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor, Tensor> feed_forward_fwd(
    const Tensor& x, const Tensor& w1, const std::optional<Tensor>& b1, const std::optional<Tensor>& w_gate,
    const std::optional<Tensor>& b_gate, const Tensor& w2, const std::optional<Tensor>& b2,
    const std::optional<Tensor>& seed, const std::string& activation, double dropout_p, bool save_pre);

using FeedForwardGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

FeedForwardGradients feed_forward_bwd(const Tensor& grad_out, const Tensor& pre, const Tensor& pre_gate,
                                      const Tensor& x, const Tensor& w1, const std::optional<Tensor>& b1,
                                      const std::optional<Tensor>& w_gate,
                                      const std::optional<Tensor>& b_gate, const Tensor& w2,
                                      const std::optional<Tensor>& b2, const std::optional<Tensor>& seed,
                                      const std::string& activation, double dropout_p, bool need_x,
                                      bool need_w1, bool need_b1, bool need_w_gate, bool need_b_gate,
                                      bool need_w2, bool need_b2);

}  // namespace fastformer::cpu
