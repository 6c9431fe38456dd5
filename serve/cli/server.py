"""The running server: wires store, engine, API and HTTP together, says when it is ready, drains and stops.

Owns the order of start and stop and the signals; decides nothing about requests. Invariants: stdout carries the ready
line and nothing else; whatever way the server ends, the engine process and the socket are gone before `run_server`
returns; a first SIGINT or SIGTERM drains, a second one ends at once.

The drain: not ready at once; SIGTERM (a load balancer may stand before us) leaves the door open for a while; then new
requests are refused, running ones are finished, and what takes too long is cut.
"""

import asyncio
import contextlib
import gc
import logging
import signal
import socket
import sys
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import replace
from pathlib import Path

import uvicorn
import uvloop

from adapters_store.blob_choice import open_cache
from adapters_store.errors import StorageFailed, StoreFull
from adapters_store.formats import EXPORT_PART, Declared
from adapters_store.parts import CONFIG_PART
from adapters_store.proof import Proving
from adapters_store.quotas import OwnerQuota
from adapters_store.redis_url import masked
from adapters_store.store import AdapterStore
from serve.api.app import build_app
from serve.api.drain import Drain, Phase
from serve.api.engine_client import EngineClient
from serve.api.http_guard import guarded_protocol
from serve.cli.redis_extra import open_shared
from serve.cli.signing_extra import open_gate
from serve.cli.tracing_extra import open_traces
from serve.config import ServeConfig
from serve.engine.cpu_memory import give_back_free_memory
from serve.engine.launch import WORKER_MODULE
from serve.errors import StartError
from serve.metrics import Metrics
from serve.model.spec import ModelSpec, read_spec
from serve.probe.probe import proving_on

logger = logging.getLogger(__name__)

_BACKLOG = 1024
# responses whose last bytes are still on their way when the last stream has ended
_FLUSH_S = 5
# Python's own is 5 ms, which is several times what a scrape or a token may take
_SWITCH_S = 0.0002


def run_server(config: ServeConfig, *, preload: Path | None, worker_module: str = WORKER_MODULE) -> None:
    """Serve until a signal; returns after a clean end.

    Args:
        preload: folder of PEFT folders; those whose name the store lacks are published before the ready line.
        worker_module: what the engine process runs; tests pass a fake.
    Raises:
        StartError, StoreError: the server cannot start; the message is for the operator.
    """
    spec = read_spec(config.engine.model_dir)
    with (
        contextlib.closing(_open_store(config, spec)) as store,
        bound_socket(config.api.host, config.api.port) as listener,
    ):
        # the loop's thread waits no longer for one that computes on a request's behalf
        sys.setswitchinterval(_SWITCH_S)
        uvloop.run(Server(config, store, listener, worker_module).run(preload))


def _open_store(config: ServeConfig, spec: ModelSpec) -> AdapterStore:
    store_dir, redis_url = config.api.store_dir, config.api.redis_url
    if config.api.blobs_url is not None and redis_url is None:
        raise StartError("--blobs is what several replicas share: name their Redis too, with --redis-url")
    try:
        return AdapterStore.open(
            store_dir,
            spec.dims,
            base_dir=config.engine.model_dir,
            served_name=config.api.served_model_name,
            max_rank=config.engine.max_adapter_rank,
            max_upload_bytes=config.api.limits.max_upload_bytes,
            dense_budget_bytes=config.api.limits.dense_budget_bytes,
            registry=None if redis_url is None else open_shared(store_dir, redis_url, config.api.blobs_url),
            image_dtype=spec.dtype if config.engine.dtype == "auto" else config.engine.dtype,
        )
    except (StorageFailed, StoreFull) as error:
        reason = getattr(error.__cause__, "strerror", None)
        if reason is None:
            raise
        raise StartError(f"--store {store_dir}: {reason}; choose a folder that can be written") from error


