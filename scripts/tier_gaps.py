"""Gaps between the tokens of warm streams, beside nothing, beside a warm client and beside one over cold adapters.

Owns the rounds: each holds a slice of every mode, in changing order, so that the machine's moods hit all alike, and how
much of the processors went to others meanwhile. Invariant: a round in which others took more than was allowed is
measured again and counted as disturbed; no slice is left out for what its gaps are.
"""

import asyncio
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from scripts.tier_clients import FirstToken, Warm, ask_until, first_token, stream_until

MODES = ("alone", "one more warm client", "one client over cold adapters")
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Gaps:
    """Gaps between tokens of all warm streams in one mode, milliseconds; p50 and p99 also as they were in each round.

    `num_others`: single tokens that the other client got meanwhile.
    """

    mode: str
    count: int
    p50: float
    p90: float
    p99: float
    num_others: int
    p50_of_rounds: list[float]
    p99_of_rounds: list[float]


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure: warm streams on the first `num_warm` names, rounds and seconds of each slice.

    `pids`: whose processor time is not the others'; `max_foreign`: the share of all cores that others may take.
    """

    port: int
    names: list[str]
    num_warm: int
    num_rounds: int
    slice_s: float
    pids: list[int]
    max_foreign: float


@dataclass(slots=True)
class Measured:
    """What was seen: per mode and good round the gaps in ms; all cold requests; what was disturbed."""

    gaps: dict[str, list[list[float]]] = field(default_factory=lambda: {mode: [] for mode in MODES})
    num_asked: dict[str, int] = field(default_factory=lambda: dict.fromkeys(MODES, 0))
    cold: list[FirstToken] = field(default_factory=list)
    foreign: list[float] = field(default_factory=list)
    num_disturbed: int = 0

    def summary(self) -> list[Gaps]:
        """Sum up each mode."""
        return [self._of(mode) for mode in MODES]

    def _of(self, mode: str) -> Gaps:
        rounds = self.gaps[mode]
        together = [gap for gaps in rounds for gap in gaps]
        p50, p90, p99 = (round(quantile(together, share), 1) for share in (0.5, 0.9, 0.99))
        by_round = [[round(quantile(gaps, share), 1) for gaps in rounds] for share in (0.5, 0.99)]
        return Gaps(mode, len(together), p50, p90, p99, self.num_asked[mode], *by_round)

    def rises(self) -> dict[str, float]:
        """Percent by which each mode's p50 and p99 exceed those of `alone`: of all gaps, and median over rounds."""
        alone, *others = self.summary()
        found = {}
        for other in others:
            for name, ours, base in (
                ("p50", other.p50, alone.p50),
                ("p99", other.p99, alone.p99),
                ("p99, median of rounds", median(other.p99_of_rounds), median(alone.p99_of_rounds)),
            ):
                found[f"{other.mode}: {name}"] = round(100 * (ours / base - 1), 1)
        return found


async def measure(plan: Plan) -> Measured:
    """Run the rounds, with at most as many disturbed ones again."""
    warm, cold = plan.names[: plan.num_warm], plan.names[plan.num_warm :]
    for name in warm:
        await first_token(plan.port, name, seed=1)
    others: dict[str, list[str]] = {MODES[0]: [], MODES[1]: warm, MODES[2]: cold}
    stop, found = asyncio.Event(), Measured()
    tables = [Warm() for _ in warm]
    streams = [
        asyncio.create_task(stream_until(plan.port, name, stop, seed, tables[seed])) for seed, name in enumerate(warm)
    ]
    await asyncio.sleep(plan.slice_s)
    for number in range(2 * plan.num_rounds):
        if len(found.foreign) == plan.num_rounds:
            break
        await _round(plan, number, others, tables, found)
    stop.set()
    await asyncio.gather(*streams)
    return found


async def _round(plan: Plan, number: int, others: dict[str, list[str]], tables: list[Warm], found: Measured) -> None:
    gaps: dict[str, list[float]] = {}
    asked: dict[str, list[FirstToken]] = {}
    before = _Times.read(plan.pids)
    # each mode comes first, second and last equally often
    for place, mode in enumerate((MODES * 2)[number % 3 : number % 3 + 3]):
        begin = time.perf_counter()
        asked[mode] = await _slice(plan, others[mode], seed=7 * (3 * number + place))
        end = begin + plan.slice_s
        gaps[mode] = [1000 * gap for table in tables for at_s, gap in table.gaps if begin <= at_s < end]
    foreign = _Times.read(plan.pids).foreign_since(before)
    if foreign > plan.max_foreign:
        found.num_disturbed += 1
        return
    found.foreign.append(round(foreign, 4))
    for mode in MODES:
        found.gaps[mode].append(gaps[mode])
        found.num_asked[mode] += len(asked[mode])
    found.cold += asked[MODES[2]]


async def _slice(plan: Plan, models: list[str], seed: int) -> list[FirstToken]:
    done = asyncio.Event()
    asking = asyncio.create_task(ask_until(plan.port, models, done, seed)) if models else None
    await asyncio.sleep(plan.slice_s)
    done.set()
    return [] if asking is None else await asking


@dataclass(frozen=True, slots=True)
class _Times:
    """Seconds of processor time since the machine's and the processes' start."""

    at_s: float
    busy_s: float
    own_s: float

    @classmethod
    def read(cls, pids: list[int]) -> "_Times":
        fields = [int(word) for word in Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]]
        # all but idle and waiting for disks; time that the hypervisor took is somebody else's too
        busy = sum(fields) - fields[3] - fields[4]
        own = sum(_ticks(pid) for pid in [os.getpid(), *pids])
        return cls(time.perf_counter(), busy / _TICKS_PER_S, own / _TICKS_PER_S)

    def foreign_since(self, before: "_Times") -> float:
        """Return the share of all cores that went to others."""
        foreign_s = (self.busy_s - before.busy_s) - (self.own_s - before.own_s)
        return foreign_s / (self.at_s - before.at_s) / (os.cpu_count() or 1)


def _ticks(pid: int) -> int:
    # behind the command's name, which may hold anything
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(") ")[2].split()
    return int(fields[11]) + int(fields[12])


def quantile(values: list[float], share: float) -> float:
    """Return the smallest value that so large a share of them does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")
