"""The whole API over the guarded protocol, with a real store and a fake engine: what a stranger can reach.

Owns the wiring only. Invariant: the store converts in this process, so an upload takes milliseconds.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from adapters_store.base import BaseDims
from adapters_store.store import AdapterStore
from serve.api.app import build_app
from serve.api.drain import Drain
from serve.api.state import ApiState
from serve.config import ApiConfig, LimitsConfig, TenantLimits
from serve.metrics import Metrics
from tests.api.fake_engine import FakeEngine
from tests.api_guard.wire import Served, served
from tests.store.folders import TINY, lora_config, lora_tensors, open_store, safetensors_bytes

BASE = "base-model"
# no time limit that a busy machine could meet
LIMITS = LimitsConfig(header_timeout_s=120, body_timeout_s=120, max_upload_bytes=64 << 20)
CONFIG_BYTES = json.dumps(lora_config()).encode()
BOUNDARY = "b0undary"


@dataclass
class WholeApi:
    """A running server and what is behind it."""

    server: Served
    http: httpx.Client
    engine: FakeEngine
    store: AdapterStore
    store_dir: Path

    def upload(self, name: str, *, seed: int = 0) -> httpx.Response:
        """Publish a small adapter as ordinary clients do."""
        files = [("files", (filename, data)) for filename, data in adapter_files(seed).items()]
        return self.http.post("/v1/adapters", data={"name": name}, files=files)

    def post_raw(self, body: bytes, *headers: str) -> bytes:
        """Send a form body as it is, with its true length unless a header says otherwise; read to the end."""
        lines = [*headers] if headers else [f"Content-Length: {len(body)}"]
        return self.server.ask(upload_head(*lines) + body)

    @property
    def num_staged(self) -> int:
        """Number of staging folders that exist."""
        return len(list((self.store_dir / "staging").iterdir()))


@contextmanager
def whole_api(
    model_dir: Path,
    store_dir: Path,
    *,
    limits: LimitsConfig = LIMITS,
    lora_roots: tuple[Path, ...] = (),
    metrics: Metrics | None = None,
    base: BaseDims = TINY,
    require_keys: bool = False,
    tenant_limits: TenantLimits | None = None,
    states: list[ApiState] | None = None,
    drain: Drain | None = None,
    blobs_url: str | None = None,
    **store_options: object,
) -> Iterator[WholeApi]:
    """Serve the whole API until the block ends; `states` receives its state, `store_options` are the store's own."""
    engine = FakeEngine()
    store = open_store(
        store_dir,
        base,
        **{"served_name": BASE, "max_upload_bytes": limits.max_upload_bytes, **store_options},  # type: ignore[arg-type]
    )
    config = ApiConfig(
        model_dir=model_dir,
        store_dir=store_dir,
        served_model_name=BASE,
        limits=limits,
        lora_roots=lora_roots,
        # its engine is a fake
        probe_adapters=False,
        require_keys=require_keys,
        tenant_limits=tenant_limits or TenantLimits(),
        blobs_url=blobs_url,
    )
    try:
        app = build_app(config, engine, store, metrics, drain)
        if states is not None:
            states.append(app.state.api)
        with (
            served(limits, app) as server,
            httpx.Client(base_url=f"http://127.0.0.1:{server.port}", timeout=60) as http,
        ):
            yield WholeApi(server, http, engine, store, store_dir)
    finally:
        store.close()


def adapter_files(seed: int = 0) -> dict[str, bytes]:
    """Return the two files of a small adapter."""
    return {
        "adapter_config.json": CONFIG_BYTES,
        "adapter_model.safetensors": safetensors_bytes(lora_tensors(seed=seed)),
    }


def upload_head(*headers: str) -> bytes:
    """Return the head of a raw upload."""
    lines = [
        "POST /v1/adapters HTTP/1.1",
        "Host: t",
        "Connection: close",
        f"Content-Type: multipart/form-data; boundary={BOUNDARY}",
        *headers,
    ]
    return "\r\n".join([*lines, "", ""]).encode()


def part(data: bytes, disposition: str, *headers: str) -> bytes:
    """Return one part of a form."""
    head = "\r\n".join([f"--{BOUNDARY}", f"Content-Disposition: form-data; {disposition}", *headers, "", ""])
    return head.encode() + data + b"\r\n"


def name_part(name: str | bytes) -> bytes:
    """Return the part of the name."""
    return part(name if isinstance(name, bytes) else name.encode(), 'name="name"')


def file_part(filename: str, data: bytes) -> bytes:
    """Return a part of a file."""
    return part(data, f'name="files"; filename="{filename}"')


def form(*parts: bytes) -> bytes:
    """Return a whole form."""
    return b"".join(parts) + f"--{BOUNDARY}--\r\n".encode()


def good_parts(seed: int = 0) -> list[bytes]:
    """Return the file parts of a small adapter."""
    return [file_part(name, data) for name, data in adapter_files(seed).items()]
