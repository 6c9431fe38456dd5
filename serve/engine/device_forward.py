"""One forward pass on the device, from packed words to logits and their argmax: what a CUDA graph captures.

Owns the order of a pass: tokens of chained rows, route, decoder, head, argmax. Reads and writes static memory only, so
running it again on other words is the same as replaying its capture. Invariant: without acting `sites` no
adapter op is launched; with more sites than the step's adapters act on, the result is the same.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from adapter_kernels.gpu.acting_sites import ActingSites
from adapter_kernels.gpu.route import RouteBuffers, build_route
from adapter_kernels.gpu.sampling import chain_tokens
from adapter_kernels.gpu.step import StepAdapters, StepComposition, Workspace
from adapter_kernels.gpu.tables import DeviceTables
from serve.engine.device_batch import composed_part, device_step
from serve.engine.device_sampler import DeviceWords, Outcome, take_argmax
from serve.engine.step_packing import PackedStep
from serve.model.fused_decoder import FusedDecoder
from serve.model.kv_cache import KvCache

_NOWHERE = ActingSites()


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What a pass leaves on the device until the next one: hidden [T, D], logits [rows of the logits, V] or None."""

    hidden: Tensor
    logits: Tensor | None


class DeviceForward:
    """The model with everything static that its steps share."""

    def __init__(
        self,
        decoder: FusedDecoder,
        kv: KvCache,
        tables: DeviceTables,
        route: RouteBuffers,
        workspace: Workspace,
        outcome: Outcome,
    ) -> None:
        self.decoder = decoder
        self.kv = kv
        self.outcome = outcome
        self.tables = tables
        self._route = route
        self._workspace = workspace
        # one memory for all graphs: a tensor of each one's own would be kept as long as the graph
        size = (outcome.max_rows, decoder.spec.dims.vocab_size)
        self._logits = torch.empty(size, dtype=decoder.dtype, device=decoder.device)

    @property
    def max_pairs(self) -> int:
        """Pairs of a composed row and one of its adapters that the workspace holds at a time."""
        return self._workspace.max_pairs

    @torch.inference_mode()
    def run(
        self, packed: PackedStep, words: DeviceWords, sites: ActingSites, composed: ActingSites = _NOWHERE
    ) -> StepOutput:
        """Launch a pass; the argmax of row i of the logits goes to `outcome`.

        Args:
            sites: where and how adapters may act; what each adapter of the step does is covered by it.
            composed: the same of the adapters of compositions.
        """
        fields = packed.fields
        if packed.num_decodes:
            chain_tokens(words.ints(fields.token_ids), words.ints(fields.chain), self.outcome.tokens)
        step = device_step(
            packed, words, self._adapters(packed, words, sites), self._composition(packed, words, composed)
        )
        hidden = self.decoder.hidden(step, self.kv)
        last = hidden if packed.bucket else hidden.index_select(0, words.index(fields.sampled_rows))
        if len(last) == 0:
            return StepOutput(hidden, None)
        logits = self.decoder.logits(last, self._logits[: len(last)])
        take_argmax(logits, self.outcome)
        return StepOutput(hidden, logits)

    def _adapters(self, packed: PackedStep, words: DeviceWords, sites: ActingSites) -> StepAdapters | None:
        if not sites.fused:
            return None
        fields = packed.fields
        buffers = replace(self._route, slots=words.ints(fields.slots))
        route = build_route(words.ints(fields.local), words.ints(fields.slot_of), buffers, packed.num_rows)
        return StepAdapters(self.tables, route, sites, self._workspace)

    def _composition(self, packed: PackedStep, words: DeviceWords, sites: ActingSites) -> StepComposition | None:
        if not sites.fused:
            return None
        parts = tuple(composed_part(fields, words) for fields in packed.fields.pairs)
        return StepComposition(self.tables, sites, self._workspace, parts)
