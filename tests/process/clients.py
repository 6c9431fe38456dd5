"""What the process tests share: short time-outs, and a client around a fake engine that is always closed."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

from serve.api.engine_client import EngineClient
from serve.config import EngineConfig, LimitsConfig, WatchdogConfig
from serve.messages import SamplingParams, Submit, Tokens
from serve.metrics import Metrics
from tests.process.fake_engine import COUNT

FAKE_WORKER = "tests.process.fake_engine"
QUICK = WatchdogConfig(
    heartbeat_timeout_s=120.0, start_timeout_s=240.0, restart_backoff_s=0.05, max_restart_backoff_s=0.2
)
# for engines that do hang; a false alarm on a loaded machine would only replace them sooner
HASTY = replace(QUICK, heartbeat_timeout_s=1.5)


def build_client(
    *,
    start: str = "works",
    limits: LimitsConfig | None = None,
    watchdog: WatchdogConfig = QUICK,
    clock: Callable[[], float] = time.monotonic,
) -> EngineClient:
    """Return a client whose engine is fake and starts as `start` says (see `fake_engine.build_fake`)."""
    engine = EngineConfig(model_dir=Path("models") / start, store_dir=Path("store"))
    return EngineClient(engine, limits or LimitsConfig(), watchdog, Metrics(), worker_module=FAKE_WORKER, clock=clock)


@contextlib.asynccontextmanager
async def running_client(
    *,
    limits: LimitsConfig | None = None,
    watchdog: WatchdogConfig = QUICK,
    clock: Callable[[], float] = time.monotonic,
) -> AsyncIterator[EngineClient]:
    """Yield a client with a started engine, closed at the end."""
    client = build_client(limits=limits, watchdog=watchdog, clock=clock)
    client.start()
    try:
        await client.wait_ready()
        yield client
    finally:
        await client.close()


def submit(request_id: str, *, max_tokens: int = 5, behaviour: int = COUNT, adapter: str | None = None) -> Submit:
    """Return a request that the fake engine answers as `behaviour` says."""
    return Submit(request_id, [behaviour, 1, 2], SamplingParams(max_tokens=max_tokens, seed=0), adapter)


async def collect(client: EngineClient, request: Submit) -> list[int]:
    """Return all output tokens of one request."""
    return [token async for event in client.generate(request) if isinstance(event, Tokens) for token in event.token_ids]


async def eventually(claim: Callable[[], bool], timeout_s: float = 120.0) -> None:
    """Return once the claim holds; fail after `timeout_s`."""
    end_at = time.monotonic() + timeout_s
    while not claim():
        assert time.monotonic() < end_at, "the claim did not come true in time"
        await asyncio.sleep(0.01)
