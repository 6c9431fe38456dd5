"""POST /tokenize and /detokenize in vLLM's shapes, and GET /version.

Owns no tokenising of its own: what these answer is what the generation endpoints do. Invariant: nothing here touches
the engine's queue.
"""

import asyncio

from fastapi import APIRouter, Request

from serve.api.errors import error_responses
from serve.api.json_body import read_model
from serve.api.openapi import json_endpoint
from serve.api.schemas_completions import DetokenizeRequest, TokenizeRequest
from serve.api.selection import resolve_adapter
from serve.api.state import ApiState, api_state
from serve.api.tools import plan_tools
from serve.errors import InvalidValue
from serve.text.chat_encoder import require_template

Json = dict[str, object]

router = APIRouter()


@router.post("/tokenize", **json_endpoint(TokenizeRequest))
async def tokenize(request: Request) -> Json:
    """Return the ids of a prompt or of a chat."""
    state = api_state(request)
    body = await read_model(request, TokenizeRequest)
    await _check_model(state, body.model)
    token_ids = await asyncio.to_thread(_encode, state, body)
    names = [state.tokenizer.token_name(token_id) for token_id in token_ids] if body.return_token_strs else None
    return {
        "count": len(token_ids),
        "max_model_len": state.ready.max_model_len,
        "tokens": token_ids,
        "token_strs": names,
    }


@router.post("/detokenize", **json_endpoint(DetokenizeRequest))
async def detokenize(request: Request) -> Json:
    """Return the text of ids, control tokens included."""
    state = api_state(request)
    body = await read_model(request, DetokenizeRequest)
    await _check_model(state, body.model)
    if max(body.tokens, default=0) >= max(state.ready.vocab_size, state.tokenizer.vocab_size):
        raise InvalidValue(f"tokens: this model's ids end at {state.ready.vocab_size - 1}", param="tokens")
    text = await asyncio.to_thread(state.tokenizer.decode, body.tokens, skip_special_tokens=False)
    return {"prompt": text}


@router.get("/version", responses=error_responses())
async def version(request: Request) -> Json:
    """Return the server's version."""
    return {"version": api_state(request).version}


async def _check_model(state: ApiState, model: str | None) -> None:
    if model is not None:
        await resolve_adapter(state, model)


def _encode(state: ApiState, body: TokenizeRequest) -> list[int]:
    if body.prompt is not None:
        return state.tokenizer.encode(body.prompt, add_special_tokens=body.add_special_tokens is not False)
    tools = plan_tools(body.tools, None, family=state.tool_family)
    messages: list[Json] = [message.model_dump(exclude_none=True) for message in body.messages or ()]
    continues = bool(body.continue_final_message)
    return require_template(state.chat).encode(
        tools.template_messages(messages),
        tools.template_tools,
        add_generation_prompt=body.add_generation_prompt is not False and not continues,
        continue_final_message=continues,
    )
