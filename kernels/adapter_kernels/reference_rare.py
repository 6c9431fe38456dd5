"""The rare ops of a site in plain fp32 torch, row by row: the definition of `rare_ops.py`."""

import torch
from torch import Tensor

from adapter_kernels.extras import RareSite, Rotation, Sparse2d


def sparse_delta(x: Tensor, matrix: Sparse2d) -> Tensor:
    """Change single weights: y[t, o] = sum over j in indptr[o] .. indptr[o + 1] of val[j] * x[t, col[j]]; fp32."""
    num_out = matrix.indptr.numel() - 1
    dense = torch.zeros(num_out, x.shape[1])
    for out in range(num_out):
        own = slice(int(matrix.indptr[out]), int(matrix.indptr[out + 1]))
        dense[out, matrix.col[own].long()] = matrix.val[own]
    return x.float() @ dense.T


def turned_inputs(x: Tensor, blocks: Tensor) -> Tensor:
    """Turn each block of inputs: x'[t, k] = x[t, k] @ blocks[k], blocks [in / b, b, b]; fp32."""
    size, turned = blocks.shape[1], torch.empty(x.shape)
    for place, block in enumerate(blocks):
        own = slice(place * size, (place + 1) * size)
        turned[:, own] = x[:, own].float() @ block
    return turned


def turned_outputs(u: Tensor, rotation: Rotation) -> Tensor:
    """Turn pairs of outputs: u'[o] = c0[o] u[o] + c1[o] partner(o).

    In each group of g outputs, the partner of place i is -u[i + g / 2] in the first half, u[i - g / 2] in the second.
    """
    half = rotation.group // 2
    partner = torch.empty_like(u)
    for out in range(u.shape[1]):
        is_first = out % rotation.group < half
        partner[:, out] = -u[:, out + half] if is_first else u[:, out - half]
    return rotation.c0 * u + rotation.c1 * partner


def rare_delta(x: Tensor, rare: RareSite) -> Tensor | float:
    """Sum the additive rare ops, which read the original x: sparse_delta + x @ dense.T; 0.0 without any."""
    delta: Tensor | float = 0.0
    if rare.csr is not None:
        delta = delta + sparse_delta(x, rare.csr)
    if rare.dense is not None:
        delta = delta + x.float() @ rare.dense.float().T
    return delta