class Server:
    """One life of the API process."""

    def __init__(self, config: ServeConfig, store: AdapterStore, listener: socket.socket, worker_module: str) -> None:
        self._config = config
        self._store = store
        bounds = config.api.tenant_limits
        store.quota = OwnerQuota(bounds.max_adapters, bounds.max_adapter_bytes)
        store.keep_versions = config.api.keep_versions
        cache_bytes = config.engine.blobs_cache_bytes
        store.copies = open_cache(config.api.store_dir, config.api.blobs_url, cache_bytes=cache_bytes)
        store.signatures = open_gate(config.api.signatures, config.api.trust_roots)
        self._listener = listener
        self._host = config.api.host
        self._delay_s = config.drain.delay_s
        metrics = Metrics(
            max_adapters=config.engine.num_adapter_slots,
            compat_vllm=config.api.metrics_compat_vllm,
            later=_in_next_turn,
        )
        self._engine = EngineClient(
            config.engine, config.api.limits, config.watchdog, metrics, worker_module=worker_module
        )
        self._drain = Drain(Phase.PREPARING)
        traces = open_traces(config.api.otel_endpoint)
        app = build_app(config.api, self._engine, store, metrics, self._drain, traces)
        self._http = SilentServer(
            uvicorn.Config(
                app,
                http=guarded_protocol(config.api.limits, app.state.scrapes),
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                backlog=_BACKLOG,
                timeout_graceful_shutdown=_FLUSH_S,
            )
        )

    async def run(self, preload: Path | None) -> None:
        """Start, serve, drain, stop."""
        signals = Signals(asyncio.get_running_loop())
        first, second = signals.first, signals.second
        self._engine.start()
        http = asyncio.create_task(self._http.serve(sockets=[self._listener]))
        # without it nothing can be drained
        http.add_done_callback(lambda _: signals.end_at_once())
        try:
            if await _finished_before(self._prepare(preload), first):
                self._drain.move_to(Phase.OPEN)
                # what start-up built stays: the collector need not walk through it between tokens
                gc.freeze()
                give_back_free_memory()
                self._say_ready()
                # the one place where the merged configuration is shown: a start that fails says one line
                logger.info("%s", _without_secrets(self._config))
                await first.wait()
                await _finished_before(self._drain_out(0.0 if signals.is_interrupt else self._delay_s), second)
        finally:
            # a client that does not read must not keep the process
            self._http.force_exit = second.is_set()
            self._http.should_exit = True
            await self._engine.close()
            await http

    async def _prepare(self, preload: Path | None) -> None:
        folders = [] if preload is None else await asyncio.to_thread(missing_adapters, self._store, preload)
        await self._engine.wait_ready()
        if folders:
            proving = proving_on(self._engine, is_on=self._config.api.probe_adapters)
            await asyncio.to_thread(publish, self._store, folders, proving)

    async def _drain_out(self, delay_s: float) -> None:
        timeout_s = self._config.drain.timeout_s
        # cut streams are told so, and slow clients must be gone inside the time too
        cut_at = asyncio.get_running_loop().time() + timeout_s - min(_FLUSH_S, timeout_s / 6)
        delay_s = min(delay_s, timeout_s)
        logger.info("leaving: not ready, taking requests for %g s, ending within %g s", delay_s, timeout_s)
        self._drain.move_to(Phase.LEAVING)
        await asyncio.sleep(delay_s)
        self._drain.move_to(Phase.REFUSING)
        logger.info("draining: %d requests run; a second signal ends at once", self._drain.num_open)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(cut_at):
                await self._drain.wait_empty()
        await self._engine.drain(0.0)

    def _say_ready(self) -> None:
        host = f"[{self._host}]" if ":" in self._host else self._host
        print(f"chorale ready http://{host}:{self._listener.getsockname()[1]}", flush=True)


def _in_next_turn(work: Callable[[], None]) -> None:
    asyncio.get_running_loop().call_soon(work)


class Signals:
    """SIGINT and SIGTERM as two events: the first one of them, and the second one. Event loop only."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.first, self.second = asyncio.Event(), asyncio.Event()
        # Ctrl-C: somebody waits before the screen, and no load balancer is told
        self.is_interrupt = False
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._take, number)

    def end_at_once(self) -> None:
        """Act as if both had come."""
        self.first.set()
        self.second.set()

    def _take(self, number: signal.Signals) -> None:
        if self.first.is_set():
            self.second.set()
        else:
            self.is_interrupt = number == signal.SIGINT
            self.first.set()


def _without_secrets(config: ServeConfig) -> ServeConfig:
    redis_url = None if config.api.redis_url is None else masked(config.api.redis_url)
    return replace(config, api=replace(config.api, api_keys=("***",) * len(config.api.api_keys), redis_url=redis_url))


class SilentServer(uvicorn.Server):
    """Uvicorn without its own signal handlers: `Server.run` has them."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals alone."""
        yield


@contextlib.contextmanager
def bound_socket(host: str, port: int) -> Iterator[socket.socket]:
    """Yield a bound TCP socket; port 0 takes a free one.

    Raises:
        StartError: the address cannot be bound.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise StartError(f"--host {host}: {error.strerror}") from error
    with listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
            listener.listen(_BACKLOG)
        except OSError as error:
            raise StartError(f"cannot listen on {host} port {port}: {error.strerror}; choose another --port") from error
        yield listener


def missing_adapters(store: AdapterStore, folder: Path) -> list[Path]:
    """Return the adapters in `folder`, PEFT's or our trainer's, whose name the store does not have yet.

    Raises:
        StartError: no such folder.
    """
    if not folder.is_dir():
        raise StartError(f"--preload {folder}: no such folder")
    present = {version.name for version in store.list()}
    found = sorted({path.parent for part in (CONFIG_PART, EXPORT_PART) for path in folder.glob(f"*/{part}")})
    return [adapter for adapter in found if adapter.name not in present]


def publish(store: AdapterStore, folders: list[Path], proving: Proving) -> None:
    """Publish folders under their names; raises StoreError or ServeError if one of them is refused."""
    for folder in folders:
        declared = Declared.of_export(folder)
        version = store.put_dir(folder.name, folder, trusted=True, declared=declared, proving=proving)
        logger.info("published adapter '%s' version %d", version.name, version.version)


async def _finished_before(work: Coroutine[object, object, object], event: asyncio.Event) -> bool:
    """Run the work until it ends or the event happens; return whether it ended. Its exception is raised."""
    task = asyncio.ensure_future(work)
    stop = asyncio.create_task(event.wait())
    try:
        await asyncio.wait({task, stop}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
        return task.done()
    finally:
        for pending in (task, stop):
            pending.cancel()
        await asyncio.gather(task, stop, return_exceptions=True)
