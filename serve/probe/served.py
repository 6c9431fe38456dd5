"""The served side of a probe: the engine's answers to its prompts, asked as ordinary requests.

Owns the requests and the reading of their log-probabilities. Invariant: base and adapter are asked the same way, with
a salt of their own, so that nothing is answered from a cache and nothing of it stays there for others.
"""

import asyncio
import math
import uuid
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Protocol

from adapters_store.errors import ProbeFailed, ProbeNotFinite, UnsupportedAdapter
from serve.errors import EngineFailed, ServeError, Unavailable
from serve.messages import NOT_FINITE, Finished, Ready, SamplingParams, Started, Submit, TokenLogprobs, Tokens
from serve.probe.observed import Answers, Position
from serve.probe.prompts import Prompt

_NUM_TOP = 20
_RETRY_AFTER_S = 5
# the adapter's load and a few short prompts, behind whatever else the engine does
_TIMEOUT_S = 120.0
# what it says of an adapter that it could not load, and of a cause that may pass
_LOAD_FAILED, _TRY_AGAIN = "adapter_load_failed", "send the request again"


class ProbedEngine(Protocol):
    """What a probe asks of the engine's gateway."""

    @property
    def ready(self) -> Ready | None:
        """What the engine learnt at start-up; None while it starts."""
        ...

    @property
    def is_ready(self) -> bool:
        """Say whether requests are accepted and the engine makes progress."""
        ...

    def generate(self, submit: Submit) -> AsyncGenerator[Started | Tokens | Finished, None]:
        """Submit one sequence when first iterated, and yield its events in order."""
        ...

    def unload_adapter(self, digest: str) -> None:
        """Ask the engine to forget an adapter once its last pin is gone; returns at once."""
        ...


@dataclass(frozen=True, slots=True)
class Carrier:
    """What runs the prompts: the adapter with its virtual tokens and the tokens that switch it on, or nothing of it."""

    digest: str | None = None
    num_virtual_tokens: int = 0
    invocation: tuple[int, ...] = ()

    def active_from(self, prompt: Prompt) -> int | None:
        """Return where the last invocation begins; None: the adapter always acts."""
        width = len(self.invocation)
        if not width:
            return None
        begins = range(len(prompt) - width, -1, -1)
        return next((begin for begin in begins if prompt[begin : begin + width] == self.invocation), len(prompt))


async def ask(engine: ProbedEngine, carrier: Carrier, prompts: tuple[Prompt, ...]) -> Answers:
    """Return the engine's distributions at every position of the prompts.

    Raises:
        ProbeNotFinite: the adapter's numbers are not finite. ProbeFailed: the engine could not run it.
        UnsupportedAdapter: the engine can never load it: its device lacks an op, or its memory is too small.
        Unavailable: the engine is gone or does not answer; nothing is wrong with the adapter.
        ServeError: the engine refuses the adapter.
    """
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            answers = await asyncio.gather(*(_ask_one(engine, carrier, prompt) for prompt in prompts))
    except TimeoutError:
        raise _unavailable(f"the engine did not answer the probe within {_TIMEOUT_S:g} s") from None
    except EngineFailed as error:
        raise _cause(engine, carrier, error) from error
    except Unavailable as error:
        # requests may come again when an adapter does not load; an upload that never will is refused
        if error.code == _LOAD_FAILED and _TRY_AGAIN not in error.message:
            raise UnsupportedAdapter(f"this server cannot serve it: {error.message}", param="files") from error
        raise
    return tuple(answers)


async def _ask_one(engine: ProbedEngine, carrier: Carrier, prompt: Prompt) -> tuple[Position, ...]:
    submit = Submit(
        request_id=f"probe-{uuid.uuid4().hex}",
        prompt_token_ids=list(prompt),
        sampling=SamplingParams(
            max_tokens=1,
            seed=0,
            temperature=0.0,
            ignore_eos=True,
            num_logprobs=_NUM_TOP,
            num_prompt_logprobs=_NUM_TOP,
        ),
        adapter_digest=carrier.digest,
        cache_salt=f"probe-{uuid.uuid4().hex}",
        num_virtual_tokens=carrier.num_virtual_tokens,
        active_from=carrier.active_from(prompt),
    )
    found: list[TokenLogprobs] = []
    stream = engine.generate(submit)
    try:
        async for event in stream:
            if isinstance(event, Started):
                found += event.prompt_logprobs or []
            elif isinstance(event, Tokens):
                found += event.logprobs or []
    finally:
        await stream.aclose()
    # behind virtual tokens the first token has a distribution too
    if not len(prompt) <= len(found) <= len(prompt) + 1:
        raise ProbeFailed(f"the engine answered {len(found)} positions of a prompt of {len(prompt)} tokens")
    return tuple(_position(entry, carrier) for entry in found[-len(prompt) :])


def _position(entry: TokenLogprobs, carrier: Carrier) -> Position:
    ids, logprobs = tuple(entry.top_ids), tuple(entry.top_logprobs)
    if entry.token_id not in ids:
        ids, logprobs = (*ids, entry.token_id), (*logprobs, entry.logprob)
    if not all(math.isfinite(logprob) for logprob in logprobs):
        raise _not_finite(carrier)
    return Position(ids, logprobs)


def _cause(engine: ProbedEngine, carrier: Carrier, error: EngineFailed) -> Exception:
    """Tell numbers that are not finite from a step that cannot run, and both from an engine that is gone."""
    if NOT_FINITE in error.message:
        return _not_finite(carrier)
    if not engine.is_ready:
        return _unavailable("the engine stopped while it ran the probe")
    return ProbeFailed("the engine could not run the adapter on the base; nothing was stored, see the server's log")


def _not_finite(carrier: Carrier) -> Exception:
    if carrier.digest is None:
        return ProbeFailed("the base itself gives numbers that are not finite, so no adapter can be proven on it")
    return ProbeNotFinite(
        "on the base the adapter gives numbers that are not finite: its values overflow the served dtype somewhere in "
        "the model. Check its training, or serve in float32 (--dtype float32)"
    )


def _unavailable(what: str) -> ServeError:
    return Unavailable(
        f"{what}; nothing was stored, send the upload again", code="model_loading", retry_after_s=_RETRY_AFTER_S
    )
