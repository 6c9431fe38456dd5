"""What the engine's heartbeats said, across its restarts.

Owns the sums. Invariants: counters never fall, also when the engine starts again; gauges are 0 while it is gone.
"""

from collections import Counter

from serve.messages import Stats
from serve.metrics.names import COUNTERS


class EngineView:
    """The last heartbeat, and the totals of all."""

    def __init__(self) -> None:
        self.stats: Stats | None = None
        self.totals = dict.fromkeys((field for _, _, field in COUNTERS), 0)
        # per tier of memory: adapters that left it by cause, and bytes that came ("in") and went ("out")
        self.drops: Counter[tuple[str, str]] = Counter()
        self.swap_bytes: Counter[tuple[str, str]] = Counter()

    def take(self, stats: Stats) -> None:
        """Add one heartbeat."""
        before = self.stats
        for field in self.totals:
            value = getattr(stats, field)
            last = 0 if before is None else getattr(before, field)
            # a fall is an engine that was restarted between two heartbeats
            self.totals[field] += value - last if value >= last else value
        for move in stats.adapter_moves:
            self.swap_bytes[move.tier, "in" if move.kind == "load" else "out"] += move.num_bytes
            if move.kind != "load":
                self.drops[move.tier, move.kind] += 1
        self.stats = stats
