// The activations of feed_forward, on vectors of float32. NaN and infinities come out as torch gives them.
#pragma once

#include "vec.h"

namespace fastformer::cpu::FASTFORMER_ISA {

// 1 / (1 + e^-x)
FASTFORMER_INLINE F32 sigmoid(F32 x) {
  constexpr float kLog2E = 1.44269504f;
  return 1.0f / (exp2(x * -kLog2E) + 1.0f);
}

// The standard normal distribution function. erfc(z) e^(z^2) = t P(t), t = 1 / (1 + 0.375 z): the form of
// Abramowitz and Stegun 7.1.26 with P fitted anew, degree 8, relative error 1.2e-8 before rounding. The tail
// keeps its relative accuracy, which 1 + erf would cancel away.
FASTFORMER_INLINE F32 normal_cdf(F32 x) {
  const F32 magnitude = select(x < 0.0f, -x, x);
  const F32 t = 1.0f / fma(magnitude, splat(0.265165043f), splat(1.0f));  // 0.375 / sqrt(2)
  F32 p = splat(0.0307694413f);
  p = fma(p, t, splat(-0.143665731f));
  p = fma(p, t, splat(0.21620059f));
  p = fma(p, t, splat(-0.114708006f));
  p = fma(p, t, splat(0.136863172f));
  p = fma(p, t, splat(0.060752161f));
  p = fma(p, t, splat(0.102656819f));
  p = fma(p, t, splat(0.105324812f));
  p = fma(p, t, splat(0.105806738f));
  const F32 tail = p * t * exp2(magnitude * magnitude * -0.72134752f);  // log2(e) / 2
  return select(x < 0.0f, tail, 1.0f - tail);
}

struct Relu {
  FASTFORMER_INLINE F32 of(F32 x) { return select(x < 0.0f, F32{}, x); }  // keeps NaN
};

struct Relu2 {
  FASTFORMER_INLINE F32 of(F32 x) {
    const F32 positive = Relu::of(x);
    return positive * positive;
  }
};

struct Gelu {
  FASTFORMER_INLINE F32 of(F32 x) { return x * normal_cdf(x); }
};

// x/2 (1 + tanh u) = x sigmoid(2 u), u = sqrt(2/pi) (x + 0.044715 x^3)
struct GeluTanh {
  FASTFORMER_INLINE F32 of(F32 x) {
    const F32 cubic = fma(x * x, splat(0.0713548163f), splat(1.59576912f));
    return x * sigmoid(x * cubic);
  }
};

struct Silu {
  FASTFORMER_INLINE F32 of(F32 x) { return x * sigmoid(x); }
};

}  // namespace fastformer::cpu::FASTFORMER_ISA
