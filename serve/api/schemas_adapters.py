"""What a client may send about adapters, besides the multipart upload.

Owns the JSON bodies of `/v1/adapters/...` and of vLLM's two endpoints. Invariant: as in `schemas`, no coercion and a
bound on every size.
"""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from serve.api.schemas import Number, RequestModel
from serve.errors import InvalidValue

_Name = Annotated[str, Field(max_length=256)]


class AliasRequest(RequestModel):
    """Let `name:alias` mean one version."""

    alias: Annotated[str, Field(min_length=1, max_length=256)]
    version: Annotated[int, Field(ge=1, le=(1 << 31) - 1)]


_Version = Annotated[int, Field(ge=1, le=(1 << 31) - 1)]
_Alias = Annotated[str, Field(min_length=1, max_length=256)]


class VersionChoice(RequestModel):
    """One version of an adapter, by its number or by an alias of it."""

    version: _Version | None = None
    alias: _Alias | None = None

    @model_validator(mode="after")
    def _check_one(self) -> "VersionChoice":
        if (self.version is None) == (self.alias is None):
            raise InvalidValue("send one of 'version', its number, and 'alias', an alias of it", param="version")
        return self

    @property
    def chosen(self) -> int | str:
        """The number, or the alias."""
        return self.alias if self.version is None and self.alias is not None else self.version or 0


class PromoteRequest(VersionChoice):
    """Let the plain name, or the alias `to`, mean a version."""

    to: _Alias | None = None


class CanaryRequest(VersionChoice):
    """Give a version a share of the plain name's requests."""

    percent: Annotated[Number, Field(ge=0, le=100)]
    sticky: Literal["user", "key"] = "user"


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
