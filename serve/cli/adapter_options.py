"""The flags about adapters that more than one command has: signatures, and how many versions stay.

Owns their names and help. Invariant: as in `options`.
"""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Signatures(StrEnum):
    """What becomes of adapters without a signature that counts."""

    OFF = "off"
    WARN = "warn"
    REQUIRE = "require"


SignaturesOption = Annotated[
    Signatures,
    typer.Option(
        "--signatures",
        envvar="CHORALE_SIGNATURES",
        help="What becomes of adapters whose model.sig is missing or wrong: off asks for none, require refuses them.",
    ),
]
TrustRoots = Annotated[
    Path | None,
    typer.Option(
        "--trust-roots",
        envvar="CHORALE_TRUST_ROOTS",
        help="Public keys that count: DIR/*.pem for everybody, DIR/TENANT/*.pem for that tenant; or one file.",
    ),
]
KeepVersions = Annotated[
    int | None,
    typer.Option(
        envvar="CHORALE_KEEP_VERSIONS",
        min=1,
        help="Forget all but each adapter's newest N versions and those that a name, an alias or a rollback needs.",
    ),
]
