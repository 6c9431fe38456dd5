"""A frozen linear layer with a trained change of few of its inputs or outputs, and what its backward keeps.

Owns the autograd functions. With W [out, in] frozen, D trained from zero and idx the selected channels:
columns: `y = x W^T + b + x[idx] D`, D [s, out]; rows: `y = x W^T + b; y[idx] += x D^T`, D [s, in]. Invariant: a forward
of columns keeps `x[idx]` for the backward and nothing else of x, of which the base alone needs nothing.

Source: S2FT, arXiv 2412.06289, section 3; gather and scatter in place of its permutation.
"""

from typing import Any

import torch
from torch import Tensor, nn


class _Columns(torch.autograd.Function):
    """x W^T + b + x[idx] D."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, idx: Tensor, d: Tensor) -> Tensor:
        chosen = x.index_select(-1, idx)
        ctx.save_for_backward(chosen, weight, idx, d)
        y = nn.functional.linear(x, weight, bias)
        return y + chosen @ d.to(chosen.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        chosen, weight, idx, d = ctx.saved_tensors
        grad_y = grads[0]
        grad_d = grad_x = None
        if ctx.needs_input_grad[4]:
            grad_d = (chosen.flatten(0, -2).T @ grad_y.flatten(0, -2)).to(d.dtype)
        if ctx.needs_input_grad[0]:
            grad_x = grad_y @ weight
            grad_x.index_add_(-1, idx, grad_y @ d.to(grad_y.dtype).T)
        return grad_x, None, None, None, grad_d


class _Rows(torch.autograd.Function):
    """x W^T + b with x D^T added to the outputs idx."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, idx: Tensor, d: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, idx, d)
        y = nn.functional.linear(x, weight, bias)
        return y.index_add_(-1, idx, x @ d.to(x.dtype).T)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, idx, d = ctx.saved_tensors
        grad_y = grads[0]
        chosen = grad_y.index_select(-1, idx)
        grad_d = grad_x = None
        if ctx.needs_input_grad[4]:
            grad_d = (chosen.flatten(0, -2).T @ x.flatten(0, -2)).to(d.dtype)
        if ctx.needs_input_grad[0]:
            grad_x = grad_y @ weight + chosen @ d.to(chosen.dtype)
        return grad_x, None, None, None, grad_d


class S2ftLinear(nn.Module):
    """Takes a linear layer's place; `delta` is D, the only parameter that is trained."""

    idx: Tensor
    weight: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear, idx: Tensor, *, is_columns: bool) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias
        self.is_columns = is_columns
        self.register_buffer("idx", idx.to(linear.weight.device), persistent=False)
        other = linear.out_features if is_columns else linear.in_features
        # the small trained part is kept in fp32 whatever the base is in
        self.delta = nn.Parameter(torch.zeros(len(idx), other, device=linear.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        """Return the changed output."""
        function = _Columns if self.is_columns else _Rows
        y: Tensor = function.apply(x, self.weight, self.bias, self.idx, self.delta)  # type: ignore[no-untyped-call]
        return y
