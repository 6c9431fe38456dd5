"""The messages that the API process and the engine process exchange over a Unix socket.

Owns the shapes only; their bytes belong to `serve.engine.ipc`. Plain values: no torch, no HTTP, nothing to install.
Invariant: every `Submit` that the engine accepted is answered by exactly one terminal event (`Finished` or `Failed`).
"""

from dataclasses import dataclass, field
from enum import StrEnum

from serve.adapter_messages import AdapterDone, AdapterMove, AskReady, EvictAdapter, PinAdapter, PinState, UnpinAdapter

# adapters of one composition, and how far from zero a weight may lie
MAX_COMPOSED = 8
MAX_WEIGHT = 2.0
# how much more or less than others a tenant may be served
MIN_TENANT_WEIGHT = 0.01
MAX_TENANT_WEIGHT = 100.0
MAX_TENANT_CHARS = 128
# a part of `Failed.message` where a model's results were NaN or infinite, and nowhere else
NOT_FINITE = "numbers that are not finite"


class FinishReason(StrEnum):
    """Why a sequence ended; `ABORTED` is never seen by a client."""

    STOP = "stop"
    LENGTH = "length"
    ABORTED = "aborted"


@dataclass(frozen=True, slots=True)
class Grammar:
    """A constraint on the output, already validated by the API: `kind` names how `text` is read."""

    # "json_schema" | "regex" | "lark"; json_object arrives as the schema {"type": "object"}
    kind: str
    text: str


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens. All values were validated by the API; `seed` is always set there."""

    max_tokens: int
    seed: int
    temperature: float = 1.0
    top_p: float = 1.0
    # 0 means off
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    logit_bias: tuple[tuple[int, float], ...] = ()
    # None: no logprobs; k: the chosen token's and the k most likely ones'
    num_logprobs: int | None = None
    # as num_logprobs, for every prompt token but the first
    num_prompt_logprobs: int | None = None
    grammar: Grammar | None = None


@dataclass(frozen=True, slots=True)
class Submit:
    """Start one sequence. `n > 1` arrives as n submits that share a prompt and `group_id`.

    What acts: nothing but the base, one adapter (`adapter_digest`), or a composition (`adapters`), never two of them.
    """

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    # digest (64 hex characters) of the adapter's canonical file; None: the base alone
    adapter_digest: str | None = None
    # seeds the prefix hashes together with the digest
    cache_salt: str = ""
    # lower runs first
    priority: int = 0
    group_id: str = ""
    # "wait" | "fail": what to do when the adapter is not loaded yet
    cold_start: str = "wait"
    # a composition: digests with their weights, in any order; `adapter_digest` is None then
    adapters: tuple[tuple[str, float], ...] = ()
    # the adapter's prompt: so many positions come before the request's own tokens, counted by every limit
    num_virtual_tokens: int = 0
    # the adapter acts from this position of the prompt on; before it the base runs alone. None: everywhere
    active_from: int | None = None
    # who competes for service, before its adapters do; "": one tenant as well
    tenant: str = ""
    # its part of the service, relative to others' 1
    tenant_weight: float = 1.0
    # seconds from its arrival in the engine within which it must end; None: no limit
    deadline_s: float | None = None


@dataclass(frozen=True, slots=True)
class Embed:
    """Run the prompt and return one pooled hidden state; `pooling` is "mean" or "last"."""

    request_id: str
    prompt_token_ids: list[int]
    pooling: str = "mean"
    adapter_digest: str | None = None
    # as in `Submit`
    adapters: tuple[tuple[str, float], ...] = ()
    num_virtual_tokens: int = 0
    active_from: int | None = None
    tenant: str = ""
    tenant_weight: float = 1.0
    # seeds the prefix hashes together with what acts, as in `Submit`
    cache_salt: str = ""
    deadline_s: float | None = None
    # as in `Submit`
    cold_start: str = "wait"


@dataclass(frozen=True, slots=True)
class Abort:
    """The client is gone, or a stop string was found: free everything within one step. Unknown ids are ignored."""

    request_id: str


@dataclass(frozen=True, slots=True)
class LoadAdapter:
    """Bring an adapter into memory ahead of its first request."""

    digest: str


@dataclass(frozen=True, slots=True)
class UnloadAdapter:
    """Forget an adapter's image once its last pin is gone (deleted or superseded in the store)."""

    digest: str


