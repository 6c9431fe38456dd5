"""Drive a `FusedDecoder` on CPU tensors, through Triton's interpreter, as the engine's device side drives it on a GPU.

Owns the steps' static tensors: decodes first, one padding row behind them, then chunks; block tables as `PagedRun` has
them. Invariant: cache, buffers and workspaces start full of NaN, so what is read without having been written shows.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from adapter_kernels.gpu.acting_sites import ActingSites
from adapter_kernels.gpu.launch_config import LaunchConfigs
from adapter_kernels.gpu.ragged import chunk_tiles, ragged_blocks, token_positions, token_slots
from adapter_kernels.gpu.shrink import num_splits
from adapter_kernels.gpu.step import DecodePart, DeviceStep, PrefillPart, StepAdapters, Workspace
from adapter_kernels.gpu.streams import InlineSide
from adapter_kernels.gpu.tables import DeviceTables
from adapter_kernels.image import AdapterImage
from serve.model.fused_decoder import FusedDecoder, load_fused_decoder
from serve.model.kv_cache import KvCache
from serve.model.spec import ModelSpec, read_spec
from tests.kernels.gpu.batches import batch_of, route_of, tables_of
from tests.model.paged_run import BLOCK_SIZE, CPU

MAX_STEP_TOKENS = 32
MAX_DECODES = 8
RANK_CAPACITY = 32
_TILE_ROWS = 16
_BLOCKS_PER_SEQUENCE = 8
_MAX_SEQUENCES = 4


@dataclass(frozen=True, slots=True)
class Adapters:
    """Images on the device: image i at adapter slot i."""

    images: tuple[AdapterImage, ...]
    tables: DeviceTables
    workspace: Workspace

    @classmethod
    def build(cls, spec: ModelSpec, images: Sequence[AdapterImage], dtype: torch.dtype = torch.float32) -> "Adapters":
        """Lay the images out and make the workspace."""
        dims = spec.dims
        with poisoned_memory():
            workspace = Workspace.build(
                max_rows=MAX_STEP_TOKENS,
                max_splits=num_splits(max(dims.site_shape(site)[1] for site in ("o_proj", "down_proj"))),
                max_members=3,
                rank_capacity=RANK_CAPACITY,
                hidden_size=dims.hidden_size,
                dtype=dtype,
                device=CPU,
            )
        return cls(tuple(images), tables_of(images, dims.num_hidden_layers, dtype), workspace)

    def of_step(self, slots: list[int | None]) -> StepAdapters | None:
        """The adapters of a step whose row t has adapter slot `slots[t]`."""
        used = {slot for slot in slots if slot is not None}
        if not used:
            return None
        sites = ActingSites.union(ActingSites.of(self.images[slot].rows) for slot in used)
        return StepAdapters(self.tables, route_of(batch_of(slots)), sites, self.workspace)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill all memory that torch hands out uninitialised with NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def load_fused(folder: Path, dtype: torch.dtype = torch.float32, max_model_len: int | None = None) -> FusedDecoder:
    """Load a checkpoint for the launch plan."""
    with poisoned_memory():
        return load_fused_decoder(
            folder,
            read_spec(folder),
            dtype,
            CPU,
            max_model_len=max_model_len,
            max_step_tokens=MAX_STEP_TOKENS,
            max_decodes=MAX_DECODES,
            side=InlineSide(),
            configs=LaunchConfigs({}),
        )


class FusedRun:
    """One cache and the growing sequences in it; sequence i has the adapter slot `slots[i]` in each of its rows."""

    def __init__(
        self, decoder: FusedDecoder, adapters: Adapters | None = None, slots: Sequence[int | None] = ()
    ) -> None:
        num_blocks = _BLOCKS_PER_SEQUENCE * _MAX_SEQUENCES
        self._decoder = decoder
        self._adapters = adapters
        self._slots = list(slots) or [None] * _MAX_SEQUENCES
        self.kv = KvCache.build(decoder.spec, num_blocks, BLOCK_SIZE, decoder.dtype, decoder.device)
        for cache in (*self.kv.k, *self.kv.v):
            cache.fill_(float("nan"))
        # sequences interleave, and each runs backwards through the cache
        self._tables = [list(range(num_blocks - 1 - i, -1, -_MAX_SEQUENCES)) for i in range(_MAX_SEQUENCES)]
        self._lengths = [0] * _MAX_SEQUENCES

    def step(self, tokens: dict[int, list[int]]) -> dict[int, Tensor]:
        """Run the next tokens of some sequences in one step; logits [n, V] of each."""
        decodes, chunks = _decodes(tokens), _chunks(tokens)
        logits = self._decoder.logits(self._decoder.hidden(self.inputs(tokens), self.kv))
        assert logits.isfinite().all(), "a row, perhaps the padding, read what nobody wrote"
        results = {i: logits[row : row + 1] for row, i in enumerate(decodes)}
        begin = _first_chunk_row(decodes)
        for i in chunks:
            results[i] = logits[begin : begin + len(tokens[i])]
            begin += len(tokens[i])
        for i in tokens:
            self._lengths[i] += len(tokens[i])
        return results

    def inputs(self, tokens: dict[int, list[int]]) -> DeviceStep:
        """Build the device's inputs of the step that would run these tokens next."""
        decodes, chunks = _decodes(tokens), _chunks(tokens)
        num_padding = 1 if decodes else 0
        order = [*decodes, *chunks]
        starts = [self._lengths[i] for i in order]
        lengths = [len(tokens[i]) for i in order]
        contexts = [start + length for start, length in zip(starts, lengths, strict=True)]
        blocks = ragged_blocks(contexts, [self._tables[i] for i in order], BLOCK_SIZE)
        slot_mapping = token_slots(starts, lengths, blocks, BLOCK_SIZE).tolist()
        positions = token_positions(starts, lengths).tolist()
        ids = [token for i in order for token in tokens[i]]
        slots = [self._slots[i] for i in order for _ in tokens[i]]
        padded = slice(len(decodes), len(decodes))
        for column, filler in ((slot_mapping, -1), (positions, 0), (ids, 0)):
            column[padded] = [filler] * num_padding
        slots[padded] = [None] * num_padding
        return DeviceStep(
            num_rows=len(ids),
            token_ids=_int32(ids),
            positions=_int32(positions),
            slot_mapping=_int32(slot_mapping),
            decodes=self._decode_part(decodes) if decodes else None,
            prefills=self._prefill_part(decodes, chunks, tokens) if chunks else None,
            adapters=None if self._adapters is None else self._adapters.of_step(slots),
        )

    def _decode_part(self, decodes: list[int]) -> DecodePart:
        contexts = [self._lengths[i] + 1 for i in decodes]
        blocks = ragged_blocks([*contexts, 0], [*(self._tables[i] for i in decodes), []], BLOCK_SIZE)
        return DecodePart(
            len(decodes) + 1, _int32([*contexts, 0]), torch.from_numpy(blocks.begins), torch.from_numpy(blocks.ids)
        )

    def _prefill_part(self, decodes: list[int], chunks: list[int], tokens: dict[int, list[int]]) -> PrefillPart:
        starts, lengths = [self._lengths[i] for i in chunks], [len(tokens[i]) for i in chunks]
        contexts = [start + length for start, length in zip(starts, lengths, strict=True)]
        blocks = ragged_blocks(contexts, [self._tables[i] for i in chunks], BLOCK_SIZE)
        first_row = _first_chunk_row(decodes)
        tiles = chunk_tiles(starts, lengths, first_row, _TILE_ROWS)
        return PrefillPart(
            first_row=first_row,
            tile_seq=torch.from_numpy(tiles.tile_seq),
            tile_row=torch.from_numpy(tiles.tile_row),
            row_begins=torch.from_numpy(tiles.row_begins),
            lengths=torch.from_numpy(tiles.lengths),
            starts=torch.from_numpy(tiles.starts),
            block_begins=torch.from_numpy(blocks.begins),
            block_ids=torch.from_numpy(blocks.ids),
            tile_rows=_TILE_ROWS,
        )


def _decodes(tokens: dict[int, list[int]]) -> list[int]:
    return [i for i in tokens if len(tokens[i]) == 1]


def _chunks(tokens: dict[int, list[int]]) -> list[int]:
    return [i for i in tokens if len(tokens[i]) > 1]


def _first_chunk_row(decodes: list[int]) -> int:
    # one padding row stands behind the decodes
    return len(decodes) + 1 if decodes else 0


def _int32(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)
