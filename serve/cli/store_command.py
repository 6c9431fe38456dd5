"""`chorale store rebuild|verify|gc` and `chorale redis-acl`: what operators do to a whole store.

Owns what is printed and the exit status: 1 if anything is wrong. Invariant: a folder that is no store is refused, and
nothing is made in it.
"""

import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from adapters_store.registry import Registry
from adapters_store.registry_choice import check_kind, kinds_of, open_embedded, rebuild_sqlite
from adapters_store.registry_redis import SharedRegistry
from adapters_store.upkeep import all_versions, collect, retire_old
from adapters_store.upkeep import verify as verify_objects
from serve.cli.adapter_options import KeepVersions
from serve.cli.blob_options import BlobsUrl
from serve.cli.offline_audit import record
from serve.cli.operator_errors import one_line_errors
from serve.cli.options import RedisUrl
from serve.cli.redis_extra import acl_line, connect, rebuild_journal
from serve.cli.remote_upkeep import collect_remote, open_remote, verify_remote
from serve.errors import StartError
from serve.tenants.audit import AuditEvent

# deleted adapters' bytes stay this long, as in a running server
_GRACE_S = 3600

store_app = typer.Typer(
    name="store", help="Verify, clean up and rebuild a store.", no_args_is_help=True, rich_markup_mode=None
)

Store = Annotated[Path, typer.Option("--store", envvar="CHORALE_STORE", help="Folder of the store.")]


class Target(StrEnum):
    """Which registry a rebuild makes."""

    REDIS = "redis"
    SQLITE = "sqlite"


To = Annotated[
    Target,
    typer.Option(
        "--to", help="redis: the journal that replicas share; sqlite: for one server. Stop all servers first."
    ),
]
User = Annotated[str, typer.Option("--user", help="Name of the Redis user.")]


@store_app.command()
def verify(store: Store, redis_url: RedisUrl = None, blobs: BlobsUrl = None) -> None:
    """Read the registry and every byte of every adapter, and compare them."""
    with one_line_errors(exit_status=1), _registry(store, redis_url, blobs) as registry:
        problems = 0
        for finding in verify_objects(store, registry) if blobs is None else verify_remote(store, blobs, registry):
            problems += bool(finding.problem)
            state = f"WRONG: {finding.problem}" if finding.problem else "intact"
            typer.echo(f"{finding.digest[:12]} {finding.owner or '(no version)'} {state}")
        typer.echo(_summary(registry))
        if problems:
            raise StartError(f"{problems} of the store's objects need attention")


@store_app.command()
def gc(store: Store, redis_url: RedisUrl = None, keep_versions: KeepVersions = None, blobs: BlobsUrl = None) -> None:
    """Remove objects that nothing has pointed to for an hour; with --redis-url also fold the journal into one file.

    With --keep-versions older versions are forgotten first: their objects go an hour later, so run it again then. In
    an object store, only objects go that are a day old.
    """
    with one_line_errors(exit_status=1), _registry(store, redis_url, blobs) as registry:
        now = int(time.time())
        if keep_versions is not None:
            for version in retire_old(registry, keep=keep_versions, now=now):
                record(store, AuditEvent.DELETE, version.name, f"version {version.version} sha256:{version.digest}")
                typer.echo(f"forgot {version.name}@{version.version}")
        since = now - _GRACE_S
        if blobs is None:
            collected = collect(store, registry, retired_since=since)
        else:
            collected = collect_remote(blobs, registry, retired_since=since)
        if collected.num_objects:
            record(store, AuditEvent.COLLECT, "objects", f"{collected.num_objects}, {collected.num_bytes} bytes")
        typer.echo(f"removed {collected.num_objects} objects, {collected.num_bytes} bytes")
        if isinstance(registry, SharedRegistry) and redis_url is not None:
            typer.echo(f"folded the journal: {registry.fold(retired_since=since)} files went")


@store_app.command()
def rebuild(store: Store, redis_url: RedisUrl = None, to: To = Target.REDIS) -> None:
    """Make the registry anew from what the store's folder holds, and take a store from one kind to the other."""
    with one_line_errors(exit_status=1):
        if not kinds_of(store):
            raise StartError(f"{store} is not an adapter store; `chorale adapters add` or `chorale serve` makes one")
        registry = _rebuilt(store, redis_url, to)
        with closing(registry):
            for finding in verify_objects(store, registry):
                if finding.problem:
                    typer.echo(f"{finding.digest[:12]} {finding.owner or '(no version)'} WRONG: {finding.problem}")
            typer.echo(f"rebuilt {_summary(registry)}")


def redis_acl(user: User = "chorale") -> None:
    """Print the Redis command that makes a user with the least rights that replicas need; put the password in."""
    with one_line_errors(exit_status=1):
        if not user.isidentifier():
            raise StartError(f"--user {user!a}: letters, digits and '_' only")
        typer.echo(acl_line(user))


def _rebuilt(store: Path, redis_url: str | None, to: Target) -> Registry:
    if to is Target.SQLITE:
        return rebuild_sqlite(store)
    if redis_url is None:
        raise StartError("say which Redis the replicas share: --redis-url URL; or --to sqlite for one server")
    return rebuild_journal(store, redis_url)


@contextmanager
def _registry(store: Path, redis_url: str | None, blobs_url: str | None) -> Iterator[Registry]:
    """Open what the store has; a shared one may be read without Redis, which only those need that change it."""
    if blobs_url is not None:
        with closing(open_remote(blobs_url)) as remote:
            if redis_url is not None:
                connect(remote, redis_url)
            yield remote
        return
    kinds = kinds_of(store)
    if not kinds:
        raise StartError(f"{store} is not an adapter store; `chorale adapters add` or `chorale serve` makes one")
    if kinds == ["journal"]:
        shared = SharedRegistry.open(store)
        with closing(shared):
            if redis_url is not None:
                connect(shared, redis_url)
            yield shared
    else:
        check_kind(store, "sqlite" if redis_url is None else "journal")
        with closing(open_embedded(store)) as registry:
            yield registry


def _summary(registry: Registry) -> str:
    versions = all_versions(registry)
    place = f" at change {registry.number}" if isinstance(registry, SharedRegistry) else ""
    return f"{len(registry.all_current())} adapters, {len(versions)} versions{place}"
