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
from serve.api.sse import KEEP_ALIVE, ChunkFrames, EventStream, data_frame, with_end
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
    pieces = run_generation(state.engine, state.tokenizer, generation, limits)
    record = record_of(request)
    record.runs(generation.target, generation.prompts)
    usage = Usage(generation, record)
    share_of(request).pay_by(usage.total)
    if not stream:
        outputs = await unless_disconnected(request, _collect(pieces, usage))
        body = {**envelope, "choices": [reply.choice(output) for output in outputs], "usage": usage.body()}
        headers = generation.headers(outputs[0].started)
        return Response(msgspec.json.encode(body), headers=headers, media_type="application/json")
    # an early failure still gets its own status; a long wait gets headers and keep-alive comments
    first = await unless_disconnected(request, _first(pieces))
    frames = _frames(first, pieces, reply, usage, envelope, include_usage=include_usage)
    headers = generation.headers(first.started if first is not None else None)
    return EventStream(with_end(frames, record), headers, send_timeout_s=limits.slow_client_timeout_s)


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


async def _frames(
    first: Piece | None, pieces: Pieces, reply: Reply, usage: Usage, envelope: Json, *, include_usage: bool
) -> AsyncGenerator[bytes, None]:
    chunks = ChunkFrames(envelope, {"usage": None} if include_usage else {})
    async with aclosing(pieces):
        piece: Piece | None = first
        while True:
            if piece is None:
                yield KEEP_ALIVE
            else:
                usage.count(piece)
                for choice in reply.chunks(piece):
                    yield chunks.frame(choice)
            try:
                piece = await anext(pieces)
            except StopAsyncIteration:
                break
    if include_usage:
        yield data_frame({**envelope, "choices": [], "usage": usage.body()})
