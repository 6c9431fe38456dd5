"""`chorale adapters` on a store's folder, with no server running."""

import json
import os
from pathlib import Path

import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner, Result

from adapters_store.base import read_base_dims
from serve.cli.app import app
from tests.store.tiny_checkpoints import TinyBase, meteora_checkpoint, mixture, write_checkpoint
from tests.tiny_model import write_tiny_adapter, write_tiny_model


def run(*arguments: str | Path) -> Result:
    """Run `chorale adapters ARGUMENTS` in this process; what is added is not probed unless they say so."""
    probe = ["--probe", "off"] if arguments[0] == "add" and "--probe" not in arguments else []
    return CliRunner().invoke(app, ["adapters", *map(str, arguments), *probe])


def run_json(*arguments: str | Path) -> list[dict[str, object]]:
    """Run a command with --json and return what it printed."""
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    rows = json.loads(result.stdout)
    assert isinstance(rows, list)
    return rows


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the base's folder."""
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def voice(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a PEFT folder for the base."""
    return write_tiny_adapter(tmp_path_factory.mktemp("adapters"), "voice", rank=4, seed=1).folder


def test_an_adapter_is_added_shown_verified_and_removed(store_dir: Path, base: Path, voice: Path) -> None:
    (added,) = run_json("add", "voice", voice, "--store", store_dir, "--base", base)
    assert (added["name"], added["version"], added["rank"], added["dtype"]) == ("voice", 1, 4, "float32")
    # the store knows its base by now
    (again,) = run_json("add", "voice", voice, "--store", store_dir)
    assert (again["version"], again["digest"]) == (2, added["digest"])
    assert run_json("list", "--store", store_dir) == [again]
    assert run_json("show", "voice", "--store", store_dir) == [added, again]
    assert run("verify", "--store", store_dir).stdout == "intact voice\n"
    assert run("rm", "voice", "--store", store_dir).stdout == "removed voice\n"
    assert run_json("list", "--store", store_dir) == []


def test_paths_may_be_relative(
    store_dir: Path, base: Path, voice: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    store, folder, model = (os.path.relpath(path, tmp_path) for path in (store_dir, voice, base))
    (added,) = run_json("add", "voice", folder, "--store", store, "--base", model)
    assert run_json("list", "--store", store_dir) == [added]


def test_the_table_for_people_names_every_adapter(store_dir: Path, base: Path, voice: Path) -> None:
    run_json("add", "voice", voice, "--store", store_dir, "--base", base)
    shown = run("show", "voice", "--store", store_dir).stdout
    assert "voice" in shown and "applied: layers.0.self_attn.q_proj" in shown
    assert "voice" in run("list", "--store", store_dir).stdout


def test_with_the_base_at_hand_an_adapter_is_proven_on_it(store_dir: Path, base: Path, voice: Path) -> None:
    (added,) = run_json("add", "voice", voice, "--store", store_dir, "--base", base, "--probe", "on")
    proof = added["proof"]
    assert isinstance(proof, dict) and (proof["dtype"], proof["device"]) == ("float32", "cpu")
    assert proof["max_error"] <= proof["tolerance"]["max_error"] < proof["served_effect"] and proof["gain"] == 1.0
    assert run_json("show", "voice", "--store", store_dir) == [added]
    shown = run("show", "voice", "--store", store_dir).stdout
    assert f"largest error {proof['max_error']} (allowed" in shown and "first differing token: none" in shown
    assert f"largest change: {proof['largest_change']['ratio']} of the base at layers." in shown


def test_an_adapter_without_proof_says_why(store_dir: Path, base: Path, voice: Path) -> None:
    run_json("add", "voice", voice, "--store", store_dir, "--base", base)
    assert "proof: none (added with --probe off)" in run("show", "voice", "--store", store_dir).stdout
    (again,) = run_json("add", "voice", voice, "--store", store_dir, "--probe", "on")
    assert again["proof"] is None and "added without --base" in str(again["not_probed"])
    refused = run("add", "voice", voice, "--url", "http://127.0.0.1:1", "--probe", "off")
    assert_refused(refused, "--probe goes with --store")


def test_verify_finds_a_flipped_bit(store_dir: Path, base: Path, voice: Path) -> None:
    run_json("add", "voice", voice, "--store", store_dir, "--base", base)
    (image,) = (store_dir / "objects").glob("*/adapter.safetensors")
    data = bytearray(image.read_bytes())
    data[-1] ^= 1
    image.write_bytes(data)
    result = run("verify", "voice", "--store", store_dir)
    assert_refused(result, "upload it again")


def test_the_first_adapter_of_a_store_needs_its_base(store_dir: Path, voice: Path) -> None:
    assert_refused(run("add", "voice", voice, "--store", store_dir), "--base MODEL_DIR")
    assert not store_dir.exists()


def test_a_folder_that_is_no_adapter_is_refused(store_dir: Path, base: Path, tmp_path: Path) -> None:
    assert_refused(run("add", "x", tmp_path / "missing", "--store", store_dir, "--base", base), "no such folder")
    (tmp_path / "empty").mkdir()
    assert_refused(run("add", "x", tmp_path / "empty", "--store", store_dir, "--base", base), "adapter_config.json")


@pytest.mark.parametrize("command", [("list",), ("show", "x"), ("rm", "x"), ("verify", "x")])
def test_a_folder_that_is_no_store_is_left_alone(tmp_path: Path, command: tuple[str, ...]) -> None:
    assert_refused(run(*command, "--store", tmp_path), "is not an adapter store")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_name_is_refused_by_name(store_dir: Path, base: Path, voice: Path) -> None:
    run_json("add", "voice", voice, "--store", store_dir, "--base", base)
    for command in ("show", "rm", "verify"):
        assert_refused(run(command, "voiec", "--store", store_dir), "voiec")


def test_a_command_that_is_told_no_place_says_which_flags_name_one() -> None:
    assert_refused(run("list"), "--store DIR", "--url")


def test_a_running_server_has_its_own_budget_for_dense_changes(voice: Path) -> None:
    command = ("add", "voice", voice, "--url", "http://127.0.0.1:9", "--dense-budget-bytes", "9")
    assert_refused(run(*command), "--dense-budget-bytes goes with --store")


def test_a_server_that_is_not_there_is_one_line() -> None:
    assert_refused(run("list", "--url", "http://127.0.0.1:9"), "ConnectError")


def assert_refused(result: Result, *words: str) -> None:
    """Fail unless the command ended with status 1 and one line that says all the words."""
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("chorale: ")
    for word in words:
        assert word in line


def test_a_checkpoint_is_added_with_its_base_and_options(store_dir: Path, tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "models" / "tiny")
    base = TinyBase(folder, read_base_dims(folder), load_file(folder / "model.safetensors"))
    weights = meteora_checkpoint(base, mixture(base.dims, (2, 2)))
    write_checkpoint(tmp_path / "mix", weights, "F32")
    (tmp_path / "mix" / "config.json").unlink()
    command = ("add", "mix", tmp_path / "mix", "--store", store_dir, "--base", folder, "--format", "meteora")
    options = {"top_k": 2, "temperature": 1.0, "rank": 2, "alpha": 4}
    (added,) = run_json(*command, "--options", json.dumps(options))
    assert (added["family"], added["rank"]) == ("meteora", 4)
    lacking = run(*command, "--options", '{"top_k": 2}')
    assert lacking.exit_code == 1 and "the option temperature is missing" in lacking.stderr
    unknown = run(*command[:-1], "gguf")
    assert unknown.exit_code == 1 and "known: auto, peft, " in unknown.stderr
    # the store knows the base's dimensions by now, but not where its weights are
    homeless = run("add", "mix", tmp_path / "mix", "--store", store_dir, "--options", json.dumps(options))
    assert homeless.exit_code == 1 and "--base" in homeless.stderr
