"""The campaign: thousands of adapters over small budgets, many clients, changes all the time, every answer judged.

Owns the order: make adapters, start the server, read what it holds, send, delete everything, read again, report.
Invariant: nothing is excused: a campaign is clean only without a complaint and with everything given back.
"""

import asyncio
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from urllib.parse import urlsplit

from tests.campaign.adapters import Adapter, Workshop
from tests.campaign.catalog import Catalog, percentiles
from tests.campaign.changes import Publisher
from tests.campaign.clients import Client, Tally
from tests.campaign.plan import MAX_TOKENS, PROMPTS, Plan
from tests.campaign.resources import Held, busy, differences, held, settled, unlogged, wait_for_rest
from tests.campaign.solo import SoloModel
from tests.campaign.wire import Wire
from tests.live_server import LiveServer, start_server, stop_server
from tests.tiny_model import write_tiny_model

_BASE = "tiny"
_NUM_PUBLISHERS = 2


@dataclass(frozen=True, slots=True)
class Scale:
    """How large a campaign is."""

    num_adapters: int
    num_requests: int
    num_clients: int = 64
    # before the first reading: enough for every thread of the server's pools to have been started
    num_warm_up: int = 192
    # a publication or deletion after every so many requests
    changes_every: int = 100
    seed: int = 1
    server_options: tuple[str, ...] = ()
    # how long a client waits for the end of an answer; longer is a complaint
    answer_timeout_s: float = 120.0
    # how long after its last request the server may take to come to rest
    rest_timeout_s: float = 120.0
    # what is run as the server; tests plant bugs in theirs
    module: str = "serve"

    @property
    def num_changes(self) -> int:
        """Changes in all."""
        return self.num_requests // self.changes_every


@dataclass(frozen=True, slots=True)
class Report:
    """What came of it; `complaints` is empty for a clean one."""

    scale: Scale
    outcomes: dict[str, int]
    changes: dict[str, int]
    complaints: list[str]
    seconds: float
    request_s: dict[str, float]
    num_cold: int
    before: Held
    after: Held
    series: dict[str, float]


# told how many requests are done
Progress = Callable[[str, int, int], None]


def run_campaign(folder: Path, scale: Scale, on_progress: Progress = lambda stage, done, total: None) -> Report:
    """Run one campaign in an empty folder; takes the server down again whatever happens."""
    model_dir = write_tiny_model(folder / _BASE)
    solo = SoloModel(model_dir, PROMPTS, MAX_TOKENS)
    base_answers = solo.answers(None)
    assert base_answers is not None, "the base's own answers are too close to call"
    catalog = Catalog(base_answers)
    names = [f"voice-{index:04d}" for index in range(scale.num_adapters)]
    workshop = Workshop(folder, model_dir, solo, scale.seed)
    store_dir = folder / "store"
    for index, adapter in enumerate(workshop.register(store_dir, names)):
        change = catalog.begin(names[index], adapter.digest, 0.0)
        catalog.learn(adapter.digest, adapter.answers)
        catalog.finish(names[index], change, 0.0, version=1)
        on_progress("adapters", index + 1, scale.num_adapters)
    # two more for the warm-up
    pool = iter(list(workshop.pool(scale.num_changes + 2)))
    with _running(folder, model_dir, store_dir, scale) as server:
        tally = Tally()
        wave = _Wave(server, catalog, scale, names, pool)
        asyncio.run(wave.warm_up(tally))
        rests = [busy(wait_for_rest(server, scale.rest_timeout_s, is_empty=True), is_empty=True)]
        before = held(server, store_dir)
        begin = time.monotonic()
        asyncio.run(wave.run(tally, on_progress))
        seconds = time.monotonic() - begin
        rests += [busy(wait_for_rest(server, scale.rest_timeout_s, is_empty=False), is_empty=False)]
        if not tally.is_hopeless:
            asyncio.run(wave.delete_all(tally))
        series = wait_for_rest(server, scale.rest_timeout_s, is_empty=True)
        rests += [busy(series, is_empty=True)]
        after = settled(server, store_dir, before, scale.rest_timeout_s)
    unseen = unlogged(server.log_path, tally.outcomes["exact"])
    median, p99 = percentiles(tally.seconds, 0.5, 0.99)
    return Report(
        scale=scale,
        outcomes=dict(tally.outcomes),
        changes=dict(tally.changes),
        complaints=[*tally.complaints, *chain(*rests), *differences(before, after, series), *unseen],
        seconds=seconds,
        request_s={"p50": median, "p99": p99},
        num_cold=tally.num_cold,
        before=before,
        after=after,
        series={name: value for name, value in series.items() if "_bucket" not in name and "adapter=" not in name},
    )


