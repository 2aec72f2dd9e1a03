"""The activations of feed_forward, on float32 tiles. NaN and infinities come out as torch gives them."""

import triton
import triton.language as tl

_LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def _logistic(x):
    """1 / (1 + e^-x), and 1 - that without its cancellation."""
    e = tl.exp2(x * -_LOG2_E)
    value = 1.0 / (e + 1.0)
    return value, tl.where(e < 1e30, e * value, 1.0)


@triton.jit
def _normal(x):
    """Distribution and density of the standard normal distribution.

    erfc(z) e^(z^2) = t P(t), t = 1 / (1 + 0.375 z): the form of Abramowitz and Stegun 7.1.26 with P fitted
    anew, degree 8, relative error 1.2e-8 before rounding. The tail keeps its relative accuracy, which 1 + erf
    would cancel away, and backward's density costs one product.
    """
    magnitude = tl.abs(x)
    t = 1.0 / (magnitude * 0.265165043 + 1.0)  # 0.375 / sqrt(2)
    p = 0.0307694413 * t - 0.143665731
    p = p * t + 0.21620059
    p = p * t - 0.114708006
    p = p * t + 0.136863172
    p = p * t + 0.060752161
    p = p * t + 0.102656819
    p = p * t + 0.105324812
    p = p * t + 0.105806738
    gaussian = tl.exp2(magnitude * magnitude * (-0.5 * _LOG2_E))
    tail = p * t * gaussian
    return tl.where(x < 0.0, tail, 1.0 - tail), gaussian * 0.398942280


@triton.jit
def _gelu_tanh_argument(x):
    """2u of x/2 (1 + tanh u) = x logistic(2u), where u = sqrt(2/pi) (x + 0.044715 x^3)."""
    return x * (x * x * 0.0713548163 + 1.59576912)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """relu, gelu (erf), gelu_tanh, silu or relu2 of float32 x."""
    if ACTIVATION == "gelu":
        distribution, _ = _normal(x)
        y = x * distribution
    elif ACTIVATION == "gelu_tanh":
        value, _ = _logistic(_gelu_tanh_argument(x))
        y = x * value
    elif ACTIVATION == "silu":
        value, _ = _logistic(x)
        y = x * value
    else:
        y = tl.where(x < 0.0, 0.0, x)  # keeps NaN, which a maximum would not
        if ACTIVATION == "relu2":
            y = y * y
    return y


@triton.jit
def activate_with_gradient(x, dy, ACTIVATION: tl.constexpr):
    """The activation of x, and dy times its slope there.

    Where relu's slope is 0 the gradient is 0 whatever dy is, and the slope at NaN is relu's 1: torch's rules.
    """
    y = activate(x, ACTIVATION)
    if ACTIVATION == "relu":
        dx = tl.where(x <= 0.0, 0.0, dy)
    elif ACTIVATION == "relu2":
        dx = tl.where(x <= 0.0, 0.0, dy * (x + x))
    elif ACTIVATION == "gelu":
        distribution, density = _normal(x)
        dx = dy * (x * density + distribution)
    elif ACTIVATION == "gelu_tanh":
        value, complement = _logistic(_gelu_tanh_argument(x))
        # 2u'; its factor is 0 long before the bound, beyond which it would be infinite.
        slope = tl.minimum(x * x, 1e6) * 0.214064449 + 1.59576912
        dx = dy * (x * value * complement * slope + value)
    else:
        value, complement = _logistic(x)
        dx = dy * value * (x * complement + 1.0)
    return y, dx
