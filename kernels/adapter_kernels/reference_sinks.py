"""The sinks in plain torch: the definitions that the fused kernels are tested against.

A sink is the op that reads a base projection next; on the GPU it adds the adapters' delta on its way. Here the delta
is one dense tensor, zero for rows without adapter. Computes in the dtype it is given, without the roundings between
the parts: feed fp32 or fp64. Invariant: inputs are left as they were.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class Norm:
    """An RMSNorm: weight [D] and epsilon."""

    weight: Tensor
    eps: float


@dataclass(frozen=True, slots=True)
class Heads:
    """Result of `qkv_sink`: q [T, H, E], k and v [T, K, E]."""

    q: Tensor
    k: Tensor
    v: Tensor


@dataclass(frozen=True, slots=True)
class NormedResidual:
    """Result of `add_norm`: the residual stream and, where asked for, its norm, both [T, D]."""

    x: Tensor
    normed: Tensor | None


def rms_norm(x: Tensor, norm: Norm) -> Tensor:
    """x[.., :] * weight / sqrt(mean(x[.., :]^2) + eps)."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps) * norm.weight


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the leading rotary_dim of each head: x * cos + roll(x, rotary_dim / 2) * sin.

    Args:
        heads: [T, N, E]. cos, sin: [T, rotary_dim], the first half of sin negated.
    """
    rotary_dim = cos.shape[-1]
    turning = heads[..., :rotary_dim]
    turned = turning * cos[:, None] + turning.roll(rotary_dim // 2, -1) * sin[:, None]
    return torch.cat((turned, heads[..., rotary_dim:]), dim=-1)


def qkv_sink(
    qkv: Tensor,
    delta: Tensor | None,
    num_heads: int,
    num_kv_heads: int,
    *,
    q_norm: Norm | None = None,
    k_norm: Norm | None = None,
    rotation: tuple[Tensor, Tensor] | None = None,
) -> Heads:
    """Finish a qkv projection: add the delta, norm and turn q and k head by head.

    h = qkv + delta; q = turn(norm(h_q)); k = turn(norm(h_k)); v = h_v.

    Args:
        qkv, delta: [T, (H + 2 K) * E]. rotation: cos and sin, [T, rotary_dim] each.
    """
    summed = qkv if delta is None else qkv + delta
    heads = summed.view(qkv.shape[0], num_heads + 2 * num_kv_heads, -1)
    q, k, v = torch.split(heads, [num_heads, num_kv_heads, num_kv_heads], dim=1)
    q = q if q_norm is None else rms_norm(q, q_norm)
    k = k if k_norm is None else rms_norm(k, k_norm)
    if rotation is not None:
        q, k = rotate(q, *rotation), rotate(k, *rotation)
    return Heads(q, k, v)


def swiglu_sink(gate_up: Tensor, delta: Tensor | None, activation: str) -> Tensor:
    """Gate the up projection: out = act(gate + dgate) * (up + dup).

    Args:
        gate_up, delta: [T, 2 F], gate | up side by side. activation: "silu", "gelu_tanh" or "gelu".
    """
    gate, up = (gate_up if delta is None else gate_up + delta).chunk(2, dim=-1)
    if activation == "silu":
        return functional.silu(gate) * up
    return functional.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none") * up


def add_norm(
    x: Tensor,
    h: Tensor | None,
    delta: Tensor | None = None,
    *,
    residual_scale: float = 1.0,
    after: Norm | None = None,
    before: Norm | None = None,
) -> NormedResidual:
    """Add a block's output to the residual stream and norm the sum for the next block.

    x' = x + residual_scale * after(h + delta); normed = before(x'). Without h: x' = x.

    Args:
        x, h, delta: [T, D].
    """
    if h is not None:
        block = h if delta is None else h + delta
        x = x + residual_scale * (block if after is None else rms_norm(block, after))
    return NormedResidual(x, None if before is None else rms_norm(x, before))
