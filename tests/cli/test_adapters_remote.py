"""`chorale adapters --url` and `--preload` against a real store; the server behind the URL runs the fake engine."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from adapters_store.base import read_base_dims
from adapters_store.errors import StoreError
from adapters_store.proof import NO_ENGINE
from adapters_store.store import AdapterStore
from serve.cli.app import app
from serve.cli.server import missing_adapters, publish
from serve.errors import StartError
from tests.cli.fake_server_process import StartFake
from tests.tiny_model import write_tiny_adapter, write_tiny_model


def test_an_adapter_is_uploaded_listed_shown_and_deleted_over_http(start_fake: StartFake, tmp_path: Path) -> None:
    server = start_fake()
    voice = write_tiny_adapter(tmp_path, "voice", rank=4, seed=1)

    def run(*arguments: str) -> Result:
        return CliRunner().invoke(app, ["adapters", *arguments, "--url", server.url])

    (added,) = json.loads(run("add", "voice", str(voice.folder), "--json").stdout)
    assert (added["name"], added["version"], added["rank"]) == ("voice", 1, 4)
    assert [row["digest"] for row in json.loads(run("list", "--json").stdout)] == [added["digest"]]
    assert "applied: layers.0" in run("show", "voice").stdout
    assert run("rm", "voice").stdout == "removed voice\n"
    gone = run("show", "voice")
    assert gone.exit_code == 1
    assert gone.stderr.startswith("chorale: GET ") and "404" in gone.stderr
    assert len(gone.stderr.splitlines()) == 1


def test_what_a_folder_is_declared_as_goes_with_its_upload(start_fake: StartFake, tmp_path: Path) -> None:
    server = start_fake()
    voice = write_tiny_adapter(tmp_path, "voice", rank=4, seed=1)

    def add(*arguments: str) -> Result:
        command = ["adapters", "add", "voice", str(voice.folder), "--url", server.url, "--format", "peft"]
        return CliRunner().invoke(app, [*command, *arguments])

    refused = add("--options", '{"rank": 8}')
    assert refused.exit_code == 1 and "no option 'rank'" in refused.stderr
    assert add().exit_code == 0


def test_preloading_publishes_what_is_missing_and_touches_nothing_else(tmp_path: Path, store_dir: Path) -> None:
    base = read_base_dims(write_tiny_model(tmp_path / "tiny"))
    adapters = tmp_path / "adapters"
    write_tiny_adapter(adapters, "first", rank=2, seed=1)
    store = AdapterStore.open(store_dir, base, image_dtype="float32")
    publish(store, missing_adapters(store, adapters), NO_ENGINE)
    write_tiny_adapter(adapters, "second", rank=2, seed=2)
    (adapters / "no-adapter").mkdir()
    publish(store, missing_adapters(store, adapters), NO_ENGINE)
    assert [(version.name, version.version) for version in store.list()] == [("first", 1), ("second", 1)]
    store.close()


def test_preloading_says_what_it_cannot_publish(tmp_path: Path, store_dir: Path) -> None:
    store = AdapterStore.open(store_dir, read_base_dims(write_tiny_model(tmp_path / "tiny")))
    with pytest.raises(StartError, match=r"--preload .*missing: no such folder"):
        missing_adapters(store, tmp_path / "missing")
    (tmp_path / "adapters" / "broken").mkdir(parents=True)
    (tmp_path / "adapters" / "broken" / "adapter_config.json").write_text("{")
    with pytest.raises(StoreError):
        publish(store, missing_adapters(store, tmp_path / "adapters"), NO_ENGINE)
    store.close()
