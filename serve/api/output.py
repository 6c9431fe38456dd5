"""One sequence's events become the text, ids and ending that a client sees.

Owns the end of a sequence as text: stop tokens are no text, stop strings end it early, half characters wait.
Invariant: the pieces of one reader do not depend on how the engine grouped the tokens, and at most one of them has a
finish reason.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from serve.api.detokenizer import Detokenizer
from serve.api.schemas import GenerationRequest
from serve.api.stop_strings import StopStrings
from serve.errors import EngineFailed
from serve.messages import Finished, FinishReason, Ready, Started, TokenLogprobs, Tokens
from serve.text.token_bytes import TokenBytes


@dataclass(frozen=True, slots=True)
class OutputRules:
    """What of the generated tokens is shown, and what ends it."""

    skip_special_tokens: bool = True
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    # control tokens that are shown all the same
    shown_token_ids: frozenset[int] = frozenset()
    # ids that may end the sequence: where one does, its text is only shown with `include_stop`
    stop_token_ids: frozenset[int] = frozenset()
    min_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Piece:
    """What one event adds to choice `index`."""

    index: int
    text: str = ""
    token_ids: Sequence[int] = ()
    logprobs: Sequence[TokenLogprobs] = ()
    started: Started | None = None
    finish_reason: str | None = None


class OutputReader:
    """Reads the events of one choice, in order."""

    def __init__(self, index: int, rules: OutputRules, token_bytes: TokenBytes, *, at_text_start: bool) -> None:
        self._index = index
        self._rules = rules
        skipped = token_bytes.special_ids - rules.shown_token_ids if rules.skip_special_tokens else frozenset()
        self._detokenizer = Detokenizer(token_bytes, skipped, at_text_start=at_text_start)
        self._stop = StopStrings(rules.stop, include_in_output=rules.include_stop)
        # no stop string to look for: a token's text is shown as it is
        self._is_plain = not rules.stop
        # a possible stop token whose text waits for the next event to say whether it was one
        self._held_token: int | None = None
        self._num_tokens = 0

    def read(self, event: Started | Tokens | Finished) -> Piece:
        """Return what this event adds."""
        if isinstance(event, Tokens):
            return self._take(event)
        if isinstance(event, Started):
            return Piece(self._index, started=event)
        return self._finish(event)

    def _take(self, event: Tokens) -> Piece:
        if self._is_plain and self._held_token is None and len(event.token_ids) == 1:
            (token_id,) = event.token_ids
            if token_id not in self._rules.stop_token_ids:
                self._num_tokens += 1
                return Piece(self._index, self._detokenizer.feed_one(token_id), event.token_ids, event.logprobs or ())
        text = ""
        for count, token_id in enumerate(event.token_ids, start=1):
            text += self._release_held()
            self._num_tokens += 1
            if token_id in self._rules.stop_token_ids:
                self._held_token = token_id
            else:
                text += self._show(token_id)
            if self._stop.has_matched:
                logprobs = (event.logprobs or ())[:count]
                return Piece(self._index, text, event.token_ids[:count], logprobs, finish_reason="stop")
        return Piece(self._index, text, event.token_ids, event.logprobs or ())

    def _finish(self, event: Finished) -> Piece:
        if event.reason is FinishReason.ABORTED:
            raise EngineFailed("the engine aborted this request; it may be sent again")
        is_stop_token = event.stop_token_id is not None and event.stop_token_id == self._held_token
        text = "" if is_stop_token and not self._rules.include_stop else self._release_held()
        text += self._stop.feed(self._detokenizer.finish())
        reason = "stop" if self._stop.has_matched else event.reason.value
        return Piece(self._index, text + self._stop.finish(), finish_reason=reason)

    def _release_held(self) -> str:
        token_id, self._held_token = self._held_token, None
        return "" if token_id is None else self._show(token_id)

    def _show(self, token_id: int) -> str:
        text = self._detokenizer.feed_one(token_id)
        # text from before `min_tokens` stops nothing
        return text if self._num_tokens <= self._rules.min_tokens else self._stop.feed(text)


def output_rules(
    request: GenerationRequest, ready: Ready, *, shown_token_ids: frozenset[int] = frozenset()
) -> OutputRules:
    """Return the rules that a request's fields ask for.

    Args:
        shown_token_ids: control tokens that another reader of the text must see.
    """
    return OutputRules(
        skip_special_tokens=request.skip_special_tokens is not False,
        stop=tuple(request.stop or ()),
        include_stop=bool(request.include_stop_str_in_output),
        shown_token_ids=shown_token_ids,
        # also with `ignore_eos`: a finished grammar still ends with one
        stop_token_ids=frozenset({*ready.eos_token_ids, *(request.stop_token_ids or ())}),
        min_tokens=request.min_tokens or 0,
    )
