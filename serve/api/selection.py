"""Which base or adapter a request means, and how an answer says so.

Owns the reading of `model`, `adapter_id` and `adapters`, and the fingerprint that names the choice. Invariant: a name
that is not known is a 404 of one shape, and never becomes the base's answer.
"""

import asyncio
import hashlib
from functools import partial

from fastapi import Request

from adapters_store.canary import StickyId
from adapters_store.store import AdapterRef
from serve.api.auth import principal_of
from serve.api.json_body import show
from serve.api.request_context import request_id
from serve.api.schemas import ModelChoice, WeightedAdapter
from serve.api.state import ApiState
from serve.api.target import Share, Target
from serve.errors import InvalidValue, ModelNotFound, UnsupportedParameter


def sticky_id(request: Request, choice: ModelChoice) -> StickyId:
    """Return whose request this is where a canary may answer it; without a user field, each request is its own."""
    user = choice.user or choice.safety_identifier
    own = f"request {request_id(request)}" if user is None else f"user {user}"
    return StickyId(user=own, key=f"key {principal_of(request).key_id}")


async def resolve_target(state: ApiState, choice: ModelChoice, sticky: StickyId) -> Target:
    """Return what a request's fields select; `sticky` decides whether a name's canary answers it.

    Raises:
        ModelNotFound: no such base, adapter, version or alias.
        InvalidValue: a composition that names the base, or an adapter twice.
        UnsupportedParameter: a doubtful pair of names, or an adapter that cannot be composed.
    """
    if choice.adapters and (len(choice.adapters) > 1 or choice.adapters[0].weight != 1):
        _check_composes(state, choice)
        shares = await _resolve_shares(state, choice.adapters, sticky)
        for share in shares:
            state.last_uses.use(share.adapter.digest)
        return Target(choice.model, None, shares)
    model, param = _selected_model(state, choice)
    adapter = await resolve_adapter(state, model, sticky, param=param, to_serve=True)
    if adapter is None and choice.adapters:
        raise _names_base(model, param)
    if adapter is not None:
        state.last_uses.use(adapter.digest)
    return Target(choice.model, adapter)


async def resolve_adapter(
    state: ApiState,
    model: str,
    sticky: StickyId | None = None,
    *,
    param: str = "model",
    to_serve: bool = False,
) -> AdapterRef | None:
    """Return the adapter that `model` names, None for the base.

    Raises:
        ModelNotFound: neither. SignatureInvalid: it is `to_serve`, and this server does not serve it.
    """
    if model == state.config.served_model_name:
        return None
    ref = await asyncio.to_thread(partial(state.store.resolve, model, sticky, to_serve=to_serve))
    if ref is None:
        raise ModelNotFound(f"the model {show(model)} does not exist; GET /v1/models lists what is served", param=param)
    if state.metrics is not None:
        state.metrics.name_adapter(ref.digest, state.store.metrics_name(ref))
    return ref


def fingerprint(state: ApiState, target: Target) -> str:
    """Return `system_fingerprint`: equal fingerprints and seeds give equal answers."""
    ready = state.ready
    facts = "|".join((state.version, ready.base_fingerprint, ready.dtype, target.identity))
    return f"fp_{hashlib.sha256(facts.encode()).hexdigest()[:12]}"


def _check_composes(state: ApiState, choice: ModelChoice) -> None:
    if choice.adapter_id is not None:
        raise UnsupportedParameter("send 'adapters' or 'adapter_id', not both", param="adapter_id")
    if choice.model != state.config.served_model_name:
        raise UnsupportedParameter(
            f"a composition acts on the base: send its name {state.config.served_model_name!r} as 'model' and every "
            "adapter in 'adapters'",
            param="model",
        )


async def _resolve_shares(state: ApiState, adapters: list[WeightedAdapter], sticky: StickyId) -> tuple[Share, ...]:
    shares: list[Share] = []
    for index, entry in enumerate(adapters):
        param = f"adapters.{index}.name"
        ref = await resolve_adapter(state, entry.name, sticky, param=param, to_serve=True)
        if ref is None:
            raise _names_base(entry.name, param)
        if any(share.adapter.digest == ref.digest for share in shares):
            raise InvalidValue(
                f"{show(entry.name)} names an adapter of this composition again; add its weights up", param=param
            )
        reason = _why_alone(ref)
        if reason is not None:
            raise UnsupportedParameter(
                f"adapter {show(entry.name)} {reason}, which no composition can weigh; name it alone as 'model'",
                param=param,
            )
        shares.append(Share(ref, entry.weight))
    return tuple(shares)


def _names_base(name: str, param: str) -> InvalidValue:
    return InvalidValue(f"{show(name)} is the base itself; 'adapters' holds adapters only", param=param)


def _why_alone(ref: AdapterRef) -> str | None:
    if ref.num_virtual_tokens:
        return f"puts {ref.num_virtual_tokens} virtual tokens before the prompt"
    return "acts only behind its invocation tokens" if ref.invocation_tokens else None


def _selected_model(state: ApiState, choice: ModelChoice) -> tuple[str, str]:
    """Return the one name that selects, and the field that holds it."""
    named = choice.adapter_id
    param = "adapter_id"
    if choice.adapters:
        if named is not None:
            raise UnsupportedParameter("send 'adapters' or 'adapter_id', not both", param="adapter_id")
        # one adapter of weight 1 is no composition but that adapter
        named, param = choice.adapters[0].name, "adapters"
    if named is None:
        return choice.model, "model"
    if choice.model not in (named, state.config.served_model_name):
        raise UnsupportedParameter(
            f"'model' and {param!r} name different things; send the base's name as 'model', or leave {param!r} out",
            param=param,
        )
    return named, "adapters.0.name" if choice.adapters else param
