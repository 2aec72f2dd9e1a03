// The norm operators of the CPU, with the meaning that fastformer/ops/norm.py defines.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace fastformer::cpu {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor, Tensor, Tensor> norm_fwd(const Tensor& x, const std::optional<Tensor>& residual,
                                                    const std::optional<Tensor>& weight,
                                                    const std::optional<Tensor>& bias,
                                                    const std::optional<Tensor>& seed, bool rms, double eps,
                                                    double dropout_p);

std::tuple<Tensor, Tensor, Tensor, Tensor> norm_bwd(const Tensor& grad_out,
                                                    const std::optional<Tensor>& grad_sum, const Tensor& s,
                                                    const std::optional<Tensor>& weight, const Tensor& mean,
                                                    const Tensor& rstd, const std::optional<Tensor>& seed,
                                                    bool rms, double dropout_p, bool need_dweight,
                                                    bool need_dbias);

}  // namespace fastformer::cpu
