"""Where the adapter commands act: on a store's folder, or against a running server.

Owns the choice between the two. Invariant: --url wins over a store that the environment names.
"""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from serve.cli.adapters_remote import RemoteAdapters
from serve.errors import StartError


@contextmanager
def place_of(store: Path | None, url: str | None, api_key: str | None) -> Iterator[Path | RemoteAdapters]:
    """Yield the server or the folder that the flags name; raises StartError where they name neither."""
    if url is not None:
        with closing(RemoteAdapters(url, api_key)) as remote:
            yield remote
    elif store is not None:
        yield store
    else:
        raise StartError("say where: --store DIR for a store's folder, or --url http://HOST:PORT for a running server")
