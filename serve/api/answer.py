"""A generation becomes one HTTP answer, streamed or whole.

Owns the envelope, the usage and the order of chunks; what a choice looks like is the reply's. Invariant: usage counts
each prompt once, without an adapter's virtual tokens, and exactly the output tokens that the client was sent.
"""

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Protocol

import msgspec
from fastapi import Request
from fastapi.responses import Response

from serve.api.auth import principal_of
from serve.api.disconnect import unless_disconnected
from serve.api.generation import Generation, run_generation
from serve.api.output import Piece
from serve.api.request_log import RequestRecord, record_of
from serve.api.selection import fingerprint
from serve.api.short_way import Outlet
from serve.api.sse import KEEP_ALIVE, ChunkFrames, EventStream, TextFrames, data_frame, with_end
from serve.api.state import ApiState
from serve.api.tenant_share import share_of
from serve.messages import Started, TokenLogprobs

Json = dict[str, object]
Pieces = AsyncGenerator[Piece | None, None]


@dataclass(slots=True)
class Output:
    """Everything one choice has produced."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    started: Started | None = None
    finish_reason: str | None = None

    def add(self, piece: Piece) -> None:
        """Append one piece."""
        self.text += piece.text
        self.token_ids.extend(piece.token_ids)
        self.logprobs.extend(piece.logprobs)
        self.started = piece.started or self.started
        self.finish_reason = piece.finish_reason


class Reply(Protocol):
    """How one endpoint spells its choices."""

    id_prefix: str
    object_name: str
    chunk_object_name: str

    def choice(self, output: Output) -> Json:
        """Return the whole choice."""
        ...

    def chunks(self, piece: Piece) -> Sequence[Json]:
        """Return the stream's choices that a piece amounts to, each for a chunk of its own."""
        ...

    def plain_chunk(self, index: int) -> Json | None:
        """Return what `chunks` makes of a later piece with text and without an end, the text left empty.

        None: the first piece of this choice did not come yet, or its pieces show more than their text.
        """
        ...


class Usage:
    """The token counts of one request; its record sees what is counted."""

    def __init__(self, generation: Generation, record: RequestRecord) -> None:
        self._record = record
        self._num_choices = generation.num_choices
        self._num_prompt_tokens = sum(len(prompt) for prompt in generation.prompts)
        self._num_completion_tokens = 0
        self._num_cached_tokens = 0

    def count(self, piece: Piece) -> None:
        """Count what a piece carries; of a prompt's choices the first one speaks for the cache."""
        self._record.saw(piece)
        self._num_completion_tokens += len(piece.token_ids)
        if piece.started is not None and piece.index % self._num_choices == 0:
            self._num_cached_tokens += piece.started.num_cached_tokens

    def total(self) -> int:
        """Return what the request has cost so far."""
        return self._num_prompt_tokens + self._num_completion_tokens

    def body(self) -> Json:
        """Return OpenAI's usage object."""
        return {
            "prompt_tokens": self._num_prompt_tokens,
            "completion_tokens": self._num_completion_tokens,
            "total_tokens": self.total(),
            "prompt_tokens_details": {"cached_tokens": self._num_cached_tokens},
        }


async def answer_generation(
    request: Request, state: ApiState, generation: Generation, reply: Reply, *, stream: bool, include_usage: bool
) -> Response:
    """Run a generation and answer with it.

    Raises:
        ServeError: a choice failed before the answer began. ClientGone: nobody waits for it any more.
    """
    envelope: Json = {
        "id": f"{reply.id_prefix}{uuid.uuid4().hex}",
        "object": reply.chunk_object_name if stream else reply.object_name,
        "created": int(time.time()),
        "model": generation.target.model,
        "system_fingerprint": fingerprint(state, generation.target),
    }
    limits = state.config.limits
    principal = principal_of(request)
    generation = replace(generation, cache_salt=state.door.salt_of(principal), tenant=principal.tenant)
    record = record_of(request)
    record.runs(generation.target, generation.prompts)
    usage = Usage(generation, record)
    share_of(request).pay_by(usage.total)
    chunks = StreamChunks(reply, usage, envelope, include_usage=include_usage)
    outlet = Outlet(chunks.frames) if stream else None
    pieces = run_generation(state.engine, state.tokenizer, generation, limits, outlet)
    if not stream:
        outputs = await unless_disconnected(request, _collect(pieces, usage))
        body = {**envelope, "choices": [reply.choice(output) for output in outputs], "usage": usage.body()}
        headers = generation.headers(outputs[0].started)
        return Response(msgspec.json.encode(body), headers=headers, media_type="application/json")
    # an early failure still gets its own status; a long wait gets headers and keep-alive comments
    first = await unless_disconnected(request, _first(pieces))
    frames = with_end(_frames(first, pieces, chunks), record)
    headers = generation.headers(first.started if first is not None else None)
    return EventStream(frames, headers, send_timeout_s=limits.slow_client_timeout_s, outlet=outlet)


async def _first(pieces: Pieces) -> Piece | None:
    return await anext(pieces)


async def _collect(pieces: Pieces, usage: Usage) -> list[Output]:
    outputs: dict[int, Output] = {}
    async with aclosing(pieces):
        async for piece in pieces:
            if piece is not None:
                usage.count(piece)
                outputs.setdefault(piece.index, Output(piece.index)).add(piece)
    return [outputs[index] for index in sorted(outputs)]


class StreamChunks:
    """The events of one stream, whichever way they leave; each piece passes once, and is counted."""

    def __init__(self, reply: Reply, usage: Usage, envelope: Json, *, include_usage: bool) -> None:
        self._reply = reply
        self._usage = usage
        self._envelope = envelope
        self._include_usage = include_usage
        self._chunks = ChunkFrames(envelope, {"usage": None} if include_usage else {})
        # by choice: what its later pieces amount to, where that is their text alone
        self._plain: dict[int, TextFrames] = {}

    def frames(self, piece: Piece) -> Sequence[bytes]:
        """Return the events that a piece amounts to."""
        self._usage.count(piece)
        plain = self._plain.get(piece.index)
        if plain is not None and piece.finish_reason is None:
            return (plain.frame(piece.text),) if piece.text else ()
        frames = [self._chunks.frame(choice) for choice in self._reply.chunks(piece)]
        if plain is None:
            choice = self._reply.plain_chunk(piece.index)
            if choice is not None:
                self._plain[piece.index] = self._chunks.text_frames(choice)
        return frames

    def last_frames(self) -> Sequence[bytes]:
        """Return what comes when all choices have ended."""
        if not self._include_usage:
            return ()
        return (data_frame({**self._envelope, "choices": [], "usage": self._usage.body()}),)


async def _frames(first: Piece | None, pieces: Pieces, chunks: StreamChunks) -> AsyncGenerator[bytes, None]:
    async with aclosing(pieces):
        piece: Piece | None = first
        while True:
            if piece is None:
                yield KEEP_ALIVE
            else:
                for frame in chunks.frames(piece):
                    yield frame
            try:
                piece = await anext(pieces)
            except StopAsyncIteration:
                break
    for frame in chunks.last_frames():
        yield frame
