"""The HTTP application: its state, its layers and its rooms' routers.

Owns the wiring only. Invariant: every route declares its scope and is behind `authorise`, and every answer passes the
request context and the body guard.
"""

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from importlib.metadata import PackageNotFoundError, version

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse

from adapters_store.shared_pins import open_pins
from adapters_store.store import AdapterStore
from serve.api import (
    adapter_files,
    adapter_memory,
    adapters,
    chat,
    compat_vllm,
    completions,
    embeddings,
    files,
    fine_tuning,
    grants,
    health,
    models,
    tokenize,
    versions,
)
from serve.api.auth import Door, authorise
from serve.api.body import BodyGuard
from serve.api.drain import Drain, DrainGate
from serve.api.engine_gateway import EngineGateway
from serve.api.errors import error_responses, install_errors
from serve.api.grammar_gate import GrammarGate
from serve.api.job_publisher import publishing
from serve.api.known_scrapes import KnownScrapes
from serve.api.owned_adapters import OwnedAdapters
from serve.api.pin_keeper import PinKeeper, keeping_pins
from serve.api.replica import Replica
from serve.api.request_context import RequestContext
from serve.api.request_log import RequestObserver
from serve.api.route_scopes import check_routes
from serve.api.scrape import ScrapeRoute
from serve.api.state import ApiState
from serve.api.tenant_share import take_share
from serve.api.tool_families import detect_family
from serve.api.training_desk import TrainingDesk
from serve.api.training_metrics import training_metrics
from serve.config import ApiConfig
from serve.metrics import Metrics
from serve.tenants.principal import Principal
from serve.text.chat_encoder import ChatEncoder
from serve.text.tokenizer import TextTokenizer

_ROOMS = (
    chat,
    completions,
    embeddings,
    models,
    tokenize,
    adapters,
    versions,
    adapter_memory,
    adapter_files,
    grants,
    files,
    fine_tuning,
    compat_vllm,
    health,
)


def build_app(
    config: ApiConfig,
    engine: EngineGateway,
    store: AdapterStore,
    metrics: Metrics | None = None,
    drain: Drain | None = None,
    traces: RequestObserver | None = None,
) -> FastAPI:
    """Build the application over an engine and a store, both of which the caller starts and closes; it closes `traces`.

    Raises:
        StartError: the model's tokenizer or chat template cannot be used, the keys cannot, or a route has no scope.
    """
    state = _build_state(config, engine, store, metrics, drain or Drain())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None, None]:
        async with publishing(state), training_metrics(state), keeping_pins(state.pins):
            yield
        await state.grammar_gate.close()
        state.uploads.close()
        state.training.close()
        await state.limiter.close()
        state.door.close()
        if traces is not None:
            await asyncio.to_thread(traces.close)

    app = FastAPI(
        title="Chorale",
        version=state.version,
        lifespan=lifespan,
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        dependencies=[Depends(authorise), Depends(take_share)],
    )
    app.state.api = state
    # a trace is made of a request's way through the layers
    app.state.scrapes = None
    if metrics is not None and traces is None:
        app.state.scrapes = KnownScrapes(state.door, metrics, state.drain)
    routers = [*(room.router for room in _ROOMS), _build_docs(app)]
    routes = [route for router in routers for route in router.routes]
    check_routes(routes)
    install_errors(app, routes, max_in_flight=config.limits.max_in_flight)
    for router in routers:
        app.include_router(router)
    app.add_middleware(BodyGuard, limits=config.limits)
    app.add_middleware(ScrapeRoute, state=state, routes=routes)
    app.add_middleware(DrainGate, drain=state.drain)
    app.add_middleware(RequestContext, traces=traces)
    return app


def _build_state(
    config: ApiConfig, engine: EngineGateway, store: AdapterStore, metrics: Metrics | None, drain: Drain
) -> ApiState:
    door = Door.open(config)
    tokenizer = TextTokenizer.load(config.model_dir)
    encoder = ChatEncoder.load(config.model_dir, tokenizer)
    return ApiState(
        config=config,
        door=door,
        replica=Replica.open(config, store, metrics),
        engine=engine,
        # a request without a principal sees nothing: no tenant has this name
        store=OwnedAdapters(store, config.served_model_name, Principal("", frozenset(), "nobody"), door.shared_with),
        tokenizer=tokenizer,
        chat=encoder,
        tool_family=detect_family(encoder.template_source if encoder is not None else None),
        grammar_gate=GrammarGate(tokenizer.tokenizer, config.limits),
        control_ids=tokenizer.special_ids_by_text(),
        metrics=metrics,
        version=_version(),
        started=int(time.time()),
        drain=drain,
        training=TrainingDesk.open(config.store_dir, config.blobs_url),
        pins=PinKeeper(open_pins(config.store_dir, config.blobs_url), engine, store.check_digest),
    )


def _build_docs(app: FastAPI) -> APIRouter:
    """Return our own document routes: FastAPI's would stand outside the key check."""
    router = APIRouter(include_in_schema=False, responses=error_responses())

    @router.get("/openapi.json")
    async def openapi(request: Request) -> dict[str, object]:
        return app.openapi()

    @router.get("/docs")
    async def docs(request: Request) -> HTMLResponse:
        return get_swagger_ui_html(openapi_url="/openapi.json", title="Chorale")

    return router


def _version() -> str:
    try:
        return version("chorale")
    # run from a checkout that was never installed
    except PackageNotFoundError:
        return "0.0.0"
