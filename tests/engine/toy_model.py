"""A toy language model for engine tests, and the slow simulation that runs each request alone on it.

Owns the definition of every number the fake executor must produce. A position's K/V is a chain over the adapter and all
tokens up to it, as in a real decoder, so that a wrong block, a wrong adapter or a lost token changes what comes out.
"""

from dataclasses import dataclass, field

from serve.engine.limits import EngineLimits
from serve.messages import Embed, FinishReason, Submit, TokenLogprobs

VOCAB_SIZE = 16
EOS_ID = 0
HIDDEN_SIZE = 2


def adapter_number(digest: str | None) -> int:
    """Return the adapter as a number that hashes alike in every process."""
    return 0 if digest is None else int(digest, 16) + 1


def composed_number(adapters: tuple[tuple[str, float], ...]) -> int:
    """Return a composition as a number: whatever its order; weight 0 counts for nothing, weight 1 alone for itself."""
    acting = sorted((adapter_number(digest), weight) for digest, weight in adapters if weight != 0.0)
    if not acting or (len(acting) == 1 and acting[0][1] == 1.0):
        return acting[0][0] if acting else 0
    return hash(tuple(acting))


def kv_seed(adapter: int) -> int:
    """Return the state before the first token."""
    return hash((adapter, 11))


def kv_of(previous: int, token_id: int, adapter: int) -> int:
    """Return a position's K/V, given the K/V before it."""
    return hash((previous, token_id, adapter))


@dataclass(frozen=True, slots=True)
class Toy:
    """What acts in the toy model: a number, and the position from which it does."""

    adapter: int
    active_from: int
    num_virtual: int

    @classmethod
    def of(cls, command: Submit | Embed) -> "Toy":
        """Read a request."""
        adapter = adapter_number(command.adapter_digest) or composed_number(command.adapters)
        return cls(adapter, command.active_from or 0, command.num_virtual_tokens)

    def at(self, position: int) -> int:
        """Return the adapter's number at a position, 0 where the base runs alone."""
        return self.adapter if position >= self.active_from else 0

    def chain(self, token_ids: list[int]) -> list[int]:
        """Return the K/V of every position, virtual ones first."""
        chain, state = [], kv_seed(self.at(0))
        for position, token_id in enumerate([-2 - i for i in range(self.num_virtual)] + token_ids):
            state = kv_of(state, token_id, self.at(position))
            chain.append(state)
        return chain


def sample_token(chain: list[int], seed: int, output_index: int, *, allows_eos: bool) -> int:
    """Draw the next token from all K/V and (seed, output index) alone."""
    token_id = hash((tuple(chain), seed, output_index)) % VOCAB_SIZE
    return token_id if allows_eos or token_id != EOS_ID else 1


def logprob_of(kv: int, target: int) -> TokenLogprobs:
    """Return the log-probability of `target` after a position."""
    return TokenLogprobs(target, -float(hash((kv, target)) % 1000), [], [])


def hidden_of(kv: int) -> list[float]:
    """Return a position's hidden state; whole numbers, so that sums are exact in any order."""
    return [float(hash((kv, i)) % 1000) for i in range(HIDDEN_SIZE)]


@dataclass(slots=True)
class Expected:
    """What a request must produce when it runs to its end."""

    token_ids: list[int] = field(default_factory=list)
    reason: FinishReason | None = None
    stop_token_id: int | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    vector: list[float] | None = None


def run_alone(command: Submit | Embed, limits: EngineLimits) -> Expected:
    """Run one request alone, without blocks, batches or chunks."""
    toy, prompt = Toy.of(command), command.prompt_token_ids
    if isinstance(command, Embed):
        states = [hidden_of(kv) for kv in toy.chain(prompt)[toy.num_virtual :]]
        if command.pooling == "last":
            return Expected(vector=states[-1])
        return Expected(vector=[sum(column) * (1.0 / len(prompt)) for column in zip(*states, strict=True)])
    expected, params = Expected(), command.sampling
    if params.num_prompt_logprobs is not None:
        chain = toy.chain(prompt)[toy.num_virtual :]
        expected.prompt_logprobs = [logprob_of(chain[i], prompt[i + 1]) for i in range(len(prompt) - 1)]
    output = expected.token_ids
    most = limits.max_sequence_tokens - toy.num_virtual
    while True:
        if len(output) >= params.max_tokens or len(prompt) + len(output) >= most:
            expected.reason = FinishReason.LENGTH
            return expected
        is_late = len(output) >= params.min_tokens
        token_id = sample_token(toy.chain(prompt + output), params.seed, len(output), allows_eos=is_late)
        output.append(token_id)
        ends = token_id in params.stop_token_ids or (token_id in limits.eos_token_ids and not params.ignore_eos)
        if ends and is_late:
            expected.reason, expected.stop_token_id = FinishReason.STOP, token_id
            return expected
