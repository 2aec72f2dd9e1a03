// The feed-forward operators of the CPU, with the meaning that fastformer/ops/feed_forward.py defines.
#pragma once

#include "../feed_forward_arguments.h"

namespace fastformer::cpu {

using torch::stable::Tensor;

// out, pre, pre_gate
std::tuple<Tensor, Tensor, Tensor> feed_forward_fwd(FASTFORMER_FEED_FORWARD_PARAMETERS, bool save_pre);

FeedForwardGradients feed_forward_bwd(const Tensor& grad_out, const Tensor& pre, const Tensor& pre_gate,
                                      FASTFORMER_FEED_FORWARD_PARAMETERS, bool need_x, bool need_w1,
                                      bool need_b1, bool need_w_gate, bool need_b_gate, bool need_w2,
                                      bool need_b2);

}  // namespace fastformer::cpu
