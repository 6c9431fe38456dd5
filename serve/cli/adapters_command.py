"""`chorale adapters add|list|show|rm|verify`, on a store's folder or against a running server.

Owns the choice between the two and what is printed. Invariant: a command that failed prints one line on stderr and ends
with status 1.
"""

from pathlib import Path
from typing import Annotated

import typer

from adapters_store.formats import AUTO, FORMATS, Declared
from serve.cli import adapters_offline
from serve.cli.adapter_options import Signatures, SignaturesOption, TrustRoots
from serve.cli.adapter_rows import AdapterRow, proof_lines, provenance_lines, show_rows, signature_line
from serve.cli.adapters_memory import add_memory_commands
from serve.cli.adapters_place import place_of
from serve.cli.adapters_remote import RemoteAdapters
from serve.cli.adapters_versions import add_version_commands
from serve.cli.operator_errors import one_line_errors
from serve.cli.options import DenseBudgetBytes, Dtype, DtypeOption, Probe
from serve.cli.signing_extra import open_gate, sign_adapter
from serve.errors import StartError

adapters_app = typer.Typer(
    name="adapters", help="Add, list, show, remove and verify adapters.", no_args_is_help=True, rich_markup_mode=None
)

add_memory_commands(adapters_app)
add_version_commands(adapters_app)

Name = Annotated[str, typer.Argument(help="The adapter's name.")]
Folder = Annotated[
    Path, typer.Argument(help="PEFT folder (adapter_config.json, adapter_model.safetensors), or one with a checkpoint.")
]
Format = Annotated[
    str, typer.Option("--format", help=f"What the folder holds: {', '.join(FORMATS)}; auto goes by the files' names.")
]
Options = Annotated[
    str | None, typer.Option("--options", help="JSON object with what such files do not store (MeteoRA: top_k, ...).")
]
Store = Annotated[Path | None, typer.Option("--store", envvar="CHORALE_STORE", help="Folder of the store.")]
Url = Annotated[str | None, typer.Option("--url", help="Address of a running server, instead of --store.")]
ApiKey = Annotated[str | None, typer.Option("--api-key", envvar="CHORALE_API_KEY", help="Key for --url.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Base = Annotated[
    str | None,
    typer.Option("--base", help="Base model of the adapter; needed for a store's first adapter and for checkpoints."),
]
ProbeChoice = Annotated[
    Probe,
    typer.Option("--probe", help="Whether to run it on the base of --base, against its source's own formula, first."),
]
KeyFile = Annotated[
    Path, typer.Option("--key", help="Private key in PEM: P-256, P-384, P-521 or Ed25519, without a password.")
]
Promote = Annotated[
    bool,
    typer.Option("--promote/--no-promote", help="Whether a NAME that means a version already means this one."),
]


@adapters_app.command()
def add(
    name: Name,
    folder: Folder,
    store: Store = None,
    url: Url = None,
    base: Base = None,
    dtype: DtypeOption = Dtype.AUTO,
    api_key: ApiKey = None,
    as_json: Json = False,
    source_format: Format = AUTO,
    options: Options = None,
    dense_budget_bytes: DenseBudgetBytes = 0,
    probe: ProbeChoice = Probe.ON,
    promotes: Promote = True,
    signatures: SignaturesOption = Signatures.OFF,
    trust_roots: TrustRoots = None,
) -> None:
    """Convert, check and publish an adapter as the next version of NAME, which NAME means from then on."""
    with one_line_errors(exit_status=1):
        declared = Declared.parse(source_format, None if options is None else options.encode())
        with place_of(store, url, api_key) as place:
            if isinstance(place, RemoteAdapters):
                if dense_budget_bytes:
                    raise StartError("--dense-budget-bytes goes with --store; a running server has its own")
                if trust_roots is not None:
                    raise StartError("--trust-roots goes with --store; a running server has its own")
                if probe is Probe.OFF:
                    raise StartError("--probe goes with --store; a running server has its own")
                row = place.add(name, folder, declared, promotes=promotes)
            else:
                row = adapters_offline.add(
                    place,
                    name,
                    folder,
                    base=base,
                    dtype=dtype,
                    declared=declared,
                    dense_budget_bytes=dense_budget_bytes,
                    is_probed=probe is Probe.ON,
                    promotes=promotes,
                    gate=open_gate(signatures.value, trust_roots),
                )
        show_rows([row], as_json=as_json)


@adapters_app.command()
def sign(folder: Folder, key: KeyFile, source_format: Format = AUTO) -> None:
    """Write FOLDER/model.sig, an OpenSSF model signature over the files that `add` sends."""
    with one_line_errors(exit_status=1):
        path, hint = sign_adapter(folder, key, Declared.parse(source_format, None))
        typer.echo(f"signed {path} with key sha256:{hint}")


@adapters_app.command("list")
def list_adapters(store: Store = None, url: Url = None, api_key: ApiKey = None, as_json: Json = False) -> None:
    """Show the current version of every adapter."""
    with one_line_errors(exit_status=1), place_of(store, url, api_key) as place:
        rows = place.rows() if isinstance(place, RemoteAdapters) else adapters_offline.rows(place)
        show_rows(rows, as_json=as_json)


@adapters_app.command()
def show(name: Name, store: Store = None, url: Url = None, api_key: ApiKey = None, as_json: Json = False) -> None:
    """Show one adapter: all versions (offline) and what its last upload did."""
    with one_line_errors(exit_status=1), place_of(store, url, api_key) as place:
        rows = place.versions(name) if isinstance(place, RemoteAdapters) else adapters_offline.versions(place, name)
        show_rows(rows, as_json=as_json)
        if not as_json:
            _show_report(rows[-1])


@adapters_app.command()
def rm(name: Name, store: Store = None, url: Url = None, api_key: ApiKey = None) -> None:
    """Delete an adapter with all its versions."""
    with one_line_errors(exit_status=1), place_of(store, url, api_key) as place:
        if isinstance(place, RemoteAdapters):
            place.remove(name)
        else:
            adapters_offline.remove(place, name)
        typer.echo(f"removed {name}")


@adapters_app.command()
def verify(
    name: Annotated[str | None, typer.Argument(help="One adapter; default: all.")] = None, store: Store = None
) -> None:
    """Read every byte again and compare it with its hash."""
    with one_line_errors(exit_status=1), place_of(store, None, None) as place:
        assert isinstance(place, Path), "without a URL the place is a folder"
        names = [name] if name is not None else [row["name"] for row in adapters_offline.rows(place)]
        for each in names:
            adapters_offline.verify(place, each)
            typer.echo(f"intact {each}")


def _show_report(row: AdapterRow) -> None:
    for title, modules in row["report"].items():
        typer.echo(f"{title}: {', '.join(modules) if modules else 'none'}")
    for line in (*proof_lines(row), signature_line(row), *provenance_lines(row)):
        typer.echo(line)
