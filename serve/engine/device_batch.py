"""Packed words to the device in one copy, and there the tensors that a forward pass reads.

Owns the device's step buffer and the host buffers that take turns in filling it. Invariants: one copy per step, behind
all work submitted so far; a host buffer is written again only after its step was collected, since no more than two
steps are submitted and not collected; equal sizes give equal addresses, which captured graphs rely on.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from adapter_kernels.gpu.composed_rows import BLOCK_COLUMNS
from adapter_kernels.gpu.ragged import PREFILL_TILE_ROWS
from adapter_kernels.gpu.route import DeviceRoute
from adapter_kernels.gpu.route_forms import block_rows_for
from adapter_kernels.gpu.step import (
    ComposedPart,
    DecodePart,
    DeviceStep,
    PrefillPart,
    StepAdapters,
    StepComposition,
)
from serve.engine.composed_packing import PairFields, composed_words, max_pairs_for
from serve.engine.device_sampler import DeviceWords
from serve.engine.packed_words import Words, padded_size
from serve.engine.step_packing import PackedStep

# two that the device may still read, and the one being filled
NUM_HOST_BUFFERS = 3
# room for what the sampler reads; a step that asks for more (long penalised texts) pays a second copy
_SAMPLING_WORDS = 1 << 18


@dataclass(frozen=True, slots=True)
class StepBounds:
    """The largest step."""

    max_step_tokens: int
    max_num_seqs: int
    max_blocks_per_seq: int

    @property
    def max_decodes(self) -> int:
        """Sequences that one step can decode."""
        return min(self.max_num_seqs, self.max_step_tokens)

    @property
    def max_pairs(self) -> int:
        """Pairs of a composed row and one of its adapters in one part of a step."""
        return max_pairs_for(self.max_step_tokens)

    @property
    def num_words(self) -> int:
        """Words of the largest step, without its sampling."""
        num_tiles = self.max_step_tokens // PREFILL_TILE_ROWS + self.max_num_seqs
        per_token, per_seq, per_tile = 5, 8, 2
        return (
            per_token * padded_size(self.max_step_tokens)
            + per_seq * padded_size(self.max_num_seqs + 1)
            + per_tile * padded_size(num_tiles)
            + padded_size(self.max_num_seqs * self.max_blocks_per_seq + 1)
            + composed_words(self.max_step_tokens)
        )


@dataclass(frozen=True, slots=True)
class SentWords:
    """One step's words on the device, valid until the next step is sent."""

    step: DeviceWords
    sampling: DeviceWords


class WordBuffers:
    """The device's words, and pinned host words in turn."""

    def __init__(self, bounds: StepBounds, device: torch.device) -> None:
        size = bounds.num_words + _SAMPLING_WORDS
        self._device_words = torch.zeros(size, dtype=torch.int32, device=device)
        self._hosts = [
            torch.zeros(size, dtype=torch.int32, pin_memory=device.type == "cuda") for _ in range(NUM_HOST_BUFFERS)
        ]
        self._turn = 0

    def send(self, step: Words, sampling: Words) -> SentWords:
        """Queue the copy of a step's words; returns before it has happened."""
        host = self._hosts[self._turn]
        self._turn = (self._turn + 1) % NUM_HOST_BUFFERS
        array = host.numpy()
        step.write(array)
        total = step.size + sampling.size
        if total > len(array):
            self._device_words[: step.size].copy_(host[: step.size], non_blocking=True)
            return SentWords(DeviceWords(self._device_words), DeviceWords(self._send_apart(sampling)))
        sampling.write(array[step.size :])
        self._device_words[:total].copy_(host[:total], non_blocking=True)
        return SentWords(DeviceWords(self._device_words), DeviceWords(self._device_words[step.size : total]))

    def _send_apart(self, words: Words) -> Tensor:
        # from pageable memory, so the copy is over when this returns
        host = torch.empty(words.size, dtype=torch.int32)
        words.write(host.numpy())
        return host.to(self._device_words.device)


def composed_part(fields: PairFields, words: DeviceWords) -> ComposedPart:
    """View one part's words as what the kernels read."""
    slots = words.ints(fields.slots)
    block_rows = block_rows_for(slots.shape[0])
    route = DeviceRoute(
        slots=slots,
        perm=words.ints(fields.perm),
        block_slot=slots if block_rows == 1 else words.ints(fields.block_slot),
        block_start=words.ints(fields.block_start),
        block_len=words.ints(fields.block_len),
        block_rows=block_rows,
    )
    blocks = words.ints(fields.blocks).view(-1, BLOCK_COLUMNS)
    return ComposedPart(route, words.ints(fields.row_of), words.floats(fields.weights), blocks)


def device_step(
    packed: PackedStep,
    words: DeviceWords,
    adapters: StepAdapters | None,
    composition: StepComposition | None = None,
) -> DeviceStep:
    """View a step's words as what the kernels read."""
    fields = packed.fields
    block_begins, block_ids = words.ints(fields.block_begins), words.ints(fields.block_ids)
    decodes = prefills = None
    if packed.num_decodes:
        decodes = DecodePart(
            num_seqs=packed.num_decodes,
            context_lens=words.ints(fields.context_lens),
            block_begins=block_begins[: packed.num_decodes],
            block_ids=block_ids,
        )
    if packed.num_chunks:
        prefills = PrefillPart(
            first_row=packed.num_decodes,
            tile_seq=words.ints(fields.tile_seq),
            tile_row=words.ints(fields.tile_row),
            row_begins=words.ints(fields.row_begins),
            lengths=words.ints(fields.lengths),
            starts=words.ints(fields.starts),
            block_begins=block_begins[packed.num_decodes :],
            block_ids=block_ids,
        )
    return DeviceStep(
        num_rows=packed.num_rows,
        token_ids=words.ints(fields.token_ids),
        positions=words.ints(fields.positions),
        slot_mapping=words.ints(fields.slot_mapping),
        decodes=decodes,
        prefills=prefills,
        adapters=adapters,
        composition=composition,
    )
