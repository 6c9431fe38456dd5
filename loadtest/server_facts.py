"""What the server under test says of itself: its models, its version.

Owns the calls that are not part of the load. Invariant: only `/v1/models` is required of a server; all else is optional
and its absence is recorded as absence.
"""

from dataclasses import dataclass

import aiohttp

from loadtest.client import Client
from loadtest.errors import ServerRefused

_TIMEOUT = aiohttp.ClientTimeout(total=60.0)


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """The base's name, the names of its adapters as far as the server lists them, and what /version says."""

    base: str
    adapters: tuple[str, ...]
    version: object


async def read_server(client: Client) -> ServerFacts:
    """Ask the server for its models.

    Raises:
        ServerRefused: it cannot be reached, or lists no model.
    """
    cards = _cards(await get_json(client, "/v1/models"))
    bases = [card for card in cards if not card.get("parent")]
    if not bases:
        raise ServerRefused(f"{client.url}/v1/models lists no base model; name it with --model")
    base = str(bases[0]["id"])
    # servers that do not say which card is whose adapter list the base first
    adapters = tuple(str(card["id"]) for card in cards if card is not bases[0])
    try:
        version = await get_json(client, "/version")
    except ServerRefused:
        version = None
    return ServerFacts(base, adapters, version)


async def get_json(client: Client, path: str) -> object:
    """Return the JSON of a GET; raises ServerRefused with what came instead."""
    url = client.url + path
    try:
        async with client.session.get(url, headers=client.headers(), timeout=_TIMEOUT) as response:
            if response.status != 200:
                raise ServerRefused(f"GET {url} answered {response.status}: {(await response.text())[:300]}")
            value: object = await response.json(content_type=None)
            return value
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
        reason = str(error) or type(error).__name__
        raise ServerRefused(f"GET {url}: {reason}; is a server running there? (--url)") from error


def _cards(answer: object) -> list[dict[str, object]]:
    cards = answer.get("data") if isinstance(answer, dict) else None
    if not isinstance(cards, list):
        return []
    return [card for card in cards if isinstance(card, dict) and "id" in card]
