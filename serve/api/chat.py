"""POST /v1/chat/completions.

Owns the order of work (validate, resolve, admit, encode, check the length, submit) and how a chat's choices look.
Invariant: nothing is tokenised before the request is known to be valid and admitted.
"""

import asyncio
from collections.abc import Sequence

from fastapi import APIRouter, Request
from fastapi.responses import Response

from serve.api.answer import Json, Output, answer_generation
from serve.api.cold_start import engine_rule, warm_target
from serve.api.generation import Generation
from serve.api.json_body import read_model
from serve.api.limits import check_limits
from serve.api.logprobs import chat_logprobs
from serve.api.openapi import json_endpoint
from serve.api.output import Piece, output_rules
from serve.api.sampling import LogprobCounts, build_sampling, fit_prompt, output_budget
from serve.api.schemas_chat import ChatRequest
from serve.api.selection import resolve_target, sticky_id
from serve.api.state import ApiState, api_state
from serve.api.structured import grammar_param, requested_grammar
from serve.api.target import Target
from serve.api.tenant_share import charge_tokens
from serve.api.tool_families import FRAMINGS
from serve.api.tool_parser import CallDelta, ContentDelta, Delta, ToolParser, parse_complete
from serve.api.tools import ToolPlan, plan_tools
from serve.messages import Grammar
from serve.text.chat_encoder import require_template
from serve.text.tokenizer import TextTokenizer

router = APIRouter()


@router.post("/v1/chat/completions", **json_endpoint(ChatRequest, streams=True))
async def create_chat_completion(request: Request) -> Response:
    """Answer a chat."""
    state = api_state(request)
    body = await read_model(request, ChatRequest)
    num_choices = check_limits(body, state.config.limits, num_prompts=1)
    require_template(state.chat)
    tools = _plan_tools(state, body)
    form = requested_grammar(body.response_format, body.structured_outputs, state.config.limits)
    # a forced call is no free text: the form of the text has nothing to say about it
    grammar = tools.grammar or form
    target = await resolve_target(state, body, sticky_id(request, body))
    await charge_tokens(request, num_choices * (_asked_tokens(body) or 0))
    state.engine.admit(num_choices)
    target = await warm_target(request, state, body, target)
    await state.grammar_gate.check(
        grammar, param="tools" if tools.grammar is not None else grammar_param(body.structured_outputs)
    )
    generation = await _prepare(state, body, target, tools, grammar)
    reply = ChatReply(state.tokenizer, body, tools, generation.prompts[0])
    return await answer_generation(
        request, state, generation, reply, stream=bool(body.stream), include_usage=body.include_usage
    )


def _plan_tools(state: ApiState, body: ChatRequest) -> ToolPlan:
    return plan_tools(
        body.tools,
        body.tool_choice,
        family=state.tool_family,
        parallel=body.parallel_tool_calls is not False,
        special_token_ids=state.control_ids,
    )


async def _prepare(
    state: ApiState, body: ChatRequest, target: Target, tools: ToolPlan, grammar: Grammar | None
) -> Generation:
    ready = state.ready
    asked = _asked_tokens(body)
    token_ids = await asyncio.to_thread(_encode, state, body, tools)
    num_virtual = target.num_virtual_tokens
    token_ids = fit_prompt(token_ids, body.truncate_prompt_tokens, asked, ready, num_virtual=num_virtual)
    max_tokens = output_budget(
        len(token_ids),
        asked,
        ready,
        num_virtual=num_virtual,
        prompt_param="messages",
        budget_param="max_tokens" if body.max_completion_tokens is None else "max_completion_tokens",
    )
    logprobs = LogprobCounts(output=(body.top_logprobs or 0) if body.logprobs else None)
    # a tool call may open with a control token: its reader must see it
    opener = FRAMINGS[tools.family].opener if tools.tool_names else ""
    opener_ids = frozenset(token_id for text, token_id in state.control_ids.items() if text == opener)
    return Generation(
        prompts=[token_ids],
        sampling=[build_sampling(body, ready, max_tokens, logprobs, grammar)],
        num_choices=body.n or 1,
        seed=body.seed,
        rules=output_rules(body, ready, shown_token_ids=opener_ids),
        target=target,
        priority=body.priority or 0,
        cold_start=engine_rule(body),
        deadline_s=body.deadline_s,
    )


def _asked_tokens(body: ChatRequest) -> int | None:
    return body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens


