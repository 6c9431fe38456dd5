"""`chorale keys create|list|revoke|rotate`: the API keys of a store's tenants, also while a server runs on it.

Owns the flags and what is printed; servers on the same store follow within a second. Invariants: a key's secret is
printed once, by the command that made it, and only on stdout; whatever is done to a key is in the audit log.
"""

import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from serve.cli.blob_options import BlobsUrl
from serve.cli.operator_errors import one_line_errors
from serve.cli.options import PepperFile
from serve.errors import StartError
from serve.tenants.audit import AUDIT_FILE, AuditEvent, AuditLog
from serve.tenants.key_store_choice import holds_keys, key_journal, open_key_store
from serve.tenants.keys import KeyRecord, mint
from serve.tenants.pepper import PEPPER_FILE, read_pepper
from serve.tenants.principal import LOCAL_TENANT, Scope, check_tenant, parse_scopes

keys_app = typer.Typer(
    name="keys", help="Make, list, revoke and rotate API keys.", no_args_is_help=True, rich_markup_mode=None
)

_DURATION = re.compile(r"([1-9][0-9]{0,8})([smhd])\Z")
_UNIT_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}

Store = Annotated[Path, typer.Option("--store", envvar="CHORALE_STORE", help="Folder of the adapter store.")]
KeyId = Annotated[str, typer.Argument(help="The key's id: the part between the two underscores.")]
Tenant = Annotated[str, typer.Option("--tenant", help="Whose key it is; tenants exist by having keys.")]
Scopes = Annotated[list[str], typer.Option("--scope", help=f"What it opens; repeatable: {', '.join(Scope)}.")]
ExpiresIn = Annotated[
    str | None, typer.Option("--expires-in", help="Its life, such as 90d, 12h, 30m; default: without end.")
]
Overlap = Annotated[str, typer.Option("--overlap", help="How long the old key stays valid beside the new one.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@keys_app.command()
def create(
    store: Store,
    tenant: Tenant,
    scope: Scopes,
    expires_in: ExpiresIn = None,
    pepper_file: PepperFile = None,
    blobs: BlobsUrl = None,
) -> None:
    """Make a key and print it: it cannot be shown again."""
    with one_line_errors(exit_status=1):
        now, expires = int(time.time()), _end(expires_in)
        check_tenant(tenant)
        scopes = parse_scopes(scope)
        with _opened(store, pepper_file, blobs, create=True) as keys:
            text, record = mint(tenant, scopes, keys.pepper, now=now, expires=expires)
            # first the log: a key that nobody recorded would be worse than a record of a key that was not made
            keys.record(AuditEvent.KEY_MADE, record.key_id, f"{tenant}: {' '.join(sorted(scopes))}")
            keys.store.add(record)
        _show_secret(text, record)


@keys_app.command("list")
def list_keys(store: Store, as_json: Json = False, pepper_file: PepperFile = None, blobs: BlobsUrl = None) -> None:
    """Show every key, without its secret."""
    with one_line_errors(exit_status=1), _opened(store, pepper_file, blobs) as keys:
        records = keys.store.snapshot().records
        if as_json:
            typer.echo(json.dumps([_row(record) for record in records], indent=2))
            return
        for record in records:
            row = _row(record)
            typer.echo(
                f"{row['id']}  {row['state']:8}  {row['tenant']}  {','.join(sorted(record.scopes))}  {_life(record)}"
            )


@keys_app.command()
def revoke(key_id: KeyId, store: Store, pepper_file: PepperFile = None, blobs: BlobsUrl = None) -> None:
    """Make a key invalid for ever, within a second on every running server."""
    with one_line_errors(exit_status=1), _opened(store, pepper_file, blobs) as keys:
        record = keys.store.revoke(key_id, now=int(time.time()))
        keys.record(AuditEvent.KEY_REVOKED, key_id, record.tenant)
        typer.echo(f"revoked {key_id} of tenant {record.tenant}")


@keys_app.command()
def rotate(
    key_id: KeyId,
    store: Store,
    overlap: Overlap = "24h",
    expires_in: ExpiresIn = None,
    pepper_file: PepperFile = None,
    blobs: BlobsUrl = None,
) -> None:
    """Make a key's successor and print it; the old key ends after the overlap."""
    with one_line_errors(exit_status=1):
        now, until, expires = int(time.time()), _end(overlap), _end(expires_in)
        assert until is not None, "the overlap has a default"
        with _opened(store, pepper_file, blobs) as keys:
            old = next((record for record in keys.store.snapshot().records if record.key_id == key_id), None)
            if old is None or not old.is_valid_at(now):
                state = "unknown" if old is None else _state(old)
                raise StartError(f"the key {ascii(key_id)[:80]} is {state}; only a valid key has a successor")
            text, record = mint(old.tenant, old.scopes, keys.pepper, now=now, expires=expires)
            keys.record(AuditEvent.KEY_ROTATED, key_id, f"successor {record.key_id}")
            old = keys.store.rotate(key_id, record, until=until)
        typer.echo(f"{key_id} ends {_date(old.expires)}", err=True)
        _show_secret(text, record)


class _Keys:
    """A store's keys, pepper and audit log."""

    def __init__(self, folder: Path, pepper: bytes, blobs_url: str | None) -> None:
        self.pepper = pepper
        self.store = open_key_store(folder, pepper, journal=key_journal(blobs_url))
        self._audit = AuditLog(folder / AUDIT_FILE, clock=time.time)

    def record(self, event: AuditEvent, key_id: str, detail: str) -> None:
        """Record what the operator did to a key."""
        self._audit.append(event, tenant=LOCAL_TENANT, key_id="operator", subject=key_id, detail=detail)


@contextmanager
def _opened(folder: Path, pepper_file: Path | None, blobs_url: str | None, *, create: bool = False) -> Iterator[_Keys]:
    """Open a store's keys; only `create` makes any of it."""
    if blobs_url is not None and pepper_file is None:
        raise StartError("keys that lie in an object store need a pepper from elsewhere: --pepper-file FILE")
    if create or blobs_url is not None:
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise StartError(f"--store {folder}: {error.strerror}") from error
    elif not holds_keys(folder):
        raise StartError(f"{folder} holds no keys; `chorale keys create` makes the first one")
    pepper = read_pepper(pepper_file or folder / PEPPER_FILE, create=create and pepper_file is None)
    keys = _Keys(folder, pepper, blobs_url)
    try:
        yield keys
    finally:
        keys.store.close()


def _end(duration: str | None) -> int | None:
    if duration is None:
        return None
    match = _DURATION.match(duration)
    if match is None:
        raise StartError(f"the duration {ascii(duration)[:40]} is not a number with s, m, h or d, such as 90d")
    return int(time.time()) + int(match[1]) * _UNIT_S[match[2]]


def _show_secret(text: str, record: KeyRecord) -> None:
    typer.echo(f"key {record.key_id} of tenant {record.tenant}, {_life(record)}; it is shown this once:", err=True)
    typer.echo(text)


def _row(record: KeyRecord) -> dict[str, object]:
    return {
        "id": record.key_id,
        "tenant": record.tenant,
        "scopes": sorted(record.scopes),
        "state": _state(record),
        "created": record.created,
        "expires": record.expires,
        "revoked": record.revoked,
    }


def _state(record: KeyRecord) -> str:
    if record.revoked is not None:
        return "revoked"
    return "valid" if record.is_valid_at(time.time()) else "expired"


def _life(record: KeyRecord) -> str:
    return "without end" if record.expires is None else f"until {_date(record.expires)}"


def _date(unix_s: int | None) -> str:
    # years that no calendar has are a far future all the same
    if unix_s is None or unix_s > 253402300799:
        return "never"
    return datetime.fromtimestamp(unix_s, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
