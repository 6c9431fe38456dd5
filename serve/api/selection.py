"""Which base or adapter a request means, and how an answer says so.

Owns the reading of `model`, `adapter_id` and `adapters`, and the headers and fingerprint that name the choice.
Invariant: a name that is not known is a 404 of one shape, and never becomes the base's answer.
"""

import asyncio
import hashlib
from dataclasses import dataclass

from adapters_store.store import AdapterRef
from serve.api.json_body import show
from serve.api.schemas import ModelChoice
from serve.api.state import ApiState
from serve.errors import ModelNotFound, UnsupportedParameter
from serve.messages import Started


@dataclass(frozen=True, slots=True)
class Target:
    """What serves a request: the base alone (`adapter` None) or the base with one adapter."""

    model: str
    adapter: AdapterRef | None

    @property
    def digest(self) -> str | None:
        """Return the adapter's digest as the engine knows it."""
        return self.adapter.digest if self.adapter is not None else None

    def headers(self, started: Started | None = None) -> dict[str, str]:
        """Return the headers that name the adapter and what its load has cost this request."""
        if self.adapter is None:
            return {}
        headers = {"x-adapter-id": self.adapter.name, "x-adapter-digest": f"sha256:{self.adapter.digest}"}
        if started is not None:
            headers["x-adapter-cold-start-ms"] = str(round(started.adapter_load_s * 1000))
        return headers


async def resolve_target(state: ApiState, choice: ModelChoice) -> Target:
    """Return what a request's fields select.

    Raises:
        ModelNotFound: no such base, adapter, version or alias.
        UnsupportedParameter: a composition, a doubtful pair of names, or `cold_start: "base"`.
    """
    if choice.cold_start == "base":
        raise UnsupportedParameter(
            "cold_start 'base' is not supported: an answer without the adapter is a wrong answer; use 'wait' or 'fail'",
            param="cold_start",
        )
    model = _selected_model(state, choice)
    return Target(choice.model, await resolve_adapter(state, model))


async def resolve_adapter(state: ApiState, model: str) -> AdapterRef | None:
    """Return the adapter that `model` names, None for the base.

    Raises:
        ModelNotFound: neither.
    """
    if model == state.config.served_model_name:
        return None
    ref = await asyncio.to_thread(state.store.resolve, model)
    if ref is None:
        raise ModelNotFound(
            f"the model {show(model)} does not exist; GET /v1/models lists what is served", param="model"
        )
    if state.metrics is not None:
        state.metrics.name_adapter(ref.digest, ref.name)
    return ref


def fingerprint(state: ApiState, target: Target) -> str:
    """Return `system_fingerprint`: equal fingerprints and seeds give equal answers."""
    ready = state.ready
    facts = "|".join((state.version, ready.base_fingerprint, ready.dtype, target.digest or "base"))
    return f"fp_{hashlib.sha256(facts.encode()).hexdigest()[:12]}"


def _selected_model(state: ApiState, choice: ModelChoice) -> str:
    named = choice.adapter_id
    param = "adapter_id"
    if choice.adapters:
        if len(choice.adapters) != 1 or choice.adapters[0].weight != 1 or named is not None:
            raise UnsupportedParameter(
                "composing adapters is not supported; send exactly one adapter with weight 1", param="adapters"
            )
        named, param = choice.adapters[0].name, "adapters"
    if named is None:
        return choice.model
    if choice.model not in (named, state.config.served_model_name):
        raise UnsupportedParameter(
            f"'model' and {param!r} name different things; send the base's name as 'model', or leave {param!r} out",
            param=param,
        )
    return named
