"""The API over a real socket: the application under uvicorn in a thread, with a fake engine and store behind it.

Owns the thread and the port. Invariant: `stop` returns only when the server's thread has ended.
"""

import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import cast

import httpx
import openai
import uvicorn

from adapters_store.store import AdapterStore
from serve.api.app import build_app
from serve.api.request_log import RequestObserver
from serve.config import ApiConfig, LimitsConfig
from tests.api.fake_engine import FakeEngine
from tests.api.fake_store import BASE, FakeStore

Json = dict[str, object]


class ApiServer:
    """One running server; tests talk to it over HTTP and look at its fakes."""

    def __init__(
        self,
        model_dir: Path,
        *,
        api_keys: tuple[str, ...] = (),
        limits: LimitsConfig | None = None,
        traces: RequestObserver | None = None,
    ) -> None:
        self.engine = FakeEngine()
        self.store = FakeStore()
        self.store.reset()
        self.store_dir = model_dir / "store"
        config = ApiConfig(
            model_dir=model_dir,
            store_dir=self.store_dir,
            served_model_name=BASE,
            limits=limits or LimitsConfig(),
            api_keys=api_keys,
        )
        self.app = build_app(config, self.engine, cast(AdapterStore, self.store), traces=traces)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._server = uvicorn.Server(
            uvicorn.Config(self.app, log_level="critical", lifespan="on", timeout_keep_alive=600)
        )
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._listener]}, daemon=True)
        self._thread.start()
        wait_until(lambda: self._server.started, "the server starts")
        self.http = httpx.Client(base_url=self.url, timeout=120)

    def stop(self) -> None:
        """End the server."""
        self.http.close()
        self._server.should_exit = True
        self._thread.join(timeout=60)
        self._listener.close()

    def openai(self, api_key: str = "none") -> openai.OpenAI:
        """Return OpenAI's own client of this server; close it after use."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=api_key, max_retries=0, timeout=120)

    def chat(self, content: object = "Hi", **fields: object) -> httpx.Response:
        """Send one chat."""
        body: Json = {"model": BASE, "messages": [{"role": "user", "content": content}], **fields}
        return self.http.post("/v1/chat/completions", json=body)

    def complete(self, prompt: object = "Hi", **fields: object) -> httpx.Response:
        """Send one completion."""
        return self.http.post("/v1/completions", json={"model": BASE, "prompt": prompt, **fields})


def wait_until(is_true: Callable[[], bool], what: str, *, timeout_s: float = 120.0) -> None:
    """Poll until a condition of another thread holds."""
    end = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < end, f"waited {timeout_s} s in vain: {what}"
        time.sleep(0.005)
