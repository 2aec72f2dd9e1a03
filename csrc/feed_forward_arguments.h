// What the schemas of feed_forward (fastformer/ops/feed_forward.py) have in common, on every device.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>

#include "shapes.h"

namespace fastformer {

using torch::stable::Tensor;

// Arguments in the order of the operators' schemas.
struct FeedForwardArguments {
  const Tensor &x, &w1;
  const std::optional<Tensor>&b1, &w_gate, &b_gate;
  const Tensor& w2;
  const std::optional<Tensor>&b2, &seed;
  const std::string& activation;
  double dropout_p;
};

// The same, spelled out as each function that implements a schema must: its parameters, and what makes
// FeedForwardArguments of them.
#define FASTFORMER_FEED_FORWARD_PARAMETERS                                                               \
  const Tensor &x, const Tensor &w1, const std::optional<Tensor>&b1, const std::optional<Tensor>&w_gate, \
      const std::optional<Tensor>&b_gate, const Tensor &w2, const std::optional<Tensor>&b2,              \
      const std::optional<Tensor>&seed, const std::string &activation, double dropout_p
#define FASTFORMER_FEED_FORWARD_ARGUMENTS {x, w1, b1, w_gate, b_gate, w2, b2, seed, activation, dropout_p}

// Of x, w1, b1, w_gate, b_gate, w2 and b2; empty where they are not needed.
using FeedForwardGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

inline Activation activation_named(const std::string& name) {
  if (name == "relu") return Activation::kRelu;
  if (name == "gelu") return Activation::kGelu;
  if (name == "gelu_tanh") return Activation::kGeluTanh;
  if (name == "silu") return Activation::kSilu;
  STD_TORCH_CHECK(name == "relu2", "unknown activation ", name);
  return Activation::kRelu2;
}

}  // namespace fastformer
