"""Who comes in: refusals at the door, and the walk over the waiting line that fills a step.

Owns the rules of admission, not the order of the line (`fairness`) nor what admission hands over (`lifecycle`).
Invariant: no sequence is passed for ever: one that lacks KV blocks closes the walk for all behind it, and one that
lacks an adapter slot closes it for all other adapters after `MAX_PASSES` admissions.
"""

from dataclasses import dataclass, field

from serve.adapter_messages import AdapterDone, AskReady
from serve.engine import adapter_sets
from serve.engine.acting import Acting, problem
from serve.engine.adapter_tiers import Residency
from serve.engine.lifecycle import LiveSequences
from serve.engine.limits import EngineLimits
from serve.engine.plan import Row
from serve.engine.sequence import Sequence
from serve.engine.virtual_tokens import Payer
from serve.messages import MAX_TENANT_CHARS, MAX_TENANT_WEIGHT, MIN_TENANT_WEIGHT, Embed, Failed, Submit

# admissions past a sequence for whose adapter there is no room, before no further adapter is pinned
MAX_PASSES = 64


@dataclass(slots=True)
class StepDraft:
    """The step under construction: rows, the sequences they belong to, and the token budget left."""

    budget: int
    rows: list[Row] = field(default_factory=list)
    seqs: list[Sequence] = field(default_factory=list)
    # where prompts that fit into the step's budget for prompts are not cut: that budget; None: they are
    whole_prompts: int | None = None
    # tokens that the step could hold beyond its budget
    spare: int = 0
    has_prompt: bool = False

    def add(self, seq: Sequence) -> None:
        """Run as many of the sequence's next tokens as the budget allows."""
        row = seq.next_row(self.budget)
        self.rows.append(row)
        self.seqs.append(seq)
        self.budget -= len(row.token_ids)

    def make_room_for(self, num_tokens: int) -> bool:
        """Round the budget to whole prompts; say whether a prompt's next part belongs into this step.

        The first one always does, so prompts go on; one that no step would hold whole is cut.
        """
        num_over = num_tokens - self.budget
        if self.budget == 0 or num_over <= 0 or self.whole_prompts is None or not self.has_prompt:
            return self.budget > 0
        if num_tokens > self.whole_prompts:
            return True
        if num_over > min(self.budget, self.spare):
            return False
        self.spare -= num_over
        self.budget += num_over
        return True

    def add_prompt(self, seq: Sequence) -> None:
        """Run as much of a prompt as the budget allows."""
        self.add(seq)
        self.has_prompt = True


def refusal(command: Submit | Embed, live: LiveSequences) -> Failed | None:
    """Say why a command can not be taken: it can never fit, its adapter can never be served, or the line is full."""
    request_id, limits = command.request_id, live.limits
    if not command.prompt_token_ids:
        return Failed(request_id, "invalid_value", "the prompt has no tokens; send at least one", 400)
    contradiction = _tenant_problem(command) or problem(command)
    if contradiction is not None:
        return Failed(request_id, "invalid_value", contradiction, 400)
    too_long = _length_refusal(command, limits)
    if too_long is not None:
        return Failed(request_id, "context_length_exceeded", too_long, 400)
    if len(live.waiting) >= limits.max_waiting:
        message = f"{len(live.waiting)} sequences wait already, the limit is {limits.max_waiting}; send it again later"
        return Failed(request_id, "queue_full", message, 429)
    return _adapter_refusal(command, live)


def answer_ready(command: AskReady, live: LiveSequences) -> AdapterDone | Failed:
    """Say whether adapters are on the device now; start the loads of those that are not, as far as there is room."""
    contradiction = _tenant_problem(command)
    if contradiction is not None:
        return Failed(command.request_id, "invalid_value", contradiction, 400)
    reason = adapter_sets.refusal(live.tiers, command.digests)
    if reason is not None:
        return Failed(command.request_id, "adapter_load_failed", reason, 503)
    is_ready = adapter_sets.residency(live.tiers, command.digests) is Residency.READY
    if not is_ready:
        payer = Payer(command.tenant, "+".join(sorted(command.digests)), command.tenant_weight)
        _prefetch(command.digests, payer, live)
    return AdapterDone(command.request_id, is_pending=not is_ready)


