"""What one row's result means for its sequence: progress, events, an end or a failure.

Owns the order of a sequence's events: Started, then Tokens, then one terminal event. Decides nothing about other rows.
Invariant: blocks are published only for rows that came back finite; a failed row's blocks are wiped before release,
also when its sequence ended while the row was in flight and nothing else of its result matters.
"""

from dataclasses import dataclass, field

from serve.engine.lifecycle import LiveSequences
from serve.engine.plan import Row, RowResult
from serve.engine.sequence import Sequence, SequenceState
from serve.messages import NOT_FINITE, Embedded, Event, Failed, Finished, FinishReason, Started, Tokens


@dataclass(slots=True)
class Counters:
    """What the heartbeat counts from the engine's start; each heartbeat empties the list."""

    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    num_prefix_hit_tokens: int = 0
    num_steps: int = 0
    # adapters that acted, one number per step
    step_adapters: list[int] = field(default_factory=list)


def finish_row(
    live: LiveSequences, counters: Counters, seq: Sequence, row: Row, result: RowResult | None, now_s: float
) -> list[Event]:
    """Apply one row's result to its sequence and return the events it causes, in order."""
    seq.num_in_flight -= len(row.token_ids)
    if result is None or not result.is_finite:
        live.wipe(seq)
    if seq.state is SequenceState.ENDED:
        live.let_go(seq)
        return []
    if result is None or not result.is_finite:
        return [_fail(live, seq, is_lost=result is None)]
    live.advance(seq, len(row.token_ids))
    _gather(seq, result)
    if seq.num_computed < seq.num_tokens:
        return []
    events: list[Event] = []
    if not seq.is_started:
        events.append(_start(counters, seq, now_s))
    if seq.pooling is not None:
        live.end(seq)
        scale = 1.0 / seq.num_prompt if seq.pooling == "mean" else 1.0
        return [*events, Embedded(seq.request_id, [value * scale for value in seq.hidden_sum])]
    if row.sample is not None:
        events.append(_append(live, counters, seq, result))
    reason = seq.finish_reason(live.limits)
    if reason is not None:
        live.end(seq)
        stop_token_id = seq.output_ids[-1] if reason is FinishReason.STOP else None
        events.append(Finished(seq.request_id, reason, stop_token_id))
    return events


def _fail(live: LiveSequences, seq: Sequence, *, is_lost: bool) -> Failed:
    live.end(seq)
    cause = "the engine could not run this step" if is_lost else f"the model produced {NOT_FINITE}"
    message = f"{cause} for {seq.acting} at token {seq.num_computed}; other requests go on"
    return Failed(seq.request_id, "engine_error", message, 500)


def _gather(seq: Sequence, result: RowResult) -> None:
    if result.prompt_logprobs is not None:
        seq.prompt_logprobs += result.prompt_logprobs
    if result.hidden_sum is not None:
        so_far = seq.hidden_sum or [0.0] * len(result.hidden_sum)
        seq.hidden_sum = [a + b for a, b in zip(so_far, result.hidden_sum, strict=True)]


def _start(counters: Counters, seq: Sequence, now_s: float) -> Started:
    assert seq.queue_s is not None, f"sequence {seq.request_id} ran before it was admitted"
    asks_logprobs = seq.sampling is not None and seq.sampling.num_prompt_logprobs is not None
    seq.is_started = True
    counters.num_prompt_tokens += seq.num_prompt
    counters.num_prefix_hit_tokens += seq.num_cached_tokens
    return Started(
        seq.request_id,
        num_cached_tokens=seq.num_cached_tokens,
        queue_s=seq.queue_s,
        adapter_load_s=seq.adapter_load_s,
        prompt_logprobs=seq.prompt_logprobs if asks_logprobs else None,
        adapter_fetch_s=min(seq.adapter_fetch_s, seq.adapter_load_s),
        adapter_move_s=min(seq.adapter_move_s, max(0.0, seq.adapter_load_s - seq.adapter_fetch_s)),
        prefill_s=max(0.0, now_s - seq.admitted_s),
    )


def _append(live: LiveSequences, counters: Counters, seq: Sequence, result: RowResult) -> Tokens:
    assert result.token_id is not None, f"the row of {seq.request_id} asked for a token and got none"
    seq.output_ids.append(result.token_id)
    live.served.charge(seq.payer, num_output=1)
    counters.num_generated_tokens += 1
    return Tokens(seq.request_id, [result.token_id], None if result.logprobs is None else [result.logprobs])
