"""`chorale adapters export NAME --to FORMAT --out DIR`: an adapter in a form that others read.

Owns the choice of the exporter and where the canonical files come from: a store's folder, or a server's download.
Invariant: what is exported is the version whose digest the store or server names, checked byte by byte.
"""

import shutil
from collections.abc import Iterator
from contextlib import closing, contextmanager
from enum import StrEnum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from adapters_store.export.canonical_reader import CanonicalReader, open_canonical
from adapters_store.export.tensor_writer import make_empty
from adapters_store.export.to_hf_model import export_hf_model
from adapters_store.export.to_meteora import export_meteora
from adapters_store.export.to_peft import export_peft
from adapters_store.object_files import OBJECT_FILES
from serve.cli import adapters_offline
from serve.cli.adapters_command import ApiKey, Name, Store, Url
from serve.cli.adapters_remote import RemoteAdapters
from serve.cli.operator_errors import one_line_errors
from serve.errors import StartError
from serve.model.download import resolve_model_dir


class Target(StrEnum):
    """What an adapter can be exported to."""

    PEFT = "peft"
    HF_MODEL = "hf_model"
    METEORA = "meteora"
    CANONICAL = "canonical"


To = Annotated[
    Target,
    typer.Option(
        "--to",
        help="peft: a LoRA folder; hf_model: the base with the adapter in it; meteora: the official checkpoint; "
        "canonical: the two files as they are stored.",
    ),
]
Out = Annotated[Path, typer.Option("--out", help="New folder for the result.")]
Base = Annotated[str | None, typer.Option("--base", help="The base model, which hf_model needs and meteora includes.")]


def export(
    name: Name,
    to: To,
    out: Out,
    store: Store = None,
    url: Url = None,
    base: Base = None,
    api_key: ApiKey = None,
) -> None:
    """Write the current version of NAME in a form that other programs read."""
    with one_line_errors(exit_status=1), _canonical(name, store, url, api_key) as folder:
        base_dir = None if base is None else resolve_model_dir(base)
        try:
            with open_canonical(folder) as adapter:
                _write(adapter, folder, to, out, base_dir)
        except OSError as error:
            raise StartError(f"{out}: {error.strerror}") from error
        typer.echo(f"exported {name} to {out}")


def _write(adapter: CanonicalReader, folder: Path, to: Target, out: Path, base_dir: Path | None) -> None:
    if to is Target.PEFT:
        export_peft(adapter, out)
    elif to is Target.METEORA:
        export_meteora(adapter, out, base_dir=base_dir)
    elif to is Target.CANONICAL:
        make_empty(out)
        for filename in OBJECT_FILES:
            shutil.copyfile(folder / filename, out / filename)
    elif base_dir is None:
        raise StartError("--to hf_model adds the adapter to the base's weights; name the base with --base MODEL")
    else:
        export_hf_model(adapter, out, base_dir=base_dir)


@contextmanager
def _canonical(name: str, store: Path | None, url: str | None, api_key: str | None) -> Iterator[Path]:
    """Yield a folder with the canonical files of the adapter's current version; --url wins, as everywhere."""
    if url is not None:
        with closing(RemoteAdapters(url, api_key)) as remote, TemporaryDirectory() as folder:
            row = remote.versions(name)[-1]
            remote.download(name, Path(folder))
            yield _proven(Path(folder), row["digest"])
    elif store is not None:
        digest = adapters_offline.versions(store, name)[-1]["digest"]
        yield _proven(store / "objects" / digest.removeprefix("sha256:"), digest)
    else:
        raise StartError("say where: --store DIR for a store's folder, or --url http://HOST:PORT for a running server")


def _proven(folder: Path, digest: str) -> Path:
    with open_canonical(folder) as adapter:
        if f"sha256:{adapter.manifest.digest()}" != digest:
            raise StartError("the adapter was replaced while it was fetched; try again")
    return folder
