"""Adapters of the load's own: uploaded before a run, changed while it lasts, deleted after the last one.

Speaks Chorale's adapter API (`/v1/adapters`); other servers are loaded with the adapters they already have. Owns the
names it made (`loadtest-0000`, ...) and nothing else on the server. Invariant: every upload has contents of its own
(the source folder with another `lora_alpha`), so no two of them are the same adapter to a server that goes by contents;
what was made is deleted again, also when a run failed.
"""

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from loadtest.churn import PlannedChange
from loadtest.client import Client
from loadtest.errors import LoadtestError, ServerRefused

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_TIMEOUT = aiohttp.ClientTimeout(total=300.0)
_UPLOADS_AT_ONCE = 4
# multiples of the golden ratio never repeat modulo 1 and keep their distance: variants act visibly differently
_GOLDEN = 0.6180339887498949


@dataclass(frozen=True, slots=True)
class Change:
    """A change as it was carried out; moments in seconds of the run. `version` is what an upload was given."""

    kind: str
    adapter: str
    planned_s: float
    begun_s: float
    done_s: float
    status: int
    version: int | None = None


@dataclass(frozen=True, slots=True)
class AdapterSource:
    """A PEFT folder in memory, from which any number of different adapters are made."""

    config: dict[str, object]
    weights: bytes

    def files(self, number: int) -> dict[str, bytes]:
        """Return the files of variant `number`: the weights as they are, alpha times 0.5 to 1.5."""
        alpha = self.config["lora_alpha"]
        assert isinstance(alpha, int | float), "checked when the folder was read"
        config = self.config | {"lora_alpha": alpha * (0.5 + number * _GOLDEN % 1.0)}
        return {_CONFIG: json.dumps(config).encode(), _WEIGHTS: self.weights}


def read_source(folder: Path) -> AdapterSource:
    """Read a PEFT LoRA folder.

    Raises:
        LoadtestError: a file is missing, or its config has no `lora_alpha` to vary.
    """
    try:
        config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        weights = (folder / _WEIGHTS).read_bytes()
    except (OSError, ValueError) as error:
        raise LoadtestError(f"--adapter-folder {folder}: {error}; a PEFT folder holds {_CONFIG}, {_WEIGHTS}") from error
    alpha = config.get("lora_alpha") if isinstance(config, dict) else None
    if not isinstance(alpha, int | float) or isinstance(alpha, bool):
        raise LoadtestError(f"--adapter-folder {folder}: lora_alpha is {alpha!r}; variants are made by changing it")
    return AdapterSource(config, weights)


class AdapterChanges:
    """The adapters of one session on one server; its runs share them."""

    def __init__(self, client: Client, sources: Sequence[AdapterSource], prefix: str = "loadtest") -> None:
        # versions that an adapter's name was given, to ask for the one an answer came from
        self.versions: dict[str, list[int]] = {}
        self._client, self._sources, self._prefix = client, sources, prefix
        self._gone: dict[str, list[tuple[float, float]]] = {}

    def name(self, index: int) -> str:
        """Return the name of an adapter of ours."""
        return f"{self._prefix}-{index:04d}"

    async def provide(self, count: int) -> tuple[str, ...]:
        """Make sure that `count` adapters of ours are there, uploading a few at a time; return their names."""
        missing = [index for index in range(count) if self.name(index) not in self.versions]
        pending = iter(missing)

        async def work() -> None:
            for index in pending:
                await self._upload(self.name(index), index, 0)

        try:
            async with asyncio.TaskGroup() as tasks:
                for _ in range(min(len(missing), _UPLOADS_AT_ONCE)):
                    tasks.create_task(work())
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from failed
        return tuple(self.name(index) for index in range(count))

    async def withdraw(self) -> None:
        """Delete every adapter of ours that is still there."""
        for name in list(self.versions):
            await self._call("DELETE", f"/v1/adapters/{name}", also=(404,))
            del self.versions[name]

    async def carry_out(
        self, changes: Sequence[PlannedChange], absent_s: float, now_s: Callable[[], float]
    ) -> list[Change]:
        """Make the planned changes at their moments by the run's clock, one after the other; return what was done."""
        self._gone.clear()
        done = []
        for change in changes:
            if (wait_s := change.at_s - now_s()) > 0:
                await asyncio.sleep(wait_s)
            done.append(await self._carry_out(change, absent_s, now_s))
        return done

    def was_absent(self, adapter: str, sent_s: float, end_s: float) -> bool:
        """Tell whether a request that was open from `sent_s` to `end_s` met a moment when its adapter was deleted."""
        return any(sent_s <= back_s and end_s >= gone_s for gone_s, back_s in self._gone.get(adapter, []))

    async def _carry_out(self, change: PlannedChange, absent_s: float, now_s: Callable[[], float]) -> Change:
        name, begun_s = self.name(change.adapter), now_s()
        version = None
        if change.kind == "evict":
            # pinned ones may stay: that is an answer too
            status = (await self._call("POST", f"/v1/adapters/{name}:evict", also=(202, 409)))[0]
        elif change.kind == "replace":
            status, version = 201, await self._upload(name, change.adapter, change.revision)
        else:
            status = (await self._call("DELETE", f"/v1/adapters/{name}"))[0]
            # what its earlier versions answered can no longer be asked for
            self.versions[name] = []
            await asyncio.sleep(absent_s)
            version = await self._upload(name, change.adapter, change.revision)
            self._gone.setdefault(name, []).append((begun_s, now_s()))
        return Change(change.kind, name, change.at_s, begun_s, now_s(), status, version)

    async def _upload(self, name: str, index: int, revision: int) -> int:
        source = self._sources[index % len(self._sources)]
        form = aiohttp.FormData()
        form.add_field("name", name)
        for file, content in source.files(index + 7919 * revision).items():
            form.add_field("files", content, filename=file, content_type="application/octet-stream")
        _, card = await self._call("POST", "/v1/adapters", form, also=(201,))
        version = card.get("version") if isinstance(card, dict) else None
        if not isinstance(version, int):
            raise ServerRefused(f"the upload of {name} answered no version: {card!r}")
        self.versions.setdefault(name, []).append(version)
        return version

    async def _call(
        self, method: str, path: str, form: aiohttp.FormData | None = None, also: tuple[int, ...] = ()
    ) -> tuple[int, object]:
        url = self._client.url + path
        headers = self._client.headers()
        try:
            async with self._client.session.request(
                method, url, data=form, headers=headers, timeout=_TIMEOUT
            ) as response:
                if response.status not in (200, *also):
                    raise ServerRefused(f"{method} {url} answered {response.status}: {(await response.text())[:300]}")
                return response.status, await response.json(content_type=None)
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            raise ServerRefused(f"{method} {url}: {error or type(error).__name__}") from error
