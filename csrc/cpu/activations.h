// The activations of feed_forward, on vectors of float32. NaN and infinities come out as torch gives them.
#pragma once

#include "vec.h"

namespace fastformer::cpu::FASTFORMER_ISA {

struct Logistic {
  F32 value;       // 1 / (1 + e^-x)
  F32 complement;  // 1 - value, without its cancellation
};

FASTFORMER_INLINE Logistic logistic(F32 x) {
  constexpr float kLog2E = 1.44269504f;
  const F32 e = exp2(x * -kLog2E);
  const F32 value = 1.0f / (e + 1.0f);
  return {value, select(e < 1e30f, e * value, splat(1.0f))};
}

struct Normal {
  F32 distribution, density;
};

// The standard normal distribution. erfc(z) e^(z^2) = t P(t), t = 1 / (1 + 0.375 z): the form of Abramowitz
// and Stegun 7.1.26 with P fitted anew, degree 8, relative error 1.2e-8 before rounding. The tail keeps its
// relative accuracy, which 1 + erf would cancel away.
FASTFORMER_INLINE Normal normal(F32 x) {
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
  const F32 gaussian = exp2(magnitude * magnitude * -0.72134752f);  // log2(e) / 2
  const F32 tail = p * t * gaussian;
  return {select(x < 0.0f, tail, 1.0f - tail), gaussian * 0.398942280f};
}

// Each has of(x), and of(x, dy, dx), which also gives dx = dy times the slope at x. Where relu's slope is 0
// dx is 0 whatever dy is, and the slope at NaN is relu's 1: torch's rules.

struct Relu {
  FASTFORMER_INLINE F32 of(F32 x) { return select(x < 0.0f, F32{}, x); }  // keeps NaN
  FASTFORMER_INLINE F32 of(F32 x, F32 dy, F32& dx) {
    dx = select(x <= 0.0f, F32{}, dy);
    return of(x);
  }
};

struct Relu2 {
  FASTFORMER_INLINE F32 of(F32 x) {
    const F32 positive = Relu::of(x);
    return positive * positive;
  }
  FASTFORMER_INLINE F32 of(F32 x, F32 dy, F32& dx) {
    dx = select(x <= 0.0f, F32{}, dy * (x + x));
    return of(x);
  }
};

struct Gelu {
  FASTFORMER_INLINE F32 of(F32 x) { return x * normal(x).distribution; }
  FASTFORMER_INLINE F32 of(F32 x, F32 dy, F32& dx) {
    const Normal n = normal(x);
    dx = dy * fma(x, n.density, n.distribution);
    return x * n.distribution;
  }
};

// x/2 (1 + tanh u) = x logistic(2 u), u = sqrt(2/pi) (x + 0.044715 x^3)
struct GeluTanh {
  FASTFORMER_INLINE F32 of(F32 x) {
    F32 unused;
    return of(x, F32{}, unused);
  }
  FASTFORMER_INLINE F32 of(F32 x, F32 dy, F32& dx) {
    const F32 square = x * x;
    const Logistic s = logistic(x * fma(square, splat(0.0713548163f), splat(1.59576912f)));
    // 2 u'; its factor is 0 long before the bound, beyond which it would be infinite.
    const F32 slope = fma(vmin(square, splat(1e6f)), splat(0.214064449f), splat(1.59576912f));
    dx = dy * fma(x * s.value * s.complement, slope, s.value);
    return x * s.value;
  }
};

struct Silu {
  FASTFORMER_INLINE F32 of(F32 x) { return x * logistic(x).value; }
  FASTFORMER_INLINE F32 of(F32 x, F32 dy, F32& dx) {
    const Logistic s = logistic(x);
    dx = dy * s.value * fma(x, s.complement, splat(1.0f));
    return x * s.value;
  }
};

}  // namespace fastformer::cpu::FASTFORMER_ISA
