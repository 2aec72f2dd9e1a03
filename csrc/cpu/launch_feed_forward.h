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

}  // namespace fastformer::cpu