@contextmanager
def _running(folder: Path, model_dir: Path, store_dir: Path, scale: Scale) -> Iterator[LiveServer]:
    server = start_server(
        folder / "server.log",
        model_dir,
        store_dir,
        *("--device", "cpu", "--dtype", "float32", *scale.server_options),
        module=scale.module,
    )
    try:
        yield server
    finally:
        stop_server(server)


class _Wave:
    """The tasks of one campaign."""

    def __init__(
        self, server: LiveServer, catalog: Catalog, scale: Scale, names: list[str], pool: Iterator[Adapter]
    ) -> None:
        address = urlsplit(server.url)
        assert address.hostname is not None and address.port is not None
        self._new_wire = partial(Wire, address.hostname, address.port, scale.answer_timeout_s)
        self._catalog = catalog
        self._scale = scale
        self._names = names
        self._pool = pool
        self._plan = Plan(scale.seed, scale.num_adapters)
        self._num_done = 0

    async def warm_up(self, tally: Tally) -> None:
        """Start whatever the server starts on demand, and leave nothing behind; only complaints are counted."""
        warm = Plan(-self._scale.seed, self._scale.num_adapters)
        ours = Tally()
        with self._publisher(ours) as publisher:
            for name in ("warm-0", "warm-1"):
                await publisher.publish(name)
                await publisher.delete(name)
        await self._ask(iter(range(self._scale.num_warm_up)), warm, ours, lambda done: None)
        await self._evict_all()
        for complaint in ours.complaints:
            tally.complain(f"warm-up: {complaint}")

    async def run(self, tally: Tally, on_progress: Progress) -> None:
        """Send everything."""
        self._num_done, total, every = 0, self._scale.num_requests, self._scale.changes_every
        due: asyncio.Queue[int | None] = asyncio.Queue()

        def on_done(num_done: int) -> None:
            on_progress("requests", num_done, total)
            if num_done % every == 0:
                due.put_nowait(num_done // every)

        publishers = [asyncio.create_task(self._publish(due, tally)) for _ in range(_NUM_PUBLISHERS)]
        try:
            await self._ask(iter(range(total)), self._plan, tally, on_done)
        finally:
            for _ in publishers:
                due.put_nowait(None)
            await asyncio.gather(*publishers)

    async def delete_all(self, tally: Tally) -> None:
        """Delete every name that is left."""
        with self._publisher(tally) as publisher:
            for name in self._catalog.names:
                if self._catalog.is_live(name):
                    await publisher.delete(name)

    async def _ask(self, indices: Iterator[int], plan: Plan, tally: Tally, on_done: Callable[[int], None]) -> None:
        async def ask_on() -> None:
            with closing(self._new_wire()) as wire:
                client = Client(wire, _BASE, self._catalog, self._names, tally)
                for index in indices:
                    await client.serve(index, plan.wish(index))
                    self._num_done += 1
                    on_done(self._num_done)
                    if tally.is_hopeless:
                        return

        await asyncio.gather(*(ask_on() for _ in range(self._scale.num_clients)))

    async def _publish(self, due: "asyncio.Queue[int | None]", tally: Tally) -> None:
        with self._publisher(tally) as publisher:
            while (index := await due.get()) is not None and not tally.is_hopeless:
                kind, name_index = self._plan.change(index)
                await publisher.change(kind, self._names[name_index])

    @contextmanager
    def _publisher(self, tally: Tally) -> Iterator[Publisher]:
        with closing(self._new_wire()) as wire:
            yield Publisher(wire, self._catalog, self._pool, tally)

    async def _evict_all(self) -> None:
        with closing(self._new_wire()) as wire:
            cards = (await wire.ask("GET", "/v1/adapters")).json()["data"]
            assert isinstance(cards, list)
            for card in cards:
                if card["tier"] != "disk":
                    await wire.ask("POST", f"/v1/adapters/{card['name']}:evict")


def as_json(report: Report) -> dict[str, object]:
    """Return a report as a JSON object."""
    return asdict(report)


def clear(folder: Path) -> None:
    """Remove what a campaign left in its folder, but its report and the server's log."""
    for name in (_BASE, "store", "sources"):
        shutil.rmtree(folder / name, ignore_errors=True)
