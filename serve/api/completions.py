"""POST /v1/completions.

Owns the order of work for plain prompts and how a completion's choices look, echo and prompt logprobs included.
Invariant: choice `i` of prompt `p` has index `p * n + i`, streamed or not.
"""

import asyncio
from collections.abc import Sequence

from fastapi import APIRouter, Request
from fastapi.responses import Response

from serve.api.answer import Json, Output, answer_generation
from serve.api.cold_start import engine_rule, warm_target
from serve.api.detokenizer import Detokenizer
from serve.api.generation import Generation
from serve.api.json_body import read_model
from serve.api.limits import check_limits
from serve.api.logprobs import CompletionLogprobs, join_logprobs
from serve.api.openapi import json_endpoint
from serve.api.output import Piece, output_rules
from serve.api.sampling import LogprobCounts, build_sampling, fit_prompt, output_budget
from serve.api.schemas_completions import CompletionRequest
from serve.api.selection import resolve_target, sticky_id
from serve.api.state import ApiState, api_state
from serve.api.structured import grammar_param, requested_grammar
from serve.api.target import Target
from serve.api.tenant_share import charge_tokens
from serve.messages import Grammar
from serve.text.tokenizer import TextTokenizer

DEFAULT_MAX_TOKENS = 16

router = APIRouter()


@router.post("/v1/completions", **json_endpoint(CompletionRequest, streams=True))
async def create_completion(request: Request) -> Response:
    """Complete one or several prompts."""
    state = api_state(request)
    body = await read_model(request, CompletionRequest)
    num_sequences = check_limits(body, state.config.limits, num_prompts=len(body.prompt))
    grammar = requested_grammar(body.response_format, body.structured_outputs, state.config.limits)
    target = await resolve_target(state, body, sticky_id(request, body))
    await charge_tokens(request, num_sequences * _asked_tokens(body))
    state.engine.admit(num_sequences)
    target = await warm_target(request, state, body, target)
    await state.grammar_gate.check(grammar, param=grammar_param(body.structured_outputs))
    generation = await _prepare(state, body, target, grammar)
    reply = CompletionReply(state.tokenizer, body, generation)
    return await answer_generation(
        request, state, generation, reply, stream=bool(body.stream), include_usage=body.include_usage
    )


async def _prepare(state: ApiState, body: CompletionRequest, target: Target, grammar: Grammar | None) -> Generation:
    ready = state.ready
    asked = _asked_tokens(body)
    encoded = await asyncio.to_thread(_encode, state.tokenizer, body)
    num_virtual = target.num_virtual_tokens
    prompts = [
        fit_prompt(token_ids, body.truncate_prompt_tokens, asked, ready, num_virtual=num_virtual)
        for token_ids in encoded
    ]
    logprobs = LogprobCounts(output=body.logprobs, prompt=body.logprobs if body.echo else None)
    budgets = [
        output_budget(len(prompt), asked, ready, num_virtual=num_virtual, prompt_param="prompt") for prompt in prompts
    ]
    return Generation(
        prompts=prompts,
        sampling=[build_sampling(body, ready, budget, logprobs, grammar) for budget in budgets],
        num_choices=body.n or 1,
        seed=body.seed,
        rules=output_rules(body, ready),
        target=target,
        priority=body.priority or 0,
        cold_start=engine_rule(body),
        deadline_s=body.deadline_s,
    )


def _asked_tokens(body: CompletionRequest) -> int:
    return DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens


def _encode(tokenizer: TextTokenizer, body: CompletionRequest) -> list[list[int]]:
    adds = body.add_special_tokens is not False
    return [
        tokenizer.encode(prompt, add_special_tokens=adds) if isinstance(prompt, str) else prompt
        for prompt in body.prompt
    ]


class CompletionReply:
    """How the choices of one completion look."""

    id_prefix = "cmpl-"
    object_name = "text_completion"
    chunk_object_name = "text_completion"

    def __init__(self, tokenizer: TextTokenizer, body: CompletionRequest, generation: Generation) -> None:
        self._tokenizer = tokenizer
        self._body = body
        self._prompts = generation.prompts
        self._num_choices = generation.num_choices
        self._rules = generation.rules
        self._logprobs: dict[int, CompletionLogprobs] = {}

    def choice(self, output: Output) -> Json:
        """Return the whole choice."""
        piece = Piece(output.index, output.text, output.token_ids, output.logprobs, output.started)
        choice = {**self._first(piece), "finish_reason": output.finish_reason}
        if self._body.return_token_ids:
            choice["token_ids"] = output.token_ids
        return choice

    def chunks(self, piece: Piece) -> Sequence[Json]:
        """Return the stream's choice for one piece; nothing for a piece that shows nothing."""
        is_first = piece.index not in self._logprobs
        shows_tokens = piece.token_ids and (self._body.logprobs is not None or self._body.return_token_ids)
        shows_prompt = is_first and (self._body.echo or self._body.return_token_ids)
        if not (piece.text or piece.finish_reason or shows_tokens or shows_prompt):
            return ()
        choice = self._first(piece) if is_first else self._later(piece)
        if self._body.return_token_ids:
            choice["token_ids"] = list(piece.token_ids)
        return ({**choice, "finish_reason": piece.finish_reason},)

    def plain_chunk(self, index: int) -> Json | None:
        """Return a later piece's choice where neither logprobs nor ids are asked for."""
        if index not in self._logprobs or self._body.logprobs is not None or self._body.return_token_ids:
            return None
        return self._later(Piece(index))

    def _first(self, piece: Piece) -> Json:
        """Return a choice that begins with the echoed prompt, if one is asked for."""
        prompt_ids = self._prompts[piece.index // self._num_choices]
        at_text_start = bool(self._body.echo) or not any(map(self._tokenizer.is_text, prompt_ids))
        self._logprobs[piece.index] = CompletionLogprobs(
            self._tokenizer, skip_special_tokens=self._rules.skip_special_tokens, at_text_start=at_text_start
        )
        echoed = self._echoed(piece, prompt_ids)
        choice = self._later(piece)
        if echoed is not None:
            choice["logprobs"] = join_logprobs(echoed, choice["logprobs"])
        if self._body.echo:
            choice["text"] = self._prompt_text(piece.index // self._num_choices) + piece.text
        if self._body.return_token_ids:
            choice["prompt_token_ids"] = prompt_ids
        return choice

    def _later(self, piece: Piece) -> Json:
        logprobs: Json | None = None
        if self._body.logprobs is not None:
            logprobs = self._logprobs[piece.index].output(piece.logprobs)
        return {"index": piece.index, "text": piece.text, "logprobs": logprobs, "finish_reason": None}

    def _echoed(self, piece: Piece, prompt_ids: list[int]) -> Json | None:
        if not self._body.echo or self._body.logprobs is None:
            return None
        entries = piece.started.prompt_logprobs if piece.started is not None else None
        return self._logprobs[piece.index].prompt(prompt_ids, entries or [])

    def _prompt_text(self, position: int) -> str:
        prompt = self._body.prompt[position]
        is_cut = self._body.truncate_prompt_tokens is not None
        if isinstance(prompt, str) and not is_cut:
            return prompt
        # as the logprobs' offsets count it
        special_ids = self._tokenizer.token_bytes.special_ids
        skipped = special_ids if self._rules.skip_special_tokens else frozenset()
        detokenizer = Detokenizer(self._tokenizer.token_bytes, skipped, at_text_start=True)
        return detokenizer.feed(self._prompts[position]) + detokenizer.finish()
