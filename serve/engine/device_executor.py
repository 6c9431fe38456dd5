"""The device side of the engine: carries StepPlans out on the GPU, up to two submitted ahead of their results.

Owns the steps in flight and per-sequence state on the host; decides nothing. Invariants: a step is one copy to the
device, one pass (replayed where a graph is right), its sampling and one copy back; nothing waits for the device but
`collect`; what a row produces depends on the plan's row, the weights and the sequence's own KV.
"""

from collections import deque
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from adapter_kernels.gpu.acting_sites import ActingSites
from serve.engine.cuda_graphs import DecodeGraphs, site_mask
from serve.engine.device_batch import NUM_HOST_BUFFERS, SentWords, WordBuffers
from serve.engine.device_forward import DeviceForward, StepOutput
from serve.engine.device_results import PromptLogprobs, ResultLayout, plan_prompt_logprobs
from serve.engine.device_sampler import draw, find_logprobs
from serve.engine.packed_words import Int32s, Words
from serve.engine.plan import LoadResult, Row, RowResult, StepPlan
from serve.engine.sampling_plan import MAX_GROUP_ROWS, BitMask, DrawGroup, Grammars, plan_draws
from serve.engine.step_packing import BlockArrays, PackedStep, pack_step
from serve.engine.token_history import TokenHistories

MAX_IN_FLIGHT = NUM_HOST_BUFFERS - 1


class DeviceAdapters(Protocol):
    """The adapters on the device."""

    def start_load(self, digest: str, slot: int) -> None:
        """Begin a load; returns at once."""
        ...

    def poll(self) -> list[LoadResult]:
        """Return ended loads; from now on steps may name them."""
        ...

    def drop(self, slot: int) -> None:
        """Free a slot."""
        ...

    def sites(self, slot: int) -> ActingSites:
        """Return where and how a loaded slot's adapter acts."""
        ...

    def close(self) -> None:
        """Stop loading."""
        ...


