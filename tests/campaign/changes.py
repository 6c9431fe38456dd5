"""The publisher of the campaign: uploads, replaces and deletes by HTTP while the others ask.

Owns a connection. Invariant: the catalog knows of a change before its first byte is sent, and of its end only when it
was acknowledged.
"""

import asyncio
from collections.abc import Iterator

from tests.campaign.adapters import FILES, Adapter
from tests.campaign.catalog import Catalog
from tests.campaign.clients import Tally
from tests.campaign.plan import ChangeKind
from tests.campaign.wire import Answer, Wire

_BOUNDARY = "campaign-boundary"


class Publisher:
    """Changes names as planned."""

    def __init__(self, wire: Wire, catalog: Catalog, pool: Iterator[Adapter], tally: Tally) -> None:
        self._wire = wire
        self._catalog = catalog
        self._pool = pool
        self._tally = tally

    async def change(self, kind: ChangeKind, name: str) -> None:
        """Do what was planned for this name, or what makes sense instead: a deleted one can only be created."""
        if self._catalog.is_changing(name):
            return
        is_deletion = kind is ChangeKind.DELETE and self._catalog.is_live(name)
        try:
            await (self.delete(name) if is_deletion else self.publish(name))
        except (OSError, EOFError, TimeoutError) as error:
            self._wire.close()
            self._tally.complain(f"{kind} {name}: {type(error).__name__}: {error}")

    async def publish(self, name: str) -> None:
        """Upload the pool's next adapter as the name's next version."""
        adapter = next(self._pool)
        self._catalog.learn(adapter.digest, adapter.answers)
        change = self._catalog.begin(name, adapter.digest, _now())
        answer = await self._wire.ask(
            "POST", "/v1/adapters", _form(name, adapter), f"multipart/form-data; boundary={_BOUNDARY}"
        )
        card = self._checked(answer, 201, f"upload of {name}")
        if card.get("digest") != f"sha256:{adapter.digest}":
            self._tally.complain(f"upload of {name}: digest {card.get('digest')}, not {adapter.digest}")
        version = card.get("version")
        self._catalog.finish(name, change, _now(), version if isinstance(version, int) else 0)
        self._tally.changes["publish"] += 1

    async def delete(self, name: str) -> None:
        """Delete a name with all its versions."""
        change = self._catalog.begin(name, None, _now())
        self._checked(await self._wire.ask("DELETE", f"/v1/adapters/{name}"), 200, f"deletion of {name}")
        self._catalog.finish(name, change, _now())
        self._tally.changes["delete"] += 1

    def _checked(self, answer: Answer, status: int, what: str) -> dict[str, object]:
        if answer.status != status:
            self._tally.complain(f"{what}: status {answer.status}: {answer.body[:300]!r}")
            return {}
        return answer.json()


def _form(name: str, adapter: Adapter) -> bytes:
    parts = [f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="name"\r\n\r\n{name}\r\n'.encode()]
    for file in FILES:
        head = f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="files"; filename="{file}"\r\n\r\n'
        parts += [head.encode(), (adapter.folder / file).read_bytes(), b"\r\n"]
    return b"".join([*parts, f"--{_BOUNDARY}--\r\n".encode()])


def _now() -> float:
    return asyncio.get_running_loop().time()
