"""What a client may send about adapters, besides the multipart upload.

Owns the JSON bodies of `/v1/adapters/...` and of vLLM's two endpoints. Invariant: as in `schemas`, no coercion and a
bound on every size.
"""

from typing import Annotated, ClassVar

from pydantic import Field

from serve.api.schemas import RequestModel

_Name = Annotated[str, Field(max_length=256)]


class AliasRequest(RequestModel):
    """Let `name:alias` mean one version."""

    alias: Annotated[str, Field(min_length=1, max_length=256)]
    version: Annotated[int, Field(ge=1, le=(1 << 31) - 1)]


class GrantRequest(RequestModel):
    """Let a tenant use an adapter; `*` is everybody."""

    tenant: Annotated[str, Field(min_length=1, max_length=64)]


class LoadLoraRequest(RequestModel):
    """vLLM's `POST /v1/load_lora_adapter`; absent fields get vLLM's own error, so none is required here."""

    refused_fields: ClassVar[frozenset[str]] = frozenset({"is_3d_lora_weight"})

    lora_name: _Name | None = None
    lora_path: Annotated[str, Field(max_length=4096)] | None = None
    load_inplace: bool | None = None


class UnloadLoraRequest(RequestModel):
    """vLLM's `POST /v1/unload_lora_adapter`; `lora_int_id` means nothing here and is ignored."""

    lora_name: _Name | None = None
