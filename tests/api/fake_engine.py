"""An engine without an engine: it writes what the test tells it to, and remembers what it was asked.

Owns the script of answers. Invariant: as the real client, every generator ends with `Finished` or an error, and one
that is closed early is recorded as aborted.
"""

import asyncio
import math
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field

from serve.adapter_messages import AdapterDone, AskReady, EvictAdapter, PinAdapter, Question, UnpinAdapter
from serve.api.adapter_desk import AdapterDesk
from serve.api.engine_gateway import SequenceEvent
from serve.api.request_stream import Take
from serve.errors import EngineLoading, ServeError
from serve.messages import (
    Command,
    Embed,
    Failed,
    Finished,
    FinishReason,
    Ready,
    Started,
    Stats,
    Submit,
    TokenLogprobs,
    Tokens,
)
from tests.api.byte_tokenizer import IM_END, VOCAB_SIZE

MAX_MODEL_LEN = 1024


def text_ids(text: str) -> list[int]:
    """Return the ids of plain text under the byte tokenizer."""
    return list(text.encode("utf-8"))


def _write_hello(submit: Submit) -> list[int]:
    return [*text_ids("Hello world"), IM_END]


@dataclass
class Script:
    """What the fake does for each sequence, reset by the fixture."""

    write: Callable[[Submit], list[int]] = _write_hello
    tokens_per_event: int = 1
    # stop sending after so many tokens, for ever
    hold_after: int | None = None
    error_after: int | None = None
    error: ServeError | None = None
    admit_error: ServeError | None = None
    num_cached_tokens: int = 0
    adapter_load_s: float = 0.0