@dataclass(frozen=True, slots=True)
class Shutdown:
    """Leave the step loop after this frame."""


Command = (
    Submit
    | Embed
    | Abort
    | LoadAdapter
    | UnloadAdapter
    | AskReady
    | PinAdapter
    | UnpinAdapter
    | EvictAdapter
    | Shutdown
)


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural log-probabilities at one position: the chosen token's, and the most likely ones in falling order."""

    token_id: int
    logprob: float
    top_ids: list[int]
    top_logprobs: list[float]


@dataclass(frozen=True, slots=True)
class Started:
    """The prompt is computed; sent once per sequence with or before its first token."""

    request_id: str
    num_cached_tokens: int
    queue_s: float
    # seconds this sequence waited until its adapters were on the device; 0.0 when they were
    adapter_load_s: float
    prompt_logprobs: list[TokenLogprobs] | None = None
    # parts of that: while images were read into host memory, and while they were brought to the device; in the rest
    # other loads were under way, or there was no room
    adapter_fetch_s: float = 0.0
    adapter_move_s: float = 0.0
    # from the first admission to the prompt's end
    prefill_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Tokens:
    """New output tokens of one sequence, in order. A stop token is included."""

    request_id: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None


@dataclass(frozen=True, slots=True)
class Embedded:
    """Terminal answer to `Embed`: one vector of the model's hidden size, not normalised."""

    request_id: str
    vector: list[float]


@dataclass(frozen=True, slots=True)
class Finished:
    """Terminal: the sequence ended. `stop_token_id` is the token that ended it, if one did."""

    request_id: str
    reason: FinishReason
    stop_token_id: int | None = None


@dataclass(frozen=True, slots=True)
class Failed:
    """Terminal: the sequence failed alone. `code` and `http_status` become the HTTP error.

    `message` holds `NOT_FINITE` when that is the cause, so that an adapter's probe can tell it from others.
    """

    request_id: str
    code: str
    message: str
    http_status: int = 500


@dataclass(frozen=True, slots=True)
class AdapterState:
    """One adapter as the engine holds it: `tier` is "fetching" (disk to host), "host", "loading" or "device"."""

    digest: str
    tier: str
    # by running sequences
    num_pins: int
    # on the device
    num_bytes: int
    rank: int
    # it goes as soon as no running sequence holds it
    is_leaving: bool = False
    # of its image in host memory; 0: none is there
    num_host_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Stats:
    """The heartbeat, at least every 0.5 s, also when idle: what /metrics, /livez and admission read.

    Counters (`num_*_total`) grow from the engine's start and fall to zero with a restart.
    """

    step_index: int
    num_running: int
    num_waiting: int
    num_kv_blocks: int
    num_kv_blocks_in_use: int
    block_size: int
    num_adapter_pins: int
    adapters: list[AdapterState]
    num_preemptions_total: int
    num_prompt_tokens_total: int
    num_generated_tokens_total: int
    num_prefix_hit_tokens_total: int
    num_adapter_loads_total: int
    num_adapter_evictions_total: int
    num_steps_total: int
    # adapters that accepted sequences named: on the device already, in host memory alone, or only on disk
    num_adapter_hits_total: int = 0
    num_adapter_misses_total: int = 0
    num_adapter_host_hits_total: int = 0
    num_adapter_fetches_total: int = 0
    num_adapter_host_evictions_total: int = 0
    # since the previous Stats, in order: every move, and how many adapters acted in each step
    adapter_moves: list[AdapterMove] = field(default_factory=list)
    step_adapters: list[int] = field(default_factory=list)
    operator_pins: list[PinState] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Ready:
    """First event of a started engine: what it learnt at start-up."""

    base_fingerprint: str
    max_model_len: int
    num_kv_blocks: int
    block_size: int
    dtype: str
    device: str
    eos_token_ids: list[int]
    vocab_size: int
    hidden_size: int


@dataclass(frozen=True, slots=True)
class StartFailed:
    """Sent instead of `Ready`: one clear line for the operator."""

    message: str


Event = Started | Tokens | Embedded | Finished | Failed | AdapterDone | Stats | Ready | StartFailed
