"""How the adapter commands show adapters: one value per adapter, a table for people, JSON for machines.

Owns the output only. Invariant: with `--json` stdout is exactly one JSON document of the API's field names.
"""

import json
from collections.abc import Sequence
from typing import TypedDict

import typer
from rich.console import Console
from rich.table import Table

from adapters_store.strict_json import Json


class AdapterRow(TypedDict):
    """One version of an adapter, as `POST /v1/adapters` answers it."""

    name: str
    version: int
    digest: str
    family: str
    rank: int
    bytes: int
    created: int
    dtype: str
    base: dict[str, str | int | bool]
    num_virtual_tokens: int
    invocation_tokens: list[int]
    report: dict[str, list[str]]
    proof: dict[str, Json] | None
    not_probed: str | None


def show_rows(rows: Sequence[AdapterRow], *, as_json: bool) -> None:
    """Print adapters as a table, or as a JSON list."""
    if as_json:
        typer.echo(json.dumps(list(rows)))
        return
    table = Table()
    for title in ("name", "version", "family", "rank", "bytes", "base", "digest"):
        table.add_column(title, justify="right" if title in ("version", "rank", "bytes") else "left")
    for row in rows:
        table.add_row(
            row["name"],
            str(row["version"]),
            row["family"],
            str(row["rank"]),
            f"{row['bytes']:,}",
            str(row["base"].get("model_type", "")),
            row["digest"].removeprefix("sha256:")[:12],
        )
    Console(width=None if typer.get_text_stream("stdout").isatty() else 160).print(table)