@dataclass
class FakeEngine:
    """An `EngineGateway` for tests."""

    script: Script = field(default_factory=Script)
    submits: list[Submit] = field(default_factory=list)
    embeds: list[Embed] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    unloaded: list[str] = field(default_factory=list)
    loaded: list[str] = field(default_factory=list)
    admitted: list[int] = field(default_factory=list)
    # questions and the operator's commands, each answered at once, the latter by 409 if the test says so
    asked: list[Question] = field(default_factory=list)
    # digests that are not on the device
    cold: set[str] = field(default_factory=set)
    operator_refusal: str | None = None
    num_bytes_freed: int | None = 0
    desk: AdapterDesk = field(init=False)
    num_open: int = 0
    is_live: bool = True
    is_ready: bool = True
    is_draining: bool = False
    stats: Stats | None = None
    ready: Ready | None = field(
        default_factory=lambda: Ready(
            base_fingerprint="sha256:base",
            max_model_len=MAX_MODEL_LEN,
            num_kv_blocks=64,
            block_size=16,
            dtype="float32",
            device="cpu",
            eos_token_ids=[IM_END],
            vocab_size=VOCAB_SIZE,
            hidden_size=4,
        )
    )

    def __post_init__(self) -> None:
        """Open the desk."""
        self.desk = AdapterDesk(self._answer, self._refuse_if_down)

    def reset(self) -> None:
        """Forget everything."""
        self.desk = AdapterDesk(self._answer, self._refuse_if_down)
        self.operator_refusal, self.num_bytes_freed = None, 0
        self.asked.clear()
        self.cold.clear()
        self.script = Script()
        self.stats = None
        self.is_live = self.is_ready = True
        for record in (self.submits, self.embeds, self.aborted, self.unloaded, self.loaded, self.admitted):
            record.clear()

    def _refuse_if_down(self) -> None:
        if not self.is_ready:
            raise EngineLoading("the engine is starting; send the request again", retry_after_s=2)

    def _answer(self, command: Command) -> None:
        assert isinstance(command, AskReady | PinAdapter | UnpinAdapter | EvictAdapter)
        self.asked.append(command)
        answer: AdapterDone | Failed
        if isinstance(command, AskReady):
            answer = AdapterDone(command.request_id, is_pending=not self.cold.isdisjoint(command.digests))
        elif self.operator_refusal is not None:
            answer = Failed(command.request_id, "conflict", self.operator_refusal, 409)
        else:
            answer = AdapterDone(command.request_id, self.num_bytes_freed or 0, self.num_bytes_freed is None)
        asyncio.get_running_loop().call_soon(self.desk.saw, answer)

    def admit(self, num_sequences: int) -> None:
        """Admit, or refuse as scripted."""
        if self.script.admit_error is not None:
            raise self.script.admit_error
        self.admitted.append(num_sequences)

    async def generate(self, submit: Submit) -> AsyncGenerator[SequenceEvent, None]:
        """Yield the scripted tokens."""
        self.submits.append(submit)
        self.num_open += 1
        has_ended = False
        try:
            script = self.script
            yield Started(
                submit.request_id, script.num_cached_tokens, 0.0, script.adapter_load_s, _prompt_logprobs(submit)
            )
            token_ids = script.write(submit)[: submit.sampling.max_tokens]
            stop = next((index for index, token in enumerate(token_ids) if _is_stop(submit, token)), None)
            if stop is not None:
                token_ids = token_ids[: stop + 1]
            for start in range(0, len(token_ids), script.tokens_per_event):
                await self._follow_script(start)
                group = token_ids[start : start + script.tokens_per_event]
                yield Tokens(submit.request_id, group, _logprobs(submit, group))
            has_ended = True
            reason = FinishReason.LENGTH if stop is None else FinishReason.STOP
            yield Finished(submit.request_id, reason, None if stop is None else token_ids[-1])
        finally:
            self.num_open -= 1
            if not has_ended:
                self.aborted.append(submit.request_id)

    async def follow(
        self, submit: Submit, silence_s: float, take: Take | None = None
    ) -> AsyncGenerator[SequenceEvent | None, None]:
        """Yield the scripted tokens but for those that `take` takes, and None after each silence."""
        async with aclosing(self.generate(submit)) as events:
            waiting: asyncio.Future[SequenceEvent] | None = None
            try:
                while True:
                    waiting = waiting or asyncio.ensure_future(anext(events))
                    timeout_s = None if silence_s == math.inf else silence_s
                    if not (await asyncio.wait({waiting}, timeout=timeout_s))[0]:
                        yield None
                        continue
                    done, waiting = waiting, None
                    try:
                        event = done.result()
                    except StopAsyncIteration:
                        return
                    # whoever follows waits here, so it has seen everything before
                    if not (isinstance(event, Tokens) and take is not None and take(event)):
                        yield event
            finally:
                if waiting is not None:
                    waiting.cancel()
                    await asyncio.gather(waiting, return_exceptions=True)

    async def _follow_script(self, num_sent: int) -> None:
        script = self.script
        if script.hold_after is not None and num_sent >= script.hold_after:
            await asyncio.Event().wait()
        if script.error is not None and num_sent >= (script.error_after or 0):
            raise script.error
        await asyncio.sleep(0)

    async def embed(self, embed: Embed) -> list[float]:
        """Return a vector that tells the input's length."""
        self.embeds.append(embed)
        return [float(len(embed.prompt_token_ids)), 0.5, -1.0, 0.0]

    def load_adapter(self, digest: str) -> None:
        """Record the wish."""
        self.loaded.append(digest)

    def unload_adapter(self, digest: str) -> None:
        """Record the wish."""
        self.unloaded.append(digest)


def _is_stop(submit: Submit, token_id: int) -> bool:
    params = submit.sampling
    return token_id in params.stop_token_ids or (token_id == IM_END and not params.ignore_eos)


def _logprobs(submit: Submit, token_ids: list[int]) -> list[TokenLogprobs] | None:
    count = submit.sampling.num_logprobs
    return None if count is None else [_entry(token_id, count) for token_id in token_ids]


def _prompt_logprobs(submit: Submit) -> list[TokenLogprobs] | None:
    count = submit.sampling.num_prompt_logprobs
    return None if count is None else [_entry(token_id, count) for token_id in submit.prompt_token_ids[1:]]


def _entry(token_id: int, count: int) -> TokenLogprobs:
    ranks = range(count)
    top_ids = [(token_id + rank) % VOCAB_SIZE for rank in ranks]
    return TokenLogprobs(token_id, -0.5, top_ids, [-0.5 - rank for rank in ranks])
