"""Drive a `Decoder` through the paged path as the engine does: chunks, decodes, several sequences in one step.

Owns block tables that are neither contiguous nor in order, over a cache that starts full of NaN: reading a slot that
the sequence did not write shows at once.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from adapter_kernels.attention_plan import AttentionPlan
from adapter_kernels.cpu import CpuDelta
from adapter_kernels.delta import AdapterDelta
from adapter_kernels.model_delta import CpuModelDelta
from adapter_kernels.route import Placement, build_route
from serve.model.decoder import Decoder
from serve.model.kv_cache import KvCache
from serve.model.spec import read_spec
from serve.model.weights import load_decoder

BLOCK_SIZE = 4
_BLOCKS_PER_SEQUENCE = 32
CPU = torch.device("cpu")

# rows per sequence, ids and plan of a step -> its adapters
MakeDelta = Callable[[list[int], Tensor, AttentionPlan], AdapterDelta | None]


def load(folder: Path, dtype: torch.dtype = torch.float32, max_model_len: int | None = None) -> Decoder:
    """Load a checkpoint with our own loader."""
    return load_decoder(folder, read_spec(folder), dtype, CPU, max_model_len=max_model_len)


class PagedRun:
    """One cache and the growing sequences in it."""

    def __init__(self, decoder: Decoder, num_sequences: int = 2) -> None:
        num_blocks = _BLOCKS_PER_SEQUENCE * num_sequences
        self._decoder = decoder
        self._kv = KvCache.build(decoder.spec, num_blocks, BLOCK_SIZE, decoder.dtype, decoder.device)
        for cache in (*self._kv.k, *self._kv.v):
            cache.fill_(float("nan"))
        # sequences interleave, and each runs backwards through the cache
        self._tables = [list(range(num_blocks - 1 - i, -1, -num_sequences)) for i in range(num_sequences)]
        self._lengths = [0] * num_sequences

    def step(self, tokens: dict[int, list[int]], adapters: AdapterDelta | None = None) -> dict[int, Tensor]:
        """Run the next tokens of some sequences in one step; logits [n, V] of each."""
        return self._step(tokens, lambda lengths, ids, plan: adapters)

    def step_placed(self, tokens: dict[int, list[int]], placements: dict[int, Placement]) -> dict[int, Tensor]:
        """Run sequences with the adapters placed for them, those of one adapter side by side; ids may be virtual."""

        def delta(lengths: list[int], ids: Tensor, plan: AttentionPlan) -> AdapterDelta:
            route = build_route([placements.get(i) for i in tokens], lengths)
            return CpuDelta(route, CpuModelDelta.build(route, ids, plan.slot_mapping))

        return self._step(tokens, delta)

    def _step(self, tokens: dict[int, list[int]], make_delta: MakeDelta) -> dict[int, Tensor]:
        indices = list(tokens)
        lengths = [len(tokens[i]) for i in indices]
        plan = AttentionPlan.build(
            [self._lengths[i] for i in indices], lengths, [self._tables[i] for i in indices], BLOCK_SIZE
        )
        ids = torch.tensor([token for i in indices for token in tokens[i]])
        adapters = make_delta(lengths, ids, plan)
        hidden = self._decoder.hidden(ids, plan, self._kv, adapters)
        for i in indices:
            self._lengths[i] += len(tokens[i])
        return dict(zip(indices, torch.split(self._decoder.logits(hidden, adapters), lengths), strict=True))

    def run(self, sequence: int, chunks: list[list[int]]) -> Tensor:
        """Run one sequence chunk by chunk; logits [T, V]."""
        return torch.cat([self.step({sequence: chunk})[sequence] for chunk in chunks])


def chunked(token_ids: list[int], sizes: list[int]) -> list[list[int]]:
    """Cut into chunks of these sizes, then single tokens."""
    chunks, begin = [], 0
    for size in sizes:
        chunks.append(token_ids[begin : begin + size])
        begin += size
    return chunks + [[token] for token in token_ids[begin:]]
