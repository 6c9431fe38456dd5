"""`chorale adapters promote|rollback|canary|alias|versions`: which version a name means, on a folder or a server.

Owns the flags and what is printed. Invariant: a command that failed prints one line on stderr and ends with status 1.
"""

import json
from pathlib import Path
from typing import Annotated, cast

import typer
from rich.console import Console
from rich.table import Table

from adapters_store.pointers import Pointers, Sticky
from adapters_store.registry import AdapterVersion
from serve.cli import offline_versions
from serve.cli.adapters_place import place_of
from serve.cli.adapters_remote import RemoteAdapters
from serve.cli.operator_errors import one_line_errors
from serve.errors import StartError

Name = Annotated[str, typer.Argument(help="The adapter's name.")]
Chosen = Annotated[str, typer.Argument(help="The version's number, or an alias of it, such as canary.")]
Store = Annotated[Path | None, typer.Option("--store", envvar="CHORALE_STORE", help="Folder of the store.")]
Url = Annotated[str | None, typer.Option("--url", help="Address of a running server, instead of --store.")]
ApiKey = Annotated[str | None, typer.Option("--api-key", envvar="CHORALE_API_KEY", help="Key for --url.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
To = Annotated[str | None, typer.Option("--to", help="An alias that shall mean the version, instead of the name.")]
Percent = Annotated[
    float | None, typer.Option("--percent", help="Its share of the name's requests, 0 to 100; 0: none yet.")
]
StickyBy = Annotated[
    Sticky, typer.Option("--sticky", help="Who always gets the same version: each user field, or each key.")
]
End = Annotated[bool, typer.Option("--end", help="End the canary.")]
Remove = Annotated[bool, typer.Option("--remove", help="Forget the alias.")]
Alias = Annotated[str, typer.Argument(help="The alias: what follows the colon of NAME:ALIAS.")]

Row = dict[str, object]


def promote(
    name: Name, version: Chosen, to: To = None, store: Store = None, url: Url = None, api_key: ApiKey = None
) -> None:
    """Let NAME, or its alias --to, mean a version; promoting the canary to NAME ends the canary."""
    with one_line_errors(exit_status=1), place_of(store, url, api_key) as place:
        if isinstance(place, RemoteAdapters):
            answer = place.post(name, "promote", _choice(version) | ({} if to is None else {"to": to}))
            number, digest = answer["version"], str(answer["digest"])
        else:
            found = offline_versions.promote(place, name, _number(version), to)
            number, digest = found.version, f"sha256:{found.digest}"
        typer.echo(f"{name if to is None else f'{name}:{to}'} is version {number} {digest}")


def rollback(name: Name, store: Store = None, url: Url = None, api_key: ApiKey = None) -> None:
    """Let NAME mean what it meant before; each call goes one step further back."""
    with one_line_errors(exit_status=1), place_of(store, url, api_key) as place:
        if isinstance(place, RemoteAdapters):
            answer = place.post(name, "rollback", None)
            number, digest = answer["version"], str(answer["digest"])
        else:
            found = offline_versions.roll_back(place, name)
            number, digest = found.version, f"sha256:{found.digest}"
        typer.echo(f"{name} is version {number} {digest}")


def canary(
    name: Name,
    version: Annotated[str | None, typer.Argument(help="The version's number, or an alias of it.")] = None,
    percent: Percent = None,
    sticky: StickyBy = Sticky.USER,
    end: End = False,
    store: Store = None,
    url: Url = None,
    api_key: ApiKey = None,
) -> None:
    """Give a version a share of NAME's requests, always those of the same users; or --end it."""
    with one_line_errors(exit_status=1), place_of(store, url, api_key) as place:
        if end != (version is None) or end != (percent is None):
            raise StartError("say either a version and its --percent, or --end")
        if version is None or percent is None:
            if isinstance(place, RemoteAdapters):
                place.delete(name, "canary")
            else:
                offline_versions.remove_alias(place, name, "canary")
            typer.echo(f"{name} has no canary")
            return
        if isinstance(place, RemoteAdapters):
            body = _choice(version) | {"percent": percent, "sticky": sticky.value}
            number = place.post(name, "canary", body)["version"]
        else:
            number = offline_versions.set_canary(place, name, _number(version), percent, sticky).aliases["canary"]
        typer.echo(f"{percent:g} % of {name} get version {number}")


def alias(
    name: Name,
    alias: Alias,
    version: Annotated[int | None, typer.Argument(help="The version's number.")] = None,
    remove: Remove = False,
    store: Store = None,
    url: Url = None,
    api_key: ApiKey = None,
) -> None:
    """Let NAME:ALIAS mean a version, or --remove it."""
    with one_line_errors(exit_status=1), place_of(store, url, api_key) as place:
        if remove != (version is None):
            raise StartError("say either a version, or --remove")
        if isinstance(place, RemoteAdapters):
            if version is None:
                place.delete(name, f"aliases/{alias}")
            else:
                place.post(name, "aliases", {"alias": alias, "version": version})
        elif version is None:
            offline_versions.remove_alias(place, name, alias)
        else:
            offline_versions.set_alias(place, name, alias, version)
        typer.echo(f"{name}:{alias} is no more" if version is None else f"{name}:{alias} is version {version}")


def versions(name: Name, store: Store = None, url: Url = None, api_key: ApiKey = None, as_json: Json = False) -> None:
    """Show all versions of NAME, and what points to each."""
    with one_line_errors(exit_status=1), place_of(store, url, api_key) as place:
        if isinstance(place, RemoteAdapters):
            rows = [_shown(row) for row in place.all_versions(name)]
        else:
            found, pointers = offline_versions.versions(place, name)
            rows = [_row(version, pointers) for version in found]
        if as_json:
            typer.echo(json.dumps(rows))
            return
        table = Table()
        for title in ("version", "current", "canary", "aliases", "created", "digest"):
            table.add_column(title)
        for row in rows:
            share = "" if row["percent"] is None else f"{row['percent']} %"
            aliases = ", ".join(cast(list[str], row["aliases"]))
            marks = ["yes" if row["current"] else "", share, aliases]
            table.add_row(str(row["version"]), *marks, str(row["created"]), str(row["digest"])[:19])
        Console(width=None if typer.get_text_stream("stdout").isatty() else 160).print(table)


def add_version_commands(adapters_app: typer.Typer) -> None:
    """Enter the commands into `chorale adapters`."""
    for command in (promote, rollback, canary, alias, versions):
        adapters_app.command()(command)


def _row(version: AdapterVersion, pointers: Pointers) -> Row:
    number = version.version
    return {
        "version": number,
        "digest": f"sha256:{version.digest}",
        "created": version.created,
        "current": pointers.current == number,
        "aliases": sorted(alias for alias, target in pointers.aliases.items() if target == number),
        "percent": pointers.share / 100 if pointers.canary == number else None,
    }


def _shown(row: Row) -> Row:
    return {key: row[key] for key in ("version", "digest", "created", "current", "aliases", "percent")}


def _number(version: str) -> int | str:
    return int(version) if version.isascii() and version.isdecimal() else version


def _choice(version: str) -> Row:
    chosen = _number(version)
    return {"version": chosen} if isinstance(chosen, int) else {"alias": chosen}
