"""POST /v1/embeddings: pooled hidden states of the base, with or without an adapter.

Owns the answer's two encodings; pooling is the engine's. Invariant: the vectors come in the order of the inputs, and
one failed input fails the request.
"""

import asyncio
import base64
import struct
import uuid
from collections.abc import Sequence

import msgspec
from fastapi import APIRouter, Request
from fastapi.responses import Response

from serve.api.auth import principal_of
from serve.api.cold_start import engine_rule, warm_target
from serve.api.disconnect import unless_disconnected
from serve.api.json_body import read_model
from serve.api.limits import check_num_prompts
from serve.api.openapi import json_endpoint
from serve.api.request_log import record_of
from serve.api.sampling import fit_prompt, output_budget
from serve.api.schemas_completions import EmbeddingRequest, Prompt
from serve.api.selection import resolve_target, sticky_id
from serve.api.state import ApiState, api_state
from serve.api.target import Target
from serve.api.tenant_share import charge_tokens, share_of
from serve.errors import Unavailable
from serve.messages import Embed, Ready
from serve.tenants.principal import Principal
from serve.text.tokenizer import TextTokenizer

router = APIRouter()


@router.post("/v1/embeddings", **json_endpoint(EmbeddingRequest))
async def create_embeddings(request: Request) -> Response:
    """Embed one or several inputs."""
    state = api_state(request)
    body = await read_model(request, EmbeddingRequest)
    check_num_prompts(len(body.input), state.config.limits, param="input")
    target = await resolve_target(state, body, sticky_id(request, body))
    await charge_tokens(request, 0)
    state.engine.admit(len(body.input))
    target = await warm_target(request, state, body, target)
    encoded = await asyncio.to_thread(_encode, state.tokenizer, body.input)
    prompts = [
        _fit(token_ids, body.truncate_prompt_tokens, state.ready, target.num_virtual_tokens) for token_ids in encoded
    ]
    num_tokens = sum(len(prompt) for prompt in prompts)
    share_of(request).pay_by(lambda: num_tokens)
    record_of(request).runs(target, prompts)
    principal = principal_of(request)
    vectors = await unless_disconnected(request, _embed_all(state, prompts, target, body, principal))
    is_base64 = body.encoding_format == "base64"
    answer = {
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": _base64(vector) if is_base64 else vector}
            for index, vector in enumerate(vectors)
        ],
        "model": target.model,
        "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
    }
    return Response(msgspec.json.encode(answer), headers=target.headers(), media_type="application/json")


async def _embed_all(
    state: ApiState, prompts: Sequence[list[int]], target: Target, body: EmbeddingRequest, principal: Principal
) -> list[list[float]]:
    identity = uuid.uuid4().hex
    commands = [
        Embed(
            f"{identity}-{index}",
            prompt,
            body.pooling or "mean",
            acts.adapter_digest,
            acts.adapters,
            acts.num_virtual_tokens,
            acts.active_from,
            principal.tenant,
            state.config.limits.tenant_weights.get(principal.tenant, 1.0),
            deadline_s=body.deadline_s,
            cache_salt=state.door.salt_of(principal),
            cold_start=engine_rule(body),
        )
        for index, (prompt, acts) in enumerate((prompt, target.acts_on(prompt)) for prompt in prompts)
    ]
    timeout_s = state.config.limits.request_timeout_s
    try:
        async with asyncio.timeout(timeout_s):
            return await _gather(state, commands)
    except TimeoutError:
        raise Unavailable(f"the request took longer than {timeout_s:g} s; send fewer inputs at a time") from None


async def _gather(state: ApiState, commands: Sequence[Embed]) -> list[list[float]]:
    tasks = [asyncio.ensure_future(state.engine.embed(command)) for command in commands]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _fit(token_ids: list[int], truncate: int | None, ready: Ready, num_virtual: int) -> list[int]:
    fitted = fit_prompt(token_ids, truncate, 0, ready, num_virtual=num_virtual, param="input")
    output_budget(len(fitted), 0, ready, num_virtual=num_virtual, prompt_param="input")
    return fitted


def _encode(tokenizer: TextTokenizer, inputs: Sequence[Prompt]) -> list[list[int]]:
    return [tokenizer.encode(entry) if isinstance(entry, str) else entry for entry in inputs]


def _base64(vector: Sequence[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode("ascii")
