"""A request's choices, generated side by side: one engine sequence per choice, their pieces merged in order of arrival.

Owns the tasks that read the engine and their end. Invariants: whatever way a generation is left (done, stop string,
error, cancellation), every sequence has ended or was aborted before control returns; a reader that lags slows its own
sequences only. A single choice, which is what most requests ask for, is read by whoever wants its pieces: a token costs
one wake-up, no task and no queue between.
"""

import asyncio
import math
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

from serve.api.engine_gateway import EngineGateway
from serve.api.output import OutputReader, OutputRules, Piece
from serve.api.request_stream import TIMER_GRAIN_S
from serve.api.sampling import choice_seed
from serve.api.short_way import Outlet, ShortWay
from serve.api.target import Acts, Target
from serve.config import LimitsConfig
from serve.errors import Unavailable
from serve.messages import SamplingParams, Started, Submit
from serve.text.tokenizer import TextTokenizer

KEEP_ALIVE_S = 15.0
# pieces that wait for a slow client before its sequences are no longer read
_MAX_UNREAD_PIECES = 64


@dataclass(frozen=True, slots=True)
class Generation:
    """Everything decided about a request before the engine sees it."""

    prompts: Sequence[list[int]]
    # one per prompt: their output budgets may differ
    sampling: Sequence[SamplingParams]
    num_choices: int
    seed: int | None
    rules: OutputRules
    target: Target
    priority: int
    cold_start: str
    # whose prefixes it may share
    cache_salt: str = ""
    # among whom the engine shares its service, and that one's part relative to others' 1
    tenant: str = ""
    tenant_weight: float = 1.0
    # seconds within which every choice must have ended
    deadline_s: float | None = None

    def submits(self) -> list[Submit]:
        """Return one submit per choice: prompt by prompt, as OpenAI numbers the choices."""
        identity = uuid.uuid4().hex
        return [
            self._submit(f"{identity}-{position}", child, prompt, sampling, acts)
            for position, (prompt, sampling) in enumerate(zip(self.prompts, self.sampling, strict=True))
            for acts in (self.target.acts_on(prompt),)
            for child in range(self.num_choices)
        ]

    def headers(self, started: Started | None) -> dict[str, str]:
        """Return the headers that name what acts and what the first token waited for.

        For an adapter with invocation tokens also where they are.
        """
        headers = self.target.headers(started)
        if started is not None:
            headers["server-timing"] = _server_timing(started)
        if self.target.adapter is not None and self.target.adapter.invocation_tokens and len(self.prompts) == 1:
            active_from = self.target.acts_on(self.prompts[0]).active_from
            headers["x-adapter-active-from"] = "none" if active_from is None else str(active_from)
        return headers

    def _submit(self, identity: str, child: int, prompt: list[int], sampling: SamplingParams, acts: Acts) -> Submit:
        return Submit(
            request_id=f"{identity}-{child}",
            prompt_token_ids=prompt,
            sampling=replace(sampling, seed=choice_seed(self.seed, child)),
            adapter_digest=acts.adapter_digest,
            cache_salt=self.cache_salt,
            priority=self.priority,
            group_id=identity if self.num_choices > 1 else "",
            cold_start=self.cold_start,
            adapters=acts.adapters,
            num_virtual_tokens=acts.num_virtual_tokens,
            active_from=acts.active_from,
            tenant=self.tenant,
            tenant_weight=self.tenant_weight,
            deadline_s=self.deadline_s,
        )


def run_generation(
    engine: EngineGateway,
    tokenizer: TextTokenizer,
    generation: Generation,
    limits: LimitsConfig,
    outlet: Outlet | None = None,
) -> AsyncGenerator[Piece | None, None]:
    """Yield the pieces of all choices as they come, and None after each `KEEP_ALIVE_S` of silence.

    Args:
        outlet: pieces of a single choice that it takes leave there, in their order among all, and are not yielded.
    Raises:
        ServeError: one choice failed, which ends them all; or the request outlived its time, which is looked at with
            every piece and every silence.
    """
    generation = replace(generation, tenant_weight=limits.tenant_weights.get(generation.tenant, 1.0))
    submits = generation.submits()
    cold_start = ColdStart.of(engine, generation.target.digests, limits.cold_start_timeout_s)
    readers = [_reader(index, submit, generation, tokenizer) for index, submit in enumerate(submits)]
    if len(submits) == 1:
        return _run_one(engine, submits[0], readers[0], limits.request_timeout_s, cold_start, outlet)
    return _run_several(engine, submits, readers, limits.request_timeout_s, cold_start)


