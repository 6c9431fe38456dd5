"""What acts on a sequence beside the base: nothing, one adapter, or a weighted composition, and from which position on.

Owns the one canonical form of it: a composition is sorted by digest, holds no weight of zero, and one adapter of weight
1 is that adapter alone. Invariant: what is equal in effect is equal here, so it shares its prefix blocks and its turn.
"""

import math
from dataclasses import dataclass

from serve.messages import MAX_COMPOSED, MAX_WEIGHT, Embed, Submit


@dataclass(frozen=True, slots=True)
class Acting:
    """Adapters by digest, all of which must be in memory; `weights` is None for one adapter that acts as it is.

    Before position `active_from` the base runs alone.
    """

    digests: tuple[str, ...] = ()
    weights: tuple[float, ...] | None = None
    active_from: int = 0

    @classmethod
    def of(cls, command: Submit | Embed) -> "Acting":
        """Read a command that `problem` finds nothing wrong with."""
        if command.adapter_digest is not None:
            return cls((command.adapter_digest,), None, command.active_from or 0)
        pairs = sorted((digest, weight) for digest, weight in command.adapters if weight != 0.0)
        digests, weights = tuple(digest for digest, _ in pairs), tuple(weight for _, weight in pairs)
        return cls(digests, None if not pairs or weights == (1.0,) else weights)

    @property
    def name(self) -> str | None:
        """Name it among all that can act: None for the base, a digest, or the digests with the exact weights."""
        if self.weights is None:
            return self.digests[0] if self.digests else None
        return "+".join(f"{digest}*{weight.hex()}" for digest, weight in zip(self.digests, self.weights, strict=True))

    @property
    def turn_key(self) -> str | None:
        """Tell whose turn it takes: the adapters', whatever their weights."""
        return "+".join(self.digests) or None

    def __str__(self) -> str:
        if not self.digests:
            return "the base model"
        shown = " + ".join(digest[:12] for digest in self.digests)
        return f"adapter {shown}" if self.weights is None else f"the composition of {shown}"


def problem(command: Submit | Embed) -> str | None:
    """Say why a command's adapters contradict each other; None: they do not."""
    digests = [digest for digest, _ in command.adapters]
    if command.adapters and command.adapter_digest is not None:
        return "a request names one adapter or a composition, not both"
    if len(digests) > MAX_COMPOSED:
        return f"the composition holds {len(digests)} adapters; the limit is {MAX_COMPOSED}"
    if len(set(digests)) != len(digests):
        return "the composition names an adapter twice; add its weights up"
    for digest, weight in command.adapters:
        if not math.isfinite(weight) or abs(weight) > MAX_WEIGHT:
            return f"adapter {digest[:12]} has weight {weight}; weights lie from {-MAX_WEIGHT:g} to {MAX_WEIGHT:g}"
    return _place_problem(command)


def _place_problem(command: Submit | Embed) -> str | None:
    num_virtual, active_from, num_prompt = (
        command.num_virtual_tokens,
        command.active_from,
        len(command.prompt_token_ids),
    )
    if num_virtual < 0 or (num_virtual and command.adapter_digest is None):
        return f"{num_virtual} virtual tokens are no adapter's prompt"
    if active_from is None:
        return None
    if command.adapter_digest is None or num_virtual:
        return "only one adapter without virtual tokens can act from a position on"
    if not 0 <= active_from < num_prompt:
        return f"the adapter would act from position {active_from} of a prompt of {num_prompt} tokens"
    return None
