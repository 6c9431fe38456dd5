"""The torch side of the engine: carries a StepPlan out on the model, and holds model, KV cache, adapters and grammars.

Decides nothing. Invariant: what a row produces depends on the plan's row, the weights and the sequence's own KV.
"""

import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from adapters_store.store import OpenAdapter
from serve.engine.adapter_arena import AdapterArena
from serve.engine.batch import StepBatch, build_batch
from serve.engine.cpu_memory import FreeMemory
from serve.engine.model_parts import ModelParts
from serve.engine.model_rows import model_shapes
from serve.engine.plan import LoadResult, Row, RowResult, StepPlan
from serve.engine.sampler import Sampled, sample, top_logprobs
from serve.engine.sampling_plan import BitMask
from serve.messages import TokenLogprobs


class TorchExecutor:
    """`serve.engine.plan.Executor` on torch."""

    def __init__(self, parts: ModelParts, open_image: Callable[[str], OpenAdapter]) -> None:
        self._parts = parts
        self._arena = AdapterArena(parts.shapes, parts.dtype, open_image, model_shapes(parts.spec))
        self._constrained: set[str] = set()
        self._free_memory = FreeMemory(time.monotonic)

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> list[RowResult]:
        """Run one step; results in the order of `plan.rows`."""
        batch = build_batch(plan, self._parts.block_size, self._arena.placement)
        hidden = self._parts.decoder.hidden(batch.token_ids, batch.attention, self._parts.kv, batch.adapters)
        sampled = self._sample(batch, hidden)
        results = {
            row.request_id: self._result(batch, i, hidden[batch.begins[i] : batch.begins[i + 1]], sampled.get(i))
            for i, row in enumerate(batch.rows)
        }
        # last, since a step that raised is run again: a matcher must not advance twice
        self._advance_grammars(results.values())
        self._free_memory.give_back()
        return [results[row.request_id] for row in plan.rows]

    def start_load(self, digest: str, slot: int) -> None:
        """Begin to load an adapter into a slot; returns at once."""
        self._arena.start_load(digest, slot)

    def poll_loads(self) -> list[LoadResult]:
        """Return loads that ended since the last call."""
        return self._arena.poll()

    def drop(self, digest: str, slot: int) -> None:
        """Free a slot's bytes."""
        self._arena.drop(slot)

    def release_request(self, request_id: str) -> None:
        """Forget a sequence's grammar state."""
        if request_id in self._constrained and self._parts.grammars is not None:
            self._parts.grammars.release(request_id)
            self._constrained.discard(request_id)

    def zero_blocks(self, block_ids: list[int]) -> None:
        """Zero the K/V that a non-finite row wrote."""
        index = torch.tensor(block_ids, dtype=torch.int64)
        for cache in (*self._parts.kv.k, *self._parts.kv.v):
            cache.index_fill_(0, index, 0.0)

    def close(self) -> None:
        """Stop the loader thread."""
        self._arena.close()

    def _sample(self, batch: StepBatch, hidden: Tensor) -> dict[int, Sampled]:
        chosen = [i for i, row in enumerate(batch.rows) if row.sample is not None]
        if not chosen:
            return {}
        last_rows = [batch.begins[i + 1] - 1 for i in chosen]
        last_hidden = hidden.index_select(0, torch.tensor(last_rows))
        logits = self._parts.decoder.logits(last_hidden, batch.adapters, last_rows)
        specs = [spec for i in chosen if (spec := batch.rows[i].sample) is not None]
        masks = [self._mask(batch.rows[i]) for i in chosen]
        outcome = sample(logits, specs, self._parts.spec.eos_token_ids, masks.__getitem__)
        return dict(zip(chosen, outcome, strict=True))

    def _mask(self, row: Row) -> BitMask | None:
        spec, grammars = row.sample, self._parts.grammars
        if spec is None or spec.params.grammar is None or grammars is None:
            return None
        if row.request_id not in self._constrained:
            grammars.start(row.request_id, spec.params.grammar)
            self._constrained.add(row.request_id)
        return grammars.mask(row.request_id)

    def _advance_grammars(self, results: Iterable[RowResult]) -> None:
        for result in results:
            if result.token_id is not None and result.request_id in self._constrained and self._parts.grammars:
                self._parts.grammars.accept(result.request_id, result.token_id)

    def _result(self, batch: StepBatch, index: int, hidden: Tensor, sampled: Sampled | None) -> RowResult:
        row = batch.rows[index]
        prompt_logprobs = self._prompt_logprobs(batch, index, hidden)
        hidden_sum = None
        is_finite = sampled is None or sampled.token_id is not None
        if row.embed is not None:
            hidden_sum = (hidden.float().sum(0) if row.embed == "mean" else hidden[-1].float()).tolist()
        # a chunk that samples nothing is checked too: its blocks are about to enter the prefix cache
        if sampled is None:
            is_finite = bool(torch.isfinite(hidden.sum()))
        return RowResult(
            request_id=row.request_id,
            token_id=None if sampled is None else sampled.token_id,
            logprobs=None if sampled is None else sampled.logprobs,
            prompt_logprobs=prompt_logprobs,
            hidden_sum=hidden_sum,
            is_finite=is_finite,
        )

    def _prompt_logprobs(self, batch: StepBatch, index: int, hidden: Tensor) -> list[TokenLogprobs] | None:
        row, first_row = batch.rows[index], batch.begins[index]
        if row.num_prompt_logprobs is None or row.prompt_targets is None:
            return None
        found = []
        # a few rows at a time: [rows, V] fp32 of a whole chunk would be gigabytes for large vocabularies
        for begin in range(0, len(row.prompt_targets), 32):
            targets = row.prompt_targets[begin : begin + 32]
            rows = range(first_row + begin, first_row + begin + len(targets))
            logits = self._parts.decoder.logits(hidden[begin : begin + len(targets)], batch.adapters, rows)
            logprobs = logits.float().log_softmax(dim=-1)
            found += [top_logprobs(logprobs[i], target, row.num_prompt_logprobs) for i, target in enumerate(targets)]
        return found