class ResultBuffer:
    """Pinned host memory for one step's results, grown when a step gives more than any before."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._words = torch.zeros(0, dtype=torch.int32)
        self._event = torch.cuda.Event() if self._is_cuda else None  # type: ignore[no-untyped-call]

    def fetch(self, parts: list[Tensor]) -> None:
        """Queue the one copy of all parts, each flat int32."""
        words = parts[0] if len(parts) == 1 else torch.cat(parts)
        if len(words) > len(self._words):
            self._words = torch.zeros(2 * len(words), dtype=torch.int32, pin_memory=self._is_cuda)
        self._words[: len(words)].copy_(words, non_blocking=True)
        if self._event is not None:
            self._event.record()

    def wait(self) -> Int32s:
        """Wait for the copy and return its words."""
        if self._event is not None:
            self._event.synchronize()
        words: Int32s = self._words.numpy()
        return words


@dataclass(frozen=True, slots=True)
class _Flight:
    """A submitted step."""

    layout: ResultLayout
    buffer: ResultBuffer


class DeviceExecutor:
    """`serve.engine.plan.AsyncExecutor` on a device."""

    def __init__(
        self,
        forward: DeviceForward,
        buffers: WordBuffers,
        adapters: DeviceAdapters,
        *,
        buckets: tuple[int, ...],
        block_size: int,
        graphs: DecodeGraphs | None,
        grammars: Grammars | None,
    ) -> None:
        device = forward.decoder.device
        self.is_async = device.type == "cuda"
        self._forward = forward
        self._buffers = buffers
        self._adapters = adapters
        self._buckets = buckets
        self._block_size = block_size
        self._graphs = graphs
        self._grammars = grammars
        # by request id, how many of its tokens the grammar has seen
        self._constrained: dict[str, int] = {}
        self._tables = BlockArrays()
        self._histories = TokenHistories()
        # by request id, the row of the logits in the step submitted last
        self._previous: dict[str, int] = {}
        self._in_flight: deque[_Flight] = deque()
        self._results = deque(ResultBuffer(device) for _ in range(NUM_HOST_BUFFERS))

    def execute(self, plan: StepPlan) -> list[RowResult]:
        """Run one step; results in the order of `plan.rows`."""
        assert not self._in_flight, "a step is executed while others are in flight"
        self.submit(plan)
        return self.collect()

    @torch.inference_mode()
    def submit(self, plan: StepPlan) -> None:
        """Queue a step."""
        assert len(self._in_flight) < MAX_IN_FLIGHT, f"{MAX_IN_FLIGHT} steps are in flight already"
        spec = self._forward.decoder.spec
        step_words, sampling_words = Words(), Words()
        packed = pack_step(
            plan.rows,
            self._buckets,
            self._previous,
            self._tables,
            self._block_size,
            step_words,
            self._forward.max_pairs,
        )
        groups = plan_draws(
            packed.owners, spec.dims.vocab_size, spec.eos_token_ids, self._mask, self._histories, sampling_words
        )
        prompt = plan_prompt_logprobs(packed, sampling_words)
        layout = ResultLayout.of(
            plan.rows,
            packed,
            groups,
            prompt,
            max_rows=self._forward.outcome.max_rows,
            hidden_size=spec.dims.hidden_size,
        )
        sent = self._buffers.send(step_words, sampling_words)
        output = self._run(packed, sent)
        buffer = self._results[0]
        buffer.fetch(self._finish(packed, groups, prompt, sent, output))
        self._results.rotate(-1)
        self._previous = {row.request_id: index for index, row in enumerate(packed.owners)}
        self._in_flight.append(_Flight(layout, buffer))

    def collect(self) -> list[RowResult]:
        """Wait for the oldest step; results in the order of its plan."""
        flight = self._in_flight.popleft()
        return flight.layout.read(flight.buffer.wait())

    def start_load(self, digest: str, slot: int) -> None:
        """Begin to load an adapter into a slot; returns at once."""
        self._adapters.start_load(digest, slot)

    def poll_loads(self) -> list[LoadResult]:
        """Return loads that ended since the last call."""
        return self._adapters.poll()

    def drop(self, digest: str, slot: int) -> None:
        """Free a slot's bytes."""
        self._adapters.drop(slot)

    def release_request(self, request_id: str) -> None:
        """Forget what is kept of a sequence."""
        self._tables.release(request_id)
        self._histories.release(request_id)
        if request_id in self._constrained and self._grammars is not None:
            self._grammars.release(request_id)
            del self._constrained[request_id]

    def zero_blocks(self, block_ids: list[int]) -> None:
        """Zero the K/V that a non-finite row wrote, behind all steps submitted so far."""
        index = torch.tensor(block_ids, dtype=torch.int64).to(self._forward.decoder.device)
        for cache in (*self._forward.kv.k, *self._forward.kv.v):
            cache.index_fill_(0, index, 0.0)

    def capture_pending(self) -> bool:
        """Capture one graph that steps were missing; False when there is none. Only while no step is in flight."""
        assert not self._in_flight, "a graph is captured while steps are in flight"
        return self._graphs is not None and self._graphs.capture_pending()

    def close(self) -> None:
        """Stop the loader."""
        self._adapters.close()

    def _run(self, packed: PackedStep, sent: SentWords) -> StepOutput:
        sites = ActingSites.union(self._adapters.sites(slot) for slot in packed.adapter_slots)
        composed = ActingSites.union(self._adapters.sites(slot) for slot in packed.composed_slots)
        # no graph knows of compositions
        if self._graphs is not None and packed.bucket is not None and not packed.composed_slots:
            recorded = self._graphs.find(packed.bucket, site_mask(sites))
            if recorded is not None:
                recorded.replay()
                return recorded.output
        return self._forward.run(packed, sent.step, sites, composed)

    def _finish(
        self, packed: PackedStep, groups: list[DrawGroup], prompt: PromptLogprobs, sent: SentWords, output: StepOutput
    ) -> list[Tensor]:
        """Sample, and return the results as `ResultLayout` orders them."""
        outcome = self._forward.outcome
        logprobs = []
        for group in groups:
            assert output.logits is not None, "rows sample in a step without logits"
            found = draw(output.logits, group, sent.sampling, outcome)
            if found is not None:
                logprobs += found.words()
        parts = [outcome.words.view(-1)]
        if packed.num_chunks:
            parts.append(_count_bad_rows(output.hidden, sent.step.index(packed.fields.ends)))
        parts += [
            _pooled(row, output.hidden[begin : begin + len(row.token_ids)]).view(torch.int32)
            for row, begin in zip(packed.rows, packed.begins[:-1], strict=True)
            if row.embed is not None
        ]
        return [*parts, *logprobs, *self._prompt_logprobs(prompt, sent, output.hidden)]

    def _prompt_logprobs(self, prompt: PromptLogprobs, sent: SentWords, hidden: Tensor) -> list[Tensor]:
        if prompt.num_positions == 0:
            return []
        rows, targets = sent.sampling.index(prompt.rows), sent.sampling.index(prompt.targets)
        chunks = []
        # a few rows at a time: [rows, V] fp32 of a whole chunk would be gigabytes for large vocabularies
        for begin in range(0, prompt.num_positions, MAX_GROUP_ROWS):
            logits = self._forward.decoder.logits(hidden.index_select(0, rows[begin : begin + MAX_GROUP_ROWS]))
            logprobs = logits.float().log_softmax(dim=-1)
            chunks.append(find_logprobs(logprobs, targets[begin : begin + MAX_GROUP_ROWS], prompt.num_top).words())
        return [torch.cat(part) for part in zip(*chunks, strict=True)]

    def _mask(self, row: Row) -> BitMask | None:
        spec, grammars = row.sample, self._grammars
        if spec is None or spec.params.grammar is None or grammars is None:
            return None
        assert not row.is_chained, f"{row.request_id} has a grammar and an unknown newest token"
        if row.request_id not in self._constrained:
            grammars.start(row.request_id, spec.params.grammar)
            self._constrained[row.request_id] = 0
        # from the sequence's own list: results of a step behind a lost one come back too, and are not used
        for token_id in spec.output_ids[self._constrained[row.request_id] :]:
            grammars.accept(row.request_id, token_id)
        self._constrained[row.request_id] = len(spec.output_ids)
        return grammars.mask(row.request_id)


def _pooled(row: Row, hidden: Tensor) -> Tensor:
    """[rows of the chunk, D] -> [D] fp32: their sum, or the last one."""
    return hidden.float().sum(0) if row.embed == "mean" else hidden[-1].float()


def _count_bad_rows(hidden: Tensor, ends: Tensor) -> Tensor:
    """Count per sequence the rows of hidden [T, D] that are not finite: [S] int32.

    Args:
        ends: [S] int64, last row of each sequence; together they cover all rows.
    """
    is_bad = ~torch.isfinite(hidden.sum(dim=1, dtype=torch.float32))
    so_far = is_bad.cumsum(dim=0)[ends]
    return torch.diff(so_far, prepend=so_far.new_zeros(1)).int()