def _encode(state: ApiState, body: ChatRequest, tools: ToolPlan) -> list[int]:
    messages: list[Json] = [message.model_dump(exclude_none=True) for message in body.messages]
    continues = bool(body.continue_final_message)
    return require_template(state.chat).encode(
        tools.template_messages(messages),
        tools.template_tools,
        add_generation_prompt=body.add_generation_prompt is not False and not continues,
        continue_final_message=continues,
    )


class ChatReply:
    """How the choices of one chat look."""

    id_prefix = "chatcmpl-"
    object_name = "chat.completion"
    chunk_object_name = "chat.completion.chunk"

    def __init__(self, tokenizer: TextTokenizer, body: ChatRequest, tools: ToolPlan, prompt_ids: list[int]) -> None:
        self._tokenizer = tokenizer
        self._has_logprobs = bool(body.logprobs)
        self._has_token_ids = bool(body.return_token_ids)
        self._prompt_ids = prompt_ids
        self._tools = tools
        self._parsers: dict[int, ToolParser | None] = {}

    def choice(self, output: Output) -> Json:
        """Return the whole choice."""
        parser = self._tools.parser()
        message: Json = {"role": "assistant", "content": output.text, "refusal": None}
        num_calls = 0
        if parser is not None:
            answer = parse_complete(parser, output.text)
            num_calls = len(answer.calls)
            message["content"] = answer.content
            if answer.calls:
                message["tool_calls"] = [
                    {
                        "id": call.call_id,
                        "type": "function",
                        "function": {"name": call.name, "arguments": call.arguments},
                    }
                    for call in answer.calls
                ]
        choice: Json = {
            "index": output.index,
            "message": message,
            "logprobs": chat_logprobs(self._tokenizer, output.logprobs) if self._has_logprobs else None,
            "finish_reason": _finish_reason(output.finish_reason, num_calls),
        }
        if self._has_token_ids:
            choice |= {"prompt_token_ids": self._prompt_ids, "token_ids": output.token_ids}
        return choice

    def chunks(self, piece: Piece) -> Sequence[Json]:
        """Return the stream's choices for one piece: the role first, deltas, and an empty delta at the end."""
        chunks: list[Json] = []
        if piece.index not in self._parsers:
            self._parsers[piece.index] = self._tools.parser()
            extra: Json = {"prompt_token_ids": self._prompt_ids} if self._has_token_ids else {}
            chunks.append({**_chunk(piece.index, {"role": "assistant", "content": ""}), **extra})
        parser = self._parsers[piece.index]
        deltas = [_delta(delta) for delta in self._read(parser, piece)]
        if piece.token_ids and (self._has_logprobs or self._has_token_ids):
            # ids and logprobs ride on the first delta, even if the text of their tokens is still held back
            deltas = deltas or [{"content": ""}]
        for position, delta in enumerate(deltas):
            chunks.append(_chunk(piece.index, delta) | (self._token_facts(piece) if position == 0 else {}))
        if piece.finish_reason is not None:
            reason = _finish_reason(piece.finish_reason, parser.num_calls if parser is not None else 0)
            chunks.append(_chunk(piece.index, {}) | {"finish_reason": reason})
        return chunks

    def plain_chunk(self, index: int) -> Json | None:
        """Return a delta of content: where no tools are known and nothing rides on it."""
        has_more = self._has_logprobs or self._has_token_ids
        if has_more or index not in self._parsers or self._parsers[index] is not None:
            return None
        return _chunk(index, {"content": ""})

    def _read(self, parser: ToolParser | None, piece: Piece) -> list[Delta]:
        if parser is None:
            return [ContentDelta(piece.text)] if piece.text else []
        deltas = parser.feed(piece.text) if piece.text else []
        return [*deltas, *parser.finish()] if piece.finish_reason is not None else deltas

    def _token_facts(self, piece: Piece) -> Json:
        facts: Json = {}
        if self._has_logprobs and piece.logprobs:
            facts["logprobs"] = chat_logprobs(self._tokenizer, piece.logprobs)
        if self._has_token_ids:
            facts["token_ids"] = list(piece.token_ids)
        return facts


def _chunk(index: int, delta: Json) -> Json:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


def _delta(delta: Delta) -> Json:
    if isinstance(delta, ContentDelta):
        return {"content": delta.text}
    return {"tool_calls": [_call(delta)]}


def _call(delta: CallDelta) -> Json:
    if delta.call_id is None:
        return {"index": delta.index, "function": {"arguments": delta.arguments}}
    function = {"name": delta.name, "arguments": delta.arguments}
    return {"index": delta.index, "id": delta.call_id, "type": "function", "function": function}


def _finish_reason(reason: str | None, num_calls: int) -> str | None:
    return "tool_calls" if num_calls and reason == "stop" else reason
