"""`chorale store rebuild|verify|gc` and `chorale redis-acl`, on stores of both kinds and a real Redis."""

import json
import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from adapters_store.errors import InvalidOption
from adapters_store.registry_choice import open_embedded
from adapters_store.registry_redis import SharedRegistry
from adapters_store.registry_replicas import open_shared
from adapters_store.registry_sqlite import SqliteRegistry
from serve.cli.app import app
from serve.tenants.audit import AUDIT_FILE
from tests.redis_server import RedisServer
from tests.store.folders import lora_config, lora_tensors, open_store, write_folder


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments)])


def store(command: str, root: Path, *arguments: str) -> Result:
    return run("store", command, "--store", root, *arguments)


@pytest.fixture(scope="module")
def redis_server() -> Iterator[RedisServer]:
    """Return a real Redis."""
    server = RedisServer()
    try:
        yield server
    finally:
        server.close()


@pytest.fixture
def filled(store_dir: Path, tmp_path: Path) -> Path:
    """Return a SQLite store with `fr` (versions 2 and 3), its alias `prod` and a deleted name."""
    with closing(open_store(store_dir)) as opened:
        for seed in (1, 2, 3):
            opened.put_dir("fr", write_folder(tmp_path / str(seed), lora_config(), lora_tensors(seed=seed)))
            if seed == 1:
                opened.delete("fr")
        opened.set_alias("fr", "prod", 2)
    return store_dir


def test_a_folder_that_is_no_store_is_refused_and_left_alone(tmp_path: Path) -> None:
    for command in (["verify"], ["gc"], ["rebuild", "--to", "sqlite"]):
        result = store(command[0], tmp_path, *command[1:])
        assert (result.exit_code, "is not an adapter store" in result.stderr) == (1, True)
    assert list(tmp_path.iterdir()) == []


def test_a_rebuild_for_replicas_needs_their_redis(filled: Path) -> None:
    result = store("rebuild", filled)
    assert result.exit_code == 1 and "--redis-url URL" in result.stderr
    result = store("rebuild", filled, "--redis-url", "unix://user:s3cret@/nowhere")
    assert result.exit_code == 1 and "cannot be reached" in result.stderr and "s3cret" not in result.output
    assert SqliteRegistry(filled / "registry.sqlite").current("fr") is not None


def test_a_store_goes_to_replicas_and_back_with_all_it_knows(filled: Path, redis_server: RedisServer) -> None:
    with closing(SqliteRegistry(filled / "registry.sqlite")) as before:
        known = before.everything()
    assert len(known.versions) == 2 and known.pointers["fr"].aliases == {"prod": 2}
    assert known.retired and known.last_numbers == {"fr": 3}
    result = store("rebuild", filled, "--redis-url", redis_server.url)
    assert (result.exit_code, result.stdout) == (0, "rebuilt 1 adapters, 2 versions at change 1\n")
    shared = SharedRegistry.open(filled)
    assert shared.everything().versions == known.versions and shared.everything().pointers == known.pointers
    with redis_server.client() as client:
        assert client.exists(f"chorale:{shared.store_id}:head")
    # no server reads the old file any more, and it is still there
    assert not (filled / "registry.sqlite").exists() and (filled / "registry.sqlite.before-1").is_file()
    with pytest.raises(InvalidOption, match="start with --redis-url"):
        open_embedded(filled)
    assert store("rebuild", filled, "--to", "sqlite").exit_code == 0
    with closing(open_embedded(filled)) as back:
        assert isinstance(back, SqliteRegistry) and back.everything() == known
    with pytest.raises(InvalidOption, match="has a registry of its own"):
        open_shared(filled, redis_server.url)


def test_a_rebuild_that_was_cut_short_is_walked_to_its_end(filled: Path, redis_server: RedisServer) -> None:
    shutil.copyfile(filled / "registry.sqlite", filled / "kept")
    assert store("rebuild", filled, "--redis-url", redis_server.url).exit_code == 0
    # as if it had died before the last rename
    (filled / "kept").rename(filled / "registry.sqlite")
    for attempt in (lambda: open_embedded(filled), lambda: open_shared(filled, redis_server.url)):
        with pytest.raises(InvalidOption):
            attempt()
    assert store("rebuild", filled, "--redis-url", redis_server.url).exit_code == 0
    with closing(open_shared(filled, redis_server.url)) as registry:
        assert registry.current("fr") is not None


def test_registries_that_differ_are_never_merged(filled: Path, redis_server: RedisServer) -> None:
    shutil.copyfile(filled / "registry.sqlite", filled / "kept")
    assert store("rebuild", filled, "--redis-url", redis_server.url).exit_code == 0
    with closing(open_shared(filled, redis_server.url)) as registry:
        registry.delete("fr", now=1)
    (filled / "kept").rename(filled / "registry.sqlite")
    for arguments in (["--redis-url", redis_server.url], ["--to", "sqlite"]):
        result = store("rebuild", filled, *arguments)
        assert result.exit_code == 1 and "hold different adapters" in result.stderr


