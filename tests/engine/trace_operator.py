"""The operator of a random trace: pins, unpins and evicts, and checks what the engine makes of it.

Owns a book of its own, kept from commands and answers alone; the device's word counts for what is in memory.
"""

import random
from dataclasses import dataclass, field

from serve.adapter_messages import AdapterDone, EvictAdapter, PinAdapter, UnpinAdapter
from serve.engine.engine import Engine
from serve.messages import Event, Failed, Stats
from tests.engine.fake_executor import FakeExecutor

KINDS: tuple[type[PinAdapter | UnpinAdapter | EvictAdapter], ...] = (PinAdapter, UnpinAdapter, EvictAdapter)


@dataclass(slots=True)
class TraceOperator:
    """What was asked, and what must hold because of it."""

    rng: random.Random
    engine: Engine
    executor: FakeExecutor
    asked: PinAdapter | UnpinAdapter | EvictAdapter | None = None
    pinned: set[str] = field(default_factory=set)
    # pinned and in memory when it was last looked at
    held_before: set[str] = field(default_factory=set)
    num_bytes: int = 0

    def act(self, digest: str) -> None:
        """Give one command; the next step must bring its answer."""
        self.asked = self.rng.choice(KINDS)("operator", digest)
        self.engine.handle(self.asked)

    def saw(self, event: Event) -> bool:
        """Take an event if it is the answer to the operator."""
        if not isinstance(event, AdapterDone | Failed) or event.request_id != "operator":
            return False
        command, self.asked = self.asked, None
        assert command is not None, "one command was answered twice"
        if isinstance(event, Failed):
            assert not isinstance(command, UnpinAdapter) and event.http_status in (409, 503), event
        elif isinstance(command, PinAdapter):
            self.pinned.add(command.digest)
        elif isinstance(command, UnpinAdapter):
            self.pinned.discard(command.digest)
        else:
            assert command.digest not in self.pinned, "a pinned adapter was evicted"
        return True

    def judge(self) -> Stats:
        """Check after a step, and return the heartbeat: pins stay, what they hold stays, and bytes add up."""
        assert self.asked is None, "a command of the operator was not answered"
        stats, loaded = self.engine.stats(), self.executor.loaded
        pins = {pin.digest: pin.error for pin in stats.operator_pins}
        assert pins.keys() == self.pinned, f"pinned are {pins.keys()}, asked for were {self.pinned}"
        held = {digest for digest, error in pins.items() if error is None}
        # what was dropped and pinned since is on its way back
        gone = (self.held_before & held) - loaded
        assert not gone, f"{gone} were pinned and in memory, and were dropped"
        self.held_before = held & loaded
        moves = [move for move in stats.adapter_moves if move.tier == "device"]
        self.num_bytes += sum(move.num_bytes * (1 if move.kind == "load" else -1) for move in moves)
        assert self.num_bytes == sum(state.num_bytes for state in stats.adapters if state.tier == "device"), (
            "adapter bytes that came and went do not add up"
        )
        return stats

    def judge_rest(self) -> Stats:
        """Check that at rest whatever can be held is."""
        stats = self.judge()
        held = {pin.digest for pin in stats.operator_pins if pin.error is None}
        assert held <= self.executor.loaded, f"{held - self.executor.loaded} are pinned and not in memory"
        assert not any(state.is_leaving for state in stats.adapters), "an eviction was never carried out"
        return stats
