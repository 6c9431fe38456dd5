"""One of the campaign's clients: sends wishes over its connection, reads or leaves, and has every answer judged.

Owns a connection. Invariant: every wish ends in exactly one count of the tally.
"""

import asyncio
import json
from collections import Counter
from contextlib import aclosing
from dataclasses import dataclass, field

from tests.campaign.catalog import Catalog
from tests.campaign.judge import Asked, judge, judge_refusal
from tests.campaign.plan import PROMPTS, Kind, Wish
from tests.campaign.wire import Answer, Wire

MAX_COMPLAINTS = 50


@dataclass(slots=True)
class Tally:
    """What happened so far."""

    outcomes: Counter[str] = field(default_factory=Counter)
    changes: Counter[str] = field(default_factory=Counter)
    complaints: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    num_cold: int = 0

    @property
    def is_hopeless(self) -> bool:
        """Say whether more complaints would be worth nothing."""
        return len(self.complaints) >= MAX_COMPLAINTS

    def complain(self, text: str) -> None:
        """Count what must not happen."""
        self.outcomes["complaint"] += 1
        if not self.is_hopeless:
            self.complaints.append(text)


class StreamFailed(Exception):
    """A stream ended in an error event."""


class Client:
    """Asks as planned."""

    def __init__(self, wire: Wire, base_name: str, catalog: Catalog, names: list[str], tally: Tally) -> None:
        self._wire = wire
        self._base_name = base_name
        self._catalog = catalog
        self._names = names
        self._tally = tally

    async def serve(self, index: int, wish: Wish) -> None:
        """Send one wish and judge what comes."""
        begin = _now()
        try:
            if wish.kind in (Kind.PREFETCH, Kind.EVICT):
                await self._operate(wish)
            else:
                await self._ask(wish)
        except (OSError, EOFError, TimeoutError, ValueError, StreamFailed) as error:
            self._wire.close()
            self._tally.complain(f"request {index} ({wish.kind}): {type(error).__name__}: {error}")
        self._tally.seconds.append(_now() - begin)

    async def _ask(self, wish: Wish) -> None:
        model, version = self._model(wish)
        is_stream = wish.kind in (Kind.STREAM, Kind.LEAVE)
        prompts = [PROMPTS[index] for index in wish.prompt_indices]
        body = {
            "model": model if version is None else f"{model}@{version}",
            "prompt": prompts if len(prompts) > 1 else prompts[0],
            "max_tokens": wish.num_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
            "stream": is_stream,
        }
        name = None if wish.kind is Kind.BASE else model
        asked = Asked(name, version, wish.prompt_indices, wish.num_tokens, _now())
        await self._wire.send("POST", "/v1/completions", json.dumps(body).encode())
        if wish.kind is Kind.LEAVE and wish.leaves_after == 0:
            self._wire.close()
            self._tally.outcomes["left"] += 1
            return
        answer = await self._wire.head()
        if answer.status != 200:
            await self._take_refusal(asked, answer)
        elif wish.kind is Kind.LEAVE:
            await self._leave(asked, answer, wish.leaves_after)
        else:
            tokens = await (self._streamed(answer) if is_stream else self._whole(answer))
            self._judge(asked, answer, tokens, "exact")

    def _model(self, wish: Wish) -> tuple[str, int | None]:
        if wish.kind is Kind.BASE:
            return self._base_name, None
        name = self._names[wish.name_index]
        published = [change for change in self._catalog.history(name).changes if change.version]
        if wish.kind is not Kind.VERSION or not published:
            return name, None
        return name, published[max(0, len(published) - 1 - wish.versions_back)].version

    async def _take_refusal(self, asked: Asked, answer: Answer) -> None:
        body = b"".join([piece async for piece in self._wire.pieces(answer)])
        code = json.loads(body)["error"]["code"]
        complaint = judge_refusal(self._catalog, asked, answer.status, code, _now())
        if complaint is None and answer.status in (429, 503) and "retry-after" not in answer.headers:
            complaint = f"{answer.status} {code} without Retry-After"
        self._count(complaint, f"refused {answer.status} {code}")

    async def _leave(self, asked: Asked, answer: Answer, num_events: int) -> None:
        tokens: list[int] = []
        async with aclosing(self._wire.events(answer)) as events:
            async for event in events:
                tokens += _tokens_of(event)
                num_events -= 1
                if num_events == 0:
                    break
        self._wire.close()
        self._judge(asked, answer, [tokens], "left", is_whole=False)

    async def _streamed(self, answer: Answer) -> list[list[int]]:
        tokens: list[int] = []
        last = ""
        async for last in self._wire.events(answer):
            tokens += _tokens_of(last)
        if last != "[DONE]":
            raise StreamFailed(f"the stream ended with {last[:80]!r}")
        return [tokens]

    async def _whole(self, answer: Answer) -> list[list[int]]:
        body = json.loads(b"".join([piece async for piece in self._wire.pieces(answer)]))
        return [choice["token_ids"] for choice in sorted(body["choices"], key=lambda choice: int(choice["index"]))]

    def _judge(
        self, asked: Asked, answer: Answer, tokens: list[list[int]], outcome: str, *, is_whole: bool = True
    ) -> None:
        named = answer.headers.get("x-adapter-digest")
        digest = None if named is None else named.removeprefix("sha256:")
        self._tally.num_cold += answer.headers.get("x-adapter-cold-start-ms", "0") != "0"
        self._count(judge(self._catalog, asked, digest, tokens, _now(), is_whole=is_whole), outcome)

    async def _operate(self, wish: Wish) -> None:
        name = self._names[wish.name_index]
        asked = Asked(name, None, (), 0, _now())
        answer = await self._wire.ask("POST", f"/v1/adapters/{name}:{wish.kind}")
        is_gone = answer.status == 404 and None in self._catalog.history(name).possible(asked.sent, _now())
        # an adapter that the operator pinned, or that runs, does not go at once
        is_held = answer.status == 409 and wish.kind is Kind.EVICT
        is_fine = answer.status in (200, 202) or is_gone or is_held
        self._count(None if is_fine else f"{wish.kind} {name}: {answer.status} {answer.body[:200]!r}", "operated")

    def _count(self, complaint: str | None, outcome: str) -> None:
        if complaint is None:
            self._tally.outcomes[outcome] += 1
        else:
            self._tally.complain(complaint)


def _tokens_of(event: str) -> list[int]:
    if event == "[DONE]":
        return []
    parsed = json.loads(event)
    if "error" in parsed:
        raise StreamFailed(str(parsed["error"]))
    return [token for choice in parsed["choices"] for token in choice.get("token_ids") or ()]


def _now() -> float:
    return asyncio.get_running_loop().time()
