"""Carries a plan out: an open loop sends when requests are due, whatever the server does; a closed one by its clients.

Owns the run's tasks; each request ends in its sample. Invariant: an open loop never waits for an answer before it
sends, and the body of a request is made before it is due, so that the tester adds nothing to a latency it measures.
"""

import asyncio
import gc
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass

from loadtest.client import Client, encode_body
from loadtest.prompts import request_body
from loadtest.samples import Sample
from loadtest.scenario import Scenario
from loadtest.workload import Plan, PlannedRequest


@dataclass(slots=True)
class Progress:
    """How far a run is; the runner writes, whoever draws reads."""

    num_planned: int
    num_sent: int = 0
    num_done: int = 0
    num_failed: int = 0
    num_tokens: int = 0

    def note(self, sample: Sample) -> None:
        """Count an ended request."""
        self.num_done += 1
        self.num_failed += not sample.is_ok
        self.num_tokens += sample.num_output_tokens


@dataclass(frozen=True, slots=True)
class Names:
    """What the server calls the base and, by rank, the adapters of the plan."""

    base: str
    adapters: tuple[str, ...]

    def of(self, adapter: int | None) -> str:
        """Return the model name of a planned request."""
        return self.base if adapter is None else self.adapters[adapter]


# runs beside the requests and ends by itself; is told when the last request has ended
Companion = Callable[[], Awaitable[None]]


async def run_plan(
    client: Client,
    scenario: Scenario,
    plan: Plan,
    names: Names,
    progress: Progress,
    companion: Companion | None = None,
    stop: asyncio.Event | None = None,
) -> list[Sample]:
    """Send every request of the plan; return their samples in the plan's order.

    Args:
        companion: what else happens meanwhile (changes of adapters), started with the clock; it is awaited at the end.
        stop: once set, nothing more is sent; what was sent is waited for.
    """
    # a collection of the plan's objects in mid-run would stop the tester for milliseconds
    gc.collect()
    gc.freeze()
    try:
        sender = _Sender(client, scenario, names, progress, stop or asyncio.Event())
        client.start_clock()
        beside = asyncio.ensure_future(companion()) if companion is not None else None
        try:
            await (sender.open_loop if scenario.arrivals.is_open else sender.closed_loop)(plan.requests)
        except BaseException:
            if beside is not None:
                beside.cancel()
            raise
        if beside is not None:
            await beside
    finally:
        gc.unfreeze()
    return sorted(sender.samples, key=lambda sample: sample.index)


class _Sender:
    """Sends one run's requests and keeps their samples."""

    def __init__(
        self, client: Client, scenario: Scenario, names: Names, progress: Progress, stop: asyncio.Event
    ) -> None:
        self.samples: list[Sample] = []
        self._stop = stop
        self._client, self._scenario, self._names, self._progress = client, scenario, names, progress

    async def open_loop(self, requests: Sequence[PlannedRequest]) -> None:
        """Send each request when it is due."""
        async with asyncio.TaskGroup() as tasks:
            for request in requests:
                assert request.at_s is not None, "an open loop's requests have times"
                body = self._body(request)
                if (wait_s := request.at_s - self._client.now_s()) > 0:
                    await asyncio.sleep(wait_s)
                if self._stop.is_set():
                    break
                tasks.create_task(self._send(request, body, request.at_s))

    async def closed_loop(self, requests: Sequence[PlannedRequest]) -> None:
        """Let `concurrency` clients work through the requests."""
        pending = iter(requests)
        count = min(self._scenario.arrivals.concurrency, len(requests))
        async with asyncio.TaskGroup() as tasks:
            for _ in range(count):
                tasks.create_task(self._work(pending))

    async def _work(self, pending: Iterator[PlannedRequest]) -> None:
        for request in pending:
            if self._stop.is_set():
                break
            body = self._body(request)
            # a closed loop's request is due when its client is free
            await self._send(request, body, self._client.now_s())

    async def _send(self, request: PlannedRequest, body: bytes, scheduled_s: float) -> None:
        shape = self._scenario.request
        sample = Sample(
            index=request.index,
            model=self._names.of(request.adapter),
            adapter=request.adapter,
            tenant=request.tenant,
            prompt_tokens=request.prompt.num_tokens,
            output_tokens=request.output_tokens,
            scheduled_s=scheduled_s,
        )
        self.samples.append(sample)
        self._progress.num_sent += 1
        await self._client.send(shape.path, body, sample, must_be_full=shape.ignore_eos)
        self._progress.note(sample)

    def _body(self, request: PlannedRequest) -> bytes:
        model = self._names.of(request.adapter)
        return encode_body(request_body(self._scenario.request, model, request.prompt, request.output_tokens))
