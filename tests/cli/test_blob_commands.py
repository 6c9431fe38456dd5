"""Commands over a store that lies in an object store (moto's server): keys, upkeep, and starts that cannot work."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from adapters_store.blob_cache import BlobCache
from adapters_store.object_journal import ObjectJournal
from adapters_store.object_store import ObjectStore
from adapters_store.registry_redis import SharedRegistry
from serve.cli.app import app
from tests.s3_server import S3Server
from tests.store.folders import lora_config, lora_tensors, open_store, write_folder
from tests.store.registry_cases import Alone
from tests.tiny_model import write_tiny_model


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    started = S3Server()
    yield started
    started.close()


@pytest.fixture
def s3(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """Return the object store, which this process's environment names."""
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    return server


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments)])


def test_an_object_store_without_redis_is_refused(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "tiny")
    flags = ("--model", model, "--store", tmp_path / "store", "--port", "0", "--blobs", "s3://bucket/x")
    result = run("serve", *flags)
    assert result.exit_code == 2 and "--redis-url" in result.stderr and result.stdout == ""


def test_another_kind_of_address_is_refused(tmp_path: Path) -> None:
    result = run("store", "verify", "--store", tmp_path, "--blobs", "https://user:s3cret@bucket/x")
    assert result.exit_code == 1 and "s3://BUCKET/PREFIX" in result.stderr and "s3cret" not in result.stderr


def test_a_prefix_that_holds_no_store_is_refused_and_left_alone(tmp_path: Path, s3: S3Server) -> None:
    for command in ("verify", "gc"):
        result = run("store", command, "--store", tmp_path, "--blobs", s3.url("nothing"))
        assert (result.exit_code, "holds no adapter store" in result.stderr) == (1, True)
    assert s3.keys("nothing") == []


def test_keys_in_an_object_store_need_a_pepper_from_elsewhere(tmp_path: Path, s3: S3Server) -> None:
    flags = ("--store", tmp_path / "store", "--blobs", s3.url("no-pepper"), "--tenant", "acme", "--scope", "infer")
    result = run("keys", "create", *flags)
    assert result.exit_code == 1 and "--pepper-file" in result.stderr and s3.keys("no-pepper") == []


def test_keys_are_made_and_revoked_from_any_machine(tmp_path: Path, s3: S3Server) -> None:
    pepper = tmp_path / "pepper"
    pepper.write_bytes(b"p" * 32)
    pepper.chmod(0o600)

    def keys(command: str, machine: str, *arguments: str) -> Result:
        flags = ("--store", tmp_path / machine, "--blobs", s3.url("keyed"), "--pepper-file", pepper)
        result = run("keys", command, *arguments, *flags)
        assert result.exit_code == 0, result.output
        return result

    text = keys("create", "one", "--tenant", "acme", "--scope", "infer").stdout.strip()
    key_id = text.split("_")[1]
    assert f"{key_id}  valid" in keys("list", "other").stdout
    keys("revoke", "other", key_id)
    assert f"{key_id}  revoked" in keys("list", "one").stdout
    assert s3.keys("keyed") == [f"keys/{number:012d}" for number in range(3)]
    assert all(text.split("_")[2][:64].encode() not in s3.read("keyed", key) for key in s3.keys("keyed"))


def test_upkeep_reads_every_byte_and_keeps_what_is_new(tmp_path: Path, s3: S3Server) -> None:
    objects = ObjectStore(s3.url("upkept"), small_timeout_s=60.0)
    registry = SharedRegistry(ObjectJournal(objects, "journal"))
    registry.connect(Alone())
    with closing(open_store(tmp_path / "replica", registry=registry)) as opened:
        opened.copies = BlobCache(tmp_path / "replica", objects, max_bytes=1 << 30)
        opened.put_dir("fr", write_folder(tmp_path / "source", lora_config(), lora_tensors()))
    flags = ("--store", tmp_path / "operator", "--blobs", s3.url("upkept"))
    verified = run("store", "verify", *flags)
    assert verified.exit_code == 0 and "fr@1 intact" in verified.stdout, verified.output
    collected = run("store", "gc", *flags)
    assert collected.exit_code == 0 and "removed 0 objects" in collected.stdout, collected.output
    (image,) = [key for key in s3.keys("upkept") if key.endswith(".safetensors")]
    objects.delete(image)
    broken = run("store", "verify", *flags)
    assert broken.exit_code == 1 and "fr@1 WRONG" in broken.stdout and "damaged" in broken.stdout, broken.output
