"""What every route of the API works with, built once in `build_app` and passed on by the application object.

Owns nothing but the references. Invariant: immutable after the start; whatever changes lives in the objects named here.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import cast

from fastapi import Request

from adapters_store.proof import Proving
from serve.api.auth import Door
from serve.api.drain import Drain
from serve.api.engine_gateway import EngineGateway
from serve.api.grammar_gate import GrammarGate
from serve.api.last_uses import LastUses
from serve.api.owned_adapters import OwnedAdapters
from serve.api.pin_keeper import PinKeeper
from serve.api.replica import Replica
from serve.api.tool_families import ToolFamily
from serve.api.training_desk import TrainingDesk
from serve.api.uploads import UploadPool
from serve.config import ApiConfig
from serve.errors import EngineLoading
from serve.messages import Ready
from serve.metrics import Metrics
from serve.probe.probe import proving_on
from serve.tenants.audit import AuditEvent
from serve.tenants.limiter import Limiter
from serve.tenants.principal import Principal, Scope
from serve.text.chat_encoder import ChatEncoder
from serve.text.tokenizer import TextTokenizer


@dataclass(frozen=True, slots=True)
class ApiState:
    """The rooms and values that routes use; `started` is the base card's unix time."""

    config: ApiConfig
    door: Door
    replica: Replica
    engine: EngineGateway
    # as one principal sees it: `api_state` gives each request the view of its own
    store: OwnedAdapters
    tokenizer: TextTokenizer
    chat: ChatEncoder | None
    tool_family: ToolFamily
    grammar_gate: GrammarGate
    # text of each control token to its id
    control_ids: Mapping[str, int]
    metrics: Metrics | None
    version: str
    started: int
    drain: Drain
    training: TrainingDesk
    pins: PinKeeper
    uploads: UploadPool = field(default_factory=UploadPool)
    last_uses: LastUses = field(default_factory=lambda: LastUses(time.time))

    @property
    def limiter(self) -> Limiter:
        """Return who counts what tenants use."""
        return self.replica.limiter

    @property
    def ready(self) -> Ready:
        """Return what the engine learnt at its start.

        Raises:
            EngineLoading: it has not started yet.
        """
        ready = self.engine.ready
        if ready is None:
            raise EngineLoading("the engine is starting; send the request again", retry_after_s=2)
        return ready

    @property
    def tenant(self) -> str | None:
        """Return whose jobs and data files this request may see; None: everybody's."""
        principal = self.store.principal
        return None if Scope.ADMIN in principal.scopes else principal.tenant

    def proving(self) -> Proving:
        """Return how an upload is proven; called in the event loop, before its bytes come.

        Raises:
            EngineLoading: the engine, which would run it, is not there.
        """
        return proving_on(self.engine, is_on=self.config.probe_adapters)

    async def record(self, event: AuditEvent, subject: str, detail: str = "") -> None:
        """Record what this request's principal did, where there are tenants; raises Unavailable."""
        if self.door.tenancy is not None:
            await self.door.tenancy.record(self.store.principal, event, subject, detail)


def api_state(request: Request) -> ApiState:
    """Return the state of the application that serves this request, with the store as its principal sees it."""
    state = cast(ApiState, request.app.state.api)
    principal: Principal | None = getattr(request.state, "principal", None)
    return state if principal is None else replace(state, store=state.store.seen_by(principal))
