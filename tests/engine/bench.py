"""An engine on the fake executor with a hand-turned clock, for tests that tell one story each.

Owns the set-up and the record of plans and events; what they must be is the tests' business.
"""

from dataclasses import dataclass
from typing import TypeVar

from serve.engine.engine import Engine
from serve.engine.limits import EngineLimits
from serve.engine.plan import RowResult, StepPlan
from serve.messages import Embed, Event, SamplingParams, Submit, Tokens
from tests.engine.fake_executor import AdapterFile, FakeExecutor
from tests.engine.toy_model import EOS_ID, Toy

CommandT = TypeVar("CommandT", Submit, Embed)
A, B, C = ("a" * 64, "b" * 64, "c" * 64)
LIMITS = EngineLimits(
    num_kv_blocks=64,
    block_size=4,
    max_model_len=200,
    max_num_seqs=8,
    max_step_tokens=16,
    max_waiting=100,
    adapter_device_bytes=100,
    num_adapter_slots=4,
    eos_token_ids=(EOS_ID,),
)


@dataclass(frozen=True, slots=True)
class PlannedRow:
    """What one row of a recorded plan asked for."""

    request_id: str
    start: int
    num_tokens: int
    is_chained: bool


class RecordingExecutor(FakeExecutor):
    """A fake executor that remembers its plans."""

    def __init__(self, limits: EngineLimits, files: dict[str, AdapterFile], *, is_async: bool) -> None:
        super().__init__(limits.num_kv_blocks, limits.block_size, files, is_async=is_async)
        self.plans: list[list[PlannedRow]] = []

    def execute(self, plan: StepPlan) -> list[RowResult]:
        """Record, then run."""
        self._record(plan)
        return super().execute(plan)

    def submit(self, plan: StepPlan) -> None:
        """Record, then begin."""
        self._record(plan)
        super().submit(plan)

    def _record(self, plan: StepPlan) -> None:
        self.plans.append(
            [PlannedRow(row.request_id, row.start, len(row.token_ids), row.is_chained) for row in plan.rows]
        )


class EngineBench:
    """One engine, its executor, its clock, and everything it said."""

    # how the executors of new benches run; the fixture `both_modes` turns it
    is_async = False

    def __init__(self, limits: EngineLimits = LIMITS, files: dict[str, AdapterFile] | None = None) -> None:
        self.limits = limits
        self.files = files if files is not None else {digest: AdapterFile(10) for digest in (A, B, C)}
        self.executor = RecordingExecutor(limits, self.files, is_async=self.is_async)
        self.now_s = 0.0
        self.engine = Engine(limits, self.executor, lambda: self.now_s)
        self.events: dict[str, list[Event]] = {}

    def submit(
        self,
        request_id: str,
        prompt: list[int],
        digest: str | None = None,
        *,
        max_tokens: int = 4,
        sampling: SamplingParams | None = None,
        priority: int = 0,
        group_id: str = "",
        cold_start: str = "wait",
        adapters: tuple[tuple[str, float], ...] = (),
        num_virtual_tokens: int = 0,
        active_from: int | None = None,
        tenant: str = "",
        tenant_weight: float = 1.0,
    ) -> Submit:
        """Send one request; without `sampling` it runs to exactly `max_tokens`."""
        params = sampling or SamplingParams(max_tokens=max_tokens, seed=1, ignore_eos=True)
        command = Submit(
            request_id,
            prompt,
            params,
            digest,
            "",
            priority,
            group_id,
            cold_start,
            adapters,
            num_virtual_tokens,
            active_from,
            tenant,
            tenant_weight,
        )
        return self._send(command)

    def embed(
        self,
        request_id: str,
        prompt: list[int],
        pooling: str,
        digest: str | None = None,
        *,
        num_virtual_tokens: int = 0,
        cache_salt: str = "",
        cold_start: str = "wait",
    ) -> Embed:
        """Send one embedding request."""
        return self._send(
            Embed(
                request_id,
                prompt,
                pooling,
                digest,
                num_virtual_tokens=num_virtual_tokens,
                cache_salt=cache_salt,
                cold_start=cold_start,
            )
        )

    def _send(self, command: CommandT) -> CommandT:
        self.executor.toys[command.request_id] = Toy.of(command)
        self.engine.handle(command)
        return command

    def step(self, num_steps: int = 1) -> None:
        """Advance the clock by a second per step, and check the books after each."""
        for _ in range(num_steps):
            self.now_s += 1.0
            for event in self.engine.step():
                self.events.setdefault(event.request_id, []).append(event)  # type: ignore[union-attr]
            self.engine.check_invariants()

    def drain(self, max_steps: int = 2000) -> None:
        """Step until the engine rests."""
        for _ in range(max_steps):
            if not self.engine.has_work():
                return
            self.step()
        raise AssertionError(f"the engine does not rest after {max_steps} steps")

    def tokens(self, request_id: str) -> list[int]:
        """Return a request's output so far."""
        events = self.events.get(request_id, [])
        return [token_id for event in events if isinstance(event, Tokens) for token_id in event.token_ids]

    def end(self, request_id: str) -> Event:
        """Return a request's last event."""
        return self.events[request_id][-1]

    def num_computed(self, request_id: str) -> int:
        """Count the tokens that were run for a request, in all steps."""
        return sum(row.num_tokens for plan in self.executor.plans for row in plan if row.request_id == request_id)
