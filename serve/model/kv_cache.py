"""The paged KV cache's memory: one key and one value tensor per layer.

Owns the bytes; which block belongs to whom is the engine's business. Invariant: fresh blocks hold zeros, so a slot
that was never written is finite.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from serve.model.own_pages import own_pages
from serve.model.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class KvCache:
    """`k[layer]`, `v[layer]`: [num_blocks, block_size, K, E]."""

    k: tuple[Tensor, ...]
    v: tuple[Tensor, ...]

    @classmethod
    def build(
        cls, spec: ModelSpec, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> "KvCache":
        """Allocate the cache; on the CPU memory is touched only when blocks are written."""
        shape = (num_blocks, block_size, spec.dims.num_key_value_heads, spec.dims.head_dim)
        num_layers = spec.dims.num_hidden_layers
        return cls(
            k=tuple(_zeros(shape, dtype, device) for _ in range(num_layers)),
            v=tuple(_zeros(shape, dtype, device) for _ in range(num_layers)),
        )


def bytes_per_block(spec: ModelSpec, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one KV block over all layers, keys and values."""
    dims = spec.dims
    return 2 * dims.num_hidden_layers * block_size * dims.num_key_value_heads * dims.head_dim * dtype.itemsize


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.frombuffer(own_pages(math.prod(shape) * dtype.itemsize, are_large=False), dtype=dtype).view(shape)