def _tenant_problem(command: Submit | Embed | AskReady) -> str | None:
    if len(command.tenant) > MAX_TENANT_CHARS:
        return f"the tenant's name has {len(command.tenant)} characters; the limit is {MAX_TENANT_CHARS}"
    # also false for NaN
    if MIN_TENANT_WEIGHT <= command.tenant_weight <= MAX_TENANT_WEIGHT:
        return None
    return f"the tenant's weight is {command.tenant_weight}; it lies from {MIN_TENANT_WEIGHT} to {MAX_TENANT_WEIGHT:g}"


def _length_refusal(command: Submit | Embed, limits: EngineLimits) -> str | None:
    num_prompt, num_virtual = len(command.prompt_token_ids), command.num_virtual_tokens
    samples = isinstance(command, Submit) and command.sampling.max_tokens > 0
    most = limits.max_sequence_tokens - samples - num_virtual
    if num_prompt <= most:
        return None
    taken = f", {num_virtual} more being its adapter's own prompt" if num_virtual else ""
    return (
        f"the prompt has {num_prompt} tokens; this server takes at most {max(most, 0)}{taken} "
        "(--max-model-len, --kv-blocks); shorten it"
    )


def _adapter_refusal(command: Submit | Embed, live: LiveSequences) -> Failed | None:
    acting = Acting.of(command)
    reason = adapter_sets.refusal(live.tiers, acting.digests)
    if reason is not None:
        return Failed(command.request_id, "adapter_load_failed", reason, 503)
    if command.cold_start == "fail" and adapter_sets.residency(live.tiers, acting.digests) is not Residency.READY:
        _prefetch(acting.digests, Payer.of(command), live)
        message = 'the adapter is not loaded yet; send it again soon, or with cold_start "wait"'
        return Failed(command.request_id, "adapter_not_loaded", message, 503)
    return None


def _prefetch(digests: tuple[str, ...], payer: Payer, live: LiveSequences) -> None:
    num_begun = live.tiers.num_moves_begun
    for digest in digests:
        live.tiers.prefetch(digest)
    live.served.charge(payer, num_loads=live.tiers.num_moves_begun - num_begun)


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
        num_begun = live.tiers.num_moves_begun
        residency = adapter_sets.want(live.tiers, seq.acting.digests)
        seq.num_loads_owed += live.tiers.num_moves_begun - num_begun
        if residency is Residency.ABSENT:
            is_barred = is_barred or _is_passed_too_often(seq, live)
        if not is_open or residency is not Residency.READY or (is_barred and seq.acting.digests):
            continue
        has_room = (
            draft.make_room_for(_num_to_compute(seq, draft, live)) and len(live.running) < live.limits.max_num_seqs
        )
        if not has_room or not live.admit(seq, now_s):
            is_open = False
            continue
        draft.add_prompt(seq)
        if _computes_for_siblings(seq, live):
            held_groups.add(seq.group_id)


def _num_to_compute(seq: Sequence, draft: StepDraft, live: LiveSequences) -> int:
    """Count the tokens that a waiting sequence has to run, without what the prefix cache has where that matters."""
    num_left = seq.num_left
    return num_left if num_left <= draft.budget else num_left - live.num_cached_now(seq)


def _is_passed_too_often(seq: Sequence, live: LiveSequences) -> bool:
    if seq.held_up_since is None:
        seq.held_up_since = live.num_admissions
    return live.num_admissions - seq.held_up_since >= MAX_PASSES


def _computes_for_siblings(seq: Sequence, live: LiveSequences) -> bool:
    """Say whether siblings of one group gain by waiting until this sequence's prompt is in the prefix cache."""
    if not seq.group_id or not live.limits.enable_prefix_cache or seq.needs_every_position:
        return False
    return seq.num_computed < live.num_reusable_tokens(seq)
