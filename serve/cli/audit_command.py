"""`chorale audit`: whether the audit log of a store is what was written.

Owns the flags and the one line that is printed. Invariant: the log is read piece by piece and never changed.
"""

from pathlib import Path
from typing import Annotated

import typer

from serve.cli.operator_errors import one_line_errors
from serve.errors import StartError
from serve.tenants.audit import AUDIT_FILE, GENESIS, verify

Store = Annotated[Path, typer.Option("--store", envvar="CHORALE_STORE", help="Folder of the adapter store.")]
Head = Annotated[
    str | None, typer.Option("--head", help="Digest of the last record, kept elsewhere: finds a log whose end was cut.")
]


def audit(store: Store, head: Head = None) -> None:
    """Check the audit log's chain; print its head, to be kept elsewhere and given to --head next time."""
    with one_line_errors(exit_status=1):
        path = store / AUDIT_FILE
        seen = _Seen(head)
        try:
            with path.open("rb") as lines:
                broken = verify(map(seen.pass_on, lines))
        except OSError as error:
            raise StartError(f"{path}: {error.strerror}") from error
        if broken is not None:
            raise StartError(f"{path}: record {broken.line} {broken.reason}")
        if not seen.has_wanted:
            raise StartError(f"{path}: the record {ascii(head)[:80]} is missing: the end was cut off")
        typer.echo(f"{seen.num_records} records intact, head {seen.last}")


class _Seen:
    """What has passed: how many records, the last one's digest, and whether a wanted one was among them."""

    def __init__(self, wanted: str | None) -> None:
        self.last = GENESIS
        self.num_records = 0
        self._wanted = wanted
        self.has_wanted = wanted in (None, GENESIS)

    def pass_on(self, line: bytes) -> bytes:
        """Note a record's digest, which is the last of its fields, and return the line."""
        self.last = line.rstrip().rpartition(b'"digest": "')[2].removesuffix(b'"}').decode("ascii", "replace")
        self.num_records += 1
        self.has_wanted = self.has_wanted or self.last == self._wanted
        return line
