"""`chorale adapters pin|unpin|prefetch|evict|status`: the operator's hands on a running server's adapter memory.

Owns the commands' lines of output. Invariant: these ask a running server and nothing else; a folder has no memory.
"""

import json
from contextlib import closing
from typing import Annotated

import typer

from serve.cli.adapters_remote import RemoteAdapters
from serve.cli.operator_errors import one_line_errors

Name = Annotated[str, typer.Argument(help="Name, name@VERSION, name@sha256:DIGEST or name:ALIAS.")]
Url = Annotated[str, typer.Option("--url", help="Address of a running server.")]
ApiKey = Annotated[str | None, typer.Option("--api-key", envvar="CHORALE_API_KEY", help="Key for --url.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]

_SHOWN = (
    *("engine", "state", "tier", "device_bytes", "host_bytes", "pins", "pinned", "pin_error"),
    *("loads", "evictions", "fetches", "last_load_seconds", "last_fetch_seconds"),
)


def pin(name: Name, url: Url, api_key: ApiKey = None) -> None:
    """Load an adapter and keep it in memory until it is unpinned."""
    _act(name, "pin", url, api_key)
    typer.echo(f"pinned {name}")


def unpin(name: Name, url: Url, api_key: ApiKey = None) -> None:
    """Let an adapter go when its room is needed."""
    _act(name, "unpin", url, api_key)
    typer.echo(f"unpinned {name}")


def prefetch(name: Name, url: Url, api_key: ApiKey = None) -> None:
    """Bring an adapter into memory ahead of its first request."""
    _act(name, "prefetch", url, api_key)
    typer.echo(f"prefetching {name}")


def evict(name: Name, url: Url, api_key: ApiKey = None) -> None:
    """Free an adapter's memory, now or when the last running request lets go."""
    answer = _act(name, "evict", url, api_key)
    freed = "waits for the last running request" if answer["pending"] else f"{answer['bytes_freed']} bytes freed"
    typer.echo(f"evicted {name}: {freed}")


def status(name: Name, url: Url, api_key: ApiKey = None, as_json: Json = False) -> None:
    """Say where an adapter is on this server, who holds it, and what became of it so far."""
    with one_line_errors(exit_status=1), closing(RemoteAdapters(url, api_key)) as server:
        answer = server.status(name)
        if as_json:
            typer.echo(json.dumps(answer))
            return
        typer.echo(f"{answer['name']}@{answer['version']} {answer['digest']}")
        for field in _SHOWN:
            typer.echo(f"  {field}: {answer[field]}")


def _act(name: str, action: str, url: str, api_key: str | None) -> dict[str, object]:
    with one_line_errors(exit_status=1), closing(RemoteAdapters(url, api_key)) as server:
        return server.act(name, action)


def add_memory_commands(adapters_app: typer.Typer) -> None:
    """Enter the commands into `chorale adapters`."""
    for command in (pin, unpin, prefetch, evict, status):
        adapters_app.command()(command)
