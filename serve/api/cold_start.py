"""What a request's `cold_start` does when its adapters are not on the device.

Owns the choice of "base"; "wait" and "fail" are the engine's. Invariants: the engine says where adapters are, not a
heartbeat; the choice is made once per request, before its prompt is fitted, for all of its sequences; a base that
stands in is a target like any other base, so nothing of the adapters (digest, virtual tokens, activation) goes with it.
"""

from fastapi import Request

from serve.api.auth import principal_of
from serve.api.schemas import ModelChoice
from serve.api.state import ApiState
from serve.api.target import Target


async def warm_target(request: Request, state: ApiState, choice: ModelChoice, target: Target) -> Target:
    """Return the target, or with `cold_start: "base"` and cold adapters the base; their prefetch has then begun.

    An adapter that leaves the device between this and its turn is waited for.

    Raises:
        ServeError: the adapters can never be served here, or no engine answers.
    """
    digests = tuple(dict.fromkeys(_needed(target)))
    if choice.cold_start != "base" or not digests:
        return target
    tenant = principal_of(request).tenant
    weight = state.config.limits.tenant_weights.get(tenant, 1.0)
    if await state.engine.desk.is_ready(digests, tenant, weight):
        return target
    if state.metrics is not None:
        state.metrics.count_stand_in()
    return Target(state.config.served_model_name, None, stands_in_for=target.adapters)


def engine_rule(choice: ModelChoice) -> str:
    """Return what the engine does with a sequence whose adapter it must load: "wait" or "fail"."""
    return "fail" if choice.cold_start == "fail" else "wait"


def _needed(target: Target) -> tuple[str, ...]:
    """Return the digests that act; an adapter of weight 0 does not, and is never loaded."""
    if target.adapter is not None:
        return target.digests
    return tuple(share.adapter.digest for share in target.shares if share.weight != 0.0)
