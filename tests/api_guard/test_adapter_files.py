"""The canonical download over HTTP: whole, in parts, unchanged, or refused."""

import asyncio
import hashlib
import io
import json

import httpx
import pytest

from adapters_store.errors import AdapterCorrupt
from adapters_store.manifest import parse_manifest
from serve.api.adapter_files import _pieces
from tests.api_guard.whole_api import WholeApi

IMAGE, MANIFEST = "adapter.safetensors", "adapter.json"


def fetch(api: WholeApi, file: str, name: str = "poet", **headers: str) -> httpx.Response:
    named = {key.replace("_", "-"): value for key, value in headers.items()}
    return api.http.get(f"/v1/adapters/{name}/files/{file}", headers=named)


@pytest.fixture
def digest(api: WholeApi) -> str:
    """Upload `poet` and return its digest."""
    answer = str(api.upload("poet").json()["digest"])
    return answer.removeprefix("sha256:")


def test_both_files_are_those_of_the_digest(api: WholeApi, digest: str) -> None:
    manifest, image = fetch(api, MANIFEST), fetch(api, IMAGE)
    assert hashlib.sha256(manifest.content).hexdigest() == digest
    assert hashlib.sha256(image.content).hexdigest() == parse_manifest(manifest.content).file_sha256
    assert manifest.headers["content-type"] == "application/json"
    assert manifest.headers["etag"] == f'"sha256:{digest}"'
    assert int(image.headers["content-length"]) == len(image.content)
    assert image.headers["content-type"] == "application/octet-stream"
    assert image.headers["etag"] == f'"sha256:{hashlib.sha256(image.content).hexdigest()}"'


def test_a_part_is_that_part(api: WholeApi, digest: str) -> None:
    whole = fetch(api, IMAGE).content
    size = len(whole)
    for text, begin, end in (
        ("bytes=0-0", 0, 1),
        ("bytes=100-", 100, size),
        ("bytes=-7", size - 7, size),
        (f"bytes=5-{size * 2}", 5, size),
    ):
        part = fetch(api, IMAGE, range=text)
        assert (part.status_code, part.content) == (206, whole[begin:end]), text
        assert part.headers["content-range"] == f"bytes {begin}-{end - 1}/{size}"
    for text in ("bytes=3-2", "bytes=0-1,4-5", "lines=1-2", "bytes=-", "bytes=x-", f"bytes=-{size + 1}"):
        answer = fetch(api, IMAGE, range=text)
        assert (answer.status_code, answer.content) == (200, whole), text
    behind = fetch(api, IMAGE, range=f"bytes={size}-")
    assert (behind.status_code, behind.headers["content-range"]) == (416, f"bytes */{size}")
    assert fetch(api, IMAGE, range="bytes=-0").status_code == 416


def test_what_the_client_has_is_not_sent_again(api: WholeApi, digest: str) -> None:
    first = fetch(api, IMAGE)
    again = fetch(api, IMAGE, if_none_match=first.headers["etag"])
    assert (again.status_code, again.content) == (304, b"")
    # a part of other bytes would be worse than the whole
    assert fetch(api, IMAGE, range="bytes=0-1", if_range='"other"').status_code == 200
    assert fetch(api, IMAGE, range="bytes=0-1", if_range=first.headers["etag"]).status_code == 206


@pytest.mark.parametrize(
    "file", ["registry.sqlite", "adapter.jso", "..%2Flock", "%2e%2e", "adapter.json%00", ".", "ADAPTER.JSON"]
)
def test_no_other_file_can_be_named(file: str, api: WholeApi, digest: str) -> None:
    answer = fetch(api, file)
    assert answer.status_code == 404 and answer.json()["error"]["type"] == "invalid_request_error"


def test_no_file_of_an_unknown_adapter(api: WholeApi) -> None:
    answer = fetch(api, MANIFEST, name="nobody")
    assert answer.status_code == 404 and answer.json()["error"]["code"] == "model_not_found"


def test_damaged_bytes_are_never_sent(api: WholeApi, digest: str) -> None:
    path = api.store_dir / "objects" / digest / IMAGE
    raw = path.read_bytes()
    path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    answer = fetch(api, IMAGE)
    path.write_bytes(raw)
    assert answer.status_code == 503 and answer.json()["error"]["code"] == "adapter_corrupt"
    assert str(api.store_dir) not in answer.text


async def read_all(stored: bytes, end: int) -> None:
    pieces = _pieces(io.BytesIO(stored), 0, end)
    # two are all that these few bytes can make
    for _ in range(2):
        await anext(pieces)


def test_a_file_that_became_shorter_ends_the_answer() -> None:
    with pytest.raises(AdapterCorrupt, match="shorter"):
        asyncio.run(read_all(b"abc", 5))


def test_a_download_can_be_uploaded_names_untold(api: WholeApi, digest: str) -> None:
    """The manifest names neither the adapter nor the store: it can be given away."""
    text = fetch(api, MANIFEST).text
    assert "poet" not in text and str(api.store_dir) not in text and json.loads(text)["format"] == "chorale-adapter"
