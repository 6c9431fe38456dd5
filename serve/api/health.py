"""What probes and scrapers read: started, alive, ready, metrics.

Owns the answers only; the heartbeat is the engine client's, the numbers are the metrics'. Probes: `/startupz`, was the
model loaded once; `/livez`, would a restart help; `/readyz`, may requests come: the model and all of `--preload` are
there. Invariant: nothing here waits for the engine, so a probe is answered in time however busy it is.
"""

from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse, Response

from serve.api.drain import Phase, draining
from serve.api.errors import error_responses
from serve.api.state import api_state
from serve.errors import EngineLoading, NotFound, Unavailable
from serve.metrics import METRICS_TYPE

router = APIRouter(tags=["health"], responses=error_responses())


@router.get("/livez")
async def livez(request: Request) -> dict[str, str]:
    """200 while the engine's heartbeat is fresh, or it still has time to start."""
    if not api_state(request).engine.is_live:
        raise Unavailable("the engine does not answer; it is being restarted", retry_after_s=5)
    return {"status": "ok"}


@router.get("/startupz")
async def startupz(request: Request) -> dict[str, str]:
    """200 once the engine has been ready for the first time, and from then on."""
    if api_state(request).engine.ready is None:
        raise EngineLoading("the engine is loading the model", retry_after_s=2)
    return {"status": "ok"}


@router.get("/readyz")
@router.get("/health")
async def readyz(request: Request) -> dict[str, str]:
    """200 while requests are accepted and make progress, once all adapters of `--preload` are published."""
    state = api_state(request)
    engine = state.engine
    if engine.is_draining or state.drain.phase > Phase.OPEN:
        raise draining()
    if not engine.is_ready:
        raise EngineLoading("the engine is not ready to take requests", retry_after_s=2)
    if state.drain.phase is Phase.PREPARING:
        raise EngineLoading("the adapters of --preload are being published", code="preloading", retry_after_s=2)
    return {"status": "ok"}


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    """Prometheus text, rendered from the last heartbeat; most scrapes take the short way, `scrape`."""
    state = api_state(request)
    if state.metrics is None:
        raise NotFound("this server was built without metrics")
    return Response(state.metrics.render(), media_type=METRICS_TYPE)
