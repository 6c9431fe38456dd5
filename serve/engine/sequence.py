"""One sequence as the engine sees it: its tokens, how far they are computed, and what it holds.

Owns the state of one accepted `Submit` or `Embed`; blocks, pins and lines belong to their own rooms.
Invariants: positions `< num_computed` have their K/V written through `block_table`, in steps verified finite; the next
`num_in_flight` ones are being written by steps in flight, and may reach one position past the known tokens per step.
"""

from dataclasses import dataclass, field
from enum import Enum, auto

from serve.engine.acting import Acting
from serve.engine.kv_blocks import hash_activation, hash_block, hash_seed
from serve.engine.limits import EngineLimits
from serve.engine.plan import Row, SampleSpec, virtual_id
from serve.engine.virtual_tokens import Payer
from serve.messages import Embed, FinishReason, SamplingParams, Submit, TokenLogprobs


class SequenceState(Enum):
    """WAITING and RUNNING alternate under preemption; ENDED is final: its terminal event was sent."""

    WAITING = auto()
    RUNNING = auto()
    ENDED = auto()


@dataclass(slots=True, eq=False)
class Sequence:
    """Tokens, progress and holdings. `sampling` is None for an embedding, `pooling` is None for a generation.

    `prompt_ids` begin with the adapter's virtual tokens; clients are told of the others only.
    """

    request_id: str
    prompt_ids: list[int]
    acting: Acting
    # whose turn it takes in the waiting line, and who is charged
    payer: Payer
    arrival_index: int
    arrived_s: float
    sampling: SamplingParams | None = None
    pooling: str | None = None
    num_virtual: int = 0
    # positions that no row reaches across: where an adapter begins to act, where virtual tokens that owe nothing end
    row_edges: tuple[int, ...] = ()
    cache_salt: str = ""
    priority: int = 0
    group_id: str = ""
    state: SequenceState = SequenceState.WAITING
    output_ids: list[int] = field(default_factory=list)
    sample_spec: SampleSpec | None = None
    # what is sampled next depends on the last token itself: it must be known on the host, so no row is chained
    needs_last_token: bool = False
    # progress
    num_computed: int = 0
    # tokens of rows that were planned and have not come back
    num_in_flight: int = 0
    is_started: bool = False
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    hidden_sum: list[float] = field(default_factory=list)
    # holdings
    block_table: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    # one per adapter of `acting`, in its order, while it runs
    adapter_slots: tuple[int, ...] = ()
    # what `Started` reports; `queue_s` is None until the first admission
    queue_s: float | None = None
    num_cached_tokens: int = 0
    adapter_load_s: float = 0.0
    # parts of it while an image was read into host memory, and while one was brought to the device
    adapter_fetch_s: float = 0.0
    adapter_move_s: float = 0.0
    load_wait_since_s: float | None = None
    admitted_s: float = 0.0
    # when it must have ended
    deadline_at_s: float | None = None
    # loads that began for it and are not charged yet
    num_loads_owed: int = 0
    # admissions so far when this sequence was first held up by full adapter slots
    held_up_since: int | None = None

    @staticmethod
    def build(command: Submit | Embed, *, arrival_index: int, now_s: float) -> "Sequence":
        """Start the life of an accepted command."""
        prompt_ids = command.prompt_token_ids
        if command.num_virtual_tokens:
            prompt_ids = [*map(virtual_id, range(command.num_virtual_tokens)), *prompt_ids]
        acting = Acting.of(command)
        seq = Sequence(command.request_id, prompt_ids, acting, Payer.of(command), arrival_index, now_s)
        seq.num_virtual = command.num_virtual_tokens
        seq.cache_salt = command.cache_salt
        seq.deadline_at_s = None if command.deadline_s is None else now_s + command.deadline_s
        if isinstance(command, Embed):
            seq.pooling = command.pooling
            seq.row_edges = seq._edges()
            return seq
        seq.sampling = command.sampling
        seq.row_edges = seq._edges()
        seq.priority = command.priority
        seq.group_id = command.group_id
        seq.needs_last_token = _needs_last_token(command.sampling)
        if command.sampling.max_tokens > 0:
            seq.sample_spec = SampleSpec(command.sampling, command.prompt_token_ids, seq.output_ids)
        return seq

    @property
    def num_prompt(self) -> int:
        """Tokens of the request's own prompt."""
        return len(self.prompt_ids) - self.num_virtual

    @property
    def num_tokens(self) -> int:
        """Tokens known so far: virtual ones, prompt and output."""
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def num_left(self) -> int:
        """Known tokens that no row has run or is running. 0 of a running sequence: its next token is in flight."""
        return len(self.prompt_ids) + len(self.output_ids) - self.num_computed - self.num_in_flight

    @property
    def age_key(self) -> tuple[int, int]:
        """Order of right to run: priority, then arrival."""
        return (self.priority, self.arrival_index)

    @property
    def was_admitted(self) -> bool:
        """Say whether it ran before: a waiting sequence that did was preempted."""
        return self.queue_s is not None

    @property
    def is_decoding(self) -> bool:
        """Say whether only the newest token is still to be run, be it known or in flight."""
        num_left = self.num_left
        return num_left == 0 or (num_left == 1 and bool(self.output_ids))

    @property
    def needs_every_position(self) -> bool:
        """Say whether a prefix hit would lose something that is owed for each prompt position."""
        if self.is_started:
            return False
        asks_logprobs = self.sampling is not None and self.sampling.num_prompt_logprobs is not None
        return asks_logprobs or self.pooling == "mean"

    def next_row(self, budget: int) -> Row:
        """Describe the run of as many next tokens as budget and edges allow; the row reads the sequence's own lists."""
        start, num_tokens = self.num_computed + self.num_in_flight, self.num_tokens
        # none is left when the next token is in flight: it is run chained
        stop = start + min(budget, num_tokens - start or 1)
        for edge in self.row_edges:
            stop = edge if start < edge < stop else stop
        is_last, is_chained = stop >= num_tokens, start == num_tokens
        is_virtual = start < self.num_virtual
        slots = self.adapter_slots if start >= self.acting.active_from else ()
        weights = self.acting.weights
        params = None if self.is_started or is_chained or is_virtual else self.sampling
        num_logprobs = None if params is None else params.num_prompt_logprobs
        return Row(
            request_id=self.request_id,
            token_ids=[-1] if is_chained else self._tokens(start, stop),
            start=start,
            block_table=self.block_table,
            adapter_slot=slots[0] if slots and weights is None else None,
            sample=self.sample_spec if is_last else None,
            embed=self.pooling if is_last or (self.pooling == "mean" and not is_virtual) else None,
            num_prompt_logprobs=num_logprobs,
            prompt_targets=None if num_logprobs is None else self.prompt_ids[start + 1 : stop + 1],
            is_chained=is_chained,
            composed=() if weights is None else tuple(zip(slots, weights, strict=True)),
        )

    def prefix_hashes(self, num_blocks: int, block_size: int) -> list[bytes]:
        """Return the hashes of the first `num_blocks` full blocks; each is computed once in the sequence's life.

        Blocks that end before the adapter acts are the base's; the one in which it begins starts a chain of its own.
        """
        hashes, acting = self.block_hashes, self.acting
        while len(hashes) < num_blocks:
            start = len(hashes) * block_size
            acts_from_begin = acting.active_from == 0
            parent = hashes[-1] if hashes else hash_seed(acting.name if acts_from_begin else None, self.cache_salt)
            if not acts_from_begin and start <= acting.active_from < start + block_size:
                parent = hash_activation(parent, acting.name, acting.active_from)
            hashes.append(hash_block(parent, self._tokens(start, start + block_size)))
        return hashes[:num_blocks]

    def forget_progress(self) -> None:
        """Return to the first position, keeping the output: what was gathered over the prompt is gathered again."""
        self.num_computed = 0
        # new lists: the old one may lie in a `Started` that was sent already
        self.prompt_logprobs, self.hidden_sum = [], []

    def ends_in_flight(self, limits: EngineLimits) -> bool:
        """Say whether the sequence is known to end with the row in flight that runs its last known token."""
        if self.sampling is None or self.sample_spec is None:
            return True
        num_output = len(self.output_ids) + 1
        return num_output >= self.sampling.max_tokens or len(self.prompt_ids) + num_output >= limits.max_sequence_tokens

    def finish_reason(self, limits: EngineLimits) -> FinishReason | None:
        """Judge the newest output token: did it end the sequence, and why?"""
        params = self.sampling
        assert params is not None, f"sequence {self.request_id} is an embedding and has no end of output"
        if self.output_ids and self._is_stop(self.output_ids[-1], params, limits):
            return FinishReason.STOP
        if len(self.output_ids) >= params.max_tokens or self.num_tokens >= limits.max_sequence_tokens:
            return FinishReason.LENGTH
        return None

    def _edges(self) -> tuple[int, ...]:
        owed_from = self.num_virtual if self.needs_every_position else 0
        return tuple(edge for edge in (self.acting.active_from, owed_from) if edge)

    def _is_stop(self, token_id: int, params: SamplingParams, limits: EngineLimits) -> bool:
        is_eos = token_id in limits.eos_token_ids
        # a finished grammar allows nothing but an end token, for ever
        if is_eos and params.grammar is not None:
            return True
        if len(self.output_ids) <= params.min_tokens:
            return False
        return token_id in params.stop_token_ids or (is_eos and not params.ignore_eos)

    def _tokens(self, start: int, stop: int) -> list[int]:
        num_prompt = len(self.prompt_ids)
        if start >= num_prompt:
            return self.output_ids[start - num_prompt : stop - num_prompt]
        if stop <= num_prompt:
            return self.prompt_ids[start:stop]
        return self.prompt_ids[start:] + self.output_ids[: stop - num_prompt]


def _needs_last_token(params: SamplingParams) -> bool:
    has_penalty = params.repetition_penalty != 1.0 or params.presence_penalty or params.frequency_penalty
    return params.grammar is not None or bool(has_penalty)