async def _run_one(
    engine: EngineGateway,
    submit: Submit,
    reader: OutputReader,
    timeout_s: float,
    cold_start: "ColdStart",
    outlet: Outlet | None,
) -> AsyncGenerator[Piece | None, None]:
    loop = asyncio.get_running_loop()
    end_s, warm_by_s = loop.time() + timeout_s, loop.time() + cold_start.timeout_s
    way = ShortWay(reader, outlet, loop.time, end_s - TIMER_GRAIN_S)
    silence_s = min(KEEP_ALIVE_S, timeout_s, cold_start.timeout_s)
    async with aclosing(engine.follow(submit, silence_s, way.take)) as events:
        async for event in events:
            now_s = loop.time() + TIMER_GRAIN_S
            if event is not None:
                warm_by_s = math.inf
            elif now_s >= warm_by_s:
                cold_start.check()
                warm_by_s = now_s + cold_start.timeout_s
            if now_s >= end_s:
                raise _too_long(timeout_s)
            piece = None if event is None else way.read(event)
            yield piece
            if piece is not None and piece.finish_reason is not None:
                return


async def _run_several(
    engine: EngineGateway,
    submits: Sequence[Submit],
    readers: Sequence[OutputReader],
    timeout_s: float,
    cold_start: "ColdStart",
) -> AsyncGenerator[Piece | None, None]:
    queue: asyncio.Queue[Piece | Exception] = asyncio.Queue(_MAX_UNREAD_PIECES)
    tasks = [
        asyncio.create_task(_read_choice(engine, submit, reader, queue, replace(cold_start)))
        for submit, reader in zip(submits, readers, strict=True)
    ]
    loop = asyncio.get_running_loop()
    end_s = loop.time() + timeout_s
    num_open = len(tasks)
    try:
        while num_open:
            item = await _next(queue, min(KEEP_ALIVE_S, end_s - loop.time()))
            if isinstance(item, Exception):
                raise item
            if item is None and loop.time() >= end_s:
                raise _too_long(timeout_s)
            num_open -= item is not None and item.finish_reason is not None
            yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _read_choice(
    engine: EngineGateway,
    submit: Submit,
    reader: OutputReader,
    queue: asyncio.Queue[Piece | Exception],
    cold_start: "ColdStart",
) -> None:
    has_begun = False
    try:
        async with aclosing(engine.follow(submit, cold_start.timeout_s)) as events:
            async for event in events:
                if event is None:
                    if not has_begun:
                        cold_start.check()
                    continue
                has_begun = True
                piece = reader.read(event)
                await queue.put(piece)
                if piece.finish_reason is not None:
                    return
    # the request's wall: the consumer raises it there, once
    except Exception as error:
        await queue.put(error)


async def _next(queue: asyncio.Queue[Piece | Exception], timeout_s: float) -> Piece | Exception | None:
    if not queue.empty():
        return queue.get_nowait()
    try:
        async with asyncio.timeout(timeout_s):
            return await queue.get()
    except TimeoutError:
        return None


def _too_long(timeout_s: float) -> Unavailable:
    return Unavailable(f"the request took longer than {timeout_s:g} s; ask for fewer tokens")


def _reader(index: int, submit: Submit, generation: Generation, tokenizer: TextTokenizer) -> OutputReader:
    at_text_start = not any(tokenizer.is_text(token_id) for token_id in submit.prompt_token_ids)
    return OutputReader(index, generation.rules, tokenizer.token_bytes, at_text_start=at_text_start)


def _server_timing(started: Started) -> str:
    """Say in milliseconds how the time to the first token was spent; queue: the line, room, and others' loads."""
    waited_s = started.adapter_load_s - started.adapter_fetch_s - started.adapter_move_s
    parts = {
        "queue": started.queue_s + max(0.0, waited_s),
        "fetch": started.adapter_fetch_s,
        "load": started.adapter_move_s,
        "prefill": started.prefill_s,
    }
    return ", ".join(f"{name};dur={1000 * seconds:.1f}" for name, seconds in parts.items())


@dataclass(slots=True)
class ColdStart:
    """How long one choice waits for its adapters' loads; waiting in line for warm ones is no part of it.

    Adapters that leave the device before their turn are waited for alike, from the next look on.
    """

    engine: EngineGateway
    digests: tuple[str, ...]
    # between two looks; infinite without adapters
    timeout_s: float
    was_cold: bool

    @classmethod
    def of(cls, engine: EngineGateway, digests: tuple[str, ...], timeout_s: float) -> "ColdStart":
        return cls(engine, digests, timeout_s if digests else math.inf, _is_cold(engine, digests))

    def check(self) -> None:
        """Look again: another `timeout_s` is over.

        Raises:
            Unavailable: an adapter was not loaded before, and is not now.
        """
        is_cold = _is_cold(self.engine, self.digests)
        if is_cold and self.was_cold:
            message = f"the adapter was not ready within {self.timeout_s:g} s; send the request again"
            raise Unavailable(message, code="adapter_loading", retry_after_s=5)
        self.was_cold = is_cold


def _is_cold(engine: EngineGateway, digests: tuple[str, ...]) -> bool:
    stats = engine.stats
    if not digests or stats is None:
        return False
    return not set(digests) <= {state.digest for state in stats.adapters if state.tier == "device"}
