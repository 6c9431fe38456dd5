"""vLLM's endpoints for loading and unloading adapters at run time, as controllers in the field call them.

Owns their bodies, texts and error types only; both end at the store's one door, so what they load survives a restart.
Invariant: a `lora_path` is read only when its real path lies under a folder that the operator named.
"""

import asyncio
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse

from adapters_store.store import AdapterVersion
from serve.api.adapters import remove_adapter
from serve.api.errors import error_responses
from serve.api.json_body import read_model, show
from serve.api.openapi import json_endpoint
from serve.api.schemas_adapters import LoadLoraRequest, UnloadLoraRequest
from serve.api.state import ApiState, api_state
from serve.errors import AdapterForbidden, ServeError
from serve.tenants.audit import AuditEvent

router = APIRouter(prefix="/v1", tags=["vllm"], responses=error_responses(), default_response_class=PlainTextResponse)


class _InVllmsWords(ServeError):
    """vLLM's own error object: production-stack's operator reads type and message at the top level, OpenAI's
    clients inside `error`."""

    def body(self) -> Mapping[str, object]:
        """Return both."""
        return {**super().body(), "object": "error", "message": self.message, "type": self.type, "param": self.param}


class InvalidUserInput(_InVllmsWords):
    """400 in vLLM's words: a field is missing, or the name is taken."""

    http_status = 400
    type = "InvalidUserInput"
    default_code = None


class NotFoundError(_InVllmsWords):
    """404 in vLLM's words: no such path, or no such adapter."""

    http_status = 404
    type = "NotFoundError"
    default_code = None


@router.post("/load_lora_adapter", **json_endpoint(LoadLoraRequest))
async def load_lora_adapter(request: Request) -> PlainTextResponse:
    """Publish the PEFT folder at `lora_path` under `lora_name`."""
    state = api_state(request)
    body = await read_model(request, LoadLoraRequest)
    if not body.lora_name or not body.lora_path:
        raise InvalidUserInput("Both 'lora_name' and 'lora_path' must be provided.")
    if body.lora_name == state.config.served_model_name:
        raise InvalidUserInput(f"{show(body.lora_name)} is the base model's name; choose another", param="lora_name")
    await _check_free(state, body.lora_name, replace=bool(body.load_inplace))
    folder = await asyncio.to_thread(_allowed_folder, body.lora_path, state.config.lora_roots)
    publish = partial(state.store.put_dir, body.lora_name, folder, proving=state.proving())
    with state.uploads.place():
        version: AdapterVersion = await state.uploads.commit(publish)
    await state.record(AuditEvent.UPLOAD, version.name, f"version {version.version} sha256:{version.digest}")
    state.engine.load_adapter(version.digest)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


@router.post("/unload_lora_adapter", **json_endpoint(UnloadLoraRequest))
async def unload_lora_adapter(request: Request) -> PlainTextResponse:
    """Delete the adapter `lora_name` with all its versions."""
    state = api_state(request)
    body = await read_model(request, UnloadLoraRequest)
    if not body.lora_name:
        raise InvalidUserInput("'lora_name' needs to be provided to unload a LoRA adapter.")
    if not await _exists(state, body.lora_name):
        raise NotFoundError(f"The lora adapter {show(body.lora_name)} cannot be found.", param="lora_name")
    await remove_adapter(state, body.lora_name)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


async def _check_free(state: ApiState, name: str, *, replace: bool) -> None:
    if not replace and await _exists(state, name):
        raise InvalidUserInput(
            f"The lora adapter {show(name)} has already been loaded. If you want to load the adapter in place, "
            "set 'load_inplace' to True.",
            param="lora_name",
        )


async def _exists(state: ApiState, name: str) -> bool:
    ref = await asyncio.to_thread(state.store.resolve, name)
    return ref is not None and ref.name == name


def _allowed_folder(lora_path: str, roots: tuple[Path, ...]) -> Path:
    """Return the real path of a folder under one of `roots`; what lies elsewhere gets one answer, there or not."""
    if not roots:
        raise AdapterForbidden(
            "this server takes no lora_path: its operator named no folder for them (--lora-root); "
            "send the files by POST /v1/adapters instead",
            param="lora_path",
        )
    try:
        folder = Path(lora_path).resolve()
        is_folder = folder.is_dir()
    except (OSError, ValueError, RuntimeError):
        raise InvalidUserInput("'lora_path' is not a path", param="lora_path") from None
    if not any(folder.is_relative_to(root.resolve()) for root in roots):
        raise AdapterForbidden(
            "'lora_path' lies outside the folders that this server's operator allows (--lora-root)", param="lora_path"
        )
    if not is_folder:
        raise NotFoundError("'lora_path' is not a folder that exists; it must hold a PEFT adapter", param="lora_path")
    return folder
