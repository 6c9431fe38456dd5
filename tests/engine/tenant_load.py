"""Random loads of several tenants on one engine, and who was served what, counted beside the engine's own books.

Owns the generation and the measures; the tests own the bounds. A tenant keeps a number of requests open, so it is
backlogged but for pauses; some spread theirs over many adapters. Service is counted from what was executed: the input
tokens that a request's rows ran, and the tokens that came back. Invariant: a load depends on its seed alone.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import combinations

from serve.engine.admission import MAX_PASSES
from serve.engine.sequence import Sequence
from serve.engine.virtual_tokens import INPUT_PRICE, OUTPUT_PRICE
from serve.messages import LoadAdapter, Submit, Tokens
from tests.engine.bench import LIMITS, EngineBench
from tests.engine.fake_executor import AdapterFile

# blocks are looked at once in so many steps: the traces do it after every one
STEPS_PER_CHECK = 32
MAX_INPUT, MAX_OUTPUT = 24, 24
MAX_POLLS = 4


# a tenant, or what acts for one of its requests; None: the base
Rival = str | tuple[str, str | None]


@dataclass(slots=True)
class Tenant:
    """What one tenant sends, and how many requests it keeps open."""

    name: str
    weight: float
    # None: the base
    adapters: list[str | None]
    num_open: int
    max_input: int
    max_output: int
    # chance per step that it sends nothing for a while
    pause: float
    paused_until: int = 0
    open_ids: set[str] = field(default_factory=set)


def _tenants(rng: random.Random, *, max_adapters: int) -> list[Tenant]:
    """Draw two to five tenants; the first has one adapter, the second as many as there may be."""
    tenants, number = [], 0
    for index in range(rng.randint(2, 5)):
        num_adapters = (1, max_adapters)[index] if index < 2 else rng.randint(1, 3)
        digests: list[str | None] = [f"{number + i:064x}" for i in range(num_adapters)]
        number += num_adapters
        tenants.append(
            Tenant(
                name=f"t{index}",
                weight=rng.choice((1.0, 1.0, 0.5, 2.0, 3.0)),
                adapters=[None] if index > 1 and rng.random() < 0.3 else digests,
                num_open=rng.randint(6, 12) + num_adapters,
                max_input=rng.choice((2, 8, MAX_INPUT)),
                max_output=rng.choice((1, 4, MAX_OUTPUT)),
                pause=rng.choice((0.0, 0.0, 0.01)),
            )
        )
    return tenants


class TenantLoad:
    """One seeded run. With `slots_are_scarce` adapters come and go; else all of them are loaded before it begins."""

    def __init__(self, seed: int, *, is_async: bool = False, slots_are_scarce: bool = False) -> None:
        self.rng = rng = random.Random(seed)
        self.tenants = _tenants(rng, max_adapters=rng.choice((4, 8)))
        digests = sorted({digest for tenant in self.tenants for digest in tenant.adapters if digest})
        limits = replace(
            LIMITS,
            num_kv_blocks=rng.choice((24, 48, 200)),
            max_model_len=MAX_INPUT + MAX_OUTPUT,
            max_num_seqs=rng.randint(2, 6),
            max_step_tokens=rng.choice((8, 16, 32)),
            max_waiting=1000,
            adapter_device_bytes=10**6,
            num_adapter_slots=rng.randint(1, 3) if slots_are_scarce else max(1, len(digests)),
            enable_prefix_cache=rng.random() < 0.3,
        )
        files = {digest: AdapterFile(10, num_polls=rng.randint(1, MAX_POLLS)) for digest in digests}
        self.bench = EngineBench(limits, files)
        self.bench.executor.is_async = is_async
        if slots_are_scarce:
            # nothing but the scheduler itself ever frees a slot
            self.tenants = [replace(tenant, pause=0.0) for tenant in self.tenants]
        self.num_steps = 0
        # priced tokens by tenant and what acted
        self.service: defaultdict[tuple[str, str | None], float] = defaultdict(float)
        self._sent: dict[str, tuple[Tenant, Submit]] = {}
        self._is_started: set[str] = set()
        self._num_sent: Counter[str] = Counter()
        if not slots_are_scarce:
            self._load(digests)

    @property
    def longest_price(self) -> float:
        """Return U of the theorem: the most that one tenant's running requests can be charged at once."""
        limits, longest_input = self.bench.limits, max(tenant.max_input for tenant in self.tenants)
        longest = max(tenant.max_input + tenant.max_output for tenant in self.tenants)
        num_running_tokens = min(limits.max_num_seqs * longest, limits.num_kv_blocks * limits.block_size)
        return max(INPUT_PRICE * longest_input, OUTPUT_PRICE * num_running_tokens)

    @property
    def longest_wait(self) -> float:
        """Return what may be served while the first of a tenant's adapter waits: its turn, passes and drains."""
        limits, weights = self.bench.limits, [tenant.weight for tenant in self.tenants]
        num_queues = sum(len(tenant.adapters) for tenant in self.tenants)
        longest_input = max(tenant.max_input for tenant in self.tenants)
        longest_output = max(tenant.max_output for tenant in self.tenants)
        ratio, num_tenants = max(weights) / min(weights), len(weights)
        turn = 2 * self.longest_price * ratio
        passes = MAX_PASSES * (INPUT_PRICE * longest_input + OUTPUT_PRICE * longest_output)
        # the running ones end, one adapter is loaded; meanwhile only the base's requests may come
        num_drain_steps = longest_output + -(-limits.max_num_seqs * longest_input // limits.max_step_tokens) + MAX_POLLS
        drain = num_drain_steps * (INPUT_PRICE * limits.max_step_tokens + OUTPUT_PRICE * limits.max_num_seqs)
        held_up = passes + num_queues * drain
        # each other tenant may have been held up as long before, and then catches up
        return (num_queues + num_tenants) * turn + held_up + (num_tenants - 1) * held_up * ratio

    def waiting(self) -> list[Sequence]:
        """Return the sequences that wait for admission."""
        return list(self.bench.engine._scheduler.live.waiting)

    def tenant_of(self, request_id: str) -> str:
        """Return who sent a request."""
        return self._sent[request_id][0].name

    def service_of(self, tenant: str) -> float:
        """Return the priced tokens that a tenant was served."""
        return sum(tokens for (name, _), tokens in self.service.items() if name == tenant)

    def step(self) -> None:
        """Let the tenants send, run one step, and count who was served what."""
        for tenant in self.tenants:
            if self.rng.random() < tenant.pause:
                tenant.paused_until = self.num_steps + self.rng.randint(20, 200)
            while len(tenant.open_ids) < tenant.num_open and tenant.paused_until <= self.num_steps:
                self._send(tenant)
        self.num_steps += 1
        events = self.bench.engine.step()
        if self.num_steps % STEPS_PER_CHECK == 0:
            self.bench.engine.check_invariants()
        self._count_input()
        for event in events:
            tenant, submit = self._sent[event.request_id]  # type: ignore[union-attr]
            if isinstance(event, Tokens):
                self.service[tenant.name, submit.adapter_digest] += OUTPUT_PRICE * len(event.token_ids)
            elif not hasattr(event, "num_cached_tokens"):
                tenant.open_ids.discard(event.request_id)  # type: ignore[union-attr]

    def _send(self, tenant: Tenant) -> None:
        rng = self.rng
        # every adapter in turn, so that each has someone waiting
        adapter = tenant.adapters[self._num_sent[tenant.name] % len(tenant.adapters)]
        request_id = f"{tenant.name}.{self._num_sent[tenant.name]}"
        self._num_sent[tenant.name] += 1
        prompt = [rng.randrange(1, 16) for _ in range(rng.randint(1, tenant.max_input))]
        submit = self.bench.submit(
            request_id,
            prompt,
            adapter,
            max_tokens=rng.randint(1, tenant.max_output),
            tenant=tenant.name,
            tenant_weight=tenant.weight,
        )
        tenant.open_ids.add(request_id)
        self._sent[request_id] = (tenant, submit)

    def _count_input(self) -> None:
        """Count a request's input when its first row is executed, from where its prefix hit ends."""
        for plan in self.bench.executor.plans:
            for row in plan:
                if row.request_id not in self._is_started:
                    self._is_started.add(row.request_id)
                    tenant, submit = self._sent[row.request_id]
                    num_input = len(submit.prompt_token_ids) - row.start
                    self.service[tenant.name, submit.adapter_digest] += INPUT_PRICE * num_input
        self.bench.executor.plans.clear()

    def _load(self, digests: list[str]) -> None:
        for digest in digests:
            self.bench.engine.handle(LoadAdapter(digest))
        while self.bench.engine.has_work():
            self.bench.engine.step()
        assert len(self.bench.executor.loaded) == len(digests)


class ServiceGaps:
    """The largest gap of service between rivals, over intervals in which both have someone waiting.

    Rivals are any two tenants, per weight, and any two adapters of one tenant.
    """

    def __init__(self, load: TenantLoad) -> None:
        self._load = load
        self._weights = {tenant.name: tenant.weight for tenant in load.tenants}
        # of each pair that waits now: the smallest and the largest lead of the first since both wait
        self._leads: dict[tuple[Rival, Rival], tuple[float, float]] = {}
        # tokens, of a tenant of the smallest weight
        self.widest = 0.0

    def look(self) -> None:
        """Take one step into account."""
        waiting = {(self._load.tenant_of(seq.request_id), seq.acting.name) for seq in self._load.waiting()}
        tenants = sorted({tenant for tenant, _ in waiting})
        pairs: list[tuple[Rival, Rival]] = list(combinations(tenants, 2))
        for tenant in tenants:
            pairs += combinations(sorted((rival for rival in waiting if rival[0] == tenant), key=str), 2)
        self._leads = {pair: self._widened(pair, self._served(pair[0]) - self._served(pair[1])) for pair in pairs}
        self.widest = max([self.widest, *(high - low for low, high in self._leads.values())])

    def _served(self, rival: Rival) -> float:
        if isinstance(rival, str):
            return self._load.service_of(rival) * min(self._weights.values()) / self._weights[rival]
        return self._load.service[rival]

    def _widened(self, pair: tuple[Rival, Rival], lead: float) -> tuple[float, float]:
        low, high = self._leads.get(pair, (lead, lead))
        return min(low, lead), max(high, lead)


def widest_gap(seed: int, num_steps: int, *, is_async: bool) -> Iterator[tuple[float, float]]:
    """Run one load with every adapter in memory; yield the widest gap so far and the bound, after each step."""
    load = TenantLoad(seed, is_async=is_async)
    gaps, bound = ServiceGaps(load), 2 * load.longest_price
    for _ in range(num_steps):
        load.step()
        gaps.look()
        yield gaps.widest, bound


class HeadWaits:
    """How much everybody is served while one sequence is the first of its tenant's adapter and waits."""

    def __init__(self) -> None:
        # of each head that waits now: what all had been served when it became one
        self._since: dict[str, float] = {}
        self.longest = 0.0

    def look(self, load: TenantLoad) -> None:
        """Take one step into account."""
        heads: dict[tuple[str, str | None], Sequence] = {}
        for seq in load.waiting():
            key = (load.tenant_of(seq.request_id), seq.acting.name)
            if key not in heads or seq.arrival_index < heads[key].arrival_index:
                heads[key] = seq
        total = sum(load.service.values())
        self._since = {seq.request_id: self._since.get(seq.request_id, total) for seq in heads.values()}
        self.longest = max([self.longest, *(total - since for since in self._since.values())])


def longest_wait(seed: int, num_steps: int, *, is_async: bool) -> Iterator[tuple[float, float]]:
    """Run one load whose adapters come and go; yield the longest wait of a head so far and the bound, in tokens."""
    load, waits = TenantLoad(seed, is_async=is_async, slots_are_scarce=True), HeadWaits()
    bound = load.longest_wait
    for _ in range(num_steps):
        load.step()
        waits.look(load)
        yield waits.longest, bound
