"""Feature maps as they are applied on load, and their slopes. NaN stays NaN."""

import triton
import triton.language as tl


@triton.jit
def identity(x):
    return x


@triton.jit
def elu(x):
    """elu(x) + 1 without the cancellation."""
    return tl.where(x > 0.0, x + 1.0, tl.exp(x))


@triton.jit
def relu(x):
    return tl.where(x < 0.0, 0.0, x)


@triton.jit
def one(x):
    return tl.full(x.shape, 1.0, tl.float32)


@triton.jit
def elu_slope(x):
    return tl.where(x > 0.0, 1.0, tl.exp(x))


@triton.jit
def relu_slope(x):
    return tl.where(x > 0.0, 1.0, 0.0)


MAPS = {"elu": (elu, elu_slope), "relu": (relu, relu_slope), "crelu": (relu, relu_slope), "identity": (identity, one)}
