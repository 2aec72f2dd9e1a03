// The activations of feed_forward, on a lane's elements of float32. NaN and infinities come out as torch
// gives them.
#pragma once

#include "../shapes.h"
#include "ptx.cuh"

namespace fastformer::cuda {

struct Logistic {
  float value;       // 1 / (1 + e^-x)
  float complement;  // 1 - value, without its cancellation
};

__device__ __forceinline__ Logistic logistic(float x) {
  const float e = exp2_approximate(x * -1.44269504f);
  const float value = reciprocal_approximate(1.0f + e);
  return {value, e < 1e30f ? e * value : 1.0f};
}

struct Normal {
  float distribution, density;
};

// The standard normal distribution. erfc(z) e^(z^2) = t P(t), t = 1 / (1 + 0.375 z): the form of Abramowitz
// and Stegun 7.1.26 with P fitted anew, degree 8, relative error 1.2e-8 before rounding. The tail keeps its
// relative accuracy, which 1 + erf would cancel away, and backward's density costs one product.
__device__ __forceinline__ Normal normal(float x) {
  const float magnitude = fabsf(x);
  const float t = reciprocal_approximate(fmaf(magnitude, 0.265165043f, 1.0f));  // 0.375 / sqrt(2)
  float p = fmaf(0.0307694413f, t, -0.143665731f);
  p = fmaf(p, t, 0.21620059f);
  p = fmaf(p, t, -0.114708006f);
  p = fmaf(p, t, 0.136863172f);
  p = fmaf(p, t, 0.060752161f);
  p = fmaf(p, t, 0.102656819f);
  p = fmaf(p, t, 0.105324812f);
  p = fmaf(p, t, 0.105806738f);
  const float gaussian = exp2_approximate(magnitude * magnitude * -0.72134752f);  // log2(e) / 2
  const float tail = p * t * gaussian;
  return {x < 0.0f ? tail : 1.0f - tail, gaussian * 0.398942280f};
}

// x/2 (1 + tanh u) = x logistic(2 u), u = sqrt(2/pi) (x + 0.044715 x^3)
__device__ __forceinline__ float twice_gelu_tanh_argument(float x) {
  return x * fmaf(x * x, 0.0713548163f, 1.59576912f);
}

template <Activation kActivation>
__device__ __forceinline__ float activated(float x) {
  if constexpr (kActivation == Activation::kGelu) {
    return x * normal(x).distribution;
  } else if constexpr (kActivation == Activation::kGeluTanh) {
    return x * logistic(twice_gelu_tanh_argument(x)).value;
  } else if constexpr (kActivation == Activation::kSilu) {
    return x * logistic(x).value;
  } else {
    const float positive = x < 0.0f ? 0.0f : x;  // keeps NaN, which a maximum would not
    return kActivation == Activation::kRelu ? positive : positive * positive;
  }
}

// The activation of x; `slope` becomes itself times the slope at x. Where relu's slope is 0 that is 0
// whatever it was, and the slope at NaN is relu's 1: torch's rules.
template <Activation kActivation>
__device__ __forceinline__ float activated(float x, float& slope) {
  if constexpr (kActivation == Activation::kGelu) {
    const Normal n = normal(x);
    slope *= fmaf(x, n.density, n.distribution);
    return x * n.distribution;
  } else if constexpr (kActivation == Activation::kGeluTanh) {
    const Logistic s = logistic(twice_gelu_tanh_argument(x));
    // 2 u'; its factor is 0 long before the bound, beyond which it would be infinite.
    const float twice = fmaf(fminf(x * x, 1e6f), 0.214064449f, 1.59576912f);
    slope *= fmaf(x * s.value * s.complement, twice, s.value);
    return x * s.value;
  } else if constexpr (kActivation == Activation::kSilu) {
    const Logistic s = logistic(x);
    slope *= s.value * fmaf(x, s.complement, 1.0f);
    return x * s.value;
  } else {
    slope = x <= 0.0f ? 0.0f : kActivation == Activation::kRelu ? slope : slope * (x + x);
    return activated<kActivation>(x);
  }
}

template <Activation kActivation, int kCount>
__device__ __forceinline__ void activate_all(float (&x)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) x[i] = activated<kActivation>(x[i]);
}

template <Activation kActivation, int kCount>
__device__ __forceinline__ void activate_all(float (&x)[kCount], float (&slopes)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) x[i] = activated<kActivation>(x[i], slopes[i]);
}

// x = activation(x), and slopes *= its slopes where there are any. The choice is made once for all elements.
template <int kCount, typename... Slopes>
__device__ __forceinline__ void activate(Activation activation, float (&x)[kCount], Slopes&... slopes) {
  switch (activation) {
    case Activation::kRelu:
      return activate_all<Activation::kRelu>(x, slopes...);
    case Activation::kGelu:
      return activate_all<Activation::kGelu>(x, slopes...);
    case Activation::kGeluTanh:
      return activate_all<Activation::kGeluTanh>(x, slopes...);
    case Activation::kSilu:
      return activate_all<Activation::kSilu>(x, slopes...);
    case Activation::kRelu2:
      return activate_all<Activation::kRelu2>(x, slopes...);
  }
}

}  // namespace fastformer::cuda
