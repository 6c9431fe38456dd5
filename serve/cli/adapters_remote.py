"""The adapter commands against a running server, over its HTTP interface.

Owns the requests and the reading of their errors. Invariant: an upload is streamed from its files, not held in memory.
"""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO, cast
from urllib.parse import quote

import httpx

from adapters_store.formats import AUTO, Declared, parts_in
from adapters_store.object_files import OBJECT_FILES
from adapters_store.upload import aside_in
from serve.cli.adapter_rows import AdapterRow
from serve.errors import StartError

Part = tuple[str, tuple[str, BinaryIO, str]]

# conversion of a large adapter takes a while; connecting does not
_TIMEOUT = httpx.Timeout(300.0, connect=10.0)


class RemoteAdapters:
    """The adapters of one server."""

    def __init__(self, url: str, api_key: str | None) -> None:
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._client = httpx.Client(base_url=url.rstrip("/"), headers=headers, timeout=_TIMEOUT)

    def close(self) -> None:
        """Give back the connections."""
        self._client.close()

    def add(self, name: str, folder: Path, declared: Declared | None = None, *, promotes: bool = True) -> AdapterRow:
        """Upload a folder; raises StartError with the server's own line if it is refused."""
        declared = declared if declared is not None else Declared()
        fields = {"name": name}
        if declared.format != AUTO:
            fields["format"] = declared.format
        if declared.options:
            fields["options"] = json.dumps(declared.options)
        if not promotes:
            fields["promote"] = "false"
        with _open_parts(folder, declared) as files:
            answer = self._checked(self._client.post("/v1/adapters", data=fields, files=files))
        return cast(AdapterRow, answer)

    def rows(self) -> list[AdapterRow]:
        """Return the current version of every adapter."""
        return cast(list[AdapterRow], self._checked(self._client.get("/v1/adapters"))["data"])

    def versions(self, name: str) -> list[AdapterRow]:
        """Return one adapter's current version, as the server shows it."""
        return [cast(AdapterRow, self._checked(self._client.get(f"/v1/adapters/{quote(name, safe='')}")))]

    def all_versions(self, name: str) -> list[dict[str, object]]:
        """Return all versions of one adapter, oldest first, and what points to them."""
        answer = self._checked(self._client.get(f"/v1/adapters/{quote(name, safe='')}/versions"))
        return cast(list[dict[str, object]], answer["data"])

    def remove(self, name: str) -> None:
        """Delete an adapter."""
        self._checked(self._client.delete(f"/v1/adapters/{quote(name, safe='')}"))

    def status(self, name: str) -> dict[str, object]:
        """Return where an adapter is in this server's memory."""
        return self._checked(self._client.get(f"/v1/adapters/{quote(name, safe='')}/status"))

    def act(self, name: str, action: str) -> dict[str, object]:
        """Pin, unpin, prefetch or evict an adapter; return the server's answer."""
        return self._checked(self._client.post(f"/v1/adapters/{quote(name, safe='')}:{action}"))

    def post(self, name: str, action: str, body: dict[str, object] | None) -> dict[str, object]:
        """Post to `/v1/adapters/{name}/{action}`; raises StartError with the server's own line if it is refused."""
        return self._checked(self._client.post(f"/v1/adapters/{quote(name, safe='')}/{action}", json=body))

    def delete(self, name: str, action: str) -> dict[str, object]:
        """Delete `/v1/adapters/{name}/{action}`; raises as `post`."""
        return self._checked(self._client.delete(f"/v1/adapters/{quote(name, safe='')}/{action}"))

    def download(self, name: str, folder: Path) -> None:
        """Fetch the canonical files of an adapter's current version into a folder; raises StartError."""
        for filename in OBJECT_FILES:
            url = f"/v1/adapters/{quote(name, safe='')}/files/{filename}"
            with self._client.stream("GET", url) as response, (folder / filename).open("xb") as file:
                if not response.is_success:
                    response.read()
                    self._checked(response)
                for piece in response.iter_bytes():
                    file.write(piece)

    def _checked(self, response: httpx.Response) -> dict[str, object]:
        try:
            body = response.json()
        except ValueError:
            body = None
        if response.is_success and isinstance(body, dict):
            return body
        error = body.get("error") if isinstance(body, dict) else None
        message = error.get("message") if isinstance(error, dict) else "the answer is not one of a Chorale server"
        raise StartError(f"{response.request.method} {response.request.url}: {response.status_code}: {message}")


@contextmanager
def _open_parts(folder: Path, declared: Declared) -> Iterator[list[Part]]:
    """Yield the multipart fields of a folder's files."""
    with ExitStack() as stack:
        parts: list[Part] = []
        try:
            names = [*parts_in(folder, declared.format)]
            names += aside_in(folder)
        except OSError as error:
            raise StartError(f"{folder}: {error.strerror}") from error
        for filename in names:
            try:
                file = stack.enter_context((folder / filename).open("rb"))
            except OSError as error:
                raise StartError(f"{folder / filename}: {error.strerror}") from error
            parts.append(("files", (filename, file, "application/octet-stream")))
        yield parts
