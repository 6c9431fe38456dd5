"""Random paged caches for the attention kernels: sequences in shuffled blocks, NaN in every slot that is nobody's.

Owns the making of inputs; the tests compare. Invariant: a slot that no sequence of the case has written holds NaN, so
a kernel that reads one shows it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adapter_kernels.gpu.ragged import ChunkTiles, RaggedBlocks, chunk_tiles, ragged_blocks
from adapter_kernels.gpu.step import DecodePart, PrefillPart

# fp32: sums in another order; fp16: one rounding of the weights to fp16, one of the output
TOLERANCES = {torch.float32: 2e-6, torch.float16: 2e-3}


@dataclass(frozen=True, slots=True)
class Heads:
    """Query heads, KV heads, head dim."""

    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32


@dataclass(frozen=True, slots=True)
class PagedCase:
    """One sequence per context; `tables` are the block ids of each."""

    contexts: tuple[int, ...]
    tables: list[list[int]]
    k_cache: Tensor
    v_cache: Tensor
    blocks: RaggedBlocks

    def decode_part(self) -> DecodePart:
        """The sequences as decodes: the last position of each is new."""
        return DecodePart(
            num_seqs=len(self.contexts),
            context_lens=torch.tensor(self.contexts, dtype=torch.int32),
            block_begins=torch.from_numpy(self.blocks.begins),
            block_ids=torch.from_numpy(self.blocks.ids),
        )

    def prefill_part(self, starts: Sequence[int], first_row: int, tile_rows: int) -> PrefillPart:
        """The sequences as chunks that begin at these positions and end at their contexts."""
        lengths = [context - start for context, start in zip(self.contexts, starts, strict=True)]
        tiles: ChunkTiles = chunk_tiles(starts, lengths, first_row, tile_rows)
        return PrefillPart(
            first_row=first_row,
            tile_seq=torch.from_numpy(tiles.tile_seq),
            tile_row=torch.from_numpy(tiles.tile_row),
            row_begins=torch.from_numpy(tiles.row_begins),
            lengths=torch.from_numpy(tiles.lengths),
            starts=torch.from_numpy(tiles.starts),
            block_begins=torch.from_numpy(self.blocks.begins),
            block_ids=torch.from_numpy(self.blocks.ids),
            tile_rows=tile_rows,
        )


def paged_case(
    contexts: Sequence[int],
    heads: Heads,
    dtype: torch.dtype,
    *,
    block_size: int = 16,
    spare_blocks: int = 3,
    kept: Sequence[int] | None = None,
) -> PagedCase:
    """Make keys and values of N(0, 1) for each context.

    Args:
        kept: indices of the sequences that the case consists of; the others lie in the cache as strangers.
    """
    generator = torch.Generator().manual_seed(len(contexts))
    counts = [-(-context // block_size) for context in contexts]
    num_blocks = sum(counts) + spare_blocks
    free = torch.randperm(num_blocks, generator=generator).tolist()
    tables = [[free.pop() for _ in range(count)] for count in counts]
    k_cache = torch.full((num_blocks, block_size, heads.num_kv_heads, heads.head_dim), float("nan"), dtype=dtype)
    v_cache = k_cache.clone()
    for context, table in zip(contexts, tables, strict=True):
        for index, block in enumerate(table):
            filled = min(block_size, context - index * block_size)
            shape = (filled, *k_cache.shape[2:])
            k_cache[block, :filled] = torch.randn(shape, generator=generator).to(dtype)
            v_cache[block, :filled] = torch.randn(shape, generator=generator).to(dtype)
    if kept is not None:
        contexts, tables = [contexts[i] for i in kept], [tables[i] for i in kept]
    return PagedCase(tuple(contexts), tables, k_cache, v_cache, ragged_blocks(contexts, tables, block_size))


def queries(num_rows: int, heads: Heads, dtype: torch.dtype) -> Tensor:
    """[num_rows, H, E] of N(0, 1)."""
    generator = torch.Generator().manual_seed(7)
    return torch.randn((num_rows, heads.num_heads, heads.head_dim), generator=generator).to(dtype)


def relative_error(out: Tensor, expected: Tensor) -> float:
    """||out - expected|| / ||expected||; NaN where either has one."""
    return float((out.float() - expected).norm() / expected.norm())
