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
    signature: dict[str, Json]
    provenance: dict[str, Json] | None


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


def proof_lines(row: AdapterRow) -> list[str]:
    """Return what people read of a version's proof: how it was measured, how far apart, and what was allowed."""
    proof = row["proof"]
    if proof is None:
        return [f"proof: none ({row['not_probed']})"]
    allowed, other = proof["tolerance"], proof["first_differing_token"]
    assert isinstance(allowed, dict), "the probe writes its tolerance as an object"
    if isinstance(other, dict):
        where = f"prompt {other['prompt']}, position {other['position']}"
        differing = f"{where}: {other['served']} served, {other['source']} by the source"
    else:
        differing = "none"
    return [
        f"proof: run on the base in {proof['dtype']} on {proof['device']}, {proof['num_compared']} log-probabilities "
        "compared with the source's own formula in float32",
        f"  largest error {proof['max_error']} (allowed {allowed['max_error']}), root mean square {proof['rms_error']} "
        f"(allowed {allowed['rms_error']}), typical {proof['typical_error']} (allowed {allowed['typical_error']}), "
        f"KL {proof['kl']}",
        f"  effect: {proof['served_effect']} as served, {proof['source_effect']} by the source, gain {proof['gain']}",
        f"  first differing token: {differing}",
        *_size_lines(proof),
    ]


def signature_line(row: AdapterRow) -> str:
    """Return what people read of a version's signature."""
    facts = row["signature"]
    if facts["status"] == "verified":
        return f"signature: verified, by {facts['signer']} ({facts['key']}) over {facts['files_digest']}"
    return f"signature: {facts['status']}" + (f" ({facts['reason']})" if "reason" in facts else "")


def provenance_lines(row: AdapterRow) -> list[str]:
    """Return what people read of how an adapter was made, as its maker says; nothing where it says nothing."""
    # a server of an older release does not say
    said = row.get("provenance")
    return [] if said is None else [f"made, by its own word, of: {json.dumps(said, sort_keys=True)}"]


def _size_lines(proof: dict[str, Json]) -> list[str]:
    """Return how much the adapter changes the base; nothing for proofs older than that measure."""
    change, warnings = proof.get("largest_change"), proof.get("warnings")
    size = (
        [f"  largest change: {change['ratio']} of the base at layers.{change['layer']} {change['site']}"]
        if (isinstance(change, dict))
        else []
    )
    return size + [f"  warning: {text}" for text in (warnings if isinstance(warnings, list) else [])]
