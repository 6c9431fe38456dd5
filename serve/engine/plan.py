"""The step contract between the pure engine and the torch side: what to run, and what came out.

Pure data, no torch, no decisions. Invariant: the rows of a plan are independent: any order or grouping gives the same
tokens, and the executor reads nothing that the plan does not name. The rows and lists of a plan are read while it is
executed or submitted, never after: the engine goes on writing to them.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from serve.messages import SamplingParams, TokenLogprobs


def virtual_id(index: int) -> int:
    """Return the id that stands for virtual token `index` of an adapter's prompt; -1 is a token yet unknown."""
    return -2 - index


@dataclass(frozen=True, slots=True)
class SampleSpec:
    """What the sampler needs for one row.

    `prompt_ids` (without virtual tokens) and `output_ids` are the sequence's own lists (not copies): read-only, valid
    during the step only.
    The random draw of output position i uses (params.seed, i) alone, i = len(output_ids), plus one for a chained row,
    whose newest token is not in the list yet.
    """

    params: SamplingParams
    prompt_ids: list[int]
    output_ids: list[int]


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence's share of a step: run `token_ids` at positions `start ..`, K/V through `block_table`.

    `adapter_slot` is None for the base, and for a composition: `composed` then holds its slots with their weights, in
    the order of the digests. Ids below -1 are virtual tokens (`virtual_id`): always the sequence's first ones, and of
    the adapter in `adapter_slot`. `sample` is None for a prefill chunk that is not the prompt's last.
    `embed` asks for the sum of final-norm hidden states over this chunk ("mean") or the last one ("last").
    `num_prompt_logprobs` = k asks for log-probabilities (chosen and top k) of prompt tokens: `prompt_targets` holds the
    prompt tokens at positions `start + 1 ..` (one fewer than `token_ids` on the prompt's last chunk). A row of virtual
    tokens is asked for neither.
    `is_chained`: the row's one token is the one that the step submitted just before samples for the same request_id.
    The host does not know it: `token_ids` is `[-1]`. Only an `AsyncExecutor` is given such rows, always with `sample`,
    never with a grammar or a penalty, which would need the token on the host.
    """

    request_id: str
    token_ids: list[int]
    start: int
    block_table: list[int]
    adapter_slot: int | None
    sample: SampleSpec | None
    embed: str | None = None
    num_prompt_logprobs: int | None = None
    prompt_targets: list[int] | None = None
    is_chained: bool = False
    composed: tuple[tuple[int, float], ...] = ()

    @property
    def slots(self) -> tuple[int, ...]:
        """Adapter slots that the row names."""
        if self.composed:
            return tuple(slot for slot, _ in self.composed)
        return () if self.adapter_slot is None else (self.adapter_slot,)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One forward pass. `slot_digests[i]` is the digest of adapter slot i for all slots that rows name."""

    rows: list[Row]
    slot_digests: dict[int, str]


@dataclass(frozen=True, slots=True)
class RowResult:
    """What one row produced; `token_id` is None when the row did not sample.

    `is_finite` is False when the row's logits or hidden state held NaN or Inf: then the request fails alone and its
    KV blocks must not enter the prefix cache.
    """

    request_id: str
    token_id: int | None
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    hidden_sum: list[float] | None = None
    is_finite: bool = True


class Executor(Protocol):
    """The torch side as the engine sees it; one implementation on torch, one fake for tests."""

    def execute(self, plan: StepPlan) -> list[RowResult]:
        """Run one step; results in the order of `plan.rows`. Raises only when the step as a whole is lost."""
        ...

    def start_load(self, digest: str, slot: int) -> None:
        """Begin to bring an adapter's image into `slot`; returns at once."""
        ...

    def poll_loads(self) -> "list[LoadResult]":
        """Return loads that ended since the last call."""
        ...

    def drop(self, digest: str, slot: int) -> None:
        """Free the slot's image; no row of a later plan names it, and none of a step that was not collected yet."""
        ...

    def release_request(self, request_id: str) -> None:
        """Forget per-request state (grammar matchers); called once per ended sequence, not on preemption.

        No row of the sequence is in a step that was not collected yet.
        """
        ...

    def zero_blocks(self, block_ids: list[int]) -> None:
        """Zero the K/V of blocks that a non-finite row wrote, behind all steps submitted so far."""
        ...


@runtime_checkable
class AsyncExecutor(Executor, Protocol):
    """An executor that takes the next step while the one before still runs.

    At most two steps are submitted and not collected; they run in order of submission. `execute` is called only while
    none is. A row whose sequence ended meanwhile is run like any other; what it names (K/V blocks, adapter slot) stays
    as it is until the step was collected.
    """

    # False: this object is to be driven through `execute` alone
    is_async: bool

    def submit(self, plan: StepPlan) -> None:
        """Queue a step; returns when the work is queued. When it raises, the step does not count as submitted."""
        ...

    def collect(self) -> list[RowResult]:
        """Wait for the oldest submitted step; results in the order of its rows.

        Raises when that step as a whole is lost: it then counts as collected. A step submitted behind it must still be
        collected, and what it returns is not used.
        """
        ...


@dataclass(frozen=True, slots=True)
class LoadResult:
    """The end of one adapter load: `error` is None on success, else one line that may be shown to the client.

    `num_bytes` is what the adapter takes in memory; 0 when a load failed before it learnt that. A load that failed left
    no bytes. `is_out_of_room`: it failed for want of room alone, and may succeed when others were dropped.
    """

    digest: str
    slot: int
    num_bytes: int
    rank: int
    seconds: float
    error: str | None = None
    is_out_of_room: bool = False


@dataclass(frozen=True, slots=True)
class FetchResult:
    """The end of one fetch from the store into host memory: `error` as in `LoadResult`.

    `num_bytes` is what the image takes in host memory, also when there was no room for it; 0 when it was not learnt.
    """

    digest: str
    num_bytes: int
    rank: int
    seconds: float
    error: str | None = None
    is_out_of_room: bool = False
