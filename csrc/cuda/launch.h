// The CUDA operators' entry points, as their schemas in fastformer/ops name them.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "../attention_arguments.h"

namespace fastformer::cuda {

using torch::stable::Tensor;
using FourTensors = std::tuple<Tensor, Tensor, Tensor, Tensor>;

FourTensors norm_fwd(const Tensor& x, const std::optional<Tensor>& residual,
                     const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                     const std::optional<Tensor>& seed, bool rms, double eps, double dropout_p);

FourTensors norm_bwd(const Tensor& grad_out, const std::optional<Tensor>& grad_sum, const Tensor& s,
                     const std::optional<Tensor>& weight, const Tensor& mean, const Tensor& rstd,
                     const std::optional<Tensor>& seed, bool rms, double dropout_p, bool need_dweight,
                     bool need_dbias);

// out, lse, row_max, row_sum
FourTensors attention_fwd(FASTFORMER_ATTENTION_PARAMETERS);

}  // namespace fastformer::cuda
