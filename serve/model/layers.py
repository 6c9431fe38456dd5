"""The small parts of a decoder layer: norms, activations, linear layers in plain or packed form.

Owns no layer structure and no file reading. Invariant: results agree with transformers' modules in fp32 to rounding,
and in bf16 with the same roundings where that costs nothing.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from adapter_kernels.native_cpu import cpu_kernels
from serve.model.families import NormKind

Activation = Callable[[Tensor], Tensor]
# gate | up [T, 2 I] -> activation(gate) * up [T, I], fresh
Gated = Callable[[Tensor], Tensor]

# the batch size that oneDNN picks its blocked order for; M of 1 and 512 gave the same speed (2 cores, 2026-11)
_PACKING_ROWS = 32


class Norm(Protocol):
    """A norm over the last dim, [.., D] -> [.., D], fresh; `replaced` runs it with another weight [D] of a file."""

    def __call__(self, x: Tensor) -> Tensor: ...

    def replaced(self, x: Tensor, weight: Tensor) -> Tensor: ...


class RmsNorm:
    """RMSNorm over the last dim; the cast to the input's dtype comes before the weight, as Llama does."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        self._weight = weight
        self._shape = (weight.shape[-1],)
        self._eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        """x [.., D] -> [.., D]; a weight of [N, D] scales each of N heads on its own."""
        kernels = cpu_kernels()
        if kernels is not None and self._weight.ndim == 1 and kernels.can_read_rows(x):
            return kernels.rms_norm(x, self._weight, self._eps)
        return functional.rms_norm(x, self._shape, None, self._eps) * self._weight

    def replaced(self, x: Tensor, weight: Tensor) -> Tensor:
        """Run with another weight [D]; see `Norm`."""
        return functional.rms_norm(x, self._shape, None, self._eps) * weight.to(x.dtype)


class Fp32RmsNorm:
    """RMSNorm over the last dim, weight included in fp32, as OLMo2 and (with 1 + weight) Gemma do."""

    def __init__(self, weight: Tensor, eps: float, offset: float = 0.0) -> None:
        self._offset = offset
        self._weight = weight.float() + offset
        self._shape = (weight.shape[-1],)
        self._eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        """x [.., D] -> [.., D] in x's dtype."""
        return self._scaled(x, self._weight)

    def replaced(self, x: Tensor, weight: Tensor) -> Tensor:
        """Run with another weight [D]; see `Norm`."""
        return self._scaled(x, weight.float() + self._offset)

    def _scaled(self, x: Tensor, weight: Tensor) -> Tensor:
        return (functional.rms_norm(x.float(), self._shape, None, self._eps) * weight).to(x.dtype)


def make_norm(weight: Tensor, eps: float, kind: NormKind) -> Norm:
    """Build the RMSNorm of a family."""
    if kind is NormKind.CAST_THEN_SCALE:
        return RmsNorm(weight, eps)
    return Fp32RmsNorm(weight, eps, offset=1.0 if kind is NormKind.UNIT_OFFSET else 0.0)


def make_activation(name: str) -> Activation:
    """Return the function of `ModelSpec.activation`."""
    return {"silu": _silu, "gelu_tanh": _gelu_tanh, "gelu": _gelu}[name]


def make_gated(name: str) -> Gated:
    """Return the gated form of `ModelSpec.activation`."""
    activation = make_activation(name)

    def gated(gate_up: Tensor) -> Tensor:
        kernels = cpu_kernels()
        if kernels is not None and name == "silu" and kernels.can_read_rows(gate_up):
            return kernels.silu_mul(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return activation(gate).mul_(up)

    return gated


def _silu(x: Tensor) -> Tensor:
    return functional.silu(x)


def _gelu(x: Tensor) -> Tensor:
    return functional.gelu(x)


def _gelu_tanh(x: Tensor) -> Tensor:
    return functional.gelu(x, approximate="tanh")


class Linear(Protocol):
    """y [T, O] = x [T, D] @ W.T + b; the result is a fresh contiguous tensor."""

    @property
    def bias(self) -> Tensor | None:
        """The layer's b [O], or None."""
        ...

    def __call__(self, x: Tensor) -> Tensor: ...


class PlainLinear:
    """A linear layer on the weight as the checkpoint has it."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight = weight
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        return functional.linear(x, self._weight, self.bias)


class PackedLinear:
    """A bf16 or fp32 linear layer on the CPU, its weight in oneDNN's blocked order.

    Reading the plain order costs up to twice the time at decode: 9728 x 896, T=8: 0.87 ms plain, 0.36 ms packed in
    bf16, 4.4 and 1.6 ms in fp32 (2 cores, AVX-512, 2026-11). A row's result has the same bits whatever the number of
    rows beside it, which the plain fp32 product does not give. The plain weight is not kept: the caller drops it.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _PACKING_ROWS)
        self.bias = bias
        self._linear = torch.ops.mkldnn._linear_pointwise.default
        # oneDNN sums a lone fp32 row in another order: such a row travels in company
        self._min_rows = 2 if weight.dtype == torch.float32 else 1

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape[0] < self._min_rows:
            return self(x.expand(self._min_rows, -1).contiguous())[: x.shape[0]]
        y: Tensor = self._linear(x, self.packed, self.bias, "none", [], "")
        return y


def make_linear(weight: Tensor, bias: Tensor | None) -> Linear:
    """Build the fastest linear layer for the weight's dtype and device; do not use `weight` afterwards."""
    if can_pack(weight.dtype, weight.device):
        return PackedLinear(weight, bias)
    return PlainLinear(weight, bias)


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Does `PackedLinear` work here? If so a packed weight is another copy than the plain one."""
    if device.type != "cpu" or dtype != torch.bfloat16 or not hasattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported"):
        return False
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
