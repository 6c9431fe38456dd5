"""Chorale on Ray Serve: `chorale.ray:app` builds the application (extra [ray]).

Each replica is one ordinary `chorale serve` in a process of its own, so everything else in the documentation holds; all
replicas share one store through Redis. The ingress reads `model` from the body and routes by it: a replica that has an
adapter in memory is preferred. Owns the ingress, the replicas' processes and nothing of what they serve. Invariants: a
request is tried again elsewhere only while its client has seen nothing of an answer; a replica's server ends with it.
"""

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

import httpx
from ray import serve
from ray.exceptions import RayError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

# headers of one connection, and those that describe a body that is framed anew
_HOP = frozenset(
    {"connection", "content-length", "host", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade"}
)
# sent twice they do what they do once
_REPEATABLE = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/tokenize", "/detokenize")
_MAX_TRIES = 3
_START_TIMEOUT_S = 1800.0
# from Ray's request to leave to the end of what runs; Serve waits a little longer
_DRAIN_TIMEOUT_S = 60


@dataclass(frozen=True, slots=True)
class Settings:
    """What `args` of the application may say; numbers may come as text from the command line."""

    model: str
    store: str
    redis_url: str = ""
    min_replicas: int = 1
    max_replicas: int = 4
    # requests that one replica works on before another one is started
    target_ongoing_requests: int = 32
    # adapters that Serve remembers each replica to hold
    adapters_per_replica: int = 64
    num_cpus: float = 1.0
    num_gpus: float = 0.0
    # further flags of `chorale serve`, as on the command line
    flags: str = ""

    @classmethod
    def read(cls, args: Mapping[str, str]) -> "Settings":
        """Read the application's arguments; raises ValueError for a key that is none, or several replicas alone."""
        known = {name: field.type for name, field in cls.__dataclass_fields__.items()}
        if unknown := sorted(set(args) - set(known)):
            raise ValueError(f"unknown argument '{unknown[0]}'; known: {', '.join(known)}")
        if missing := [name for name in ("model", "store") if not args.get(name)]:
            raise ValueError(f"the argument '{missing[0]}' is missing: as --{missing[0]} of `chorale serve`")
        values: dict[str, Any] = {
            name: int(value) if known[name] is int else float(value) if known[name] is float else value
            for name, value in args.items()
        }
        settings = cls(**values)
        if settings.max_replicas > 1 and not settings.redis_url:
            raise ValueError("several replicas share one store through Redis: give redis_url, or max_replicas=1")
        return settings


def app(args: dict[str, str]) -> "serve.Application":
    """Build the application: `serve run chorale.ray:app model=MODEL store=DIR redis_url=URL`."""
    settings = Settings.read(args)
    replica = serve.deployment(Replica).options(
        name="chorale",
        autoscaling_config={
            "min_replicas": settings.min_replicas,
            "max_replicas": settings.max_replicas,
            "target_ongoing_requests": settings.target_ongoing_requests,
            "downscale_delay_s": 600,
        },
        max_ongoing_requests=4 * settings.target_ongoing_requests,
        ray_actor_options={"num_cpus": settings.num_cpus, "num_gpus": settings.num_gpus},
        graceful_shutdown_timeout_s=_DRAIN_TIMEOUT_S + 15,
        health_check_period_s=2,
        health_check_timeout_s=10,
    )
    ingress = serve.deployment(Ingress).options(
        name="ingress", num_replicas=1, max_ongoing_requests=4096, ray_actor_options={"num_cpus": 0}
    )
    return ingress.bind(replica.bind(settings))


class Replica:
    """One server process and the way to it."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._server: asyncio.subprocess.Process | None = None
        self._starting = asyncio.get_running_loop().create_task(self._start())

        async def hold(name: str) -> str:
            return name

        # Serve routes a name to those replicas that have asked for it lately; the engine itself decides what it keeps
        self._hold = serve.multiplexed(max_num_models_per_replica=settings.adapters_per_replica)(hold)

    async def forward(
        self, method: str, path: str, headers: list[tuple[str, str]], body: bytes, model: str
    ) -> AsyncIterator[tuple[int, list[tuple[str, str]]] | bytes]:
        """Yield the server's status and headers, then the pieces of its body."""
        client = await self._starting
        if model:
            await self._hold(model)
        request = client.build_request(method, path, headers=headers, content=body)
        answer = await client.send(request, stream=True)
        try:
            kept = [(name, value) for name, value in answer.headers.items() if name not in _HOP]
            yield answer.status_code, [*kept, ("x-chorale-replica", str(os.getpid()))]
            async for piece in answer.aiter_raw():
                yield piece
        finally:
            await answer.aclose()

    async def check_health(self) -> None:
        """Tell Serve to replace this replica if its server is gone; raises RuntimeError.

        Serve's first question comes before any request and takes its time: a replica counts once its server is ready,
        so an update replaces no replica by one that still loads the model.
        """
        await self._starting
        if self._server is not None and self._server.returncode is not None:
            raise RuntimeError(f"the server ended with status {self._server.returncode}")

    async def __del__(self) -> None:
        """End the server; Serve calls this after the last request."""
        if self._server is not None and self._server.returncode is None:
            self._server.terminate()
            await self._server.wait()

    async def _start(self) -> httpx.AsyncClient:
        settings = self._settings
        command = [sys.executable, "-m", "chorale.tied", str(os.getpid())]
        command += [
            "serve",
            "--model",
            settings.model,
            "--store",
            settings.store,
            "--port",
            "0",
            "--drain-delay-s",
            "0",
        ]
        command += ["--drain-timeout-s", str(_DRAIN_TIMEOUT_S)]
        command += ["--redis-url", settings.redis_url] if settings.redis_url else []
        self._server = await asyncio.create_subprocess_exec(
            *command, *settings.flags.split(), stdout=asyncio.subprocess.PIPE
        )
        assert self._server.stdout is not None, "stdout is a pipe"
        line = (await asyncio.wait_for(self._server.stdout.readline(), _START_TIMEOUT_S)).decode().strip()
        if not line.startswith("chorale ready "):
            raise RuntimeError(f"the server did not start; its log says why (its last line: {line!r})")
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        url = line.removeprefix("chorale ready ")
        return httpx.AsyncClient(base_url=url, timeout=None, limits=limits, trust_env=False)


class Ingress:
    """The HTTP side: reads the body for its model, routes, and streams the answer."""

    def __init__(self, replicas: "serve.handle.DeploymentHandle") -> None:
        self._replicas = replicas

    async def __call__(self, request: Request) -> Response:
        """Answer one request."""
        body = await request.body()
        path = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        headers = [(name, value) for name, value in request.headers.items() if name not in _HOP]
        model = _model(request.headers.get("content-type", ""), body)
        num_tries = _MAX_TRIES if request.method == "GET" or request.url.path in _REPEATABLE else 1
        for _ in range(num_tries):
            pieces = self._replicas.options(stream=True, multiplexed_model_id=model).forward.remote(
                request.method, path, headers, body, model
            )
            try:
                status, answer_headers = await anext(aiter(pieces))
            except (RayError, httpx.TransportError):
                # the replica was lost before it said anything
                continue
            answer = StreamingResponse(_rest(pieces), status)
            answer.raw_headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in answer_headers]
            return answer
        error = {"message": "the replica was lost; send the request again", "type": "server_error"}
        content = {"error": {**error, "param": None, "code": "replica_lost"}}
        return JSONResponse(content, 503, {"retry-after": "2"})


async def _rest(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    async for piece in pieces:
        yield piece


def _model(content_type: str, body: bytes) -> str:
    """Return the name that a JSON body asks for; "" for bodies without one, which any replica may answer."""
    if "json" not in content_type:
        return ""
    try:
        content = json.loads(body)
    except ValueError:
        return ""
    name = content.get("model") if isinstance(content, dict) else None
    return name if isinstance(name, str) else ""
