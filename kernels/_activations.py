"""Activations and their slopes, as kernels compute them. The only copy."""

import triton
import triton.language as tl

# Phi(t) - 1/2 is about t * P(t^2) for |t| up to CLAMP: minimax for the error of x * Phi(x), made to
# overshoot 1/2 at the end so that the clamp to [0, 1] gives exactly 0 and 1 beyond it.
GELU_CLAMP = tl.constexpr(4.4)
GELU_P0 = tl.constexpr(3.98761804e-01)
GELU_P1 = tl.constexpr(-6.60768350e-02)
GELU_P2 = tl.constexpr(9.64329757e-03)
GELU_P3 = tl.constexpr(-1.05507711e-03)
GELU_P4 = tl.constexpr(8.43074773e-05)
GELU_P5 = tl.constexpr(-4.72629165e-06)
GELU_P6 = tl.constexpr(1.74165252e-07)
GELU_P7 = tl.constexpr(-3.75647917e-09)
GELU_P8 = tl.constexpr(3.57245947e-11)


@triton.jit
def gelu_series(s):
    """P(s), for s = t^2."""
    p = GELU_P8 * s + GELU_P7
    p = p * s + GELU_P6
    p = p * s + GELU_P5
    p = p * s + GELU_P4
    p = p * s + GELU_P3
    p = p * s + GELU_P2
    p = p * s + GELU_P1
    return p * s + GELU_P0


@triton.jit
def normal_cdf_polynomial(x):
    """The normal distribution's Phi(x), exact to 4e-5 / |x|, with no call of a special function."""
    t = tl.minimum(tl.maximum(x, -GELU_CLAMP), GELU_CLAMP)
    p = gelu_series(t * t)
    return tl.minimum(tl.maximum(p * t + 0.5, 0.0), 1.0)


@triton.jit
def normal_density(x):
    return 0.3989422804014327 * tl.exp(-0.5 * x * x)


@triton.jit
def gelu_polynomial(x):
    """Exact GELU within 4e-5 with no call of a special function: half the instructions of erf.

    That is under bfloat16's own rounding (2^-8 of the result) wherever the result exceeds 0.01, so
    it is used for results that are stored in bfloat16 and for no other.
    """
    return x * normal_cdf_polynomial(x)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """float32 (or float64) `x` through the activation named by `ACTIVATION`."""
    if ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_polynomial":
        x = gelu_polynomial(x)
    elif ACTIVATION == "gelu_tanh":
        # 0.5 (1 + tanh(u)) is sigmoid(2u)
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACTIVATION == "quick_gelu":
        x = x * tl.sigmoid(1.702 * x)
    elif ACTIVATION == "silu":
        x = x * tl.sigmoid(x)
    elif ACTIVATION == "relu":
        # not tl.maximum: a NaN has to stay one
        x = tl.where(x <= 0.0, 0.0, x)
    return x


@triton.jit
def sigmoid_and_rest(x):
    """sigmoid(x) and 1 - sigmoid(x), which as a difference would lose its digits near 0."""
    e = tl.exp(tl.where(x < -80.0, 80.0, -x))  # a larger one could become infinity
    s = 1.0 / (1.0 + e)
    return s, e * s


@triton.jit
def activate_with_slope(x, ACTIVATION: tl.constexpr):
    """`activate`'s result and its derivative."""
    if ACTIVATION == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        y = x * cdf
        slope = cdf + x * normal_density(x)
    elif ACTIVATION == "gelu_polynomial":
        cdf = normal_cdf_polynomial(x)
        y = x * cdf
        slope = cdf + x * normal_density(x)
    elif ACTIVATION == "gelu_tanh":
        s, rest = sigmoid_and_rest(1.5957691216057308 * (x + 0.044715 * x * x * x))
        y = x * s
        slope = s + y * rest * (1.5957691216057308 + 0.2140644488178051 * x * x)
    elif ACTIVATION == "quick_gelu":
        s, rest = sigmoid_and_rest(1.702 * x)
        y = x * s
        slope = s + y * rest * 1.702
    elif ACTIVATION == "silu":
        s, rest = sigmoid_and_rest(x)
        y = x * s
        slope = s + y * rest
    elif ACTIVATION == "relu":
        y = tl.where(x <= 0.0, 0.0, x)
        slope = tl.where(x <= 0.0, 0.0, 1.0).to(x.dtype)
    else:
        y = x
        slope = tl.full(x.shape, 1.0, x.dtype)
    return y, slope


@triton.jit
def saturate(x):
    """float32 `x` within e4m3's range of +-448; NaN stays NaN."""
    return tl.where(x > 448.0, 448.0, tl.where(x < -448.0, -448.0, x))
