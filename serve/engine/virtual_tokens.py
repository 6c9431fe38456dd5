"""What tenants, and the adapters inside each tenant, were served: virtual token counters in two levels.

Owns the prices and the counters; the line that they order is `fairness`. Tenants compete by tokens per weight, and the
adapters of one tenant compete for its share only, so a tenant that multiplies adapters gains nothing.
Invariants: a key is charged for what was computed and loaded for it, never for waiting; at both levels a key that
returns to the line starts level with the least served one there, so idle time earns no credit; idle keys are bounded in
number, and forgetting one gives it no credit either: it returns at the floor, which lies no lower than what it had.
Source: virtual token counter after Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024), algorithm 2.
"""

from collections import Counter
from typing import Generic, NamedTuple, TypeVar

from serve.engine.acting import Acting
from serve.messages import Embed, Submit

# an output token costs about twice an input token: it is a step of its own
INPUT_PRICE = 1
OUTPUT_PRICE = 2
# a load takes a slot and bandwidth from others, whatever its size; docs/architecture.md says why this much
LOAD_PRICE = 32
# counters kept of keys that do not wait, at most
MAX_IDLE_TENANTS = 1024
MAX_IDLE_ADAPTERS = 256

# an adapter's digest, the digests of a composition, or None for the base
Adapters = str | None
Key = TypeVar("Key", str, Adapters)


class Payer(NamedTuple):
    """Who is charged: a tenant, and inside it what acts. `weight` is the tenant's part relative to others' 1."""

    tenant: str
    adapters: Adapters
    weight: float = 1.0

    @classmethod
    def of(cls, command: Submit | Embed) -> "Payer":
        """Read a command in which nothing contradicts itself."""
        return cls(command.tenant, Acting.of(command).turn_key, command.tenant_weight)


class Level(Generic[Key]):
    """Keys that compete with each other: priced tokens of each, and who of them waits."""

    def __init__(self, max_idle: int) -> None:
        self._max_idle = max_idle
        self._tokens: dict[Key, float] = {}
        # no counter that matters lies below this
        self._floor = 0.0
        self._num_waiting: Counter[Key] = Counter()
        # whose last sequence left the line most recently: the rival of a key that finds the line empty
        self._last_left: tuple[Key, ...] = ()

    def __getitem__(self, key: Key) -> float:
        return self._tokens.get(key, self._floor)

    def __contains__(self, key: Key) -> bool:
        return key in self._tokens

    def __len__(self) -> int:
        return len(self._tokens)

    def charge(self, key: Key, price: float) -> None:
        """Count what `key` was served."""
        try:
            self._tokens[key] += price
        except KeyError:
            self._tokens[key] = self._floor + price
            self._forget_idle()

    def join(self, key: Key) -> None:
        """Count a sequence that joins the line; its key, if it is new there, is lifted to the least served one."""
        if key not in self._num_waiting:
            rivals = self._num_waiting or self._last_left
            self._floor = max(self._floor, min((self[rival] for rival in rivals), default=self._floor))
            self._tokens[key] = max(self[key], self._floor)
        self._num_waiting[key] += 1
        self._forget_idle()

    def leave(self, key: Key) -> None:
        """Give `join` back."""
        self._num_waiting[key] -= 1
        if not self._num_waiting[key]:
            del self._num_waiting[key]
            self._last_left = (key,)
            self._forget_idle()

    def check_invariants(self, waiting: Counter[Key]) -> None:
        """Compare with who waits."""
        assert self._num_waiting == waiting, f"{self._num_waiting} wait by the counters, {waiting} in the line"
        assert waiting.keys() <= self._tokens.keys(), "a waiting key has no counter"
        assert len(self._tokens) <= len(waiting) + self._max_idle, f"{len(self._tokens)} counters are kept"

    def _forget_idle(self) -> None:
        """Keep the number of idle keys bounded: those at the floor go first, then the least served, raising it."""
        if len(self._tokens) - len(self._num_waiting) <= self._max_idle:
            return
        idle = sorted((count, place, key) for place, (key, count) in enumerate(self._idle()) if count > self._floor)
        # half of them stay, so that this is rare
        dropped = idle[: -(self._max_idle // 2)] if len(idle) > self._max_idle else []
        self._floor = dropped[-1][0] if dropped else self._floor
        kept = {key: count for count, _, key in idle[len(dropped) :]}
        self._tokens = {key: self._tokens[key] for key in self._num_waiting} | kept

    def _idle(self) -> list[tuple[Key, float]]:
        return [(key, count) for key, count in self._tokens.items() if key not in self._num_waiting]


class ServedTokens:
    """The counters of all tenants, and in each tenant of its adapters."""

    def __init__(self) -> None:
        self._tenants: Level[str] = Level(MAX_IDLE_TENANTS)
        self._adapters: dict[str, Level[Adapters]] = {}

    def of_tenant(self, tenant: str) -> float:
        """Return what a tenant was served, in priced tokens per weight."""
        return self._tenants[tenant]

    def of_adapters(self, payer: Payer) -> float:
        """Return what a tenant's adapters were served, in priced tokens; comparable inside the tenant only."""
        return self._adapters_of(payer.tenant)[payer.adapters]

    def charge(self, payer: Payer, *, num_input: int = 0, num_output: int = 0, num_loads: int = 0) -> None:
        """Count tokens that were computed and adapters that were loaded for `payer`, at both levels."""
        price = INPUT_PRICE * num_input + OUTPUT_PRICE * num_output + LOAD_PRICE * num_loads
        self._tenants.charge(payer.tenant, price / payer.weight)
        self._adapters_of(payer.tenant).charge(payer.adapters, price)

    def join(self, payer: Payer) -> None:
        """Count a sequence that joins the line."""
        self._tenants.join(payer.tenant)
        self._adapters_of(payer.tenant).join(payer.adapters)

    def leave(self, payer: Payer) -> None:
        """Give `join` back."""
        self._adapters_of(payer.tenant).leave(payer.adapters)
        self._tenants.leave(payer.tenant)

    def check_invariants(self, waiting: Counter[tuple[str, Adapters]]) -> None:
        """Compare both levels with the (tenant, adapters) of the sequences that wait."""
        by_tenant: dict[str, Counter[Adapters]] = {}
        for (tenant, adapters), number in waiting.items():
            by_tenant.setdefault(tenant, Counter())[adapters] += number
        self._tenants.check_invariants(Counter({tenant: sum(keys.values()) for tenant, keys in by_tenant.items()}))
        assert by_tenant.keys() <= self._adapters.keys(), "a waiting tenant has no counters of adapters"
        for tenant, level in self._adapters.items():
            level.check_invariants(by_tenant.get(tenant, Counter()))

    def _adapters_of(self, tenant: str) -> Level[Adapters]:
        try:
            return self._adapters[tenant]
        except KeyError:
            # a forgotten tenant's adapters go with it
            self._adapters = {known: level for known, level in self._adapters.items() if known in self._tenants}
            return self._adapters.setdefault(tenant, Level(MAX_IDLE_ADAPTERS))
