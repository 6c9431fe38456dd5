"""Who comes in: refusals at the door, and the walk over the waiting line that fills a step.

Owns the rules of admission, not the order of the line (`fairness`) nor what admission hands over (`lifecycle`).
Invariant: no sequence is passed for ever: one that lacks KV blocks closes the walk for all behind it, and one that
lacks an adapter slot closes it for all other adapters after `MAX_PASSES` admissions.
"""

from dataclasses import dataclass, field

from serve.engine.adapter_tiers import Residency
from serve.engine.lifecycle import LiveSequences
from serve.engine.plan import Row
from serve.engine.sequence import Sequence
from serve.messages import Embed, Failed, Submit

# admissions past a sequence for whose adapter there is no room, before no further adapter is pinned
MAX_PASSES = 64


@dataclass(slots=True)
class StepDraft:
    """The step under construction: rows, the sequences they belong to, and the token budget left."""

    budget: int
    rows: list[Row] = field(default_factory=list)
    seqs: list[Sequence] = field(default_factory=list)

    def add(self, seq: Sequence) -> None:
        """Run as many of the sequence's next tokens as the budget allows."""
        # none is left when the next token is in flight: it is run chained
        count = min(self.budget, seq.num_left or 1)
        self.rows.append(seq.next_row(count))
        self.seqs.append(seq)
        self.budget -= count


def refusal(command: Submit | Embed, live: LiveSequences) -> Failed | None:
    """Say why a command can not be taken: it can never fit, its adapter can never be served, or the line is full."""
    request_id, limits = command.request_id, live.limits
    num_prompt = len(command.prompt_token_ids)
    samples = isinstance(command, Submit) and command.sampling.max_tokens > 0
    if num_prompt == 0:
        return Failed(request_id, "invalid_value", "the prompt has no tokens; send at least one", 400)
    if num_prompt + samples > limits.max_sequence_tokens:
        message = (
            f"the prompt has {num_prompt} tokens; this server takes at most {limits.max_sequence_tokens - samples} "
            "(--max-model-len, --kv-blocks); shorten it"
        )
        return Failed(request_id, "context_length_exceeded", message, 400)
    if len(live.waiting) >= limits.max_waiting:
        message = f"{len(live.waiting)} sequences wait already, the limit is {limits.max_waiting}; send it again later"
        return Failed(request_id, "queue_full", message, 429)
    return _adapter_refusal(command, live)


def _adapter_refusal(command: Submit | Embed, live: LiveSequences) -> Failed | None:
    digest = command.adapter_digest
    if digest is None:
        return None
    reason = live.tiers.refusal(digest)
    if reason is not None:
        return Failed(command.request_id, "adapter_load_failed", reason, 503)
    takes_no_wait = isinstance(command, Submit) and command.cold_start == "fail"
    if takes_no_wait and live.tiers.residency(digest) is not Residency.READY:
        live.tiers.prefetch(digest)
        message = 'the adapter is not loaded yet; send it again soon, or with cold_start "wait"'
        return Failed(command.request_id, "adapter_not_loaded", message, 503)
    return None


def admit_waiting(live: LiveSequences, draft: StepDraft, now_s: float, *, is_open: bool) -> None:
    """Walk the waiting line in order of turn: start loads, and admit while there is budget, room and KV.

    A closed walk (`is_open` false, or closed on the way) still starts loads, so that they run while the line waits.
    """
    live.tiers.begin_walk()
    if not live.waiting:
        return
    held_groups = {seq.group_id for seq in live.running if _computes_for_siblings(seq, live)}
    is_barred = False
    for seq in live.waiting.turns(held_groups):
        residency = Residency.READY if seq.adapter_digest is None else live.tiers.want(seq.adapter_digest)
        if residency is Residency.ABSENT:
            is_barred = is_barred or _is_passed_too_often(seq, live)
        if not is_open or residency is not Residency.READY or (is_barred and seq.adapter_digest is not None):
            continue
        has_room = draft.budget > 0 and len(live.running) < live.limits.max_num_seqs
        if not has_room or not live.admit(seq, now_s):
            is_open = False
            continue
        draft.add(seq)
        if _computes_for_siblings(seq, live):
            held_groups.add(seq.group_id)


def _is_passed_too_often(seq: Sequence, live: LiveSequences) -> bool:
    if seq.held_up_since is None:
        seq.held_up_since = live.num_admissions
    return live.num_admissions - seq.held_up_since >= MAX_PASSES


def _computes_for_siblings(seq: Sequence, live: LiveSequences) -> bool:
    """Say whether siblings of one group gain by waiting until this sequence's prompt is in the prefix cache."""
    if not seq.group_id or not live.limits.enable_prefix_cache or seq.needs_every_position:
        return False
    return seq.num_computed < live.num_reusable_tokens(seq)
