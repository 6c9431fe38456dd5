"""What serves a request: the base alone, one adapter, or a composition; and what the engine is told of it per prompt.

Owns the value, not the reading of names (`selection`). Invariants: a digest is the only identity that leaves here; an
adapter that waits for its invocation tokens acts from their last occurrence on, and without them not at all, as PEFT's
aLoRA does.
"""

from dataclasses import dataclass

from adapters_store.store import AdapterRef
from serve.messages import Started


@dataclass(frozen=True, slots=True)
class Share:
    """One adapter of a composition and its weight."""

    adapter: AdapterRef
    weight: float


@dataclass(frozen=True, slots=True)
class Acts:
    """The fields of `Submit` and `Embed` that say what acts on one prompt."""

    adapter_digest: str | None = None
    adapters: tuple[tuple[str, float], ...] = ()
    num_virtual_tokens: int = 0
    active_from: int | None = None


@dataclass(frozen=True, slots=True)
class Target:
    """`adapter` alone, `shares` composed, or with neither the base. `model` is the client's own spelling.

    A base that answers because the client asked for it while adapters are cold names those in `stands_in_for`.
    """

    model: str
    adapter: AdapterRef | None
    shares: tuple[Share, ...] = ()
    stands_in_for: tuple[AdapterRef, ...] = ()

    @property
    def adapters(self) -> tuple[AdapterRef, ...]:
        """Return the adapters that were chosen, in the client's order."""
        return tuple(share.adapter for share in self.shares) if self.adapter is None else (self.adapter,)

    @property
    def digests(self) -> tuple[str, ...]:
        """Return the adapters as the engine knows them."""
        return tuple(ref.digest for ref in self.adapters)

    @property
    def identity(self) -> str:
        """Name what acts, whatever the order in which a composition was written."""
        if self.shares:
            return "+".join(sorted(f"{share.adapter.digest}*{share.weight.hex()}" for share in self.shares))
        return "base" if self.adapter is None else self.adapter.digest

    @property
    def num_virtual_tokens(self) -> int:
        """Positions of the context that the adapter's own prompt takes."""
        return 0 if self.adapter is None else self.adapter.num_virtual_tokens

    def acts_on(self, prompt_ids: list[int]) -> Acts:
        """Say what acts on a prompt, and from where on."""
        if self.adapter is None:
            return Acts(adapters=tuple((share.adapter.digest, share.weight) for share in self.shares))
        if not self.adapter.invocation_tokens:
            return Acts(self.adapter.digest, num_virtual_tokens=self.adapter.num_virtual_tokens)
        active_from = last_occurrence(prompt_ids, self.adapter.invocation_tokens)
        return Acts() if active_from is None else Acts(self.adapter.digest, active_from=active_from)

    def headers(self, started: Started | None = None) -> dict[str, str]:
        """Return the headers that name the adapters and what their load has cost this request."""
        refs = self.adapters
        if not refs:
            return {"x-adapter-cold-start": "base"} if self.stands_in_for else {}
        headers = {
            "x-adapter-id": ",".join(ref.name for ref in refs),
            "x-adapter-version": ",".join(str(ref.version) for ref in refs),
            "x-adapter-digest": ",".join(f"sha256:{ref.digest}" for ref in refs),
        }
        if self.shares:
            headers["x-adapter-weight"] = ",".join(f"{share.weight:g}" for share in self.shares)
        if started is not None:
            headers["x-adapter-cold-start-ms"] = str(round(started.adapter_load_s * 1000))
        return headers


def last_occurrence(token_ids: list[int], wanted: tuple[int, ...]) -> int | None:
    """Return where `wanted` begins for the last time; None: nowhere."""
    first, needle = wanted[0], list(wanted)
    for start in range(len(token_ids) - len(wanted), -1, -1):
        if token_ids[start] == first and token_ids[start : start + len(wanted)] == needle:
            return start
    return None
