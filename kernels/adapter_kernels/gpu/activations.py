"""Activations of the MLP's gate, in fp32 registers. Launches nothing."""

import triton
import triton.language as tl

ACTIVATIONS = ("silu", "gelu_tanh", "gelu")


@triton.jit
def _sigmoid(x):
    # never exp of a positive number, which overflows
    small = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, small) / (1.0 + small)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """Return the activation of fp32 values."""
    if ACTIVATION == "silu":
        return x * _sigmoid(x)
    elif ACTIVATION == "gelu_tanh":
        # 0.5 * (1 + tanh(z)) is sigmoid(2 z), and 2 * sqrt(2 / pi) is 1.5957691216057308
        return x * _sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
