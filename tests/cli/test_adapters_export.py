"""`chorale adapters export`, from a store's folder and from a running server."""

import json
from pathlib import Path

import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner, Result

from serve.cli.app import app
from tests.cli.fake_server_process import StartFake
from tests.tiny_model import write_tiny_adapter, write_tiny_model


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["adapters", *map(str, arguments)])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the base's folder."""
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def voice(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a PEFT folder for the base."""
    return write_tiny_adapter(tmp_path_factory.mktemp("adapters"), "voice", rank=4, seed=1).folder


@pytest.fixture(scope="module")
def store_dir(tmp_path_factory: pytest.TempPathFactory, base: Path, voice: Path) -> Path:
    """Return a store that holds `voice`."""
    folder = tmp_path_factory.mktemp("stores") / "store"
    assert run("add", "voice", voice, "--store", folder, "--base", base).exit_code == 0
    return folder


def test_a_store_exports_to_every_form_that_fits(base: Path, voice: Path, store_dir: Path, tmp_path: Path) -> None:

    def export(to: str, *more: str | Path) -> Result:
        return run("export", "voice", "--to", to, "--out", tmp_path / to, "--store", store_dir, *more)

    assert export("peft").stdout == f"exported voice to {tmp_path / 'peft'}\n"
    assert (
        load_file(tmp_path / "peft" / "adapter_model.safetensors").keys()
        == load_file(voice / "adapter_model.safetensors").keys()
    )
    assert export("hf_model", "--base", base).exit_code == 0
    merged, plain = (load_file(folder / "model.safetensors") for folder in (tmp_path / "hf_model", base))
    changed = {name for name in plain if (merged[name] != plain[name]).any()}
    assert merged.keys() == plain.keys() and changed and all(".self_attn." in n or ".mlp." in n for n in changed)
    assert export("canonical").exit_code == 0
    assert sorted(path.name for path in (tmp_path / "canonical").iterdir()) == ["adapter.json", "adapter.safetensors"]


def test_what_cannot_be_exported_is_one_line_and_status_1(voice: Path, store_dir: Path, tmp_path: Path) -> None:
    for arguments, reason in (
        (("voice", "--to", "meteora", "--out", tmp_path / "a", "--store", store_dir), "same gated experts"),
        (("voice", "--to", "hf_model", "--out", tmp_path / "a", "--store", store_dir), "--base MODEL"),
        (("voice", "--to", "peft", "--out", voice, "--store", store_dir), "not an empty folder"),
        (("nobody", "--to", "peft", "--out", tmp_path / "a", "--store", store_dir), "no adapter 'nobody'"),
        (("voice", "--to", "peft", "--out", tmp_path / "a"), "say where"),
    ):
        refused = run("export", *arguments)
        assert refused.exit_code == 1 and reason in refused.stderr and len(refused.stderr.splitlines()) == 1
        assert not (tmp_path / "a").exists()


def test_a_server_exports_by_the_canonical_download(start_fake: StartFake, voice: Path, tmp_path: Path) -> None:
    server = start_fake()
    added = run("add", "voice", voice, "--url", server.url)
    assert added.exit_code == 0, added.stderr
    assert run("export", "voice", "--to", "canonical", "--out", tmp_path / "c", "--url", server.url).exit_code == 0
    assert json.loads((tmp_path / "c" / "adapter.json").read_text())["family"] == "lora"
    assert run("export", "voice", "--to", "peft", "--out", tmp_path / "p", "--url", server.url).exit_code == 0
    assert json.loads((tmp_path / "p" / "adapter_config.json").read_text())["r"] == 4
    gone = run("export", "nobody", "--to", "peft", "--out", tmp_path / "n", "--url", server.url)
    assert gone.exit_code == 1 and "404" in gone.stderr