def test_a_flushed_or_foreign_redis_is_put_right(filled: Path, redis_server: RedisServer) -> None:
    assert store("rebuild", filled, "--redis-url", redis_server.url).exit_code == 0
    key = f"chorale:{SharedRegistry.open(filled).store_id}:head"
    with redis_server.client() as client:
        client.xadd(key, {"v": "1"}, id="77-0")
        result = store("gc", filled, "--redis-url", redis_server.url)
        assert result.exit_code == 1 and "store rebuild" in result.stderr
        assert store("rebuild", filled, "--redis-url", redis_server.url).exit_code == 0
        assert client.xrevrange(key)[0][0] == "1-0"


@pytest.mark.parametrize("kind", ["sqlite", "redis"])
def test_verify_names_what_is_damaged_and_gc_removes_what_is_orphaned(
    filled: Path, redis_server: RedisServer, kind: str
) -> None:
    arguments = [] if kind == "sqlite" else ["--redis-url", redis_server.url]
    if kind == "redis":
        assert store("rebuild", filled, *arguments).exit_code == 0
    result = store("verify", filled, *arguments)
    assert (result.exit_code, result.stdout.count("intact")) == (0, 3), result.output
    assert "fr@2 intact" in result.stdout and "(no version) intact" in result.stdout
    pointed = next(line for line in result.stdout.splitlines() if "fr@2" in line)[:12]
    image = next((filled / "objects").glob(f"{pointed}*/adapter.safetensors"))
    whole = image.read_bytes()
    image.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    orphan = filled / "objects" / ("f" * 64)
    shutil.copytree(image.parent, orphan)
    result = store("verify", filled, *arguments)
    assert result.exit_code == 1 and "2 of the store's objects" in result.stderr
    assert f"{pointed} fr@2 WRONG: the weights of adapter {pointed} do not match their hash" in result.stdout
    assert f"{'f' * 12} (no version) WRONG: nothing points to it" in result.stdout
    num_bytes = sum(path.stat().st_size for path in orphan.iterdir())
    result = store("gc", filled, *arguments)
    assert result.exit_code == 0 and f"removed 1 objects, {num_bytes} bytes" in result.stdout
    assert not orphan.exists() and len([*(filled / "objects").iterdir()]) == 3
    if kind == "redis":
        assert "folded the journal: 1 files went" in result.stdout


def test_a_shared_store_is_read_offline_and_changed_only_through_a_replica(
    filled: Path, redis_server: RedisServer, tmp_path: Path
) -> None:
    before = json.loads(run("adapters", "show", "fr", "--store", filled, "--json").stdout)
    assert store("rebuild", filled, "--redis-url", redis_server.url).exit_code == 0
    assert json.loads(run("adapters", "show", "fr", "--store", filled, "--json").stdout) == before != []
    assert run("adapters", "verify", "--store", filled).stdout == "intact fr\n"
    for arguments in (["rm", "fr"], ["add", "fr", str(tmp_path)]):
        result = run("adapters", *arguments, "--store", filled)
        assert result.exit_code == 1 and "shared by replicas" in result.stderr and "--url" in result.stderr
    assert SharedRegistry.open(filled).current("fr") is not None


def test_the_acl_line_can_be_pasted(redis_server: RedisServer) -> None:
    result = run("redis-acl", "--user", "replicas")
    assert result.exit_code == 0
    with redis_server.client() as client:
        client.execute_command(*result.stdout.replace("PASSWORD", "s3cret").split())
        user = client.execute_command("ACL", "GETUSER", "replicas")
        assert "chorale:*" in json.dumps(user) and "-@all" in json.dumps(user)
    result = run("redis-acl", "--user", "x on nopass")
    assert result.exit_code == 1 and "letters, digits" in result.stderr


def test_old_versions_go_but_none_that_something_points_to(filled: Path, tmp_path: Path) -> None:
    with closing(open_store(filled)) as opened:
        for seed in (4, 5, 6):
            opened.put_dir("fr", write_folder(tmp_path / str(seed), lora_config(), lora_tensors(seed=seed)))
    # 2 is `prod`, 6 what the name means, 5 what a rollback goes to
    result = store("gc", filled, "--keep-versions", "1")
    assert (result.exit_code, result.stdout) == (0, "forgot fr@3\nforgot fr@4\nremoved 0 objects, 0 bytes\n")
    with closing(open_store(filled)) as opened:
        assert [version.version for version in opened.versions("fr")] == [2, 5, 6]
    assert store("gc", filled, "--keep-versions", "1").stdout == "removed 0 objects, 0 bytes\n"
    records = [json.loads(line) for line in (filled / AUDIT_FILE).read_text().splitlines()]
    assert [record["detail"].partition(" sha256:")[0] for record in records] == ["version 3", "version 4"]
    assert store("gc", filled, "--keep-versions", "0").exit_code == 2
